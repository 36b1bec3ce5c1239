"""Peaks of deep models from shallow ones, against traces of the whole models."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from qlora_tool.adapters.targets import tells_layers_apart
from qlora_tool.config import Config, with_values
from qlora_tool.memory.allocator.target import CudaTarget
from qlora_tool.memory.breakdown import PHASES
from qlora_tool.memory.trace import extrapolate
from qlora_tool.memory.trace.extrapolate import (
    LayerStack,
    estimate_peak,
    layer_stack,
    resized,
    timeline_on,
    with_layers,
)
from qlora_tool.memory.trace.predict import BatchShape, predict
from qlora_tool.memory.trace.recomputation_cost import Costs
from qlora_tool.methods import METHODS

H100 = CudaTarget((9, 0), None, False)
SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 1024, "num_hidden_layers": 6,
}  # fmt: skip
FAMILIES = {
    "llama": SIZES,
    "gemma2": SIZES | {"head_dim": 16, "sliding_window": 64, "num_hidden_layers": 9},
    "mixtral": SIZES | {"num_local_experts": 4},
    "qwen3_moe": SIZES | {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64, "head_dim": 16},
    "gpt2": {"vocab_size": 512, "n_embd": 64, "n_layer": 6, "n_head": 4, "n_positions": 1024},
}


def made(family: str, **changes):
    return AutoConfig.for_model(family, **{**FAMILIES[family], **changes})


def settings(**values) -> Config:
    return with_values(Config(), {"training.gradient_checkpointing": True, **values})


@pytest.mark.parametrize(
    ("family", "checkpointing"),
    [("llama", True), ("gemma2", True), ("mixtral", False), ("gpt2", False)],
)
def test_the_peak_of_every_phase_is_that_of_the_whole_model(family, checkpointing):
    config = settings(**{"training.gradient_checkpointing": checkpointing})
    model_config, shape = made(family), BatchShape.full(2, 96)
    found = estimate_peak(config, model_config, shape, torch.float32, None)
    layers = model_config.num_hidden_layers
    assert max(found.traced_layers) < layers
    whole = timeline_on(predict(config, made(family), shape, torch.float32), None).breakdown()
    assert found.peak_bytes == pytest.approx(whole.peak_bytes, rel=1e-5)
    for phase in PHASES:
        assert found.phase_peak_bytes[phase] == pytest.approx(whole.phase_peak_bytes[phase], rel=1e-4), phase
    assert model_config.num_hidden_layers == layers  # left as it was


@pytest.mark.parametrize(
    "method", [pytest.param(method, marks=[] if method == "vera" else pytest.mark.slow) for method in METHODS]
)
def test_every_method_grows_with_the_layers_as_it_does(method: str):
    """What all layers share, VeRA's two matrices, is there once whatever their number."""
    keys = METHODS[method].keys
    values = {"adapter.r": 64} if keys.reads("r") else {"model.quantization": "none"}
    config, shape = settings(**{"adapter.method": method, **values}), BatchShape.full(2, 48)
    found = estimate_peak(config, made("llama"), shape, torch.float32, None)
    assert max(found.traced_layers) < made("llama").num_hidden_layers
    whole = timeline_on(predict(config, made("llama"), shape, torch.float32), None).breakdown()
    assert found.peak_bytes == pytest.approx(whole.peak_bytes, rel=1e-5)


