"""A linear module with any number of named adapters, against plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qlora_tool.adapters.adapter import Adapter
from qlora_tool.errors import UserError
from qlora_tool.methods import METHODS
from qlora_tool.methods.method import Settings
from qlora_tool.weights.handles import WeightHandle
from qlora_tool.weights.modules import FrozenLinear
from qlora_tool.weights.quantized import quantize

IN, OUT = 64, 24


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def settings(dropout: float = 0.0) -> Settings:
    return Settings(2, 4, dropout)


def lora(seed: int, dropout: float = 0.0) -> Adapter:
    tensors = {"lora_A": noise(2, IN, seed=seed), "lora_B": noise(OUT, 2, seed=seed + 1)}
    return Adapter(METHODS["lora"], tensors, settings(dropout))


def linear_with(**adapters: nn.Module) -> FrozenLinear:
    module = FrozenLinear(IN, OUT, nn.Parameter(noise(OUT, seed=1), requires_grad=False))
    module.weight = WeightHandle(quantize(noise(OUT, IN, seed=2), "nf4"))
    for name, adapter in adapters.items():
        module.add_adapter(name, adapter)
    return module


def expected(module: FrozenLinear, x: torch.Tensor, *names: str) -> torch.Tensor:
    """x·(W + Σ (alpha / r)·B·A)ᵀ + b in fp64."""
    weight = module.weight.dense(torch.float32).double()
    for name in names:
        adapter = module.adapters[name]
        weight = weight + 2 * adapter.lora_B.double() @ adapter.lora_A.double()
    return (x.double() @ weight.T + module.bias.double()).float()


@pytest.mark.parametrize("active", [(), ("one",), ("two",), ("one", "two"), ("one", "two", "three")])
def test_the_active_adapters_are_added_up(active):
    module = linear_with(one=lora(10), two=lora(20), three=lora(30))
    assert module.active_adapters == ("three",)  # the one added last
    module.set_adapters(active)
    assert module.active_adapters == active
    assert module.adapter is (module.adapters[active[0]] if len(active) == 1 else None)
    x = noise(5, IN, seed=3).requires_grad_()
    wanted = expected(module, x, *active)
    # Sums of 64 products of values around 1, of 2 · 64 of them for each adapter: off by a few 1e-5 in fp32.
    torch.testing.assert_close(module(x), wanted, rtol=1e-5, atol=2e-4)
    names = [f"adapters.{name}.{part}" for name in active for part in ("lora_A", "lora_B")]
    found = torch.autograd.grad(module(x).square().sum(), [x, *(module.get_parameter(name) for name in names)])
    grads = torch.autograd.grad(wanted.square().sum(), [x, *(module.get_parameter(name) for name in names)])
    for gradient, reference in zip(found, grads, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-4 * float(reference.abs().max()))


def test_an_adapter_that_is_not_active_gets_no_gradient():
    module = linear_with(one=lora(10), two=lora(20))
    module(noise(5, IN, seed=3)).sum().backward()
    assert module.adapters["one"].lora_A.grad is None and module.adapters["two"].lora_A.grad is not None


def test_each_drops_its_own_inputs_while_training():
    """Of one that drops nothing all is left; of one that drops its input whole, nothing."""
    module = linear_with(one=lora(10), two=lora(20, dropout=1 - 1e-9))
    module.set_adapters(["one", "two"])
    x = noise(5, IN, seed=3)
    torch.testing.assert_close(module(x), expected(module, x, "one"), rtol=1e-5, atol=2e-4)
    torch.testing.assert_close(module.eval()(x), expected(module, x, "one", "two"), rtol=1e-5, atol=2e-4)


def test_one_that_does_more_than_add_is_refused_beside_others_and_names_both():
    tensors = {"lora_A": noise(2, IN, seed=4), "lora_B": noise(OUT, 2, seed=5), "magnitude": torch.ones(OUT)}
    dora = Adapter(METHODS["dora"], tensors, settings())
    module = linear_with(plain=lora(10), lengths=dora)
    module.set_adapters(["lengths"])
    with pytest.raises(UserError, match=r"'lengths' \(dora\) cannot be active together with 'plain'"):
        module.set_adapters(["plain", "lengths"])
    assert module.active_adapters == ("lengths",)  # as before


def test_a_name_that_no_adapter_has_is_refused():
    with pytest.raises(ValueError, match="no adapter 'other' on this module: it has one, two"):
        linear_with(one=lora(10), two=lora(20)).set_adapters(["one", "other"])


def test_an_adapter_replaces_the_one_of_its_name():
    module, second = linear_with(one=lora(10)), lora(20)
    module.add_adapter("one", second)
    assert module.adapter is second and list(module.adapters) == ["one"]


def test_a_trained_weight_gets_its_gradient():
    module = linear_with()
    module.weight = WeightHandle(nn.Parameter(noise(OUT, IN, seed=2)))
    x = noise(5, IN, seed=3)
    module(x).sum().backward()
    torch.testing.assert_close(module.weight.stored().grad, x.sum(0).expand(OUT, IN), rtol=1e-5, atol=1e-5)
