"""An adapter that was trained on int8 embeddings and head is merged onto them."""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file
from test_merge import FP32, assert_export_is_live, assert_same_logits
from tiny_adapters import artifact_of, peft_logits, plain_logits, write_adapter, write_chat_base, write_run
from tiny_models import write_tiny

from qlora_tool.build.open import open_model
from qlora_tool.export import merge
from qlora_tool.export.options import ExportOptions
from qlora_tool.export.write import export_merged
from qlora_tool.files.atomic import write_json


def int8_adapter(folder: Path, base: Path, **settings) -> Path:
    write_adapter(folder, base, **settings)
    values = json.loads((folder / "qlora_tool.json").read_text())
    write_json(folder / "qlora_tool.json", values | {"embeddings": "int8"})
    return folder


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama-tied", {}),
        ("llama-tied", {"target_modules": ["q_proj", "lm_head"]}),
        ("gemma", {}),
        ("gpt2", {"quantization": "int8"}),
    ],
)
def test_the_files_are_the_live_model(tmp_path: Path, family, settings):
    base = write_tiny(family, tmp_path / "base")
    adapter = int8_adapter(tmp_path / "adapter", base, **settings)
    assert artifact_of(adapter).model.embeddings == "int8"
    assert_export_is_live(adapter, tmp_path / "merged")
    names = ("model.embed_tokens.weight", "transformer.wte.weight")
    written, stored = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", base))
    (name,) = [name for name in names if name in written]
    codes, scales, _ = bnb.int8_vectorwise_quant(stored[name].half())
    torch.testing.assert_close(written[name], codes * scales.unsqueeze(1) / 127, rtol=1e-6, atol=0)


def test_the_original_base_keeps_its_own(tmp_path: Path):
    base = write_tiny("llama", tmp_path / "base")
    adapter = int8_adapter(tmp_path / "adapter", base)
    export_merged(artifact_of(adapter), tmp_path / "merged", ExportOptions(base="original", dtype="float32"))
    assert_same_logits(plain_logits(tmp_path / "merged"), peft_logits(base, adapter))


def test_a_cached_base_gives_the_same_files(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(tmp_path / "cache"))
    for family in ("llama", "llama-tied"):
        artifact = artifact_of(int8_adapter(tmp_path / f"{family} a", write_tiny(family, tmp_path / family)))
        export_merged(artifact, tmp_path / f"{family} first", FP32)
        open_model(artifact.model.model_copy(update={"keep_quantized": True}))
        with monkeypatch.context() as patch:
            patch.setattr(merge, "quantize_parameter", None)
            export_merged(artifact, tmp_path / f"{family} second", FP32)
        first, second = (load_file(tmp_path / f"{family} {which}/model.safetensors") for which in ("first", "second"))
        assert all(torch.equal(first[key], second[key]) for key in first.keys() | second.keys())


def test_a_run_says_so_to_all_that_open_it(tmp_path: Path):
    run = write_run(tmp_path / "run", write_chat_base("llama-tied", tmp_path / "base"), model={"embeddings": "int8"})
    for folder in (run, run / "adapter"):
        assert artifact_of(folder).model.embeddings == "int8"
    export_merged(artifact_of(run / "adapter"), tmp_path / "merged", ExportOptions(dtype="float32"))
    exported = artifact_of(tmp_path / "merged")
    assert (exported.model.embeddings, exported.base.embeddings) == ("as_stored", "int8")
    assert json.loads((tmp_path / "merged/export.json").read_text())["provenance"]["base"]["embeddings"] == "int8"
    assert "its embeddings to int8" in (tmp_path / "merged/README.md").read_text()
