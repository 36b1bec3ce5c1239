"""Files and folders that several processes write at once, or that a process leaves half-written."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys

import pytest

from qlora_tool.errors import MachineError
from qlora_tool.files.atomic import replacing_file, replacing_folder, write_json

# Writes one letter many times, into a file or into both files of a folder, 200 times over.
WRITER = """
import sys
from pathlib import Path
from qlora_tool.files.atomic import replacing_folder, write_json
kind, path, letter, size = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
for _ in range(200):
    if kind == "file":
        write_json(path, {"text": letter * size})
        continue
    with replacing_folder(path) as folder:
        for name in ("one", "two"):
            (folder / name).write_text(letter * size)
"""

# Begins to write, says so, and waits to be killed.
KILLED = """
import sys, time
from pathlib import Path
from qlora_tool.files.atomic import replacing_file, replacing_folder
replacing = {"file": replacing_file, "folder": replacing_folder}[sys.argv[1]]
with replacing(Path(sys.argv[2])) as temporary:
    (temporary / "half" if sys.argv[1] == "folder" else temporary).write_text("half")
    print("writing", flush=True)
    time.sleep(600)
"""


def start(script: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_write_one_file_and_a_reader_sees_whole_ones(tmp_path):
    file = tmp_path / "cache.json"
    texts = {"a" * 100_000, "b" * 50_000}
    write_json(file, {"text": "a" * 100_000})
    writers = [start(WRITER, "file", file, text[0], len(text)) for text in texts]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        seen.add(json.loads(file.read_text())["text"])
    for writer in writers:
        assert writer.wait() == 0, writer.communicate()[1]
    assert seen <= texts and len(seen) == 2
    assert list(tmp_path.iterdir()) == [file]


def test_two_processes_write_one_folder_and_one_of_them_stays(tmp_path):
    folder = tmp_path / "base"
    writers = [start(WRITER, "folder", folder, letter, 1000) for letter in "ab"]
    for writer in writers:
        assert writer.wait() == 0, writer.communicate()[1]
    one, two = ((folder / name).read_text() for name in ("one", "two"))
    assert one == two and one in ("a" * 1000, "b" * 1000)
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_that_another_process_moves_away_while_it_is_looked_at_is_not_in_the_way(tmp_path, monkeypatch):
    """It is there for the first look at its place, and for the second it is not, for a moment."""
    path, away = tmp_path / "base", tmp_path / "away"
    path.mkdir()

    def moving(look):
        def looked(place, *args, **kwargs):
            found = look(place, *args, **kwargs)
            if os.fspath(place) == os.fspath(path):
                monkeypatch.undo()
                os.rename(path, away)
            return found
        return looked

    with replacing_folder(path) as temporary:
        (temporary / "it").write_text("new")
        monkeypatch.setattr(os.path, "lexists", moving(os.path.lexists))
        monkeypatch.setattr(os, "stat", moving(os.stat))
        monkeypatch.setattr(os, "lstat", moving(os.lstat))
    assert (path / "it").read_text() == "new" and away.exists()


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_process_left_goes_with_the_next_write_and_nothing_else_does(tmp_path, kind):
    path = tmp_path / "name"
    export = tmp_path / ".name.partial"  # an interrupted export of the same name, which goes on later
    export.mkdir()
    killed, at_work = (start(KILLED, kind, path) for _ in range(2))
    for process in (killed, at_work):
        assert process.stdout.readline() == "writing\n"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert len(list(tmp_path.iterdir())) == 3 and not path.exists()
    replacing = {"file": replacing_file, "folder": replacing_folder}[kind]
    with replacing(path) as temporary:
        (temporary / "done" if kind == "folder" else temporary).write_text("done")
    [left] = {*tmp_path.iterdir()} - {path, export}
    assert f"-{at_work.pid}-" in left.name
    at_work.kill()
    at_work.wait()


@pytest.mark.parametrize("replacing", [replacing_file, replacing_folder])
def test_a_failure_leaves_what_was_there(tmp_path, replacing):
    path = tmp_path / "name"
    for content, fails in (("first", False), ("second", True)):
        try:
            with replacing(path) as temporary:
                (temporary / "it" if replacing is replacing_folder else temporary).write_text(content)
                if fails:
                    raise RuntimeError
        except RuntimeError:
            assert fails
    assert (path / "it" if replacing is replacing_folder else path).read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("replacing", [replacing_file, replacing_folder])
@pytest.mark.parametrize(("there", "found"), [
    ("file above", "parent is a file"), ("file far above", "parent is a file"), ("link above", "parent is a link"),
    ("folder", "name is a folder"), ("file", "name is a file"),
])  # fmt: skip
def test_what_is_in_the_way_is_named_and_stays(tmp_path, replacing, there, found):
    parent = tmp_path / "parent"
    path = parent / "between" / "name" if there == "file far above" else parent / "name"
    if there in ("file above", "file far above"):
        parent.write_text("mine")
    elif there == "link above":
        parent.symlink_to("nowhere")
    else:
        path.parent.mkdir()
        path.mkdir() if there == "folder" else path.write_text("mine")
    before = sorted((one, one.is_dir()) for one in tmp_path.rglob("*"))
    is_replaced = there == ("folder" if replacing is replacing_folder else "file")
    with contextlib.nullcontext() if is_replaced else pytest.raises(MachineError) as raised, replacing(path) as made:
        if replacing is replacing_file:
            made.write_text("new")
    if not is_replaced:
        (line,) = raised.value.lines
        assert line.startswith(f"cannot write {path}: {tmp_path / 'parent'}")
        assert f"{found}, where something else is expected; move it away" in line
    assert sorted((one, one.is_dir()) for one in tmp_path.rglob("*")) == before
