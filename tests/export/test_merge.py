"""What is merged, against the live quantized model, PEFT, bitsandbytes and plain torch."""

from __future__ import annotations

import json
import re
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_adapters import artifact_of, live_logits, peft_logits, plain_logits, write_adapter, write_peft_adapter
from tiny_models import FAMILIES, write_tiny

from qlora_tool.build.open import open_model
from qlora_tool.errors import UserError
from qlora_tool.export import merge
from qlora_tool.export.options import ExportOptions
from qlora_tool.export.write import export_merged

OVERFLOWING = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
FP32 = ExportOptions(dtype="float32")
PATTERNS = {"rank_pattern": {"q_proj": 8, "layers.0.mlp.up_proj": 2}, "alpha_pattern": {"v_proj": 16.0}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory):
    """A family's tiny model in fp32, written once."""
    folder = tmp_path_factory.mktemp("bases")
    return lambda family: folder / family if (folder / family).exists() else write_tiny(family, folder / family)


def assert_same_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Both take the same products in fp32, in another order. A product over up to 256 terms is off by 256·6e-8 = 1.5e-5
    of its size at worst, usually by its square root; in bf16 it would be 4e-3."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1.5e-5 * float(expected.abs().max()))


def assert_export_is_live(adapter: Path, output: Path, **options) -> None:
    artifact = artifact_of(adapter, **options)
    live = live_logits(artifact)
    export_merged(artifact, output, FP32)
    assert_same_logits(plain_logits(output), live)
    untuned = plain_logits(Path(artifact.model.name_or_path))
    assert (live - untuned).abs().max() > 0.02 * untuned.abs().max()  # quantization and adapter change something


@pytest.mark.parametrize(
    "quantization",
    [
        {"quantization": "nf4"},
        {"quantization": "nf4", "double_quant": False},
        {"quantization": "fp4"},
        {"quantization": "int8"},
        {"quantization": "none"},
    ],
    ids=lambda value: "-".join(map(str, value.values())),
)
def test_every_quantization(base, tmp_path: Path, quantization):
    adapter = write_adapter(tmp_path / "adapter", base("llama"), **quantization)
    assert_export_is_live(adapter, tmp_path / "merged")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(base, tmp_path: Path, family: str):
    """Under the names and shapes of its own checkpoint."""
    assert_export_is_live(write_adapter(tmp_path / "adapter", base(family)), tmp_path / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (base(family), tmp_path / "merged"))
    assert {name: t.shape for name, t in after.items()} == {name: t.shape for name, t in before.items()}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"use_rslora": True, **PATTERNS}),
        ("llama", {"method": "dora", **PATTERNS}),
        ("llama", {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]}),
        ("llama-tied", {"method": "dora", "use_rslora": True}),
        ("llama-tied", {"modules_to_save": ["lm_head"]}),
        ("llama-tied", {"target_modules": ["v_proj", "lm_head"]}),
        ("llama-biased", {"bias": "all", "modules_to_save": ["norm"]}),
        ("llama-biased", {"bias": "lora_only", "target_modules": ["q_proj"]}),
        ("llama-odd", {"method": "dora"}),
        ("gpt2", {"bias": "lora_only"}),
        ("gpt2", {"method": "dora", "target_modules": ["c_attn", "c_fc"], "modules_to_save": ["h.1.mlp.c_proj"]}),
        ("qwen3_moe", {"modules_to_save": ["lm_head"]}),
        ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
        ("llama-tied", {"target_modules": ["embed_tokens"]}),
        ("gemma", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
        ("gpt2", {"target_modules": ["wte", "wpe", "c_attn"], "use_rslora": True}),
        ("phi3", {"target_modules": ["qkv_proj.q", "gate_up_proj.up"], "use_rslora": True}),
        ("gpt2", {"target_modules": ["c_attn.v"]}),
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 17]}),
        ("llama-tied", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 17]}),
        ("llama-tied", {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [8, 99]}}),
        ("gemma", {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5], "lm_head": [8, 99]}}),
        *((family, {"target_modules": ["o_proj"], "target_parameters": ["gate_up_proj", "down_proj"]})
          for family in ("mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "deepseek_v3")),
        ("qwen2_moe", {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
    ],
    ids=str,
)
def test_methods(base, tmp_path: Path, family, settings):
    adapter = write_adapter(tmp_path / "adapter", base(family), **settings)
    assert_export_is_live(adapter, tmp_path / "merged")


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"target_modules": "all-linear"}),
        ("llama", {"target_modules": "all-linear", "use_rslora": True, **PATTERNS}),
        ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("llama", {"target_modules": ["q_proj", "lm_head"]}),
        ("llama-biased", {"target_modules": ["q_proj", "up_proj"], "lora_bias": True}),
        ("llama-biased", {"target_modules": ["q_proj"], "lora_bias": True, "bias": "lora_only"}),
        ("llama-biased", {"target_modules": ["q_proj"], "bias": "all"}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "lora_bias": True}),
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "modules_to_save": ["c_fc"]}),
        # PEFT copies a tied tensor when it trains it whole: the two come apart, unless it is told to keep them tied.
        ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
        ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
        ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
        ("llama-tied", {"target_modules": ["q_proj", "lm_head"]}),
        ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}),
        ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    ],
    ids=str,
)
def test_adapters_that_peft_made(base, tmp_path: Path, family, settings):
    """On the unquantized base, PEFT's own logits; on the quantized one, the live model's."""
    adapter = write_peft_adapter(tmp_path / "adapter", base(family), **settings)
    export_merged(artifact_of(adapter, quantization="none"), tmp_path / "plain", FP32)
    assert_same_logits(plain_logits(tmp_path / "plain"), peft_logits(base(family), adapter))
    assert_export_is_live(adapter, tmp_path / "merged", quantization="nf4")


