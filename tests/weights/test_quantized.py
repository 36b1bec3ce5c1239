"""The quantized-weight type against bitsandbytes, bit for bit, and against the definition of its formats."""

from __future__ import annotations

import itertools
import math

import bitsandbytes
import bitsandbytes.functional as bnb
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from qlora_tool.ops import quantization
from qlora_tool.weights.quantized import (
    QuantizedTensor,
    disk_group,
    disk_specs,
    from_disk,
    of_known_size,
    quantize,
    quantized_bytes,
    to_disk,
)

# The 16 values of NF4 (QLoRA, arXiv 2305.14314, appendix E).
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
# The values of FP4 by code: sign, two bits of exponent, one of mantissa, the largest being 1 (12 before it is scaled).
FP4 = [value / 12 for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)]
FP4 = FP4 + [-value for value in FP4]

FOUR_BIT = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]
ALL = [*FOUR_BIT, ("int8", False)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Whole blocks; 256 blocks; more; blocks that straddle rows, the last one short or not; odd widths; an odd count.
SHAPES = [(64, 64), (256, 64), (300, 64), (3, 100), (128, 48), (6, 32), (36, 45), (5, 7)]


def weight(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Random rows of very different sizes, so that no two blocks share their scale."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * torch.rand(shape[-2], 1, generator=generator)).to(dtype)


def assert_same(found: QuantizedTensor, expected: QuantizedTensor) -> None:
    assert (found.kind, found.shape, found.dtype, found.block_size) == (
        expected.kind, expected.shape, expected.dtype, expected.block_size,
    )  # fmt: skip
    assert found.tensors().keys() == expected.tensors().keys()
    for name, tensor in expected.tensors().items():
        assert found.tensors()[name].dtype == tensor.dtype
        assert torch.equal(found.tensors()[name], tensor), name


# ---------------------------------------------------------------------------------- against bitsandbytes, bit for bit


def assert_quantized_like_bitsandbytes(kind: str, double: bool, value: torch.Tensor) -> None:
    found = quantize(value, kind, double)
    codes, state = bnb.quantize_4bit(value, quant_type=kind, compress_statistics=double, blocksize=64)
    if double and state.absmax.numel() > quantization.SERIAL:  # their mean depends on the number of threads, ours not
        scales = bnb.quantize_4bit(value, quant_type=kind, blocksize=64)[1].absmax
        offset = torch.tensor(math.fsum(scales.tolist()) / scales.numel())
        assert torch.isclose(offset, state.offset, rtol=1e-5, atol=0)
        state.offset = offset
        state.absmax, state.state2 = bnb.quantize_blockwise(scales - offset, blocksize=256)
    assert torch.equal(found.codes, codes.view(-1))
    assert torch.equal(found.scales, state.absmax)
    assert (found.double_quant, found.dtype, found.shape) == (double, value.dtype, tuple(value.shape))
    if double:
        assert torch.equal(found.nested_scales, state.state2.absmax)
        assert torch.equal(found.nested_offset, state.offset)
        assert found.scales.dtype == torch.uint8
    # Rows that are no whole number of blocks: bitsandbytes 0.50 gives wrong values for some on AVX-512, and compiles an
    # operator for others; below they are held against the definition.
    if value.shape[1] % 64 == 0:
        assert torch.equal(found.dequantize(value.dtype), bnb.dequantize_4bit(codes, state))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "double"), FOUR_BIT)
def test_four_bits_are_bitsandbytes_own_bits(kind, double, dtype):
    for shape in SHAPES:
        assert_quantized_like_bitsandbytes(kind, double, weight(*shape, dtype=dtype))


