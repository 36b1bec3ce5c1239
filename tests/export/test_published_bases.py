"""Exports of adapters on bases that were published quantized: bitsandbytes with exceptions, FP8, MXFP4."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stored_models import dequantized, write_fp8, write_mxfp4, write_quantized
from tiny_adapters import IDS, artifact_of, disturb, live_logits, plain_logits, write_adapter
from tiny_models import write_tiny

from qlora_tool.artifacts import Artifact
from qlora_tool.export.options import ExportOptions
from qlora_tool.export.write import export_merged
from qlora_tool.model.load import build_skeleton
from qlora_tool.model.source import read_model_config


def export(artifact: Artifact, output: Path) -> torch.Tensor:
    """The logits of plain transformers on what is exported in fp32."""
    export_merged(artifact, output, ExportOptions(dtype="float32"))
    return plain_logits(output)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


ADAPTED = {
    "llama": ["q_proj", "o_proj", "down_proj"], "qwen3_moe": ["q_proj", "k_proj", "o_proj"],
    "falcon": ["query_key_value", "dense_h_to_4h"],
}  # fmt: skip


def write_peft_on(theirs, folder: Path, modules: list[str]) -> tuple[Path, torch.Tensor]:
    """PEFT's adapter with random values on a model in transformers, and what the two answer together."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=8, target_modules=modules))
        disturb(parameter for name, parameter in model.named_parameters() if "lora_" in name)
        model.save_pretrained(folder)
    with torch.no_grad():
        return folder, model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize(("family", "double_quant"), [("llama", True), ("llama", False), ("qwen3_moe", True)])
def test_a_checkpoint_with_exceptions_is_merged_as_peft_ran_it(family: str, double_quant: bool, tmp_path: Path):
    base, theirs = write_quantized(family, tmp_path, "nf4", double_quant)
    adapter, expected = write_peft_on(dequantized(theirs), tmp_path / "adapter", ADAPTED[family])
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}))
    artifact = artifact_of(adapter)
    assert_close(live_logits(artifact), expected)
    assert_close(export(artifact, tmp_path / "merged"), expected)


@pytest.mark.parametrize("family", ["qwen3_moe", "falcon"])
def test_an_adapter_of_peft_is_read_on_the_base_that_peft_had(family: str, tmp_path: Path):
    """bitsandbytes' modules are quantized, experts and FalconLinear are not."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base = write_tiny(family, tmp_path / "base", dtype=torch.bfloat16)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                bnb_4bit_compute_dtype=torch.float32)  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32,
                                                  device_map="cpu")  # fmt: skip
    adapter, expected = write_peft_on(dequantized(theirs), tmp_path / "adapter", ADAPTED[family])
    artifact = artifact_of(adapter, model=str(base), quantization="nf4")
    assert artifact.model.skip_modules == "as-peft"
    assert_close(live_logits(artifact), expected)
    assert_close(export(artifact, tmp_path / "merged"), expected)
    settings = json.loads((tmp_path / "merged" / "qlora_tool.json").read_text())
    assert settings["skip_modules"] == "as-peft"


@pytest.mark.parametrize("kind", ["fp8", "fp8 experts", "mxfp4"])
def test_what_is_exported_from_fp8_and_mxfp4_is_what_was_trained(kind: str, tmp_path: Path):
    base = tmp_path / "base"
    if kind == "mxfp4":
        write_mxfp4(base)
    else:
        write_fp8("qwen3_moe" if "experts" in kind else "llama", base)
    adapter = write_adapter(tmp_path / "adapter", base)
    assert_close(export(artifact_of(adapter), tmp_path / "merged"), live_logits(artifact_of(adapter)))
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    skeleton = build_skeleton(read_model_config(tmp_path / "merged"))
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert not [name for name in merged if name.endswith(("_scale_inv", "_blocks", "_scales"))]
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}
    assert len(merged) >= len(skeleton.state_dict()) - 1


def test_the_files_of_an_export_have_the_dtype_of_the_dequantized_base(tmp_path: Path):
    base = write_fp8("llama", tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base)
    result = export_merged(artifact_of(adapter), tmp_path / "merged", ExportOptions(dtype="bfloat16"))
    assert result.dtype == "bfloat16"
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}


def test_the_card_and_the_provenance_say_that_experts_are_quantized_beyond_peft(tmp_path: Path):
    from tiny_adapters import write_chat_base, write_run

    base = write_chat_base("qwen3_moe", tmp_path / "base")
    run = write_run(tmp_path / "run", base)
    said = json.loads((run / "adapter" / "qlora_tool.json").read_text())
    assert said["skip_modules"] == []
    assert said["beyond_peft"]["weights"] == 4
    assert said["beyond_peft"]["names"] == [
        f"model.layers.*.mlp.experts.{name}" for name in ("down_proj", "gate_up_proj")
    ]
    assert 0 < said["beyond_peft"]["bytes"] < said["beyond_peft"]["unquantized_bytes"] / 5
    for form in ("safetensors", "adapter"):
        export_merged(artifact_of(run), tmp_path / form, ExportOptions(format=form))
        card = (tmp_path / form / "README.md").read_text()
        assert "differs from the one that PEFT makes of the same files: 4 weights" in card
        assert ("On PEFT's base the adapter answers otherwise" in card) == (form == "adapter")
    left = write_run(tmp_path / "left", base, model={"skip_modules": "as-peft"})
    said = json.loads((left / "adapter" / "qlora_tool.json").read_text())
    assert (said["skip_modules"], said["beyond_peft"]) == ("as-peft", None)
