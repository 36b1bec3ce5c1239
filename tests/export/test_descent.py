"""Coordinate descent over codes, and matrices on files' grids: against a loop in fp64 and the formats' own readers."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import gguf
import pytest
import torch

from qlora_tool.export.grids import descent
from qlora_tool.export.grids.block_types import BLOCK_TYPES
from qlora_tool.export.grids.coded import Coded, coded_4bit, coded_blocks
from qlora_tool.export.grids.descent import BLOCK, damped, weighted_error
from qlora_tool.export.grids.grid import Grid
from qlora_tool.weights.quantized import quantize

KINDS = [("nf4", False), ("nf4", True), ("fp4", True), *((name, False) for name in BLOCK_TYPES)]
FIXED = ("Q4_1", "Q5_1", "Q4_K", "Q5_K", "Q6_K")  # whose scales stay
IDS = [f"{kind}{'-double' if double else ''}" for kind, double in KINDS]


def descend(target, moments, on, sweeps):
    moved = on.copy()
    descent.descend(target, moments, moved.grid, moved.values, sweeps)
    return moved


def descend_keeping(trained, update, moments, on, sweeps):
    moved = on.copy()
    descent.descend_keeping(trained, update, moments, moved.grid, moved.values, sweeps)
    return moved


def a_matrix(out: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def moments_of(columns: int, tokens: int = 300) -> torch.Tensor:
    """Of inputs that hang together, as a layer's do."""
    generator = torch.Generator().manual_seed(7)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    x = torch.randn(tokens, columns, generator=generator) @ mixing * torch.logspace(-1, 1, columns)
    return damped(x.T @ x)


def coded(kind: str, double: bool, weight: torch.Tensor):
    if kind in BLOCK_TYPES:
        return coded_blocks(BLOCK_TYPES[kind], weight)
    return coded_4bit(quantize(weight, kind, double))


def decoded(kind: str, finished, shape) -> torch.Tensor:
    if kind not in BLOCK_TYPES:
        return finished.dequantize(torch.float32)
    values = gguf.dequantize(finished.numpy(), gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(values.copy()).view(shape)


@pytest.mark.parametrize(("kind", "double"), KINDS, ids=IDS)
def test_what_is_finished_is_decoded_to_the_values_that_were_chosen(kind, double):
    """Also values that the grid's own weights did not take; blocks of zeros among them."""
    weight = a_matrix(9, 512)
    weight[2], weight[3, :300] = 0, 0
    on = coded(kind, double, weight)
    torch.testing.assert_close(decoded(kind, on.finished(), weight.shape), on.values, rtol=0, atol=0)
    moved = descend(a_matrix(9, 512, seed=1), moments_of(512), on, 1)
    assert (moved.values != on.values).any()
    assert (moved.grid.scales is None) == (kind in FIXED) == bool((moved.grid.a == on.grid.a).all())
    torch.testing.assert_close(decoded(kind, moved.finished(), weight.shape), moved.values, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(5, 100), (3, 33), (7, 64), (2, 1)])
def test_blocks_of_four_bits_may_straddle_rows(shape):
    """bitsandbytes cuts a flat matrix: with rows of another length than its blocks', two rows share a scale."""
    on = coded_4bit(quantize(a_matrix(*shape), "nf4", True))
    moved = descend(a_matrix(*shape, seed=1), moments_of(shape[1]), on, 2)
    torch.testing.assert_close(moved.finished().dequantize(), moved.values, rtol=0, atol=0)


def scales_by_hand(grid, run) -> torch.Tensor | None:
    """Every value that the scales of a run may have, (out, values) fp64; None where any number of a dtype is one."""
    if grid.scales.factors is None:
        return None
    return grid.scales.factors.double() * grid.scales.unit[:, run, None].double() + grid.scales.offset


