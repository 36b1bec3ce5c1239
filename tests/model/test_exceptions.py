"""Weights that stay unquantized while the rest is quantized, against transformers, bitsandbytes and PEFT."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from stored_models import SKIPPED, dequantized, write_quantized
from tiny_models import logits, read_tiny, relative_error, tiny_config, tokens, write_tiny

from qlora_tool.build.open import open_model
from qlora_tool.build.setup import Setup
from qlora_tool.config import ModelConfig, load_config
from qlora_tool.errors import UserError
from qlora_tool.model.exceptions import is_named, refuse_unknown_names
from qlora_tool.model.layer_stack import layer_stack
from qlora_tool.model.load import build_skeleton, load_base
from qlora_tool.model.slots import Quantization, find_slots
from qlora_tool.model.source import read_model_config
from qlora_tool.weights.handles import WeightHandle


def kinds_of(model) -> dict[str, str]:
    return {name: module.kind for name, module in model.named_modules() if isinstance(module, WeightHandle)}


@pytest.mark.parametrize("family", SKIPPED)
@pytest.mark.parametrize(("kind", "double_quant"), [("nf4", True), ("nf4", False), ("int8", True)])
def test_a_checkpoints_own_exceptions_stay_as_stored(family, kind, double_quant, tmp_path):
    folder, theirs = write_quantized(family, tmp_path, kind, double_quant)
    stored = load_file(folder / "model.safetensors")
    model = read_tiny(folder, kind, double_quant)
    kinds = kinds_of(model)
    for name, found in kinds.items():
        if name in stored and name != "lm_head.weight":
            assert found == ("none" if stored[name].is_floating_point() else kind), name
            if found == "none":
                expected = stored[name].T if model.get_submodule(name.rpartition(".")[0]).__dict__.get(
                    "transposed") else stored[name]  # fmt: skip
                assert torch.equal(model.get_submodule(name).dense(torch.float32), expected.float()), name
    assert {"none", kind} <= set(kinds.values()) or family == "falcon"
    if kind != "int8":  # whose products bitsandbytes rounds to int8 too
        expected = logits(dequantized(theirs), tokens())
        assert relative_error(logits(model, tokens()), expected) < 1e-5


@pytest.mark.parametrize("family", SKIPPED)
@pytest.mark.parametrize("listed", [True, False])
def test_the_configuration_alone_tells_the_same_exceptions_as_the_files(family, listed, tmp_path):
    folder, _ = write_quantized(family, tmp_path, skipped=None if listed else ["lm_head"])
    by_files = find_slots(build_skeleton(read_model_config(folder)))
    (folder / "model.safetensors").unlink()
    assert find_slots(build_skeleton(read_model_config(folder))) == by_files


def test_names_mean_what_they_mean_to_bitsandbytes():
    from transformers.quantizers.quantizers_utils import should_convert_module

    names = ["model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj", "model.layers.1", "lm_head", "xlm_head",
             "model.layers.3.mlp.gate", "model.layers.3.mlp.gate_proj"]  # fmt: skip
    for pattern in ("model.layers.1", "up_proj", r"model\.layers\.\d+\.mlp\.gate", "lm_head", "model.layers.*up"):
        found = [is_named(name, [pattern]) for name in names]
        if pattern not in ("model.layers.1", r"model\.layers\.\d+\.mlp\.gate", "model.layers.*up"):  # 5.17 forgot dots
            assert found == [not should_convert_module(name, [pattern]) for name in names], pattern
    assert [is_named(name, ["model.layers.1"]) for name in names] == [True, False, True, *[False] * 4]
    assert [is_named(name, [r"model\.layers\.\d+\.mlp\.gate"]) for name in names] == [*[False] * 5, True, False]


def read_skipping(folder, *names: str, kind: str = "nf4"):
    skipped = names[0] if names == ("as-peft",) else names
    return load_base(folder, read_model_config(folder), Quantization(kind, True, "as_stored", skipped),
                     torch.device("cpu"), torch.float32)  # fmt: skip


def test_named_modules_are_not_quantized(tmp_path):
    folder = write_tiny("llama", tmp_path)
    kinds = kinds_of(read_skipping(folder, "model.layers.0.mlp", "o_proj"))
    for name, kind in kinds.items():
        plain = name.startswith("model.layers.0.mlp.") or "o_proj" in name or name == "lm_head.weight"
        assert kind == ("none" if plain else "nf4"), name


def test_experts_are_quantized_and_counted_unless_left(tmp_path):
    folder = write_tiny("qwen3_moe", tmp_path, dtype=torch.bfloat16)
    model = read_tiny(folder, "nf4")
    beyond = model.beyond_peft
    assert sorted(beyond.weights) == sorted(name for name, kind in kinds_of(model).items() if "experts" in name)
    assert beyond.unquantized_bytes == sum(2 * torch.Size(model.get_submodule(name).shape).numel()
                                           for name in beyond.weights)  # fmt: skip
    held = sum(tensor.nbytes for name in beyond.weights for tensor in model.get_submodule(name).tensors().values())
    assert beyond.bytes == held
    assert f"in nf4 take {held / 1e6:,.1f} MB instead of {beyond.unquantized_bytes / 1e6:,.1f} MB" in str(beyond)
    for skipped in ("as-peft", "experts"):
        left = read_skipping(folder, skipped)
        assert not hasattr(left, "beyond_peft")
        assert {kind for name, kind in kinds_of(left).items() if "experts" in name} == {"none"}


@pytest.mark.parametrize("family", ["qwen3_moe", "falcon", "mixtral", "llama", "gpt2", "opt-projected", "gpt_neox"])
def test_as_peft_is_the_base_that_transformers_and_bitsandbytes_make(family, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = write_tiny(family, tmp_path, dtype=torch.bfloat16)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                bnb_4bit_compute_dtype=torch.float32)  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32,
                                                  device_map="cpu")  # fmt: skip
    found, expected = logits(read_skipping(folder, "as-peft"), tokens()), logits(dequantized(theirs), tokens())
    assert relative_error(found, expected) < 1e-5


def test_a_name_that_fits_no_module_is_refused_with_the_closest():
    with pytest.raises(UserError) as raised:
        refuse_unknown_names("model.skip_modules", ["dwn_proj", "lm_head", "(", "experts"],
                             build_skeleton(tiny_config("llama")))  # fmt: skip
    first, second, third = raised.value.lines
    assert first.startswith("model.skip_modules: 'dwn_proj' fits no module of this model; did you mean 'down_proj'?")
    assert "'(' is neither a module's name nor a regular expression" in second
    assert "'experts'" in third


@pytest.mark.parametrize(("pattern", "left"), [("mlp", ".mlp."), ("self_attn", ".self_attn."), ("layers.1", ".1.")])
def test_a_name_of_blocks_alone_is_refused_with_what_leaves_them(pattern, left, tmp_path):
    model = build_skeleton(tiny_config("llama"))
    with pytest.raises(UserError, match=f"'{pattern}' ends the names of blocks") as raised:
        refuse_unknown_names("model.skip_modules", [pattern, "o_proj"], model)
    written = re.search(r"write '(.*)'$", raised.value.lines[0])[1]
    refuse_unknown_names("model.skip_modules", [written, "norm", "model.layers.0"], model)
    for name, kind in kinds_of(read_skipping(write_tiny("llama", tmp_path), written)).items():
        assert kind == ("none" if left in name or name == "lm_head.weight" else "nf4"), name


@pytest.mark.parametrize("pattern", ["model.layers.[0", "(", "*_proj"])
def test_a_broken_expression_is_one_line_before_anything_is_predicted(pattern, tmp_path):
    model = {"name_or_path": str(write_tiny("llama", tmp_path)), "skip_modules": [pattern]}
    with pytest.raises(UserError, match=r"^model\.skip_modules: .* is neither a module's name nor a regular"):
        Setup.of(load_config({"model": model}))


def test_a_name_of_what_the_checkpoint_has_quantized_is_refused(tmp_path):
    folder, _ = write_quantized("llama", tmp_path)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    with pytest.raises(UserError, match=r"model\.skip_modules: model\.layers\.0\.self_attn\.q_proj: the checkpoint"):
        read_skipping(folder, "q_proj")


def test_layers_that_differ_in_what_is_quantized_are_not_taken_for_alike(tmp_path):
    config = tiny_config("llama", num_hidden_layers=8)
    assert layer_stack(config).traced == (3, 5)
    every = Quantization(skip_modules=("down_proj",))
    assert layer_stack(config, quantization=every).traced == (3, 5)
    fifth = layer_stack(config, quantization=Quantization(skip_modules=("model.layers.5.mlp",)))
    assert fifth.traced == (8,)
    folder, _ = write_quantized("llama", tmp_path, skipped=["model.layers.0"])
    assert layer_stack(read_model_config(folder)).period == 2


def test_a_run_counts_what_is_left_unquantized(tmp_path):
    folder = write_tiny("llama", tmp_path)
    values = {"name_or_path": str(folder), "compute_dtype": "float32", "device": "cpu"}
    assert open_model(ModelConfig(**values)).left_linears == 0
    assert open_model(ModelConfig(**values, skip_modules=["model.layers.0.mlp", "lm_head"])).left_linears == 3
    assert open_model(ModelConfig(**values, quantization="none")).left_linears == 0
