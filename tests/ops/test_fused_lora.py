"""The fused LoRA operations against plain autograd in fp64, and what they keep, make and skip."""

from __future__ import annotations

import random

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from qlora_tool.memory.trace.tracer import Tracer
from qlora_tool.ops.declare import Target, meant_for
from qlora_tool.ops.gated import ACTIVATIONS, Activation
from qlora_tool.ops.lora import (
    LoraWeights,
    lora_gated_mlp,
    lora_gated_mlp_reference,
    lora_linear,
    lora_linear_reference,
)
from qlora_tool.weights.quantized import quantize


class Handle:
    """A frozen weight (out, in) that counts how often it is asked for."""

    def __init__(self, weight, kind=None):
        self.value = weight if kind is None else quantize(weight, kind)
        self.kind, self.asked = kind, 0

    def dense(self, dtype, expert=None):
        self.asked += 1
        return self.value.to(dtype) if self.kind is None else self.value.dequantize(dtype)


def make_layer(
    out, width, r, *, seed, kind=None, dtype=torch.float32, bias=False, bias_trained=False, frozen=0
) -> LoraWeights:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    weight = Handle(normal(out, width), kind)
    return LoraWeights(
        weight, normal(r, width).requires_grad_(), normal(out, r).requires_grad_(), 2.0,
        normal(out).requires_grad_(bias_trained) if bias else None,
        (normal(frozen, width), normal(out, frozen)) if frozen else None,
    )  # fmt: skip


def exact(layer: LoraWeights) -> LoraWeights:
    """The same numbers in fp64, with gradients of their own."""

    def copied(tensor):
        return None if tensor is None else tensor.detach().double().requires_grad_(tensor.requires_grad)

    dense = layer.weight.dense(torch.float32).double()
    frozen = layer.frozen and (copied(layer.frozen[0]), copied(layer.frozen[1]))
    return LoraWeights(Handle(dense), copied(layer.A), copied(layer.B), layer.scaling, copied(layer.bias), frozen)


def trained(layers):
    return [t for layer in layers for t in (layer.A, layer.B, layer.bias) if t is not None and t.requires_grad]


def assert_equal_within(found, expected, dtype, terms):
    """Each value within `terms` roundings of the largest one's size: sums of products of numbers of size one, whose
    roundings add up like a walk, far below the bound of one a term."""
    step = torch.finfo(dtype).eps
    for value, exact_value in zip(found, expected, strict=True):
        assert value.dtype == dtype and value.shape == exact_value.shape
        size = max([1e-3, *exact_value.abs().flatten().tolist()])
        assert max([0.0, *(value.double() - exact_value).abs().flatten().tolist()]) <= terms * step * size


CASES = [
    (dtype, kind, random.Random(seed))
    for seed, (dtype, kind) in enumerate(
        [(dtype, kind) for dtype in (torch.float32, torch.bfloat16) for kind in (None, "nf4", "fp4", "int8")] * 3
    )
]


@pytest.mark.parametrize(("dtype", "kind", "draw"), CASES)
def test_gradients_are_autograds_whatever_the_shapes(dtype, kind, draw):
    width, r = draw.choice([32, 48, 64]), draw.choice([1, 3, 8])
    bias, bias_trained = draw.random() < 0.5, draw.random() < 0.5
    layers = [
        make_layer(draw.choice([16, 40, 96]), width, r + index, seed=index, kind=kind, dtype=dtype, bias=bias,
                  bias_trained=bias_trained, frozen=draw.choice([0, 0, 2, 5]))
        for index in range(draw.choice([1, 2, 3]))
    ]  # fmt: skip
    shape = draw.choice([(5,), (2, 7), (1,), (0,), (1, 1)])
    x = torch.randn(*shape, width, generator=torch.Generator().manual_seed(9)).to(dtype)
    x.requires_grad_(needs_x := draw.random() < 0.8)
    outputs = lora_linear(x, layers)
    grads = [torch.randn(y.shape, generator=torch.Generator().manual_seed(i)).to(dtype) for i, y in enumerate(outputs)]
    wanted = [x] * needs_x + trained(layers)
    found = torch.autograd.grad(outputs, wanted, grads)

    exact_parts, exact_x = [exact(layer) for layer in layers], x.detach().double().requires_grad_(needs_x)
    expected = lora_linear_reference(exact_x, exact_parts)
    wanted = [exact_x] * needs_x + trained(exact_parts)
    exact_grads = torch.autograd.grad(expected, wanted, [grad.double() for grad in grads])
    assert_equal_within(outputs, expected, dtype, 16)
    assert_equal_within(found, exact_grads, dtype, 16)


