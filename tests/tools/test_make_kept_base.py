"""Quantized bases without a model they were made of: a run finds them, their weights are as announced, and repeat."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from measuring.command import main

from qlora_tool.build.open import open_model
from qlora_tool.config import ModelConfig
from qlora_tool.model.cached_base import kept_folder
from qlora_tool.model.slots import Quantization
from qlora_tool.weights.handles import WeightHandle
from qlora_tool.weights.quantized import QuantizedTensor
from qlora_tool.weights.streamed import StreamedHandle


def make(folder: Path, *options: object, shape: str = "tiny-llama") -> int:
    return main("making", ["kept-base", str(folder), "--shape", shape, "--compute-dtype", "float32",
                           *map(str, options)])  # fmt: skip


def handles(folder: Path, **settings: object) -> dict[str, WeightHandle]:
    asked = ModelConfig(name_or_path=str(folder), device="cpu", compute_dtype="float32", **settings)
    modules = open_model(asked).module.named_modules()
    return {name: module for name, module in modules if isinstance(module, WeightHandle)}


@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-mixtral"])  # which has experts
def test_a_run_finds_it_from_the_disk_and_in_memory(tmp_path: Path, shape: str):
    assert make(tmp_path / "m", shape=shape) == 0
    assert not list((tmp_path / "m").glob("*.safetensors"))  # nothing else to read weights from
    streamed, resident = handles(tmp_path / "m", weights="disk"), handles(tmp_path / "m", keep_quantized=True)
    quantized = {name for name, handle in resident.items() if isinstance(handle.stored(), QuantizedTensor)}
    assert quantized and quantized == {name for name, one in streamed.items() if isinstance(one, StreamedHandle)}
    for name in quantized:
        value = resident[name].stored()
        assert (value.kind, value.double_quant) == ("nf4", True)
        weight = value.dequantize(torch.float32)
        torch.testing.assert_close(streamed[name].dense(torch.float32), weight, rtol=0, atol=0)
        # 2048 numbers at least: their deviation is within 1.6 % of what they are drawn from, one time in three.
        assert float(weight.mean().abs()) < 0.002 and float(weight.std()) == pytest.approx(0.02, rel=0.08)
    stored = [handle.stored() for name, handle in resident.items() if name not in quantized]
    assert {value.dtype for value in stored} == {torch.bfloat16}  # as in files, whatever products run in
    drawn = [resident[name].stored().codes.flatten()[:16] for name in quantized]
    assert len({tuple(codes.tolist()) for codes in drawn}) == len(drawn)  # no two alike


def test_same_seed_same_bytes(tmp_path: Path):
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert make(tmp_path / name, "--seed", seed) == 0
        kept = kept_folder(tmp_path / name, Quantization("nf4", True), torch.float32)
        found.append((kept / "model.safetensors").read_bytes())
    assert found[0] == found[1] != found[2]
    assert len(found[0]) == len(found[2])


def test_what_exists_is_left_alone(tmp_path: Path, capsys):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "kept").write_text("mine")
    assert make(tmp_path / "m") == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'm'}: exists already")
    assert (tmp_path / "m" / "kept").read_text() == "mine"
