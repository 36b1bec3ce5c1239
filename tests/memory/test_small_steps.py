"""A step that cannot be traced: an estimate from small steps in the place of its prediction, and never a refusal."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tiny_models import tiny_config, write_tiny
from tiny_runs import run_config, write_model, write_rows
from tokenizers_for_tests import CHATML, byte_level
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qlora_tool import api
from qlora_tool.build.setup import Setup
from qlora_tool.cli import main
from qlora_tool.config import Config, with_values
from qlora_tool.data.batches import collate
from qlora_tool.data.tokenize import Example
from qlora_tool.memory import run_report
from qlora_tool.memory.run_report import RunMemory
from qlora_tool.memory.trace import small_steps
from qlora_tool.memory.trace.classify import timeline
from qlora_tool.memory.trace.predict import BatchShape, Untraceable, predict
from qlora_tool.memory.trace.small_steps import NotMeasured, estimate

ROWS = [[Example(list(range(3, 33)), [-100] * 4 + list(range(7, 33)), "here")]] * 2


@pytest.fixture
def looking(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama's norms look at their values, which fake tensors do not have."""
    plain = LlamaRMSNorm.forward

    def looks(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return plain(self, x) if x.isfinite().all() else x

    monkeypatch.setattr(LlamaRMSNorm, "forward", looks)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(logging.getLogger("qlora_tool"), "propagate", True)
    return run_config(write_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl"), tmp_path / "run",
                      {"training.max_steps": 2})  # fmt: skip


def test_it_is_near_the_count_of_a_step_that_can_be_traced():
    settings = with_values(Config(), {"adapter.r": 4, "training.gradient_checkpointing": True})
    run = settings, tiny_config("llama", num_hidden_layers=9), BatchShape.full(4, 256), torch.float32
    counted, found = timeline(predict(*run)).breakdown(), estimate(*run)
    assert found.peak_bytes == pytest.approx(counted.peak_bytes, rel=0.15)
    for part in ("base_weights", "quantization_state", "other_weights", "adapter_weights", "optimizer_state"):
        assert found.at_peak[part] == pytest.approx(counted.at_peak[part], rel=0.02)


@pytest.mark.usefixtures("looking")
def test_a_run_goes_on_with_an_estimate(config: Config, caplog: pytest.LogCaptureFixture):
    result = api.train(config)
    assert "cannot be traced: module model.layers.0.input_layernorm (LlamaRMSNorm)" in caplog.text
    assert "estimated from small steps that were measured" in caplog.text
    report = json.loads((result.folder / "memory.json").read_text(encoding="utf-8"))
    assert report["estimated"] is True
    measured = report["measured"]["peak_bytes"]
    assert report["predicted"]["peak_bytes"] == pytest.approx(measured, rel=0.25)


def test_jetmoe_trains(tmp_path: Path, config: Config, caplog: pytest.LogCaptureFixture):
    """Its experts read how many tokens each has got."""
    tokenizer = byte_level(CHATML)
    write_tiny("jetmoe", tmp_path / "jetmoe", vocab_size=len(tokenizer), max_position_embeddings=256)
    tokenizer.save_pretrained(tmp_path / "jetmoe")
    result = api.train(config, set={"model.name_or_path": str(tmp_path / "jetmoe")})
    assert (result.folder / "adapter").is_dir() and "cannot be traced" in caplog.text


def test_a_card_that_is_too_small_by_an_estimate_is_a_warning(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def refuse(*_args, **_options):
        raise Untraceable("its step cannot be traced")

    monkeypatch.setattr(run_report, "predict_deep", refuse)
    monkeypatch.setattr(run_report, "available_bytes", lambda *_: 1)
    setup = replace(Setup.of(config), device=torch.device("cuda"))
    assert RunMemory().check(setup, collate(ROWS, pad_token_id=0, packing=False)).recomputation is None
    assert "if it does not fit, lower training.per_device_train_batch_size" in caplog.text


@pytest.mark.usefixtures("looking")
def test_where_nothing_can_be_measured_the_run_goes_on_without(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(small_steps, "available_bytes", lambda *_: 0)
    memory = RunMemory()
    assert memory.check(Setup.of(config), collate(ROWS, pad_token_id=0, packing=False)).recomputation is None
    assert memory.predicted is None and "the weights of a few layers take" in caplog.text
    run = config, tiny_config("llama"), BatchShape.full(1, 16), torch.float32
    with pytest.raises(NotMeasured, match=r"[GM]iB are free"):
        estimate(*run)


@pytest.mark.usefixtures("looking")
def test_profile_memory_says_what_to_do(config: Config, tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")
    options = ["profile-memory", str(file), "--device", "cpu", "--set", "data.max_length=64"]
    found = CliRunner().invoke(main, options)
    assert found.exit_code == 0 and "--measure measures this one" in found.stderr
    assert "estimated, not measured: the whole prediction, by smaller steps" in found.stdout
    found = CliRunner().invoke(main, [*options, "--measure", "--json", str(tmp_path / "memory.json")])
    assert found.exit_code == 0
    report = json.loads((tmp_path / "memory.json").read_text(encoding="utf-8"))
    assert report["measured"]["peak_bytes"] > 0 and report["estimated"]
    found = CliRunner().invoke(main, [*options, "--plan", "--device-memory", "8GB"])
    [line] = [line for line in found.stderr.splitlines() if line.startswith("error:")]
    assert found.exit_code == 2 and "measure it with profile-memory --measure" in line
    found = CliRunner().invoke(main, [*options, "--plot", str(tmp_path / "memory.png")])
    assert found.exit_code == 2 and "add --measure" in found.stderr