def test_a_frozen_term_is_taken_away():
    """By hand: y = W·x + s·(B·A − B₀·A₀)·x in one dimension; the gradient of a term that is not trained is nobody's."""
    one = torch.ones(1, 1)
    layer = LoraWeights(Handle(5 * one), (2 * one).requires_grad_(), (3 * one).requires_grad_(), 0.5, None,
                        (7 * one, 11 * one))  # fmt: skip
    x = (13 * one).requires_grad_()
    (y,) = lora_linear(x, [layer])
    assert float(y) == 13 * (5 + 0.5 * (2 * 3 - 7 * 11))
    grads = torch.autograd.grad(y, [x, layer.A, layer.B])
    assert [float(grad) for grad in grads] == [5 + 0.5 * (2 * 3 - 7 * 11), 13 * 0.5 * 3, 13 * 0.5 * 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda activation: activation.name)
@pytest.mark.parametrize(("kind", "bias"), [(None, True), ("nf4", False), ("int8", True)])
@pytest.mark.parametrize("tile", [None, 3, 10])
def test_the_gated_mlp_is_autograds(activation, dtype, kind, bias, tile):
    options = {"kind": kind, "dtype": dtype, "bias": bias, "bias_trained": True}
    frozen = (2, 0, 3) if kind == "nf4" else (0, 0, 0)
    layers = [make_layer(48, 32, 4, seed=1, frozen=frozen[0], **options),
              make_layer(48, 32, 3, seed=2, frozen=frozen[1], **options),
              make_layer(32, 48, 5, seed=3, frozen=frozen[2], **options)]  # fmt: skip
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    y = lora_gated_mlp(x, *layers, activation, tile)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = torch.autograd.grad(y, [x, *trained(layers)], grad)

    exact_parts, exact_x = [exact(layer) for layer in layers], x.detach().double().requires_grad_()
    expected = lora_gated_mlp_reference(exact_x, *exact_parts, activation)
    exact_grads = torch.autograd.grad(expected, [exact_x, *trained(exact_parts)], grad.double())
    assert_equal_within([y], [expected], dtype, 16)
    assert_equal_within(found, exact_grads, dtype, 16)


@pytest.mark.parametrize("tile", [None, 3])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda activation: activation.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_for_a_card_a_gated_mlp_is_autograds_too_and_backward_may_come_twice(activation, dtype, tile):
    """What a first backward pass has written over, a second one must not need."""
    options = {"dtype": dtype, "bias": True, "bias_trained": True}
    layers = [make_layer(48, 32, 4, seed=1, **options), make_layer(48, 32, 3, seed=2, **options)]
    layers.append(make_layer(32, 48, 5, seed=3, **options))
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    with meant_for(Target("cuda", (9, 0))):
        y = lora_gated_mlp(x, *layers, activation, tile)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        first = torch.autograd.grad(y, [x, *trained(layers)], grad, retain_graph=True)
        second = torch.autograd.grad(y, [x, *trained(layers)], grad)

    exact_parts, exact_x = [exact(layer) for layer in layers], x.detach().double().requires_grad_()
    expected = lora_gated_mlp_reference(exact_x, *exact_parts, activation)
    exact_grads = torch.autograd.grad(expected, [exact_x, *trained(exact_parts)], grad.double())
    assert_equal_within([y], [expected], dtype, 16)
    assert_equal_within(first, exact_grads, dtype, 16)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_for_a_card_backward_takes_the_memory_of_gate_and_up():
    """Of (tokens, intermediate) only the gradient of h is made: its own, and what was kept, hold all that follows."""
    layers = [make_layer(96, 64, 4, seed=1), make_layer(96, 64, 4, seed=2), make_layer(64, 96, 4, seed=3)]
    with meant_for(Target("cuda", (9, 0))):
        y = lora_gated_mlp(torch.randn(10, 64, requires_grad=True), *layers, ACTIVATIONS[0])
        with Tracer() as tracer:
            y.sum().backward()
    seen = [storage.operator for storage in tracer.trace.storages if storage.nbytes == 10 * 96 * 4]
    assert seen == ["aten::detach"] * 2 + ["qlora_tool::matmul"]  # what was kept, and then


