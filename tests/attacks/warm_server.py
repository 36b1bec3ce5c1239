"""A process that has loaded all that commands load, and forks itself for each command line: a hundred in the time in
which ten fresh ones would start, each with a limit of time and of memory, and none sees what another did.

It reads one job a line as JSON, `{"args", "cwd", "env", "out", "err", "seconds"}`, and answers `{"code", "seconds"}`,
the code null where the time was up.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import signal
import sys
import time
from pathlib import Path

PATIENCE = 4
MEMORY = 12 << 30  # bytes of addresses beyond what is taken at the start


def main() -> None:
    from qlora_tool.cli import main as command

    warm = json.loads(sys.stdin.readline())
    with open(os.devnull, "w") as nowhere:
        keep = os.dup(1), os.dup(2)
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        for args in warm["args"]:
            with contextlib.suppress(SystemExit):
                command(args)
        for number, descriptor in enumerate(keep, start=1):
            os.dup2(descriptor, number)
    logging.getLogger("qlora_tool").handlers.clear()
    forget()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(command, json.loads(line))), flush=True)


def forget() -> None:
    """What the first commands left said or known in this process."""
    import gc

    from qlora_tool.files import cache
    from qlora_tool.once import log_once

    log_once.cache_clear()
    cache._told.clear()
    gc.freeze()


def answer(command, job: dict) -> dict:
    begin = time.monotonic()
    child = os.fork()
    if not child:
        run(command, job)
    # What it computes counts, and what it waits for where nothing else keeps the machine busy.
    while computed(child) < job["seconds"] and time.monotonic() - begin < PATIENCE * job["seconds"]:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return {"code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - begin}
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return {"code": None, "seconds": time.monotonic() - begin}


def computed(process: int) -> float:
    """The seconds of a processor that a process has had."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run(command, job: dict) -> None:
    code = 99
    try:
        os.setsid()
        os.chdir(job["cwd"])
        os.environ.update(job["env"])
        import tempfile

        tempfile.tempdir = None
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
        for number, name in ((0, os.devnull), (1, job["out"]), (2, job["err"])):
            descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(descriptor, number)
        args = [bytes.fromhex(arg[4:]).decode("utf-8", "surrogateescape") if arg.startswith("hex:") else arg
                for arg in job["args"]]  # fmt: skip
        try:
            command(args)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 0
        sys.stdout.flush()
        sys.stderr.flush()
        import atexit

        atexit._run_exitfuncs()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
