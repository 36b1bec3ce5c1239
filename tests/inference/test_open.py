"""A model without an adapter computes in the dtype of its files, or it is said what it computes in."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from tiny_adapters import artifact_of, write_adapter, write_chat_base

from qlora_tool.artifacts import BaseOptions, find_artifact
from qlora_tool.export.options import ExportOptions
from qlora_tool.export.write import export_merged
from qlora_tool.inference.open import open_artifact
from qlora_tool.model import open as choosing
from qlora_tool.ops import precision

CPU = {"device": "cpu"}


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["fast-bf16", "slow-bf16"])
def usual(request, monkeypatch) -> torch.dtype:
    """What a machine would take by itself."""
    for module in (precision, choosing):
        monkeypatch.setattr(module, "choose_compute_dtype", lambda device: request.param)
    return request.param


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("exports")
    adapter = write_adapter(folder / "adapter", write_chat_base("llama", folder / "base"))
    for dtype in ("float32", "bfloat16", "float16"):
        export_merged(artifact_of(adapter), folder / dtype, ExportOptions(dtype=dtype))
    export_merged(artifact_of(adapter), folder / "nf4", ExportOptions(format="nf4", dtype="float32"))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "nf4"])
@pytest.mark.parametrize("named", [True, False], ids=["by-config", "by-tensors"])
def test_files_decide(exports: Path, usual: torch.dtype, dtype: str, named: bool, tmp_path: Path, caplog):
    folder = exports / dtype
    if not named and dtype != "nf4":  # a configuration that says nothing of it
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        config = json.loads((folder / "config.json").read_text())
        del config["dtype"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        folder = tmp_path
    caplog.set_level(logging.INFO, "qlora_tool.inference")
    model, _ = open_artifact(find_artifact(str(folder), BaseOptions(**CPU)))
    stored = torch.float32 if dtype == "nf4" else getattr(torch, dtype)
    fast = stored == torch.float32 or (stored == torch.bfloat16 and usual == torch.bfloat16)
    assert model.compute_dtype == (stored if fast else torch.float32)
    said = [line for line in caplog.messages if line.startswith("products in float32: the model's files are")]
    assert bool(said) != fast
    assert all(f"--compute-dtype {dtype} takes it all the same" in line for line in said)


def test_what_is_asked_for_counts(exports: Path, usual: torch.dtype, caplog):
    options = BaseOptions(**CPU, compute_dtype="float16")
    model, _ = open_artifact(find_artifact(str(exports / "float32"), options))
    assert model.compute_dtype == torch.float16 and not caplog.messages


def test_an_adapter_goes_on_as_it_was_trained(exports: Path, usual: torch.dtype):
    model, _ = open_artifact(find_artifact(str(exports / "adapter"), BaseOptions(**CPU)))
    assert model.compute_dtype == usual
