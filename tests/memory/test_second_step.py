"""The second step of a trace, made of the first, against the one that is traced."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, tiny_config

from qlora_tool.config import Config, with_values
from qlora_tool.memory.allocator.timeline import cuda_timeline
from qlora_tool.memory.trace import extrapolate
from qlora_tool.memory.trace.deepen import same
from qlora_tool.memory.trace.predict import BatchShape, predict
from qlora_tool.memory.trace.second_step import NotRepeated, repeats, with_second_step
from qlora_tool.memory.trace.tracer import Trace
from qlora_tool.model.checkpointing import ALL_RECOMPUTED, NOTHING_RECOMPUTED, Recomputation
from qlora_tool.ops.declare import CPU, Target

CARD = Target("cuda", (8, 9))
IN_BACKWARD = {"training.optimizer_in_backward": True, "training.max_grad_norm": 0.0}
OPTIONS = [
    {}, {"training.gradient_checkpointing": False}, {"training.gradient_accumulation_steps": 3},
    {"training.optim": "adamw_8bit"}, {"training.optim": "paged_adamw_8bit"}, {"training.max_grad_norm": 0.0},
    {"training.offload_boundaries": True}, {"training.tiled_mlp": True}, {"model.embeddings": "int8"},
    {"model.quantization": "int8"}, {"model.quantization": "none"}, {"model.compute_dtype": "float16"},
    {"model.weights": "host"}, {"model.weights": "disk"}, {"model.weights": "host", "model.resident_layers": 1},
    {"adapter.method": "dora"}, {"adapter.lora_dropout": 0.1}, {"adapter.method": "loha"}, {"adapter.method": "vera"},
    {"adapter.method": "llama_adapter"}, {"adapter.method": "full", "model.quantization": "none"},
]  # fmt: skip


def traced(
    steps: int, family: str = "llama", values=None, target=CARD, shape=None, recomputation=None, layers=3
) -> Trace:
    config = with_values(Config(), {"training.gradient_checkpointing": True} | (values or {}))
    dtype = torch.float32 if target == CPU else torch.bfloat16
    more = {"num_hidden_layers": layers} if layers else {}  # that not every family takes alone
    return predict(config, tiny_config(family, **more), shape or BatchShape.full(2, 64), dtype,
                   recomputation, target, steps)  # fmt: skip


def check(*arguments) -> None:
    found, whole = with_second_step(traced(1, *arguments)), traced(2, *arguments)
    assert same(found, whole, "")
    assert (found.elsewhere, found.layer_bytes) == (whole.elsewhere, whole.layer_bytes)
    assert repeats(whole)


@pytest.mark.parametrize("values", OPTIONS, ids=str)
@pytest.mark.parametrize("target", [CARD, CPU], ids=["card", "cpu"])
def test_each_event_is_the_traced_one(values, target):
    check("llama", values, target)


@pytest.mark.parametrize("family", FAMILIES)
def test_of_every_family(family):
    check(family, {}, CARD, None, None, 0)


@pytest.mark.parametrize("shape", [
    BatchShape(2, 64, 100, padded=True), BatchShape(1, 64, 62, segments=(40, 24)),
], ids=["padded", "packed"])  # fmt: skip
def test_of_every_kind_of_batch(shape):
    check("llama", {}, CARD, shape)


def test_where_some_is_recomputed_and_some_is_not():
    check("llama", {}, CARD, None, Recomputation((ALL_RECOMPUTED, ("mlp",), NOTHING_RECOMPUTED), keeps_weights=True))


def test_a_card_sees_the_same():
    traces = with_second_step(traced(1)), traced(2)
    found, whole = (cuda_timeline(trace, compute_capability=(8, 9)) for trace in traces)
    assert (found.reserved_peak, found.allocated_peak) == (whole.reserved_peak, whole.allocated_peak)
    assert found.breakdown() == whole.breakdown()


def test_a_step_that_leaves_something_behind_is_not_repeated():
    """Gradients that an optimizer step in the midst of backward lets go of in the next step only."""
    with pytest.raises(NotRepeated):
        with_second_step(traced(1, "llama", IN_BACKWARD))
    assert not repeats(traced(2, "llama", IN_BACKWARD))


@pytest.mark.parametrize("change", ["size", "category", "death", "order"])
def test_a_second_step_that_is_another_one_is_seen(change):
    whole = traced(2)
    later = [storage for storage in whole.storages if storage.step == 2]
    if change == "size":
        later[len(later) // 2].nbytes += 1
    elif change == "category":
        later[len(later) // 2].category = "gradients" if later[len(later) // 2].category != "gradients" else "saved"
    elif change == "death":
        later[len(later) // 2].died_in = "load"
    else:
        end = len(whole.events)
        index = next(n for n in range(end - 2, 0, -1) if whole.events[n][0] is not whole.events[n + 1][0]
                     and whole.events[n][0].nbytes != whole.events[n + 1][0].nbytes)  # fmt: skip
        whole.events[index], whole.events[index + 1] = whole.events[index + 1], whole.events[index]
    assert not repeats(whole)


def test_two_steps_are_traced_once_of_cases_that_differ_in_size_alone(monkeypatch):
    asked = []

    def noted(config, model_config, shape, *run, **more):
        asked.append((model_config.num_hidden_layers, shape.length, more.get("steps", 2)))
        return predict(config, model_config, shape, *run, **more)

    monkeypatch.setattr(extrapolate, "predict", noted)
    monkeypatch.setattr(extrapolate, "_repeating", {})
    extrapolate.forget_traces()
    model, config = tiny_config("llama", num_hidden_layers=9), with_values(Config(), {"adapter.r": 3})
    config = with_values(config, {"training.gradient_checkpointing": True})
    mixed = Recomputation((ALL_RECOMPUTED,) * 8 + (NOTHING_RECOMPUTED,))
    for length in (64, 128):
        run = config, model, BatchShape.full(1, length), torch.bfloat16, mixed, CARD
        assert same(extrapolate.predict_deep(*run), predict(*run), "")
    assert asked == [(3, 64, 2), (9, 64, 1), (9, 128, 1)]
    asked.clear()
    in_backward = with_values(config, IN_BACKWARD)
    run = in_backward, model, BatchShape.full(1, 64), torch.bfloat16, None, CARD
    assert same(extrapolate.predict_deep(*run), predict(*run), "")
    assert asked == [(3, 64, 2), (9, 64, 2)]