def test_weights_are_those_of_bitsandbytes_plus_the_delta(base, tmp_path: Path):
    adapter = write_adapter(tmp_path / "adapter", base("llama"), double_quant=False, lora_alpha=6)
    export_merged(artifact_of(adapter), tmp_path / "merged", FP32)
    name = "model.layers.1.mlp.down_proj"
    weight = load_file(base("llama") / "model.safetensors")[f"{name}.weight"]
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4")
    tensors = load_file(adapter / "adapter_model.safetensors")
    lora_A, lora_B = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    expected = bnb.dequantize_4bit(codes, state) + 6 / 4 * (lora_B @ lora_A)
    found = load_file(tmp_path / "merged" / "model.safetensors")[f"{name}.weight"]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_files_are_rounded_once(tmp_path: Path, family: str, dtype: torch.dtype):
    """Each tensor is the fp32 merge rounded to the files' dtype, bit for bit; through another dtype it would not be."""
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    stored = write_tiny(family, tmp_path / "base", dtype=other)
    adapter = write_adapter(tmp_path / "adapter", stored, method="dora" if family == "llama" else "lora")
    name = str(dtype).removeprefix("torch.")
    for kind in ("float32", name):
        export_merged(artifact_of(adapter), tmp_path / kind, ExportOptions(dtype=kind))
    exact = load_file(tmp_path / "float32" / "model.safetensors")
    found = load_file(tmp_path / name / "model.safetensors")
    assert exact.keys() == found.keys()
    assert {tensor.dtype for tensor in exact.values()} == {torch.float32}
    twice = 0
    for key, tensor in found.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, exact[key].to(dtype)), key
        twice += int((tensor != exact[key].to(other).to(dtype)).sum())
    assert twice > 1000  # what rounding on the way would have changed


def dtypes_of(folder: Path) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in load_file(folder / "model.safetensors").items()}


def test_auto_takes_float16_and_leaves_what_is_wider(tmp_path: Path):
    stored = write_tiny("llama", tmp_path / "base", dtype=torch.bfloat16)
    file = stored / "model.safetensors"
    save_file({name: t.float() if "norm" in name else t for name, t in load_file(file).items()}, file, {"format": "pt"})
    adapter = write_adapter(tmp_path / "adapter", stored)
    result = export_merged(artifact_of(adapter), tmp_path / "merged", ExportOptions())
    expected = {name: torch.float32 if "norm" in name else torch.float16 for name in dtypes_of(stored)}
    assert dtypes_of(tmp_path / "merged") == expected
    assert result.dtype == json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "float16"
    assert result.dtype_reason == "every value fits, and it rounds eight times finer than bfloat16"


@pytest.mark.parametrize(
    ("family", "dtype", "chosen"),
    [("llama", torch.float32, "float32"), ("llama", torch.float16, "float16"), ("gemma2", torch.bfloat16, "bfloat16"),
     ("gemma2", torch.float16, "float16"), ("gemma2", torch.float32, "float32")],
)  # fmt: skip
def test_auto_leaves_fp32_bases_and_families_that_overflow(tmp_path: Path, family, dtype, chosen):
    stored = write_tiny(family, tmp_path / "base", dtype=dtype)
    artifact = artifact_of(write_adapter(tmp_path / "adapter", stored))
    result = export_merged(artifact, tmp_path / "merged", ExportOptions())
    assert result.dtype == chosen
    assert set(dtypes_of(tmp_path / "merged").values()) == {getattr(torch, chosen)}
    assert ("gemma2 models overflow" in result.dtype_reason) == (chosen == "bfloat16")


