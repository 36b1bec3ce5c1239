"""The memory of a step as one HTML file to explore, which loads nothing from elsewhere."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from qlora_tool.files.atomic import write_text
from qlora_tool.files.results import MARKS
from qlora_tool.memory.breakdown import PARTS, MemoryReport
from qlora_tool.memory.show.legend import (
    COLOURS,
    Row,
    Unit,
    difference,
    fit,
    group_modules,
    part_names,
    report_rows,
)
from qlora_tool.memory.trace.timeline import Timeline
from qlora_tool.sizes import memory_size

_POINTS = 2000


def write_html(
    path: Path,
    timelines: Mapping[str, Timeline],
    report: MemoryReport,
    *,
    budget: int | None = None,
    budget_name: str = "",
    unquantized: Mapping[str, int] | None = None,
    title: str = "",
    plan: Iterable[str] = (),
) -> None:
    """Write the page: the timelines as a stacked area that answers to the pointer, the breakdown, the configuration.

    Args:
        path: the file to write.
        timelines: by `predicted` and `measured`, one of them or both.
        report: its breakdowns fill the table; those of the same names say what the allocator reserves, and the CUDA
            context.
        budget: bytes that the device can give to one process. The line is drawn where tensors reach it: the CUDA
            context is taken off.
        budget_name: what to call it, e.g. the name of the card.
        unquantized: bytes of each module that is left unquantized though quantization was asked for.
        title: of the page, e.g. the name of the model.
        plan: the section of a plan, line by line; see `plan_page.plan_section`.
    """
    names = part_names(report.config)
    data = {
        "parts": [{"name": names[part], "colour": COLOURS[part]} for part in PARTS],
        "budget": budget,
        "budget_name": budget_name,
        "timelines": [_encoded(name, timeline, report) for name, timeline in timelines.items()],
    }
    folder = resources.files("qlora_tool.memory.show")
    page, style, script = (
        folder.joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )
    filled = {
        "generator": MARKS["profile-memory"],
        "title": html.escape(title or f"Memory of a training step on {report.device}"),
        "style": style.strip(),
        "headlines": "\n".join(_headlines(report, budget, budget_name)),
        "table": "\n".join(breakdown_table(report, budget, budget_name)),
        "plan": "\n".join(plan),
        "modules": "\n".join(_modules(unquantized or {})),
        "config": html.escape(yaml.safe_dump(report.config, sort_keys=False, allow_unicode=True).strip()),
        "data": _inside_script(data),
        "script": script.strip(),
    }
    write_text(Path(path), re.sub(r"\{\{(\w+)\}\}", lambda match: filled[match[1]], page))


def _inside_script(value: Any) -> str:
    """JSON that no text in it can end the script element with, nor open a comment in it."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _encoded(name: str, timeline: Timeline, report: MemoryReport) -> dict[str, Any]:
    """A thinned timeline as short JSON: differences from point to point, and each name once."""
    thin = timeline.thin(_POINTS)
    used = [timeline.module_names[number] for number in thin.modules.tolist()]
    used += [timeline.operator_names[number] for number in thin.operators.tolist()]
    number_of = {text: number for number, text in enumerate(dict.fromkeys(used))}
    breakdown = report.breakdowns.get(name)
    return {
        "name": name,
        "events": len(timeline),
        "peak": thin.peak_index,
        "positions": np.diff(thin.positions, prepend=0).tolist(),
        "parts": [np.diff(part, prepend=0).tolist() for part in thin.part_bytes.T],
        "modules": [number_of[text] for text in used[: len(thin)]],
        "operators": [number_of[text] for text in used[len(thin) :]],
        "names": list(number_of),
        "spans": [
            {"phase": span.phase, "start": span.start, "stop": span.stop, "peak": span.peak_index}
            for span in timeline.phase_spans()
        ],
        "reserved": breakdown.reserved_bytes if breakdown else None,
        "context": breakdown.context_bytes if breakdown else None,
    }


def _headlines(report: MemoryReport, budget: int | None, budget_name: str) -> Iterator[str]:
    for name, breakdown in report.breakdowns.items():
        verdict, peak = fit(breakdown, budget, budget_name, report.processes)
        over = ' class="over"' if budget is not None and breakdown.needed_bytes > budget else ""
        said = f"<strong{over}>{html.escape(verdict)}</strong>; " if verdict else ""
        yield f"  <p>{name}: {said}{peak}</p>"


def breakdown_table(
    report: MemoryReport, budget: int | None, budget_name: str, *, step_alone: bool = False
) -> Iterator[str]:
    """The breakdown's sections, each a body of one table, line by line. For the arguments see `write_html` and
    `report_rows`."""
    names = list(report.breakdowns)
    compared = len(names) == 2
    yield '    <table class="breakdown"><thead>'
    heads = "".join(f"<th>{name}</th>" for name in names) + '<th colspan="2">difference</th>' * compared
    yield f"      <tr><th></th>{heads}</tr>"
    unit = Unit.of(report)
    units = f"<th>{unit.name}</th>" * len(names) + f"<th>{unit.name}</th><th>%</th>" * compared
    yield f"      <tr><th></th>{units}</tr></thead>"
    for section in report_rows(report, budget=budget, budget_name=budget_name, step_alone=step_alone):
        yield "    <tbody>"
        yield from (f"      {_row(row, unit, compared)}" for row in section)
        yield "    </tbody>"
    yield "    </table>"
    note = "; difference: predicted less measured" if compared else ""
    yield f'    <p class="note">1 GiB is 2³⁰ bytes{note}</p>'


def _row(row: Row, unit: Unit, compared: bool) -> str:
    kind = ' class="strong"' if row.strong else ' class="part"' if row.part_of else ""
    cells = [unit.told(value) for value in row.sizes.values()]
    if compared:
        cells += difference(row, unit)
    return f"<tr{kind}><td>{html.escape(row.name)}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _modules(unquantized: Mapping[str, int]) -> Iterator[str]:
    if not unquantized:
        return
    yield '  <section aria-label="Modules that are not quantized">\n    <h2>Left unquantized</h2>'
    yield '    <table class="breakdown"><thead><tr><th>module</th><th></th></tr></thead><tbody>'
    for name, size in group_modules(unquantized):
        yield f"      <tr><td>{html.escape(name)}</td><td>{memory_size(size)}</td></tr>"
    yield "    </tbody></table>\n  </section>"
