"""The hidden folder in which an export grows: what survives a kill at any moment, and who may work in it."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from qlora_tool.errors import MachineError, UserError
from qlora_tool.export import staging
from qlora_tool.export.staging import staged_folder, staging_root, written_so_far

INPUTS = {"adapter": "1", "options": {"cut": (1, 2)}}
PIECES = {"a.bin": [b"first", b"second", b"third"], "b.bin": [b"x" * 5000], "c.bin": [b"1", b"2", b"3", b"4"]}


def write_all(output: Path) -> list[str]:
    """What an export does, in small, from where an earlier call stopped: two files grow, one is written in one go, and
    one each time.

    Returns:
        The pieces that were written by this call.
    """
    made = []
    with staged_folder(output, INPUTS) as stage:
        for name, pieces in PIECES.items():
            if stage.done(name):
                continue
            if name == "b.bin":
                with stage.whole(name) as path:
                    path.write_bytes(pieces[0])
                made.append(name)
                continue
            with stage.grow(name) as file:
                for index, piece in enumerate(pieces):
                    if file.size < sum(map(len, pieces[: index + 1])):
                        file.write(piece)
                        made.append(f"{name} {index}")
        (stage.folder / "small.txt").write_text("each time")
    return made


def assert_whole(output: Path) -> None:
    expected = {name: b"".join(pieces) for name, pieces in PIECES.items()} | {"small.txt": b"each time"}
    assert {path.name: path.read_bytes() for path in output.iterdir()} == expected
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def killed_at(moment: int, output: Path) -> bool:
    """`write_all` in a process of its own that is killed before its call number `moment` to the system; False where it
    makes fewer."""
    process = os.fork()
    if process == 0:
        left = [moment]

        def counted(call):
            def kill_or_call(*args, **settings):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **settings)

            return kill_or_call

        staging.SAVE_EVERY = 1
        for name in ("replace", "fsync", "open", "mkdir", "unlink", "rmdir", "ftruncate"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            write_all(output)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(process, 0)[1]
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)
    return status != 0


def test_every_moment_of_a_kill(tmp_path: Path, monkeypatch):
    """Killed before each of its calls to the system in turn, and run again: whole, and nothing beside it."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # takes its time, and makes no difference to a kill
    made, moment = [], 1
    while killed_at(moment, output := tmp_path / str(moment) / "out"):
        if output.exists():  # killed while it cleaned up: whole, with an empty shell beside it
            assert not (staging_root(output) / "model").exists()
            shutil.rmtree(staging_root(output), ignore_errors=True)
        else:
            made.append(len(write_all(output)))
        assert_whole(output)
        moment += 1
    assert_whole(output)
    assert len(made) > 30
    assert made == sorted(made, reverse=True)  # the later the kill, the less is left to do
    assert made[0] == len(write_all(tmp_path / "new" / "out")) == 8 and made[-1] == 0


def test_a_power_failure_may_cut_what_was_not_flushed(tmp_path: Path, monkeypatch):
    """What lies beyond the size that the plan knows is dropped, whatever it is."""
    output = tmp_path / "out"
    monkeypatch.setattr(staging, "SAVE_EVERY", 1)
    with pytest.raises(KeyboardInterrupt), staged_folder(output, INPUTS) as stage, stage.grow("a.bin") as file:
        file.write(b"first")
        raise KeyboardInterrupt
    growing = staging_root(output) / "a.bin"
    growing.write_bytes(growing.read_bytes() + b"\0" * 100)
    assert write_all(output)[0] == "a.bin 1"
    assert_whole(output)


def test_a_finished_file_that_was_changed_is_made_again(tmp_path: Path):
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), staged_folder(output, INPUTS) as stage:
        for name in ("a.bin", "b.bin"):
            with stage.whole(name) as path:
                path.write_bytes(b"".join(PIECES[name]))
        raise KeyboardInterrupt
    assert written_so_far(output, INPUTS) == 16 + 5000
    (staging_root(output) / "model" / "a.bin").write_bytes(b"short")
    (staging_root(output) / "model" / "stray").mkdir()
    assert write_all(output) == [*(f"a.bin {n}" for n in range(3)), *(f"c.bin {n}" for n in range(4))]
    assert_whole(output)


def test_other_inputs_start_anew_and_a_broken_plan_too(tmp_path: Path, caplog):
    for change in ("inputs", "plan"):
        output = tmp_path / change / "out"
        other = {**INPUTS, "adapter": "2"} if change == "inputs" else INPUTS
        with pytest.raises(KeyboardInterrupt), staged_folder(output, other) as stage:
            with stage.whole("b.bin") as path:
                path.write_bytes(b"other")
            raise KeyboardInterrupt
        if change == "plan":
            (staging_root(output) / "plan.json").write_text("{")
        assert written_so_far(output, INPUTS) == 0
        assert len(write_all(output)) == 8
        assert_whole(output)
    assert caplog.text.count("holds the start of another export (adapter differs); starting anew") == 1


def test_two_at_once(tmp_path: Path):
    output = tmp_path / "out"
    with staged_folder(output, INPUTS) as stage:
        (stage.folder / "mine").write_text("mine")
        with pytest.raises(UserError, match=rf"{output}: process \d+ on .* is exporting to it; wait for that export"):
            write_all(output)
    assert [path.name for path in output.iterdir()] == ["mine"]
    assert not staging_root(output).exists()


