"""DoRA layers: the formula in fp64, PEFT's own layer on the same numbers, and what is never made."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_tool.adapters.adapter import Adapter, generator_for
from qlora_tool.methods import METHODS
from qlora_tool.methods.dora import weight_norm
from qlora_tool.methods.lora import LoraKeys
from qlora_tool.methods.method import Settings
from qlora_tool.weights.handles import WeightHandle
from qlora_tool.weights.modules import FrozenLinear
from qlora_tool.weights.quantized import quantize

IN, OUT, R = 64, 96, 6
# Each value is a sum of at most IN + OUT products, and the norm, a root of such sums, enters twice.
FP32 = 3 * (IN + OUT) * 2**-24


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def frozen_linear(*, quantization: str = "none", bias: bool = True) -> FrozenLinear:
    linear = FrozenLinear(IN, OUT, nn.Parameter(noise(OUT, seed=2), requires_grad=False) if bias else None)
    weight = noise(OUT, IN, seed=1) / IN**0.5
    linear.weight = WeightHandle(weight if quantization == "none" else quantize(weight, quantization))
    return linear


def adapter(alpha: float = 12.0, dropout: float = 0.0, **keys) -> Adapter:
    tensors = {
        "lora_A": noise(R, IN, seed=3) / IN**0.5, "lora_B": noise(OUT, R, seed=4),
        "magnitude": noise(OUT, seed=5).abs() + 0.5,
    }  # fmt: skip
    return Adapter(METHODS["dora"], tensors, Settings(R, alpha, dropout, LoraKeys(**keys)))


def start_of(linear: FrozenLinear, dtype: torch.dtype = torch.float32) -> Adapter:
    return Adapter.start(METHODS["dora"], linear, Settings(R, 12.0), dtype, generator_for(0, "a"))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def output_and_gradients(forward, x: Tensor, trained: list[Tensor], grad: Tensor) -> list[Tensor]:
    y = forward(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *trained], grad)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(("settings", "scaling"), [({}, 2.0), ({"use_rslora": True}, 12.0 / R**0.5)])
def test_output_and_gradients_follow_the_formula(settings, scaling, quantization, bias):
    linear, layer = frozen_linear(quantization=quantization, bias=bias), adapter(**settings)
    x, grad = noise(2, 5, IN, seed=6).requires_grad_(), noise(2, 5, OUT, seed=7)
    trained = [layer.lora_A, layer.lora_B, layer.magnitude]
    found = output_and_gradients(lambda x: layer(x, linear), x, trained, grad)

    weight = linear.weight.dense(torch.float32).double()
    lora_A, lora_B, magnitude = [tensor.detach().double().requires_grad_() for tensor in trained]

    def formula(x: Tensor) -> Tensor:
        direction = weight + scaling * lora_B @ lora_A
        norm = direction.norm(dim=1, keepdim=True).detach()  # a constant in backward: section 4.3
        y = x @ (magnitude.unsqueeze(1) * direction / norm).T
        return y + linear.bias.double() if bias else y

    exact = output_and_gradients(
        formula, x.detach().double().requires_grad_(), [lora_A, lora_B, magnitude], grad.double()
    )
    for value, expected in zip(found, exact, strict=True):
        assert value.shape == expected.shape
        assert relative_error(value, expected) < FP32


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_layer_computes_as_pefts_does(dropout):
    ours, linear = adapter(dropout=dropout), frozen_linear()
    plain = nn.Linear(IN, OUT)
    with torch.no_grad():
        plain.weight.copy_(linear.weight.dense(torch.float32))
        plain.bias.copy_(linear.bias)
    config = peft.LoraConfig(r=R, lora_alpha=12, lora_dropout=dropout, use_dora=True, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(plain), config)
    theirs = model.base_model.model[0]
    # Their start is ours: lengths of the base's rows.
    start = start_of(linear)
    magnitude = theirs.lora_magnitude_vector.default.weight
    assert relative_error(start.magnitude.detach(), magnitude.detach()) < FP32
    tensors = [theirs.lora_A.default.weight, theirs.lora_B.default.weight, magnitude]
    with torch.no_grad():
        for tensor, own in zip(tensors, ours.trained().values(), strict=True):
            tensor.copy_(own)
    x, grad = noise(3, 5, IN, seed=6).requires_grad_(), noise(3, 5, OUT, seed=7)
    for training in (True, False):
        ours.train(training)
        model.train(training)
        torch.manual_seed(11)  # for dropout
        found = output_and_gradients(lambda x: ours(x, linear), x, list(ours.trained().values()), grad)
        torch.manual_seed(11)
        expected = output_and_gradients(theirs, x, tensors, grad)
        for value, other in zip(found, expected, strict=True):
            assert relative_error(value, other) < FP32


def test_the_start_is_the_base():
    linear = frozen_linear(quantization="nf4")
    layer = start_of(linear)
    x = noise(4, IN, seed=6)
    assert relative_error(layer(x, linear).detach(), linear(x)) < FP32
    assert relative_error(layer.magnitude.detach(), linear.weight.dense(torch.float32).norm(dim=1)) < FP32


def test_the_first_step_is_the_base_in_16_bits_too():
    """Both multiply in bf16: x·Wᵀ rounded once to a relative 2⁻⁹, and the factor m/‖W₀‖ once, to exactly 1. A bf16
    magnitude, itself off by up to 2⁻⁹, would move whole rows by as much."""
    linear = frozen_linear(quantization="nf4")
    layer = start_of(linear, torch.bfloat16)
    assert (layer.lora_A.dtype, layer.magnitude.dtype) == (torch.bfloat16, torch.float32)
    weight = linear.weight.dense(torch.float32).double()
    assert float((layer.magnitude.detach().double() / weight.norm(dim=1) - 1).abs().max()) < IN * 2**-24
    x = noise(64, IN, seed=6).bfloat16()
    assert torch.equal(layer(x, linear), linear(x))


def test_the_merged_weight_computes_as_the_layer_does():
    linear, layer = frozen_linear(quantization="nf4"), adapter(dropout=0.3)
    x, weight = noise(8, IN, seed=6), linear.weight.dense(torch.float32)
    merged = nn.functional.linear(x, weight + layer.delta(weight), linear.bias)
    assert relative_error(layer.eval()(x, linear).detach(), merged.detach()) < FP32
    rows = (weight + layer.delta(weight)).norm(dim=1)  # m is the length of the merged rows
    assert relative_error(rows.detach(), layer.magnitude.detach()) < FP32


def test_the_norm_is_that_of_the_whole_weight_where_the_update_nearly_cancels_a_row():
    linear, layer = frozen_linear(), adapter()
    weight = linear.weight.dense(torch.float32)
    with torch.no_grad():  # row 0 of s·BA becomes -0.9 of row 0 of W₀
        layer.lora_A[0] = weight[0]
        layer.lora_B[0] = torch.tensor([-0.45, 0, 0, 0, 0, 0])
    exact = (weight.double() + 2.0 * layer.lora_B.detach().double() @ layer.lora_A.detach().double()).norm(dim=1)
    found = weight_norm(linear.weight, layer.tensors, 2.0, torch.float32)
    assert float(exact[0]) == pytest.approx(0.1 * float(weight[0].norm()), rel=1e-5)
    # The squares nearly cancel to a hundredth of themselves: two digits are lost, five are left.
    assert float(((found - exact) / exact).abs().max()) < 100 * FP32


def test_nothing_as_large_as_the_weight_is_made_beside_the_weight():
    class Made(TorchDispatchMode):
        """Notes operators that allocate as many numbers as the weight has."""

        def __init__(self):
            super().__init__()
            self.operators = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            given = {tensor.untyped_storage().data_ptr() for tensor in tensors_in((args, kwargs))}
            for tensor in tensors_in(result):
                new = tensor.untyped_storage().data_ptr() not in given
                if new and tensor.is_floating_point() and tensor.numel() >= OUT * IN:
                    self.operators.append(function.overloadpacket.__name__)
            return result

    def tensors_in(tree) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]

    linear, layer = frozen_linear(quantization="nf4"), adapter()
    x = noise(3, IN, seed=6).requires_grad_()
    made = Made()
    with made:
        layer(x, linear).sum().backward()
    # The weight itself alone: for its norm, for the product, for backward.
    assert made.operators == ["dequantize_4bit"] * 3
