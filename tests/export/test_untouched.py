"""What an adapter leaves alone goes through an export byte for byte: towers for images, their processors' files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from multimodal_models import MULTIMODAL, write_multimodal
from safetensors.torch import load_file, save_file
from tiny_adapters import artifact_of, live_logits, write_adapter, write_peft_adapter
from transformers import AutoModelForImageTextToText

from qlora_tool.export.options import ExportOptions
from qlora_tool.export.write import export_merged
from qlora_tool.weights.quantized import quantize

IDS = torch.tensor([[5, 17, 99, 3, 42, 64, 110, 8, 77, 5]])
TOWERS = ("vision_tower", "visual", "multi_modal_projector", "embed_vision")


def tower_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if any(word in name for word in TOWERS)}


def assert_same_bytes(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("family", MULTIMODAL)
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_tower_for_images_stays_byte_for_byte(family: str, dtype: str, tmp_path: Path):
    base = write_multimodal(family, tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base)
    export_merged(artifact_of(adapter), tmp_path / "merged", ExportOptions(dtype=dtype))
    stored, merged = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert len(tower_of(stored)) > 10
    assert_same_bytes(tower_of(merged), tower_of(stored))
    assert merged.keys() == stored.keys()
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()
    if dtype == "float32":
        live = live_logits(artifact_of(adapter), IDS)
        exported = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
        with torch.no_grad():
            found = exported(input_ids=IDS, use_cache=False).logits
        torch.testing.assert_close(found, live, rtol=0, atol=2e-5 * float(live.abs().max()))


def test_the_whole_model_is_read_from_the_export(tmp_path: Path):
    base = write_multimodal("qwen3_5", tmp_path / "base")
    export_merged(artifact_of(write_adapter(tmp_path / "adapter", base)), tmp_path / "merged", ExportOptions())
    _, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


def test_heads_for_further_tokens_go_along(tmp_path: Path):
    base = write_multimodal("qwen3_5", tmp_path / "base")
    tensors = load_file(base / "model.safetensors") | {"mtp.fc.weight": torch.randn(64, 128).bfloat16()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    export_merged(artifact_of(write_adapter(tmp_path / "adapter", base)), tmp_path / "merged", ExportOptions())
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(merged["mtp.fc.weight"], tensors["mtp.fc.weight"])


def test_nf4_files_have_the_tower_too(tmp_path: Path):
    base = write_multimodal("gemma3", tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base)
    export_merged(artifact_of(adapter), tmp_path / "merged", ExportOptions(format="nf4"))
    stored, merged = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert_same_bytes(tower_of(merged), tower_of(stored))


def test_peft_adapts_a_tower_on_its_quantized_weights(tmp_path: Path):
    """Unlike the text's, the weights that its adapter leaves alone are not dequantized ones."""
    base = write_multimodal("gemma3", tmp_path / "base")
    layer = "model.vision_tower.encoder.layers.0.self_attn"
    modules = rf"({re.escape(layer)}|.*language.*)\.q_proj"
    adapter = write_peft_adapter(tmp_path / "adapter", base, target_modules=modules)
    artifact = artifact_of(adapter, model=str(base), quantization="nf4")
    export_merged(artifact, tmp_path / "merged", ExportOptions(dtype="float32"))
    stored, merged = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    (name,) = [name for name in stored if "vision" in name and ".layers.0." in name and "q_proj.weight" in name]
    pair = [tensor for key, tensor in sorted(load_file(adapter / "adapter_model.safetensors").items()) if layer in key]
    down, up = pair  # lora_A, lora_B
    expected = quantize(stored[name], "nf4").dequantize() + 2 * (up @ down)
    torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-5)
    rest = {key: tensor for key, tensor in tower_of(stored).items() if key != name}
    assert_same_bytes({key: tensor for key, tensor in tower_of(merged).items() if key != name}, rest)
