"""Runs of two processes held against one with the same global batch, and what they do when one of them ends."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from child_process import child_environment
from test_world import free_port
from tiny_runs import read_metrics, run_config, write_model, write_rows

from qlora_tool.config import config_to_yaml
from qlora_tool.data.batches import collate
from qlora_tool.data.examples import Example
from qlora_tool.errors import UserError
from qlora_tool.training.checkpoints import Checkpoint, Progress
from qlora_tool.training.plan import StepPlan
from qlora_tool.training.processes import as_it_was

PASSES = "training.gradient_accumulation_steps"
VALUES = {"adapter.lora_dropout": 0.0, "data.packing": True, "training.max_steps": 20, "training.save_steps": 10,
          "training.per_device_train_batch_size": 1, "data.eval": 0.2}  # fmt: skip


def configured(folder: Path, name: str, **values: Any):
    """A run's configuration, as it was asked for and as a file."""
    config = run_config(folder / "model", folder / "rows.jsonl", folder / name, VALUES | values)
    file = folder / f"{name}.yaml"
    file.write_text(config_to_yaml(config), encoding="utf-8")
    return config, file


def start(file: Path, processes: int, *words: str) -> list[subprocess.Popen[str]]:
    """The command in as many processes as a launcher starts."""
    port = free_port()
    started = []
    for rank in range(processes):
        launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes,
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}  # fmt: skip
        command = [sys.executable, "-m", "qlora_tool", "train", str(file), *words]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                        env=child_environment(**launched)))  # fmt: skip
    return started