@pytest.mark.parametrize(("rows", "columns"), [(2, quantization.PIECE + 36), (4097, 512)])
def test_a_weight_quantized_in_several_chunks_is_the_same(rows, columns):
    assert rows * columns > 2 * quantization.PIECE
    assert_quantized_like_bitsandbytes("nf4", True, weight(rows, columns, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_bitsandbytes_own(dtype, monkeypatch):
    monkeypatch.setattr(quantization, "PIECE", 1000)  # several pieces, the last one short
    value = weight(70, 96, dtype=dtype)
    found = quantize(value, "int8")
    expected = bitsandbytes.nn.Int8Params(value.clone(), requires_grad=False).to("cpu")
    assert expected.dtype == torch.int8
    assert torch.equal(found.codes, expected.data)
    assert torch.equal(found.scales, expected.SCB)
    codes, scales, _ = bnb.int8_vectorwise_quant(value.half())
    assert torch.equal(found.codes, codes)
    assert torch.equal(found.scales, scales)
    assert torch.equal(found.dequantize(), bnb.int8_vectorwise_dequant(codes, scales))


def test_a_weight_that_is_a_view_is_quantized_as_it_reads():
    value = weight(64, 128).t()
    assert_same(quantize(value, "nf4"), quantize(value.contiguous(), "nf4"))
    assert_same(quantize(value, "int8"), quantize(value.contiguous(), "int8"))


# ------------------------------------------------------------------------------------ against the formats' definition


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "table"), [("nf4", NF4), ("fp4", FP4)])
def test_dequantizing_is_table_value_times_block_scale(kind, table, shape):
    found = quantize(weight(*shape), kind, double_quant=False)
    count = shape[0] * shape[1]
    nibbles = torch.stack([found.codes >> 4, found.codes & 15], dim=-1).view(-1)[:count].long()
    expected = torch.tensor(table)[nibbles] * found.scales.repeat_interleave(64)[:count]
    # FP4's table is bitsandbytes' fractions of 12, rounded to fp32: one unit in the last place.
    torch.testing.assert_close(found.dequantize().view(-1), expected, rtol=2**-23, atol=0)


@pytest.mark.parametrize(("kind", "table"), [("nf4", NF4), ("fp4", FP4)])
def test_the_error_is_at_most_half_the_widest_step_of_the_table(kind, table):
    value = weight(300, 64)
    table = sorted(table)
    step = max(right - left for left, right in itertools.pairwise(table))
    error = (quantize(value, kind, double_quant=False).dequantize() - value).abs()
    largest = value.abs().amax(-1, keepdim=True)  # of a row, which is a block
    assert (error <= step / 2 * largest * (1 + 1e-6)).all()


def test_the_scales_own_quantization_moves_them_by_at_most_its_step():
    value = weight(1024, 64)
    plain, double = quantize(value, "nf4", double_quant=False), quantize(value, "nf4")
    # 8-bit dynamic codes lie at most 0.0157 of the largest apart at the top, so half of it off. The largest weight of a
    # block is its scale, times 1 or -1.
    moved = double.dequantize().view(-1, 64).abs().amax(-1) - plain.dequantize().view(-1, 64).abs().amax(-1)
    moved = moved.view(-1, 256).abs().amax(-1)
    largest = (plain.scales - plain.scales.mean()).view(-1, 256).abs().amax(-1)
    assert (moved <= 0.0079 * largest).all()
    assert double.scales.nbytes + double.nested_scales.nbytes < plain.scales.nbytes / 3.8


@pytest.mark.parametrize("columns", [64, 48, 45])
@pytest.mark.parametrize(("kind", "double"), ALL)
def test_dequantizing_rounds_once(kind, double, columns):
    """Half precision is fp32's result, rounded."""
    found = quantize(weight(48, columns), kind, double)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(found.dequantize(dtype), found.dequantize().to(dtype))


def test_an_odd_width_does_not_start_a_compiler(monkeypatch):
    from bitsandbytes.backends.default import ops

    def compiled(*arguments):
        raise AssertionError("took the operator that bitsandbytes compiles on first use")

    monkeypatch.setattr(ops, "_dequantize_4bit_compute", compiled)
    for shape in ((36, 45), (5, 7), (1, 1)):
        assert quantize(weight(*shape), "nf4").dequantize().shape == shape


