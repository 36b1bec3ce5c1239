"""Checkpoints in FP8 and MXFP4, against transformers' own reading of the same files; leftover scales."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from stored_models import set_quantization, write_fp8, write_mxfp4
from tiny_models import logits, read_tiny, relative_error, tokens, write_tiny

from qlora_tool.errors import UserError
from qlora_tool.files.tensors import Checkpoint
from qlora_tool.model.load import build_skeleton
from qlora_tool.model.parameter_source import ParameterSource
from qlora_tool.model.slots import find_slots
from qlora_tool.model.source import read_model_config
from qlora_tool.weights.quantized import QuantizedTensor, quantize, to_disk


def read_by_transformers(folder):
    """In bf16, as transformers dequantizes the files where no card computes with them."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    if settings["quant_method"] == "mxfp4":
        config = Mxfp4Config(dequantize=True)
    else:
        config = FineGrainedFP8Config(dequantize=True, weight_block_size=settings["weight_block_size"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
    return model.eval()


def source_of(folder) -> ParameterSource:
    return ParameterSource(build_skeleton(read_model_config(folder)), Checkpoint(folder), "cpu")


def fault(folder, kind: str = "none") -> str:
    with pytest.raises(UserError) as raised:
        read_tiny(folder, kind)
    (line,) = raised.value.lines
    assert "\n" not in line
    return line


def change_tensors(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def write_published(kind: str, folder):
    if kind == "mxfp4":
        return write_mxfp4(folder)
    family, _, block = kind.partition(" ")
    return write_fp8(family, folder, block=None if block == "whole" else (32, 32))


@pytest.mark.parametrize("kind", ["llama", "llama whole", "qwen3", "qwen3_moe", "mixtral", "mxfp4"])
def test_what_is_read_is_what_transformers_dequantizes_to_the_bit(kind, tmp_path):
    folder = write_published(kind, tmp_path)
    expected, source = read_by_transformers(folder).state_dict(), source_of(folder)
    assert set(source.names) | source.model.all_tied_weights_keys.keys() == set(expected)
    for name in source.names:
        value = source.read(name)
        assert value.dtype == source.stored_dtype(name) == torch.bfloat16, name
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "mxfp4"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_published_checkpoint_is_the_base_that_its_16_bit_form_would_be(kind, quantization, tmp_path):
    folder = write_published(kind, tmp_path / "published")
    (tmp_path / "plain").mkdir()
    save_file(read_by_transformers(folder).state_dict(), tmp_path / "plain" / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    found, expected = (logits(read_tiny(path, quantization), tokens()) for path in (folder, tmp_path / "plain"))
    assert relative_error(found, expected) == 0


@pytest.mark.parametrize("suffix", ["_scale", "_scale_inv"])
def test_one_scale_a_row_as_llm_compressor_and_fbgemm_write_it(suffix, tmp_path):
    settings = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": {
        "targets": ["Linear"], "weights": {"type": "float", "num_bits": 8, "strategy": "channel"}}}}  # fmt: skip
    folder = write_fp8("llama", tmp_path, (1, 1 << 20), suffix, settings)
    stored, source = load_file(folder / "model.safetensors"), source_of(folder)
    name = "model.layers.0.mlp.down_proj.weight"
    assert stored[f"{name}{suffix}"].shape == (64, 1)
    expected = (stored[name].float() * stored[f"{name}{suffix}"]).bfloat16()
    assert torch.equal(source.read(name), expected)


def test_scales_of_activations_are_left_out_with_a_line(tmp_path, caplog):
    folder = write_fp8("llama", tmp_path)
    caplog.set_level("INFO")
    change_tensors(folder, lambda t: t.update({"model.layers.0.mlp.up_proj.input_scale": torch.tensor(1.0)}))
    read_tiny(folder, "nf4")
    assert "1 scales of activations or caches are not used" in caplog.text


@pytest.mark.parametrize("method", ["fp8", None])
@pytest.mark.parametrize(
    "extra",
    ["model.layers.0.mlp.up_proj.weight_scale_2", "model.layers.0.mlp.up_proj.qzeros",
     "model.embed_tokens.weight_scale", "model.layers.1.mlp.gate_proj.weight.quant_state.bitsandbytes__nf4"],
)  # fmt: skip
def test_a_scale_that_belongs_to_nothing_is_refused(extra, method, tmp_path):
    folder = write_tiny("llama", tmp_path, dtype=torch.bfloat16)
    if method:
        set_quantization(folder, {"quant_method": method, "weight_block_size": [32, 32]})
    change_tensors(folder, lambda t: t.update({extra: torch.ones(4, 4)}))
    line = fault(folder, "nf4")
    assert f"1 tensor of a quantization that cannot be read ({'quantization_config: fp8' if method else ''}" in line
    assert extra in line


def test_fp8_without_its_scales_is_refused(tmp_path):
    folder = write_fp8("llama", tmp_path)
    change_tensors(folder, lambda t: t.pop("model.layers.0.mlp.up_proj.weight_scale_inv"))
    assert "model.layers.0.mlp.up_proj.weight is in FP8, but its scales" in fault(folder)


def test_nvfp4_whose_scales_are_in_fp8_themselves_is_refused_by_its_codes(tmp_path):
    """The configuration calls it FP8, as that of a mixture of both does."""
    folder = write_fp8("llama", tmp_path)
    scale = torch.ones(64, 8).to(torch.float8_e4m3fn)
    name = "model.layers.0.mlp.up_proj.weight"

    def pack(tensors):
        del tensors[name], tensors[f"{name}_scale_inv"]
        tensors |= {f"{name}_packed": torch.zeros(64, 64, dtype=torch.uint8), f"{name}_scale": scale,
                    f"{name}_global_scale": torch.ones(1)}  # fmt: skip

    change_tensors(folder, pack)
    line = fault(folder)
    assert f"{name}_packed" in line and "scale_scale" not in line
    assert "use the 16-bit model that it was made from" in line


def test_scales_of_another_shape_are_refused(tmp_path):
    folder = write_fp8("llama", tmp_path)
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    change_tensors(folder, lambda t: t.update({name: torch.ones(7, 3)}))
    assert "7 scales do not divide 128 rows or columns into blocks of 32" in fault(folder)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantized by gptq,"),
        ({"quant_method": "awq", "bits": 4}, "quantized by awq,"),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"type": "int", "num_bits": 4}}}},
         "quantized by compressed-tensors (int4 weights),"),
        ({"quant_method": "compressed-tensors", "transform_config": {"a": 1}}, "(rotated weights)"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quantized by modelopt (NVFP4),"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_naming_the_16_bit_form(settings, said, tmp_path):
    folder = write_tiny("llama", tmp_path / "Llama-3.1-8B-Instruct-AWQ-INT4")
    set_quantization(folder, settings)
    line = fault(folder, "nf4")
    assert said in line
    assert line.endswith("use the 16-bit model that it was made from, Llama-3.1-8B-Instruct by its name")
    (folder / "README.md").write_text("---\nbase_model:\n- meta-llama/Llama-3.1-8B-Instruct\n---\n# A model\n")
    assert "use meta-llama/Llama-3.1-8B-Instruct, the 16-bit model that its README.md names" in fault(folder, "nf4")


def test_memory_beside_a_weight_and_its_dequantized_form_is_small(tmp_path):
    """In fp32 as a whole it would take twice the result."""
    from qlora_tool.weights.scaled import dequantize_scaled

    weight, scales = torch.zeros(4096, 2048, dtype=torch.float8_e4m3fn), torch.ones(32, 16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        dequantize_scaled(weight, scales, torch.bfloat16, (128, 128))
    live = peak = 0
    for event in profile.events():
        if event.name == "[memory]":
            live += event.cpu_memory_usage
            peak = max(peak, live)
    assert peak < 1.3 * weight.numel() * 2


def test_experts_in_mxfp4_are_quantized_as_their_values_are(tmp_path):
    folder = write_mxfp4(tmp_path)
    model, source = read_tiny(folder, "nf4"), source_of(folder)
    name = "model.layers.1.mlp.experts.down_proj"
    assert find_slots(build_skeleton(read_model_config(folder)))[name].beyond_peft
    expected = quantize(source.read(name).transpose(1, 2).contiguous(), "nf4")
    found = model.get_submodule(name).stored()
    assert isinstance(found, QuantizedTensor)
    assert torch.equal(found.codes, expected.codes)


@pytest.mark.parametrize(("kind", "double_quant"), [("nf4", True), ("nf4", False), ("fp4", True), ("int8", True)])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_experts_that_were_quantized_one_by_one_stay_as_stored(family, kind, double_quant, tmp_path, monkeypatch):
    """As transformers 4 wrote them; its later versions join them into one weight of all experts."""
    from qlora_tool.model import slots as slots_module

    folder, values = write_tiny(family, tmp_path, dtype=torch.bfloat16), {}

    def quantize_experts(tensors):
        for name in [name for name in tensors if ".experts." in name]:
            quantized = quantize(tensors.pop(name), kind, double_quant)
            values[name] = quantized.dequantize(torch.bfloat16)
            tensors |= {part: value.clone() for part, value in to_disk(name, quantized).items()}

    change_tensors(folder, quantize_experts)
    names = {"load_in_8bit": True} if kind == "int8" else {
        "load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double_quant}  # fmt: skip
    set_quantization(folder, {"quant_method": "bitsandbytes", **names})
    monkeypatch.setattr(slots_module, "quantize", None)  # nothing is quantized again
    model = read_tiny(folder, kind, double_quant)
    gate, up, down = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    layer, owner = "model.layers.1", "block_sparse_moe" if family == "mixtral" else "mlp"
    for expert in range(4):
        stored = {part: values[f"{layer}.{owner}.experts.{expert}.{part}.weight"] for part in (gate, up, down)}
        joined = {"gate_up_proj": torch.cat([stored[gate], stored[up]]), "down_proj": stored[down]}
        for name, expected in joined.items():
            handle = model.get_submodule(f"{layer}.mlp.experts.{name}")
            assert handle.kind == kind
            assert torch.equal(handle.dense(torch.bfloat16)[expert], expected)
