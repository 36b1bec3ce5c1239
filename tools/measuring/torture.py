"""Kills and faults of the disk in training and export, again and again: nothing lost.

    tools/measure torture --work /tmp/torture --seconds 3600 --seed 7
    tools/measure torture --work /tmp/torture --train-kills 50 --export-kills 20 --faults 20

A tiny model is trained in several ways (adamw, adamw_8bit, DoRA, packing, dropout, accumulation), each once
undisturbed. Then each time in a process of its own: it kills itself with SIGKILL before a random one of its calls to
the system or before a random step, or the disk fails it from a random call on for a while (full, read-only, broken),
and the same command is run again until it is done. The adapter has to be that of the undisturbed run, byte for byte;
likewise the files of an export. After a fault, all that was whole before has to be there.

The seed draws the moments. Without numbers the three kinds take turns until the time is over.
"""

from __future__ import annotations

import argparse
import builtins
import errno
import hashlib
import importlib
import io
import itertools
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from making.environment import ROOT

from measuring.command import add_outputs, at_least
from measuring.results import passed_or_missed, say

STEPS = 6
WAYS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw_8bit": {"training.optim": "adamw_8bit", "adapter.r": 64},
    "dora": {"adapter.method": "dora"},
    "packing": {"data.packing": True},
    "no dropout": {"adapter.lora_dropout": 0.0},
    "accumulation": {"training.gradient_accumulation_steps": 2},
}
CALLS = ("replace", "fsync", "open", "mkdir", "unlink", "rmdir", "scandir")
FAULTS = (errno.ENOSPC, errno.EROFS, errno.EIO)
MOST_TRIES = 8  # of a command that is disturbed once


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="where all of it happens")
    parser.add_argument("--seconds", type=at_least(1), metavar="N", help="how long to go on")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="draws the moments (default: 0)")
    for kind, what in (("train-kills", "kills in training"), ("export-kills", "kills in an export"),
                       ("faults", "faults of the disk")):  # fmt: skip
        parser.add_argument(f"--{kind}", type=at_least(0), default=0, metavar="N", help=what)
    add_outputs(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", QLORA_TOOL_CACHE=str(options.work / "cache"))
    options.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.work.resolve(), random.Random(options.seed))
    wanted = {"kill in training": options.train_kills, "kill in export": options.export_kills, "fault": options.faults}
    if not any(wanted.values()) and not options.seconds:
        options.seconds = 600
    turns = [kind for kind, count in wanted.items() for _ in range(count)]
    kinds = iter(turns) if turns else itertools.cycle(wanted)
    end = time.monotonic() + (options.seconds or float("inf"))
    found: list[dict[str, Any]] = []
    for number, kind in enumerate(kinds):
        if time.monotonic() > end:
            break
        found.append({"kind": kind, **bench.disturb(kind, number)})
        if found[-1]["wrong"]:
            say(f"{number}: {kind}: {found[-1]}")
    counts = {kind: sum(one["kind"] == kind for one in found) for kind in wanted}
    wrong = [one for one in found if one["wrong"]]
    return {"seed": options.seed, "counts": counts, "disturbed": sum(one["disturbed"] for one in found),
            "wrong": wrong, "passed": not wrong}  # fmt: skip


def show(results: dict[str, Any]) -> None:
    counts = ", ".join(f"{count} x {kind}" for kind, count in results["counts"].items())
    say(f"{counts}; {results['disturbed']} came before the end; {len(results['wrong'])} went wrong: "
        f"{passed_or_missed(results['passed'])}")  # fmt: skip


