"""How long a run is: what `num_train_epochs: auto` stands for, and what is said of runs that are too short."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_runs import read_metrics, write_rows

from qlora_tool.config import Config, load_config, with_values
from qlora_tool.training.loop import train
from qlora_tool.training.plan import StepPlan


def plan(rows: int, **values) -> StepPlan:
    """Of rows of 10 tokens that are not packed, four a step."""
    given = {"data.packing": False} | {key.replace("__", "."): value for key, value in values.items()}
    return StepPlan.of(with_values(Config(), given), [10] * rows)


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 57, 60, 199, 200, 396, 397, 400, 401, 4000])
def test_auto_goes_through_the_data_until_there_are_a_hundred_steps(rows):
    made, an_epoch = plan(rows), math.ceil(rows / 4)
    epochs = made.config.training.num_train_epochs
    assert made.total_steps == epochs * an_epoch >= 100
    assert (epochs - 1) * an_epoch < 100  # and not more often than that takes
    assert f"num_train_epochs: auto is {epochs}, as one pass has" in made.describe()
    assert made.too_short() is None


def test_what_is_set_is_kept():
    made = plan(60, training__num_train_epochs=2)
    assert (made.total_steps, made.config.training.num_train_epochs) == (30, 2)
    assert made.describe() == "30 steps (15 an epoch)"
    assert plan(60, training__max_steps=7).total_steps == 7
    assert plan(60, training__max_steps=7).config.training.num_train_epochs == "auto"  # nothing was decided by it


@pytest.mark.parametrize(
    ("values", "cures"),
    [
        ({"training__num_train_epochs": 1}, ["15 optimizer steps", "num_train_epochs: auto (here 7)", "batch_size"]),
        ({"training__num_train_epochs": 1, "training__per_device_train_batch_size": 60}, ["1 optimizer step,"]),
        ({"training__num_train_epochs": 1, "data__packing": True}, ["1 optimizer step,", "data.packing: false"]),
        ({"training__max_steps": 29}, ["29 optimizer steps", "leave training.max_steps out"]),
        ({"training__max_steps": 30}, []),
        ({"training__num_train_epochs": 2}, []),
    ],
)
def test_a_run_of_few_steps_is_told_what_mends_it(values, cures):
    said = plan(60, **values).too_short()
    assert (said is None) == (cures == [])
    assert all(cure in said for cure in cures)
    assert said is None or "\n" not in said
    assert said is None or ("packing" in said) == ("data__packing" in values)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"training__warmup_steps": 16},
         ["training.warmup_steps: 16, but this run has 15 steps: the learning rate gets no higher than 1.88e-04"]),
        ({"training__warmup_steps": 500, "training__max_steps": 1}, ["has 1 step: the learning rate gets no higher"]),
        ({"training__warmup_steps": 15}, []),
        ({"training__warmup_steps": 0.99}, []),
        ({"training__load_best_model_at_end": True, "training__eval_steps": 15}, ["the last adapter is the only one"]),
        ({"training__load_best_model_at_end": True, "training__eval_steps": 14}, []),
        ({"training__early_stopping_patience": 3, "training__eval_steps": 4}, ["has 3 evaluations before its end"]),
        ({"training__early_stopping_patience": 3, "training__eval_steps": 3}, []),
        ({"training__early_stopping_patience": 1, "training__eval_steps": 99, "training__load_best_model_at_end": True},
         ["load_best_model_at_end: true", "early_stopping_patience: 1, but this run has 0 evaluations"]),
        ({}, []),
    ],
)  # fmt: skip
def test_settings_that_a_run_never_comes_to_are_told(values, said):
    made = plan(60, training__num_train_epochs=1, data__eval=0.5, **values).without_effect()
    assert len(made) == len(said)
    assert all(part in line and "\n" not in line for part, line in zip(said, made, strict=True))


def test_auto_and_its_reason_are_shown(config, tmp_path, caplog):
    values = {"training__max_steps": -1, "training__per_device_train_batch_size": 15, "data__max_length": 48}
    caplog.set_level(logging.INFO, "qlora_tool")
    run = train(config(**values), dry_run=True)
    assert run.plan.total_steps == 100
    assert "run: 100 steps (2 an epoch; num_train_epochs: auto is 50, as one pass has 2 steps and" in caplog.text


def test_few_short_rows_in_one_packed_step_are_learned(inputs, config, tmp_path):
    """Forty rows make a single step, once a warm-up step of rate 0: a run of success, and nothing learned."""
    rows = write_rows(tmp_path / "forty.jsonl", 40)
    values = {"data__train": str(rows), "data__packing": True, "data__max_length": 256,
              "training__per_device_train_batch_size": 64, "adapter__lora_dropout": 0.0}  # fmt: skip
    train(config(training__max_steps=-1, training__num_train_epochs=1, **values))
    (record,) = read_metrics(tmp_path / "run")
    assert record["learning_rate"] == 1e-2
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name)

    values["data__train"] = str(write_rows(tmp_path / "eight.jsonl", 8))
    train(config("auto", training__max_steps=-1, **values))
    records = read_metrics(tmp_path / "auto")
    assert len(records) == 100
    assert records[-1]["loss"] < records[0]["loss"] / 2
    assert load_config(str(tmp_path / "auto" / "config.yaml")).training.num_train_epochs == 100
    state = Path(tmp_path / "auto" / "checkpoints" / "step-000100" / "state.json")
    assert json.loads(state.read_text())["warmup_from_zero"] is False
