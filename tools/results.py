"""What the measuring tools share: the checkout's own package, a table on stdout, JSON and errors.

Importing this module makes `qlora_tool` importable from the checkout, installed or not.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from environment import ROOT

if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from qlora_tool.errors import ToolError
from qlora_tool.files.atomic import write_json

PACKAGES = ("torch", "transformers", "bitsandbytes", "peft", "safetensors")


def show_table(rows: Sequence[Sequence[object]]) -> None:
    """Print rows of cells in columns: the first one to the left, the others to the right. The first row is the head."""
    cells = [[cell if isinstance(cell, str) else f"{cell:,}" for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for number, row in enumerate(cells):
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        print("  ".join([row[0].ljust(widths[0]), *rest]).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))
    sys.stdout.flush()


def machine() -> dict[str, Any]:
    """What a figure depends on: the processor, its cores, and the versions of the packages at work."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def save_results(file: Path | None, results: dict[str, Any]) -> None:
    """Write `results` and the machine they come from as JSON, where a file was asked for."""
    if file is not None:
        write_json(file, {"machine": machine(), **results})


def save_plot(figure, file: Path) -> None:
    """Write a matplotlib figure; the name's ending decides the format."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150, bbox_inches="tight")


def run_tool(main: Callable[[], int]) -> int:
    """The tool's exit code; a fault that is known becomes `error:` lines instead of a traceback."""
    try:
        return main()
    except ToolError as error:
        for line in error.lines:
            print(f"error: {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
