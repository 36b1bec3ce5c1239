"""The layout of a run's folder: what is found in it, and what is taken away."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from child_process import child_environment

from qlora_tool.config import Config
from qlora_tool.errors import UserError
from qlora_tool.files import atomic
from qlora_tool.files.sealed import listing, write_sealed
from qlora_tool.run_folder import RunFolder


def checkpoint(folder: RunFolder, step: int) -> Path:
    path = folder.checkpoint(step)
    path.mkdir(parents=True)
    (path / "state.json").write_text("{}")
    return path


def metrics(folder: RunFolder, steps: list[int], end: str = "") -> None:
    folder.metrics_file.write_text("".join(f'{{"step": {step}, "loss": 1.5}}\n' for step in steps) + end)


def test_an_empty_folder_holds_no_run(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert not folder.holds_run()
    assert not folder.is_finished()
    assert folder.checkpoint_folders() == []


def test_the_configuration_comes_back_as_it_was(tmp_path):
    folder = RunFolder(tmp_path / "deep" / "run")
    config = Config.model_validate({"adapter": {"rank_pattern": {"a.b": 3}}, "data": {"eval": {"x": "y.jsonl"}}})
    folder.write_config(config)
    assert folder.holds_run()
    assert folder.config() == config


def test_checkpoints_are_in_the_order_of_their_steps_and_half_ones_are_none(tmp_path):
    folder = RunFolder(tmp_path)
    paths = [checkpoint(folder, step) for step in (1_000_000, 20, 999_999, 100)]
    (folder.checkpoints / "step-000300").mkdir()
    (folder.checkpoints / ".step-000400.partial").mkdir()
    assert folder.checkpoint_folders() == [paths[1], paths[3], paths[2], paths[0]]
    assert folder.holds(paths[0])
    assert not folder.holds(tmp_path / "elsewhere" / "checkpoints" / "step-000020")


def test_rewinding_drops_what_comes_after_the_step(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (2, 4, 999_999, 1_000_000):
        checkpoint(folder, step)
    gone = f".step-000006.{atomic._host()}-4194305-0.tmp"  # of a process that no system has
    for name in (gone, ".step-mine", "step-000006-good", "step-5"):
        (folder.checkpoints / name).mkdir()
    folder.adapter.mkdir()
    (folder.adapter / "adapter_config.json").write_text("{}")
    metrics(folder, [1, 2, 3, 4, 5, 6], '{"step": 7, "lo')  # a power failure in the midst of a line
    aside = folder.rewind(4)
    kept = [".step-mine", "step-000002", "step-000004", "step-000006-good", "step-5"]
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == kept
    assert aside == tmp_path / "set-aside-1"
    assert sorted(path.name for path in aside.iterdir()) == ["adapter", "step-1000000", "step-999999"]
    lines = folder.metrics_file.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert not folder.is_finished()
    assert folder.rewind(4) is None
    assert len(folder.metrics_file.read_text().splitlines()) == 4


def test_a_replaced_run_is_kept_aside_and_then_removed_but_for_what_it_did_not_write(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_config(Config())
    for step in (2, 4):
        write_sealed(checkpoint(folder, step) / "manifest.json", {"files": listing(folder.checkpoint(step))})
    (folder.checkpoint(4) / "notes.txt").write_text("mine")
    (folder.checkpoints / "step-000004-good").mkdir()
    folder.adapter.mkdir()
    (folder.adapter / "adapter_config.json").write_text("{}")
    write_sealed(folder.adapter / "manifest.json", {"files": listing(folder.adapter)})
    metrics(folder, [1])
    (tmp_path / "memory.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    assert folder.put_aside() == tmp_path / "replaced-1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "replaced-1"]
    assert RunFolder(tmp_path / "replaced-1").is_finished()
    assert folder.remove_replaced() == [tmp_path / "replaced-1"]
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    inside = "replaced-1/checkpoints"
    assert left == ["notes.txt", "replaced-1", inside, f"{inside}/step-000004", f"{inside}/step-000004-good",
                    f"{inside}/step-000004/notes.txt"]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), [
    ("folder", "checkpoints/step-000001"), ("file", "report/rows.json"), ("file", "memory.json"),
    ("file", "metrics.jsonl"),
])  # fmt: skip
def test_what_a_killed_run_left_half_written_goes_with_it(tmp_path, kind, name):
    folder = RunFolder(tmp_path / "run")
    folder.write_config(Config())
    killed = (
        "import os, sys\n"
        "from pathlib import Path\n"
        f"from qlora_tool.files.atomic import replacing_{kind} as replacing\n"
        "with replacing(Path(sys.argv[1])) as temporary:\n"
        "    (temporary / 'state.json' if temporary.is_dir() else temporary).write_text('{}')\n"
        "    os.kill(os.getpid(), 15)\n"
    )
    half = folder.path / name
    subprocess.run([sys.executable, "-c", killed, half], env=child_environment(), check=False)
    (folder.notes / "mine").mkdir(parents=True)
    aside = folder.put_aside()
    if half.parent == folder.path:  # hidden, and no file of a run: it goes when the file is written again
        [left] = folder.path.glob(".*.tmp")
        left.rename(aside / left.name)
    assert len(list(aside.rglob(".*.tmp"))) == 1
    assert folder.remove_replaced() == [aside]
    assert [str(path.relative_to(aside)) for path in aside.rglob("*")] == ["report", "report/mine"]


@pytest.mark.parametrize(("name", "content"), [
    ("adapter/adapter_config.json", "{}"), ("memory.json", "{}"), ("metrics.jsonl", ""), ("checkpoints/a", ""),
    ("config.yaml", "model:\n  name_or_path: mine\n"),
])  # fmt: skip
def test_what_no_run_wrote_is_not_replaced(tmp_path, name, content):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{tmp_path / name.partition('/')[0]}: no run wrote it.* and a run would"):
        RunFolder(tmp_path).refuse_foreign()


def test_an_adapter_of_another_program_in_a_runs_folder_is_not_replaced(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_config(Config())
    folder.refuse_foreign()
    folder.adapter.mkdir()
    (folder.adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"adapter: no run wrote it, as it has no qlora_tool\.json"):
        folder.refuse_foreign()


def test_a_file_a_folder_or_a_link_in_the_place_of_a_runs_own(tmp_path):
    cases = {"adapter": "a file, where a run has a folder", "checkpoints": "a file, where a run has a folder",
             "metrics.jsonl": "a folder, where a run has a file", "config.yaml": "a folder, where a run"}  # fmt: skip
    for number, (name, line) in enumerate(cases.items()):
        folder = RunFolder(tmp_path / str(number))
        folder.path.mkdir()
        (folder.path / name).mkdir() if "." in name else (folder.path / name).touch()
        with pytest.raises(UserError, match=f"{folder.path / name}: {line}"):
            folder.refuse_foreign()
    (tmp_path / "elsewhere").mkdir()
    linked = RunFolder(tmp_path / "linked")
    linked.path.mkdir()
    linked.checkpoints.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="checkpoints: a link, which a run would replace"):
        linked.refuse_foreign()