def finished(started: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    said = [process.communicate(timeout=180) for process in started]
    return [(process.returncode, err) for process, (_, err) in zip(started, said, strict=True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found: Path = tmp_path_factory.mktemp("processes")
    write_model(found / "model")
    write_rows(found / "rows.jsonl")
    return found


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[dict[str, Any]]:
    """What one process logs that takes the micro-batches of two."""
    _, file = configured(folder, "alone", **{PASSES: 4})
    assert [code for code, _ in finished(start(file, 1))] == [0]
    return read_metrics(folder / "alone")


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Sums in another order: every loss within 1e-5."""
    assert [one["step"] for one in found] == [one["step"] for one in expected]
    for one, other in zip(found, expected, strict=True):
        for key in ("loss", "eval_loss"):
            assert (key in one) == (key in other)
            assert one.get(key, 0.0) == pytest.approx(other.get(key, 0.0), abs=1e-5)


@pytest.mark.slow  # each starts two processes: 15 s
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_two_processes_train_as_one_and_resume_either_way(folder, alone, sharding):
    name = f"two-{sharding}"
    _, file = configured(folder, name, **{PASSES: 2, "training.sharding": sharding})
    outcome = finished(start(file, 2))
    assert [code for code, _ in outcome] == [0, 0], outcome
    assert outcome[1][1] == ""  # one of them talks
    assert_same(read_metrics(folder / name), alone)
    if sharding == "fsdp":
        found = outcome[0][1].split("this one holds ")[1].split(" MB")[0]
        held, whole = (float(word) for word in found.split(" of the base's "))
        assert held <= 0.52 * whole
    (folder / name / "adapter/adapter_config.json").unlink()
    for step in (20,):
        for path in sorted((folder / name / f"checkpoints/step-{step:06d}").iterdir()):
            path.unlink()
    (code, said), = finished(start(file, 1))
    assert code == 2 and f"set {PASSES}: 4" in said
    assert [code for code, _ in finished(start(file, 1, "--set", f"{PASSES}=4"))] == [0]
    assert_same(read_metrics(folder / name), alone)


@pytest.mark.slow  # two processes: 15 s
def test_prompts_are_answered_by_one_for_all(folder):
    """The steps of both are those without; each answer is there once."""
    common = {PASSES: 2, "adapter.lora_dropout": 0.1, "training.max_steps": 4, "training.eval_steps": 2}
    for name, more in {"unasked": {}, "asked": {"training.eval_prompts": 2}}.items():
        _, file = configured(folder, name, **common | more)
        outcome = finished(start(file, 2))
        assert [code for code, _ in outcome] == [0, 0], outcome
        assert outcome[1][1] == ""
    records = read_metrics(folder / "asked")
    said = {record["step"]: record["samples"] for record in records if "samples" in record}
    assert list(said) == [0, 2, 4] and {len(samples) for samples in said.values()} == {2}
    assert_same([record for record in records if "samples" not in record], read_metrics(folder / "unasked"))


@pytest.mark.slow  # two processes: 15 s
@pytest.mark.parametrize("values", [
    {}, {"model.embeddings": "int8"}, {"adapter.target_modules": ["q_proj", "lm_head"]},
])  # fmt: skip
def test_an_output_projection_that_shares_its_weight_is_shared_out(folder, values):
    """Whoever holds it: its bytes are not kept a second time; and what it computes stays."""
    write_model(folder / "tied", tie_word_embeddings=True)
    for name, more in {"tied-1": {PASSES: 2}, "tied-2": {"training.sharding": "fsdp"}}.items():
        _, file = configured(folder, name, **values | more, **{"training.max_steps": 3})
        file.write_text(file.read_text(encoding="utf-8").replace(str(folder / "model"), str(folder / "tied")))
        outcome = finished(start(file, int(name[-1]), "--overwrite"))
        assert {code for code, _ in outcome} == {0}, outcome
    assert_same(read_metrics(folder / "tied-2"), read_metrics(folder / "tied-1"))
    held, total = re.search(r"holds ([0-9.]+) of the base's ([0-9.]+) MB", outcome[0][1]).groups()
    if "adapter.target_modules" not in values:
        assert float(held) <= 0.52 * float(total)


@pytest.mark.slow  # two processes: 15 s
@pytest.mark.parametrize("gone", [0, 1])
def test_a_killed_process_ends_the_other(folder, gone):
    name = f"killed-{gone}"
    _, file = configured(folder, name, **{"training.max_steps": 100_000, "training.save_steps": 5, "data.eval": None})
    started = start(file, 2)
    saved = folder / name / "checkpoints/step-000005/state.json"
    deadline = time.monotonic() + 120
    while not saved.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    started[gone].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    _, said = started[1 - gone].communicate(timeout=60)
    assert time.monotonic() - killed < 30
    assert started[1 - gone].returncode == 1
    assert f"process {gone} of 2 ended before the run did" in said and "it goes on from step" in said
    started[gone].communicate(timeout=60)


@pytest.mark.slow  # two processes: 10 s
def test_processes_on_other_rows_are_refused(folder):
    write_rows(folder / "others.jsonl", 30, 7)
    _, file = configured(folder, "agree")
    other = folder / "agree-other.yaml"
    other.write_text(file.read_text(encoding="utf-8").replace("rows.jsonl", "others.jsonl"), encoding="utf-8")
    outcomes = []
    port = free_port()
    started = []
    for rank, chosen in enumerate((file, other)):
        launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2,
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}  # fmt: skip
        started.append(subprocess.Popen([sys.executable, "-m", "qlora_tool", "train", str(chosen)], text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        env=child_environment(**launched)))  # fmt: skip
    outcomes = finished(started)
    assert [code for code, _ in outcomes] == [2, 2]
    assert "process 1 of 2 is to train something else (the training data: " in outcomes[0][1]
    assert not (folder / "agree").exists()


def test_steps_of_two_processes_are_those_of_one_with_twice_the_passes(folder):
    lengths = [10, 20, 30, 40, 50, 60, 70]
    two, _ = configured(folder, "plan", **{PASSES: 2, "data.packing": False})
    one, _ = configured(folder, "plan", **{PASSES: 4, "data.packing": False})
    plans = StepPlan.of(two, lengths, 2), StepPlan.of(one, lengths)
    assert plans[0].steps_per_epoch == plans[1].steps_per_epoch == 2
    assert list(plans[0].steps(0)) == list(plans[1].steps(0))


def test_a_micro_batch_that_does_not_count_has_no_loss():
    examples = [[Example([1, 2, 3], [-100, 2, 3], "row")], [Example([4, 5], [-100, 5], "row")]]
    batch = collate(examples, pad_token_id=0, packing=False).uncounted()
    assert (batch.trained_tokens, batch.tokens, batch.where, len(batch.targets)) == (0, 0, [], 0)
    assert torch.equal(batch.labels, torch.full_like(batch.labels, -100)) and batch.input_ids.sum() == 15


@pytest.mark.parametrize(("passes", "here", "processes", "found"), [
    (2, 1, 2, 1),  # as it was: two processes of one pass
    (2, 2, 1, 1),  # one of two passes
    (None, 3, 2, 3),  # of an earlier version: its own check decides
    (6, 2, 3, 1), (2, 1, 1, f"set {PASSES}: 2"), (3, 1, 2, "a number of processes that 3 can be divided by"),
])  # fmt: skip
def test_the_global_batch_of_a_resume(folder, tmp_path, passes, here, processes, found):
    there, file = configured(folder, "there", **{PASSES: 1})
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_bytes(file.read_bytes())
    checkpoint = Checkpoint(tmp_path / "run/checkpoints/step-000010", Progress(global_passes=passes), {})
    config, _ = configured(folder, "there", **{PASSES: here})
    if isinstance(found, str):
        with pytest.raises(UserError, match=found.replace("(", r"\(")):
            as_it_was(config, checkpoint, processes)
        return
    assert as_it_was(config, checkpoint, processes).training.gradient_accumulation_steps == found
    assert json.loads(json.dumps(there.model_dump(mode="json")))
