"""Answers while a run trains: those of `generate`, and steps that do not notice them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import adapter_bytes, assert_same_run, comparable, interrupted, read_metrics, run_config, write_rows

from qlora_tool.api import generate
from qlora_tool.config import Config, with_values
from qlora_tool.errors import UserError
from qlora_tool.training import samples
from qlora_tool.training.loop import train
from qlora_tool.training.run import Decided

PROMPTS = ["How many are 3 and 4?", "a", "List all files, and tell me which of them\nare the largest"]
CPU = {"device": "cpu", "compute_dtype": "float32"}


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "NEW_TOKENS", 6)


def answered(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """What was answered, by step; no step's answers are there twice."""
    found = [record for record in read_metrics(folder) if "samples" in record]
    assert len({record["step"] for record in found}) == len(found)
    return {record["step"]: record["samples"] for record in found}


def test_they_are_what_generate_answers_of_the_base_and_of_the_run(config, tmp_path: Path, caplog):
    with caplog.at_level(logging.INFO, "qlora_tool"):
        train(config(training__eval_prompts=PROMPTS, training__max_steps=2, training__eval_steps=1))
    said = answered(tmp_path / "run")
    assert list(said) == [0, 1, 2]
    wanted = generate(tmp_path / "run", prompt=PROMPTS, max_new_tokens=samples.NEW_TOKENS, compare_base=True, **CPU)
    for index, one in enumerate(wanted.answers):
        assert said[2][index] == {"prompt": PROMPTS[index], **one.answer.as_json()}
        assert said[0][index]["answer"] == one.base_text
    assert said[0] != said[2]
    lines = [line for line in caplog.messages if line.startswith("step 0: ")]
    assert len(lines) == 3 and all("\n" not in line and "\x1b" not in line and len(line) < 200 for line in lines)
    assert lines[2].startswith("step 0: List all files, and tell me which of the ... => ")


@pytest.mark.parametrize("values", [
    {"training__gradient_checkpointing": True, "data__packing": True},
    {"training__optimizer_in_backward": True, "training__max_grad_norm": 0, "model__quantization": "int8"},
], ids=str)  # fmt: skip
def test_the_steps_are_those_of_a_run_that_nobody_asks(config, tmp_path: Path, values):
    """To the bit, with dropout, which draws anew in every step."""
    values |= {"data__eval": 0.2, "training__eval_steps": 2, "training__max_steps": 4}
    train(config("alone", **values))
    train(config("asked", training__eval_prompts=PROMPTS, **values))
    assert adapter_bytes(tmp_path / "asked") == adapter_bytes(tmp_path / "alone")
    records = [comparable(one) for one in read_metrics(tmp_path / "asked") if "samples" not in one]
    assert records == [comparable(one) for one in read_metrics(tmp_path / "alone")]
    assert list(answered(tmp_path / "asked")) == [0, 2, 4]


def test_nothing_is_answered_twice_or_lost_in_a_run_that_stops_and_goes_on(config, tmp_path: Path, stop_in_step):
    values = {"training__eval_prompts": PROMPTS[:2], "training__eval_steps": 2, "training__max_steps": 4}
    train(config("whole", **values))
    for stopped in (2, 1):  # in a step that is asked after, and in the next one
        interrupted(stop_in_step, config(**values), stopped)
    train(config(**values))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert list(answered(tmp_path / "run")) == [0, 2, 4]


def test_a_run_that_died_while_it_answered(config, tmp_path: Path, monkeypatch):
    values = {"training__eval_prompts": PROMPTS[:1], "training__eval_steps": 2, "training__save_steps": 2,
              "training__max_steps": 4}  # fmt: skip
    train(config("whole", **values))

    def die(self: samples.Samples, step: int, answers: Any, say: Any) -> None:
        if step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(samples.Samples, "show", die)
        train(config(**values))
    train(config(**values))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_held_out_rows_with_what_they_expect(config, tmp_path: Path, caplog):
    held_out = write_rows(tmp_path / "held.jsonl", rows=3, first=50)
    with caplog.at_level(logging.INFO, "qlora_tool"):
        train(config(training__eval_prompts=8, data__eval=str(held_out), training__max_steps=2))
    said = answered(tmp_path / "run")
    assert list(said) == [0, 2] and len(said[0]) == 3
    assert [one["expected"] for one in said[2]] == ["59 59 59", "56 56 56 56", "53"]  # 50 + 350 % 11
    assert "How many are 50 and 9?" in said[2][0]["prompt"]
    wanted = generate(tmp_path / "run", prompts=held_out, max_new_tokens=samples.NEW_TOKENS, **CPU)
    assert [one["answer"] for one in said[2]] == [one.text for one in wanted.answers]
    assert any(line.startswith(f"step 0: {held_out}, line 1 => ") for line in caplog.messages)


