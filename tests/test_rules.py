"""The rules that hold themselves: style, layers, no circle of modules, types; and that breaking one is seen."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINT_IMPORTS = "from importlinter.cli import lint_imports_command; lint_imports_command()"


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with some arguments, in a checkout or a copy of it, whose package it imports."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "NO_COLOR": "1", "COLUMNS": "160"}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A checkout to plant faults in."""
    shutil.copytree(ROOT / "qlora_tool", tmp_path / "qlora_tool", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def plant(folder: Path, file: str, text: str) -> None:
    """Append lines to a file of the package."""
    with (folder / "qlora_tool" / file).open("a", encoding="utf-8") as stream:
        stream.write(text)


def test_style():
    done = run(ROOT, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", ".")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_planted_function_without_docstring_is_seen(copy: Path):
    plant(copy, "files/hashes.py", "\n\ndef planted() -> None:\n    pass\n")
    done = run(copy, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", "qlora_tool")
    assert done.returncode == 1 and "D103" in done.stdout and done.stdout.count("hashes.py") == 1, done.stdout


def test_layers():
    done = run(ROOT, "-c", LINT_IMPORTS, "--no-cache")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "line", "seen"),
    [
        ("files/hashes.py", "import qlora_tool.ops.loss\n", "qlora_tool.files.hashes -> qlora_tool.ops.loss"),
        ("training/step.py", "def f():\n    import qlora_tool.memory.profile\n",
         "qlora_tool.training.step -> qlora_tool.memory.profile"),
        ("methods/lora.py", "if TYPE_CHECKING:\n    from qlora_tool.config import Config\n",
         "qlora_tool.methods.lora -> qlora_tool.config"),
        ("planted.py", "\n", "qlora_tool.planted"),  # has no place among the layers
    ],
)  # fmt: skip
def test_what_a_planted_line_does_to_the_layers_is_seen(copy: Path, file: str, line: str, seen: str):
    plant(copy, file, line)
    done = run(copy, "-c", LINT_IMPORTS, "--no-cache")
    assert done.returncode == 1 and seen in done.stdout, done.stdout + done.stderr


def circle(imports: dict[str, set[str]]) -> list[str] | None:
    """Modules of which each imports the next, and the last the first; None where there are none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def test_no_modules_import_each_other():
    grimp = pytest.importorskip("grimp", reason="of the test extra, which a card's machine may lack")
    graph = grimp.build_graph("qlora_tool", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert "qlora_tool.ops.lora" in imports["qlora_tool.methods.lora"]
    assert circle(imports) is None
    imports["qlora_tool.ops.lora"].add("qlora_tool.methods.lora")
    assert {"qlora_tool.ops.lora", "qlora_tool.methods.lora"} <= set(circle(imports))  # by way of others, it may be


def test_types_and_a_planted_wrong_one(copy: Path):
    # In one test: the second run takes from the first one's cache all but what changed.
    mypy = ("-m", "mypy", "--cache-dir", str(copy / "cache"))
    done = run(copy, *mypy)
    assert done.returncode == 0, done.stdout + done.stderr
    plant(copy, "config/compare.py", "\n\ndef planted(number: int) -> str:\n    return number\n")
    plant(copy, "files/hashes.py", "\n\ndef planted(number):\n    return number\n")
    done = run(copy, *mypy)
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert done.returncode == 1 and len(errors) == 2, done.stdout + done.stderr
    assert any("compare.py" in line and "[return-value]" in line for line in errors)
    assert any("hashes.py" in line and "[no-untyped-def]" in line for line in errors)


def test_no_two_test_files_have_one_name():
    """Which pytest needs, as tests are no package."""
    names = [file.name for file in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})
