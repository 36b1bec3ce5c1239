"""Weights in FP8 and MXFP4 against transformers' own dequantization, to the bit."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from qlora_tool.weights import scaled
from qlora_tool.weights.scaled import dequantize_mxfp4, dequantize_scaled


def random_fp8(*shape: int, kind: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 60).to(kind)


def random_scales(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 1e-2 + 1e-4


def theirs(weight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return Fp8Dequantize(None)._dequantize_one(weight, scales, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize(("shape", "grid"), [((64, 96), (2, 3)), ((96, 64), (96, 1)), ((64, 64), (1, 1)),
                                             ((3, 64, 32), (3, 2, 1))])  # fmt: skip
def test_fp8_times_scales_is_transformers(shape, grid, kind, dtype):
    weight, scales = random_fp8(*shape, kind=kind), random_scales(*grid)
    assert torch.equal(dequantize_scaled(weight, scales, dtype), theirs(weight, scales, dtype))


@pytest.mark.parametrize("scales", [torch.tensor(0.017), torch.tensor([0.017]), random_scales(48).bfloat16()])
def test_one_scale_for_all_or_one_a_row(scales):
    weight = random_fp8(48, 32)
    expected = (weight.float() * (scales.float() if scales.numel() == 1 else scales.float()[:, None])).bfloat16()
    assert torch.equal(dequantize_scaled(weight, scales, torch.bfloat16), expected)


def test_short_last_blocks_of_the_size_that_the_configuration_names():
    """DeepSeek-V3's kv_a_proj_with_mqa has 576 rows in blocks of 128; transformers takes whole blocks alone."""
    weight, scales = random_fp8(80, 72), random_scales(3, 3)
    expected = weight.float() * scales.repeat_interleave(32, 0)[:80].repeat_interleave(32, 1)[:, :72]
    assert torch.equal(dequantize_scaled(weight, scales, torch.float32, (32, 32)), expected)
    even = random_fp8(96, 72)  # three blocks of 32 would fit as well as the configured 40, 40 and 16
    expected = even.float() * scales.repeat_interleave(40, 0)[:96].repeat_interleave(32, 1)[:, :72]
    assert torch.equal(dequantize_scaled(even, scales, torch.float32, (40, 32)), expected)
    with pytest.raises(ValueError, match="names no weight_block_size"):
        dequantize_scaled(weight, scales, torch.float32)


@pytest.mark.parametrize("kind", [torch.uint8, torch.float8_e8m0fnu])
def test_scales_that_are_exponents(kind):
    weight, scales = random_fp8(64, 64), torch.randint(110, 130, (4, 2), dtype=torch.uint8).view(kind)
    assert torch.equal(dequantize_scaled(weight, scales, torch.bfloat16), theirs(weight, scales, torch.bfloat16))


def test_packed_fp4_with_scales_beside_it():
    weight = torch.randint(-128, 128, (32, 32), dtype=torch.int8, generator=torch.Generator().manual_seed(2))
    scales = torch.randint(118, 126, (32, 2), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    found = dequantize_scaled(weight, scales, torch.bfloat16, (128, 128), packed=True)
    assert found.shape == (32, 64)
    assert torch.equal(found, theirs(weight, scales, torch.bfloat16))


def test_scales_that_do_not_fit_are_refused():
    for shape in ((5,), (2, 2, 2), (7, 3)):
        with pytest.raises(ValueError, match=r"scales (of shape|do not divide)"):
            dequantize_scaled(random_fp8(64, 64), random_scales(*shape), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_mxfp4_is_transformers(dtype, monkeypatch):
    """Exponents at both ends too, and a limit that cuts an expert's rows in pieces."""
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randint(0, 256, (3, 20, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 255, (3, 20, 2), dtype=torch.uint8, generator=generator)
    monkeypatch.setattr(scaled, "_AT_ONCE", 7 * 64)
    found, expected = dequantize_mxfp4(blocks, scales, dtype), convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    assert found.shape == (3, 64, 20)
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="MXFP4 blocks"):
        dequantize_mxfp4(blocks, scales[:, :-1], dtype)
