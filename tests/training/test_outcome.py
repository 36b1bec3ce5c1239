"""A run that learned nothing says so, whatever the reason is; one that learned does not."""

from __future__ import annotations

import logging

import pytest
from click.testing import CliRunner
from tiny_adapters import write_chat_base
from tiny_runs import adapter_bytes, interrupted, read_metrics

from qlora_tool import api
from qlora_tool.cli import main
from qlora_tool.config import config_to_yaml
from qlora_tool.inference.evaluation import EvaluationResult
from qlora_tool.training import loop
from qlora_tool.training.loop import train
from qlora_tool.training.result import TrainResult

PLAIN = {"adapter__lora_dropout": 0.0, "training__warmup_steps": 0}


def result_of(config) -> TrainResult:
    return TrainResult.of(train(config), 1.0, finished=True)


def test_a_run_that_learned_has_no_warning(config, tmp_path, caplog):
    result = result_of(config(training__max_steps=30))
    assert result.learned is True
    assert result.warnings == ()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(("method", "rate"), [("lora", 1e-45), ("lora", 1e-30), ("dora", 1e-30), ("loha", 1e-30)])
def test_a_rate_that_moves_nothing(config, caplog, method, rate):
    values = {"data__eval": config().data.train, "training__learning_rate": rate}  # whose loss did not fall either
    result = result_of(config(adapter__method=method, **values, **PLAIN))
    assert result.learned is False
    (warning,) = result.warnings
    assert warning.startswith("nothing was learned: ") and "training.learning_rate" in warning
    assert warning in caplog.text


def test_b_that_stays_zero(config, monkeypatch, caplog):
    def no_step(model, optimizer, *arguments, train_step=loop.train_step):
        result = train_step(model, optimizer, *arguments)
        for parameter in optimizer.parameters:
            parameter.data.mul_(0)
        return result

    monkeypatch.setattr(loop, "train_step", no_step)
    result = result_of(config(**PLAIN))
    assert result.learned is False
    assert result.warnings[0].startswith("nothing was learned: B is 0 in all 14 adapters")


def test_an_adapter_that_no_step_reaches_is_named(config, tmp_path):
    """mamba multiplies by the weight of its dt_proj itself; experts that no token comes by are like it."""
    settings = {"model__name_or_path": str(write_chat_base("mamba", tmp_path / "mamba"))}
    result = result_of(config(adapter__target_modules=["dt_proj", "x_proj"], **settings, **PLAIN))
    assert result.learned is True
    (warning,) = result.warnings
    assert warning.startswith("backbone.layers.0.mixer.dt_proj and 1 more: no step reached these adapters")
    assert result_of(config("reached", adapter__target_modules=["x_proj"], **settings, **PLAIN)).warnings == ()


@pytest.mark.parametrize("after", [2.0, 2.5, float("nan")])
def test_a_loss_that_does_not_fall(config, monkeypatch, after):
    losses = iter([2.0, after])
    monkeypatch.setattr("qlora_tool.training.run.sampled_loss", lambda *_: next(losses))
    result = result_of(config(training__max_steps=1, **PLAIN))
    assert result.learned is False
    assert f"the loss on training rows is {after:.4f}, not below the 2.0000 before" in result.warnings[0]
    cure = "; change training.learning_rate, or train for longer" if after == 2 else \
        ": training.learning_rate is too high; divide it by five"  # fmt: skip
    assert result.warnings[0].endswith(f"the first step{cure}")


def test_what_does_not_carry_over_to_the_evaluation_rows(config, monkeypatch):
    losses = iter([2.0, 3.0, 1.0, 4.0])  # of two sets: before the first step, and after the last
    monkeypatch.setattr(loop, "evaluate_loss", lambda *_: EvaluationResult(next(losses), 7))
    rows = config().data.train
    result = result_of(config(data__eval={"near": rows, "far": rows}, **PLAIN))
    assert result.learned is True
    assert result.eval_losses == {"near": 1.0, "far": 4.0}
    (warning,) = result.warnings
    assert warning.startswith("eval_far_loss is 4.0000, not below the 3.0000 before the first step")


def test_looking_at_the_losses_changes_no_step(config, tmp_path, monkeypatch):
    train(config())
    monkeypatch.setattr("qlora_tool.training.run.sampled_loss", lambda *_: 1.0)
    train(config("not-looked-at"))
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "not-looked-at")


def test_the_untuned_loss_is_that_before_the_first_step_after_a_resume_too(config, tmp_path, stop_in_step):
    whole = train(config("whole", training__per_device_train_batch_size=30, **PLAIN))
    # All rows are in the first step, whose loss is that of the untuned model.
    assert whole.progress.untuned["loss"] == pytest.approx(read_metrics(tmp_path / "whole")[0]["loss"], rel=1e-6)
    interrupted(stop_in_step, config(training__per_device_train_batch_size=30, **PLAIN), 3)
    run = train(config(training__per_device_train_batch_size=30, **PLAIN))
    assert run.progress.untuned == whole.progress.untuned


def test_the_command_does_not_offer_an_export_of_nothing(config, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(config_to_yaml(config(training__learning_rate=1e-30)))
    result = CliRunner().invoke(main, ["train", str(file)])
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        f"adapter: {tmp_path / 'run' / 'adapter'}, which learned nothing: see the warning",
        f"report: {tmp_path / 'run' / 'report.html'}",
    ]
    assert "nothing was learned" in result.stderr


def test_python_is_told_too(config):
    result = api.train(config(training__learning_rate=1e-30))
    assert (result.learned, len(result.warnings)) == (False, 1)
    assert api.train(config("dry"), dry_run=True).learned is None
