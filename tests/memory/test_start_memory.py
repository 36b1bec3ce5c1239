"""The memory of making the adapters' start, before the steps: predicted, counted, refused by."""

from __future__ import annotations

import io
import logging
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_models import tiny_config
from tiny_runs import run_config, write_model, write_rows

from qlora_tool.adapters.calibration import MOST_TOKENS
from qlora_tool.build.build import Start
from qlora_tool.build.setup import Setup
from qlora_tool.config import Config, load_config, with_values
from qlora_tool.data.batches import collate
from qlora_tool.data.tokenize import Example
from qlora_tool.errors import UserError
from qlora_tool.memory import run_report
from qlora_tool.memory.allocator.cards import Budget
from qlora_tool.memory.plan import cure
from qlora_tool.memory.plan.again import typed, typed_command
from qlora_tool.memory.profile_run import MemoryProfile, planned, profile_run
from qlora_tool.memory.run_report import RunMemory
from qlora_tool.memory.show.plan_table import render_plan
from qlora_tool.memory.trace import measure
from qlora_tool.memory.trace.classify import timeline
from qlora_tool.memory.trace.predict import BatchShape, predict
from qlora_tool.sizes import memory_size
from qlora_tool.training.loop import train

STARTS = {
    "pissa": {},
    "pissa_niter_2": {},
    "loftq": {},
    "loftq, two steps": {"adapter.loftq_iter": 2},
    "calibrated": {},
}
ROW = [Example(list(range(3, 23)), list(range(3, 23)), "here")]


def settings(start: str, more: dict | None = None) -> Config:
    return with_values(Config(), {"adapter.r": 4, "adapter.init_lora_weights": start, **(more or {})})


def of(*cases: tuple[str, str], slow: bool = False) -> list:
    return [pytest.param(*case, marks=[pytest.mark.slow] if slow else []) for case in cases]


@pytest.mark.parametrize(
    ("case", "family"),
    of(("pissa", "gpt2"), ("calibrated", "llama"))
    + of(*((case, "llama") for case in STARTS if case != "calibrated"), ("calibrated", "gpt2"), slow=True),
)
def test_the_peak_while_a_start_is_made_is_predicted(case: str, family: str):
    """One row of eight tokens, so that no step takes as much; gpt2's weights are turned first."""
    config = settings(case.partition(",")[0], STARTS[case])
    sizes = {"hidden_size": 192, "intermediate_size": 512} if family == "llama" else {"n_embd": 192}
    model = tiny_config(family, num_hidden_layers=1, **sizes)
    run = config, model, replace(BatchShape.full(1, 8), start_tokens=48), torch.float32
    predicted = timeline(predict(*run)).breakdown()
    assert predicted.peak_phase == "load"
    assert predicted.peak_bytes == pytest.approx(measure.measure_peak(*run), rel=1e-3)


def test_what_a_start_is_made_of():
    """Rows as long as they may be, up to the most; nothing where it is drawn, or an adapter goes on."""

    def assumed(start: str, **more) -> int | None:
        config = settings(start, {"data.max_length": 30} | {f"adapter.{key}": value for key, value in more.items()})
        return BatchShape.assumed(config, tiny_config("llama")).start_tokens

    assert [assumed(start) for start in ("default", "gaussian", "symmetric", "pissa", "loftq")] == [None] * 3 + [0] * 2
    assert assumed("calibrated", calibration_rows=7) == 7 * 30
    assert assumed("calibrated", calibration_rows=2**31 - 1) == MOST_TOKENS


