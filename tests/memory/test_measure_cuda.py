"""The allocator's history, put together with what was noted meanwhile. Its model stands in for a device."""

from __future__ import annotations

import pickle
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from test_cuda import tiny_trace

from qlora_tool.config import Config, with_values
from qlora_tool.errors import UserError
from qlora_tool.memory.allocator import CachingAllocator
from qlora_tool.memory.allocator_blocks import round_size
from qlora_tool.memory.allocator_replay import compare_with_snapshot
from qlora_tool.memory.classify import part_of, timeline
from qlora_tool.memory.measure_cuda import History, measure_on_cuda, save_snapshot, trace_of, with_remainder
from qlora_tool.memory.predict import BatchShape, made_up_run
from qlora_tool.memory.trace import Trace

MIB = 2**20


def as_recorded(trace: Trace) -> tuple[list[dict], SimpleNamespace, CachingAllocator]:
    """A trace as a device's allocator would record it, and the notes that a `History` would take of it."""
    allocator = CachingAllocator(record_history=True)
    notes = SimpleNamespace(marks=list(trace.marks), recomputed=[], names=[])
    blocks, recomputing = {}, False
    for number, (storage, sign) in enumerate(trace.events):
        if sign < 0:
            allocator.free(blocks.pop(id(storage)))
            continue
        if storage.recomputed != recomputing:
            recomputing = storage.recomputed
            notes.recomputed.append((number, +1 if recomputing else -1))
        block = blocks[id(storage)] = allocator.allocate(storage.nbytes)
        if storage.category:  # noted at any time while it lives; here just before it dies
            last = storage.death if storage.death is not None else len(trace.events)
            notes.names.append((last, block.address, storage.category))
    return allocator.history, notes, allocator


def test_the_parts_come_out_as_they_were():
    original = tiny_trace()
    history, notes, allocator = as_recorded(original)
    found = trace_of(history, notes)
    assert [part_of(storage) for storage in found.storages] == [part_of(storage) for storage in original.storages]
    assert [storage.nbytes for storage in found.storages] == [round_size(one.nbytes) for one in original.storages]
    assert list(found.phases()) == list(original.phases())
    measured = with_remainder(timeline(found).breakdown(), allocator.peak_allocated_bytes)
    assert measured.peak_bytes == allocator.peak_allocated_bytes
    assert measured.at_peak["base_weights"] == timeline(original).breakdown().at_peak["base_weights"]


def test_frees_of_earlier_blocks_and_workspaces():
    events = [("free_requested", 1, 512), ("alloc", 2, 8519680), ("segment_alloc", 9, 2 * MIB), ("alloc", 3, 700),
              ("free_requested", 3, 700), ("free_completed", 3, 700), ("alloc", 3, 900)]  # fmt: skip
    history = [{"action": action, "addr": address, "size": size} for action, address, size in events]
    # Block 3 is named when it lies there for the second time.
    notes = SimpleNamespace(
        marks=[(0, "load", 0), (1, "forward", 1), (4, "backward", 1)], recomputed=[], names=[(5, 3, "gradients")]
    )
    found = trace_of(history, notes, [8519680])
    assert [(one.nbytes, one.phase, one.died_in, one.category) for one in found.storages] == [
        (8519680, "forward", "", "framework"),
        (1024, "forward", "forward", ""),
        (1024, "backward", "", "gradients"),
    ]


def test_what_the_history_does_not_show_is_framework():
    original = tiny_trace()
    breakdown = timeline(original).breakdown()
    more = with_remainder(breakdown, breakdown.peak_bytes + 4096)
    assert more.at_peak["framework"] == breakdown.at_peak["framework"] + 4096
    assert max(more.phase_peak_bytes.values()) == more.peak_bytes == breakdown.peak_bytes + 4096
    assert with_remainder(breakdown, breakdown.peak_bytes) == breakdown


def test_a_run_tells_its_history(monkeypatch: pytest.MonkeyPatch):
    from transformers import LlamaConfig

    numbers = count()
    monkeypatch.setattr(History, "count", lambda self: next(numbers))
    history = History(0)
    sizes = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, dtype=torch.float32,
    )  # fmt: skip
    config = with_values(Config(), {"training.gradient_checkpointing": True})
    noted = []
    monkeypatch.setattr(History, "name", lambda self, tensors: noted.extend(name for _, name in tensors))
    made_up_run(config, sizes, BatchShape.full(1, 16), torch.float32, watch=history)
    assert [phase for _, phase, _ in history.marks if phase != "load"] == ["forward", "backward", "optimizer"] * 2
    assert len(history.recomputed) == 2 * 2 * 2  # begun and ended, of two layers, in two steps
    assert noted.count("boundaries") == 2 * 2
    assert noted.count("base_weights") == 14 and noted.count("quantization_state") == 3 * 14
    assert noted.count("adapter_weights") == 28 and noted.count("gradients") == 2 * 28
    assert "optimizer_state" in noted and "other_weights" in noted


def test_a_kept_snapshot_replays(tmp_path):
    allocator = CachingAllocator(record_history=True)
    kept = allocator.allocate(3 * MIB)
    allocator.free(allocator.allocate(5 * MIB))
    trace = [{**event, "time_us": 1, "frames": ["deep"] * 50} for event in allocator.history]
    save_snapshot({"segments": allocator.snapshot(), "device_traces": [trace]}, tmp_path / "run.pickle")
    snapshot = pickle.loads((tmp_path / "run.pickle").read_bytes())
    assert not snapshot["device_traces"][0][0].get("frames")
    assert compare_with_snapshot(snapshot).mismatches == 0 and kept.allocated


def test_without_a_device(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device"):
        measure_on_cuda(Config(), None, BatchShape.full(1, 8), torch.bfloat16)
