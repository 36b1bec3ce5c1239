"""What an attack is, and what it may come to."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from child_process import child_environment

SECONDS = 10.0
REFUSED, WARNED, RIGHT, MACHINE = "refused", "warned", "right", "the machine"
"""A clear line with code 2; the work is done with a warning; it is done, with nothing to say; a line with code 1."""


@dataclass(frozen=True)
class Attack:
    """One bad input.

    Attributes:
        name: what it is, unique.
        kind: configuration, model, tokenizer ….
        prepare: makes the input in a folder, where `model`, `adapter`, `data.jsonl` and `good.yaml` are good ones.
        args: of the command line, in that folder.
        allowed: what it may come to.
        says: an expression that the error's or the warning's lines hold.
        env: of the process.
        seconds: that it may take.
    """

    name: str
    kind: str
    prepare: Callable[[Place], None]
    args: tuple[str, ...]
    allowed: frozenset[str] = frozenset({REFUSED})
    says: str = ""
    env: dict[str, str] = field(default_factory=dict)
    seconds: float = SECONDS


class Place:
    """A folder for one attack: `in` with its input, and `out`, `cache`, `tmp`, `home` for what the tool writes."""

    def __init__(self, root: Path, good: Path):
        self.root, self.good, self.inside = root, good, root / "in"
        for name in ("in", "cache", "tmp", "home"):
            (root / name).mkdir(parents=True)
        for name in ("model", "adapter"):
            (self.inside / name).symlink_to(good / name)
        for name in ("data.jsonl", "good.yaml"):
            shutil.copyfile(good / name, self.inside / name)
        shutil.copytree(good / "cache", root / "cache", dirs_exist_ok=True)

    def own(self, name: str) -> Path:
        """A copy of `model` or `adapter` that may be changed."""
        path = self.inside / name
        path.unlink()
        shutil.copytree(self.good / name, path)
        return path

    def json(self, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
        """Change a JSON file of `model` or `adapter`: `model/config.json`."""
        folder, _, file = name.partition("/")
        path = (self.inside / folder if not (self.inside / folder).is_symlink() else self.own(folder)) / file
        value = json.loads(path.read_text(encoding="utf-8"))
        changed = change(value)
        path.write_text(json.dumps(value if changed is None else changed), encoding="utf-8")

    def write(self, name: str, content: str | bytes) -> None:
        data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
        (self.inside / name).write_bytes(data)

    def files(self) -> dict[str, tuple[int, int]]:
        """What may not change, by size and time of change."""
        found = {}
        for name in ("in", "tmp", "home"):
            for path in (self.root / name).rglob("*"):
                stat = path.lstat()
                found[str(path.relative_to(self.root))] = (0, 0) if path.is_dir() else (stat.st_size, stat.st_mtime_ns)
        return found


class Server:
    """The process of `warm_server.py`."""

    def __init__(self, good: Path):
        env = child_environment(HF_HUB_OFFLINE=1, TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS=1,
                                OMP_WAIT_POLICY="PASSIVE", QLORA_TOOL_CACHE=good / "cache")  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("warm_server.py"))], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, cwd=good, env=env,
        )  # fmt: skip
        self.ask({"args": [["train", "good.yaml", "--dry-run"], ["preview", "good.yaml"],
                           ["export-merged", "adapter", "--output-dir", "merged", "--no-verify"]]})  # fmt: skip

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def try_attack(attack: Attack, root: Path, good: Path, server: Server) -> list[str]:
    """What is wrong with how an attack was met; empty where it was met well."""
    place = Place(root, good)
    attack.prepare(place)
    before = place.files()
    env = {"QLORA_TOOL_CACHE": str(root / "cache"), "TMPDIR": str(root / "tmp"), "HOME": str(root / "home"),
           **attack.env}  # fmt: skip
    out, err = str(root / "stdout"), str(root / "stderr")
    answer = server.ask({"args": [_passable(arg) for arg in attack.args], "cwd": str(place.inside), "env": env,
                         "out": out, "err": err,
                         "seconds": attack.seconds})  # fmt: skip
    text = Path(err).read_bytes().decode("utf-8", "replace")
    shown = Path(out).read_bytes().decode("utf-8", "replace") + text
    faults = judge(attack, answer["code"], text, shown)
    after = place.files()
    if changed := sorted(name for name in {*before, *after} if before.get(name) != after.get(name)):
        faults.append(f"changed outside: {changed[:4]}")
    return faults


def _passable(arg: str) -> str:
    return f"hex:{arg.encode('utf-8', 'surrogateescape').hex()}" if any("\ud800" <= c <= "\udfff" for c in arg) else arg


def judge(attack: Attack, code: int | None, text: str, shown: str) -> list[str]:
    if code is None:
        return [f"not done within {attack.seconds:g} s"]
    faults = [f"'{said}'" for said in ("Traceback", "run again with --debug") if said in shown]
    lines = text.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    warnings = [line for line in lines if line.startswith("warning: ")]
    came_to = {2: REFUSED, 1: MACHINE, 0: WARNED if warnings else RIGHT}.get(code, f"code {code}")
    if not faults and came_to not in attack.allowed and not (came_to == WARNED and RIGHT in attack.allowed):
        faults.append(f"{came_to}, allowed {sorted(attack.allowed)}")
    if code in (1, 2) and not errors:
        faults.append(f"code {code} without a line")
    if any(len(line) > 2000 for line in errors):
        faults.append("a line of more than 2,000 characters")
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f]", re.sub(r"\r?\n|\x1b\[[0-9;]*m", "", shown)):
        faults.append("control characters shown")
    if not faults and attack.says and code in (0, 2) and not re.search(attack.says, text):
        faults.append(f"does not say {attack.says!r}")
    return [f"{fault} | {' / '.join((errors or lines)[-1:])[:400]}" for fault in faults]


def save_faults(found: dict[str, list[str]], attacks: list[Attack]) -> str:
    """A table of attacks by kind: how many, met, not met."""
    kinds: dict[str, list[int]] = {}
    for attack in attacks:
        count = kinds.setdefault(attack.kind, [0, 0])
        count[0] += 1
        count[1] += bool(found.get(attack.name))
    total = [sum(column) for column in zip(*kinds.values(), strict=True)]
    rows = [f"{kind:16} {count:5} {count - failed:5} {failed:5}" for kind, (count, failed) in
            [*sorted(kinds.items()), ("all", total)]]  # fmt: skip
    return os.linesep.join([f"{'kind':16} {'tried':>5} {'met':>5} {'not':>5}", *rows])
