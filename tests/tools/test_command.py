"""The command in front of the subjects: its help, its exit codes, and that it enters the environment by itself."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from measuring.command import at_least, exit_code, list_of_subjects, load_subject, main, parser_of

TOOLS = Path(__file__).parents[2] / "tools"
PACKAGES = {name: importlib.import_module(name) for name in ("measuring", "making")}
SUBJECTS = [(package, name) for package, module in PACKAGES.items() for name in module.SUBJECTS]


@pytest.mark.parametrize(("package", "name"), SUBJECTS)
def test_every_subject_has_a_line_and_a_help(package: str, name: str):
    (line,) = [line for line in list_of_subjects(package).splitlines() if line.startswith(f"  {name} ")]
    subject = load_subject(package, name)
    about = subject.__doc__.splitlines()[0]
    assert line.split(maxsplit=1)[1] == about and len(line) < 120
    assert about in parser_of(subject).format_help() and callable(subject.run)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_list_is_complete(package: str):
    """A module that can be run as a subject is one."""
    folder = TOOLS / package
    modules = [file.stem for file in folder.glob("*.py")]
    modules += [file.parent.name for file in folder.glob("*/__init__.py")]
    modules.remove("__init__")
    runnable = {name for name in modules if hasattr(importlib.import_module(f"{package}.{name}"), "add_options")}
    assert {name.replace("_", "-") for name in runnable} == set(PACKAGES[package].SUBJECTS)


def test_help_needs_the_standard_library_alone(tmp_path: Path):
    """With a Python that has no package at all: `-S` leaves site-packages out."""
    bare = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-S", TOOLS / "measure", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=bare)
    assert done.returncode == 0 and "training-memory" in done.stdout, done.stderr


def test_without_the_packages_the_environment_is_entered(tmp_path: Path, monkeypatch, capfd):
    """Its Python, here a script that tells how it was called, gets the same command line, and its exit code counts."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "called $@"\nexit 5\n')
    python.chmod(0o755)
    command = importlib.import_module("measuring.command")
    monkeypatch.setattr(command, "NEEDED", ("no_such_module_anywhere",))
    monkeypatch.setattr(command, "ready_python", lambda modules: print("making it") or python)
    monkeypatch.setattr("sys.argv", ["tools/make", "configuration-page"])
    assert main("making") == 5
    said = capfd.readouterr()
    assert said.out == "called tools/make configuration-page\n"  # nothing of the environment's own on stdout
    assert "making it" in said.err


def test_a_misspelt_subject(capsys):
    assert main("measuring", ["benchmrk"]) == 2
    assert "did you mean benchmark?" in capsys.readouterr().err
    assert main("measuring", []) == 2 and main("measuring", ["--help"]) == 0


@pytest.fixture
def subject(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A subject that returns what is asked of it."""
    module = ModuleType("measuring.made_for_a_test", "Nothing.")
    module.add_options = lambda parser: parser.add_argument("--json", type=Path)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(PACKAGES["measuring"], "SUBJECTS", ("made-for-a-test",))
    return module


@pytest.mark.parametrize(("results", "code"), [({"a": 1}, 0), ({"passed": True}, 0), ({"passed": False}, 1), (None, 0)])
def test_the_exit_code_is_the_verdict(subject: ModuleType, tmp_path: Path, results: dict | None, code: int):
    subject.run = lambda options: results
    assert main("measuring", ["made-for-a-test", "--json", str(tmp_path / "r.json")]) == code
    if results is None:
        assert not (tmp_path / "r.json").exists()
    else:
        found = json.loads((tmp_path / "r.json").read_text())
        assert found.pop("machine")["cores"] >= 1 and found == results


def test_figures_are_saved_before_they_are_shown(subject: ModuleType, tmp_path: Path):
    """A fault in a table does not lose what hours of measuring found."""
    subject.run = lambda options: {"a": 1}
    subject.show = lambda results: results["missing"]
    with pytest.raises(KeyError):
        main("measuring", ["made-for-a-test", "--json", str(tmp_path / "r.json")])
    assert json.loads((tmp_path / "r.json").read_text())["a"] == 1


def test_known_errors_are_lines(capsys, tmp_path: Path):
    from qlora_tool.errors import MachineError, UserError

    for error, code, lines in ((UserError(["one", "two"]), 2, ["one", "two"]), (MachineError("disk"), 1, ["disk"]),
                               (KeyboardInterrupt(), 130, [])):  # fmt: skip

        def work(error=error) -> int:
            raise error

        assert exit_code(work) == code
        assert capsys.readouterr().err.splitlines() == [f"error: {line}" for line in lines]
    assert exit_code(lambda: len((tmp_path / "absent").read_text())) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'absent'}: No such file or directory\n"


def test_numbers_have_a_least():
    assert at_least(2)("2") == 2
    with pytest.raises(Exception, match="1 found, at least 2 expected"):
        at_least(2)("1")