@pytest.fixture
def calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run of which the start takes more than the steps: weights are large, rows short."""
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(logging.getLogger("qlora_tool"), "propagate", True)
    model = write_model(tmp_path / "model", intermediate_size=768, num_hidden_layers=1)
    return run_config(model, write_rows(tmp_path / "rows.jsonl"), tmp_path / "run",
                      {"adapter.init_lora_weights": "calibrated", "training.per_device_train_batch_size": 1,
                       "adapter.lora_dropout": 0.0})  # fmt: skip


def test_a_run_whose_start_does_not_fit_is_refused_with_its_cure(calibrated: Config, monkeypatch: pytest.MonkeyPatch):
    setup = replace(Setup.of(calibrated), device=torch.device("cuda"))
    largest, memory = collate([ROW], pad_token_id=0, packing=False), RunMemory()
    monkeypatch.setattr(run_report, "available_bytes", lambda *_: 1 << 40)
    memory.check(setup, largest, Start(ROW * 300))
    needed, made = memory.predicted.needed_bytes, dict(memory.predicted.phase_peak_bytes)
    assert memory.predicted.peak_phase == "load"
    memory.check(setup, largest, Start(ROW * 300, checkpoint={}))
    resumed = memory.predicted.phase_peak_bytes  # a run that goes on makes none
    assert resumed.pop("load") < made.pop("load") and resumed == pytest.approx(made, rel=0.01)
    monkeypatch.setattr(run_report, "available_bytes", lambda *_: needed - 1)
    line = (r"; --set adapter\.init_lora_weights=default makes it fit, in \S+ [GM]iB \(estimated\); making "
            r"the adapters' start \(adapter\.init_lora_weights: calibrated\) takes \S+ [GM]iB, the steps \S+ [GM]iB$")
    with pytest.raises(UserError, match=line) as caught:
        memory.check(setup, largest, Start(ROW * 300))
    assert len(caught.value.lines) == 1


def limited(config: Config, limit: int) -> MemoryProfile:
    return profile_run(config, "cpu", Budget(limit, "so much", False))


def test_where_the_start_and_the_steps_take_too_much_both_are_changed(
    calibrated: Config, monkeypatch: pytest.MonkeyPatch
):
    """And what does not help a start, fewer rows of it, is not said to."""
    config = with_values(calibrated, {"training.gradient_checkpointing": False, "data.max_length": 64})
    peaks = profile_run(config, "cpu").predicted.phase_peak_bytes
    steps = max(size for phase, size in peaks.items() if phase != "load")
    assert peaks["load"] > steps
    monkeypatch.setattr(cure, "SECONDS_FOR_A_CHANGE", 600)
    found = limited(config, steps - 1)
    assert found.change_line.startswith("--set adapter.init_lora_weights=default --set ")
    assert found.change.startswith(f"{found.change_line} makes it fit, in ")
    assert "making the adapters' start (adapter.init_lora_weights: calibrated) takes" in found.change
    changes = [option.strip() for option in found.change_line.split("--set")[1:]]
    assert limited(load_config(config, changes), steps - 1).fits
    monkeypatch.setattr(cure, "SECONDS_FOR_A_CHANGE", -1)
    late = limited(config, steps - 1)
    looks = f"profile-memory with --plan for {memory_size(steps - 1)} shows what fits"
    assert late.change.startswith(f"{looks}; making the adapters' start")
    assert late.change_line == ""


def test_a_quicker_decomposition_is_named_only_where_it_helps(calibrated: Config, monkeypatch: pytest.MonkeyPatch):
    config = with_values(calibrated, {"adapter.init_lora_weights": "pissa", "data.max_length": 4,
                                      "model.weights": "resident"})  # fmt: skip
    needed = profile_run(config, "cpu").predicted.needed_bytes
    for then, start in {needed - 1: "pissa_niter_4", needed: "default"}.items():
        monkeypatch.setattr(cure, "needed_with", lambda *_, then=then: then)
        assert limited(config, needed - 1).change_line == f"--set adapter.init_lora_weights={start}"


@pytest.mark.parametrize("start", ["calibrated", pytest.param("pissa", marks=pytest.mark.slow)])
def test_a_start_that_is_kept_is_not_counted_again(calibrated: Config, start: str, caplog: pytest.LogCaptureFixture):
    config = with_values(calibrated, {"adapter.init_lora_weights": start, "model.keep_quantized": True})
    peaks = []
    for dry_run in (False, True):  # which makes none
        memory = RunMemory()
        with caplog.at_level(logging.INFO, "qlora_tool"):
            train(config, dry_run=dry_run, overwrite=True, watcher=memory)
        peaks.append(memory.predicted.phase_peak_bytes["load"])
    assert peaks[1] < peaks[0]
    told = [record.getMessage() for record in caplog.records if " predicted " in record.getMessage()]
    made, kept = (line for line in told if line.startswith("memory: "))
    assert re.match(r"memory: \S+ [GM]iB predicted while the start is made, \S+ [GM]iB in a step \(rows of", made)
    assert re.match(r"memory: \S+ [GM]iB predicted at the peak \(rows of", kept)


def test_profile_memory_says_what_a_start_takes(calibrated: Config):
    profiled = profile_run(calibrated, "cpu")
    line = profiled.timelines["predicted"]
    loaded = int(line.totals[line.phase_spans()[0].stop - 1])
    assert profiled.start_bytes == profiled.predicted.phase_peak_bytes["load"] - loaded > 0
    drawn = with_values(calibrated, {"adapter.init_lora_weights": "default"})
    assert replace(profiled, config=drawn).start_bytes is None


def test_what_was_given_from_python_is_typed_where_it_can_be(tmp_path):
    given = {"model.name_or_path": tmp_path / "a model", "adapter.target_modules": ["q_proj"]}
    with typed("my-run.yaml", given, 8_000_000_000):
        words = shlex.split(typed_command("cuda", 2))
    assert words == [
        "qlora-tool", "profile-memory", "my-run.yaml", "--set", f"model.name_or_path={tmp_path / 'a model'}",
        "--set", "adapter.target_modules=[q_proj]", "--device-memory", "8000000000B", "--device", "cuda",
        "--processes", "2",
    ]  # fmt: skip
    with typed("my-run.yaml", {"data.train": [tmp_path]}):
        assert typed_command("cuda", 1) == ""
    with typed({"model": {}}, ()):
        assert typed_command("cpu", 1) == ""


@pytest.mark.parametrize("start", ["calibrated", pytest.param("pissa", marks=pytest.mark.slow)])
def test_a_plan_has_a_row_for_a_start_that_takes_less(
    calibrated: Config, start: str, monkeypatch: pytest.MonkeyPatch
):
    """With what it costs, beside the other changes; a start that is drawn has none."""
    monkeypatch.setattr("qlora_tool.memory.plan.options.BATCH_SIZES", (1,))
    alternatives = {"savings": [{"training.tiled_mlp": True}]}
    monkeypatch.setattr("qlora_tool.memory.plan.options.ALTERNATIVES", alternatives)
    config = with_values(calibrated, {"adapter.init_lora_weights": start, "data.max_length": 64,
                                      "training.gradient_checkpointing": True})  # fmt: skip
    peaks = profile_run(config, "cpu").predicted.phase_peak_bytes
    steps = max(size for phase, size in peaks.items() if phase != "load")
    assert peaks["load"] > steps
    found = planned(profile_run(config, "cpu", Budget(peaks["load"] - 1, "so much", False), may_change=True)).plan
    others = {option.settings["adapter.init_lora_weights"]: option for option in found.options
              if "adapter.init_lora_weights" in option.settings}  # fmt: skip
    assert not found.fits and others["default"].fits and not others["default"].asked
    assert others["default"].peak_bytes <= 1.01 * steps  # of pissa, B₀ and A₀ fall away too
    stream = io.StringIO()
    render_plan(found, Console(file=stream, width=120, no_color=True))
    row, = (line for line in stream.getvalue().splitlines() if line.startswith("init_lora_weights=default"))
    assert " fits " in row and row.rstrip().endswith("a start that knows nothing of the weights")
    drawn = with_values(config, {"adapter.init_lora_weights": "default"})
    plain = planned(profile_run(drawn, "cpu", Budget(peaks["load"], "so much", False), may_change=True)).plan
    assert not any("adapter.init_lora_weights" in option.settings for option in plain.options)


@pytest.mark.parametrize("case", STARTS)
def test_a_start_is_made_with_one_layer_in_memory(case: str):
    """What it takes beside what stays is the same however many layers there are."""
    taken = []
    for layers in (3, 9):
        model = tiny_config("llama", num_hidden_layers=layers, hidden_size=128, intermediate_size=384)
        config = settings(case.partition(",")[0], STARTS[case])
        trace = predict(config, model, replace(BatchShape.full(1, 8), start_tokens=48), torch.float32)
        line = timeline(trace)
        loaded = int(line.totals[line.phase_spans()[0].stop - 1])
        taken.append(line.breakdown().phase_peak_bytes["load"] - loaded)
    assert taken[0] == taken[1] > 0
