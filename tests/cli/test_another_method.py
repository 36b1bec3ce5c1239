"""Methods beside LoRA and DoRA from the command line, end to end: what a user of another method has, a user of each of
these has."""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from tiny_runs import adapter_bytes, comparable, read_metrics, write_model, write_rows

from qlora_tool.cli import main
from qlora_tool.ops.products import PYTORCH, use_products

FP32 = ("--device", "cpu", "--compute-dtype", "float32")


ADAPTERS = {
    "loha": {"r": 4, "lora_alpha": 8},
    "lokr": {"r": 4, "lora_alpha": 8, "init_weights": "lycoris"},
    "vera": {"r": 48, "save_projection": False},
    "additive": {"r": 4},
    "full": {},
}


@pytest.fixture(scope="module", params=ADAPTERS)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with a model, rows, a run's configuration and the run itself."""
    folder = tmp_path_factory.mktemp("place")
    write_model(folder / "base")
    write_rows(folder / "rows.jsonl")
    write_rows(folder / "others.jsonl", 8, first=50)
    config = {
        "model": {"name_or_path": "base", "compute_dtype": "float32", "device": "cpu"},
        "adapter": {"method": request.param, **ADAPTERS[request.param]},
        "data": {"train": "rows.jsonl", "eval": "others.jsonl", "max_length": 128, "packing": False},
        "training": {"output_dir": "run", "max_steps": 12, "learning_rate": 2e-2, "save_steps": 6, "warmup_steps": 0},
    }
    if request.param == "full":
        config["model"]["quantization"], config["training"]["learning_rate"] = "none", 3e-3
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    logger, environment, before = logging.getLogger("qlora_tool"), dict(os.environ), Path.cwd()
    handlers, propagate, level = logger.handlers[:], logger.propagate, logger.level
    use_products(PYTORCH)
    os.chdir(folder)
    with warnings.catch_warnings():
        run("train", "run.yaml")
        yield folder
    os.chdir(before)
    use_products(None)
    logger.handlers, logger.propagate = handlers, propagate
    logger.setLevel(level)
    os.environ.clear()
    os.environ.update(environment)


def run(*arguments: str) -> str:
    """What a command that succeeds prints."""
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def evaluated(what: str, *options: str) -> float:
    run("evaluate", what, "--data", "others.jsonl", "--json", "scores.json", *options)
    return json.loads(Path("scores.json").read_text())["loss"]


def test_it_learns(place: Path):
    losses = [record["loss"] for record in read_metrics(place / "run")]
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.5


def test_it_is_evaluated_as_training_did(place: Path):
    last = read_metrics(place / "run")[-1]["eval_loss"]
    assert evaluated("run", *FP32) == pytest.approx(last, rel=1e-5)
    assert last < evaluated("base", *FP32) - 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_merged_model_is_verified(place: Path, dtype: str):
    printed = run("export-merged", "run", "--output-dir", f"merged-{dtype}", "--dtype", dtype, "--json", "export.json")
    assert "verified" in printed
    tolerance = {"float32": 1e-4, "bfloat16": 2e-2}[dtype]
    assert evaluated(f"merged-{dtype}", *FP32) == pytest.approx(evaluated("run", *FP32), rel=tolerance)


def test_its_memory_is_predicted(place: Path):
    run("profile-memory", "run.yaml", "--device", "cpu", "--measure", "--json", "memory.json")
    memory = json.loads(Path("memory.json").read_text())
    predicted, measured = memory["predicted"], memory["measured"]
    assert predicted["peak_bytes"] == pytest.approx(measured["peak_bytes"], rel=1e-3)
    assert predicted["at_peak"]["adapter_weights"] == measured["at_peak"]["adapter_weights"] > 0


def test_it_is_resumed_to_the_bit(place: Path):
    shutil.copytree(place / "run", place / "again")
    shutil.rmtree(place / "again" / "adapter")
    shutil.rmtree(place / "again" / "checkpoints" / "step-000012")
    run("train", "run.yaml", "--output-dir", "again")
    assert adapter_bytes(place / "again") == adapter_bytes(place / "run")
    records = [[comparable(record) for record in read_metrics(place / name)] for name in ("again", "run")]
    assert records[0] == records[1]


def test_another_run_goes_on_from_it(place: Path):
    """From the values that this one ended with, as the method that it is saved as."""
    values = yaml.safe_load(Path("run.yaml").read_text())
    values["adapter"] = {"init_from": "run/adapter"}
    values["training"] |= {"output_dir": "next", "max_steps": 2}
    Path("next.yaml").write_text(yaml.safe_dump(values))
    run("train", "next.yaml")
    first, before = read_metrics(place / "next")[0]["loss"], [record["loss"] for record in read_metrics(place / "run")]
    assert first < before[0] - 0.5


def test_it_answers(place: Path):
    """As the merged model does, and not as the base."""
    run("export-merged", "run", "--output-dir", "merged", "--dtype", "float32", "--no-verify")
    ask = ("--prompt", "How many are 3 and 4?", "--max-new-tokens", "8", *FP32)
    assert run("generate", "run", *ask) == run("generate", "merged", *ask) != run("generate", "base", *ask)
