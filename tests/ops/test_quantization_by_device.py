"""What is quantized on a card is what is quantized on a CPU, bit by bit, and is dequantized to the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_tool.ops import kernels, quantization
from qlora_tool.ops.declare import CPU, Target, meant_for
from qlora_tool.ops.quantization import (
    dequantize_4bit,
    dequantize_int8,
    quantize_4bit,
    quantize_int8,
    quantize_scales,
)
from qlora_tool.weights.quantized import QuantizedTensor, quantize

ADA, VOLTA = Target("cuda", (8, 9)), Target("cuda", (7, 0))
KINDS = [("nf4", True), ("nf4", False), ("fp4", True), ("int8", False)]


def random(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of very different sizes, every fifth of them zero."""
    draw = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=draw) * torch.rand(rows, 1, generator=draw)
    weight[::5] = 0
    return weight.to(dtype)


class Seen(TorchDispatchMode):
    """The operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("operation", "arguments"),
    [(quantize_4bit, ("nf4", 64)), (quantize_4bit, ("fp4", 64)), (quantize_int8, ())],
    ids=["nf4", "fp4", "int8"],
)
def test_a_card_quantizes_without_kernels_of_bitsandbytes(operation, arguments, dtype):
    """The version for CUDA devices is plain PyTorch; here it runs on a CPU, against bitsandbytes itself."""
    weight = random(60, 64, dtype)
    weight = weight if operation is quantize_int8 else weight.view(-1)
    operation.versions["cuda"](weight, *arguments)  # the tables are there
    with Seen() as seen:
        found = operation.versions["cuda"](weight, *arguments)
    assert seen.names and not any(name.startswith("bitsandbytes") for name in seen.names)
    for one, other in zip(found, operation.reference(weight, *arguments), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("rows", "columns"), [(1, 40), (3, 100), (40, 64)])
def test_blocks_that_are_not_full_and_weights_that_are_not_finite(rows, columns):
    weight = random(rows, columns).view(-1)
    for spoilt in (weight, torch.cat([weight, weight.new_tensor([torch.inf, torch.nan])])):
        for one, other in zip(
            quantize_4bit.versions["cuda"](spoilt, "nf4", 64), quantize_4bit.reference(spoilt, "nf4", 64), strict=True
        ):
            assert torch.equal(one, other) or one.isnan().equal(other.isnan())


def test_a_block_of_zeros_stays_zero():
    """Under double quantization its scale is not quite zero: any code but that of zero would show."""
    weight = random(2000, 64)
    for kind, double in KINDS:
        assert not quantize(weight, kind, double).dequantize()[::5].any()
    found = quantize(weight, "nf4", True)
    scales = QuantizedTensor("nf4", (2000, 64), torch.float32, torch.full_like(found.codes, 0xFF), **{
        name: tensor for name, tensor in found.tensors().items() if name != "codes"
    }).dequantize()[:, 0]  # fmt: skip
    assert scales[::5].any()  # the code of 1 gives the scale itself


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_fp16_is_rounded_to_even_by_either_of_bitsandbytes_libraries(kind, monkeypatch):
    """Its library for CUDA, which the CPU's functions come from where there is a card, rounds ties away from zero."""
    scales = 1 + torch.arange(1024) * 2.0**-11  # the code of 1 gives them: every other one lies between two numbers
    codes = torch.full((512 * 64,), {"nf4": 0xFF, "fp4": 0x33}[kind], dtype=torch.uint8)
    arguments = (codes, scales, None, None, kind, 64, 0, (1024, 64), torch.float16)
    expected = scales.half().unsqueeze(1).expand(1024, 64)
    assert torch.equal(dequantize_4bit(*arguments), expected)
    monkeypatch.setattr(quantization, "rounds_to_fp16", lambda: False)  # then by way of fp32
    assert torch.equal(dequantize_4bit(*arguments), expected)
    assert dequantize_4bit.workspace(CPU, *arguments) == 4 * 1024 * 64


@pytest.mark.parametrize("count", [1000, 32768, 32769, 700_001])
def test_scales_do_not_depend_on_the_number_of_threads(count):
    scales = torch.rand(count, generator=torch.Generator().manual_seed(count))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(quantize_scales(scales))
            found.append(quantize_scales.versions["cuda"](scales))
    finally:
        torch.set_num_threads(before)
    mean = found[0][2]
    assert mean.shape == () and mean.dtype == torch.float32
    assert abs(mean.double() - scales.double().mean()) <= (2**-24 if count > 32768 else count * 2**-24) * mean
    for other in found[1:]:
        assert all(torch.equal(one, same) for one, same in zip(found[0], other, strict=True))


