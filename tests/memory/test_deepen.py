"""A deep model's trace, put together from shallow ones, against its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_config

from qlora_tool.config import Config, with_values
from qlora_tool.memory.allocator.timeline import cuda_timeline
from qlora_tool.memory.trace import extrapolate
from qlora_tool.memory.trace.deepen import deepened, same
from qlora_tool.memory.trace.extrapolate import predict_deep
from qlora_tool.memory.trace.predict import BatchShape, predict
from qlora_tool.memory.trace.tracer import Trace
from qlora_tool.model.checkpointing import ALL_RECOMPUTED, NOTHING_RECOMPUTED, Recomputation
from qlora_tool.ops.declare import CPU, Target

CARD, PATH = Target("cuda", (8, 9)), "model.layers"
CHECKPOINTED = {"training.gradient_checkpointing": True}


def traced(family: str, layers: int, values=None, target: Target = CARD, shape: BatchShape | None = None) -> Trace:
    config = with_values(Config(), CHECKPOINTED | (values or {}))
    dtype = torch.float32 if target == CPU else torch.bfloat16
    return predict(config, tiny_config(family, num_hidden_layers=layers), shape or BatchShape.full(2, 64), dtype,
                   target=target)  # fmt: skip


@pytest.mark.parametrize("family, values, target, shape", [
    ("llama", {}, CARD, None),
    ("llama", {"training.optim": "adamw_8bit", "training.gradient_checkpointing": False}, CARD, None),
    ("llama", {"training.gradient_accumulation_steps": 2, "training.max_grad_norm": 0.0}, CPU, None),
    ("llama", {"adapter.method": "dora", "training.optim": "paged_adamw_8bit"}, CARD, None),
    ("phi3", {"model.quantization": "int8", "training.offload_boundaries": True}, CARD, None),
    ("qwen2", {"training.optimizer_in_backward": True, "training.max_grad_norm": 0.0}, CARD,
     BatchShape(1, 64, 62, segments=(40, 24))),
    ("mixtral", {}, CPU, None),
], ids=str)  # fmt: skip
def test_each_event_is_that_of_the_whole_trace(family, values, target, shape):
    shallow = [traced(family, layers, values, target, shape) for layers in (3, 4, 5)]
    whole = traced(family, 8, values, target, shape)
    found = deepened(shallow, PATH, (3, 4, 5), 8)
    assert found is not None and same(found, whole, PATH)
    if target == CARD:
        one, other = (cuda_timeline(trace, compute_capability=(8, 9)) for trace in (found, whole))
        assert (one.reserved_peak, one.allocated_peak) == (other.reserved_peak, other.allocated_peak)
        assert one.breakdown() == other.breakdown()


def test_layers_of_two_kinds():
    """Sliding and full attention in turn: two layers are one repetition."""
    found = deepened([traced("gemma2", layers) for layers in (4, 6, 8)], PATH, (4, 6, 8), 12)
    assert found is not None and same(found, traced("gemma2", 12), PATH)


def test_where_the_third_trace_says_otherwise_nothing_is_made():
    three, four, five = (traced("llama", layers) for layers in (3, 4, 5))
    assert deepened([three, four, five], PATH, (3, 4, 5), 8) is not None
    wider = traced("llama", 5, {"adapter.r": 4})
    assert deepened([three, four, wider], PATH, (3, 4, 5), 8) is None
    assert deepened([three, wider, five], PATH, (3, 4, 5), 8) is None
    assert deepened([four, three, five], PATH, (4, 3, 5), 8) is None
    five.storages[-1].nbytes += 1
    assert deepened([three, four, five], PATH, (3, 4, 5), 8) is None


@pytest.mark.parametrize("recomputed", [None, ALL_RECOMPUTED, NOTHING_RECOMPUTED])
def test_a_deep_model_is_predicted_from_shallow_ones(recomputed, monkeypatch):
    depths = []

    def noted(config, model_config, *run, **more):
        depths.append(model_config.num_hidden_layers)
        return predict(config, model_config, *run, **more)

    monkeypatch.setattr(extrapolate, "predict", noted)
    model, config = tiny_config("llama", num_hidden_layers=21), with_values(Config(), CHECKPOINTED)
    recomputation = None if recomputed is None else Recomputation.uniform(recomputed, 21)
    run = config, model, BatchShape.full(1, 64), torch.bfloat16, recomputation, CARD
    found = predict_deep(*run)
    assert depths == [3, 4, 5]
    assert same(found, predict(*run), PATH)


def test_where_layers_differ_the_whole_model_is_traced(monkeypatch):
    """Some recomputed and some not; too few layers; an adapter that may be another in each layer; some streamed. Where
    that is worth it, a shallow one shows whether its second step is the first one again."""
    depths = []
    monkeypatch.setattr(extrapolate, "predict", lambda config, model, *run: depths.append(model.num_hidden_layers))
    monkeypatch.setattr(extrapolate, "repeats", lambda trace: False)
    monkeypatch.setattr(extrapolate, "_repeating", {})
    config, shape = with_values(Config(), CHECKPOINTED), BatchShape.full(1, 64)
    model = tiny_config("llama", num_hidden_layers=21)
    mixed = Recomputation((ALL_RECOMPUTED,) * 20 + (NOTHING_RECOMPUTED,))
    predict_deep(config, model, shape, torch.bfloat16, mixed, CARD)
    predict_deep(config, tiny_config("llama", num_hidden_layers=10), shape, torch.bfloat16, None, CARD)
    one_layer = with_values(config, {"adapter.rank_pattern": {"layers.3.self_attn.q_proj": 2}})
    predict_deep(one_layer, model, shape, torch.bfloat16, None, CARD)
    some_streamed = with_values(config, {"model.weights": "host", "model.resident_layers": 4})
    predict_deep(some_streamed, tiny_config("llama", num_hidden_layers=41), shape, torch.bfloat16, None, CARD)
    assert depths == [3, 21, 3, 10, 21, 3, 41]


@pytest.mark.parametrize("values", [
    {"model.weights": "host"}, {"model.weights": "disk", "model.quantization": "int8"},
    {"model.weights": "disk", "model.quantization": "none", "training.gradient_accumulation_steps": 2},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("layers", [40, 41])
def test_streamed_layers_come_to_two_buffers_in_turn(values, layers, monkeypatch):
    depths = []

    def noted(config, model_config, *run, **more):
        depths.append(model_config.num_hidden_layers)
        return predict(config, model_config, *run, **more)

    monkeypatch.setattr(extrapolate, "predict", noted)
    model, config = tiny_config("llama", num_hidden_layers=layers), with_values(Config(), CHECKPOINTED | values)
    run = config, model, BatchShape.full(1, 64), torch.float32, None, CARD
    found, whole = predict_deep(*run), predict(*run)
    assert depths == ([4, 6, 8] if layers == 40 else [3, 5, 7])
    assert same(found, whole, PATH)
    assert (found.elsewhere, found.layer_bytes) == (whole.elsewhere, whole.layer_bytes)
    assert len(found.layer_bytes) == layers


def test_what_lies_elsewhere_must_repeat_too():
    three, five, seven = (traced("llama", layers, {"model.weights": "host"}) for layers in (3, 5, 7))
    assert deepened([three, five, seven], PATH, (3, 5, 7), 41) is not None
    assert deepened([three, five, replace(seven, layer_bytes=seven.layer_bytes[:-1])], PATH, (3, 5, 7), 41) is None
    seven.elsewhere["host_bytes"] += 1
    assert deepened([three, five, seven], PATH, (3, 5, 7), 41) is None
