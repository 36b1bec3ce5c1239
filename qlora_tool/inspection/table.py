"""What `inspect` prints: a table by kind of module, and what the ranks say, on one screen of 100 columns."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_tool.inspection.updates import SETTLED, SHARE, Inspection, Row
from qlora_tool.sizes import counted

_RANKS = 6  # powers of two in the line that says what each rank keeps, at most
_LEGEND = (
    "|Δ|/|W0|: {delta}, over the base's weight (Frobenius norms).",
    "eff. rank: exp of the entropy of the singular values{of}. r for 90%: the lowest rank that",
    "keeps 90% of |Δ|². of all: share of |Δ|² over all modules. (least to most) where modules differ.",
)


def lines_of(found: Inspection) -> list[str]:
    """The screen, line by line."""
    ranks = sorted({module.r for module in found.modules})
    named = f"r {ranks[0]}" if len(ranks) == 1 else f"r {ranks[0]} to {ranks[-1]}"
    lines = [f"{found.name}: {found.method}, {named}, on {counted(len(found.modules), 'module')} of {found.base}"]
    if found.no_base:
        lines.append(f"|W0| is left out: {found.no_base}")
    lines += ["", *_table(found), "", *_legend(found)]
    return [*lines, "", *_summary(found)]


def _table(found: Inspection) -> list[str]:
    grouped = any(row.count > 1 for row in found.rows)
    heads = ["module", *(["count"] if grouped else []), "r", *([] if found.no_base else ["|Δ|/|W0|"]),
             "eff. rank", f"r for {SHARE:.0%}", "of all", "what that says of r"]  # fmt: skip
    rows = [heads, *(_cells(row, grouped, not found.no_base) for row in found.rows)]
    if not any(row[-1] for row in rows[1:]):
        rows = [row[:-1] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    numbers = range(1, len(heads) - 1)
    return ["  ".join(cell.rjust(width) if column in numbers else cell.ljust(width)
                      for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
            for row in rows]  # fmt: skip


def _cells(row: Row, grouped: bool, with_base: bool) -> list[str]:
    low, high = row.ranks
    ratio = [] if not with_base else [_spread(row.ratios, _percents(row.ratios)) if row.ratios else "-"]
    return [row.name, *([str(row.count)] if grouped else []), str(low) if low == high else f"{low}-{high}", *ratio,
            f"{row.effective[1]:.1f}", _spread(row.needed, "{:.0f}"), f"{row.share:.0%}", row.verdict]  # fmt: skip


def _percents(ratios: tuple[float, float, float]) -> str:
    return "{:.2%}" if ratios[2] < 0.1 else "{:.1%}"


def _spread(values: tuple[float, float, float], form: str) -> str:
    """The middle one, and the ends where they differ."""
    low, middle, high = (form.format(value) for value in values)
    return middle if low == high else f"{middle} ({low.removesuffix('%')} to {high.removesuffix('%')})"


def _legend(found: Inspection) -> list[str]:
    delta = "what training added" if found.additive else "the trained weight less the base's"
    of = "" if found.additive else " of s·BA, its low-rank part"
    return [line.format(delta=delta, of=of) for line in _LEGEND[1 if found.no_base else 0 :]]


def _summary(found: Inspection) -> list[str]:
    if not any(module.spectrum.norm for module in found.modules):
        return ["nothing was learned: every update is 0"]
    kept = ", ".join(f"{r}: {found.kept(r):.1%}" for r in _some_ranks(found))
    lines = [f"kept of all updates by one rank everywhere: {kept}", *([early] if (early := too_early(found)) else [])]
    if found.beside:
        names = ", ".join(found.beside[:3]) + (" …" if len(found.beside) > 3 else "")
        lines.append(f"trained whole, without a rank: {counted(len(found.beside), 'tensor')} ({names})")
    return lines


def too_early(found: Inspection) -> str:
    """The line on a run too short to say anything of its rank; empty where it is not."""
    if not found.early:
        return ""
    return f"whether r fits: too early to tell after {counted(found.steps or 0, 'step')}; train for {SETTLED} or more"


def _some_ranks(found: Inspection) -> Sequence[int]:
    """Powers of two below the highest rank, the one that keeps 90 %, and the highest."""
    highest = max(len(module.spectrum.values) for module in found.modules)
    powers = [2**power for power in range(20) if 2**power < highest]
    return sorted({*powers[-_RANKS:], found.needed, highest})
