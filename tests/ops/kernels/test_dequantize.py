"""Dequantization in one pass: in Triton's interpreter against the references and bitsandbytes, and compiled."""

from __future__ import annotations

import pytest
import torch

from qlora_tool.ops import quantization
from qlora_tool.ops.quantization import INT8_STEP, NESTED_BLOCK_SIZE, code_values

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random(*shape: int) -> torch.Tensor:
    """Weights of very different sizes from block to block, some of them zero."""
    draw = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(*shape, generator=draw) * torch.exp(2 * torch.randn(shape[0], 1, generator=draw))
    weight[::7] = 0
    return weight


def quantized(shape: tuple[int, int], kind: str, block_size: int, double: bool) -> tuple:
    codes, scales = quantization.quantize_4bit(random(*shape).view(-1), kind, block_size)
    nested = quantization.quantize_scales(scales) if double else (scales, None, None)
    return codes, *nested


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(
    ("shape", "kind", "block_size"),
    [
        ((64, 64), "nf4", 64),  # one program's
        ((130, 96), "fp4", 64),  # the last of several programs is not full; rows are not whole blocks
        ((40, 448), "nf4", 32),  # more than 256 blocks: several scales of scales
        ((65, 512), "fp4", 128),
        ((3, 100), "nf4", 64),  # the last block is not full
        ((37, 45), "nf4", 64),  # an odd number of weights
        ((1, 1), "fp4", 64),
    ],
)
def test_4_bits_are_the_references_to_the_bit(interpreted, shape, kind, block_size, double, dtype):
    module = interpreted("dequantize")
    codes, scales, nested_scales, offset = quantized(shape, kind, block_size, double)
    expected = quantization.dequantize_4bit.reference(
        codes, scales, nested_scales, offset, kind, block_size, 0, shape, dtype
    )
    found = torch.full(shape, torch.nan, dtype=dtype)
    module.dequantize_4bit(
        codes, code_values(kind, CPU), scales, code_values("nested", CPU), nested_scales, offset, block_size,
        NESTED_BLOCK_SIZE, 0, found,
    )  # fmt: skip
    assert torch.equal(found, expected)


@pytest.mark.parametrize("first", [64, 576])
def test_4_bits_from_a_block_in_the_middle(interpreted, first):
    """Rows of a matrix: codes from the first of them on, with the scales of all. 576 rows of 64 are 576 blocks."""
    module, shape = interpreted("dequantize"), (640, 64)
    codes, scales, nested_scales, offset = quantized(shape, "nf4", 64, True)
    whole = quantization.dequantize_4bit.reference(
        codes, scales, nested_scales, offset, "nf4", 64, 0, shape, torch.bfloat16
    )
    found = torch.full((640 - first, 64), torch.nan, dtype=torch.bfloat16)
    module.dequantize_4bit(
        codes[first * 32 :], code_values("nf4", CPU), scales, code_values("nested", CPU), nested_scales, offset.view(1),
        64, NESTED_BLOCK_SIZE, first, found,
    )  # fmt: skip
    assert torch.equal(found, whole[first:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("begin", [1, 2, 4])
def test_codes_that_begin_anywhere(interpreted, begin, dtype):
    """They are read by words only where they lie at addresses of words."""
    module = interpreted("dequantize")
    codes, scales, nested_scales, offset = quantized((40, 64), "nf4", 64, True)
    buffer = torch.zeros(len(codes) + begin, dtype=torch.uint8)
    buffer[begin:] = codes
    found = torch.full((40, 64), torch.nan, dtype=dtype)
    module.dequantize_4bit(
        buffer[begin:], code_values("nf4", CPU), scales, code_values("nested", CPU), nested_scales, offset, 64,
        NESTED_BLOCK_SIZE, 0, found,
    )  # fmt: skip
    expected = quantization.dequantize_4bit.reference(
        codes, scales, nested_scales, offset, "nf4", 64, 0, (40, 64), dtype
    )
    assert torch.equal(found, expected)


def test_what_lies_behind_the_result_is_left_alone(interpreted):
    module = interpreted("dequantize")
    codes, scales, nested_scales, offset = quantized((5, 7), "nf4", 64, True)
    buffer = torch.full((64,), 7.0)
    module.dequantize_4bit(
        codes, code_values("nf4", CPU), scales, code_values("nested", CPU), nested_scales, offset, 64,
        NESTED_BLOCK_SIZE, 0, buffer[:35],
    )  # fmt: skip
    assert (buffer[35:] == 7).all() and not (buffer[:35] == 7).all()


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(130, 64), (3, 100), (5, 7), (40, 448)])
def test_several_matrices_at_once(interpreted, shape, double):
    """Experts, each with an offset of its own; the codes of (5, 7) are no whole words."""
    module = interpreted("dequantize")
    each = [quantized((shape[0], shape[1]), "nf4", 64, double), quantized(shape, "fp4", 64, double)]
    codes, scales, nested_scales, offset = (
        None if parts[0] is None else torch.stack(parts) for parts in zip(*each, strict=True)
    )
    if double:
        offset[1] += 1
    arguments = (codes, scales, nested_scales, offset, "nf4", 64, 0, (2, *shape), torch.bfloat16)
    expected = torch.stack([
        quantization.dequantize_4bit.reference(
            *(None if parts is None else parts[index] for parts in arguments[:4]), "nf4", 64, 0, shape, torch.bfloat16
        )
        for index in range(2)
    ])  # fmt: skip
    found = torch.full((2, *shape), torch.nan, dtype=torch.bfloat16)
    module.dequantize_4bit(
        codes, code_values("nf4", CPU), scales, code_values("nested", CPU), nested_scales, offset, 64,
        NESTED_BLOCK_SIZE, 0, found,
    )  # fmt: skip
    assert torch.equal(found, expected)
    assert torch.equal(quantization.dequantize_4bit.reference(*arguments), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 64), (37, 45), (3, 5000), (1, 1), (2, 9, 32), (0, 8), (100, 4)])
