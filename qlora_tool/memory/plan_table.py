"""A plan in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_tool.memory.legend import binary_size, full_size

if TYPE_CHECKING:
    from qlora_tool.memory.plan import Option, Plan

_CHECKPOINTING = "training.gradient_checkpointing"


def render_plan(plan: Plan, console: Console) -> None:
    """Print whether the asked configuration fits, what else does, and last the line to copy, if there is one.

    Args:
        console: where to; 80 columns are enough, and neither colour nor a terminal is needed.
    """
    console.print(Text(_headline(plan)))
    console.print()
    console.print(_lengths(plan))
    console.print()
    console.print(_alternatives(plan))
    console.print(
        Text("peak: expected; speed: tokens per second against what was asked for, reckoned from the number of passes, "
             "not measured\n", style="dim")  # fmt: skip
    )
    console.print(Text(_answer(plan)))
    if plan.line:
        console.print(Text(plan.line), soft_wrap=True)  # whole, so that it can be copied


def _headline(plan: Plan) -> str:
    asked, free = plan.asked, plan.usable_bytes - plan.asked.peak_bytes
    kept = f", {plan.margin:.0%} of it kept free" if plan.margin else ", nothing kept free"
    verdict = f"it fits, {binary_size(free)} left" if plan.fits else f"it does not fit by {binary_size(-free)}"
    return (
        f"plan for {binary_size(plan.budget_bytes)} on {plan.device}{kept}\n"
        f"asked for: {_batch(asked)} take {full_size(asked.peak_bytes)}: {verdict}"
    )


def _batch(option: Option) -> str:
    return f"{option.rows} x {option.length} tokens"


def _plain_table(*headings: str) -> Table:
    table = Table(box=None, padding=(0, 0, 0, 2), pad_edge=False, header_style="bold")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    return table


def _lengths(plan: Plan) -> Table:
    table = _plain_table("the longest rows that fit", "rows", "tokens a row", "peak", "speed")
    before = None
    for option in plan.options:
        if option.group != "length":
            continue
        checkpointing = option.settings[_CHECKPOINTING]
        name = ("with checkpointing" if checkpointing else "without") if checkpointing != before else ""
        before = checkpointing
        length = str(option.length) if option.length else "none fit"
        speed = f"{option.speed:.2f}" if option.length else ""
        peak = binary_size(option.peak_bytes) if option.length else ""
        style = "" if option.length else "dim"
        table.add_row(Text(name), str(option.rows), length, peak, speed, style=style)
    return table


def _alternatives(plan: Plan) -> Table:
    table = _plain_table(f"with {_batch(plan.asked)}", "peak", "", "speed", "")
    for option in plan.options:
        if option.group == "length":
            continue
        fits = "fits" if option.fits else "too much"
        cells = (_setting(option.group, option.settings), binary_size(option.peak_bytes), fits, f"{option.speed:.2f}")
        table.add_row(Text(cells[0]), *cells[1:], "asked for" if option.asked else "")
    return table


def _setting(group: str, settings: dict[str, Any]) -> str:
    name = f"{group}={settings[group]}"
    return f"{name}, one scale" if not settings.get("model.double_quant", True) else name


def _answer(plan: Plan) -> str:
    if plan.change:
        size = full_size(plan.change.peak_bytes)
        return f"this makes it fit, with {size} at the peak ({_how_sure(plan.change.confirmed)}):"
    if plan.longest:
        size = full_size(plan.longest.peak_bytes)
        return f"nothing has to change; these are the longest rows, {size} at the peak ({_how_sure(plan.longest.confirmed)}):"
    if plan.fits:
        return "nothing has to change, and there are no longer rows that fit"
    weights = f"; the weights alone take {full_size(plan.weights_bytes)}" * (plan.weights_bytes > plan.usable_bytes)
    return (
        f"nothing makes it fit: the smallest that was tried takes {full_size(plan.smallest_bytes)}, "
        f"{binary_size(plan.misses_by)} too much{weights}"
    )


def _how_sure(confirmed: bool) -> str:
    return "traced at full depth" if confirmed else "estimated"