def by_hand(target, moments, on, sweeps, codes=True):
    """Column by column in fp64, the slope anew for each, every value of the grid tried; before the columns of a run
    every value of its scales, levels held."""
    chosen, a, target, moments = on.values.double(), on.grid.a.double(), target.double(), moments.double()
    levels, width = on.grid.levels.double(), on.grid.width
    every = a.repeat_interleave(width, 1).unsqueeze(-1) * levels
    index = (chosen.unsqueeze(-1) - every).abs().argmin(-1)  # used where there is no b
    for k in [*range(chosen.shape[1])] * sweeps:
        run = k // width
        if k % width == 0 and on.grid.scales is not None:
            columns = slice(k, k + width)
            part = levels[index[:, columns]]
            slope = ((chosen - target) @ moments[:, columns] * part).sum(1)
            wanted = a[:, run] - slope / ((part @ moments[columns, columns]) * part).sum(1)
            may_be = scales_by_hand(on.grid, run)
            a[:, run] = wanted.to(on.grid.scales.dtype).double() if may_be is None else may_be.gather(
                1, (may_be - wanted.unsqueeze(1)).abs().argmin(1, keepdim=True)).squeeze(1)  # fmt: skip
            chosen[:, columns] = part * a[:, run, None]
        if not codes:
            continue
        wanted = chosen[:, k] - (chosen - target) @ moments[:, k] / moments[k, k]
        values = a[:, run, None] * levels
        if on.grid.b is not None:
            values = values + on.grid.b[:, run, None].double()
        index[:, k] = (values - wanted.unsqueeze(1)).abs().argmin(1)
        chosen[:, k] = values.gather(1, index[:, k, None]).squeeze(1)
    return chosen


@pytest.mark.parametrize(("kind", "double"), [("nf4", True), ("nf4", False), ("Q4_K", False), ("IQ4_NL", False),
                                              ("Q6_K", False)])  # fmt: skip
def test_the_codes_are_those_of_the_plain_loop(kind, double):
    """Over more columns than a block has. Where two values are as near, rounding decides: a few may differ, and the
    error that is left is the same."""
    columns = 512
    assert columns > BLOCK
    target, moments = a_matrix(16, columns), moments_of(columns)
    on = coded(kind, double, target)
    expected, found = by_hand(target, moments, on, 2), descend(target, moments, on, 2).values
    assert (found.double() - expected).abs().gt(1e-6).float().mean() < 0.01
    assert weighted_error(found - target, moments) == pytest.approx(
        weighted_error(expected.float() - target, moments), rel=0.01
    )


@pytest.mark.parametrize(("kind", "double"), KINDS, ids=IDS)
def test_scales_alone_are_those_of_the_plain_loop_and_levels_stay(kind, double):
    """A weight that was scaled after it was put on the grid, as by an update of its largest weights."""
    weight, moments = a_matrix(16, 512), moments_of(512)
    weight[3] = 0
    on = coded(kind, double, weight)
    target = weight * (1 + 0.05 * torch.randn(16, 1, generator=torch.Generator().manual_seed(2)))
    moved = on.copy()
    descent.fit_scales(target, moments, moved.grid, moved.values)
    if kind in FIXED:
        assert torch.equal(moved.values, on.values)
        return
    expected = by_hand(target, moments, on, 1, codes=False)
    assert (moved.values - expected).abs().gt(1e-6).float().mean() < 0.01  # where two are as near, rounding decides
    assert weighted_error(moved.values - target, moments) < weighted_error(on.values - target, moments)
    torch.testing.assert_close(decoded(kind, moved.finished(), weight.shape), moved.values, rtol=0, atol=0)
    levels = [one.grid.nearest_levels(one.values.unflatten(1, (-1, on.grid.width)), one.grid.a.unsqueeze(-1))
              for one in (on, moved)]  # fmt: skip
    assert torch.equal(*levels)


@pytest.mark.parametrize(("kind", "double"), KINDS, ids=IDS)
def test_no_sweep_makes_it_worse_and_the_first_makes_it_better(kind, double):
    target, moments = a_matrix(32, 256), moments_of(256)
    on = coded(kind, double, target)
    before = weighted_error(on.values - target, moments)
    errors = [before]
    for _ in range(3):
        on = descend(target, moments, on, 1)
        errors.append(weighted_error(on.values - target, moments))
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in pairwise(errors))
    assert errors[1] < before


def share_kept(values, base, update, moments):
    """⟨(Q − W₀)·H, Δ⟩ / ⟨Δ·H, Δ⟩ in fp64."""
    weighted = update.double() @ moments.double()
    return float((weighted * (values - base).double()).sum() / (weighted * update.double()).sum())


