"""The memory of a training run: what is predicted of its largest batch, cached, held against the device, and seen."""

from __future__ import annotations

import gc
import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cached_traces import once
from click.testing import CliRunner
from tiny_runs import run_config, write_model, write_rows

from qlora_tool.build.setup import Setup
from qlora_tool.cli import main
from qlora_tool.config import Config, config_to_yaml, with_values
from qlora_tool.data.batches import collate
from qlora_tool.data.tokenize import Example
from qlora_tool.errors import UserError
from qlora_tool.files.cache import cache_folder
from qlora_tool.files.sealed import read_sealed
from qlora_tool.memory import run_report
from qlora_tool.memory.allocator import available
from qlora_tool.memory.allocator.available import available_bytes
from qlora_tool.memory.breakdown import CATEGORIES, MemoryReport
from qlora_tool.memory.plan import cure as curing
from qlora_tool.memory.plan.again import typed
from qlora_tool.memory.run_report import RunMemory, predict_run
from qlora_tool.memory.trace import extrapolate
from qlora_tool.memory.trace.predict import BatchShape, predict
from qlora_tool.sizes import memory_size

_predict = once(predict)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run whose predictions are cached in a place of its own; what they come from is traced once for all tests."""
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(run_report, "predict_deep", _predict)
    return run_config(model, write_rows(tmp_path / "rows.jsonl"), tmp_path / "run", {"training.max_steps": 3})


def example(length: int, prompt: int = 2) -> Example:
    ids = list(range(3, 3 + length))
    return Example(ids, [-100] * prompt + ids[prompt:], "here")


def batch(*lengths: int, packing: bool = False):
    rows = [[example(length) for length in lengths]] if packing else [[example(length)] for length in lengths]
    return collate(rows, pad_token_id=0, packing=packing)


def on_card(config: Config) -> Setup:
    """A run as it would be on a card, which need not be here."""
    return replace(Setup.of(config), device=torch.device("cuda"))


def cli(*args: object):
    return CliRunner().invoke(main, [str(arg) for arg in args])


# ------------------------------------------------------------------------------------------- shapes of real batches


def test_the_shape_of_padded_rows():
    shape = BatchShape.of(batch(9, 5))
    assert (shape.rows, shape.length, shape.padded, shape.segments) == (2, 9, True, None)
    assert shape.trained_tokens == 7 + 3  # two tokens of each row are the prompt


def test_the_shape_of_a_packed_row():
    shape = BatchShape.of(batch(9, 5, packing=True))
    assert (shape.rows, shape.length, shape.segments) == (1, 14, (9, 5))
    assert shape.trained_tokens == 7 + 3


# --------------------------------------------------------------------------------------------- cached predictions


def test_a_prediction_is_made_once(config: Config, monkeypatch: pytest.MonkeyPatch):
    first = predict_run(Setup.of(config), BatchShape.of(batch(20, 12)))

    def refuse(*_args, **_target):
        raise AssertionError("traced again")

    monkeypatch.setattr(run_report, "predict_deep", refuse)
    again = with_values(config, {"training.learning_rate": 1e-5, "training.output_dir": "elsewhere"})
    assert predict_run(Setup.of(again), BatchShape.of(batch(20, 12))) == first
    for changed in ({"adapter.r": 8}, {"model.quantization": "int8"}, {"training.optim": "adamw_8bit"}):
        with pytest.raises(AssertionError, match="traced again"):
            predict_run(Setup.of(with_values(config, changed)), BatchShape.of(batch(20, 12)))
    with pytest.raises(AssertionError, match="traced again"):
        predict_run(Setup.of(config), BatchShape.of(batch(21, 12)))


@pytest.mark.parametrize("content", ["{", "{}", "null", "[1]", "7"])
def test_a_broken_cached_prediction_is_made_again(config: Config, content: str):
    shape = BatchShape.of(batch(20, 12))
    first = predict_run(Setup.of(config), shape)
    [file] = (cache_folder() / "predictions").iterdir()
    file.write_text(content)
    assert predict_run(Setup.of(config), shape) == first
    assert read_sealed(file) == first.to_json()


# --------------------------------------------------------------------------------------- a run that does not fit


def test_a_run_that_cannot_fit_is_refused_on_a_card(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    setup, memory = on_card(config), RunMemory()
    monkeypatch.setattr(run_report, "available_bytes", lambda *_: 1 << 40)
    monkeypatch.setattr(logging.getLogger("qlora_tool"), "propagate", True)
    with caplog.at_level(logging.INFO, "qlora_tool"):
        memory.check(setup, batch(20, 12))
    assert not extrapolate._trace.cache_info().currsize  # none is kept while the run goes on
    told = [record.getMessage() for record in caplog.records]
    estimate = "estimated in it: the CUDA context, 0.58 GiB (0.40 GiB to 0.84 GiB were seen"
    context = [line for line in told if estimate in line]
    assert len(context) == len([line for line in told if "predicted at the peak" in line]) > 0  # as often: once a check
    needed = memory.predicted.needed_bytes
    assert needed > memory.predicted.peak_bytes  # the context, and what the allocator holds
    monkeypatch.setattr(run_report, "available_bytes", lambda *_: needed)
    memory.check(setup, batch(20, 12))
    monkeypatch.setattr(run_report, "available_bytes", lambda *_: needed - 1)
    monkeypatch.setattr(curing, "SECONDS_FOR_A_CHANGE", -1)
    with pytest.raises(UserError, match=re.escape(f"this run needs {memory_size(needed)} at its peak")) as caught:
        memory.check(setup, batch(20, 12))
    assert caught.value.lines[0].endswith(f"; profile-memory with --plan for {memory_size(needed - 1)} shows what fits")
    with typed("my.yaml", ["adapter.r=4"]), pytest.raises(UserError) as caught:
        memory.check(setup, batch(20, 12))
    command = "`qlora-tool profile-memory my.yaml --set adapter.r=4 --device cuda --plan` shows what fits"
    assert caught.value.lines[0].endswith(command)


@pytest.mark.skipif(
    torch.__version__ < "2.12", reason="fully_shard of torch 2.11 takes parameters of floating point alone"
)
def test_one_of_several_processes_is_held_against_its_card(config: Config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(run_report, "available_bytes", lambda *_: 1 << 40)
    monkeypatch.setattr(curing, "SECONDS_FOR_A_CHANGE", -1)
    setups = {sharding: on_card(with_values(config, {"training.sharding": sharding})) for sharding in ("none", "fsdp")}
    found = {}
    for sharding, setup in setups.items():
        memory = RunMemory()
        memory.check(setup, batch(20, 12))
        found[sharding] = memory.predicted
        assert memory.predicted == predict_run(setup, replace(BatchShape.of(batch(20, 12)), processes=2))
    held = {sharding: breakdown.at_peak["base_weights"] for sharding, breakdown in found.items()}
    assert held["fsdp"] < 0.6 * held["none"]
    monkeypatch.setattr(run_report, "available_bytes", lambda *_: found["fsdp"].needed_bytes - 1)
    line = r"this run needs .* --processes 2 --plan` shows what fits"
    with typed("my.yaml", ()), pytest.raises(UserError, match=line):
        RunMemory().check(setups["fsdp"], batch(20, 12))


def test_the_refusal_names_the_change_that_makes_it_fit(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A limit between what one row and what two rows take."""
    shallow = write_model(tmp_path / "shallow", num_hidden_layers=1)
    monkeypatch.setattr(curing, "SECONDS_FOR_A_CHANGE", 600)
    monkeypatch.setattr(available, "CUDA_MARGIN", 0.0)
    setup = on_card(with_values(config, {
        "model.name_or_path": str(shallow), "training.gradient_checkpointing": True,
        "training.per_device_train_batch_size": 2,
    }))  # fmt: skip
    rows = 40
    wide = {1: batch(*[60] * (rows // 2)), 2: batch(*[60] * rows)}
    memory = RunMemory()
    monkeypatch.setattr(run_report, "available_bytes", lambda *_: 1 << 40)
    needed = {}
    for name, largest in wide.items():
        memory.check(setup, largest)
        needed[name] = memory.predicted.needed_bytes
    monkeypatch.setattr(run_report, "available_bytes", lambda *_: (needed[1] + needed[2]) // 2)
    with pytest.raises(UserError) as caught:
        memory.check(setup, wide[2])
    asked = f"--set training.per_device_train_batch_size={rows // 2} --set training.gradient_accumulation_steps=2"
    assert f"{asked} makes it fit, in " in caught.value.lines[0]
    memory.check(setup, wide[1])  # which it does


@pytest.mark.parametrize(
    ("in_use", "context", "available"),
    [
        (400, 500, 10_000),  # the context is not whole yet: all of the card is this process's
        (500, 500, 10_000),  # the context is there, and counted once
        (3_500, 500, 7_000),  # 3000 of others
        (700, 500, 10_000 - 200),
    ],
)
def test_the_context_is_counted_once(in_use: int, context: int, available: int, monkeypatch: pytest.MonkeyPatch):
    """Whatever this process's allocator holds already: that is still its own."""
    for held in (0, 1_000):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, held=held: (10_000 - in_use - held, 10_000))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _, held=held: held)
        assert available_bytes(torch.device("cuda"), context) == available


def test_a_run_that_cannot_fit_in_a_cpus_memory_is_warned_about(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(run_report, "available_bytes", lambda *_: 1)
    monkeypatch.setattr(curing, "change_that_fits", lambda *_, **__: None)
    monkeypatch.setattr(logging.getLogger("qlora_tool"), "propagate", True)
    memory = RunMemory()
    with typed("demo", ()):
        memory.check(Setup.of(config), batch(20, 12))
    [warning] = {record.getMessage() for record in caplog.records if record.levelno == logging.WARNING}
    assert f"this run needs {memory_size(memory.predicted.needed_bytes)} at its peak" in warning
    assert "nothing that was tried makes it fit" in warning
    assert "`qlora-tool profile-memory demo --device cpu --plan` shows" in warning


def test_the_refusal_comes_before_the_weights_and_leaves_nothing(config: Config, monkeypatch: pytest.MonkeyPatch):
    check = RunMemory.check
    monkeypatch.setattr(RunMemory, "check", lambda self, setup, batch, *_: check(self, on_card(setup.config), batch))
    monkeypatch.setattr(run_report, "available_bytes", lambda *_: 1_000_000)
    monkeypatch.setattr(curing, "SECONDS_FOR_A_CHANGE", -1)
    file = Path(config.training.output_dir).parent / "run.yaml"
    file.write_text(config_to_yaml(config))
    result = cli("train", file)
    assert result.exit_code == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "1.0 MiB are free on cuda" in errors[0]
    assert "model: llama" not in result.stderr  # said when the weights are there
    assert not Path(config.training.output_dir).exists()


# -------------------------------------------------------------------------------------------------- memory.json


def trained(config: Config) -> MemoryReport:
    """The report of a run, its parts checked."""
    file = Path(config.training.output_dir).parent / "run.yaml"
    file.write_text(config_to_yaml(config))
    gc.collect()
    result = cli("train", file)
    assert result.exit_code == 0, result.output
    assert "memory: this step is traced, and so is slower" in result.stderr
    written = json.loads((Path(config.training.output_dir) / "memory.json").read_text())
    assert written["schema"] == 1 and written["device"] == "cpu"
    assert written["config"] == Setup.of(config).config.model_dump(mode="json")
    for name in ("predicted", "measured"):
        found = written[name]
        assert sum(found["at_peak"].values()) == found["peak_bytes"] == max(found["phase_peak_bytes"].values())
        assert set(found["at_peak"]) == set(CATEGORIES)
        assert found["reserved_bytes"] is found["context_bytes"] is None
    report = MemoryReport.from_json(written)  # refuses parts that do not add up
    for part in ("base_weights", "quantization_state", "other_weights", "adapter_weights", "optimizer_state"):
        assert report.measured.at_peak[part] == pytest.approx(report.predicted.at_peak[part], abs=200), part
    assert 0 < report.measured.phase_peak_bytes["load"] < report.measured.phase_peak_bytes["forward"]
    return report


def test_a_step_takes_no_more_than_was_predicted_of_the_largest_batch(config: Config):
    report = trained(with_values(config, {
        "data.packing": True, "training.gradient_checkpointing": True, "training.gradient_accumulation_steps": 2,
    }))  # fmt: skip
    assert report.measured.peak_bytes <= report.predicted.peak_bytes * 1.001


def test_a_step_of_the_predicted_batch_takes_what_was_predicted(config: Config, tmp_path: Path):
    """All rows of one length: every batch is the largest."""
    rows = [{"prompt": f"{number:03d}?", "completion": f"{number:03d}"} for number in range(12)]
    data = tmp_path / "even.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    report = trained(with_values(config, {"data.train": str(data)}))
    assert report.predicted.peak_bytes == pytest.approx(report.measured.peak_bytes, rel=0.01)


def test_processes_on_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(available, "free_bytes", lambda _: 9 << 20)
    cpu = torch.device("cpu")
    assert available_bytes(cpu, 0) == 9 << 20
    for name, value in {"RANK": 1, "WORLD_SIZE": 6, "LOCAL_WORLD_SIZE": 3}.items():
        monkeypatch.setenv(name, str(value))
    assert available_bytes(cpu, 0) == 3 << 20
