"""Hours of a run by what a run like it had here; what a step's speed depends on makes it another run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qlora_tool.config import Config, with_values
from qlora_tool.training.how_long import MeasuredSpeed, describe_length, in_hours, measured_speed, note_speed

CPU = torch.device("cpu")
RUN = with_values(Config(), {"model.name_or_path": "a-model"})


def seen(steps: int, tokens: int, seconds: float) -> SimpleNamespace:
    return SimpleNamespace(steps=steps, tokens=tokens, seconds=seconds)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(tmp_path))


@pytest.mark.parametrize("key, value", [
    ("adapter.lora_dropout", 0.1), ("adapter.r", 8), ("adapter.method", "dora"), ("data.max_length", 512),
    ("data.packing", False), ("training.per_device_train_batch_size", 1), ("training.optim", "adamw_8bit"),
    ("training.gradient_checkpointing", True), ("model.quantization", "int8"), ("model.name_or_path", "another"),
    ("model.compute_dtype", "float32"), ("model.weights", "disk"),
])  # fmt: skip
def test_a_run_of_another_speed_is_another_run(key, value):
    note_speed(RUN, CPU, 1, seen(30, 3000, 10.0))
    assert measured_speed(RUN, CPU).tokens_per_second == 300
    assert measured_speed(with_values(RUN, {key: value}), CPU) is None
    assert measured_speed(RUN, CPU, processes=2) is None


@pytest.mark.parametrize("key, value", [
    ("training.seed", 7), ("training.learning_rate", 1e-3), ("training.max_steps", 5), ("data.train", "other.jsonl"),
    ("adapter.lora_alpha", 8), ("training.output_dir", "elsewhere"),
])  # fmt: skip
def test_what_does_not_decide_the_speed(key, value):
    note_speed(RUN, CPU, 1, seen(30, 3000, 10.0))
    assert measured_speed(with_values(RUN, {key: value}), CPU).tokens_per_second == 300


def test_a_short_try_does_not_replace_a_long_run():
    note_speed(RUN, CPU, 1, seen(2, 200, 1.0))
    assert measured_speed(RUN, CPU) is None
    for steps, tokens, expected in ((3, 300, 30), (30, 6000, 600), (4, 40, 600), (25, 2500, 250)):
        note_speed(RUN, CPU, 1, seen(steps, tokens, 10.0))
        assert measured_speed(RUN, CPU).tokens_per_second == expected


def test_of_one_the_noun_is_in_the_singular():
    plan = SimpleNamespace(total_steps=2, steps_per_epoch=1, lengths=[1])
    line = describe_length(plan, 1, MeasuredSpeed("2026-01-02T00:00", 1.0, 1), False)
    assert line == "1 step, about 1 token; 1 second at 1 tokens/s, from 1 step measured here on 2026-01-02"
    assert [in_hours(seconds) for seconds in (0.1, 1.4, 2, 119, 121)] == [
        "1 second", "1 second", "2 seconds", "119 seconds", "2 minutes"
    ]  # fmt: skip


@pytest.mark.parametrize(("steps", "dry_run", "how"), [
    (5, False, "this run measures it"), (5, True, "the same command without --dry-run measures it"),
    (6, False, "the same command with --set training.max_steps=5 --output-dir FOLDER measures it"),
    (6, True, "the same command with --set training.max_steps=5 --output-dir FOLDER and without --dry-run measures it"),
])  # fmt: skip
def test_how_to_measure_what_was_not_measured(steps, dry_run, how):
    plan = SimpleNamespace(total_steps=steps, steps_per_epoch=4, lengths=[100] * 6)
    assert describe_length(plan, 0, None, False, dry_run).endswith(f"; hours not measured, as no such run was made "
                                                                   f"here: {how}")  # fmt: skip


def test_the_line():
    """600 tokens in the 4 steps of an epoch: the 30 steps that are left have 4,500."""
    plan = SimpleNamespace(total_steps=40, steps_per_epoch=4, lengths=[100] * 6)
    assert describe_length(plan, 10, None, False).startswith("30 steps, about 4,500 tokens; hours not measured")
    note_speed(RUN, CPU, 1, seen(30, 9, 10.0))  # 0.9 tokens a second: 5,000 seconds
    line = describe_length(plan, 10, measured_speed(RUN, CPU), True)
    assert line.startswith("30 steps, about 4,500 tokens; 1.4 hours at 1 tokens/s, from 30 steps measured here on ")
    assert line.endswith(", evaluations not counted")
