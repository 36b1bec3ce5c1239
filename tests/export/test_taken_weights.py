"""Adapters on weights that a family multiplies with itself: they compute nothing, and are not merged."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from tiny_adapters import artifact_of, live_logits, peft_logits, plain_logits, write_peft_adapter
from tiny_models import relative_error, write_tiny

from qlora_tool import export_merged


@pytest.mark.parametrize("family, layers", [("mamba", 2), ("jamba", 1)])
def test_the_export_is_the_model_that_answered(family, layers, tmp_path: Path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("qlora_tool"), "propagate", True)
    base = write_tiny(family, tmp_path / "base")
    torch.manual_seed(0)
    adapter = write_peft_adapter(tmp_path / "a", base, target_modules=["dt_proj", "x_proj"])
    export_merged(adapter, tmp_path / "m", dtype="float32", verify=False, model=base, quantization="none")
    merged = plain_logits(tmp_path / "m")
    assert f"{layers} of its adapters (" in caplog.text and "so they are not merged" in caplog.text
    expected = peft_logits(base, adapter)
    assert relative_error(merged, expected) < 1e-5  # the merged weight is rounded once, so not to the last bit
    live = live_logits(artifact_of(adapter, quantization="none"))
    torch.testing.assert_close(live, expected, rtol=0, atol=1e-5)
