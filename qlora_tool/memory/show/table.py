"""The memory breakdown in a terminal: a table, and a bar of what the memory is full of."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_tool.memory.breakdown import PARTS, Breakdown, MemoryReport
from qlora_tool.memory.plan.limit import without_limit
from qlora_tool.memory.show.legend import (
    COLOURS,
    Unit,
    difference,
    fit,
    group_modules,
    limit,
    part_names,
    report_rows,
)
from qlora_tool.memory.show.say import say, say_beside
from qlora_tool.sizes import memory_size

_LETTERS = dict(zip(PARTS, "BQWAGObsrTF", strict=True)) | {"unused": "u", "context": "C", "free": "."}
_COLOURS = COLOURS | {"unused": "#c8ccd0", "context": "#5f6368", "free": "#5f6368"}
_LABEL = 11  # columns before a bar


def render_report(
    report: MemoryReport,
    *,
    budget: int | None = None,
    budget_name: str = "",
    unquantized: Mapping[str, int] | None = None,
    console: Console,
) -> None:
    """Print a report: what the peak is made of, what the device has to give for it, and the peak of each phase.

    Args:
        report: with a prediction, a measurement or both.
        budget: bytes that the device can give to one process (what the driver keeps is not among them).
        budget_name: what to call it, e.g. the name of the card.
        unquantized: bytes of each module that is left unquantized though quantization was asked for, or that the
            prediction could not follow.
        console: where to; 80 columns are enough for the tables, and neither colour nor a terminal is needed.
    """
    breakdowns = report.breakdowns
    if not breakdowns:
        say(console, "no memory was predicted or measured")
        return
    for number, (name, breakdown) in enumerate(breakdowns.items()):
        verdict, peak = fit(breakdown, budget, budget_name, report.processes)
        if budget is None and not number:
            verdict = without_limit(breakdown.needed_bytes, report.device)
        phrases = [phrase for phrase in (verdict, peak) if phrase]
        say_beside(console, f"{name}:", phrases, _LABEL)
    console.print()
    console.print(_table(report, budget, budget_name))
    compared = "; difference: predicted less measured" if len(breakdowns) == 2 else ""
    say(console, f"on {report.device}; 1 GiB is 2^30 bytes{compared}\n", "dim")
    scale = max([budget or 0, *(breakdown.needed_bytes for breakdown in breakdowns.values())])
    bars = {name: bar_cells(breakdown, scale, console.width - _LABEL) for name, breakdown in breakdowns.items()}
    coloured = _shows_colours(console)
    console.print(_bars(bars, coloured))
    say(console, _scale_line(scale, budget, budget_name, console.width - _LABEL), "dim")
    console.print(_legend(bars, part_names(report.config), coloured, console.width))
    if unquantized:
        console.print()
        console.print(_whole_modules(unquantized))


def _table(report: MemoryReport, budget: int | None, budget_name: str) -> Table:
    both = len(report.breakdowns) == 2
    table, unit = _plain_table(""), Unit.of(report)
    for name in report.breakdowns:
        table.add_column(f"{name}\n{unit.name}", justify="right", no_wrap=True)
    if both:
        table.add_column(f"difference\n{unit.name}", justify="right", no_wrap=True)
        table.add_column("\n%", justify="right", no_wrap=True)
    for number, section in enumerate(report_rows(report, budget=budget, budget_name=budget_name)):
        if number:
            table.add_row()
        for row in section:
            name = Text(f"  {row.name}" if row.part_of else row.name)
            cells = [unit.told(value) for value in row.sizes.values()]
            table.add_row(name, *cells, *(difference(row, unit) if both else ()), style="bold" if row.strong else "")
    return table


def _plain_table(first_heading: str) -> Table:
    table = Table(box=None, padding=(0, 0, 0, 2), pad_edge=False, header_style="bold")
    table.add_column(first_heading, overflow="fold")
    return table


def bar_cells(breakdown: Breakdown, scale: int, width: int) -> dict[str, int]:
    """How many of `width` cells each part takes in a bar that stands for `scale` bytes, in stacking order.

    After the parts come what the allocator reserved and did not use at the peak, the CUDA context, and what is free.
    A part that takes less than half a cell may take none.
    """
    context = breakdown.context_bytes or 0
    unused = max(0, breakdown.needed_bytes - context - breakdown.peak_bytes)
    cells, total, drawn = {}, 0, 0
    for part, part_bytes in {**breakdown.parts, "unused": unused, "context": context}.items():
        total += part_bytes
        end = round(total / scale * width) if scale else 0
        if end > drawn:
            cells[part], drawn = end - drawn, end
    if width > drawn:
        cells["free"] = width - drawn
    return cells


def _shows_colours(console: Console) -> bool:
    """Whether the parts can be told apart by colour; sixteen colours are too few, letters are used then."""
    return console.color_system in ("256", "truecolor") and not console.no_color and not console.options.ascii_only


def _bars(bars: Mapping[str, Mapping[str, int]], coloured: bool) -> Text:
    lines = []
    for name, cells in bars.items():
        line = Text(f"{name:<{_LABEL}}")
        for part, count in cells.items():
            line.append_text(_mark(part, count, coloured))
        lines.append(line)
    return Text("\n").join(lines)


def _mark(part: str, count: int, coloured: bool) -> Text:
    if coloured:
        return Text(("·" if part == "free" else "█") * count, style=_COLOURS[part])
    return Text(_LETTERS[part] * count)


def _scale_line(scale: int, budget: int | None, budget_name: str, width: int) -> str:
    """What the length of the bars stands for; where the limit is, if they go past it."""
    if budget is None:
        return f"{'':<{_LABEL}}the whole bar: {memory_size(scale)}\n"
    if budget == scale:
        return f"{'':<{_LABEL}}the whole bar: {limit(budget, budget_name)}\n"
    column, label = round(budget / scale * width), limit(budget, budget_name)
    line = f"{label} ^".rjust(column) if column >= len(label) + 2 else f"{'^':>{max(column, 1)}} {label}"
    return f"{'':<{_LABEL}}{line}\n"


def _legend(bars: Mapping[str, Mapping[str, int]], names: Mapping[str, str], coloured: bool, width: int) -> Text:
    """What the colours or letters of the bars mean, in as many columns as there is room for."""
    names = {**names, "unused": "reserved, unused", "context": "CUDA context", "free": "free"}
    seen = [part for part in _LETTERS if any(part in cells for cells in bars.values())]
    cell = max(len(names[part]) for part in seen) + 4
    columns = max(1, width // cell)
    rows = -(-len(seen) // columns)
    lines = []
    for row in range(rows):
        line = Text()
        for part in seen[row::rows]:
            line.append_text(_mark(part, 1, coloured)).append(f" {names[part]:<{cell - 2}}")
        line.rstrip()
        lines.append(line)
    return Text("\n").join(lines)


def _whole_modules(unquantized: Mapping[str, int]) -> Table:
    table = _plain_table("left unquantized")
    table.add_column("", justify="right", no_wrap=True)
    for name, size in group_modules(unquantized):
        table.add_row(Text(name), memory_size(size))
    return table
