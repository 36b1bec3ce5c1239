"""The quick 4-bit quantization against bitsandbytes' own, bit for bit."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch

from qlora_tool.ops import quantize_by_table
from qlora_tool.ops.quantize_by_table import quantize_blocks


def assert_same(weights: torch.Tensor, kind: str, block_size: int = 64) -> None:
    codes = torch.empty(len(weights) // 2, 1, dtype=torch.uint8)
    scales = torch.empty(len(weights) // block_size)
    assert quantize_blocks(weights, kind, block_size, codes.view(-1), scales)
    expected_codes, expected_scales = torch.ops.bitsandbytes.quantize_4bit.default(
        weights, block_size, kind, torch.uint8
    )
    assert codes.shape == expected_codes.shape and torch.equal(codes, expected_codes)
    assert scales.dtype == expected_scales.dtype and torch.equal(scales, expected_scales)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_random_weights(kind: str, dtype: torch.dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(quantize_by_table, "CHUNK", 100_000)  # several chunks, the last one short
    for scale in (1e-6, 0.02, 100.0):
        assert_same((torch.randn(64 * 6000, generator=generator) * scale).to(dtype), kind)
    assert_same((torch.randn(64 * 100, generator=generator)).to(dtype), kind, block_size=128)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_every_16_bit_value_and_the_midpoints(kind: str):
    """Each 16-bit value up to 1 in a block whose largest weight is 1, and the midpoints with their neighbours."""
    for dtype in (torch.float16, torch.bfloat16):
        values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        values = values[(values.float().abs() <= 1)]
        assert len(values) > 30_000
        assert_same(with_ones(values.float()), kind)
        assert_same(with_ones(values.float()).to(dtype), kind)
    table = bnb.get_4bit_type(kind, device="cpu").sort().values
    middle = (table[:-1] + table[1:]) / 2
    borders = torch.linspace(-1, 1, quantize_by_table._CELLS + 1)  # of the cells
    values = torch.cat([middle, table, borders])
    around = [values, values.nextafter(torch.tensor(2.0)), values.nextafter(torch.tensor(-2.0))]
    assert_same(with_ones(torch.cat(around).clamp(-1, 1)), kind)


def with_ones(values: torch.Tensor) -> torch.Tensor:
    """Blocks of 64 of which the first weight is 1, so that the others are scaled by nothing."""
    rows = -(-len(values) // 63)
    padded = torch.zeros(rows * 63)
    padded[: len(values)] = values
    return torch.cat([torch.ones(rows, 1), padded.view(rows, 63)], 1).view(-1)


def test_zeros_tiny_numbers_and_no_numbers():
    for weights in (torch.zeros(128), torch.full((128,), 1e-42), torch.full((64,), -1e-38), torch.full((64,), 3e38)):
        assert_same(weights, "nf4")
    for odd in (torch.inf, -torch.inf, torch.nan):
        codes, scales = torch.empty(32, dtype=torch.uint8), torch.empty(1)
        assert not quantize_blocks(torch.tensor([odd] + [0.0] * 63), "nf4", 64, codes, scales)