# -------------------------------------------------------------------------------------------------- parts of a weight


@pytest.mark.parametrize(("kind", "double"), ALL)
@pytest.mark.parametrize("columns", [64, 100, 48, 45])
def test_rows_are_those_of_the_whole(kind, double, columns):
    found = quantize(weight(130, columns), kind, double)
    whole = found.dequantize()
    for rows in (slice(0, 64), slice(64, 128), slice(64, None), slice(128, 130), slice(None), slice(-66, 300),
                 slice(64, 64), slice(128, 0)):  # fmt: skip
        assert torch.equal(found.dequantize(rows=rows), whole[rows]), rows


def test_rows_that_cut_a_block_are_refused():
    found = quantize(weight(40, 100), "nf4")
    with pytest.raises(ValueError, match="rows 1:16"):
        found.dequantize(rows=slice(1, 16))
    with pytest.raises(ValueError, match="rows 0:17"):
        found.dequantize(rows=slice(0, 17))
    for refused in (found, quantize(weight(40, 64), "int8")):
        with pytest.raises(ValueError, match="steps of 2"):
            refused.dequantize(rows=slice(0, 32, 2))
    assert found.dequantize(rows=slice(16, 40)).shape == (24, 100)  # 16 · 100 is 25 blocks


@pytest.mark.parametrize(("kind", "double"), ALL)
@pytest.mark.parametrize("columns", [64, 45])
def test_experts_are_quantized_one_by_one(kind, double, columns):
    value = weight(3, 20, columns, dtype=torch.bfloat16)
    found = quantize(value, kind, double)
    assert found.shape == (3, 20, columns)
    whole = found.dequantize()
    for index in range(3):
        alone = quantize(value[index], kind, double)
        assert_same(found.expert(index), alone)
        assert torch.equal(whole[index], alone.dequantize())


def test_an_expert_is_a_view():
    found = quantize(weight(3, 20, 64), "nf4")
    for name, tensor in found.expert(1).tensors().items():
        whole = found.tensors()[name]
        assert tensor.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr(), name


def test_the_rows_of_many_experts_are_asked_of_one():
    with pytest.raises(ValueError, match="choose an expert"):
        quantize(weight(3, 20, 64), "nf4").dequantize(rows=slice(0, 2))


# ----------------------------------------------------------------------------------------------- tensors without data


@pytest.mark.parametrize(("kind", "double"), ALL)
@pytest.mark.parametrize("shape", [(300, 64), (36, 45), (3, 20, 64)])
def test_on_meta_shapes_and_dtypes_are_those_of_real_tensors(kind, double, shape):
    real = quantize(weight(*shape, dtype=torch.bfloat16), kind, double)
    meta = quantize(torch.empty(shape, dtype=torch.bfloat16, device="meta"), kind, double)
    assert (meta.shape, meta.dtype, meta.device.type) == (real.shape, real.dtype, "meta")
    assert {name: (t.shape, t.dtype) for name, t in meta.tensors().items()} == {
        name: (t.shape, t.dtype) for name, t in real.tensors().items()
    }
    dense = meta.dequantize(torch.float16)
    assert (dense.shape, dense.dtype, dense.device.type) == (torch.Size(shape), torch.float16, "meta")


@pytest.mark.parametrize(("kind", "double"), ALL)
def test_under_fake_tensors_no_data_is_asked_for(kind, double):
    kept = quantize(weight(130, 64), kind, double)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = quantize(torch.empty(130, 64), kind, double)
        assert {name: (t.shape, t.dtype) for name, t in fake.tensors().items()} == {
            name: (t.shape, t.dtype) for name, t in kept.tensors().items()
        }
        for found in (fake, kept.map(mode.from_tensor)):
            dense = found.dequantize(torch.bfloat16, rows=slice(64, None))
            assert isinstance(dense, FakeTensor)
            assert (dense.shape, dense.dtype) == (torch.Size([66, 64]), torch.bfloat16)
    # No fake tensor stays behind for real ones to stumble over.
    assert torch.equal(quantize(weight(130, 64), kind, double).dequantize(), kept.dequantize())