def test_what_is_saved_is_the_input_once_and_x_times_A():
    layers = [make_layer(96, 64, 4, seed=1), make_layer(32, 64, 4, seed=2)]
    kept = []
    x = torch.randn(10, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_linear(x, layers)
    assert sorted(tuple(t.shape) for t in kept) == [(10, 8), (10, 64)]
    assert {t.data_ptr() for t in kept if t.shape == x.shape} == {x.data_ptr()}


def test_the_gated_mlp_keeps_gate_and_up_and_neither_activation_nor_product():
    layers = [make_layer(96, 64, 4, seed=1), make_layer(96, 64, 4, seed=2), make_layer(64, 96, 4, seed=3)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        lora_gated_mlp(torch.randn(10, 64, requires_grad=True), *layers, ACTIVATIONS[0])
    assert sorted(kept) == [(10, 8), (10, 64), (10, 96), (10, 96)]


def test_a_tiled_mlp_keeps_its_input_alone_and_makes_no_more_than_a_tile():
    layers = [make_layer(96, 64, 4, seed=1), make_layer(96, 64, 4, seed=2), make_layer(64, 96, 4, seed=3)]
    kept, made = [], []
    silu = ACTIVATIONS[0]
    noting = Activation("noting", lambda t: made.append(tuple(t.shape)) or silu.function(t), silu.gradient)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        y = lora_gated_mlp(torch.randn(10, 64, requires_grad=True), *layers, noting, 4)
    y.sum().backward()
    assert sorted(kept) == [(10, 8), (10, 64)]
    assert made == [(4, 96), (4, 96), (2, 96)] * 2


def test_what_was_saved_is_freed_by_backward():
    layer = make_layer(96, 64, 4, seed=1)
    (y,) = lora_linear(torch.randn(10, 64, requires_grad=True), [layer])
    total = y.sum()
    total.backward(retain_graph=True)
    first, layer.A.grad = layer.A.grad, None
    total.backward()
    assert torch.equal(layer.A.grad, first)
    with pytest.raises(RuntimeError, match="already been freed"):
        total.backward()


def test_nothing_of_the_size_of_the_weight_is_made_for_a_gradient():
    """The shapes of all results in backward: of (out, in), only the dequantized weight."""
    from torch.utils._python_dispatch import TorchDispatchMode

    layer = make_layer(96, 64, 4, seed=1, kind="nf4")
    (y,) = lora_linear(torch.randn(10, 64, requires_grad=True), [layer])

    class Shapes(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.seen.append((func.name(), tuple(result.shape)))
            return result

    with Shapes() as mode:
        y.sum().backward()
    products = [name for name, shape in mode.seen if shape in ((96, 64), (64, 96)) and name.endswith(("mm", "matmul"))]
    assert products == []
    assert ("qlora_tool::dequantize_4bit", (96, 64)) in mode.seen  # the mode saw what there was


@pytest.mark.parametrize("mlp", [False, True])
def test_a_checkpointed_region_skips_the_base_product_it_ends_in(mlp):
    layers = [make_layer(96, 64, 4, seed=1), make_layer(96, 64, 4, seed=2), make_layer(64, 96, 4, seed=3)]

    def region(x):
        if mlp:
            return lora_gated_mlp(x, *layers, ACTIVATIONS[0])
        gate, up = lora_linear(x, layers[:2])
        return lora_linear(torch.nn.functional.silu(gate) * up, layers[2:])[0]

    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    expected = torch.autograd.grad(region(x).sum(), [x, *trained(layers)])
    for layer in layers:
        layer.weight.asked = 0
    found = torch.autograd.grad(checkpoint(region, x, use_reentrant=False).sum(), [x, *trained(layers)])
    # Forward, recomputation, backward; the last one: forward and backward alone.
    assert [layer.weight.asked for layer in layers] == [3, 3, 2]
    for value, wanted in zip(found, expected, strict=True):
        assert torch.equal(value, wanted)


def test_without_gradients_nothing_is_saved():
    layer = make_layer(96, 64, 4, seed=1)
    x = torch.randn(3, 64)
    with torch.no_grad():
        (y,) = lora_linear(x, [layer])
    assert not y.requires_grad
    torch.testing.assert_close(y, lora_linear_reference(x, [layer])[0].detach())
    down = make_layer(64, 96, 2, seed=2)
    assert torch.no_grad()(lora_gated_mlp)(x, layer, layer, down, ACTIVATIONS[0]).shape == (3, 64)


def test_adapters_of_another_dtype_get_gradients_of_their_own():
    layer = make_layer(96, 64, 4, seed=1, bias=True, bias_trained=True)
    (y,) = lora_linear(torch.randn(3, 64).bfloat16(), [layer])
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert {t.grad.dtype for t in (layer.A, layer.B, layer.bias)} == {torch.float32}