@pytest.mark.parametrize(("kind", "double"), KINDS, ids=IDS)
def test_an_update_from_the_grid_is_kept_better_than_by_the_nearest_products(kind, double):
    """As after training on a quantized base: W₀ lies on the grid, and Δ, of rank 1, is a quarter of W₀'s error."""
    weight, moments = a_matrix(64, 256), moments_of(256)
    base = coded(kind, double, weight).values
    update = torch.outer(torch.randn(64, generator=torch.Generator().manual_seed(3)), a_matrix(1, 256, seed=4)[0])
    update *= (base - weight).norm() / 4 / update.norm()
    on = coded(kind, double, base + update)
    plain = descend(base + update, moments, on, 3)
    kept = descend_keeping(base + update, update, moments, on, 3)
    shares = [share_kept(moved.values, base, update, moments) for moved in (plain, kept)]
    assert abs(1 - shares[1]) < abs(1 - shares[0])


def test_what_is_missing_is_added_before_the_next_sweep():
    base, moments = coded_4bit(quantize(a_matrix(64, 64), "nf4", False)).values, moments_of(64)
    update = 0.05 * torch.outer(a_matrix(1, 64, seed=2)[0], a_matrix(1, 64, seed=4)[0])
    on = coded_4bit(quantize(base + update, "nf4", False))
    expected, gain = on, 1.0
    for _ in range(3):
        expected = descend(base + gain * update, moments, expected, 1)
        gain += 1 - share_kept(expected.values, base, update, moments)
    found = descend_keeping(base + update, update, moments, on, 3).values
    # Where two values are as near, rounding decides.
    assert (found - expected.values).abs().gt(1e-6).float().mean() < 0.01
    assert not torch.equal(found, descend(base + update, moments, on, 3).values)


def test_of_an_update_far_below_the_steps_nothing_is_added():
    """A thousandth of the grid's own error: what is missing of it is noise, and to follow that would add to it."""
    weight, moments = a_matrix(64, 256), moments_of(256)
    on = coded_4bit(quantize(weight, "nf4", False))
    update = 1e-3 * (on.values - weight).norm() * a_matrix(64, 256, seed=5) / a_matrix(64, 256, seed=5).norm()
    found = descend_keeping(weight, update, moments, on, 3)
    torch.testing.assert_close(found.values, descend(weight, moments, on, 3).values, rtol=0, atol=0)


def test_without_an_update_nothing_is_added():
    base, moments = a_matrix(8, 64), moments_of(64)
    on = coded_4bit(quantize(base, "nf4", False))
    found = descend_keeping(base, torch.zeros_like(base), moments, on, 3)
    torch.testing.assert_close(found.values, descend(base, moments, on, 3).values, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (5, 20), (4096, 4096), (11008, 4096), (4096, 11008), (3, 1 << 25)])
def test_rows_go_in_parts_of_about_one_size(shape):
    parts = descent._parts(torch.empty(shape, device="meta"))
    rows = [row for part in parts for row in range(*part.indices(shape[0]))]
    assert rows == list(range(shape[0]))
    sizes = [len(range(*part.indices(shape[0]))) for part in parts]
    assert all(size == 1 or size * shape[1] <= descent.AT_A_TIME for size in sizes)
    assert not sizes or max(sizes) - min(sizes) < len(sizes)


@pytest.mark.parametrize(("rank", "few"), [(4, True), (32, True), (33, True), (130, True), (300, False), (0, False)])
def test_an_updates_product_with_the_moments_is_that_of_its_few_directions(rank, few, monkeypatch):
    """Of LoRA's ranks, of one beyond all that are looked for, and of an update of full rank, as DoRA's."""
    out, columns = 600, 640
    moments = moments_of(columns)
    left, right = a_matrix(out, rank or out, 1), a_matrix(rank or out, columns, 2)
    trained = a_matrix(out, columns) + left @ right
    update = trained - a_matrix(out, columns)  # as it is had: with what fp32 loses of a small difference
    products, wide = [], torch.Tensor.__matmul__

    def counted(one, other):
        if other is moments:
            products.append(len(one))
        return wide(one, other)

    monkeypatch.setattr(torch.Tensor, "__matmul__", counted)
    weighted = descent._Weighted.of(update, moments)
    base = torch.eye(out) if weighted.base is None else weighted.base
    found = base.mm(weighted.product)
    assert products == ([40 if rank <= 40 else 136] if few else [out])
    exact = update.double() @ moments.double()
    # Left out is at most the root of LEFT_OUT of Δ, along any direction of H: so by the largest of its singular values.
    most = float(torch.linalg.matrix_norm(moments.double(), 2)) * float(update.norm()) * descent.LEFT_OUT**0.5
    assert float((found - exact).norm()) <= most
    sizes = [sum(weighted.dot(part, update[part]) for part in (slice(0, 100), slice(100, None))),
             float((exact * update.double()).sum())]  # fmt: skip
    assert sizes[0] == pytest.approx(sizes[1], rel=2e-3)


