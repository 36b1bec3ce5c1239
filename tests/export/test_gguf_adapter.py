"""LoRA as a GGUF adapter: what the file adds to each tensor of the base's file, held against the merged model."""

from __future__ import annotations

import json
import math

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_adapters import (
    FP32,
    artifact_of,
    write_adapter,
    write_chat_base,
    write_peft_adapter,
    write_run,
    write_two_runs,
)
from tiny_ggufs import CHANGES, LLAMA_CPP_ONLY, merged_of
from tiny_models import relative_error
from tokenizers_for_tests import CHATML

from qlora_tool.artifacts import BaseOptions
from qlora_tool.errors import UserError
from qlora_tool.export.gguf.adapter import base_of, refuse_unholdable, write_adapter_gguf
from qlora_tool.export.gguf.families import TensorNames, find_family
from qlora_tool.export.write import ExportOptions, export_merged
from qlora_tool.inference.named import find_named

EXPERTS = {"mixtral", "qwen3_moe"}


def as_llama_cpp_computes(file) -> dict[str, torch.Tensor]:
    """What llama.cpp adds to each tensor: (alpha / r)·B·A, r being B's row (src/llama-adapter.h); embeddings are looked
    up in A (vocabulary, r) and multiplied with B (dim, r) (build_inp_embd)."""
    reader = gguf.GGUFReader(file)
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F32"}
    alpha = reader.fields["adapter.lora.alpha"].contents()
    stored = {tensor.name: torch.from_numpy(np.array(tensor.data)).double() for tensor in reader.tensors}
    found = {}
    for name in {name.rpartition(".")[0] for name in stored}:
        lora_A, lora_B = stored[f"{name}.lora_a"], stored[f"{name}.lora_b"]
        scale = alpha / lora_B.shape[-1] if alpha else 1.0
        found[name] = scale * (lora_A @ lora_B.T if name == "token_embd.weight" else lora_B @ lora_A)
    return found


def merged_less_base(merged) -> dict[str, torch.Tensor]:
    """What merging changes in each tensor of the GGUF file."""
    config = merged.skeleton.config
    names = TensorNames(find_family(config), config, merged.skeleton.base_model_prefix)
    merged.dtype, found = torch.float32, {}
    for model in (base_of(merged), merged):
        laid_out = {}
        for group in model.groups:
            laid_out |= {name: t.double() for name, t in names.convert(model.tensors(group)).items()}
        found = {name: tensor - found[name] if found else tensor for name, tensor in laid_out.items()}
    return {name: tensor for name, tensor in found.items() if tensor.abs().max() > 0}


def written(tmp_path, family="llama", changes=None, with_base=False, peft=False, trained=False, **keys):
    base = write_chat_base(family, tmp_path / "base", **(changes or {}))
    if trained:
        artifact = artifact_of(write_run(tmp_path / "run", base, adapter=keys, max_steps=1))
    else:
        write = write_peft_adapter if peft else write_adapter
        artifact = artifact_of(write(tmp_path / "adapter", base, **keys), **({"quantization": "nf4"} if peft else {}))
    merged = merged_of(artifact, base)
    refuse_unholdable(artifact, merged, with_base)
    file = tmp_path / "adapter.gguf"
    return file, merged, write_adapter_gguf(merged, file, "base")


def same_updates(file, merged):
    found, expected = as_llama_cpp_computes(file), merged_less_base(merged)
    assert found.keys() == expected.keys()
    for name, update in expected.items():  # merged and base are fp32: their difference is off by 2^-24 of a weight
        assert relative_error(found[name], update) < 1e-5, name


@pytest.mark.parametrize("case", [*CHANGES, *(case for case, (family, _) in LLAMA_CPP_ONLY.items() if case == family)])
def test_every_family_gets_the_update_that_merging_adds(case, tmp_path):
    family, changes = LLAMA_CPP_ONLY.get(case) or (case, CHANGES[case])
    on_experts = {"target_parameters": ["gate_up_proj", "down_proj"]} if case in EXPERTS else {}
    file, merged, facts = written(tmp_path, family, changes, **on_experts)
    same_updates(file, merged)
    assert facts["architecture"] == find_family(merged.skeleton.config).architecture
    if case in EXPERTS:
        names = {tensor.name for tensor in gguf.GGUFReader(file).tensors}
        assert {f"blk.0.ffn_{part}_exps.weight.lora_{ab}" for part in ("gate", "up", "down") for ab in "ab"} <= names