@pytest.mark.parametrize(
    ("factor", "reason"),
    [(1e8, r"^float16 does not hold every value: model\.layers\.1\.mlp\.up_proj\.weight has values up to \S+e\+0\d$"),
     (0.0, r"^float16 does not hold every value: model\.embed_tokens\.weight has typical values of \de-0[78], too ")],
)  # fmt: skip
def test_auto_turns_to_bfloat16_where_float16_does_not_hold_all(tmp_path: Path, factor: float, reason: str):
    stored = write_tiny("llama", tmp_path / "base", dtype=torch.bfloat16)
    adapter = write_adapter(tmp_path / "adapter", stored)
    if factor:
        scale_tensor(adapter / "adapter_model.safetensors", OVERFLOWING, factor)
    else:
        scale_tensor(stored / "model.safetensors", "model.embed_tokens.weight", 1e-6)
    artifact = artifact_of(adapter, model=str(stored))
    result = export_merged(artifact, tmp_path / "merged", ExportOptions(max_shard_size=20_000))
    assert result.dtype == "bfloat16"
    assert re.search(reason, result.dtype_reason)
    export_merged(artifact, tmp_path / "asked", ExportOptions(dtype="bfloat16", max_shard_size=20_000))
    for file in result.files:
        assert (tmp_path / "merged" / file).read_bytes() == (tmp_path / "asked" / file).read_bytes()


def test_a_few_tiny_values_do_not_turn_auto_away_from_float16(tmp_path: Path):
    """Stored in bfloat16 they are exact there and not in float16; of the whole matrix they are nothing."""
    stored = write_tiny("llama", tmp_path / "base", dtype=torch.bfloat16)
    file, name = stored / "model.safetensors", "model.embed_tokens.weight"
    tensors = load_file(file)
    tensors[name][:, ::8] = 1.1e-7
    save_file(tensors, file, {"format": "pt"})
    adapter = write_adapter(tmp_path / "adapter", stored)
    assert export_merged(artifact_of(adapter), tmp_path / "merged", ExportOptions()).dtype == "float16"


def scale_tensor(file: Path, name: str, factor: float) -> None:
    tensors = load_file(file)
    save_file(tensors | {name: tensors[name] * factor}, file, {"format": "pt"})


def test_original_base_is_the_checkpoint_plus_the_delta(base, tmp_path: Path):
    for family in ("llama", "gpt2"):
        adapter = write_adapter(tmp_path / f"{family} adapter", base(family), target_modules="all-linear")
        output = tmp_path / f"{family} merged"
        export_merged(artifact_of(adapter), output, ExportOptions(base="original", dtype="float32"))
        assert_same_logits(plain_logits(output), peft_logits(base(family), adapter))


def test_tied_tensors_are_written_once_unless_they_come_apart(base, tmp_path: Path):
    pair = {"model.embed_tokens.weight", "lm_head.weight"}
    for index, (settings, expected, tied) in enumerate(
        [
            ({"target_modules": ["q_proj"]}, {"model.embed_tokens.weight"}, True),
            ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, {"model.embed_tokens.weight"}, True),
            ({"target_modules": ["q_proj", "lm_head"]}, pair, False),
        ]
    ):
        adapter = write_adapter(tmp_path / f"adapter {index}", base("llama-tied"), **settings)
        output = tmp_path / f"merged {index}"
        export_merged(artifact_of(adapter), output, FP32)
        assert pair & load_file(output / "model.safetensors").keys() == expected
        assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is tied


def test_a_base_that_holds_its_tied_tensor_under_the_other_name(tmp_path: Path):
    stored = write_tiny("llama-tied", tmp_path / "base")
    file = stored / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file, {"format": "pt"})
    assert_export_is_live(write_adapter(tmp_path / "adapter", stored), tmp_path / "merged")
    whole = write_adapter(tmp_path / "whole", stored, modules_to_save=["embed_tokens"])
    assert_export_is_live(whole, tmp_path / "merged whole")


