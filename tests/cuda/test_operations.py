"""Each operation of a training step on a card, against fp64 or against the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from qlora_tool.data.batches import Segments
from qlora_tool.model.segments import SegmentMask, segment_attention
from qlora_tool.ops.gated import ACTIVATIONS
from qlora_tool.ops.lora import (
    LoraWeights,
    lora_gated_mlp,
    lora_gated_mlp_reference,
    lora_linear,
    lora_linear_reference,
)
from qlora_tool.ops.loss import LogitsTransform, frozen_cross_entropy
from qlora_tool.weights.quantized import QuantizedTensor, quantize

pytestmark = pytest.mark.cuda
HALVES = [torch.bfloat16, torch.float16]


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers, the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def off(found: Tensor, exact: Tensor) -> float:
    """The norm of the difference over that of the exact one."""
    found, exact = found.detach(), exact.detach().cpu()
    return float(torch.linalg.vector_norm(found.double().cpu() - exact) / torch.linalg.vector_norm(exact))


# ---------------------------------------------------------------------------------------------------- quantized weights


KINDS = [("nf4", True), ("nf4", False), ("fp4", True), ("int8", False)]
SHAPES = [(64, 128), (3, 96), (5, 50), (384, 512), (1000, 72)]


def weight_of(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """With a block of zeros, one of huge numbers and one of tiny ones."""
    weight = drawn(*shape, seed=sum(shape)) * 0.02
    flat = weight.view(-1)
    flat[:64], flat[64:128], flat[128:192] = 0.0, flat[64:128] * 1e4, flat[128:192] * 1e-4
    return weight.to(dtype)


@pytest.mark.parametrize(("kind", "double"), KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_the_same_codes_are_the_same_weights_on_both_devices(device, kind, double, shape, dtype):
    """What was quantized on either is, to the bit, the same weight on the other: an export on a CPU gives what training
    on a card saw."""
    weight = weight_of(shape, dtype)
    for made_on, read_on in ((torch.device("cpu"), device), (device, torch.device("cpu"))):
        stored = quantize(weight.to(made_on), kind, double)
        moved: QuantizedTensor = stored.map(lambda tensor: tensor.to(read_on))  # noqa: B023 -- called at once
        for wanted in (torch.float32, *HALVES):
            here, there = stored.dequantize(wanted).cpu(), moved.dequantize(wanted).cpu()
            assert torch.equal(here, there), (made_on, wanted, int((here != there).sum()))


@pytest.mark.parametrize(("kind", "double"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_both_devices_quantize_to_the_same_weights(device, kind, double, dtype):
    """Zeros are zeros, and no weight that lies on the border between two codes gets another one."""
    weight = weight_of((512, 1024), dtype)
    here = quantize(weight, kind, double).dequantize(torch.float32)
    there = quantize(weight.to(device), kind, double).dequantize(torch.float32).cpu()
    assert not there.view(-1)[:64].any() and torch.equal(here, there)


# ----------------------------------------------------------------------------------------------------- fused operations


class Handle:
    """A frozen weight (out, in)."""

    def __init__(self, value):
        self.value, self.shape = value, tuple(value.shape)

    def dense(self, dtype, expert=None):
        return self.value.dequantize(dtype) if isinstance(self.value, QuantizedTensor) else self.value.to(dtype)


def layer(out: int, width: int, r: int, seed: int, dtype: torch.dtype, device: torch.device) -> LoraWeights:
    weight = quantize((drawn(out, width, seed=seed) / width**0.5).to(device, dtype), "nf4")
    A, B = (drawn(*shape, seed=seed + 10 + shape[0]) / shape[-1] ** 0.5 for shape in ((r, width), (out, r)))
    return LoraWeights(Handle(weight), A.to(device, dtype).requires_grad_(), B.to(device, dtype).requires_grad_(), 2.0)


def exact(one: LoraWeights) -> LoraWeights:
    A, B = (tensor.detach().double().cpu().requires_grad_() for tensor in (one.A, one.B))
    return replace(one, weight=Handle(one.weight.dense(torch.float32).double().cpu()), A=A, B=B)


def assert_close(found, expected, dtype: torch.dtype):
    """In norm within four roundings, as often are values rounded one after the other, and the walk of 512 roundings of
    a sum in fp32, the longest here."""
    bound = 4 * torch.finfo(dtype).eps + 512**0.5 * torch.finfo(torch.float32).eps
    for value, wanted in zip(found, expected, strict=True):
        assert value.dtype == dtype
        assert off(value, wanted) < bound


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("tokens", [(1, 1), (2, 37), (4, 256)])
def test_lora_layers_of_one_input(device, dtype, tokens):
    layers = [layer(out, 256, r, seed, dtype, device) for seed, (out, r) in enumerate([(256, 16), (128, 16), (128, 8)])]
    x = drawn(*tokens, 256, seed=7).to(device, dtype).requires_grad_()
    outputs = lora_linear(x, layers)
    grads = [drawn(*y.shape, seed=20 + i).to(device, dtype) for i, y in enumerate(outputs)]
    found = torch.autograd.grad(outputs, [x, *(t for one in layers for t in (one.A, one.B))], grads)
    exact_layers, exact_x = [exact(one) for one in layers], x.detach().double().cpu().requires_grad_()
    expected = lora_linear_reference(exact_x, exact_layers)
    wanted = torch.autograd.grad(expected, [exact_x, *(t for one in exact_layers for t in (one.A, one.B))],
                                 [grad.double().cpu() for grad in grads])  # fmt: skip
    assert_close([*outputs, *found], [*expected, *wanted], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda one: one.name)
@pytest.mark.parametrize("tile", [None, 64])
def test_the_gated_mlp(device, dtype, activation, tile):
    layers = [layer(512, 256, 16, 1, dtype, device), layer(512, 256, 16, 2, dtype, device),
              layer(256, 512, 16, 3, dtype, device)]  # fmt: skip
    x = drawn(2, 77, 256, seed=7).to(device, dtype).requires_grad_()
    y = lora_gated_mlp(x, *layers, activation, tile)
    grad = drawn(*y.shape, seed=8).to(device, dtype)
    found = torch.autograd.grad(y, [x, *(t for one in layers for t in (one.A, one.B))], grad)
    exact_layers, exact_x = [exact(one) for one in layers], x.detach().double().cpu().requires_grad_()
    expected = lora_gated_mlp_reference(exact_x, *exact_layers, activation)
    wanted = torch.autograd.grad(expected, [exact_x, *(t for one in exact_layers for t in (one.A, one.B))],
                                 grad.double().cpu())  # fmt: skip
    assert_close([y, *found], [expected, *wanted], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("transform", [LogitsTransform(), LogitsTransform(0.5, 3.0)], ids=["plain", "capped"])
def test_the_loss(device, dtype, smoothing, transform):
    """The loss to fp32's accuracy on these inputs, the logits rounded once; its gradient in two roundings more."""
    hidden = drawn(700, 64, seed=1).to(device, dtype).requires_grad_()
    weight = (drawn(1000, 64, seed=2) / 8).to(device, dtype)
    targets = torch.randint(1000, (700,), generator=torch.Generator().manual_seed(3)).to(device)
    loss = frozen_cross_entropy(hidden, targets, Handle(weight), None, transform=transform, label_smoothing=smoothing)
    (found,) = torch.autograd.grad(loss, hidden)
    exact_hidden = hidden.detach().double().cpu().requires_grad_()
    logits = exact_hidden @ weight.double().cpu().T * transform.scale
    if transform.softcap:
        logits = torch.tanh(logits / transform.softcap) * transform.softcap
    wanted = nn.functional.cross_entropy(logits, targets.cpu(), reduction="sum", label_smoothing=smoothing)
    (gradient,) = torch.autograd.grad(wanted, exact_hidden)
    eps = torch.finfo(dtype).eps
    assert abs(float(loss) / float(wanted) - 1) < max(eps / 10, 1e-5)
    assert off(found, gradient) < 4 * eps


