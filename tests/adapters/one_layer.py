"""One linear module with one adapter, in fp32: what tests of methods compute with, and what an operation makes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_tool.adapters.adapter import Adapter, generator_for
from qlora_tool.methods import METHODS
from qlora_tool.methods.method import Settings
from qlora_tool.weights.handles import WeightHandle
from qlora_tool.weights.modules import FrozenLinear
from qlora_tool.weights.quantized import quantize


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def frozen_linear(out_features: int, in_features: int, quantization: str = "none") -> FrozenLinear:
    linear = FrozenLinear(in_features, out_features, nn.Parameter(noise(out_features, seed=2), requires_grad=False))
    weight = noise(out_features, in_features, seed=1) / in_features**0.5
    linear.weight = WeightHandle(weight if quantization == "none" else quantize(weight, quantization))
    return linear


def started(method: str, linear: FrozenLinear, settings: Settings) -> Adapter:
    """An adapter as training begins with it."""
    shared = METHODS[method].shared({(linear.out_features, linear.in_features)}, settings)
    return Adapter.start(METHODS[method], linear, settings, torch.float32, generator_for(0, "a"), shared)


def trained(method: str, linear: FrozenLinear, settings: Settings) -> Adapter:
    """An adapter of which no trained tensor is as it began."""
    adapter = started(method, linear, settings)
    fill(list(adapter.parameters()))
    return adapter


@torch.no_grad()
def fill(parameters: Sequence[Tensor], deviation: float = 0.5) -> None:
    for number, parameter in enumerate(parameters):
        parameter.copy_(noise(*parameter.shape, seed=number) * deviation)


def output_and_gradients(
    forward: Callable[[Tensor], Tensor], x: Tensor, parameters: Sequence[Tensor], grad: Tensor
) -> list[Tensor]:
    y = forward(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], grad)]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def disagreement(adapter: Adapter, linear: FrozenLinear, formula: Callable[[dict[str, Tensor]], Tensor]) -> float:
    """The largest error of the output and of all gradients over the largest value of each.

    Args:
        formula: the update Δ (out, in) from the tensors, both fp64.
    """
    x, grad = noise(2, 5, linear.in_features, seed=6), noise(2, 5, linear.out_features, seed=7)
    parameters = dict(adapter.named_parameters())
    found = output_and_gradients(lambda x: adapter(x, linear), x.requires_grad_(), list(parameters.values()), grad)
    weight = linear.weight.dense(torch.float32).double()
    exact = {name: tensor.detach().double().requires_grad_(name in parameters)
             for name, tensor in adapter.tensors.items()}  # fmt: skip
    expected = output_and_gradients(
        lambda x: x @ (weight + formula(exact)).T + linear.bias.double(),
        x.detach().double().requires_grad_(), [exact[name] for name in parameters], grad.double(),
    )  # fmt: skip
    for value, wanted in zip(found, expected, strict=True):
        assert value.shape == wanted.shape
    return max(relative_error(value, wanted) for value, wanted in zip(found, expected, strict=True))


class Live(TorchDispatchMode):
    """The most bytes that are there at once of what operators make under it."""

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (key := leaf.untyped_storage()._cdata) not in given | self.known:
                self.known.add(key)
                self.bytes += leaf.untyped_storage().nbytes()
                weakref.finalize(leaf.untyped_storage(), self.gone, key, leaf.untyped_storage().nbytes())
        self.peak = max(self.peak, self.bytes)
        return result

    def gone(self, key: int, count: int) -> None:
        self.known.discard(key)
        self.bytes -= count