@pytest.mark.parametrize("shape", [(4096, 256), (2048, 300), (2047, 256), (3, 256)])
def test_parts_of_rows_come_out_alike_on_one_core_and_on_several(shape):
    target, moments = a_matrix(*shape), moments_of(shape[1])
    grid = coded_4bit(quantize(a_matrix(*shape, seed=1), "nf4", True)).grid if shape[1] % 64 == 0 else Grid(
        torch.arange(16.0), True, torch.full((shape[0], 1), 0.01), torch.full((shape[0], 1), -0.08), shape[1])
    on = Coded(grid, grid.values(torch.zeros(shape, dtype=torch.uint8)), None)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(descend(target, moments, on, 2).values)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)
    first = descend(target[:5], moments, Coded(grid.of_rows(slice(5)), on.values[:5], None), 2)
    changed = (first.values - found[0][:5]).abs() > 1e-6  # products of other sizes: a tie may fall otherwise
    assert changed.float().mean() < 0.01


@pytest.mark.parametrize(("kind", "double"), [("nf4", True), ("Q4_K", False), ("Q6_K", False)])
def test_slopes_in_bf16_lead_as_low(kind, double):
    """bf16 keeps 8 bits: single codes fall otherwise and lead to other least sums, which for so few rows lie some
    tenths of a percent apart, above or below. Wrong slopes would leave much more: a sweep less leaves 7 %."""
    target, moments = a_matrix(64, 512), moments_of(512)
    target[:, 7] *= 30
    on = coded(kind, double, target)
    exact, coarse = on.copy(), on.copy()
    descent.descend(target, moments, exact.grid, exact.values, 3)
    descent.descend(target, moments, coarse.grid, coarse.values, 3, torch.bfloat16)
    left = [weighted_error(one.values - target, moments) for one in (on, exact, coarse)]
    assert left[1] < 0.97 * left[0] and left[2] == pytest.approx(left[1], rel=0.01)
    torch.testing.assert_close(decoded(kind, coarse.finished(), target.shape), coarse.values, rtol=0, atol=0)
    update = a_matrix(64, 8, 3) @ a_matrix(8, 512, 4)
    exact, coarse = on.copy(), on.copy()
    for one, dtype in ((exact, torch.float32), (coarse, torch.bfloat16)):
        descent.descend_keeping(target, update, moments, one.grid, one.values, 3, dtype)
    ends = [weighted_error(one.values - target, moments) for one in (exact, coarse)]
    assert ends[1] == pytest.approx(ends[0], rel=0.01)


def test_with_inputs_that_do_not_hang_together_codes_are_the_nearest():
    """A diagonal matrix of moments parts the columns: wherever it starts, each weight ends on its nearest value."""
    target = a_matrix(8, 128)
    on = coded_4bit(quantize(target, "nf4", False))
    away = coded_4bit(quantize(-target, "nf4", False)).values
    fixed = Coded(replace(on.grid, scales=None), away, None)
    found = descend(target, torch.diag(torch.rand(128) + 0.1), fixed, 1)
    torch.testing.assert_close(found.values, on.values, rtol=0, atol=0)


def test_columns_that_never_saw_an_input_stay_numbers():
    moments = moments_of(64)
    moments[:, 5] = moments[5] = 0
    dead = damped(torch.zeros(64, 64))
    target = a_matrix(4, 64)
    on = coded_4bit(quantize(target, "nf4", True))
    for known in (damped(moments), dead):
        assert descend(target, known, on, 2).values.isfinite().all()