# ------------------------------------------------------------------------------------------------------------ attention


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=["all heads", "grouped"])
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("width", [64, 80, 128])
def test_attention_by_segment(device, dtype, heads, window, width):
    """Every segment of a packed row by itself, in fp64; outputs and gradients of a good kernel are off by about a
    rounding, those of a segment that sees another by all of it."""
    lengths, (count, key_count) = (37, 90, 1, 128), heads
    total = sum(lengths)
    q, k, v = (
        drawn(1, n, total, width, seed=seed).to(device, dtype).requires_grad_()
        for seed, n in enumerate((count, key_count, key_count))
    )
    module = nn.Module()
    module.is_causal, module.num_key_value_groups = True, count // key_count
    segments = Segments.of(lengths)
    mask = SegmentMask(replace(segments, offsets=segments.offsets.to(device)), window)
    output, _ = segment_attention(module, q, k, v, mask, scaling=width**-0.5)
    grad = drawn(*output.shape, seed=9).to(device, dtype)
    found = torch.autograd.grad(output, (q, k, v), grad)
    exact_q, exact_k, exact_v = (tensor.detach().double().cpu().requires_grad_() for tensor in (q, k, v))
    outputs = []
    for q_, k_, v_ in zip(*(tensor.split(lengths, 2) for tensor in (exact_q, exact_k, exact_v)), strict=True):
        length = q_.shape[2]
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        seen = seen if window is None else seen.triu(1 - window)
        k_, v_ = (tensor.repeat_interleave(count // key_count, 1) for tensor in (k_, v_))
        scores = (q_ @ k_.mT * width**-0.5).masked_fill(~seen, -torch.inf)
        outputs.append(torch.softmax(scores, -1) @ v_)
    expected = torch.cat(outputs, 2).transpose(1, 2)
    wanted = torch.autograd.grad(expected, (exact_q, exact_k, exact_v), grad.double().cpu())
    for value, right in zip((output, *found), (expected, *wanted), strict=True):
        print(f"{off(value, right) / torch.finfo(dtype).eps:.2f} roundings")
        assert off(value, right) < 8 * torch.finfo(dtype).eps
