"""What the subjects do with figures: a table on stdout, JSON beside the machine they come from, plots."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "bitsandbytes", "peft", "safetensors")


def say(line: str) -> None:
    """A line of progress, on stderr."""
    print(line, file=sys.stderr, flush=True)


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


def mb(size: float) -> str:
    """Bytes as MB for a table."""
    return f"{size / 1e6:,.1f}"


def show_sizes(title: str, sizes: dict[str, float]) -> None:
    """A table of bytes, as MB."""
    show_table([(title, "MB"), *((label, mb(size)) for label, size in sizes.items())])


def passed_or_missed(passed: bool) -> str:
    """The word for it."""
    return "passed" if passed else "MISSED"


def machine() -> dict[str, Any]:
    """What a figure depends on: the processor, its cores, and the versions of the packages at work."""
    versions: dict[str, str | None] = {}
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
        from qlora_tool.files.atomic import write_json

        write_json(file, {"machine": machine(), **results})


def new_figure(columns: int = 1, **settings: Any) -> tuple[Any, Any]:
    """A matplotlib figure and its axes, drawn without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, **settings)


def save_plot(figure: Any, file: Path) -> None:
    """Write a matplotlib figure; the name's ending decides the format."""
    from matplotlib import pyplot

    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
