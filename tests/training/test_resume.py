"""Resuming: byte for byte the run that was not interrupted, and never onto another run."""

from __future__ import annotations

import json
import shutil

import pytest
from tiny_models import write_tiny
from tiny_runs import (
    adapter_bytes,
    as_version_0_1,
    assert_same_run,
    comparable,
    interrupted,
    read_metrics,
    run_config,
)

from qlora_tool.errors import UserError
from qlora_tool.memory.run_report import RunMemory
from qlora_tool.ops.products import products_choice, use_products
from qlora_tool.ops.speeds import ONEDNN, PYTORCH, has_onednn
from qlora_tool.training import loop
from qlora_tool.training.loop import train


@pytest.mark.parametrize(
    "values",
    [
        {"training__optim": "adamw"},
        {"training__optim": "adamw_8bit", "adapter__r": 64},  # large enough that its states are in 8 bits
        {"training__gradient_accumulation_steps": 3, "data__packing": True, "training__gradient_checkpointing": True},
        {"adapter__method": "dora", "adapter__modules_to_save": ["lm_head"], "model__compute_dtype": "bfloat16"},
        {"training__logging_steps": 2, "data__eval": 0.2, "training__eval_steps": 5},  # stopped between two records
    ],
)
def test_an_interrupted_run_goes_on_exactly(config, tmp_path, stop_in_step, values):
    train(config("whole", **values))
    interrupted(stop_in_step, config(**values), 3)
    folder = tmp_path / "run"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000003"]
    run = train(config(**values))
    assert run.progress.step == 6
    assert_same_run(folder, tmp_path / "whole")


@pytest.fixture
def own_products():
    yield
    use_products(None)


@pytest.mark.skipif(not has_onednn(), reason="this PyTorch has no oneDNN")
def test_a_resumed_run_takes_the_products_of_the_run_it_continues(config, tmp_path, stop_in_step, own_products):
    """The two libraries round otherwise; which of them is faster may have been measured anew meanwhile."""
    use_products(ONEDNN)
    train(config("whole"))
    interrupted(stop_in_step, config(), 3)
    use_products(PYTORCH)
    seen = []

    class Watch(RunMemory):
        def check(self, config, batch, start=None):
            seen.append(products_choice())
            return super().check(config, batch, start)

    train(config(), watcher=Watch())
    assert seen == [ONEDNN]  # what is predicted has them too
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_checkpoint_that_does_not_say_its_products_takes_those_of_here(config, tmp_path, stop_in_step, own_products):
    use_products(PYTORCH)
    train(config("whole"))
    interrupted(stop_in_step, config(), 3)
    file = tmp_path / "run" / "checkpoints" / "step-000003" / "state.json"
    state = json.loads(file.read_text())
    assert state.pop("products") == PYTORCH
    file.write_text(json.dumps(state))
    as_version_0_1(file.parent)
    train(config())
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_checkpoint_of_version_0_1_0_goes_on_with_the_rates_that_it_began_with(config, tmp_path, stop_in_step):
    """It says nothing of its warmup, of which the i-th of w steps has the rate (i - 1)/w."""
    values = {"training__warmup_steps": 5, "training__lr_scheduler_type": "constant"}
    interrupted(stop_in_step, config(**values), 2)
    file = tmp_path / "run" / "checkpoints" / "step-000002" / "state.json"
    state = json.loads(file.read_text())
    kept = ("step", "tokens", "unlogged_loss", "unlogged_tokens", "products")
    as_version_0_1(file.parent)
    file.write_text(json.dumps({key: state[key] for key in kept}))
    interrupted(stop_in_step, config(**values), 1)
    train(config(**values))
    rates = [record["learning_rate"] for record in read_metrics(tmp_path / "run")]
    assert rates == pytest.approx([0.002, 0.004, *(0.01 * (step - 1) / 5 for step in (3, 4, 5)), 0.01])


def test_a_run_may_be_interrupted_again_and_again(config, tmp_path, stop_in_step):
    train(config("whole"))
    for _ in range(3):
        interrupted(stop_in_step, config(), 1)
    train(config())
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_signal_in_the_last_step_is_too_late(config, tmp_path, stop_in_step):
    train(config("whole"))
    stop_in_step(6)
    train(config())
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_run_that_died_goes_on_from_its_last_checkpoint(config, tmp_path, monkeypatch):
    train(config("whole", training__save_steps=2))

    def die(*arguments, train_step=loop.train_step):
        if (folder / "metrics.jsonl").exists() and len(read_metrics(folder)) == 5:
            raise KeyboardInterrupt
        return train_step(*arguments)

    folder = tmp_path / "run"
    monkeypatch.setattr(loop, "train_step", die)
    with pytest.raises(KeyboardInterrupt):
        train(config(training__save_steps=2))
    monkeypatch.undo()
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "lo')
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step-000002", "step-000004"]
    train(config(training__save_steps=2))
    assert_same_run(folder, tmp_path / "whole")  # step 5 is there once


