"""Handles: what they give is what bitsandbytes and plain torch give, and all they hold is found as parameters."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import nn

from qlora_tool.weights.handles import WeightHandle, model_tensors
from qlora_tool.weights.quantized import quantize

KINDS = [("nf4", True), ("nf4", False), ("fp4", True), ("int8", False)]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def through_bitsandbytes(matrix: torch.Tensor, kind: str, double_quant: bool) -> torch.Tensor:
    if kind == "int8":
        codes, scales, _ = bnb.int8_vectorwise_quant(matrix.half())
        return bnb.int8_vectorwise_dequant(codes, scales)
    codes, state = bnb.quantize_4bit(matrix, quant_type=kind, compress_statistics=double_quant)
    return bnb.dequantize_4bit(codes, state)


@pytest.mark.parametrize(("kind", "double_quant"), KINDS)
def test_dense_is_what_bitsandbytes_makes_of_the_weight(kind, double_quant):
    weight = noise(48, 128)
    handle = WeightHandle(quantize(weight, kind, double_quant))
    expected = through_bitsandbytes(weight, kind, double_quant)
    assert (handle.kind, handle.shape, handle.dtype) == (kind, (48, 128), torch.float32)
    assert torch.equal(handle.dense(torch.float32), expected)
    assert torch.equal(handle.dense(torch.bfloat16), expected.to(torch.bfloat16))


@pytest.mark.parametrize(("kind", "double_quant"), KINDS)
def test_one_expert_is_quantized_as_if_it_were_alone(kind, double_quant):
    weights = noise(3, 32, 64)
    handle = WeightHandle(quantize(weights, kind, double_quant))
    for expert in range(3):
        expected = through_bitsandbytes(weights[expert], kind, double_quant)
        assert torch.equal(handle.dense(torch.float32, expert), expected)
        assert torch.equal(handle.dense(torch.float32)[expert], expected)


def test_an_unquantized_weight_is_given_as_it_is():
    weight = noise(5, 7)
    handle = WeightHandle(weight)
    assert (handle.kind, handle.shape, handle.dtype, handle.is_trained) == ("none", (5, 7), torch.float32, False)
    assert torch.equal(handle.stored(), weight)
    assert torch.equal(handle.dense(torch.bfloat16), weight.to(torch.bfloat16))
    assert torch.equal(handle.rows(torch.tensor([[4, 0]])), weight[torch.tensor([[4, 0]])])
    whole = (8 * weight).round()  # sums of these are exact in whatever order a kernel takes them
    assert torch.equal(WeightHandle(whole) @ whole.T, torch.mm(whole, whole.T))


def test_what_family_code_casts_to_is_the_dtype_of_the_products():
    """deepseek_v32's indexer casts what goes in to `weight.dtype`: to a stored bf16 it would round fp32."""
    weight = noise(64, 64).bfloat16()
    for value in (weight, quantize(weight, "nf4", True)):
        handle = WeightHandle(value, torch.float32)
        assert (handle.dtype, WeightHandle(value).dtype) == (torch.float32, torch.bfloat16)
        assert handle.stored().dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["nf4", "int8", "none"])
def test_family_code_may_take_a_weight_for_a_tensor(kind):
    weight, x = noise(48, 64), noise(2, 3, 64, seed=1)
    handle = WeightHandle(weight if kind == "none" else quantize(weight, kind, kind == "nf4"), torch.float32)
    dense, codes = handle.dense(torch.float32), {name: tensor.clone() for name, tensor in handle.tensors().items()}
    linear = nn.functional.linear
    assert torch.equal(linear(x, handle), linear(x, dense))
    assert torch.equal(linear(x, weight=handle), linear(x, dense))
    assert torch.equal(torch.matmul(handle, x.mT), dense @ x.mT)
    for given in (handle.float(), handle.type(torch.float32)):  # longcat_flash's router
        assert torch.equal(given, dense)
    assert torch.equal(handle.type(torch.bfloat16), handle.dense(torch.bfloat16))
    assert all(torch.equal(tensor, codes[name]) for name, tensor in handle.tensors().items())  # a module's casts itself


