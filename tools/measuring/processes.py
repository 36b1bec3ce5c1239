"""Work in a process of its own, whose memory is that of the work alone, and what Linux says of a process's memory."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from making.environment import ROOT

from qlora_tool.errors import MachineError, UserError

SAMPLE_SECONDS = 0.1


def require_proc() -> None:
    """Refuse a system without /proc."""
    if not Path("/proc/self/status").exists():
        raise MachineError("this measurement reads /proc, which only Linux has")


def resident_bytes(field: str, process: int | str = "self") -> int | None:
    """`VmRSS` (now) or `VmHWM` (the most so far) of a process; None once it has ended.

    ru_maxrss would not do: it begins with what the parent had.
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def environment(**more: str) -> dict[str, str]:
    """The variables of a process that is to find this package and the checkout's own."""
    path = [str(ROOT / "tools"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), **more}


def in_fresh_process(
    function: Callable[..., dict[str, Any]],
    *,
    sampled: bool = False,
    quiet: bool = False,
    variables: dict[str, str] | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Call a function in a process that has done nothing else.

    Args:
        function: of a module of this package. Arguments and result go through JSON: paths arrive as text.
        sampled: add `samples` to the result: (seconds, bytes resident) over the time of the process.
        quiet: what it writes to stderr is not shown; the last line of it is what an error says.
        variables: of the environment, beside the present ones.

    Raises:
        UserError: it ended with exit code 2.
        MachineError: it ended with another one.
    """
    command = [sys.executable, "-c", "from measuring.processes import serve; serve()",
               f"{function.__module__}:{function.__name__}", json.dumps(arguments, default=str)]  # fmt: skip
    samples, start = [], time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE if quiet else None, text=True,
        env=environment(**variables or {}),
    )  # fmt: skip
    try:
        while sampled and process.poll() is None:
            if (now := resident_bytes("VmRSS", process.pid)) is not None:
                samples.append((round(time.perf_counter() - start, 2), now))
            time.sleep(SAMPLE_SECONDS)
        said, complaints = process.communicate()
    except BaseException:
        process.kill()
        raise
    if process.returncode != 0:
        lines = (complaints or "").strip().splitlines()
        why = lines[-1].removeprefix("error: ") if lines else "the reason stands above"
        ended = f"{function.__name__}: ended with exit code {process.returncode} (-9: no memory was left); {why}"
        raise (UserError if process.returncode == 2 else MachineError)(ended)
    return json.loads(said.splitlines()[-1]) | ({"samples": samples} if sampled else {})


def serve() -> None:
    """What the fresh process runs: the function that the command line names."""
    from measuring.command import exit_code

    module, _, name = sys.argv[1].partition(":")

    def work() -> int:
        print(json.dumps(getattr(importlib.import_module(module), name)(**json.loads(sys.argv[2]))))
        return 0

    sys.exit(exit_code(work))
