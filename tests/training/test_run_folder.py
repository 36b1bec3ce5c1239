"""The layout of a run's folder: what is found in it, and what is taken away."""

from __future__ import annotations

import json
from pathlib import Path

from qlora_tool.config import Config
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
    (folder.checkpoints / ".step-000006.partial").mkdir()
    folder.adapter.mkdir()
    (folder.adapter / "adapter_config.json").write_text("{}")
    metrics(folder, [1, 2, 3, 4, 5, 6], '{"step": 7, "lo')  # a power failure in the midst of a line
    folder.rewind(4)
    assert [path.name for path in sorted(folder.checkpoints.iterdir())] == ["step-000002", "step-000004"]
    lines = folder.metrics_file.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert not folder.is_finished()
    folder.rewind(4)
    assert len(folder.metrics_file.read_text().splitlines()) == 4


def test_clearing_takes_the_runs_files_and_no_others(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_config(Config())
    checkpoint(folder, 2)
    metrics(folder, [1])
    (tmp_path / "memory.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    folder.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
