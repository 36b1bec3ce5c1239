"""An fp32 master as a bf16 weight and 16 more bits: exact over all numbers; and steps that take little memory."""

from __future__ import annotations

import math

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from qlora_tool.memory.trace.measure import allocations
from qlora_tool.ops import adamw
from qlora_tool.ops.adamw import SLICE, join_master, split_master
from qlora_tool.training import paged_memory
from qlora_tool.training.optimizers import Optimizer
from qlora_tool.training.paged_memory import PagedMemory
from qlora_tool.training.parameter_state import ParameterState


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    weight, low_bits = torch.empty_like(master, dtype=torch.bfloat16), torch.empty_like(master, dtype=torch.int16)
    split_master(master.clone(), weight, low_bits)
    return weight, low_bits


def from_bits(*bits: int) -> Tensor:
    return torch.tensor([value - 2**32 if value >= 2**31 else value for value in bits], dtype=torch.int32).view(
        torch.float32
    )


def test_every_number_comes_back_to_the_bit():
    """Random bits: all exponents and signs, denormals, infinities' neighbours. NaNs stay NaNs."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4_000_000,), generator=generator).to(torch.int32)
    edges = torch.tensor([high << 16 | low for high in (0, 1, 0x7F, 0x80, 0x3F7F, 0x3F80, 0x7F7F)
                          for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)], dtype=torch.int64)  # fmt: skip
    edges = torch.cat([edges, edges - 2**31]).to(torch.int32)
    master = torch.cat([bits, edges]).view(torch.float32)
    weight, low_bits = split(master)
    again, number = join_master(weight, low_bits), ~master.isnan()
    assert torch.equal(again.view(torch.int32)[number], master.view(torch.int32)[number])
    assert weight[~number].isnan().all() and again[~number].isnan().all()
    assert 10_000 < int((~number).sum()) < 100_000  # 1 of 128 exponents


def test_the_weight_is_the_master_rounded():
    generator = torch.Generator().manual_seed(1)
    master = torch.randn(1_000_000, generator=generator)
    weight, _ = split(master)
    ties = master.view(torch.int32) & 0xFFFF == 0x8000
    assert torch.equal(weight[~ties], master.bfloat16()[~ties])


@pytest.mark.parametrize(
    ("master", "weight", "low_bits"),
    [
        (1.0, 1.0, 0),
        (1 + 2**-23, 1.0, 1),
        (1 + 2**-8, 1 + 2**-7, -(2**15)),  # ties away from zero
        (-(1 + 2**-8), -(1 + 2**-7), -(2**15)),
        (1 + 3 * 2**-8, 1 + 2**-6, -(2**15)),
        (1 + 2**-8 - 2**-23, 1.0, 2**15 - 1),
        (2 - 2**-23, 2.0, -1),  # into the next exponent
        (2**-149, 0.0, 1),  # the smallest denormal
        (-(2**-149), -0.0, 1),
        (3.4028234663852886e38, math.inf, -1),  # the largest number is above the largest in bf16
        (math.inf, math.inf, 0),
        (-math.inf, -math.inf, 0),
    ],
)
def test_numbers_by_hand(master, weight, low_bits):
    found, low = split(torch.tensor([master]))
    assert (float(found), int(low)) == (weight, low_bits)
    assert math.copysign(1, float(found)) == math.copysign(1, weight)
    assert float(join_master(found, low)) == master


def test_cudas_nan_of_ones_stays_one():
    """0x7FFFFFFF and a half more would be the bits of -0."""
    weight, low_bits = split(from_bits(0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001))
    assert weight.isnan().all() and join_master(weight, low_bits).isnan().all()


# ----------------------------------------------------------------------------------------------------- slice by slice


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_slices_step_as_the_whole(name, dtype, monkeypatch):
    steps = []
    for size in (SLICE, 512):
        monkeypatch.setattr(adamw, "SLICE", size)
        parameter = nn.Parameter(torch.randn(77, 91, generator=torch.Generator().manual_seed(0)).to(dtype))
        optimizer = Optimizer(name, [parameter], 0.1)
        for step in range(3):
            parameter.grad = torch.randn(77, 91, generator=torch.Generator().manual_seed(step)).to(dtype)
            norm = optimizer.step(1e-2, 1.0)
        steps.append((parameter.detach().float(), norm))
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_a_step_takes_the_same_memory_for_a_tensor_twice_as_large(name, dtype):
    """Beside its state and its gradient: a few numbers of 4 bytes for each element of a slice (in 8 bits,
    bitsandbytes' both moments and what it makes of them)."""
    peaks = [extra_bytes(name, nn.Parameter(torch.ones(slices * SLICE, dtype=dtype))) for slices in (1, 2)]
    assert peaks[0] == peaks[1] <= 4 * SLICE * (3 if name == "adamw" else 8) + 100  # scalars


def extra_bytes(name: str, parameter: nn.Parameter) -> int:
    """The most that the allocator had given out at once during a step, beyond what was there before it."""
    optimizer = Optimizer(name, [parameter])
    for _ in range(2):  # the state comes with the first step
        parameter.grad = torch.ones_like(parameter)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            optimizer.step(1e-3, 1.0)
    total = peak = 0
    for _, size in sorted(allocations(profiler)):
        total += size
        peak = max(peak, total)
    assert total <= 0  # the gradient went
    return peak


# ------------------------------------------------------------------------------------------------------ other layouts


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_a_transposed_parameter_takes_the_same_steps(name):
    """Its memory runs the other way; its gradient's too, or not."""
    values = torch.randn(64, 80, generator=torch.Generator().manual_seed(0))
    gradients = [torch.randn(64, 80, generator=torch.Generator().manual_seed(step)) for step in range(1, 4)]
    plain, turned = nn.Parameter(values.bfloat16()), nn.Parameter(values.bfloat16().t().contiguous().t())
    assert not turned.is_contiguous()
    optimizers = [Optimizer(name, [plain]), Optimizer(name, [turned])]
    for gradient in gradients:
        plain.grad, turned.grad = gradient.bfloat16(), gradient.bfloat16()
        for optimizer in optimizers:
            optimizer.step(1e-2)
    if name == "adamw":
        assert torch.equal(plain, turned)
        return
    # In 8 bits the blocks run along the memory: what bitsandbytes does to the transposed tensor.
    reference = nn.Parameter(values.bfloat16().float().t().contiguous())
    theirs = bnb.optim.AdamW8bit([reference], lr=1e-2, weight_decay=0.0)
    for gradient in gradients:
        reference.grad = gradient.bfloat16().float().t().contiguous()
        theirs.step()
    assert torch.equal(turned.t(), reference.bfloat16())


# -------------------------------------------------------------------------------------------------------------- pages


class Pages:
    """What stands for managed memory on a CPU."""

    def __init__(self):
        self.given: list[Tensor] = []

    def take(self, size: int) -> Tensor:
        self.given.append(torch.zeros(size, dtype=torch.uint8))
        return self.given[-1]


def test_a_resumed_state_is_in_pages_again():
    """Large moments of 8 bits, and nothing else; bitsandbytes puts those that are loaded elsewhere."""
    weight = nn.Parameter(torch.zeros(100_000, dtype=torch.bfloat16))
    saved = ParameterState(weight, eight_bit=True).state_dict()
    for number, name in enumerate(("state1", "state2")):
        saved[name] = torch.full_like(saved[name], 5 + number)
    pages = Pages()
    resumed = ParameterState(weight, eight_bit=True, paged=True, pages=pages)
    resumed.load_state_dict(saved)
    first, second = pages.given
    assert resumed.tensors["state1"] is first and first.eq(5).all()
    assert resumed.tensors["state2"] is second and second.eq(6).all()
    ParameterState(nn.Parameter(torch.zeros(99_999)), eight_bit=True, paged=True, pages=pages)
    ParameterState(weight, eight_bit=False, paged=True, pages=pages)
    assert len(pages.given) == 2


def test_without_a_driver_nothing_is_paged_and_that_is_said(monkeypatch, caplog):
    def fails(*_):
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(paged_memory, "_Block", fails)
    assert PagedMemory.of([100, 200], torch.device("cuda", 0)) is None
    expected = "training.optim: paged_adamw_8bit runs as adamw_8bit, as libcuda.so.1: cannot open shared object file"
    assert caplog.messages == [expected]
