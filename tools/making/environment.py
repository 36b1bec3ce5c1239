"""The virtual environment that the tools work in: `.venv` in the checkout, made when missing.

Only the standard library is used here, since nothing else is there yet.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
CONSTRAINTS = ROOT / "tools" / "constraints.txt"
STAMP = VENV / "installed.sha256"
EXTRAS = "test,demo"
# What is imported from other packages; together they stand for an installation that is complete.
MODULES = ("torch", "transformers", "bitsandbytes", "accelerate", "datasets", "safetensors", "click", "pydantic")
MODULES += ("yaml", "rich", "matplotlib", "gguf")
TEST_MODULES = (*MODULES, "peft", "pytest", "xdist", "ruff", "mypy", "importlinter")


class EnvironmentFailure(Exception):
    """The environment could not be made; the text says why and what to do."""


def say(line: str = "") -> None:
    print(line, flush=True)


def shown(command: Sequence[str | Path]) -> str:
    """A command as one would type it in the checkout."""
    words = [str(word).replace(f"{ROOT}{os.sep}", "") for word in command]
    return "$ " + " ".join(f"'{word}'" if " " in word or "*" in word else word for word in words)


def venv_python() -> Path:
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def ready_python(modules: Sequence[str] = MODULES, *, use_running: bool = False) -> Path:
    """The Python that has all that is needed, after making and filling `.venv` where there is no such Python yet.

    An activated virtual environment that has every module is used as it is.

    Args:
        modules: what an environment must be able to import to be used as it is.
        use_running: take the running Python, and fail where it lacks something.

    Raises:
        EnvironmentFailure: Python is too old, the environment cannot be made, or pip fails.
    """
    if sys.version_info < (3, 10):  # noqa: UP036 -- a checkout may well be tried with an older Python
        raise EnvironmentFailure(f"Python {sys.version.split()[0]} at {sys.executable}; 3.10 or newer is needed")
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if use_running and missing:
        raise EnvironmentFailure(
            f"{sys.executable} lacks {', '.join(missing)}; install '.[{EXTRAS}]' there, or let .venv be made instead"
        )
    activated = sys.prefix != sys.base_prefix and Path(sys.prefix).resolve() != VENV
    if use_running or (activated and not missing):
        say(f"environment: the running one, {sys.prefix}")
        return Path(sys.executable)
    if not venv_python().exists():
        _make()
    wanted = _fingerprint()
    if not STAMP.exists() or STAMP.read_text() != wanted:
        _install()
        STAMP.write_text(wanted)
    else:
        say(f"environment: {VENV.name}, up to date")
    return venv_python()


def _make() -> None:
    say(f"making a virtual environment in {VENV.name} (Python {sys.version.split()[0]})")
    try:
        venv.create(VENV, clear=True, with_pip=True, symlinks=os.name != "nt")
    except (subprocess.CalledProcessError, OSError) as error:
        raise EnvironmentFailure(
            f"no virtual environment could be made in {VENV} ({error}); Debian and Ubuntu need the package python3-venv"
        ) from error


def _install() -> None:
    command = [venv_python(), "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-input"]
    command += ["-c", CONSTRAINTS, "-e", f".[{EXTRAS}]"]
    say(f"installing qlora-tool and what it needs at the versions of {CONSTRAINTS.relative_to(ROOT)} (a few minutes)")
    say(shown(command))
    # The build backend comes from the same list: older pips read the first variable, newer ones the second.
    pins = {"PIP_CONSTRAINT": str(CONSTRAINTS), "PIP_BUILD_CONSTRAINT": str(CONSTRAINTS)}
    done = subprocess.run([str(word) for word in command], cwd=ROOT, env={**os.environ, **pins})
    if done.returncode:
        raise EnvironmentFailure("pip could not install what is needed; it says above why")


def _fingerprint() -> str:
    """Changes whenever an installation made before no longer fits."""
    digest = hashlib.sha256(f"{sys.version_info[:2]} {EXTRAS}".encode())
    for file in (CONSTRAINTS, ROOT / "pyproject.toml"):
        digest.update(file.read_bytes())
    return digest.hexdigest()
