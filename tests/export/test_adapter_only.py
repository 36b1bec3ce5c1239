"""The adapter alone, held against PEFT: on the same quantized base it gives the live model's logits."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_adapters import IDS, artifact_of, live_logits, write_adapter, write_chat_base, write_peft_adapter
from tiny_models import relative_error

from qlora_tool.adapters.peft_reading import read_adapter
from qlora_tool.errors import UserError
from qlora_tool.export.adapter_only import write_adapter as export_adapter

PATTERNS = {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 64}}


@torch.no_grad()
def peft_logits(base, adapter, double_quant=True) -> torch.Tensor:
    """Of plain PEFT on a base that bitsandbytes quantizes to NF4."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=settings)
    model = PeftModel.from_pretrained(model, adapter)
    for module in model.modules():
        # For inference bitsandbytes 0.50 multiplies in bf16 on CPUs that have it, whatever dtype it is asked for.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()(input_ids=IDS, use_cache=False).logits


def exported(artifact, folder, portable=True):
    folder.mkdir(parents=True)
    return export_adapter(artifact, folder, portable)


@pytest.mark.parametrize(
    ("family", "adapter"),
    [
        ("llama", {}),
        ("llama", {"use_rslora": True, "r": 6, **PATTERNS}),
        ("llama", {"method": "dora", **PATTERNS}),
        ("llama", {"modules_to_save": ["lm_head"], "bias": "none", **PATTERNS}),
        ("llama-biased", {"bias": "lora_only"}),
        ("gpt2", {"rank_pattern": {"c_attn": 7}}),
    ],
)
def test_peft_computes_the_same(family, adapter, tmp_path):
    base = write_chat_base(family, tmp_path / "base")
    artifact = artifact_of(write_adapter(tmp_path / "adapter", base, **adapter))
    live = live_logits(artifact)
    exported(artifact, tmp_path / "portable")
    assert relative_error(peft_logits(base, tmp_path / "portable"), live) < 1e-5


def test_nothing_is_left_for_a_reader_to_work_out(tmp_path):
    from peft import LoraConfig

    base = write_chat_base("llama", tmp_path / "base")
    artifact = artifact_of(write_adapter(tmp_path / "adapter", base, use_rslora=True, **PATTERNS))
    said = exported(artifact, tmp_path / "portable")
    config = json.loads((tmp_path / "portable" / "adapter_config.json").read_text(encoding="utf-8"))
    assert set(config) <= set(inspect.signature(LoraConfig).parameters)
    assert config["r"] == config["lora_alpha"] == said["r"] == 8
    assert not {"use_rslora", "rank_pattern", "alpha_pattern"} & set(config)
    assert config["base_model_name_or_path"] == str(base.resolve())
    tensors = load_file(tmp_path / "portable" / "adapter_model.safetensors")
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name}
    assert ranks == {8} == {tensor.shape[1] for name, tensor in tensors.items() if "lora_B" in name}


def test_values_keep_their_dtype_where_it_holds_them(tmp_path):
    base = write_chat_base("llama", tmp_path / "base")
    for alpha, expected in ((8, "bfloat16"), (10, "float32")):  # scales of 2 and of 2.5
        folder = write_adapter(tmp_path / str(alpha), base, lora_alpha=alpha)
        tensors = load_file(folder / "adapter_model.safetensors")
        from safetensors.torch import save_file

        save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
        artifact = artifact_of(folder)
        assert exported(artifact, tmp_path / f"portable-{alpha}")["dtype"] == expected
        before = artifact.adapter.layers(torch.float32)
        after = read_adapter(tmp_path / f"portable-{alpha}").layers(torch.float32)
        for name, layer in before.items():
            weight = torch.zeros(layer.lora_B.shape[0], layer.lora_A.shape[1])
            torch.testing.assert_close(after[name].delta(weight), layer.delta(weight), rtol=1e-6, atol=1e-7)


def test_an_adapter_of_peft_with_a_pattern_for_its_modules(tmp_path):
    base = write_chat_base("llama", tmp_path / "base")
    settings = {"target_modules": r".*\.(q_proj|down_proj)", "layers_to_transform": None, "lora_bias": False}
    artifact = artifact_of(write_peft_adapter(tmp_path / "adapter", base, **settings), quantization="nf4")
    live = live_logits(artifact)
    exported(artifact, tmp_path / "portable")
    config = json.loads((tmp_path / "portable" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_modules"] == sorted(
        f"model.layers.{layer}.{name}" for layer in range(2) for name in ("self_attn.q_proj", "mlp.down_proj")
    )
    assert relative_error(peft_logits(base, tmp_path / "portable"), live) < 1e-5


def test_the_plain_form_is_a_copy(tmp_path):
    base = write_chat_base("llama", tmp_path / "base")
    folder = write_adapter(tmp_path / "adapter", base, **PATTERNS)
    (folder / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    said = exported(artifact_of(folder), tmp_path / "copy", portable=False)
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (folder / name).read_bytes()
    readers = said.pop("readers")
    assert readers["PEFT"] is None and "rank_pattern" in readers["vLLM"]
    assert said == {"method": "lora", "layers": 14, "base": str(base.resolve())}


def test_another_method_than_lora_has_no_portable_form(tmp_path):
    base = write_chat_base("llama", tmp_path / "base")
    artifact = artifact_of(write_adapter(tmp_path / "adapter", base, method="loha"))
    with pytest.raises(UserError, match="its readers know LoRA alone, and this adapter is loha"):
        exported(artifact, tmp_path / "portable")


def test_added_tokens_are_said(tmp_path):
    """A reader has to give the base the rows that the adapter's embeddings have."""
    base = write_chat_base("llama", tmp_path / "base")
    folder = write_adapter(tmp_path / "adapter", base, modules_to_save=["embed_tokens"])
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    rows = config["vocab_size"]
    assert "resize_token_embeddings" not in exported(artifact_of(folder), tmp_path / "same")
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": rows - 3}), encoding="utf-8")
    assert exported(artifact_of(folder), tmp_path / "more")["resize_token_embeddings"] == rows
