"""The virtual environments that the tools work in, made in the checkout when missing: `.venv`, and `.venv-oldest` with
the oldest torch and transformers that `pyproject.toml` allows.

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
OLDEST_VENV = ROOT / ".venv-oldest"
CONSTRAINTS = ROOT / "tools" / "constraints.txt"
OLDEST_CONSTRAINTS = ROOT / "tools" / "constraints-oldest.txt"  # those that differ
STAMP = "installed.sha256"
EXTRAS = "test,demo"
# What is imported from other packages; together they stand for an installation that is complete.
MODULES = ("torch", "transformers", "bitsandbytes", "accelerate", "datasets", "safetensors", "click", "pydantic")
MODULES += ("yaml", "rich", "matplotlib", "gguf")
TEST_MODULES = (*MODULES, "peft", "pytest", "xdist", "hypothesis", "ruff", "mypy", "importlinter")


class EnvironmentFailure(Exception):
    """The environment could not be made; the text says why and what to do."""


def say(line: str = "") -> None:
    print(line, flush=True)


def shown(command: Sequence[str | Path]) -> str:
    """A command as one would type it in the checkout."""
    words = [str(word).replace(f"{ROOT}{os.sep}", "") for word in command]
    return "$ " + " ".join(f"'{word}'" if " " in word or "*" in word else word for word in words)


def venv_python(folder: Path | None = None) -> Path:
    return (folder or VENV) / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def ready_python(modules: Sequence[str] = MODULES, *, use_running: bool = False, oldest: bool = False) -> Path:
    """The Python that has all that is needed, after making and filling `.venv` where there is no such Python yet.

    An activated virtual environment that has every module is used as it is.

    Args:
        modules: what an environment must be able to import to be used as it is.
        use_running: take the running Python, and fail where it lacks something.
        oldest: the environment of the oldest versions, never an activated one.

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
    if use_running or (activated and not missing and not oldest):
        say(f"environment: the running one, {sys.prefix}")
        return Path(sys.executable)
    folder = OLDEST_VENV if oldest else VENV
    if not venv_python(folder).exists():
        _make(folder)
    stamp, wanted = folder / STAMP, _fingerprint(oldest)
    if not stamp.exists() or stamp.read_text() != wanted:
        _install(folder, oldest)
        stamp.write_text(wanted)
    else:
        say(f"environment: {folder.name}, up to date")
    return venv_python(folder)


def _make(folder: Path) -> None:
    say(f"making a virtual environment in {folder.name} (Python {sys.version.split()[0]})")
    try:
        venv.create(folder, clear=True, with_pip=True, symlinks=os.name != "nt")
    except (subprocess.CalledProcessError, OSError) as error:
        raise EnvironmentFailure(
            f"no virtual environment could be made in {folder} ({error}); "
            "Debian and Ubuntu need the package python3-venv"
        ) from error


def _install(folder: Path, oldest: bool) -> None:
    pinned = CONSTRAINTS
    if oldest:
        pinned = folder / "constraints.txt"
        pinned.write_text("\n".join(_pins(oldest=True)) + "\n")
    command = [venv_python(folder), "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-input"]
    command += ["-c", pinned, "-e", f".[{EXTRAS}]"]
    say(f"installing qlora-tool and what it needs at the versions of {pinned.relative_to(ROOT)} (a few minutes)")
    say(shown(command))
    # The build backend comes from the same list: older pips read the first variable, newer ones the second.
    pins = {"PIP_CONSTRAINT": str(pinned), "PIP_BUILD_CONSTRAINT": str(pinned)}
    done = subprocess.run([str(word) for word in command], cwd=ROOT, env={**os.environ, **pins})
    if done.returncode:
        raise EnvironmentFailure("pip could not install what is needed; it says above why")


def _pins(oldest: bool) -> list[str]:
    """Lines of constraints; of two for a package, the older."""
    pins = CONSTRAINTS.read_text().splitlines()
    if not oldest:
        return pins
    older = [line for line in OLDEST_CONSTRAINTS.read_text().splitlines() if "==" in line]
    replaced = {line.partition("==")[0] for line in older}
    return [line for line in pins if line.partition("==")[0] not in replaced] + older


def _fingerprint(oldest: bool) -> str:
    """Changes whenever an installation made before no longer fits."""
    digest = hashlib.sha256(f"{sys.version_info[:2]} {EXTRAS}".encode())
    digest.update("\n".join(_pins(oldest)).encode() + (ROOT / "pyproject.toml").read_bytes())
    return digest.hexdigest()