def test_a_parameter_stays_the_same_object_and_takes_its_gradient():
    parameter = nn.Parameter(noise(5, 7))
    handle = WeightHandle(parameter)
    assert handle.is_trained and handle.stored() is parameter
    handle.dense(torch.float64).sum().backward()
    assert torch.equal(parameter.grad, torch.ones(5, 7))


def test_rows_of_int8_in_the_weights_dtype():
    handle = WeightHandle(quantize(noise(10, 64).to(torch.bfloat16), "int8"))
    index = torch.tensor([[3, 3], [0, 9]])
    assert torch.equal(handle.rows(index), handle.dense(torch.bfloat16)[index])
    with pytest.raises(ValueError, match="only an int8 matrix"):
        WeightHandle(quantize(noise(10, 64), "nf4")).rows(index)


@pytest.mark.parametrize(("kind", "double_quant"), KINDS)
@pytest.mark.parametrize("shape", [(48, 128), (3, 32, 64)])
def test_what_is_stored_comes_back_bit_for_bit_and_in_its_shape(kind, double_quant, shape):
    value = quantize(noise(*shape), kind, double_quant)
    found = WeightHandle(value).stored()
    assert found.tensors().keys() == value.tensors().keys()
    for name, tensor in value.tensors().items():
        assert torch.equal(found.tensors()[name], tensor) and found.tensors()[name].shape == tensor.shape
    assert (found.kind, found.shape, found.dtype, found.block_size, found.double_quant) == (
        value.kind, value.shape, value.dtype, value.block_size, value.double_quant,
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "double_quant"), KINDS)
def test_all_of_it_is_frozen_parameters_that_can_be_sharded(kind, double_quant):
    value = quantize(noise(48, 128), kind, double_quant)
    handle = WeightHandle(value)
    assert list(handle.buffers()) == []
    found = dict(handle.named_parameters())
    assert found.keys() == value.tensors().keys() == handle.tensors().keys()
    assert not any(parameter.requires_grad for parameter in found.values())
    assert all(parameter.dim() >= 1 for parameter in found.values())
    assert sum(parameter.nbytes for parameter in found.values()) == sum(t.nbytes for t in value.tensors().values())


def test_a_held_weight_is_given_again_until_it_is_released():
    handle = WeightHandle(quantize(noise(48, 128), "nf4"))
    expected = handle.dense(torch.float32)
    handle.hold(torch.float32)
    assert handle.dense(torch.float32) is handle.dense(torch.float32)
    assert torch.equal(handle.dense(torch.float32), expected)
    assert handle.dense(torch.bfloat16).dtype == torch.bfloat16
    handle.release()
    assert handle.dense(torch.float32) is not handle.dense(torch.float32)


def test_a_models_tensors_are_told_apart_and_tied_ones_come_once():
    model = nn.Module()
    model.embed = nn.Embedding(4, 64)
    model.norm = nn.BatchNorm1d(2)
    model.head, model.head.weight = nn.Module(), WeightHandle(model.embed.weight)
    model.linear, model.linear.weight = nn.Module(), WeightHandle(quantize(noise(2, 64), "nf4"))
    found = [(name, role, tensor.nbytes) for name, tensor, role in model_tensors(model)]
    assert sorted(found) == sorted([
        ("embed.weight", "unquantized", 4 * 64 * 4),  # the head's is the same
        ("norm.weight", "unquantized", 8), ("norm.bias", "unquantized", 8),
        ("norm.running_mean", "unquantized", 8), ("norm.running_var", "unquantized", 8),
        ("norm.num_batches_tracked", "unquantized", 8),
        ("linear.weight", "codes", 64),
        ("linear.weight", "quantization_state", 2),  # a scale for 64 weights
        ("linear.weight", "quantization_state", 4),  # of the scales
        ("linear.weight", "quantization_state", 4),  # their mean
    ])  # fmt: skip