def test_map_moves_every_tensor():
    found = quantize(weight(64, 64), "nf4")
    assert {tensor.device.type for tensor in found.map(lambda t: t.to("meta")).tensors().values()} == {"meta"}
    assert found.map(lambda t: t.to("meta")).device.type == "meta"


# ----------------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_quantized_is_named():
    with pytest.raises(ValueError, match=r"'nf3': expected one of nf4, fp4, int8"):
        quantize(weight(64, 64), "nf3")
    with pytest.raises(ValueError, match=r"shape \(64,\)"):
        quantize(torch.ones(64), "nf4")
    with pytest.raises(ValueError, match=r"a weight in torch\.float64"):
        quantize(weight(64, 64).double(), "nf4")


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 70000.0])
def test_int8_refuses_what_fp16_does_not_hold(value):
    broken = weight(64, 64)
    broken[3, 5] = value
    with pytest.raises(ValueError, match="65504"):
        quantize(broken, "int8")


# ------------------------------------------------------------------------------------------------------- form on disk


@pytest.mark.parametrize("shape", [(300, 64), (36, 45), (3, 20, 64)])
@pytest.mark.parametrize(("kind", "double"), ALL)
def test_the_form_on_disk_is_read_back_bit_for_bit(kind, double, shape):
    written = quantize(weight(*shape, dtype=torch.bfloat16), kind, double)
    tensors = to_disk("a.weight", written)
    scales = ["a.SCB"] if kind == "int8" else ["a.weight.absmax", "a.weight.quant_map"]  # bitsandbytes' names
    nested = ["a.weight.nested_absmax", "a.weight.nested_quant_map"] if double else []
    state = [] if kind == "int8" else [f"a.weight.quant_state.bitsandbytes__{kind}"]
    assert sorted(tensors) == sorted(["a.weight", *scales, *nested, *state])
    beside = {"a.bias": None, "a.weight2": None, "aa.weight": None, "b.weight": None}
    assert sorted(disk_group("a.weight", beside | tensors)) == sorted(tensors)
    assert disk_group("a.bias", beside | tensors) == []
    assert_same(from_disk("a.weight", tensors), written)


@pytest.mark.parametrize("shape", [(36, 48), (1, 6, 32), (8, 6, 32), (128, 6, 32), (512, 2, 32), (4, 100_000, 2)])
@pytest.mark.parametrize(("kind", "double"), ALL)
def test_the_form_on_disk_is_as_large_as_was_known_before(kind, double, shape):
    """However many experts there are, each with the longest offset in it."""
    written = quantize(weight(*shape, dtype=torch.bfloat16), kind, double)
    if double:
        written.nested_offset.fill_(-1.2345678e-38)
    tensors = of_known_size(to_disk("a.weight", written))
    known = disk_specs("a.weight", quantize(torch.empty(shape, dtype=torch.bfloat16, device="meta"), kind, double))
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == known
    assert_same(from_disk("a.weight", tensors), written)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "double"), FOUR_BIT)
def test_bitsandbytes_reads_what_we_write(kind, double, dtype):
    value = weight(36, 192, dtype=dtype)
    tensors = to_disk("a.weight", quantize(value, kind, double))
    codes = tensors.pop("a.weight")
    state = bnb.QuantState.from_dict({name.removeprefix("a.weight."): t for name, t in tensors.items()}, "cpu")
    own_codes, own_state = bnb.quantize_4bit(value, quant_type=kind, compress_statistics=double, blocksize=64)
    assert state == own_state
    assert codes.shape == own_codes.shape
    assert torch.equal(bnb.dequantize_4bit(codes, state), bnb.dequantize_4bit(own_codes, own_state))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize(("kind", "double"), FOUR_BIT)
