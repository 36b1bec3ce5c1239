"""What the sections of a report are made of."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from qlora_tool.reporting.escape import escaped

MOST_ROWS = 400
"""Of a table of numbers; of more every so manieth is shown."""


def section(name: str, title: str, body: Sequence[str]) -> str:
    """A section with its heading."""
    return f'<section id="{name}"><h2>{escaped(title)}</h2>\n' + "\n".join(body) + "\n</section>"


def missing(what: str, how: str) -> str:
    """What is not there, and the command that makes it (HTML; empty where there is none)."""
    return f'<p class="missing">{escaped(what)}{f": {how}" if how else ""}</p>'


def command(*words: str) -> str:
    """A command of this tool as it is typed, as HTML."""
    return f"<code>{escaped(' '.join(['qlora-tool', *map(shlex.quote, words)]))}</code>"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True) -> str:
    """A table of escaped cells, which scrolls by itself where it is wider than the page.

    Args:
        numbers: all columns but the first are.
    """
    head = "".join(f'<th scope="col">{escaped(cell)}</th>' for cell in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escaped(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    kind = ' class="numbers"' if numbers else ""
    inside = f"<table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scrolls" tabindex="0">{inside}</div>'


def numbers_table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, open_to: int, what: str) -> str:
    """A table behind a line to open it, open where it has no more than so many rows."""
    shown, note = rows, f"{len(rows):,} {what}"
    if len(rows) > MOST_ROWS:
        every = -(-len(rows) // MOST_ROWS)
        shown = [*rows[::every], *([rows[-1]] if (len(rows) - 1) % every else [])]
        note = f"{len(shown):,} of {len(rows):,} {what}"
    return (f'<details{" open" if len(rows) <= open_to else ""}><summary>{escaped(note)} in numbers</summary>'
            f"{table(heads, shown)}</details>")  # fmt: skip


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and what they stand for, two columns that become one on a narrow screen."""
    told = "".join(f"<div><dt>{escaped(name)}</dt><dd>{escaped(said)}</dd></div>" for name, said in pairs)
    return f"<dl>{told}</dl>"
