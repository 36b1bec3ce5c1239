"""The allocator's history, put together with what was noted meanwhile. Its model stands in for a device."""

from __future__ import annotations

import pickle
from contextlib import nullcontext
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from test_cuda import tiny_trace

from qlora_tool.config import Config, with_values
from qlora_tool.errors import UserError
from qlora_tool.memory.allocator.blocks import round_size
from qlora_tool.memory.allocator.model import CachingAllocator
from qlora_tool.memory.allocator.replay import compare_with_snapshot
from qlora_tool.memory.trace.classify import part_of, timeline
from qlora_tool.memory.trace.measure_cuda import (
    History,
    RunningStep,
    measure_on_cuda,
    save_snapshot,
    trace_of,
    with_remainder,
)
from qlora_tool.memory.trace.predict import BatchShape, trial_run
from qlora_tool.memory.trace.tracer import Trace

MIB = 2**20


def as_recorded(trace: Trace) -> tuple[list[dict], SimpleNamespace, CachingAllocator]:
    """A trace as a device's allocator would record it, and the notes that a `History` would take of it."""
    allocator = CachingAllocator(record_history=True)
    notes = SimpleNamespace(marks=list(trace.marks), recomputed=[], names=[], end=None)
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
        marks=[(0, "load", 0), (1, "forward", 1), (4, "backward", 1)], recomputed=[], names=[(5, 3, "gradients")],
        end=None,
    )  # fmt: skip
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
    trial_run(config, sizes, BatchShape.full(1, 16), torch.float32, watch=history)
    # Begun one after the other, and never gone back to loading; the last goes on to the end.
    assert [phase for _, phase, _ in history.marks] == ["load"] * 2 + ["forward", "backward", "optimizer"] * 2
    assert history.end == next(numbers) - 1
    assert len(history.recomputed) == 2 * 2 * 2  # begun and ended, of two layers, in two steps
    assert noted.count("boundaries") == 2 * 2
    assert noted.count("base_weights") == 14 and noted.count("quantization_state") == 3 * 14
    assert noted.count("adapter_weights") == 28 and noted.count("gradients") == 2 * 28
    assert "optimizer_state" in noted and "other_weights" in noted


def test_what_comes_after_the_last_step_is_no_part_of_it():
    history = [{"action": action, "addr": address, "size": 512} for action, address in (
        ("alloc", 1), ("free_requested", 1), ("alloc", 2), ("alloc", 3), ("free_requested", 2))]  # fmt: skip
    notes = SimpleNamespace(
        marks=[(0, "load", 0), (1, "forward", 1)], recomputed=[], names=[(3, 2, "gradients")], end=3
    )
    found = trace_of(history, notes)
    assert [(one.phase, one.died_in, one.category) for one in found.storages] == [
        ("load", "forward", ""), ("forward", "", "gradients"),
    ]  # fmt: skip
    assert list(found.phases()) == ["load", "forward", "forward"]


# ------------------------------------------------------------------------------- one step of a run that goes on