def test_a_run_that_died_before_its_first_checkpoint_begins_again(config, tmp_path, monkeypatch):
    def die(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train_step", die)
    with pytest.raises(KeyboardInterrupt):
        train(config())
    monkeypatch.undo()
    train(config())
    train(config("whole"))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_run_that_died_while_its_adapter_was_saved_saves_it(config, tmp_path):
    train(config())
    before = adapter_bytes(tmp_path / "run"), read_metrics(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    train(config())
    assert (adapter_bytes(tmp_path / "run"), read_metrics(tmp_path / "run")) == before


@pytest.mark.parametrize(
    "case",
    [
        ("rows.txt", {"data__max_length": 32}),  # found to be text, and fully trained
        ("rows.jsonl", {"data__packing": True, "family": "bloom"}),  # which cannot keep packed examples apart
    ],
)
def test_what_a_run_decides_for_itself_makes_it_no_other_run(inputs, tmp_path, stop_in_step, case):
    name, values = case
    values = {key.replace("__", "."): value for key, value in values.items()}
    model, rows = inputs
    if name == "rows.txt":
        rows = tmp_path / name
        rows.write_text("What is the capital of France? The capital of France is Paris. " * 40)
    if family := values.pop("family", None):
        tokenizer = [(file.name, file.read_bytes()) for file in model.glob("tokenizer*")]
        tokenizer += [(file.name, file.read_bytes()) for file in model.glob("chat_template*")]
        model = write_tiny(family, tmp_path / "model", vocab_size=600)
        for file, content in tokenizer:
            (model / file).write_bytes(content)
    config = run_config(model, rows, tmp_path / "run", {**values, "training.per_device_train_batch_size": 2})
    interrupted(stop_in_step, config, 2)
    run = train(config)
    assert run.progress.step == 6
    assert run.config.data.train_on == ("all" if name == "rows.txt" else "completion")
    assert not run.config.data.packing
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_what_it_decides_only_from_its_data_is_compared_too(config, tmp_path, stop_in_step):
    interrupted(stop_in_step, config(data__train_on="all"), 2)
    with pytest.raises(UserError, match=r'run was configured differently \(data.train_on: "all" there, "completion"'):
        train(config())
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [1, 2]


# ------------------------------------------------------------------------------------- what the folder may hold


def line_of(action, *arguments, **options) -> str:
    with pytest.raises(UserError) as error:
        action(*arguments, **options)
    (line,) = error.value.lines
    assert error.value.exit_code == 2
    return line


def test_a_folder_that_holds_another_run(config, tmp_path, stop_in_step):
    interrupted(stop_in_step, config(), 2)
    folder = tmp_path / "run"
    other = config(training__learning_rate=5e-3, adapter__r=8)
    before = sorted((path, path.read_bytes()) for path in folder.rglob("*") if path.is_file())
    line = line_of(train, other)
    assert line.startswith(
        f"{folder}: holds another run (adapter.r: 4 there, 8 here, training.learning_rate: 0.01 there"
    )
    assert line_of(train, config(), resume="never").startswith(f"{folder}: holds a run; give --overwrite")
    assert sorted((path, path.read_bytes()) for path in folder.rglob("*") if path.is_file()) == before
    (folder / "notes.txt").write_text("mine")
    train(other, overwrite=True)
    train(config("whole", training__learning_rate=5e-3, adapter__r=8))
    assert_same_run(folder, tmp_path / "whole")
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_folder_that_holds_the_same_run_finished(config, tmp_path):
    train(config())
    first = adapter_bytes(tmp_path / "run")
    assert line_of(train, config()).startswith(f"{tmp_path / 'run'}: holds this run, finished; give --overwrite")
    train(config(), overwrite=True)
    assert adapter_bytes(tmp_path / "run") == first
    assert len(read_metrics(tmp_path / "run")) == 6


def test_overwriting_an_unfinished_run_begins_anew(config, tmp_path, stop_in_step):
    interrupted(stop_in_step, config(), 4)
    train(config(), overwrite=True, resume="never")
    train(config("whole"))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_settings_that_change_no_step_may_differ(config, tmp_path, stop_in_step):
    interrupted(stop_in_step, config(), 3)
    train(config(training__save_steps=1, training__save_total_limit=None, training__logging_steps=3))
    train(config("whole"))
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [1, 2, 3, 6]
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 4


# ---------------------------------------------------------------------------------------------------- --resume PATH


def test_resuming_from_a_checkpoint_and_from_a_run(config, tmp_path):
    values = {"training__save_steps": 2, "training__save_total_limit": None}
    train(config("first", **values))
    first = tmp_path / "first"
    checkpoint = first / "checkpoints" / "step-000004"
    # Into a folder of its own, from a checkpoint: what comes after it is the same.
    train(config("other", **values), resume=str(checkpoint))
    assert adapter_bytes(tmp_path / "other") == adapter_bytes(first)
    assert [record["step"] for record in read_metrics(tmp_path / "other")] == [5, 6]
    # In the run's folder, from an earlier checkpoint: what came after it is made again.
    expected = adapter_bytes(first), [comparable(record) for record in read_metrics(first)]
    train(config("first", **values), resume=str(first / "checkpoints" / "step-000002"))
    assert (adapter_bytes(first), [comparable(record) for record in read_metrics(first)]) == expected
    # And for longer than before, from the run's newest one.
    run = train(config("first", training__max_steps=8, **values), resume=str(first))
    assert run.progress.step == 8
    assert [record["step"] for record in read_metrics(first)] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [path.name for path in sorted((first / "checkpoints").iterdir())][-1] == "step-000008"


def test_a_run_that_goes_on_from_an_earlier_checkpoint_forgets_the_later_ones(config, tmp_path, stop_in_step):
    train(config(training__save_steps=2, training__save_total_limit=None))
    interrupted(stop_in_step, config(training__save_total_limit=1), 1,
                resume=str(tmp_path / "run" / "checkpoints" / "step-000002"))  # fmt: skip
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000003"]
    assert not (tmp_path / "run" / "adapter").exists()
    assert train(config()).progress.step == 6  # auto goes on from step 3


def test_faults_of_a_path_to_resume_from(config, tmp_path):
    values = {"training__save_steps": 2}
    train(config(**values))
    folder = tmp_path / "run"
    line = line_of(train, config(**values), resume=str(tmp_path / "nowhere"))
    assert line.startswith(f"--resume {tmp_path / 'nowhere'}: no checkpoint; expected a folder such as runs/NAME/")
    line = line_of(train, config("other", adapter__r=8, **values), resume=str(folder))
    assert line == (
        f"{folder / 'checkpoints' / 'step-000006'}: its run was configured differently (adapter.r: 4 there, 8 here); "
        f"resume with {folder / 'config.yaml'}, or --allow-changes to go on all the same"
    )
    line = line_of(train, config("other", training__max_steps=5, **values), resume=str(folder))
    assert line.startswith(f"{folder / 'checkpoints' / 'step-000006'}: 6 steps were trained, but this run has 5;")
    train(config("third", training__seed=3))
    line = line_of(train, config("third", **values), resume=str(folder))
    assert line.startswith(f"{tmp_path / 'third'}: holds a run, and not the one of --resume {folder}; give another")
    assert not (tmp_path / "other").exists()
    train(config("third", **values), resume=str(folder / "checkpoints" / "step-000004"), overwrite=True)
    assert [record["step"] for record in read_metrics(tmp_path / "third")] == [5, 6]
    assert adapter_bytes(tmp_path / "third") == adapter_bytes(folder)


def test_a_checkpoint_by_itself_that_does_not_fit(config, tmp_path):
    train(config())
    alone = shutil.copytree(tmp_path / "run" / "checkpoints" / "step-000006", tmp_path / "alone" / "a" / "step-000006")
    line = line_of(train, config("other", training__optim="adamw_8bit"), resume=str(alone))
    assert line.startswith(f'{alone}: what it belongs to has changed (training.optim: "adamw" there, "adamw_8bit" here')
    line = line_of(train, config("other", training__optim="adamw_8bit"), resume=str(alone), allow_changes=True)
    assert (
        line == f"{alone}: its optimizer does not fit this run: saved by adamw, not by adamw_8bit; start anew with "
        "--overwrite"
    )
    with pytest.raises(UserError) as error:
        train(config("other", adapter__target_modules=["q_proj"]), resume=str(alone), allow_changes=True)
    assert error.value.lines[0].startswith(
        f"{alone}: tensor model.layers.0.mlp.down_proj.lora_A.weight fits nothing"
    )
