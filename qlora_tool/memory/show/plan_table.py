"""A plan in a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_tool.memory.plan.changes import CHECKPOINTING, costs_of
from qlora_tool.memory.plan.result import Change, Option, Plan
from qlora_tool.memory.show.say import say
from qlora_tool.sizes import memory_size

NOTE = "peak: expected; speed: tokens/s against what was asked for, by counting passes, not measured"
LENGTH_HEADINGS = ("the longest rows that fit", "rows", "tokens a row", "peak", "speed")


def render_plan(plan: Plan, console: Console) -> None:
    """Print whether the asked configuration fits, what else does, and last the line to copy, if there is one.

    Args:
        console: where to; 80 columns are enough for the tables, and neither colour nor a terminal is needed.
    """
    say(console, headline(plan))
    console.print()
    console.print(_lengths(plan))
    console.print()
    console.print(_alternatives(plan))
    say(console, f"{NOTE}\n", "dim")
    if plan.faster:
        say(console, faster(plan.faster))
        console.print(Text(f"{plan.faster.line}\n"), soft_wrap=True)
    say(console, answer(plan))
    if plan.line:
        console.print(Text(plan.line), soft_wrap=True)  # whole, so that it can be copied


def headline(plan: Plan) -> str:
    """Two lines: for what the plan is, and whether what was asked for fits."""
    asked, free = plan.asked, plan.usable_bytes - plan.asked.peak_bytes
    kept = f", {plan.margin:.0%} of it kept free" if plan.margin else ""
    named = f", {plan.budget_name}" if plan.budget_name else ""
    card = f" ({plan.target})" if plan.target else ""
    verdict = f"it fits, {memory_size(free)} left" if plan.fits else f"it does not fit, {memory_size(-free)} too much"
    how = f", {plan.recomputation}" if plan.recomputation else ""
    return (
        f"plan for {memory_size(plan.budget_bytes)} on {plan.device}{card}{named}{kept}\n"
        f"asked for: {_batch(asked)} take {memory_size(asked.peak_bytes)}{how}: {verdict}"
        + (f"; {asked.streaming}" if asked.streaming else "")
    )


def _batch(option: Option) -> str:
    return f"{option.rows} x {option.length} tokens"


def _plain_table(*headings: str) -> Table:
    table = Table(box=None, padding=(0, 0, 0, 2), pad_edge=False, header_style="bold")
    for number, heading in enumerate(headings):
        # The first takes several lines where there is no room for it on one; sizes are never cut.
        table.add_column(heading, justify="right" if number else "left", no_wrap=number > 0, overflow="fold")
    return table


def _lengths(plan: Plan) -> Table:
    table = _plain_table(*LENGTH_HEADINGS)
    for name, *cells in length_rows(plan):
        table.add_row(Text(name), *cells, style="" if cells[-1] else "dim")
    return table


def length_rows(plan: Plan) -> Iterator[tuple[str, ...]]:
    """The cells under `LENGTH_HEADINGS`; the last is empty where none fit."""
    before = None
    for option in plan.options:
        if option.group != "length":
            continue
        checkpointing = option.settings[CHECKPOINTING]
        name = ("with checkpointing" if checkpointing else "without") if checkpointing != before else ""
        before = checkpointing
        length = str(option.length) if option.length else "none fit"
        speed = f"{option.speed:.2f}" if option.length else ""
        peak = memory_size(option.peak_bytes) if option.length else ""
        yield name, str(option.rows), length, peak, speed


def _alternatives(plan: Plan) -> Table:
    table = _plain_table(*alternative_headings(plan))
    table.add_column("")  # notes, which take several lines where there is no room for them on one
    for setting, *cells in alternative_rows(plan):
        table.add_row(Text(setting), *cells)
    return table


def alternative_headings(plan: Plan) -> tuple[str, ...]:
    """Of the columns but the last, of notes, which has none."""
    how = ", everything recomputed" if plan.recomputation else ""
    return f"with {_batch(plan.asked)}{how}", "peak", "", "speed"


def alternative_rows(plan: Plan) -> Iterator[tuple[str, ...]]:
    """The cells under `alternative_headings`, and a note."""
    for option in plan.options:
        if option.group == "length":
            continue
        fits = "fits" if option.fits else "too much"
        note = "asked for" if option.asked else "; ".join(_costs(option, plan))
        yield _setting(option.settings), memory_size(option.peak_bytes), fits, f"{option.speed:.2f}", note


def _setting(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key.partition('.')[2]}={str(value).lower()}" for key, value in settings.items())


def faster(change: Change) -> str:
    """What stands before its line to copy."""
    return f"faster, and it fits too: {_peak(change)}:"


def answer(plan: Plan) -> str:
    """What is to be changed, before the line to copy, where there is one."""
    if plan.change:
        costs = "".join(f"; {cost}" for cost in _costs(plan.change, plan))
        return f"this makes it fit: {_peak(plan.change)}{costs}:"
    models = f"the model's own limit, its max_position_embeddings of {plan.positions}"
    if plan.longest:
        bound = f"as long as {models}, allows" if plan.at_the_models_limit else "that fit"
        return f"nothing has to change; the longest rows {bound}: {_peak(plan.longest)}:"
    if plan.at_the_models_limit:
        return f"nothing has to change; rows of {plan.asked.length} tokens reach {models}: memory bounds no row"
    if plan.fits:
        return "nothing has to change, and no longer row fits"
    weights = f"; the weights alone take {memory_size(plan.weights_bytes)}" * (plan.weights_bytes > plan.usable_bytes)
    return (
        f"nothing makes it fit: the smallest that was tried takes {memory_size(plan.smallest_bytes)}, "
        f"{memory_size(plan.misses_by)} too much{weights}"
    )


def _costs(choice: Option | Change, plan: Plan) -> list[str]:
    """What it costs, but for what was asked for anyway, which the headline says."""
    asked, streaming = plan.asked.streaming, choice.streaming
    told = asked and streaming and (asked.source, asked.step_bytes) == (streaming.source, streaming.step_bytes)
    return costs_of(choice.settings) + ([str(streaming)] if streaming and not told else [])


def _peak(change: Change) -> str:
    how = "traced at full depth" if change.confirmed else "estimated"
    return f"{memory_size(change.peak_bytes)} ({how})"
