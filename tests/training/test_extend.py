"""Training a run for longer: only where it is asked for, from the last checkpoint, as the longer run would have."""

from __future__ import annotations

import logging
import shutil

import pytest
from tiny_runs import adapter_bytes, assert_same_run, interrupted, read_metrics

from qlora_tool import api
from qlora_tool.errors import OptionError, UserError
from qlora_tool.training.loop import train

STEADY = {"training__lr_scheduler_type": "constant", "training__warmup_steps": 0}


def line_of(config, **options) -> str:
    with pytest.raises(UserError) as error:
        train(config, **options)
    (line,) = error.value.lines
    assert error.value.exit_code == 2
    return line


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    "lengths",
    [
        ({"training__max_steps": 4}, {"training__max_steps": 9}),
        ({"training__max_steps": -1, "training__num_train_epochs": 0.5},
         {"training__max_steps": -1, "training__num_train_epochs": 1.25}),
        ({"training__max_steps": 4}, {"training__max_steps": -1, "training__num_train_epochs": 2}),
    ],
)  # fmt: skip
def test_a_longer_run_names_extend_and_goes_on_with_it(config, tmp_path, stop_in_step, lengths, finished):
    """At a rate that does not depend on the length, it is the run that was as long from the start."""
    shorter, longer = (config(**STEADY | length) for length in lengths)
    train(config("whole", **STEADY | lengths[1]))
    if finished:
        train(shorter)
    else:
        interrupted(stop_in_step, shorter, 2)
    before = sorted((path, path.read_bytes()) for path in (tmp_path / "run").rglob("*") if path.is_file())
    line = line_of(longer)
    assert line.startswith(f"{tmp_path / 'run'}: holds another run (training.")
    assert "), a shorter one; give --extend to go on from its last checkpoint" in line
    assert sorted((path, path.read_bytes()) for path in (tmp_path / "run").rglob("*") if path.is_file()) == before
    train(longer, extend=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_the_rate_is_that_of_the_longer_run(config, tmp_path):
    train(config(training__max_steps=4, training__lr_scheduler_type="linear"))
    train(config(training__max_steps=8, training__lr_scheduler_type="linear"), extend=True)
    train(config("whole", training__max_steps=8, training__lr_scheduler_type="linear"))
    found, whole = ([record["learning_rate"] for record in read_metrics(tmp_path / name)] for name in ("run", "whole"))
    assert found[4:] == whole[4:]
    assert found[:4] != whole[:4]


def test_a_run_that_is_no_longer_is_not_extended(config, tmp_path):
    train(config(training__save_steps=2))
    line = line_of(config(training__save_steps=2), extend=True)
    assert line.endswith("is of step 6, and this run has 6; raise training.max_steps")
    line = line_of(config(training__max_steps=5), extend=True)
    assert line.startswith(f"{tmp_path / 'run'}: holds another run (training.max_steps: 6 there, 5 here); give another")
    assert line_of(config(training__max_steps=5)) == line
    line = line_of(config(training__max_steps=9, training__learning_rate=1e-3), extend=True)
    assert line.startswith(f"{tmp_path / 'run'}: holds another run (training.learning_rate: 0.01 there, 0.001 here)")
    line = line_of(config("nowhere", training__max_steps=9), extend=True)
    assert line.startswith(f"--extend: {tmp_path / 'nowhere'} holds no run to go on with")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    line = line_of(config(training__max_steps=9), extend=True)
    assert "holds no checkpoint to go on from; set adapter.init_from:" in line
    assert adapter_bytes(tmp_path / "run")


def test_an_interrupted_extension_goes_on_by_itself(config, tmp_path, stop_in_step):
    train(config(training__max_steps=3, **STEADY))
    interrupted(stop_in_step, config(training__max_steps=7, **STEADY), 2, extend=True)
    train(config(training__max_steps=7, **STEADY))
    train(config("whole", training__max_steps=7, **STEADY))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_an_unfinished_run_of_the_same_length_goes_on_all_the_same(config, tmp_path, stop_in_step):
    interrupted(stop_in_step, config(), 2)
    train(config(), extend=True)
    train(config("whole"))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_epochs_that_were_chosen_are_not_asked_for_again(config, tmp_path, stop_in_step, caplog):
    """`auto` stays what it was decided to be, and a number beside it is another length."""
    values = {"training__max_steps": -1, "training__per_device_train_batch_size": 15, "data__max_length": 48}
    interrupted(stop_in_step, config(**values), 2)
    line = line_of(config(training__num_train_epochs=60, **values))
    assert "(training.num_train_epochs: 50 there, 60 here), a shorter one; give --extend" in line
    line = line_of(config(training__num_train_epochs=2, **values))
    assert "(training.num_train_epochs: 50 there, 2 here); give another" in line
    caplog.set_level(logging.INFO, "qlora_tool")
    assert train(config(**values), dry_run=True).plan.total_steps == 100
    assert train(config(training__num_train_epochs=50, **values), dry_run=True).plan.total_steps == 100


@pytest.mark.parametrize("options", [{"overwrite": True}, {"resume": "never"}])
def test_extend_does_not_go_with_starting_anew(config, options):
    with pytest.raises(OptionError, match=r"--extend goes on with a run and --(overwrite|resume never) replaces it"):
        api.train(config(), extend=True, **options)