class Bench:
    """Inputs, undisturbed results, and what is disturbed.

    Args:
        work: the folder for all of it.
        draw: of the moments.
    """

    def __init__(self, work: Path, draw: random.Random):
        for folder in ("training", "model", "data"):
            sys.path.append(str(ROOT / "tests" / folder))
        # Imported once, and nothing is computed here: the children are forked.
        for module in ("accelerate", "transformers.models.llama.modeling_llama", "bitsandbytes", "qlora_tool.cli",
                       "qlora_tool.memory.run_report", "qlora_tool.training.loop", "qlora_tool.export.write",
                       "tiny_runs"):  # fmt: skip
            importlib.import_module(module)
        self.work, self.draw = work, draw
        self.calls: dict[str, int] = {}
        self.expected: dict[str, dict[str, str]] = {}
        if in_child(self._write_inputs):
            raise RuntimeError("the tiny model was not made")

    def _write_inputs(self) -> int:
        from tiny_runs import write_model, write_rows

        if not (self.work / "model").exists():
            write_model(self.work / "model")
        write_rows(self.work / "rows.jsonl")
        return 0

    def disturb(self, kind: str, number: int) -> dict[str, Any]:
        """One command that is disturbed at a random moment, and run again until it is done."""
        way = "export" if kind == "kill in export" or (kind == "fault" and number % 3 == 0) else \
            list(WAYS)[number % len(WAYS)]  # fmt: skip
        if way not in self.expected:
            self._undisturbed(way)
        output = self.work / f"{number}-{way.replace(' ', '-')}"
        shutil.rmtree(output, ignore_errors=True)
        moment = self.draw.randrange(1, self.calls[way] + 1)
        code, tries = self._command(way, output, moment, kind), 1
        disturbed, lost = code != 0, lost_checkpoint(output)
        if way == "export" and output.exists():  # killed while it cleaned up: whole, and a second one is refused
            code = 0
        while code != 0 and tries < MOST_TRIES:
            code, tries = self._command(way, output), tries + 1
            # Killed after its adapter was there: the rest is done, and a second run refused.
            if way != "export" and code == 2 and (output / "report.html").exists():
                code = 0
        same = hashes(output, way) == self.expected[way]
        # A disk that fails may refuse to remove a file too.
        left = [] if kind == "fault" else [str(file.relative_to(output)) for file in output.rglob(".*.tmp")]
        result = {"way": way, "moment": moment, "disturbed": disturbed, "code": code, "tries": tries, "lost": lost,
                  "same": same, "left": left, "wrong": code != 0 or lost is not None or not same or bool(left)}
        if not result["wrong"]:
            shutil.rmtree(output, ignore_errors=True)
        return result

    def _undisturbed(self, way: str) -> None:
        output = self.work / f"undisturbed-{way.replace(' ', '-')}"
        shutil.rmtree(output, ignore_errors=True)
        if self._command(way, output):
            raise RuntimeError(f"{way}: the undisturbed command failed: see {self.work / 'log'}")
        self.expected[way] = hashes(output, way)
        self.calls[way] = int((self.work / "calls").read_text())

    def _command(self, way: str, output: Path, moment: int = 0, kind: str = "") -> int:
        """Train or export in a process of its own; its exit code, negative where it was killed."""
        if way == "export" and "adamw" not in self.expected:
            self._undisturbed("adamw")
        return in_child(lambda: self._inside(way, output, moment, kind))

    def _inside(self, way: str, output: Path, moment: int, kind: str) -> int:
        log = os.open(self.work / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        from qlora_tool.cli import main
        from qlora_tool.export import staging

        staging.SAVE_EVERY = 20_000
        if way == "export":
            trained = self.work / "undisturbed-adamw"
            arguments = ["export-merged", str(trained), "--output-dir", str(output), "--no-verify"]
        else:
            arguments = ["train", str(self._configuration(way)), "--output-dir", str(output)]
        fault = self.draw.choice(FAULTS) if kind == "fault" else None
        counter = Counter(output, moment, fault, self.draw.randrange(1, 9))
        counter.install()
        try:
            main(arguments)
        except SystemExit as end:
            (self.work / "calls").write_text(str(counter.calls))
            return int(end.code or 0)
        return 1

    def _configuration(self, way: str) -> Path:
        from tiny_runs import run_config

        from qlora_tool.config import config_to_yaml

        values = {"training.max_steps": STEPS, "training.save_steps": 1, "model.quantization": "nf4"} | WAYS[way]
        file = self.work / f"{way.replace(' ', '-')}.yaml"
        config = run_config(self.work / "model", self.work / "rows.jsonl", self.work / "none", values)
        file.write_text(config_to_yaml(config), encoding="utf-8")
        return file


class Counter:
    """Counts a process's calls to the system for its output, and its steps; before one of them it is killed, or from it
    on the disk fails it for a while.

    Args:
        output: where it writes.
        moment: the call; 0: none.
        fault: the disk's error number; None: a kill.
        length: how many calls fail.
    """

    def __init__(self, output: Path, moment: int, fault: int | None, length: int):
        self.output, self.moment, self.fault, self.length, self.calls = output, moment, fault, length, 0

    def install(self) -> None:
        """Count from here on."""
        from qlora_tool.training import loop

        for name in CALLS:
            setattr(os, name, self._counted(getattr(os, name)))
        builtins.open = io.open = self._counted(builtins.open)
        loop.train_step = self._counted(loop.train_step, disk=False)

    def _counted(self, call: Callable[..., Any], disk: bool = True) -> Callable[..., Any]:
        def count(*args: Any, **settings: Any) -> Any:
            if disk and not self._is_ours(args):
                return call(*args, **settings)
            self.calls += 1
            if self.moment and self.calls >= self.moment:
                if self.fault is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                if disk and self.calls < self.moment + self.length:
                    raise OSError(self.fault, os.strerror(self.fault), str(self.output))
            return call(*args, **settings)

        return count

    def _is_ours(self, args: tuple[Any, ...]) -> bool:
        """Whether a call is for the output: its folder, or the hidden one beside it; or flushes a file."""
        first = args[0] if args else None
        if isinstance(first, int):
            return True
        return isinstance(first, (str, os.PathLike)) and self.output.name in os.fspath(first)


def lost_checkpoint(output: Path) -> str | None:
    """The checkpoint that has to be whole in a run that was disturbed, and is not: of the step before the last one that
    was logged, as every step is saved before the next one is taken. None where nothing is lost."""
    metrics = output / "metrics.jsonl"
    if not metrics.exists():
        return None
    steps = [int(found[1]) for found in re.finditer(r'"step": (\d+),', metrics.read_text(encoding="utf-8"))]
    name = f"step-{max(steps, default=0) - 1:06d}"
    return name if max(steps, default=0) > 1 and name not in whole_checkpoints(output) else None


def whole_checkpoints(output: Path) -> set[str]:
    """The checkpoints of a run that are as they were written."""
    from qlora_tool.files.sealed import first_change, read_sealed

    found = set()
    for manifest in output.glob("checkpoints/step-*/manifest.json"):
        try:
            if first_change(manifest.parent, read_sealed(manifest)["files"]) is None:
                found.add(manifest.parent.name)
        except (OSError, ValueError, KeyError):
            continue
    return found


def hashes(output: Path, way: str) -> dict[str, str]:
    """Of what has to be the same: an export's files, or a run's weights."""
    files = sorted(output.rglob("*")) if way == "export" else [output / "adapter" / "adapter_model.safetensors"]
    return {str(file.relative_to(output)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in files if file.is_file() and file.name not in ("export.json", "README.md")}  # fmt: skip


def in_child(work: Callable[[], int]) -> int:
    """The exit code of `work` in a child of its own; negative: the signal that ended it."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
