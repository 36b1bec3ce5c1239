"""Commands parse, call and print: no function of the command line is long."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import qlora_tool.cli

FILES = sorted(Path(qlora_tool.cli.__file__).parent.glob("*.py"))
MOST_LINES = 40


def lengths(source: str) -> dict[str, int]:
    """Lines of every function, signature and docstring included, decorators not."""
    return {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def test_how_lines_are_counted():
    source = "class A:\n    @decorated(\n        1)\n    def f(\n        self,\n    ):\n        '''a\n\n        b'''\n"
    assert lengths(source) == {"f": 6}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_no_function_is_long(file: Path):
    long = {name: lines for name, lines in lengths(file.read_text(encoding="utf-8")).items() if lines > MOST_LINES}
    assert not long
    assert len(FILES) > 8