def test_what_llama_cpp_looks_for(tmp_path):
    file, _, facts = written(tmp_path)
    fields = {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == "llama" and fields["adapter.lora.alpha"] == 8.0
    kind = gguf.GGUFReader(file).fields["adapter.lora.alpha"].types
    assert kind == [gguf.GGUFValueType.FLOAT32]  # llama.cpp aborts on any other
    assert facts == {"architecture": "llama", "tensors": 14, "r": [4, 4], "alpha": 8.0, "scaled": 0}


@pytest.mark.parametrize(
    ("keys", "alpha", "scaled"),
    [
        ({"lora_alpha": 10, "r": 3}, 10, 0),  # 10 / 3 as fp32 divides
        ({"use_rslora": True, "r": 4}, 16, 0),  # 8 / √4 = 16 / 4
        ({"use_rslora": True, "r": 3}, float(np.float32(8 * math.sqrt(3))), 0),
        ({"rank_pattern": {"q_proj": 8}}, 8, 0),  # llama.cpp divides by the tensor's own rank
        ({"rank_pattern": {"q_proj": 8}, "use_rslora": True}, 16, 2),
        ({"alpha_pattern": {"q_proj": 9.5, "k_proj": 0.3}}, 8, 4),
    ],
    ids=str,
)
def test_scales(keys, alpha, scaled, tmp_path):
    file, merged, facts = written(tmp_path, **keys)
    assert (facts["alpha"], facts["scaled"]) == (alpha, scaled)
    same_updates(file, merged)


def test_an_alpha_of_zero_is_no_alpha_of_one(tmp_path):
    """llama.cpp takes 0 for an adapter without alpha, whose scale is 1."""
    folder = write_adapter(tmp_path / "adapter", base := write_chat_base("llama", tmp_path / "base"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 0}))
    write_adapter_gguf(merged_of(artifact_of(folder), base), tmp_path / "adapter.gguf", "base")
    assert not any(update.any() for update in as_llama_cpp_computes(tmp_path / "adapter.gguf").values())


@pytest.mark.parametrize("peft", [False, True])
def test_embeddings_and_the_output_layer(peft, tmp_path):
    file, merged, _ = written(tmp_path, peft=peft, target_modules=["embed_tokens", "lm_head", "q_proj"])
    same_updates(file, merged)
    assert {"token_embd.weight", "output.weight"} <= as_llama_cpp_computes(file).keys()


def test_a_symmetric_start_is_one_lora_of_twice_the_rank(tmp_path):
    file, merged, facts = written(tmp_path, trained=True, init_lora_weights="symmetric")
    same_updates(file, merged)
    assert facts["r"] == [8, 8]


def test_a_start_that_changed_the_base_needs_that_base(tmp_path):
    file, merged, facts = written(tmp_path, trained=True, with_base=True, init_lora_weights="pissa")
    same_updates(file, merged)
    assert facts["r"] == [4, 4]  # of the base without the start, not of the checkpoint's
    with pytest.raises(UserError, match=r"took its start \(pissa\) out of the base.*give --with-base"):
        refuse_unholdable(artifact_of(tmp_path / "run"), merged, False)
    options = ExportOptions(format="gguf-adapter", with_base=True, verify=True)
    result = export_merged(artifact_of(tmp_path / "run"), tmp_path / "out", options)
    assert result.proof.agreement.mean_kl < 1e-5  # of the base's rounding to f16
    assert result.facts["gguf_adapter"]["base"].endswith("at its start: no model by itself")


def test_the_base_may_be_in_few_bits_and_the_adapter_is_the_same(tmp_path):
    base = write_chat_base("llama", tmp_path / "base")
    artifact, bytes_of = artifact_of(write_adapter(tmp_path / "adapter", base)), {}
    for kind in ("F16", "Q4_0"):
        options = ExportOptions(format="gguf-adapter", with_base=True, gguf_type=kind.lower())
        export_merged(artifact, tmp_path / kind, options)
        written = gguf.GGUFReader(tmp_path / kind / "base.gguf").tensors
        kinds = {tensor.name: tensor.tensor_type.name for tensor in written}
        assert kinds["blk.0.attn_q.weight"] == kind
        bytes_of[kind] = (tmp_path / kind / "adapter.gguf").read_bytes()
    assert bytes_of["F16"] == bytes_of["Q4_0"]