@pytest.mark.slow
def test_layers_of_experts_add_up():
    """The published shapes of a mixture take minutes to trace whole (docs/measurements/cpu.md): what two layers take
    and, for each one beyond, what a third adds, is what all of them take, every part of the peak to the byte."""
    values = {"adapter.r": 2, "adapter.target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    model = made("qwen3_moe", num_hidden_layers=4)

    def parts(layers: int) -> dict[str, int]:
        trace = predict(settings(**values), with_layers(model, layers), BatchShape.full(1, 48), torch.bfloat16)
        return timeline_on(trace, None).breakdown().parts

    two, three = parts(2), parts(3)
    assert {part: two[part] + 2 * (three[part] - two[part]) for part in two} == parts(4)
    assert min(three[part] - two[part] for part in ("base_weights", "adapter_weights", "optimizer_state")) > 0


@pytest.mark.parametrize("more", [{}, {"training.tiled_mlp": True}, {"training.gradient_accumulation_steps": 2}])
@pytest.mark.parametrize("offload", [False, True])
def test_the_peak_on_a_card_with_boundaries_in_host_memory(offload, more):
    """Gradients grow in backward then and no boundary leaves: the peak is near the first layer, not the last."""
    config = settings(**{"training.offload_boundaries": offload, "adapter.r": 64, **more})
    model_config = made("llama", hidden_size=512, intermediate_size=1024, num_hidden_layers=12)
    shape = BatchShape.full(2, 1024)
    found = estimate_peak(config, model_config, shape, torch.bfloat16, H100, replayed=False)
    assert max(found.traced_layers) < 12
    trace = predict(config, model_config, shape, torch.bfloat16, target=H100.device)
    whole = timeline_on(trace, None).breakdown()
    for phase in PHASES:
        assert found.phase_peak_bytes[phase] == pytest.approx(whole.phase_peak_bytes[phase], rel=1e-4), phase
    assert found.peak_bytes == pytest.approx(whole.peak_bytes, rel=1e-4)
    replayed = estimate_peak(config, model_config, shape, torch.bfloat16, H100)
    assert replayed.peak_bytes == pytest.approx(timeline_on(trace, H100).peak_bytes, rel=0.02)  # blocks are rounded


def test_weights_are_those_of_the_whole_model():
    config = settings(**{"model.quantization": "none"})
    found = estimate_peak(config, made("llama"), BatchShape.full(1, 32), torch.float32, None)
    # By hand, a layer: q and o 64 x 64, k and v 64 x 32, gate, up and down 64 x 128, in bf16; two norms of 64 in fp32
    layer = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) + 4 * 2 * 64
    # r = 16 on each of them, fp32: 16 (in + out)
    adapters = 4 * 16 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    outside = 2 * 2 * 512 * 64 + 4 * 64
    rope = 2 * 4 * 8  # inverse frequencies, and as they were first
    batch = 8 * (2 * 32 + 2 * 31) + 4  # token ids, positions, places and targets of labels; the loss so far
    assert found.weights_bytes == 6 * (layer + adapters) + outside + rope + batch


@pytest.mark.parametrize("segments", [None, (300,)])
def test_long_batches_are_drawn_out_of_shorter_ones(monkeypatch, segments):
    monkeypatch.setattr(extrapolate, "LONG_BATCH", 1024)
    family, shape = "llama", BatchShape.full(2, 1300)
    if segments:  # a mask of length x length, and scores
        family, shape = "gemma2", BatchShape(2, 1300, 2600, segments=(1300,))
    model_config = made(family, num_hidden_layers=1, max_position_embeddings=4096)
    found = estimate_peak(settings(), model_config, shape, torch.float32, None)
    whole = timeline_on(predict(settings(), model_config, shape, torch.float32), None).peak_bytes
    assert found.peak_bytes == pytest.approx(whole, rel=2e-3)


@pytest.mark.parametrize(("family", "segments", "traces"),
                         [("llama", False, [3, 2, 3]), ("gemma2", True, [3, 3, 3])])  # fmt: skip
def test_what_lies_on_a_line_is_told_by_two_lengths_from_then_on(monkeypatch, family, segments, traces):
    """And is the same as three tell; masks of length x length lie on none, and fewer rows are longer ones."""
    monkeypatch.setattr(extrapolate, "LONG_BATCH", 8192)
    monkeypatch.setattr(extrapolate, "_straight", {})
    seen = []
    monkeypatch.setattr(extrapolate, "predict", lambda *args, **to: seen.append(args[2].length) or predict(*args, **to))
    model_config = made(family, num_hidden_layers=1, max_position_embeddings=8192, vocab_size=700)
    found = {}
    for (rows, length), lengths in zip(((2, 6000), (4, 3000), (1, 12000)), traces, strict=True):
        seen.clear()
        shape = BatchShape(rows, length, rows * length, segments=(length,) if segments else None)
        found[shape] = estimate_peak(settings(), model_config, shape, torch.float32, None)
        assert len(seen) == lengths
    for shape, estimate in found.items():
        extrapolate._straight.clear()
        assert estimate_peak(settings(), model_config, shape, torch.float32, None) == estimate