def test_a_base_whose_tied_tensors_differ_keeps_them_apart(tmp_path: Path):
    stored = write_tiny("llama-tied", tmp_path / "base")
    file = stored / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] * 2}, file, {"format": "pt"})
    assert_export_is_live(write_adapter(tmp_path / "adapter", stored), tmp_path / "merged")


def test_an_adapter_for_another_base_is_refused_in_one_line(base, tmp_path: Path):
    adapter = write_adapter(tmp_path / "adapter", base("llama"), target_modules=["q_proj"])
    with pytest.raises(UserError) as failure:
        export_merged(artifact_of(adapter, model=str(base("llama-odd"))), tmp_path / "merged", FP32)
    (line,) = failure.value.lines
    assert line == (
        f"{adapter}: not for the base {base('llama-odd')}: 2 of its 2 layers and tensors do not fit, the "
        "first because it adapts "
        "model.layers.0.self_attn.q_proj as (64, 64), but it is (36, 36) in this model; name the base that it was "
        f"trained on, {base('llama')}, with --model"
    )
    with pytest.raises(UserError, match=r"adapts model\.layers\.0\.self_attn\.q_proj, which is not a linear module"):
        export_merged(artifact_of(adapter, model=str(base("gpt2"))), tmp_path / "merged", FP32)
    assert not (tmp_path / "merged").exists()


def test_whole_tensors_that_do_not_fit_are_refused(base, tmp_path: Path):
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    adapter = write_peft_adapter(tmp_path / "adapter", base("llama"), **settings)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    grown = torch.cat([tensors["base_model.model.lm_head.weight"], torch.zeros(2, 64)])  # two new tokens
    save_file(tensors | {"base_model.model.lm_head.weight": grown, "base_model.model.model.extra": grown.clone()}, file)
    with pytest.raises(UserError) as failure:
        export_merged(artifact_of(adapter, quantization="nf4"), tmp_path / "merged", FP32)
    (line,) = failure.value.lines
    assert "2 of its 4 layers and tensors do not fit, the first because it replaces lm_head.weight with one " in line
    assert "of shape (133, 64)," in line
    assert "but it is (131, 64) in this model; the vocabulary was resized to 133 tokens before training: call " in line


def test_a_bias_without_a_place_is_refused(base, tmp_path: Path):
    adapter = write_peft_adapter(tmp_path / "adapter", base("llama-biased"), target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.q_proj: the adapter adds a bias, but the model"):
        export_merged(artifact_of(adapter, quantization="nf4", model=str(base("llama"))), tmp_path / "merged", FP32)


def test_values_beyond_float16_name_their_tensors(tmp_path: Path):
    stored = write_tiny("llama", tmp_path / "base", dtype=torch.bfloat16)
    adapter = write_adapter(tmp_path / "adapter", stored)
    scale_tensor(adapter / "adapter_model.safetensors", OVERFLOWING, 1e8)
    scale_tensor(adapter / "adapter_model.safetensors", OVERFLOWING.replace("layers.1", "layers.0"), 1e7)
    before = sorted(tmp_path.iterdir())
    message = (
        r"^--dtype float16: model\.layers\.1\.mlp\.up_proj\.weight has values up to \S+e\+0\d, "
        r"model\.layers\.0\.mlp\.up_proj\.weight has values up to \S+e\+0\d, beyond float16's 65504; choose "
    )
    with pytest.raises(UserError, match=message):
        export_merged(artifact_of(adapter), tmp_path / "merged", ExportOptions(dtype="float16"))
    assert sorted(tmp_path.iterdir()) == before
    export_merged(artifact_of(adapter), tmp_path / "merged", ExportOptions(dtype="bfloat16"))


def test_a_cached_quantized_base_gives_the_same_files(base, tmp_path: Path, monkeypatch):
    for family in ("llama-tied", "gpt2", "mixtral"):
        for quantization in ("nf4", "int8"):
            name = f"{family} {quantization}"
            artifact = artifact_of(write_adapter(tmp_path / f"{name} adapter", base(family), quantization=quantization))
            export_merged(artifact, tmp_path / f"{name} first", FP32)
            open_model(artifact.model.model_copy(update={"keep_quantized": True}))
            with monkeypatch.context() as patch:
                patch.setattr(merge, "quantize_parameter", None)  # nothing is left to quantize
                export_merged(artifact, tmp_path / f"{name} second", FP32)
            first, second = (load_file(tmp_path / f"{name} {which}/model.safetensors") for which in ("first", "second"))
            assert first.keys() == second.keys()
            assert all(torch.equal(first[key], second[key]) for key in first)
