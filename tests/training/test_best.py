"""The best evaluation's adapter is the one that is kept, and a run that gets no better stops; also after a kill."""

from __future__ import annotations

import json
import logging
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from child_process import child_environment
from safetensors.torch import load_file
from tiny_runs import (
    adapter_bytes,
    assert_same_run,
    comparable,
    interrupted,
    read_metrics,
    run_config,
    write_model,
    write_rows,
)

from qlora_tool.config import config_to_yaml
from qlora_tool.errors import UserError
from qlora_tool.inference.evaluation import EvaluationResult
from qlora_tool.training import loop
from qlora_tool.training.loop import train
from qlora_tool.training.result import TrainResult

BEST = {"data__eval": 0.2, "training__eval_steps": 1, "training__load_best_model_at_end": True,
        "training__save_total_limit": 1}  # fmt: skip
ALL = {"training__save_steps": 1, "training__save_total_limit": None}


class Losses:
    """What evaluations give after each step, the first being that before any; `step` is the last step that was taken,
    to be set where a run goes on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.step, self.given = 0, ()
        monkeypatch.setattr(loop, "evaluate_loss", lambda *_: EvaluationResult(self.given[self.step], 7))
        monkeypatch.setattr(loop, "train_step", self.take)

    def take(self, *arguments, train_step=loop.train_step):
        self.step += 1
        return train_step(*arguments)

    def are(self, *given: float, after: int = 0) -> None:
        self.given, self.step = given, after


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> Losses:
    return Losses(monkeypatch)


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name[-6:]) for path in (folder / "checkpoints").iterdir())


def weights(file: Path) -> dict[str, torch.Tensor]:
    return {name.removeprefix("base_model.model."): tensor for name, tensor in load_file(file).items()}


def assert_adapter_is_of_step(folder: Path, step: int, reference: Path) -> None:
    """To the bit; `reference` has all its checkpoints."""
    found = weights(folder / "adapter" / "adapter_model.safetensors")
    saved = weights(reference / "checkpoints" / f"step-{step:06d}" / "adapter.safetensors")
    assert found.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in found.items())
    assert json.loads((folder / "adapter" / "qlora_tool.json").read_text())["step"] == step


def test_the_adapter_is_that_of_the_lowest_loss(config, tmp_path):
    """Of real losses, at a rate that overshoots; against the run that keeps every checkpoint and its last adapter."""
    values = {"training__learning_rate": 0.1, "training__max_steps": 12}
    run = train(config(**BEST, **values))
    every = {**BEST, **ALL, **values, "training__load_best_model_at_end": False}
    train(config("every", **every))
    records = read_metrics(tmp_path / "every")
    lowest = min(records, key=lambda record: record["eval_loss"])
    assert 1 < lowest["step"] < 12  # else the test would show nothing
    assert_adapter_is_of_step(tmp_path / "run", lowest["step"], tmp_path / "every")
    assert_adapter_is_of_step(tmp_path / "every", 12, tmp_path / "every")
    assert checkpoints(tmp_path / "run") == [lowest["step"], 12]
    result = TrainResult.of(run, 1.0, finished=True)
    assert (result.steps, result.adapter_step, result.best_step) == (12, lowest["step"], lowest["step"])
    assert result.eval_losses == {"eval": lowest["eval_loss"]} == {"eval": result.best_metric}
    for found, expected in zip(read_metrics(tmp_path / "run"), records, strict=True):
        assert found["best_metric"] == min(record["eval_loss"] for record in records[: found["step"]])
        assert {key: found[key] for key in comparable(expected)} == comparable(expected)


def test_of_equal_losses_the_first_is_kept_and_no_number_is_never_the_best(config, tmp_path, losses, caplog):
    caplog.set_level(logging.INFO, "qlora_tool")
    losses.are(5, float("nan"), 4, 3, 3, float("nan"), 3)
    train(config(**BEST | ALL))
    assert_adapter_is_of_step(tmp_path / "run", 3, tmp_path / "run")
    assert "adapter/ is the best one: eval_loss 3.0000 after step 3, of 6 steps\n" in caplog.text


def test_the_best_that_is_worse_than_the_untuned_model_is_said_to_be(config, tmp_path, losses, caplog):
    caplog.set_level(logging.INFO, "qlora_tool")
    losses.are(2, 5, 4, 3, 4, 5, 6)
    train(config(**BEST | ALL))
    assert (
        "adapter/ is the best one: eval_loss 3.0000 after step 3, of 6 steps; that is no better than the 2.0000 before "
        "the first step\n"
    ) in caplog.text


@pytest.mark.parametrize(
    ("every", "best", "said", "steps"),
    [
        (1, True, "every step", [1, 2, 3, 4, 5, 6]),
        (4, False, "every 4 steps and after the last one", [4, 6]),
        (50, False, "after the last step", [6]),
        (50, True, "after the last step and after every evaluation that is the best so far", [3, 6]),
        (4, True, "every 4 steps, after the last one and after every evaluation that is the best so far", [3, 4, 6]),
    ],
)
def test_when_checkpoints_are_made_is_said(config, tmp_path, losses, caplog, every, best, said, steps):
    caplog.set_level(logging.INFO, "qlora_tool")
    losses.are(7, 6, 5, 4, 5, 6, 7)
    train(config(**BEST | ALL | {"training__save_steps": every, "training__load_best_model_at_end": best,
                                 "training__save_total_limit": 9, "training__eval_steps": 3}))  # fmt: skip
    assert f"; a checkpoint {said}\n" in caplog.text
    assert checkpoints(tmp_path / "run") == steps


def test_the_last_adapter_is_said_to_be_worse_than_the_best(config, tmp_path, losses, caplog):
    caplog.set_level(logging.INFO, "qlora_tool")
    losses.are(5, 4, 3, 4, 5, 6, 7)
    run = train(config(**BEST | ALL | {"training__load_best_model_at_end": False}))
    assert_adapter_is_of_step(tmp_path / "run", 6, tmp_path / "run")
    assert "adapter/ is the last step's; the best was eval_loss 3.0000 after step 2 (training.load_best" in caplog.text
    assert "best_step" not in read_metrics(tmp_path / "run")[-1]
    assert TrainResult.of(run, 1.0, finished=True).best_step == 2


def test_the_metric_of_one_of_several_sets(config, tmp_path, inputs):
    sets = {name: str(write_rows(tmp_path / f"{name}.jsonl", 7, first=n)) for n, name in ((0, "near"), (500, "far"))}
    values = BEST | ALL | {"data__eval": sets, "training__learning_rate": 0.1, "training__max_steps": 12}
    for metric, key in (("loss", "eval_near_loss"), ("far_loss", "eval_far_loss"), ("eval_far_loss", "eval_far_loss")):
        train(config(metric, training__metric_for_best_model=metric, **values))
        lowest = min(read_metrics(tmp_path / metric), key=lambda record: record[key])
        assert_adapter_is_of_step(tmp_path / metric, lowest["step"], tmp_path / metric)


# ------------------------------------------------------------------------------------------------------ stopping early


@pytest.mark.parametrize(("patience", "stopped"), [(1, 3), (2, 6), (3, 8), (None, 8)])
def test_a_run_that_gets_no_better_stops(config, tmp_path, losses, caplog, patience, stopped):
    caplog.set_level(logging.INFO, "qlora_tool")
    losses.are(9, 5, 4, 4, 3, 3.5, 3.2, 2, 2.5)
    values = {"training__early_stopping_patience": patience, "training__max_steps": 8}
    run = train(config(**BEST | values))
    assert run.progress.step == stopped
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == list(range(1, stopped + 1))
    train_result = TrainResult.of(run, 1.0, finished=True)
    assert (train_result.steps, train_result.total_steps) == (stopped, 8)
    assert ("stopped early" in caplog.text) == (stopped < 8)
    with pytest.raises(UserError, match="holds this run, finished"):
        train(config(**BEST | values))


def test_stopping_early_without_the_best_keeps_the_last(config, tmp_path, losses):
    losses.are(9, 5, 6, 7)
    train(config(**BEST | ALL | {"training__load_best_model_at_end": False, "training__early_stopping_patience": 2}))
    assert_adapter_is_of_step(tmp_path / "run", 3, tmp_path / "run")


def test_a_run_that_stopped_early_goes_on_with_more_patience(config, tmp_path, losses):
    given = (9, 5, 6, 7, 4, 3, 2)
    losses.are(*given)
    train(config(training__early_stopping_patience=2, **BEST))
    with pytest.raises(UserError, match=r"--extend: .* 2 evaluations were no better .*early_stopping_patience is 2;"):
        train(config(training__early_stopping_patience=2, **BEST), extend=True)
    losses.are(*given, after=3)
    train(config(training__early_stopping_patience=4, **BEST), extend=True)
    losses.are(*given)
    train(config("whole", training__early_stopping_patience=4, **BEST))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


# ------------------------------------------------------------------------------------------------- kills and resuming


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_a_resumed_run_keeps_the_best_and_the_patience(config, tmp_path, losses, stop_in_step, stop):
    given, values = (9, 5, 3, 4, 4, 4, 4), BEST | {"training__early_stopping_patience": 4, "training__save_steps": 50}
    losses.are(*given)
    train(config("whole", **values))
    losses.are(*given)
    interrupted(stop_in_step, config(**values), stop)
    losses.are(*given, after=stop)
    train(config(**values))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert json.loads((tmp_path / "run" / "adapter" / "qlora_tool.json").read_text())["step"] == 2
    assert checkpoints(tmp_path / "run") == checkpoints(tmp_path / "whole") == [2, 6]


@pytest.mark.parametrize(
    ("place", "step"),
    [*((place, step) for place in ("evaluate_loss", "save_checkpoint") for step in (2, 4, 6)), ("finish", 6)],
)
def test_a_run_that_dies_while_the_best_is_found_or_saved(config, tmp_path, losses, monkeypatch, place, step):
    """Before the evaluation, between it and the checkpoint, and before the adapter is written."""
    given = (9, 5, 3, 4, 2, 4, 1)
    losses.are(*given)
    train(config("whole", **BEST))
    original = getattr(loop, place)

    def die(*arguments):
        if losses.step == step:
            raise KeyboardInterrupt
        return original(*arguments)

    losses.are(*given)
    monkeypatch.setattr(loop, place, die)
    with pytest.raises(KeyboardInterrupt):
        train(config(**BEST))
    monkeypatch.setattr(loop, place, original)
    losses.are(*given, after=checkpoints(tmp_path / "run")[-1])
    train(config(**BEST))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_run_that_goes_on_in_another_folder_takes_the_best_along(config, tmp_path, losses):
    given = (9, 5, 3, 4, 4, 4, 4)
    losses.are(*given)
    train(config("first", **BEST | {"training__save_total_limit": None, "training__save_steps": 4}))
    losses.are(*given, after=4)
    train(config("other", **BEST), resume=str(tmp_path / "first" / "checkpoints" / "step-000004"))
    assert adapter_bytes(tmp_path / "other") == adapter_bytes(tmp_path / "first")
    assert checkpoints(tmp_path / "other") == [2, 6]
    losses.are(*given, after=2)
    train(config("from-the-best", **BEST), resume=str(tmp_path / "first" / "checkpoints" / "step-000002"))
    assert adapter_bytes(tmp_path / "from-the-best") == adapter_bytes(tmp_path / "first")


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"training__load_best_model_at_end": True}, "has no checkpoint left"),
        ({"training__metric_for_best_model": "far_loss"}, "is of eval_loss, not of training.metric_for_best"),
    ],
)
def test_a_best_one_that_is_no_longer_meant_or_there_is_forgotten_aloud(
    config, tmp_path, losses, stop_in_step, caplog, values, why
):
    sets = {name: str(write_rows(tmp_path / f"{name}.jsonl", 7)) for name in ("near", "far")}
    before = BEST | {"data__eval": sets, "training__load_best_model_at_end": False}
    losses.are(9, 5, 3, 4, 4, 4.5, 4.5)
    interrupted(stop_in_step, config(**before), 3)
    losses.are(9, 5, 3, 4, 4, 4.5, 4.5, after=3)
    run = train(config(**before | values))
    assert f"the best evaluation so far, eval_loss 3.0000 after step 2, {why}" in caplog.text
    assert (run.progress.best.step, run.progress.best.value) == (4, 4)


@pytest.mark.slow  # a process that imports torch and transformers for every kill
def test_a_run_that_is_killed_again_and_again_keeps_the_best(tmp_path):
    """SIGKILL at random moments of the steps, evaluations and saves."""
    inputs = write_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")
    values = {key.replace("__", "."): value for key, value in BEST.items()} | {
        "training.learning_rate": 0.1, "training.max_steps": 60, "training.save_steps": 7, "training.eval_steps": 3,
    }  # fmt: skip
    file = tmp_path / "config.yaml"
    file.write_text(config_to_yaml(run_config(*inputs, tmp_path / "run", values)))
    command = [sys.executable, "-m", "qlora_tool", "train", str(file)]
    chance, kills = random.Random(5), 0
    for _ in range(40):
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=child_environment()) as process:
            wait = chance.randint(2, 12)
            for line in process.stderr:
                wait -= line.startswith("step ")
                if wait == 0:
                    time.sleep(chance.random() * 0.05)
                    process.send_signal(signal.SIGKILL)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
    assert kills >= 3 and process.returncode == 0
    train(run_config(*inputs, tmp_path / "whole", values))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    every = values | {"training.save_steps": 1, "training.save_total_limit": None}
    train(run_config(*inputs, tmp_path / "every", every))
    lowest = min((r for r in read_metrics(tmp_path / "run") if "eval_loss" in r), key=lambda r: r["eval_loss"])
    assert_adapter_is_of_step(tmp_path / "run", lowest["step"], tmp_path / "every")
