"""What storages are taken for, and that all of them add up."""

from __future__ import annotations

import gc

import pytest
import torch
from tiny_models import tiny_config

from qlora_tool.config import Config, with_values
from qlora_tool.memory.breakdown import PARTS
from qlora_tool.memory.trace.classify import part_of, timeline
from qlora_tool.memory.trace.predict import BatchShape, predict
from qlora_tool.memory.trace.timeline import Timeline
from qlora_tool.memory.trace.tracer import Storage, Trace


def storage(phase: str, died_in: str = "", *, step: int = 1, died_in_step: int = 1, **more) -> Storage:
    values = {"module": "", "operator": "", "recomputed": False} | more
    return Storage(8, 0, phase, step, **values, died_in=died_in, died_in_step=died_in_step)


@pytest.mark.parametrize(
    "life, part",
    [
        (storage("forward", "forward"), "temporaries"),
        (storage("forward", "backward"), "saved"),
        (storage("forward", "forward", died_in_step=2), "saved"),  # it lived through the step's backward
        (storage("forward"), "saved"),
        (storage("backward", "backward"), "temporaries"),
        (storage("backward", "backward", recomputed=True), "recomputed"),
        (storage("load", "load"), "temporaries"),
        (storage("optimizer", "optimizer"), "temporaries"),
        (storage("forward", "backward", category="boundaries"), "boundaries"),
        (storage("optimizer", category="optimizer_state"), "optimizer_state"),
    ],
)
def test_a_life_tells_what_it_was(life, part):
    assert part_of(life) == part


CASES = {
    "recomputed": {"training.gradient_checkpointing": True},
    "kept, accumulated": {"training.gradient_checkpointing": False, "training.gradient_accumulation_steps": 2},
    "dora, 8-bit": {"training.gradient_checkpointing": True, "training.optim": "adamw_8bit", "adapter.method": "dora"},
    "whole head": {"training.gradient_checkpointing": False, "adapter.modules_to_save": ["lm_head"],
                   "adapter.bias": "all"},
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def trace(request) -> Trace:
    config = with_values(Config(), CASES[request.param])
    return predict(config, tiny_config("opt"), BatchShape.full(2, 32), torch.bfloat16)


def by_part(timeline: Timeline, index: int) -> dict[str, int]:
    return dict(zip(PARTS, timeline.part_bytes[index].tolist(), strict=True))


def test_the_parts_add_up_at_every_moment(trace):
    found = timeline(trace)
    total, totals = 0, []
    for storage, sign in trace.events:
        total += sign * storage.nbytes
        totals.append(total)
    assert found.totals.tolist() == totals
    assert sum(found.breakdown().parts.values()) == found.peak_bytes == max(totals)


def test_after_a_step_only_weights_and_optimizer_state_are_left(trace):
    found = timeline(trace)
    last = max(index for index in range(len(found)) if found.phase(index) == "optimizer")
    left = by_part(found, last)
    gone = {part: left[part] for part in ("gradients", "boundaries", "recomputed", "framework")}
    assert not any(gone.values()), gone
    assert left["saved"] <= 2 * 4  # the loss, and the loss scaled
    # Beside the weights and the optimizer's: the batches (ids, labels, targets and their places), the tables of codes
    # (nested ones of 256 fp32 values, of 8-bit moments two more; 1025 cells of 5 bytes to quantize by), a few scalars.
    batches = 2 * 4 * 2 * 32 * 8
    assert 0 < left["temporaries"] <= batches + 1024 + 1025 * 5 + 100
    assert left["optimizer_state"] >= 2 * left["adapter_weights"] / 2  # two moments, of one byte a weight at least


def test_the_phases_follow_one_another(trace):
    """Nothing but loading before the first step, and no loading after it."""
    phases = [span.phase for span in timeline(trace).phase_spans()]
    assert phases[0] == "load" and "load" not in phases[1:]
    assert phases[-1] == "optimizer" and phases.count("optimizer") == 2


def test_loading_has_no_gradients_and_no_state(trace):
    found = timeline(trace)
    first = found.phase_spans()[0]
    for part in ("gradients", "boundaries", "saved", "recomputed"):
        assert not found.part_bytes[: first.stop, PARTS.index(part)].any(), part
    peaks = found.breakdown().phase_peak_bytes
    assert peaks["load"] < peaks["optimizer"] <= peaks["backward"]


def test_everything_is_gone_with_the_run(trace):
    gc.collect()
    assert [storage for storage in trace.storages if storage.death is None] == []


def test_gradients_are_as_large_as_what_is_trained(trace, request):
    """In full at the beginning of the optimizer's phase, and none after it; summed in fp32 over several passes."""
    summed = "accumulated" in request.node.callspec.id
    found = timeline(trace)
    spans = [span for span in found.phase_spans() if span.phase == "optimizer"]
    entry = by_part(found, spans[-1].start - 1)
    assert entry["gradients"] == (1 + summed) * entry["adapter_weights"] > 0
