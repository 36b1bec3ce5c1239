"""Runs whose base stays on the disk: the same bits as with the base in memory."""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from in_order_queues import InOrder
from tiny_runs import assert_same_run, interrupted, run_config, write_model, write_rows

from qlora_tool.api import evaluate
from qlora_tool.build import tensors
from qlora_tool.build.open import open_model
from qlora_tool.errors import MachineError
from qlora_tool.files.cache import cache_folder
from qlora_tool.training import progress
from qlora_tool.training.loop import train
from qlora_tool.training.progress import DiskWaits
from qlora_tool.weights.handles import WeightHandle
from qlora_tool.weights.streamed import StreamedHandle

DISK = {"model.weights": "disk"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("streamed")
    write_model(made / "model")
    write_rows(made / "rows.jsonl")
    return made


def config_of(folder: Path, output: Path, **values):
    return run_config(folder / "model", folder / "rows.jsonl", output, values)


@pytest.mark.parametrize("values", [
    {"training.gradient_checkpointing": True},
    {"adapter.method": "dora", "model.quantization": "int8"},
    {"adapter.init_lora_weights": "pissa", "training.gradient_checkpointing": True},
    {"adapter.method": "loha", "adapter.lora_dropout": 0.0, "model.quantization": "none"},
    {"training.gradient_accumulation_steps": 2, "model.embeddings": "int8"},
    {"adapter.target_modules": ["q_proj", "embed_tokens"]},
    {"adapter.init_lora_weights": "calibrated", "adapter.calibration_rows": 8},
    {"adapter.modules_to_save": ["layers.0.mlp.down_proj"], "training.gradient_checkpointing": True},
], ids=str)  # fmt: skip
def test_a_streamed_run_is_the_resident_run(values, folder, tmp_path):
    for name, where in (("resident", {}), ("first", DISK), ("again", DISK)):
        train(config_of(folder, tmp_path / name, **values, **where))
    assert_same_run(tmp_path / "first", tmp_path / "resident")  # which writes the file
    assert_same_run(tmp_path / "again", tmp_path / "resident")  # which reads it


def test_killed_and_resumed_in_another_place(folder, tmp_path, stop_in_step):
    values = {"training.save_steps": 2}
    train(config_of(folder, tmp_path / "whole", **values))
    interrupted(stop_in_step, config_of(folder, tmp_path / "run", **values, **DISK), 4)
    train(config_of(folder, tmp_path / "run", **values))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_streamed_run_is_evaluated_streamed(folder, tmp_path):
    found = {}
    for name, where in (("resident", {}), ("disk", DISK)):
        train(config_of(folder, tmp_path / name, **where))
        scores = evaluate(tmp_path / name, str(folder / "rows.jsonl"), generate=True, max_new_tokens=8).scores
        found[name] = [(score.loss, score.answers.texts) for score in scores.values()]
    assert found["disk"] == found["resident"]


def test_a_start_that_changed_the_base_is_evaluated_in_memory(folder, tmp_path, caplog):
    config = config_of(folder, tmp_path / "run", **{"adapter.init_lora_weights": "pissa"}, **DISK)
    train(config)
    found = evaluate(tmp_path / "run", str(folder / "rows.jsonl")).scores
    assert "brings a base of its own" in caplog.text
    train(config_of(folder, tmp_path / "resident", **{"adapter.init_lora_weights": "pissa"}))
    expected = evaluate(tmp_path / "resident", str(folder / "rows.jsonl")).scores
    assert [score.loss for score in found.values()] == [score.loss for score in expected.values()]


def test_layers_alone_are_streamed(folder, tmp_path):
    config = config_of(folder, tmp_path / "run", **DISK)
    handles = [module for module in open_model(config.model).module.modules() if isinstance(module, WeightHandle)]
    streamed = [handle for handle in handles if isinstance(handle, StreamedHandle)]
    assert len(streamed) == 2 * 7 and len(handles) - len(streamed) == 1  # of lm_head
    assert all(torch.equal(handle.dense(torch.float32), handle.dense(torch.float32)) for handle in streamed)


def test_in_host_memory_on_a_cpu_is_resident_and_said(folder, tmp_path, caplog):
    train(config_of(folder, tmp_path / "resident"))
    assert "model.weights: host" not in caplog.text
    train(config_of(folder, tmp_path / "host", **{"model.weights": "host"}))
    assert "model.weights: host: the model is in host memory already" in caplog.text
    assert_same_run(tmp_path / "host", tmp_path / "resident")


@pytest.mark.parametrize("values", [
    {"training.gradient_checkpointing": True, "training.gradient_accumulation_steps": 2},
    {"adapter.method": "dora", "model.quantization": "int8", "model.resident_layers": 1},
    {"adapter.init_lora_weights": "pissa", "training.gradient_checkpointing": True},
], ids=str)  # fmt: skip
def test_a_run_streamed_to_a_device_is_the_resident_run(values, folder, tmp_path, monkeypatch):
    """Host memory and the disk by way of it, on queues that do everything at once, the CPU taken for a card."""
    train(config_of(folder, tmp_path / "resident", **values | {"model.resident_layers": 0}))
    made = []
    monkeypatch.setattr(tensors, "weights_on", lambda config, _device: config.weights)
    monkeypatch.setattr(tensors, "queues_of", lambda _device: made.append(InOrder()) or made[-1])
    monkeypatch.setattr(tensors, "streams_to_card", lambda _device: True)
    for where in ("host", "disk"):
        train(config_of(folder, tmp_path / where, **values, **{"model.weights": where}))
        assert made[-1].pinned
        assert_same_run(tmp_path / where, tmp_path / "resident")


def test_what_cannot_be_streamed_is_refused(folder, tmp_path, monkeypatch):
    config = config_of(folder, tmp_path / "run", **DISK)
    shutil.rmtree(cache_folder() / "bases", ignore_errors=True)
    free = namedtuple("usage", "total used free")(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(MachineError, match=r"quantized base takes [\d.,]+ MB .* free some, or set QLORA_TOOL_CACHE"):
        train(config)
    assert not any((cache_folder() / "bases").glob("*"))


def read_slowly(monkeypatch):
    """Each read takes a tenth of a second."""
    read = os.preadv

    def slowly(*arguments: object) -> int:
        time.sleep(0.1)
        return read(*arguments)

    monkeypatch.setattr(os, "preadv", slowly)


def test_a_disk_that_steps_wait_for_is_told_with_what_it_costs(tmp_path, caplog, monkeypatch):
    """A step of this model takes far less than a slow read."""
    write_model(tmp_path / "model", num_hidden_layers=5)
    write_rows(tmp_path / "rows.jsonl")
    read_slowly(monkeypatch)
    monkeypatch.setattr(logging.getLogger("qlora_tool"), "propagate", True)
    train(config_of(tmp_path, tmp_path / "run", **{"training.max_steps": 5}, **DISK))
    told = [line for line in caplog.messages if "waited for the disk" in line]
    [told] = set(told)
    share, step = map(float, re.match(r"model.weights: disk: (\d+)% of a step's ([\d.]+) s waited", told).groups())
    assert 25 <= share <= 100 and step >= 0.6  # three layers of five are brought anew in each pass


@pytest.mark.parametrize("slow", ["card", "disk"])
def test_of_a_card_reading_counts_and_not_what_the_host_waits_for(slow, tmp_path, caplog, monkeypatch):
    """The thread that reads waits for the card's copies, and the host for that thread; a quick disk is not at fault."""
    write_model(tmp_path / "model", num_hidden_layers=5)
    write_rows(tmp_path / "rows.jsonl")
    class Queues(InOrder):
        def finish(self, event):
            time.sleep(0.1 if slow == "card" else 0)
            super().finish(event)

    if slow == "disk":
        read_slowly(monkeypatch)
    monkeypatch.setattr(tensors, "weights_on", lambda config, _device: config.weights)
    monkeypatch.setattr(tensors, "queues_of", lambda _device: Queues())
    monkeypatch.setattr(tensors, "streams_to_card", lambda _device: True)
    monkeypatch.setattr(logging.getLogger("qlora_tool"), "propagate", True)
    monkeypatch.setattr(DiskWaits, "CARD_TOLD_FROM", 0.5)  # this CPU, unlike a card, computes between
    train(config_of(tmp_path, tmp_path / "run", **{"training.max_steps": 4}, **DISK))
    told = {line for line in caplog.messages if line.startswith("model.weights: disk: ")}
    assert len(told) == (slow == "disk")
    assert all(re.search(r"went by while the disk was read \(", line) for line in told)


@pytest.mark.parametrize(("waited", "told_at"), [(0.3, 2), (0.24, None)])
def test_a_disk_is_told_of_from_a_quarter_of_a_step(waited, told_at, monkeypatch):
    """Steps of 10 s, of which 5 are reading 2 GB; the first one begins before it is looked at."""
    clock, disk = [100.0], SimpleNamespace(waited_seconds=7.0, read_bytes=10**9, read_seconds=8.0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    waits, told = DiskWaits(disk), {}
    for step in range(1, 9):
        clock[0] += 10.0
        disk.waited_seconds += 10.0 * waited
        disk.read_bytes += 2 * 10**9
        disk.read_seconds += 5.0
        if (line := waits.step_done()) is not None:
            told[step] = line
    assert list(told) == ([told_at] if told_at else [])
    assert not told or "30% of a step's 10.0 s waited for the disk (2,000.0 MB at 400 MB/s)" in told[told_at]
    assert DiskWaits(None).step_done() is None


@pytest.mark.parametrize(("reading", "told_at"), [(9.1, 2), (8.9, None)])
def test_a_disk_is_told_of_a_card_where_reading_fills_a_step(reading, told_at, monkeypatch):
    """Steps of 10 s; what is read beside the computing costs nothing while there is time for it."""
    clock, disk = [100.0], SimpleNamespace(waited_seconds=None, read_bytes=10**9, read_seconds=8.0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    waits, told = DiskWaits(disk), {}
    for step in range(1, 9):
        clock[0] += 10.0
        disk.read_bytes += 2 * 10**9
        disk.read_seconds += reading
        if (line := waits.step_done()) is not None:
            told[step] = line
    assert list(told) == ([told_at] if told_at else [])
    said = "91% of a step's 10.0 s went by while the disk was read (2,000.0 MB at 220 MB/s)"
    assert all(said in line for line in told.values())
