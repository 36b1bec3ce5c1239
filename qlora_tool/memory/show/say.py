"""Sentences among tables: within a terminal's width they wrap, elsewhere each is one line."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text


def say(console: Console, text: str, style: str = "") -> None:
    """Print lines of text. A pipe and a file get each whole, so that commands in it can be searched for and copied."""
    console.print(Text(text, style=style), soft_wrap=not console.is_terminal)


def say_beside(console: Console, name: str, lines: list[str], width: int) -> None:
    """Print lines beside a name, the second and further ones below the first.

    Args:
        width: columns of the name.
    """
    if not console.is_terminal:
        say(console, "\n".join(f"{'' if number else name:<{width}}{line}" for number, line in enumerate(lines)))
        return
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(no_wrap=True, width=width - 1)
    grid.add_column()
    grid.add_row(name, Text("\n".join(lines)))
    console.print(grid)
