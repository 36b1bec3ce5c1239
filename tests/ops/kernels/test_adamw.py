"""A step of AdamW with many weights in one launch: in Triton's interpreter against fp64, and compiled."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from qlora_tool.ops.adamw import BETA1, BETA2, BLOCK, EPSILON, join_master

SHAPES = [(64, 80), (5,), (), (37, 121), (1024,), (3, 1025), (0,)]  # programs take 1024 elements each
STEPS, RATES, DECAY = [3, 1, 4, 9, 2, 700, 1], [1e-2, 1e-3, 1e-1, 1e-2, 3e-3, 1e-2, 1e-2], 0.1
CONSTANTS = {"beta1": BETA1, "beta2": BETA2, "epsilon": EPSILON}
EPS = 2.0**-24  # an operation in fp32 is off by this much of its result at most


def codes() -> list[Tensor]:
    return [bnb.create_dynamic_map(signed=True), bnb.create_dynamic_map(signed=False)]


def arguments(dtype: torch.dtype, gradients: torch.dtype, eight_bit: bool, shapes: list[tuple[int, ...]] = SHAPES):
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]
    sizes = [weight.numel() for weight in weights]
    exact = []
    if dtype == torch.bfloat16:
        exact = [torch.randint(-(2**15), 2**15, (size,), generator=draw).short() for size in sizes]
    elif dtype == torch.float16:
        exact = [weight.float().flatten() * (1 + 1e-4) for weight in weights]
    if eight_bit:
        moments = [[torch.randint(256, (size,), generator=draw).byte() for size in sizes] for _ in range(2)]
        scales = [[torch.rand(-(-size // BLOCK), generator=draw) for size in sizes] for _ in range(2)]
    else:
        moments = [[kind(size, generator=draw) for size in sizes] for kind in (torch.randn, torch.rand)]
        scales = [[], []]
    gradients = [torch.randn(shape, generator=draw).to(gradients) for shape in shapes]
    return [weights, gradients, exact, *moments, *scales, codes() if eight_bit else [], torch.tensor(0.3), STEPS, RATES,
            DECAY]  # fmt: skip


def blockwise(moment: Tensor, scales: Tensor, table: Tensor) -> Tensor:
    return table.double()[moment.long()] * scales.double().repeat_interleave(BLOCK)[: len(moment)]


def masters(weights, exact) -> list[Tensor]:
    if not exact:
        return [weight.flatten().clone() for weight in weights]
    if exact[0].dtype == torch.int16:
        return [join_master(weight.flatten(), bits) for weight, bits in zip(weights, exact, strict=True)]
    return [master.clone() for master in exact]


def moments_of(made: list) -> list[list[Tensor]]:
    """Both moments of every weight in fp64."""
    if not made[7]:
        return [[moment.double() for moment in each] for each in made[3:5]]
    return [[blockwise(*pair, table) for pair in zip(moments, scales, strict=True)]
            for moments, scales, table in zip(made[3:5], made[5:7], made[7], strict=True)]  # fmt: skip


@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize(
    ("dtype", "gradients"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32),
     (torch.float16, torch.float16), (torch.float16, torch.float32)],
)  # fmt: skip
def test_a_step_in_fp64(interpreted, dtype, gradients, eight_bit):
    """Each moment is a sum of two products, the weight one of two products, a root and two quotients: each operation
    rounds, to EPS of what it gives, and the moments' errors go on into the quotient."""
    made = arguments(dtype, gradients, eight_bit)
    before, (first, second) = masters(made[0], made[2]), moments_of(made)
    scaled = [gradient.double().flatten() * 0.3 for gradient in made[1]]
    interpreted("adamw").step(*made, **CONSTANTS)
    after, stored = masters(made[0], made[2]), moments_of(made)
    for number, gradient in enumerate(scaled):
        step, rate = STEPS[number], RATES[number]
        moment = 0.9 * first[number] + 0.1 * gradient
        square = 0.999 * second[number] + 0.001 * gradient**2
        quotient = moment / (1 - 0.9**step) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        expected = before[number].double() * (1 - rate * DECAY) - rate * quotient
        size = (0.9 * first[number]).abs() + (0.1 * gradient).abs()
        bound = 4 * EPS * before[number].abs() + rate * 12 * EPS * quotient.abs() * (1 + size / moment.abs())
        assert ((after[number].double() - expected).abs() <= bound).all()
        for found, exactly, error, table in (
            (stored[0][number], moment, 6 * EPS * size, made[7][:1]),
            (stored[1][number], square, 6 * EPS * square, made[7][1:]),
        ):
            if eight_bit and len(exactly):
                error = error + nearest_error(exactly, table[0])
            assert ((found - exactly).abs() <= error).all()
    for weight, master in zip(made[0], after, strict=True):
        if dtype == torch.bfloat16:  # ties, which go away from zero, apart
            assert ((weight.flatten().double() - master.double()).abs() <= 2.0**-8 * master.double().abs()).all()
        else:
            assert torch.equal(weight.flatten(), master.to(dtype))