def test_what_bitsandbytes_modules_write_is_read(kind, double, storage):
    linear = bitsandbytes.nn.Linear4bit(
        64, 36, bias=False, quant_type=kind, compress_statistics=double, quant_storage=storage
    )
    value = weight(36, 64, dtype=torch.bfloat16)
    linear.weight = bitsandbytes.nn.Params4bit(
        value.clone(), requires_grad=False, quant_type=kind, compress_statistics=double, quant_storage=storage
    )
    linear = linear.to("cpu")
    tensors = {f"a.{name}": tensor for name, tensor in linear.state_dict().items()}
    assert_same(from_disk("a.weight", tensors), quantize(value, kind, double))


def test_other_block_sizes_are_read():
    value = weight(32, 128)
    codes, state = bnb.quantize_4bit(value, quant_type="nf4", blocksize=128)
    tensors = {"a": codes} | {f"a.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    found = from_disk("a", tensors)
    assert found.block_size == 128
    assert torch.equal(found.dequantize(), bnb.dequantize_4bit(codes, state))
    assert torch.equal(found.dequantize(rows=slice(7, 9)), bnb.dequantize_4bit(codes, state)[7:9])


def test_forms_that_would_be_misread_are_refused():
    tensors = to_disk("a.weight", quantize(weight(64, 64), "nf4"))
    with pytest.raises(ValueError, match=r"a\.weight: its table"):
        from_disk("a.weight", tensors | {"a.weight.quant_map": torch.linspace(-1, 1, 16)})
    tensors = to_disk("a.weight", quantize(weight(64, 64), "int8"))
    with pytest.raises(ValueError, match="format 2"):
        from_disk("a.weight", tensors | {"a.weight_format": torch.tensor(2)})
    assert_same(
        from_disk("a.weight", tensors | {"a.weight_format": torch.tensor(0)}, torch.float32),
        quantize(weight(64, 64), "int8"),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_by_rows_and_by_an_index_is_the_same_as_whole(dtype, monkeypatch):
    weight = quantize(torch.randn(37, 24, generator=torch.Generator().manual_seed(0)), "int8")
    expected = (weight.codes * weight.scales.unsqueeze(1) * quantization.INT8_STEP).to(dtype)
    index = torch.tensor([[3, 36, 3], [0, 1, 2]])
    for size in (1 << 23, 24 * 5, 1):  # at once, five rows at a time, one
        monkeypatch.setattr(quantization, "INT8_CHUNK", size)
        assert torch.equal(weight.dequantize(dtype), expected)
        assert torch.equal(weight.dequantize(dtype, rows=index), expected[index])
        assert torch.equal(weight.dequantize(dtype, rows=slice(2, 9)), expected[2:9])


def test_an_index_of_rows_is_for_int8_matrices():
    weight = torch.randn(64, 64)
    for other in (quantize(weight, "nf4"), quantize(weight.view(2, 32, 64), "int8")):
        with pytest.raises(ValueError, match="rows by an index"):
            other.dequantize(rows=torch.tensor([0]))


# --------------------------------------------------------------------------------------------------------- its bytes


@pytest.mark.parametrize(("kind", "double"), ALL)
@pytest.mark.parametrize("shape", [*SHAPES, (129, 128), (3, 5, 7), (4, 64, 300)])
def test_the_bytes_are_those_of_the_tensors(kind: str, double: bool, shape: tuple[int, ...]):
    held = quantize(weight(*shape), kind, double).tensors().values()
    assert quantized_bytes(shape, kind, double) == sum(tensor.nbytes for tensor in held)


def test_the_bytes_of_a_large_weight():
    """4096 × 4096 weights: 0.5 bytes of codes each, and 262144 scales, doubly quantized 1024 scales of scales."""
    assert quantized_bytes((4096, 4096), "nf4", True) == 8_388_608 + 262_144 + 4 * 1024 + 4
    assert quantized_bytes((4096, 4096), "nf4", False) == 8_388_608 + 4 * 262_144
    assert quantized_bytes((4096, 4096), "int8") == 16_777_216 + 4 * 4096
