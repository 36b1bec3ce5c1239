"""Every key of a configuration with every kind of value that it takes, through `qlora-tool train` with all that a user
has on: an evaluation set, checkpoints, the memory report.

Each run gives every key one of its values, so a dozen runs do.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.tracking import get_available_trackers
from click.testing import CliRunner
from key_values import KEYS, OF_WEIGHTS, OMITTED, VALUES, values_of, with_company, write_inputs, written
from tiny_runs import read_metrics

from qlora_tool.cli import main
from qlora_tool.config import Config, choices, with_values
from qlora_tool.errors import UserError
from qlora_tool.ops.products import PYTORCH, use_products

Run = dict[str, Any]
# With all that a user has on; where a key's values have all been seen.
USUAL = {"data.eval": 0.2, "training.eval_steps": 1, "training.save_steps": 1, "training.max_steps": 2,
         "training.num_train_epochs": 1, "data.max_length": 96, "training.per_device_train_batch_size": 3}  # fmt: skip
OF_THE_START = [key for key in KEYS if key.startswith("adapter.")
                and key not in ("adapter.init_from", "adapter.lora_dropout", "adapter.loraplus_lr_ratio")]  # fmt: skip


WANTED: list[Run] = [
    *(with_company(key, value) for key, values in VALUES.items() for value in values),
    *(with_company("training.optimizer_in_backward", True) | {"training.optim": optim, "model.compute_dtype": dtype}
      for optim, dtype in zip(VALUES["training.optim"], ("float32", "bfloat16", "bfloat16"), strict=True)),
    *({"adapter.method": method, "adapter.loraplus_lr_ratio": 16} for method in ("lora", "dora")),
]  # fmt: skip


def excluded(run: Run) -> bool:
    """Whether values exclude one another: by the configuration's own rules, and by what data and model decide."""
    given = {key: value for key, value in run.items() if value is not OMITTED}
    try:
        with_values(Config(), given)
    except UserError:
        return True
    file, form = run.get("data.train", "alpaca"), run.get("data.format", "auto")
    name = (file if isinstance(file, str) else file[0]["path"]).partition(".")[0]
    return (
        form not in ("auto", name)
        or (bool(given.get("data.columns")) and name != "alpaca")
        or (name == "text" and run.get("data.train_on", "completion") == "completion")
        or (bool(given.get("data.chat_template_kwargs")) and (name == "text" or not given.get("data.chat_template")))
        or (run.get("adapter.init_lora_weights") in OF_WEIGHTS and run.get("adapter.r") not in (OMITTED, 1))
        or (run.get("training.optimizer_in_backward", False) and run.get("model.compute_dtype") == "float16")
        or (run.get("adapter.init_from") is not None and any(run.get(key, OMITTED) is not OMITTED
                                                             for key in OF_THE_START))
    )  # fmt: skip


