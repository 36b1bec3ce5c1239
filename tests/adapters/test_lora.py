"""LoRA layers: the formula in fp64, PEFT's own layer on the same numbers, the start, dropout, the merged weight."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from torch import Tensor, nn

from qlora_tool.adapters.adapter import Adapter, generator_for
from qlora_tool.methods import METHODS
from qlora_tool.methods.lora import LoraKeys
from qlora_tool.methods.method import Settings
from qlora_tool.weights.handles import WeightHandle
from qlora_tool.weights.modules import FrozenLinear
from qlora_tool.weights.quantized import quantize

IN, OUT, R = 64, 96, 6
# Each value is a sum of at most IN + OUT products; rounding errors of 2⁻²⁴ each, all in one direction, make this.
FP32 = (IN + OUT) * 2**-24


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def frozen_linear(*, quantization: str = "none", bias: bool = True) -> FrozenLinear:
    linear = FrozenLinear(IN, OUT, nn.Parameter(noise(OUT, seed=2), requires_grad=False) if bias else None)
    weight = noise(OUT, IN, seed=1) / IN**0.5
    linear.weight = WeightHandle(weight if quantization == "none" else quantize(weight, quantization))
    return linear


def settings_of(r: int, alpha: float, dropout: float = 0.0, **keys) -> Settings:
    return Settings(r, alpha, dropout, LoraKeys(**keys))


def adapter(settings: Settings, *, lora_bias: bool = False, dtype: torch.dtype = torch.float32) -> Adapter:
    tensors = {"lora_A": noise(settings.r, IN, seed=3) / IN**0.5, "lora_B": noise(OUT, settings.r, seed=4)}
    tensors |= {"lora_B_bias": noise(OUT, seed=5)} if lora_bias else {}
    return Adapter(METHODS["lora"], {name: tensor.to(dtype) for name, tensor in tensors.items()}, settings)


def start_of(linear: FrozenLinear, settings: Settings, seed: int, name: str) -> Adapter:
    return Adapter.start(METHODS["lora"], linear, settings, torch.float32, generator_for(seed, name))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def output_and_gradients(forward, x: Tensor, trained: list[Tensor], grad: Tensor) -> list[Tensor]:
    y = forward(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *trained], grad)]


@pytest.mark.parametrize(
    ("options", "scaling"),
    [
        ({"alpha": 12.0}, 2.0),
        ({"alpha": 3.0, "use_rslora": True}, 3.0 / math.sqrt(R)),
        ({"alpha": 12.0, "lora_bias": True, "bias": False}, 2.0),
        ({"alpha": 7.0, "quantization": "nf4"}, 7.0 / R),
    ],
)
def test_output_and_gradients_follow_the_formula(options, scaling):
    options = dict(options)
    linear = frozen_linear(quantization=options.pop("quantization", "none"), bias=options.pop("bias", True))
    lora_bias = options.pop("lora_bias", False)
    layer = adapter(settings_of(R, **options), lora_bias=lora_bias)
    x, grad = noise(2, 5, IN, seed=6).requires_grad_(), noise(2, 5, OUT, seed=7)
    trained = list(layer.parameters())
    found = output_and_gradients(lambda x: layer(x, linear), x, trained, grad)

    weight = linear.weight.dense(torch.float32).double()
    lora_A, lora_B, *b = [tensor.detach().double().requires_grad_() for tensor in trained]
    base_bias = 0 if linear.bias is None else linear.bias.double()

    def formula(x: Tensor) -> Tensor:
        update = x @ lora_A.T @ lora_B.T + (b[0] if b else 0)
        return x @ weight.T + base_bias + scaling * update

    exact = output_and_gradients(formula, x.detach().double().requires_grad_(), [lora_A, lora_B, *b], grad.double())
    assert len(found) == len(exact) == 4 + lora_bias
    for value, expected in zip(found, exact, strict=True):
        assert value.shape == expected.shape
        assert relative_error(value, expected) < FP32


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_layer_computes_as_pefts_does(use_rslora, lora_bias, dropout):
    settings = settings_of(R, 10.0, dropout, use_rslora=use_rslora)
    ours, linear = adapter(settings, lora_bias=lora_bias), frozen_linear()
    plain = nn.Linear(IN, OUT)
    with torch.no_grad():
        plain.weight.copy_(linear.weight.dense(torch.float32))
        plain.bias.copy_(linear.bias)
    config = peft.LoraConfig(
        r=R, lora_alpha=10, lora_dropout=dropout, use_rslora=use_rslora, lora_bias=lora_bias, target_modules=["0"]
    )
    model = peft.get_peft_model(nn.Sequential(plain), config)
    theirs = model.base_model.model[0]
    tensors = [theirs.lora_A.default.weight, theirs.lora_B.default.weight]
    tensors += [theirs.lora_B.default.bias] if lora_bias else []
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


def test_dropout_takes_from_the_branch_alone_and_only_while_training():
    linear, layer = frozen_linear(), adapter(settings_of(R, 12.0, dropout=0.5))
    x = noise(4, IN, seed=6)
    torch.manual_seed(0)
    found = layer.train()(x, linear)
    torch.manual_seed(0)
    kept = nn.functional.dropout(torch.ones_like(x), 0.5)
    assert 0.3 < float((kept == 0).double().mean()) < 0.7
    expected = linear(x) + 2.0 * (x * kept) @ layer.lora_A.T @ layer.lora_B.T
    assert relative_error(found.detach(), expected.detach()) < FP32
    whole = linear(x) + 2.0 * x @ layer.lora_A.T @ layer.lora_B.T
    assert relative_error(layer.eval()(x, linear).detach(), whole.detach()) < FP32


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_merged_weight_computes_as_the_layer_does(use_rslora):
    linear = frozen_linear(quantization="nf4")
    layer = adapter(settings_of(R, 9.0, 0.3, use_rslora=use_rslora), lora_bias=True)
    x, weight = noise(8, IN, seed=6), linear.weight.dense(torch.float32)
    merged = nn.functional.linear(x, weight + layer.delta(weight), linear.bias + layer.bias_delta())
    found = layer.eval()(x, linear)
    assert relative_error(found.detach(), merged.detach()) < FP32
    assert relative_error(found.detach(), linear(x)) > 0.1  # the update is not lost in the rounding


def test_the_start_is_the_base_and_its_spread_is_as_published():
    linear = FrozenLinear(4096, 8, None)
    linear.weight = WeightHandle(noise(8, 4096, seed=1))
    x = noise(2, 4096, seed=2)
    # The deviation of n draws is known to 1/√(2n): 0.3 % here.
    uniform = start_of(linear, settings_of(16, 32.0), 0, "a")
    assert uniform.lora_A.shape == (16, 4096)
    assert float(uniform.lora_A.detach().abs().max()) <= 1 / 64  # kaiming_uniform_ with a = √5: ±1/√in
    assert float(uniform.lora_A.detach().std()) == pytest.approx(1 / 64 / math.sqrt(3), rel=0.015)
    settings = settings_of(16, 32.0, init_lora_weights="gaussian")
    gaussian = start_of(linear, settings, 0, "a")
    assert float(gaussian.lora_A.detach().std()) == pytest.approx(1 / 16, rel=0.015)
    assert float(gaussian.lora_A.detach().abs().max()) > 3 / 16
    for layer in (uniform, gaussian):
        assert torch.equal(layer(x, linear), linear(x))


def test_a_start_depends_on_the_seed_and_the_name_alone():
    linear, settings = frozen_linear(), settings_of(R, 12.0)

    def start(seed: int, name: str) -> Tensor:
        return start_of(linear, settings, seed, name).lora_A.detach()

    first = start(3, "layers.0.q_proj")
    torch.manual_seed(99)
    start(3, "layers.1.q_proj")
    assert torch.equal(start(3, "layers.0.q_proj"), first)
    assert not torch.equal(start(3, "layers.1.q_proj"), first)
    assert not torch.equal(start(4, "layers.0.q_proj"), first)
    # Pinned, as checkpoints of one version must start alike in the next: SHA-256 of "3 layers.0.q_proj".
    assert generator_for(3, "layers.0.q_proj").initial_seed() == 43406480434783097


def test_weights_in_16_bits_take_part_in_products_of_the_inputs_dtype():
    linear = frozen_linear()
    layer = adapter(settings_of(R, 12.0), dtype=torch.bfloat16)
    x = noise(4, IN, seed=6).requires_grad_()
    y = layer(x, linear)
    assert y.dtype == torch.float32
    expected = linear(x) + 2.0 * x @ layer.lora_A.float().T @ layer.lora_B.float().T
    assert relative_error(y.detach(), expected.detach()) < FP32
    y.sum().backward()
    assert layer.lora_A.grad.dtype == torch.bfloat16
    assert x.grad.dtype == torch.float32