# ------------------------------------------------------------------------------------------------- what is taken inside


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_one_pass_takes_nothing_inside_where_kernels_run(dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the card is another machine's
    four, eight = quantize(random(64, 64), "nf4"), quantize(random(64, 64), "int8")
    calls = [
        (dequantize_4bit, (*four.tensors().values(), "nf4", 64, 0, (64, 64), dtype)),
        (dequantize_int8, (eight.codes, eight.scales, dtype)),
    ]
    for operation, arguments in calls:
        inside = operation.workspace(CPU, *arguments)
        with meant_for(ADA):
            assert operation.workspace(ADA, *arguments) == (inside if dtype == torch.float64 else 0)
        with meant_for(VOLTA):
            assert operation.workspace(VOLTA, *arguments) == inside


def test_kernels_are_taken_to_run_on_the_cards_of_other_machines(monkeypatch):
    monkeypatch.setattr(kernels, "lacking", lambda: "no compiler")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.available(ADA) and kernels.available(Target("cuda", (7, 5)))
    assert not kernels.available(VOLTA) and not kernels.available(CPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not kernels.available(ADA)
    monkeypatch.setattr(kernels, "lacking", lambda: None)
    assert kernels.available(ADA)


def test_what_triton_lacks_is_told(monkeypatch):
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    kernels.lacking.cache_clear()
    try:
        assert "not installed" in kernels.lacking()
        monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: name)
        monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
        monkeypatch.delenv("CC", raising=False)
        kernels.lacking.cache_clear()
        assert "compiler" in kernels.lacking()
        monkeypatch.setenv("CC", "gcc")
        monkeypatch.setattr(kernels.sysconfig, "get_path", lambda *names: "/nowhere")
        kernels.lacking.cache_clear()
        assert "Python.h" in kernels.lacking()
    finally:
        kernels.lacking.cache_clear()


# -------------------------------------------------------------------------------------------------------------- a card


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(200, 64), (1030, 2048), (3, 100), (37, 45)])
@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_a_card_gives_what_a_cpu_gives(kind, double, shape, dtype):
    """1030 x 2048 has more than 32768 blocks. Also without kernels, whose references are bitsandbytes' own."""
    weight = random(*shape, dtype)
    here, there = quantize(weight, kind, double), quantize(weight.cuda(), kind, double)
    for name, tensor in here.tensors().items():
        assert torch.equal(there.tensors()[name].cpu(), tensor), name
    for result in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(there.dequantize(result).cpu(), here.dequantize(result))
    tensors = tuple(there.tensors().values())
    if kind == "int8":
        found = dequantize_int8.reference(*tensors, torch.bfloat16)
    else:
        rest = (None,) * (4 - len(tensors))
        found = dequantize_4bit.reference(*tensors, *rest, kind, 64, 0, shape, torch.bfloat16)
    assert torch.equal(found.cpu(), here.dequantize(torch.bfloat16))


@pytest.mark.cuda
def test_rows_and_experts_on_a_card():
    stack = torch.stack([random(128, 192), random(128, 192) * 3])
    here, there = quantize(stack, "nf4"), quantize(stack.cuda(), "nf4")
    assert torch.equal(there.dequantize(torch.bfloat16).cpu(), here.dequantize(torch.bfloat16))
    for rows in (slice(1, 128), slice(64, 65), slice(7, 7)):
        found = there.expert(1).dequantize(torch.float16, rows)
        assert torch.equal(found.cpu(), here.expert(1).dequantize(torch.float16, rows))


@pytest.mark.cuda
def test_kernels_run_on_this_card():
    """Where they do not, the warning of the run says why; on Linux, PyTorch for CUDA brings Triton."""
    if torch.cuda.get_device_capability() < kernels.OLDEST:
        pytest.skip("a card older than Triton compiles for")
    assert kernels.lacking() is None and kernels.usable(torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.cuda
def test_a_dequantized_weight_is_all_that_is_allocated():
    if not kernels.usable(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("no kernels here")
    for kind in ("nf4", "int8"):
        weight = quantize(random(512, 1024).cuda(), kind)
        weight.dequantize(torch.bfloat16)  # compiles, and makes tables
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        dense = weight.dequantize(torch.bfloat16)
        assert torch.cuda.max_memory_allocated() - before == dense.nbytes
        del dense