def runs() -> list[Run]:
    """Runs that take every value, and what else is wanted, each as much of it as goes together."""
    left, found = list(WANTED), []
    while left:
        run: Run = {}
        for wanted in list(left):
            agrees = all(run.get(key, value) == value for key, value in wanted.items())
            if agrees and not excluded(run | wanted):
                run |= wanted
                left.remove(wanted)
        assert run, f"refused in every run: {left}"
        for key, values in VALUES.items():
            usual = USUAL.get(key, values[len(found) % len(values)])
            for value in (usual, *values, OMITTED):
                if key not in run and not excluded(run | {key: value}):
                    run[key] = value
        found.append(run)
    return found


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def here(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that commands run in, with links to the inputs."""
    for entry in inputs.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    logger, environment = logging.getLogger("qlora_tool"), dict(os.environ)
    before = logger.handlers[:], logger.propagate, logger.level
    use_products(PYTORCH)
    with warnings.catch_warnings():
        yield tmp_path
    use_products(None)
    logger.handlers, logger.propagate = before[:2]
    logger.setLevel(before[2])
    os.environ.clear()
    os.environ.update(environment)


# --------------------------------------------------------------------------------------------------------------- runs

RUNS = runs()


def test_every_value_of_every_key_is_in_a_run():
    seen = {key: [run[key] for run in RUNS] for key in KEYS}
    for key in KEYS:
        for value in values_of(key):
            assert value in seen[key], (key, value)
    assert len(RUNS) <= 24


@pytest.mark.parametrize("number", range(len(RUNS)))
def test_a_run(here: Path, number: int):
    run = RUNS[number]
    result = CliRunner().invoke(main, ["train", str(written(here, run))])
    assert result.exit_code == 0, (run, result.output, result.exception)
    folder = here / "run"
    records, steps = read_metrics(folder), run["training.max_steps"]
    samples = [record for record in records if "samples" in record]
    records = [record for record in records if "samples" not in record]
    if steps == -1:
        reached, wanted = records[-1]["epoch"], run["training.num_train_epochs"]
        assert reached >= wanted > reached - reached / records[-1]["step"] - 1e-4
        steps = records[-1]["step"]
    logged = [step for step in range(1, steps + 1) if step % run["training.logging_steps"] == 0]
    every = run["training.eval_steps"]
    evaluated = [step for step in range(1, steps + 1) if step == steps or (every and step % every == 0)]
    evaluated = evaluated if run["data.eval"] is not None else []
    if (prompts := run["training.eval_prompts"]) not in ([], OMITTED):
        due = [step for step in range(steps + 1) if step in (0, steps) or (every and step % every == 0)]
        assert [record["step"] for record in samples] == due
        count = prompts if isinstance(prompts, int) else 1 if isinstance(prompts, str) else len(prompts)
        assert {len(record["samples"]) for record in samples} == {count}
    assert [record["step"] for record in records] == sorted({*logged, *evaluated, steps})
    assert [record["step"] for record in records if "eval_loss" in record] == evaluated
    names = {"eval_one_loss", "eval_other_loss"} if isinstance(run["data.eval"], dict) else set()
    assert all(names <= record.keys() for record in records if "eval_loss" in record)
    assert (folder / "adapter" / "adapter_model.safetensors").stat().st_size > 0
    saved = [step for step in range(1, steps + 1) if step % run["training.save_steps"] == 0 or step == steps]
    best = {records[-1]["best_step"]} if run["training.load_best_model_at_end"] else set()
    saved = sorted({*saved[-(run["training.save_total_limit"] or steps) :]} | best)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [f"step-{step:06}" for step in saved]
    if steps > 1:
        memory = json.loads((folder / "memory.json").read_text())
        predicted, measured = (memory[kind]["peak_bytes"] for kind in ("predicted", "measured"))
        # A text's last, shorter piece, and what a mixture has of shorter rows, is in another batch than the first two.
        least = 0.97 if isinstance(run["data.train"], str) and run["data.train"] != "text.txt" else 0.9
        assert least < measured / predicted < 1.03, (measured / predicted, run)


# ------------------------------------------------------------------------------------------------------------ refusals


def refusal(here: Path, **values: Any) -> str:
    """The one line that a run is refused with; it has left nothing behind."""
    run = {"model.name_or_path": "base", "data.train": "alpaca.jsonl", "data.max_length": 96,
           "training.output_dir": "run"} | {key.replace("__", "."): value for key, value in values.items()}  # fmt: skip
    file = written(here, run)
    result = CliRunner().invoke(main, ["train", str(file)])
    assert result.exit_code == 2, (result.output, result.exception)
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert not (here / "run").exists()
    return line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card here")
def test_a_device_that_is_not_here(here: Path):
    assert "model.device: cuda, but PyTorch sees no CUDA device here" in refusal(here, model__device="cuda")


def test_a_seed_that_pytorch_does_not_take(here: Path):
    torch.manual_seed(2**64 - 1)
    with pytest.raises((RuntimeError, ValueError)):
        torch.manual_seed(2**64)
    line = refusal(here, training__seed=2**64)
    assert "training.seed: expected a whole number from 0 to 2^64 - 1" in line


def test_rows_of_one_token(here: Path):
    assert "nothing to learn from" in refusal(here, data__max_length=1)


def test_steps_in_backward_with_gradients_that_are_scaled_together(here: Path):
    keys = {"training__optimizer_in_backward": True, "training__max_grad_norm": 0}
    line = refusal(here, model__compute_dtype="float16", **keys)
    assert "training.optimizer_in_backward: true, but the scale of float16 gradients" in line


@pytest.mark.parametrize("tracker", choices("training.report_to"))
def test_a_tracker(here: Path, tracker: str, monkeypatch: pytest.MonkeyPatch):
    if tracker == "none":
        return
    if tracker not in {str(getattr(found, "value", found)) for found in get_available_trackers()}:
        line = refusal(here, training__report_to=tracker)
        assert f"training.report_to: {tracker}: not installed; `pip install {tracker}`" in line
        return
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = RUNS[0] | {"training.report_to": [tracker]}
    assert CliRunner().invoke(main, ["train", str(written(here, run))]).exit_code == 0


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing-here", "/no/such/folder"])
def test_a_model_that_is_not_there(here: Path, name: str):
    file = written(here, {"model.name_or_path": name, "data.train": "alpaca.jsonl", "training.output_dir": "run"})
    result = CliRunner().invoke(main, ["train", str(file)])
    assert result.exit_code in (1, 2)
    assert len(result.stderr.splitlines()) == 1 and name in result.stderr
    assert not (here / "run").exists()