class Card:
    """A device's allocator by hand: what is allocated, what happened, and what PyTorch says of it."""

    TOTAL, FREE, RESERVED = 10_000 * MIB, 9_000 * MIB, 600 * MIB

    def __init__(self, patch: pytest.MonkeyPatch):
        self.blocks: dict[int, int] = {}
        self.history: list[dict] = []
        self.recording, self.events, self.peak = False, 0, 0
        memory = torch.cuda.memory
        patch.setattr(memory, "_snapshot", self.snapshot)
        patch.setattr(memory, "_record_memory_history", lambda enabled, **_: setattr(self, "recording", bool(enabled)))
        patch.setattr(
            torch.cuda, "memory_stats_as_nested_dict",
            lambda _: {"allocation": {"all": {"allocated": self.events, "freed": 0}}},
        )  # fmt: skip
        patch.setattr(torch.cuda.memory, "memory_stats_as_nested_dict", torch.cuda.memory_stats_as_nested_dict)
        patch.setattr(torch.cuda, "device", lambda _: nullcontext())
        patch.setattr(torch.cuda, "synchronize", lambda _: None)
        patch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: setattr(self, "peak", sum(self.blocks.values())))
        patch.setattr(torch.cuda, "max_memory_allocated", lambda _: self.peak + 1000)  # what no history shows
        patch.setattr(torch.cuda, "max_memory_reserved", lambda _: self.RESERVED)
        patch.setattr(torch.cuda, "memory_reserved", lambda _: self.RESERVED)
        patch.setattr(torch.cuda, "mem_get_info", lambda _: (self.FREE, self.TOTAL))
        patch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))

    def snapshot(self) -> dict:
        blocks = [{"address": at, "size": size, "state": "active_allocated"} for at, size in self.blocks.items()]
        blocks.append({"address": 0, "size": MIB, "state": "inactive"})
        elsewhere = {"device": 1, "address": 0, "blocks": blocks}
        segments = [elsewhere, {"device": 0, "address": 0, "blocks": blocks}]
        return {"segments": segments, "device_traces": [list(self.history)]}

    def happens(self, action: str, address: int, size: int) -> None:
        if action == "alloc":
            self.blocks[address] = size
        else:
            del self.blocks[address]
        self.events += 1
        self.peak = max(self.peak, sum(self.blocks.values()))
        if self.recording:
            self.history.append({"action": action, "addr": address, "size": size})


def test_a_step_of_a_run_that_goes_on(monkeypatch: pytest.MonkeyPatch):
    card = Card(monkeypatch)

    def name(self: History, tensors) -> None:
        self.names += [(self.count(), tensor.data_ptr(), category) for tensor, category in tensors]

    monkeypatch.setattr(History, "name", name)  # of tensors that lie on a CPU here
    module = torch.nn.Linear(16, 16, bias=False)  # 1024 bytes, frozen
    trained = torch.nn.Parameter(torch.ones(128))
    trained.grad, moment, batch = torch.ones(128), torch.ones(128), torch.ones(512)
    for tensor in (moment, module.weight, trained, batch):
        card.happens("alloc", tensor.data_ptr(), tensor.nbytes)
    model = SimpleNamespace(module=module, checkpointed_layers=lambda: [])
    adapters = SimpleNamespace(parameters=lambda: [trained])
    optimizer = SimpleNamespace(gradients=lambda: [trained.grad], state_tensors=lambda: [moment])
    seen = RunningStep(torch.device("cuda", 0))
    with seen.watch(model, adapters, optimizer) as history:
        with history.during(optimizer, 5, "forward"):
            card.happens("alloc", 1, 4096)
        with history.during(optimizer, 5, "backward"):
            card.happens("alloc", trained.grad.data_ptr(), 512)
            card.happens("free_requested", 1, 4096)
        with history.during(optimizer, 5, "optimizer"):
            card.happens("free_requested", trained.grad.data_ptr(), 512)
    assert not card.recording
    found = seen.breakdown
    parts = {name: size for name, size in found.parts.items() if size}
    assert parts == {"other_weights": 1024, "adapter_weights": 512, "optimizer_state": 512, "gradients": 512,
                     "saved": 4096, "temporaries": 2048, "framework": 1000}  # fmt: skip
    assert found.phase_peak_bytes == {"load": 3584, "forward": 8192, "backward": 8704 + 1000, "optimizer": 4608}
    assert (found.reserved_bytes, found.context_bytes) == (600 * MIB, 400 * MIB)


def test_a_step_that_fails_leaves_nothing_on(monkeypatch: pytest.MonkeyPatch):
    card, module = Card(monkeypatch), torch.nn.Linear(2, 2)
    model = SimpleNamespace(module=module, checkpointed_layers=lambda: [module])
    optimizer = SimpleNamespace(gradients=list, state_tensors=list)
    adapters = SimpleNamespace(parameters=lambda: [])
    with pytest.raises(ZeroDivisionError), RunningStep(torch.device("cuda", 0)).watch(model, adapters, optimizer):
        assert card.recording and module._forward_pre_hooks
        raise ZeroDivisionError
    assert not card.recording and not module._forward_pre_hooks


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
