"""All that needs a CUDA device of 24 GB or more, in runs of at most nine minutes.

What was found is in FOLDER as it comes:

    tools/measure cuda results/

The parts, each with a time limit of its own: the device as `doctor` sees it, the memory of steps (`tools/measure
memory-cuda`; predicted for elsewhere, with --measured), the tests marked cuda, each kernel against its reference, the
profile of a 7B's step at 4 x 1024 and 1 x 2048, a 7B of random weights in NF4 (3.9 GB in FOLDER, removed at the end),
its training step against transformers + PEFT (`tools/measure benchmark cuda`), the longest sequence that trains under
8, 12, 16 and 24 GB, here and in PEFT, and the step without each kernel. A part that takes too long is cut; what it
wrote until then stays, and the next one begins. cuda_check.json is written anew after each. `--only` chooses some, so
that several short runs make one.

Needs 16 GB of memory, 5 GB of disk, and bitsandbytes and PEFT beside torch. Asked for: no part failed or was cut, and
there is a CUDA device.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from making.environment import ROOT

from measuring.ours import KERNELS
from measuring.results import machine, say, show_table
from qlora_tool.errors import MachineError
from qlora_tool.files.atomic import write_json

SECONDS = 540.0
LEAST = 10.0  # seconds: with less a part is not begun
MODEL = "random-7b"  # its folder
NO_TESTS = 5  # pytest's exit code where nothing was selected


@dataclass(frozen=True)
class Part:
    """One thing to run: its command, and the most seconds it may take."""

    name: str
    command: list[str]
    limit: float
    needs: Path | None = None


@dataclass
class Outcome:
    """How a part ended: `passed`, `failed`, `cut` or `left out`, with the last line it printed."""

    status: str
    seconds: float = 0.0
    exit_code: int | None = None
    last_line: str = ""


class TimeBudget:
    """The seconds that are left of the whole run."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self._clock, self._end = clock, clock() + seconds

    def left(self) -> float:
        return max(0.0, self._end - self._clock())

    def for_part(self, limit: float) -> float:
        """What a part may take; 0 where it is not worth beginning."""
        seconds = min(limit, self.left())
        return seconds if seconds >= min(LEAST, limit) else 0.0


def run_part(part: Part, seconds: float, log: Path) -> Outcome:
    """Run a part and all its children in a process group of their own; end the group when the time is up."""
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            part.command, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(seconds)
            status = "passed" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            status, code = "cut", None
        finally:
            _end_group(process)
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if code == NO_TESTS and "pytest" in part.command:
        lines.append("no tests are marked cuda")
    return Outcome(status, round(time.monotonic() - start, 1), code, lines[-1] if lines else "")


def _end_group(process: subprocess.Popen) -> None:
    """Nothing that the part began may go on: it would slow down the next one and hold the device's memory."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(3)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_parts(parts: Sequence[Part], folder: Path, budget: TimeBudget, facts: dict[str, Any]) -> dict[str, Outcome]:
    """Run the parts in order; `cuda_check.json` holds what was found after each."""
    outcomes: dict[str, Outcome] = {}

    def save() -> None:
        found = {name: asdict(outcome) for name, outcome in outcomes.items()}
        write_json(folder / "cuda_check.json", {**facts, "seconds_left": round(budget.left(), 1), "parts": found})

    save()
    for part in parts:
        seconds = budget.for_part(part.limit)
        if part.needs is not None and not part.needs.exists():
            outcomes[part.name] = Outcome("left out", last_line=f"there is no {part.needs.name}")
        elif seconds == 0:
            outcomes[part.name] = Outcome("left out", last_line="no time was left")
        else:
            say(f"{part.name}: at most {seconds:.0f} s")
            outcomes[part.name] = run_part(part, seconds, folder / f"{part.name}.log")
        save()
    return outcomes


def parts_for(folder: Path) -> list[Part]:
    """What there is to run, the most important first."""
    python, model = sys.executable, folder / MODEL
    measure = [python, str(ROOT / "tools" / "measure")]
    plot = ["--plot", str(folder / "benchmark.png")] if importlib.util.find_spec("matplotlib") else []
    workers = ["-n", "6"] if importlib.util.find_spec("xdist") else []
    longest = [*measure, "longest", str(model), "--json"]
    profile = [*measure, "step-profile"]
    return [
        Part("device", [python, "-m", "qlora_tool", "doctor"], 40),
        Part("memory", [*measure, "memory-cuda", str(folder / "memory"), "--no-predictions", "--together", "4"], 130),
        Part("tests", ["env", "OMP_NUM_THREADS=1", python, "-m", "pytest", "tests", "-m", "cuda", "-v", "--tb=short",
                       "--durations=10", *workers], 150),
        Part("kernels", [*measure, "kernels", "--json", str(folder / "kernels.json")], 60),
        Part("profile", [*profile, "llama-7b-4x1024", "--json", str(folder / "step.json"),
                         "--trace", str(folder / "step.trace.json.gz")], 40),
        Part("profile-one-row", [*profile, "llama-7b", "--json", str(folder / "step-one-row.json")], 40),
        Part("model", [python, str(ROOT / "tools" / "make"), "nf4-model", str(model), "--device", "cuda"], 60),
        Part("benchmark", [*measure, "benchmark", "cuda", str(model), "--json", str(folder / "benchmark.json"), *plot],
             160, model),
        Part("caps", [*longest, str(folder / "caps.json")], 110, model),
        Part("caps-peft", [*longest, str(folder / "caps-peft.json"), "--side", "peft"], 120, model),
        *(Part(f"without-{name}", [*profile, "llama-7b-4x1024", "--no-profile", "--without", name,
                                   "--json", str(folder / f"without-{name}.json")], 30) for name in KERNELS),
    ]  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where everything goes")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all of it (default: 540)")
    parser.add_argument("--only", nargs="+", metavar="PART", help="some parts: device, tests, model, ...")


def run(options: argparse.Namespace) -> dict[str, Any]:
    budget = TimeBudget(options.seconds)

    import torch

    if not torch.cuda.is_available():
        raise MachineError("PyTorch sees no CUDA device here: nothing was run; start this on the machine that has one")
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"machine": machine(), "device": torch.cuda.get_device_name(), "cuda": torch.version.cuda,
             "total_bytes": torch.cuda.get_device_properties(0).total_memory}  # fmt: skip
    parts = [part for part in parts_for(folder) if not options.only or part.name in options.only]
    try:
        outcomes = run_parts(parts, folder, budget, facts)
    finally:
        shutil.rmtree(folder / MODEL, ignore_errors=True)
    return {"parts": outcomes, "passed": all(outcome.status == "passed" for outcome in outcomes.values())}


def show(results: dict[str, Any]) -> None:
    rows = [(name, one.status, f"{one.seconds:.0f}", one.last_line[:90]) for name, one in results["parts"].items()]
    show_table([("part", "ended", "seconds", "last line"), *rows])