def test_int8_is_the_reference_to_the_bit(interpreted, shape, dtype):
    module = interpreted("dequantize")
    draw = torch.Generator().manual_seed(sum(shape))
    codes = torch.randint(-127, 128, shape, generator=draw, dtype=torch.int8)
    scales = torch.exp(2 * torch.randn(shape[:-1], generator=draw))
    found = torch.full(shape, torch.nan, dtype=dtype)
    module.dequantize_int8(codes, scales, INT8_STEP, found)
    assert torch.equal(found, quantization.dequantize_int8.reference(codes, scales, dtype))
    assert torch.equal(found, (codes.float() * scales.unsqueeze(-1) * INT8_STEP).to(dtype))


# ----------------------------------------------------------------------------------------------------------- compiled

POINTERS = {torch.float32: "*fp32@16", torch.bfloat16: "*bf16@16", torch.float16: "*fp16@16"}


def check(ptx: str) -> None:
    """Nothing is fused that is rounded in between, no thread waits for another, and 16 bytes are written at once."""
    assert "fma" not in ptx and "bar.sync" not in ptx
    stores = [line for line in ptx.splitlines() if "st.global" in line]
    assert stores and all(".v4.b32" in line for line in stores)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("double", "integer", "codes"), [(True, "i32", "words"), (False, "i32", "words"), (True, "i64", "bytes")]
)
def test_4_bits_compile(assembly, double, integer, codes, dtype):
    """With 64-bit counts where a matrix has more than 2³¹ weights; codes by bytes where they are no whole words."""
    from qlora_tool.ops.kernels import dequantize

    each = 16 // dtype.itemsize
    types = dict.fromkeys(("values", "nested_values", "nested_scales"), "*fp32@16")
    types |= {"codes": "*u8@16" if codes == "bytes" else f"*i{4 * each}@16", "nested_offset": "*fp32",
              "scales": "*u8@16" if double else "*fp32@16", "result": POINTERS[dtype],
              "size": f"{integer}@16", "count": f"{integer}@16", "blocks": integer, "nested_blocks": integer,
              "first_block": integer}  # fmt: skip
    constants = {"BLOCK_SIZE": 64, "NESTED_BLOCK_SIZE": 256, "GROUPS": 4096 // each, "EACH": each}
    for name in () if double else ("nested_scales", "nested_offset"):
        del types[name]
        constants[name] = None
    check(assembly(dequantize._dequantize_4bit, types, constants, enable_fp_fusion=False))


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_compiles(assembly, dtype):
    from qlora_tool.ops.kernels import dequantize

    types = {"codes": "*i8@16", "scales": "*fp32@16", "result": POINTERS[dtype], "rows": "i32@16", "width": "i32@16"}
    constants = {"STEP": INT8_STEP, "ROWS": 1, "COLUMNS": 4096, "EACH": 16 // dtype.itemsize}
    check(assembly(dequantize._dequantize_int8, types, constants, enable_fp_fusion=False))
