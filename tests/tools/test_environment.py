"""When the environment is made and filled, and when it is left as it is; and that tools/test ends as pytest does."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """making.environment, for a checkout in a folder of its own, with a pip that only notes that it was called."""
    specification = importlib.util.spec_from_file_location("environment_under_test", TOOLS / "making/environment.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    for name, value in {
        "ROOT": tmp_path,
        "VENV": tmp_path / ".venv",
        "OLDEST_VENV": tmp_path / ".venv-oldest",
        "CONSTRAINTS": tmp_path / "constraints.txt",
        "OLDEST_CONSTRAINTS": tmp_path / "constraints-oldest.txt",
    }.items():
        monkeypatch.setattr(module, name, value)
    (tmp_path / "constraints.txt").write_text("numpy==1\ntorch==1\n")
    (tmp_path / "constraints-oldest.txt").write_text("# older\ntorch==0\n")
    (tmp_path / "pyproject.toml").write_text("")
    module.pip_status, module.installations = 0, 0

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess:
        assert command[1:4] == ["-m", "pip", "install"] and command[-4] == "-c"
        module.pins = Path(command[-3]).read_text()
        module.installations += 1
        return subprocess.CompletedProcess(command, module.pip_status)

    monkeypatch.setattr(module.subprocess, "run", pip)
    monkeypatch.setattr(module.venv, "create", lambda folder, **_: _touch(module.venv_python(folder)))
    return module


def _touch(file: Path) -> None:
    file.parent.mkdir(parents=True)
    file.touch()


ABSENT = ("no_such_module_anywhere",)  # so that the Python of these tests is never taken as it is


def test_installed_again_only_when_the_pins_or_the_project_changed(environment, tmp_path: Path):
    assert environment.ready_python(ABSENT) == environment.venv_python()
    environment.ready_python(ABSENT)
    assert environment.installations == 1
    (tmp_path / "constraints.txt").write_text("torch==2\n")
    environment.ready_python(ABSENT)
    assert environment.installations == 2
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    environment.ready_python(ABSENT)
    assert environment.installations == 3


def test_the_oldest_versions_have_an_environment_of_their_own(environment, tmp_path: Path):
    assert environment.ready_python(ABSENT) == environment.venv_python()
    assert environment.pins == "numpy==1\ntorch==1\n"
    older = environment.ready_python(("json",), oldest=True)  # whatever the running Python has
    assert older == environment.venv_python(tmp_path / ".venv-oldest") and older != environment.venv_python()
    assert environment.pins == "numpy==1\ntorch==0\n"
    (tmp_path / "constraints-oldest.txt").write_text("torch==0.1\n")
    environment.ready_python(ABSENT)
    assert environment.installations == 2
    environment.ready_python(ABSENT, oldest=True)
    assert environment.installations == 3


def test_a_failed_installation_is_tried_again(environment):
    environment.pip_status = 1
    for tries in (1, 2):
        with pytest.raises(environment.EnvironmentFailure, match="pip could not install"):
            environment.ready_python(ABSENT)
        assert environment.installations == tries
    environment.pip_status = 0
    environment.ready_python(ABSENT)
    assert environment.installations == 3


def test_the_running_python_must_have_everything(environment):
    assert environment.ready_python(("json",), use_running=True) == Path(sys.executable)
    with pytest.raises(environment.EnvironmentFailure, match=ABSENT[0]):
        environment.ready_python(("json", *ABSENT), use_running=True)
    assert environment.installations == 0


@pytest.mark.parametrize(("content", "status"), [("def test(): assert 1", 0), ("def test(): assert 0", 1), ("", 5)])
def test_tools_test_ends_as_pytest_does(tmp_path: Path, content: str, status: int):
    file = tmp_path / "test_one.py"
    file.write_text(f"{content}\n")
    command = [sys.executable, TOOLS / "test", "--no-env", file, "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    assert "not slow and not cuda" in done.stdout