def test_faults_of_the_input_leave_nothing_unless_told(tmp_path: Path, caplog):
    for keep in (False, True):
        with pytest.raises(UserError), staged_folder(tmp_path / "out", INPUTS) as stage:
            with stage.whole("b.bin") as path:
                path.write_bytes(PIECES["b.bin"][0])
            stage.keep = keep
            raise UserError("no")
        assert staging_root(tmp_path / "out").exists() == keep == bool(caplog.records)
    assert "b.bin" not in write_all(tmp_path / "out")


def test_an_earlier_folder_is_replaced_at_the_end_alone(tmp_path: Path, monkeypatch):
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_text("old")
    replace = os.replace

    def refuse(source, target):
        if Path(target) == output and Path(source).name == "model":
            raise OSError("no")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(OSError, match="no"):
            write_all(output)
    assert (output / "old").read_text() == "old"
    assert write_all(output) == []
    assert_whole(output)


@pytest.mark.parametrize("tries", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_a_flipped_bit_anywhere_in_a_half_made_export_is_found(tmp_path: Path, monkeypatch, caplog, tries):
    monkeypatch.setattr(staging, "SAVE_EVERY", 1)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    draw = random.Random(0)
    for number in range(tries):
        output = tmp_path / str(number) / "out"
        with pytest.raises(KeyboardInterrupt), staged_folder(output, INPUTS) as stage:
            with stage.whole("b.bin") as path:
                path.write_bytes(PIECES["b.bin"][0])
            with stage.grow("a.bin") as file:
                file.write(PIECES["a.bin"][0])
                raise KeyboardInterrupt
        root = staging_root(output)
        file = (root / "model" / "b.bin", root / "a.bin", root / "plan.json")[number % 3]
        content = bytearray(file.read_bytes())
        bit = draw.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        caplog.clear()
        write_all(output)
        assert [record for record in caplog.records if str(root) in record.getMessage()], (file, bit)
        assert_whole(output)


@pytest.mark.parametrize("place", [".out.partial", ".out.previous"])
@pytest.mark.parametrize("name", ["mine.txt", "plan.json", "model/mine.txt", "lock", ""])
def test_a_folder_that_no_export_wrote_is_refused_as_it_is(tmp_path: Path, place, name):
    output, taken = tmp_path / "here" / "out", tmp_path / "here" / place
    mine = taken / name
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text('{"inputs": {}, "notes": {}, "done": {}, "growing": null}')
    before = mine.read_text()
    if (place, name) == (".out.partial", "lock"):
        pytest.skip("all that an export wrote that was killed at once")
    output.mkdir()
    (output / staging.REPORT).write_text(json.dumps({"written": [staging.REPORT]}))
    with pytest.raises(UserError, match=f"{taken}: no export wrote it, .*; move it away"):
        write_all(output)
    assert mine.read_text() == before
    taken.rename(tmp_path / "away")
    write_all(output)
    assert_whole(output)


def test_what_an_early_version_left_is_gone_on_from(tmp_path: Path):
    """It wrote no mark."""
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), staged_folder(output, INPUTS) as stage:
        with stage.whole("b.bin") as path:
            path.write_bytes(b"".join(PIECES["b.bin"]))
        raise KeyboardInterrupt
    (staging_root(output) / staging._MARK).unlink()
    assert not any(line.startswith("b.bin") for line in write_all(output))
    assert_whole(output)


@pytest.mark.parametrize("place", [".out.partial", ".out.partial/model", ".out.previous"])
def test_a_link_where_an_export_grows_is_refused(tmp_path: Path, place):
    """What it leads to would be emptied, as whatever no plan names is."""
    elsewhere, link = tmp_path / "elsewhere", tmp_path / place
    elsewhere.mkdir()
    (elsewhere / "mine.txt").write_text("mine")
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(elsewhere)
    with pytest.raises(UserError, match=f"{link}: a link, where an export is to grow; remove it"):
        write_all(tmp_path / "out")
    assert (elsewhere / "mine.txt").read_text() == "mine"


def test_a_growing_file_is_not_written_through_a_link(tmp_path: Path):
    output, elsewhere = tmp_path / "out", tmp_path / "elsewhere.bin"
    with pytest.raises(MachineError, match="stop"), staged_folder(output, INPUTS) as stage, stage.grow("a.bin") as file:
        file.write(b"first")
        file.save()
        raise OSError(5, "stop")
    grown = staging_root(output) / "a.bin"
    grown.rename(elsewhere)
    grown.symlink_to(elsewhere)
    write_all(output)
    assert elsewhere.read_bytes() == b"first" and (output / "a.bin").read_bytes() == b"".join(PIECES["a.bin"])


def test_an_export_that_is_replaced_keeps_what_its_links_lead_to(tmp_path: Path):
    """The earlier one says that it wrote sub/a.txt, and sub lies elsewhere by now."""
    output, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    output.mkdir()
    (elsewhere / "a.txt").write_text("mine")
    (output / "sub").symlink_to(elsewhere)
    (output / staging.REPORT).write_text(json.dumps({"written": ["sub/a.txt", "../elsewhere/a.txt", staging.REPORT]}))
    write_all(output)
    assert (elsewhere / "a.txt").read_text() == "mine"


@pytest.mark.parametrize("odd", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), os.mkdir,
                                 lambda path: path.write_text("[" * 10**5)])  # fmt: skip
def test_a_report_that_is_none_is_not_read(tmp_path: Path, odd):
    odd(tmp_path / staging.REPORT)
    assert staging.written_by_export(tmp_path) is None