def test_what_is_asked_twice_is_traced_once(monkeypatch):
    calls = []
    monkeypatch.setattr(extrapolate, "predict", lambda *args, **to: calls.append(args) or predict(*args, **to))
    sizes = {"vocab_size": 300, "num_hidden_layers": 1}
    model_config, shape = made("llama", **sizes), BatchShape.full(1, 32)
    first = estimate_peak(settings(), model_config, shape, torch.float32, None)
    again = settings(**{"training.learning_rate": 1e-5, "data.max_length": 77})  # which no trace depends on
    assert estimate_peak(again, made("llama", **sizes), shape, torch.float32, None) == first
    assert len(calls) == 1
    assert estimate_peak(settings(**{"adapter.r": 32}), model_config, shape, torch.float32, None) != first
    assert estimate_peak(settings(), made("llama", **sizes | {"vocab_size": 400}), shape, torch.float32, None) != first


def test_layers_that_repeat_by_pattern_and_those_that_come_first():
    gemma3 = AutoConfig.for_model("gemma3_text", **{**SIZES, "num_hidden_layers": 26, "head_dim": 16})
    stack = layer_stack(gemma3)
    assert (stack.path, stack.first, stack.period) == ("model.layers", 0, 6)
    assert stack.traced == (8, 14)  # 26 = 8 mod 6: the last layer is of the same kind in all of them
    experts = AutoConfig.for_model("qwen3_moe", **{
        **SIZES, "num_hidden_layers": 12, "num_experts": 4, "moe_intermediate_size": 64, "mlp_only_layers": [0, 1],
    })  # fmt: skip
    stack = layer_stack(experts)
    assert (stack.first, stack.period, stack.traced) == (2, 1, (4, 6))
    assert LayerStack(5, "model.layers", 0, 2).traced == (5,)  # 3 and 5 layers would be no less
    assert LayerStack(8, "model.layers", 0, 2).traced == (4, 6)
    # The second layer, which is the first with a gradient below it, is told from those in between.
    assert LayerStack(32, "model.layers", 0, 1).traced == (3, 5)
    assert LayerStack(25, "model.layers", 0, 6).traced == (13, 19)


def test_fewer_layers_keep_what_is_listed_for_each():
    gemma3 = AutoConfig.for_model("gemma3_text", **{**SIZES, "num_hidden_layers": 12, "head_dim": 16})
    cut = with_layers(gemma3, 7)
    assert cut.num_hidden_layers == 7
    assert cut.layer_types == gemma3.layer_types[:7]
    assert with_layers(made("gpt2"), 3).n_layer == 3


def test_another_size_of_the_same_kind_of_batch():
    assert resized(BatchShape.full(2, 100), 4, 50) == BatchShape.full(4, 50)
    half = BatchShape(2, 100, 100, padded=True)
    assert resized(half, 1, 40) == BatchShape(1, 40, 20, padded=True)
    assert resized(BatchShape(2, 100, 150, segments=(60, 40)), 2, 200) == BatchShape(2, 200, 300, segments=(200,))


@pytest.mark.parametrize("values", [
    {"adapter.layers_to_transform": [4]}, {"adapter.rank_pattern": {"layers.4.self_attn.q_proj": 64}},
    {"adapter.exclude_modules": ["model.layers.5.mlp.up_proj"]}, {"adapter.target_modules": ["layers.4.mlp.up_proj"]},
    {"adapter.target_modules": r".*layers\.[3-5]\..*q_proj"},
    {"adapter.method": "llama_adapter", "adapter.adapter_layers": 5},
    {"adapter.modules_to_save": ["layers.4.input_layernorm"]}, {"model.skip_modules": ["model.layers.4.mlp.down_proj"]},
], ids=lambda values: ",".join(values))  # fmt: skip
def test_layers_that_a_key_tells_apart_are_all_traced(values):
    """A shallow model has not the layers that are named, or has another share of them."""
    method = values.get("adapter.method", "lora")  # which has keys of its own
    config = with_values(with_values(settings(), {"adapter.method": method}), values)
    shape = BatchShape.full(2, 96)
    whole = timeline_on(predict(config, made("llama"), shape, torch.float32), None).breakdown()
    found = estimate_peak(config, made("llama"), shape, torch.float32, None)
    assert found.peak_bytes == whole.peak_bytes and found.traced_layers == (6,)
    assert Costs.of(config, made("llama"), shape, torch.float32).layers


def test_names_with_numbers_of_their_own_tell_no_layers_apart():
    plain = {"adapter.target_modules": ["fc1", "w2", "c_fc", "k_proj2"], "adapter.rank_pattern": {r"mlp\.\d*fc1": 8}}
    assert not tells_layers_apart(settings(**plain).adapter) and not tells_layers_apart(settings().adapter)
