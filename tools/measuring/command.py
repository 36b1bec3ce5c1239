"""One command line for all subjects: `tools/measure SUBJECT [OPTION]...`; `tools/make` is another such command.

A subject is a module. Its docstring is its help, the first line of which the list of subjects shows. It has

    add_options(parser)      its options, `--json` and `--plot` among them where it has them
    run(options)             does the work and returns the results: a mapping, or None where nothing is to be shown
    show(results)            prints them, if it is there
    plot(results)            draws them as a matplotlib figure, if it is there

and the exit code is 1 where `results["passed"]` is False.
"""

from __future__ import annotations

import argparse
import ast
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
NEEDED = ("torch", "transformers", "pydantic", "yaml")  # without one of them the environment is made and entered


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
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(subjects)}"
        print(f"error: {PROGRAMS[package]} {name}: there is no such subject; {hint}", file=sys.stderr)
        return 2
    if missing := [module for module in NEEDED if importlib.util.find_spec(module) is None]:
        return _in_environment(missing)
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))  # the checkout's own package, installed or not
    subject = load_subject(package, name)
    options = parser_of(subject).parse_args(rest)
    return exit_code(lambda: _run(subject, options))


def list_of_subjects(package: str) -> str:
    """The help of the command, with a line for each subject, none of which is imported for it."""
    module, program = importlib.import_module(package), PROGRAMS[package]
    width = max(map(len, module.SUBJECTS)) + 2
    lines = []
    for name in module.SUBJECTS:
        source = Path(importlib.util.find_spec(_module_name(package, name)).origin).read_text(encoding="utf-8")
        about = ast.get_docstring(ast.parse(source)).partition("\n")[0]
        lines.append(f"  {name:{width}}{about}")
    head = [f"usage: {program} SUBJECT [OPTION]...", "", inspect.getdoc(module), "", "subjects:"]
    return "\n".join([*head, *lines, "", f"`{program} SUBJECT --help` tells the rest."])


def load_subject(package: str, name: str) -> ModuleType:
    """The module of a subject."""
    return importlib.import_module(_module_name(package, name))


def _module_name(package: str, subject: str) -> str:
    return f"{package}.{subject.replace('-', '_')}"


def parser_of(subject: ModuleType) -> argparse.ArgumentParser:
    """The parser of a subject's options."""
    package, _, name = subject.__name__.partition(".")
    program = f"{PROGRAMS[package]} {name.replace('_', '-')}"
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=program, description=subject.__doc__, formatter_class=form)
    subject.add_options(parser)
    return parser


def _run(subject: ModuleType, options: argparse.Namespace) -> int:
    """Run a subject, save what it found, show and draw it."""
    from measuring.results import save_plot, save_results, say

    start = time.perf_counter()
    results = subject.run(options)
    if results is None:
        return 0
    save_results(getattr(options, "json", None), results)
    if hasattr(subject, "show"):
        subject.show(results)
    if getattr(options, "plot", None):
        save_plot(subject.plot(results), options.plot)
    say(f"{time.perf_counter() - start:,.0f} s in all")
    return 1 if results.get("passed") is False else 0


def exit_code(work: Callable[[], int]) -> int:
    """What `work` returns; where it ends with a known error, whose lines go to stderr, the error's exit code."""
    from qlora_tool.errors import ToolError

    try:
        return work()
    except ToolError as error:
        lines, code = error.lines, error.exit_code
    except OSError as error:
        lines, code = [f"{error.filename2 or error.filename}: {error.strerror}"], 1
    except KeyboardInterrupt:
        return 130
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    return code


def _in_environment(missing: Sequence[str]) -> int:
    """Run the same command line again with the Python of the environment that `tools/test` makes."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            python = ready_python(TEST_MODULES)
        if Path(sys.executable) == python:
            raise EnvironmentFailure(f"{python} lacks {', '.join(missing)}; remove .venv, and it is made anew")
    except EnvironmentFailure as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    return subprocess.call([str(python), *sys.argv])


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


def rows_of(file: Path) -> list[str]:
    """The lines of a JSONL file. `str.splitlines` would cut inside texts, at characters that JSON does not escape."""
    return file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