def test_the_last_record_of_a_run_is_that_of_its_last_step(config, tmp_path: Path):
    """What reads a run's loss is not given its answers."""
    run = train(config(training__eval_prompts="a", data__eval=0.2, training__load_best_model_at_end=True,
                       training__eval_steps=3))  # fmt: skip
    assert run.folder.last_record()["step"] == 6 and run.kept_losses().keys() == {"eval_loss"}


@pytest.mark.parametrize("prompts, expected", [
    (["a", "hi " * 200], r"prompt 2: \d+ tokens, but the model has 256 positions; shorten it"),
    (["hi " * 60], r"prompt 1: \d+ tokens, and data\.max_length is 128; shorten it"),
])  # fmt: skip
def test_prompts_that_are_too_long(config, tmp_path: Path, prompts, expected):
    with pytest.raises(UserError, match=rf"^training\.eval_prompts, {expected}$"):
        train(config(training__eval_prompts=prompts))
    assert not (tmp_path / "run").exists()


def test_rows_without_a_prompt(config, tmp_path: Path):
    lines = [f'{{"text": "The {number}. capital of France"}}\n' for number in range(9)]
    (tmp_path / "text.jsonl").write_text("".join(lines))
    with pytest.raises(UserError, match=r"training\.eval_prompts: 2, but with data\.train_on: all no row says where"):
        train(config(training__eval_prompts=2, data__train=str(tmp_path / "text.jsonl"), data__eval=0.5))


def test_the_disk_is_refused_whoever_chose_it(config):
    class Chooses:
        def check(self, setup, batch, start=None):
            chosen = setup.config.model.model_copy(update={"weights": "disk"})
            return Decided(None, setup.config.model_copy(update={"model": chosen}))

    with pytest.raises(UserError, match=r"^training\.eval_prompts: a list, but .* which auto chose here; leave it out"):
        train(config(training__eval_prompts=["a"]), watcher=Chooses())


@pytest.mark.parametrize("values, key", [
    ({"model.weights": "disk", "training.eval_prompts": ["a"]}, "training.eval_prompts"),
    ({"training.sharding": "fsdp", "training.eval_prompts": ["a"]}, "training.sharding"),
    ({"training.eval_prompts": 2}, "training.eval_prompts"),
    ({"training.eval_prompts": 2, "data.eval": 0.1, "data.train_on": "all"}, "training.eval_prompts"),
])  # fmt: skip
def test_what_the_configuration_refuses(values, key):
    with pytest.raises(UserError) as caught:
        with_values(Config(), values)
    [line] = caught.value.lines
    assert line.startswith(f"configuration: {key}: ")


def test_prompts_share_a_batch_only_within_half_of_the_largest(inputs, tmp_path: Path, monkeypatch):
    """A single one always goes."""
    sizes = []
    answer = samples.answer_as_it_is

    def seen(model, tokenizer, prompts, sampling, *rest):
        sizes.append(sampling.batch_size)
        return answer(model, tokenizer, prompts, sampling, *rest)

    monkeypatch.setattr(samples, "answer_as_it_is", seen)
    for name, rows in (("few", 1), ("many", 16)):
        values = {"training.eval_prompts": ["a", "b"], "training.per_device_train_batch_size": rows,
                  "training.max_steps": 1}  # fmt: skip
        train(run_config(*inputs, tmp_path / name, values))
    assert sizes[0] == sizes[1] == 1 < sizes[2]
