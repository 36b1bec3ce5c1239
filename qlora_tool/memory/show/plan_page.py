"""A plan in the page of `html.write_html`: what the terminal says of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape

from qlora_tool.memory.plan.result import Plan
from qlora_tool.memory.show.plan_table import (
    LENGTH_HEADINGS,
    NOTE,
    alternative_headings,
    alternative_rows,
    answer,
    faster,
    headline,
    length_rows,
)


def plan_section(plan: Plan) -> Iterator[str]:
    """The section, line by line: the headline, both tables, and what to change with the line to copy.

    A note stands below its setting, so that four columns are left, which a telephone has room for.
    """
    yield '  <section id="plan" aria-label="Plan">\n    <h2>Plan</h2>'
    target, asked = headline(plan).split("\n", 1)
    yield f"    <p>{escape(target)}</p>"
    over = "" if plan.fits else ' class="over"'
    yield f"    <p><strong{over}>{escape(asked)}</strong></p>"
    yield from _answer(plan)
    yield from _table(LENGTH_HEADINGS, ((escape(name), cells) for name, *cells in length_rows(plan)))
    noted = ((f'{escape(setting)}<span class="note">{escape(note)}</span>' if note else escape(setting), cells)
             for setting, *cells, note in alternative_rows(plan))  # fmt: skip
    yield from _table(alternative_headings(plan), noted)
    yield f'    <p class="note">{escape(NOTE)}</p>\n  </section>'


def _answer(plan: Plan) -> Iterator[str]:
    if plan.faster:
        yield f"    <p>{escape(faster(plan.faster))}</p>\n    <pre>{escape(plan.faster.line)}</pre>"
    yield f"    <p>{escape(answer(plan))}</p>"
    if plan.line:
        yield f"    <pre>{escape(plan.line)}</pre>"


def _table(headings: Iterable[str], rows: Iterable[tuple[str, list[str]]]) -> Iterator[str]:
    """Of each row the first cell is HTML already."""
    yield '    <table class="breakdown"><thead><tr>' + "".join(f"<th>{escape(name)}</th>" for name in headings)
    yield "    </tr></thead><tbody>"
    for first, cells in rows:
        muted = "" if cells[-1] else ' class="muted"'
        yield f"      <tr{muted}><td>{first}</td>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
    yield "    </tbody></table>"
