"""The sections of a report that are drawn: losses, rate and speed, and memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from qlora_tool.memory.breakdown import PARTS
from qlora_tool.memory.show.html import breakdown_table
from qlora_tool.memory.show.legend import COLOURS, part_names
from qlora_tool.reporting.charts import Point, Series, area_chart, line_chart, number, ticks_between
from qlora_tool.reporting.escape import escaped
from qlora_tool.reporting.found import Found
from qlora_tool.reporting.parts import command, missing, numbers_table, section
from qlora_tool.sizes import GIB, MIB, memory_size

MOST_POINTS = 600
"""Of a line; of more the lowest and the highest of each stretch are drawn."""


def losses(found: Found) -> str:
    """Training and evaluation loss over the steps."""
    trained = found.series("loss")
    if not trained:
        return section("loss", "Loss and evaluation", [missing("no step is logged yet", _train(found))])
    series = [Series("training loss", thinned(trained))]
    kinds = ["two", "three", "four"]
    evaluated = {name: [*_before(found, name), *found.series(name)] for name in found.evaluations}
    for index, (name, points) in enumerate(evaluated.items()):
        series.append(Series(_said(name), thinned(points), kinds[index % len(kinds)], marked=True))
    body = [line_chart("Loss by step", series, unit="nats")]
    if "loss" in found.untuned:
        body.append(f"<p>Before the first step the loss on the first training rows was {number(found.untuned['loss'])}."
                    "</p>")  # fmt: skip
    if evaluated:
        steps = sorted({step for points in evaluated.values() for step, _ in points})
        known = {name: dict(points) for name, points in evaluated.items()}
        rows = [[number(step), *(_cell(known[name].get(step)) for name in evaluated)] for step in steps]
        body.append(numbers_table(["step", *map(_said, evaluated)], rows, open_to=12, what="evaluations"))
    else:
        body.append(missing("not evaluated while it trained; set data.eval, or measure it now",
                            command("evaluate", str(found.folder.path), "--data", "FILE")))  # fmt: skip
    rows = [[number(step), f"{loss:.4f}"] for step, loss in trained]
    body.append(numbers_table(["step", "training loss"], rows, open_to=0, what="logged steps"))
    return section("loss", "Loss and evaluation", body)


def rate_and_speed(found: Found) -> str:
    """Learning rate and tokens per second over the steps."""
    rates, speeds = found.series("learning_rate"), found.series("tokens_per_second")
    body = []
    if rates:
        body.append(line_chart("Learning rate by step", [Series("learning rate", thinned(rates))], unit="",
                               from_zero=True))  # fmt: skip
    if speeds:
        body.append(line_chart("Tokens a second by step", [Series("tokens a second", thinned(speeds), "two")],
                               unit="tokens/s", from_zero=True))  # fmt: skip
    else:
        body.append(missing("no speed was measured: the first step and one that is traced are left out, and there were "
                            "no others", ""))  # fmt: skip
    return section("speed", "Rate and speed", [f'<div class="two-columns">{"".join(body)}</div>'])


def memory(found: Found) -> str:
    """Memory by category, over one step and at its peak."""
    body = []
    if found.step_memory is not None:
        try:
            body.append(_over_a_step(found, found.step_memory))
        except (KeyError, TypeError, ValueError, IndexError):
            body.append(missing("what was noted of memory over a step cannot be read", _train(found)))
    else:
        body.append(missing("memory over a step was not seen: the second step of a run is watched", _train(found)))
    if found.memory is not None and found.memory.breakdowns:
        lines = [f"{name}: {memory_size(one.peak_bytes)} at the peak, in {one.peak_phase}"
                 for name, one in found.memory.breakdowns.items()]  # fmt: skip
        if len(lines) > 1:
            lines.append("Predicted is the run's largest batch, measured one early step with a batch of its own; "
                         "loading was not measured.")  # fmt: skip
        body.append("<p>" + "<br>".join(map(escaped, lines)) + "</p>")
        body.append(f'<div class="scrolls">{"".join(breakdown_table(found.memory, None, "", step_alone=True))}</div>')
        body.append("<p>To explore a step, byte by byte: " + command("profile-memory", str(found.folder.config_file),
                    "--device", found.memory.device, "--plot", "memory.html") + "</p>")  # fmt: skip
    else:
        body.append(missing("memory.json is not there, or cannot be read", command(
            "profile-memory", str(found.folder.config_file))))  # fmt: skip
    return section("memory", "Memory", body)


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most `MOST_POINTS` of them, the lowest and the highest of each stretch among them."""
    if len(points) <= MOST_POINTS:
        return list(points)
    stretches = MOST_POINTS // 2 - 1
    kept = {0, len(points) - 1}
    for stretch in range(stretches):
        inside = range(stretch * len(points) // stretches, (stretch + 1) * len(points) // stretches)
        kept |= {min(inside, key=lambda index: points[index][1]), max(inside, key=lambda index: points[index][1])}
    return [points[index] for index in sorted(kept)]


def _over_a_step(found: Found, step: dict[str, Any]) -> str:
    positions, end, parts = step["positions"], step["events"], step["parts"]
    names = part_names(found.memory.config if found.memory else {})
    layers = [(COLOURS[part], parts[part]) for part in PARTS]
    totals = [sum(levels) for levels in zip(*(levels for _, levels in layers), strict=True)]
    peak = max(totals)
    unit = GIB if peak >= GIB else MIB
    ticks = [unit * tick for tick in ticks_between(0, peak / unit, 6)]
    labels = [f"{tick / unit:g}{f' {_unit_name(unit)}' if tick == ticks[-1] else ''}" for tick in ticks]
    spans = [(span["phase"], span["start"], span["stop"]) for span in step["spans"]]
    shown = [part for part in reversed(PARTS) if any(parts[part])]
    at_peak = totals.index(peak)
    words = ", ".join(f"{names[part]} {memory_size(parts[part][at_peak])}" for part in shown if parts[part][at_peak])
    title = (f"Memory over step {number(step['step'])}, from allocation to allocation; the dot: "
             f"{memory_size(peak)} at the peak")  # fmt: skip
    chart = area_chart(title, f"Peak {memory_size(peak)}: {words}", positions, end, layers, ticks, labels, spans)
    return chart + '<ul class="legend">' + "".join(_legend(shown, names)) + "</ul>"


def _legend(parts: Sequence[str], names: dict[str, str]) -> Iterator[str]:
    for part in parts:
        yield f'<li><span class="swatch" style="background:{COLOURS[part]}"></span>{escaped(names[part])}</li>'


def _unit_name(unit: int) -> str:
    return "GiB" if unit == GIB else "MiB"


def _before(found: Found, name: str) -> list[Point]:
    """The loss of the untuned model, at step 0."""
    return [(0, found.untuned[name])] if name in found.untuned else []


def _said(name: str) -> str:
    inside = name.removeprefix("eval_").removesuffix("loss").strip("_")
    return f"evaluation loss, {inside}" if inside else "evaluation loss"


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _train(found: Found) -> str:
    return command("train", str(found.folder.config_file))
