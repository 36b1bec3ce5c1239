"""How the parts of memory are named, coloured and counted wherever they are shown: table, plot and page."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from qlora_tool.memory.breakdown import ACTIVATIONS, CATEGORIES, PHASES, Breakdown, MemoryReport
from qlora_tool.sizes import GIB, MIB, memory_size

COLOURS = {
    "base_weights": "#0b51a3",
    "quantization_state": "#77bef9",
    "other_weights": "#748798",
    "adapter_weights": "#b1e4aa",
    "gradients": "#23904d",
    "optimizer_state": "#f9d537",
    "boundaries": "#983500",
    "saved": "#e09a3e",
    "recomputed": "#e6dac8",
    "temporaries": "#9a4691",
    "framework": "#8a8278",
}
"""By part. Neighbours in the stack stay far apart for those who confuse red, green or blue hues too."""

_NAMES = {
    "base_weights": "base weights",
    "quantization_state": "quantization scales",
    "other_weights": "other weights",
    "adapter_weights": "adapter weights",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "activations": "activations",
    "boundaries": "checkpoint boundaries",
    "saved": "saved for backward",
    "recomputed": "recomputed",
    "temporaries": "temporaries",
    "framework": "framework",
}
_ELSEWHERE = {"host_bytes": "in host memory", "disk_bytes": "on the disk"}
_MODULES_NAMED = 8
_CODES = {"nf4": "4-bit codes", "fp4": "4-bit codes", "int8": "int8 codes"}


def part_names(config: Mapping[str, Any]) -> dict[str, str]:
    """What to call the categories and the kinds of activations, under a run's configuration.

    Args:
        config: with `model.quantization` and `model.embeddings`, which say how the base weights are stored; they may
            be missing.
    """
    model = config.get("model") or {}
    codes = _CODES.get(model.get("quantization"))
    if model.get("embeddings") == "int8" and codes != _CODES["int8"]:
        codes = f"{codes}, int8 embeddings" if codes else "int8 embeddings"
    return _NAMES | ({"base_weights": f"base weights ({codes})"} if codes else {})


@dataclass(frozen=True)
class Row:
    """One line of the table of a report.

    Attributes:
        name: what is counted.
        sizes: bytes by `predicted` and `measured`; None where it does not apply.
        part_of: the row is part of the one above it that has an empty `part_of`.
        strong: a sum.
        compared: predicted and measured are to be held against one another.
    """

    name: str
    sizes: dict[str, int | None]
    part_of: str = ""
    strong: bool = False
    compared: bool = True


def report_rows(
    report: MemoryReport, *, budget: int | None = None, budget_name: str = "", step_alone: bool = False
) -> list[list[Row]]:
    """The table of a report in its sections: what the peak is made of, what the device has to give, peaks of phases.
    Only the same moments are compared: what a peak is made of where both peaks are in the same phase.

    Args:
        budget: bytes that the run may take; with it come that limit and what is left of it.
        budget_name: what they are, in words; see `plan.limit.Limit`.
        step_alone: a step of a run was measured, and not the loading before it.
    """
    names = part_names(report.config)
    shown = report.breakdowns

    def row(name: str, read: Callable[[Breakdown], int | None], part_of: str = "", **kind: bool) -> Row:
        return Row(name, {key: read(breakdown) for key, breakdown in shown.items()}, part_of, **kind)

    peaks_in = {breakdown.peak_phase for breakdown in shown.values()}
    same, seen = len(peaks_in) == 1, not (step_alone and "load" in peaks_in)
    parts = []
    for category in CATEGORIES:
        parts.append(row(names[category], lambda b, c=category: b.at_peak[c], compared=same))
        if category == "activations":
            parts += [row(names[kind], lambda b, k=kind: b.activations[k], "activations", compared=same)
                      for kind in ACTIVATIONS]  # fmt: skip
    parts.append(row("peak, allocated at once", lambda b: b.peak_bytes, strong=True, compared=seen))

    device = []
    if any(b.reserved_bytes is not None or b.context_bytes is not None for b in shown.values()):
        device.append(row("reserved by the allocator", lambda b: b.reserved_bytes, compared=seen))
        device.append(row("CUDA context", lambda b: b.context_bytes))
        device.append(row("needed in all", lambda b: b.needed_bytes, strong=True, compared=seen))
    if budget is not None:
        device.append(row("usable" if budget_name else "limit", lambda b: budget, compared=False))
        device.append(row("left", lambda b: budget - b.needed_bytes, strong=True, compared=False))

    apart = [row(f"streamed, {name}", lambda b, k=key: b.elsewhere.get(k, 0)) for key, name in _ELSEWHERE.items()
             if any(b.elsewhere.get(key) for b in shown.values())]  # fmt: skip

    phases = [row(f"peak in {phase}", lambda b, p=phase: b.phase_peak_bytes[p]) for phase in PHASES]
    if step_alone and "measured" in shown:
        phases[0] = replace(phases[0], sizes=phases[0].sizes | {"measured": None})
    return [section for section in (parts, device, apart, phases) if section]


class Unit(NamedTuple):
    """What all sizes of one table are told in."""

    name: str
    bytes: int
    digits: int

    @classmethod
    def of(cls, report: MemoryReport) -> Unit:
        """GiB, but for a run that takes less than a tenth of one."""
        most = max(breakdown.needed_bytes for breakdown in report.breakdowns.values())
        return cls("GiB", GIB, 2) if most >= GIB / 10 else cls("MiB", MIB, 1)

    def told(self, size: int | None, sign: str = "") -> str:
        """A size without the unit; `0` is nothing at all, `0.00` a little, empty: it does not apply."""
        if not size:
            return "" if size is None else "0"
        return f"{size / self.bytes:{sign}.{self.digits}f}"


def difference(row: Row, unit: Unit) -> tuple[str, str]:
    """Predicted less measured, in a unit and as percent of what was measured; empty where there is nothing to
    compare."""
    predicted, measured = row.sizes.get("predicted"), row.sizes.get("measured")
    if predicted is None or measured is None or not row.compared:
        return "", ""
    if predicted == measured:
        return "0", ""
    share = f"{100 * (predicted - measured) / measured:+.2f}" if measured else ""
    return unit.told(predicted - measured, "+"), share


def fit(breakdown: Breakdown, budget: int | None, budget_name: str, processes: int = 1) -> tuple[str, str]:
    """A breakdown in two phrases: whether it fits (empty without a budget), and its peak, of one of several
    processes."""
    each = f", per process, of {processes}" if processes > 1 else ""
    peak = f"{memory_size(breakdown.peak_bytes)} at the peak, in {breakdown.peak_phase}{each}"
    if budget is None:
        return "", peak
    left = budget - breakdown.needed_bytes
    verdict, rest = ("yes, it fits", "left") if left >= 0 else ("no, it does not fit", "too much")
    needed = memory_size(breakdown.needed_bytes)
    return f"{verdict}: {needed} needed, {limit(budget, budget_name)}, {memory_size(abs(left))} {rest}", peak


def limit(budget: int, budget_name: str) -> str:
    """`22.34 GiB usable (95% of rtx-4090's 23.52 GiB)`; without a name, `the limit is 23.65 GiB`."""
    size = memory_size(budget)
    return f"{size} usable ({budget_name})" if budget_name else f"the limit is {size}"


def group_modules(sizes: Mapping[str, int]) -> list[tuple[str, int]]:
    """Bytes by module, the largest first: those that repeat in every layer in one line, small ones summed up (all those
    of 0.0 MiB, unless there are no others).

    Args:
        sizes: e.g. `model.layers.0.input_layernorm: 8192`; 32 such become `model.layers.*.input_layernorm (32)`.
    """
    sums: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for module, size in sizes.items():
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", module)
        sums[pattern] += size
        counts[pattern] += 1
    order = [(f"{name} ({counts[name]})" if counts[name] > 1 else name, size) for name, size in sums.most_common()]
    named = sum(size >= MIB / 20 for _, size in order) or len(order)
    if named == len(order) <= _MODULES_NAMED + 1:
        return order
    named = min(named, _MODULES_NAMED)
    rest = order[named:]
    return [*order[:named], (f"and {len(rest)} more", sum(size for _, size in rest))]