def test_what_an_adapters_file_leaves_to_its_base_is_said(tmp_path):
    """The chat template and the ends of an answer are in a base's GGUF file, which may be another program's."""
    base = write_chat_base("llama", tmp_path / "base")
    artifact, told = artifact_of(write_run(tmp_path / "run", base, max_steps=1)), {}
    for name in ("same", "other", "with base"):
        options = ExportOptions(format="gguf-adapter", with_base=name == "with base")
        told[name] = export_merged(artifact, tmp_path / name, options).facts["gguf_adapter"].get("left_to_base")
        (base / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
        (base / "generation_config.json").write_text('{"eos_token_id": 5}', encoding="utf-8")
    assert (told["same"], told["with base"]) == ([], None)
    template, ends = told["other"]
    assert "chat template that it was trained with" in template and "an answer ends in " in ends
    assert (tmp_path / "other" / "chat_template.jinja").read_text(encoding="utf-8") == CHATML
    assert not (tmp_path / "same" / "chat_template.jinja").exists()
    assert template in (tmp_path / "other" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("with_base", [False, True])
def test_without_rows_it_is_written_unverified(with_base, tmp_path):
    base = write_chat_base("llama", tmp_path / "base")
    artifact = artifact_of(write_peft_adapter(tmp_path / "adapter", base, use_rslora=True), quantization="none")
    options = ExportOptions(format="gguf-adapter", with_base=with_base, verify=True)
    result = export_merged(artifact, tmp_path / "out", options)
    assert "give some with --verify-data FILE" in result.not_verified and not result.proof.warnings()


def test_an_adapter_in_the_form_of_another_method(tmp_path):
    """`additive` is saved as the LoRA that equals it."""
    file, merged, _ = written(tmp_path, trained=True, method="additive")
    same_updates(file, merged)


# ------------------------------------------------------------------------------------------------------ refusals


def test_several_adapters_are_refused(tmp_path):
    two = write_two_runs(tmp_path)
    artifact = find_named(str(two / "sums"), BaseOptions(**FP32), adapter=[f"other={two / 'other'}:0.5"], weighted=True)
    with pytest.raises(UserError, match=r"^--format gguf-adapter: a sum of adapters is not.*--lora-scaled.*--format"):
        export_merged(artifact.summed(), tmp_path / "out", ExportOptions(format="gguf-adapter"))


def test_values_beyond_the_files_are_refused(tmp_path):
    base = write_chat_base("llama", tmp_path / "base")
    folder = write_adapter(tmp_path / "adapter", base, alpha_pattern={"v_proj": 1e30})
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: tensor * 1e12 for name, tensor in tensors.items()}, folder / "adapter_model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(UserError, match=r"adapter of blk\.0\.attn_v\.weight has values that float32 does not hold"):
        export_merged(artifact_of(folder), tmp_path / "out", ExportOptions(format="gguf-adapter"))
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


@pytest.mark.parametrize(
    ("family", "keys", "said"),
    [
        ("llama", {"method": "dora"}, "llama.cpp's adapters are LoRA, and this one is dora"),
        ("llama", {"method": "loha"}, "llama.cpp's adapters are LoRA, and this one is loha"),
        ("llama", {"modules_to_save": ["lm_head"]}, "this one has lm_head.weight;"),
        ("llama-biased", {"bias": "all"}, "this one has model.layers.0.mlp.down_proj.bias and 13 more"),
        ("llama", {"trainable_token_indices": [5]}, "this one has rows of model.embed_tokens;"),
        ("llama-tied", {"target_modules": ["embed_tokens"]}, "input and output embeddings are one tensor"),
        ("gpt2", {"target_modules": ["wpe"]}, "on position_embd.weight, which llama.cpp looks up without adapters"),
        ("gpt_neo", {}, "'gpt_neo' is not among the families that it knows"),
    ],
    ids=str,
)
def test_what_the_file_cannot_hold(family, keys, said, tmp_path):
    with pytest.raises(UserError) as refused:
        written(tmp_path, family, **keys)
    (line,) = refused.value.lines
    assert line.startswith("--format gguf-adapter: ") and said in line and "; choose --format " in line