def nearest_error(exactly: Tensor, table: Tensor) -> Tensor:
    """How far the nearest value of the table is off, with the largest of each block as its scale; and what rounding
    the scale and the quotient may move it by."""
    scales = torch.stack([block.abs().max() for block in exactly.split(BLOCK)])
    scales = scales.repeat_interleave(BLOCK)[: len(exactly)]
    distance = ((exactly / scales)[:, None] - table.double()).abs().amin(1)
    return (distance + 8 * EPS) * scales


@pytest.mark.parametrize("gradient", [0.0, torch.nan, torch.inf])
def test_nothing_and_no_numbers(interpreted, gradient):
    """Blocks of zeros stay zeros; what is no number makes weights of 16 bits one, too, and stays with its own."""
    made = arguments(torch.bfloat16, torch.bfloat16, eight_bit=True, shapes=[(600,), (300,)])
    for number in range(2):
        for name in (3, 4):
            made[name][number] = torch.full_like(made[name][number], 127 if name == 3 else 0)  # zeros
        made[1][number].zero_()
    made[1][0][5] = gradient
    before = masters(made[0], made[2])
    interpreted("adamw").step(*made, **CONSTANTS)
    after, stored = masters(made[0], made[2]), moments_of(made)
    for number in range(2):
        good = torch.ones(len(after[number]), dtype=torch.bool)
        if number == 0 and gradient != 0.0:
            good[5] = False
            assert made[0][0][5].isnan() and after[0][5].isnan()
        rate = RATES[number]
        torch.testing.assert_close(after[number][good], before[number][good] * (1 - rate * DECAY), rtol=2 * EPS, atol=0)
        if gradient == 0.0:
            assert not any(moments[number].any() for moments in stored)


def test_one_launch_for_all(interpreted, monkeypatch):
    module = interpreted("adamw")
    kernel, grids = module._adamw, []

    class Counted:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(module, "_adamw", Counted())
    shapes = [(3, 7)] * 100 + [(1030,)]
    made = arguments(torch.float32, torch.float32, False, shapes)
    made[9:11] = [1] * 101, [1e-2] * 101
    before = [weight.clone() for weight in made[0]]
    module.step(*made, **CONSTANTS)
    assert grids == [(102,)]
    assert not any(torch.equal(one, other) for one, other in zip(before, made[0], strict=True))


def test_a_gradient_laid_out_otherwise(interpreted):
    module = interpreted("adamw")
    plain, turned = (arguments(torch.bfloat16, torch.bfloat16, False, [(64, 80)]) for _ in range(2))
    turned[1] = [turned[1][0].t().contiguous().t()]
    assert turned[1][0].stride() != plain[1][0].stride()
    for made in (plain, turned):
        module.step(*made, **CONSTANTS)
    assert torch.equal(plain[0][0], turned[0][0]) and torch.equal(plain[2][0], turned[2][0])


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize(
    ("dtype", "alone"), [("float32", False), ("bfloat16", True), ("bfloat16", False), ("float16", True)]
)
def test_it_compiles(assembly, dtype, alone, eight_bit, aligned):
    """Also for one weight alone, whose number Triton takes as a constant, without a factor."""
    from triton import language

    from qlora_tool.ops.kernels import adamw

    types = {"addresses": "*i64", "numbers": "*fp32"} | ({} if alone else {"factor": "*fp32", "count": "i32"})
    of_codes = ("first_codes", "second_codes")
    types |= dict.fromkeys(of_codes, "*fp32") if eight_bit else {}
    constants = {
        "BISECTIONS": 9, "BETA1": 0.9, "BETA2": 0.999, "EPSILON": 1e-8, "weight_type": getattr(language, dtype),
        "gradient_type": language.float32, "BLOCK": 256, "BLOCKS": 4, "ALIGNED": aligned,
    } | ({} if eight_bit else dict.fromkeys(of_codes)) | ({"factor": None, "count": 1} if alone else {})  # fmt: skip
    found = assembly(adamw._adamw, types, constants, num_warps=4, enable_fp_fusion=False)
    assert ".target sm_" in found and "fma" not in found
    assert ("ld.global.v4" in found) == aligned  # 16 bytes at once
