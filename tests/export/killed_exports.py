"""A process that exports again and again, each time in a child that is killed at a random moment, and then once more.

    python killed_exports.py RUN FOLDER KILLS [OPTION...]

It imports once and forks, which a process that has computed with several threads must not. A moment is a call to the
system while the export grows: before a random one of them the child kills itself with SIGKILL. Prints JSON: the calls
of an undisturbed export, which is left in FOLDER/undisturbed, and for each kill its call, its exit code, whether files
were growing or had their name, and the exit code of the second export.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import accelerate  # noqa: F401 -- what the children would each import
import transformers.models.llama.modeling_llama  # noqa: F401

import qlora_tool.export.write  # noqa: F401
from qlora_tool.cli import main
from qlora_tool.export import staging

CALLS = ("replace", "fsync", "open", "mkdir", "unlink", "rmdir", "scandir")


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


def export(folder: Path, run: str, options: list[str], kill_at: int | None = None) -> int:
    """Export into `folder`/model, killed before the call number `kill_at`; writes how many calls there were."""
    calls = 0

    def counted(call):
        def count_or_die(*args, **settings):
            nonlocal calls
            calls += Path(".model.partial").exists()  # before, there is nothing that a kill could leave
            if calls and calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **settings)

        return count_or_die

    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    staging.SAVE_EVERY = 20_000
    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    try:
        main(["export-merged", run, "--output-dir", "model", "--no-verify", *options])
    except SystemExit as end:
        (folder.parent / f"{folder.name}.calls").write_text(str(calls))
        return end.code or 0
    return 1


def kill_one(folder: Path, run: str, options: list[str], moment: int) -> dict:
    code = in_child(lambda: export(folder, run, options, moment))
    found = {"moment": moment, "code": code, "growing": (folder / ".model.partial" / "model").exists(),
             "finished": (folder / "model").exists()}  # fmt: skip
    if not found["finished"]:
        found["second"] = in_child(lambda: export(folder, run, options))
    return found


if __name__ == "__main__":
    run, place, kills, *options = sys.argv[1:]
    place = Path(place)
    assert in_child(lambda: export(place / "undisturbed", run, options)) == 0
    calls = int((place / "undisturbed.calls").read_text())
    moments = sorted(random.Random(0).sample(range(1, calls + 1), int(kills)))
    report = [kill_one(place / str(moment), run, options, moment) for moment in moments]
    sys.stdout.write(f"\n{json.dumps({'calls': calls, 'kills': report})}\n")
