"""One command line for all subjects: `tools/measure SUBJECT [OPTION]...`, and `tools/make SUBJECT [OPTION]...` likewise.

A subject is a module. Its docstring is its help, the first line of it what the list of subjects shows. It has

    add_options(parser)      its options, `--json` and `--plot` among them where it has them
    run(options)             does the work and returns the results: a mapping, or nothing to be shown or saved
    show(results)            prints them, if it is there
    plot(results)            draws them as a matplotlib figure, if it is there

and the exit code is 1 where `results["passed"]` is False.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import importlib.util
import inspect
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from making.environment import ROOT, TEST_MODULES, EnvironmentFailure, ready_python

PROGRAMS = {"measuring": "tools/measure", "making": "tools/make"}
STANDARD_LIBRARY_ALONE = ("demo-data",)


def main(package: str, arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for.

    Args:
        package: `measuring` or `making`.
        arguments: by default those of the command line.

    Returns:
        The exit code.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    subjects = importlib.import_module(package).SUBJECTS
    if name in ("", "-h", "--help"):
        print(list_of_subjects(package))
        return 0 if name else 2
    if name not in subjects:
        near = difflib.get_close_matches(name, subjects, 1)
        hint = f"; did you mean {near[0]}?" if near else f"; expected one of {', '.join(subjects)}"
        print(f"error: {PROGRAMS[package]} {name}: there is no such subject{hint}", file=sys.stderr)
        return 2
    if name not in STANDARD_LIBRARY_ALONE and _missing():
        return _in_environment()
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))  # the checkout's own package, installed or not
    return run_subject(load_subject(package, name), rest)


def list_of_subjects(package: str) -> str:
    """The help of the command: its subjects, a line each; no subject is imported for it."""
    import ast

    module, program = importlib.import_module(package), PROGRAMS[package]
    lines = []
    for name in module.SUBJECTS:
        source = Path(importlib.util.find_spec(_module_name(package, name)).origin).read_text(encoding="utf-8")
        lines.append(f"  {name:{2 + max(map(len, module.SUBJECTS))}}{_first_line(ast.get_docstring(ast.parse(source)))}")
    return "\n".join([
        f"usage: {program} SUBJECT [OPTION]...", "", inspect.getdoc(module), "", "subjects:", *lines, "",
        f"`{program} SUBJECT --help` tells the rest of one.",
    ])  # fmt: skip


def load_subject(package: str, name: str) -> ModuleType:
    """The module of a subject."""
    return importlib.import_module(_module_name(package, name))


def parser_of(subject: ModuleType) -> argparse.ArgumentParser:
    """The parser of a subject's options."""
    package, _, name = subject.__name__.partition(".")
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAMS[package]} {name.replace('_', '-')}", description=subject.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    subject.add_options(parser)
    return parser


def run_subject(subject: ModuleType, arguments: Sequence[str]) -> int:
    """Parse the options, run, show, save and draw.

    Returns:
        The exit code; a fault that is known becomes `error:` lines instead of a traceback.
    """
    from measuring.results import save_plot, save_results

    options = parser_of(subject).parse_args(arguments)

    def run() -> int:
        start = time.perf_counter()
        results = subject.run(options)
        if results is None:
            return 0
        if hasattr(subject, "show"):
            subject.show(results)
        save_results(getattr(options, "json", None), results)
        if getattr(options, "plot", None):
            save_plot(subject.plot(results), options.plot)
        print(f"{time.perf_counter() - start:,.0f} s in all", file=sys.stderr)
        return 1 if results.get("passed") is False else 0

    return exit_code(run)


def exit_code(work: Callable[[], int]) -> int:
    """What `work` returns, or the exit code of the error it ends with, whose lines go to stderr."""
    from qlora_tool.errors import ToolError

    try:
        return work()
    except ToolError as error:
        for line in error.lines:
            print(f"error: {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


# ------------------------------------------------------------------------------------------- options that many have


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number of at least so much."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} found, at least {least} expected")
        return value

    return number


def add_model(parser: argparse.ArgumentParser) -> None:
    """The positional MODEL."""
    parser.add_argument("model", metavar="MODEL", help="a model folder, a hub id, or demo")


def add_outputs(parser: argparse.ArgumentParser, *, plot: str | None = None) -> None:
    """`--json`, and `--plot` with what it draws."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    if plot:
        parser.add_argument("--plot", type=Path, metavar="FILE.png", help=f"draw {plot}")


# --------------------------------------------------------------------------------------------------- the environment


def _missing() -> list[str]:
    return [name for name in ("torch", "transformers", "pydantic", "yaml") if importlib.util.find_spec(name) is None]


def _in_environment() -> int:
    """Run the same command line again with the Python of the environment that `tools/test` makes."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            python = ready_python(TEST_MODULES)
        if Path(sys.executable) == python:
            raise EnvironmentFailure(f"{python} lacks {', '.join(_missing())}; remove .venv, and it is made anew")
    except EnvironmentFailure as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    return subprocess.call([str(python), *sys.argv])


def _module_name(package: str, subject: str) -> str:
    return f"{package}.{subject.replace('-', '_')}"


def _first_line(text: str | None) -> str:
    return (text or "").partition("\n")[0]
