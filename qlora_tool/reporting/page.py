"""The page itself."""

from __future__ import annotations

import html
import logging
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from qlora_tool.files.atomic import write_text
from qlora_tool.files.results import MARKS
from qlora_tool.reporting import curves, tables
from qlora_tool.reporting.escape import escaped
from qlora_tool.reporting.found import Found, find
from qlora_tool.run_folder import RunFolder
from qlora_tool.training.takeover import remove_replaced

logger = logging.getLogger(__name__)

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="{generator}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<header><h1>{title}</h1>
{summary}
</header>
<main>
{main}
</main>
</body>
</html>
"""
_SECTIONS = (curves.losses, curves.rate_and_speed, curves.memory, tables.samples, tables.rows, tables.ranks,
             tables.exports, tables.configuration, tables.versions)  # fmt: skip


@dataclass(frozen=True)
class ReportResult:
    """A report.

    Attributes:
        file: the page.
        missing: what is not in it, in a line each, with the command that makes it.

    Example:
        >>> from qlora_tool import report
        >>> made = report("my-run", output="page.html")
        >>> made.file.name, made.file.stat().st_size > 0
        ('page.html', True)
    """

    file: Path
    missing: tuple[str, ...] = ()


def write_report(run: Path, output: Path | None = None) -> ReportResult:
    """Write the page about a run, of what lies in its folder.

    Args:
        run: the folder.
        output: the file; None: `report.html` in the run's folder.

    Raises:
        UserError: no run lies there.
        MachineError: the disk refuses.
    """
    found = find(run)
    file = output or found.folder.report
    page = page_of(found)
    write_text(file, page)
    return ReportResult(file, tuple(_missing(page)))


def report_of_finished(run: Path) -> Path | None:
    """The page of a run that has just ended. Whatever keeps it from being made is told, and costs no more than it."""
    try:
        return write_report(run).file
    except Exception as error:  # whatever it is: the adapter is there, and counts
        logger.debug("no report", exc_info=True)
        logger.warning("no report was written: %s; `qlora-tool report %s` tries again", error, run)
        return None


def complete_finished(run: Path) -> None:
    """Do what a run still does after its adapter is there, where it was killed in between: the run that it replaced is
    removed, and its page written."""
    folder = RunFolder(run)
    remove_replaced(folder)
    if not folder.report.exists() and (file := report_of_finished(run)) is not None:
        logger.info("%s: was missing, as the run ended before it was written; it is there now", file)


def page_of(found: Found) -> str:
    """The page, which loads nothing from elsewhere and runs nothing."""
    style = resources.files("qlora_tool.reporting").joinpath("page.css").read_text(encoding="utf-8")
    main = "\n".join(make(found) for make in _SECTIONS)
    return _PAGE.format(title=escaped(f"Run {found.name}", 200), style=style.strip(), summary=tables.summary(found),
                        main=main, generator=MARKS["report"])  # fmt: skip


def _missing(page: str) -> list[str]:
    """The lines of the page that say what is missing, as plain text."""
    lines = re.findall(r'<p class="missing">(.*?)</p>', page, re.DOTALL)
    return [html.unescape(re.sub(r"<[^>]+>", "", line)) for line in lines]
