"""`model.weights: auto`: all of the base on the device where that fits, else as many layers of it as do."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import run_config, write_model, write_rows

from qlora_tool.build.resolve import resolve
from qlora_tool.config import Config, load_config, with_values
from qlora_tool.errors import MachineError
from qlora_tool.files.cache import cache_folder
from qlora_tool.files.tensors import Checkpoint
from qlora_tool.memory import profile as profiling
from qlora_tool.memory import run_report
from qlora_tool.memory.allocator.cards import Budget
from qlora_tool.memory.allocator.target import target_on
from qlora_tool.memory.plan import weights
from qlora_tool.memory.plan.budget import BudgetTooSmall
from qlora_tool.memory.plan.weights import place_weights
from qlora_tool.memory.profile import Prediction, model_config_of
from qlora_tool.memory.profile_run import profile_run
from qlora_tool.memory.run_report import RunMemory
from qlora_tool.memory.trace.predict import BatchShape, predict
from qlora_tool.training.loop import train

LAYERS = 6
SHAPE = BatchShape.full(1, 16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Most of it are layers."""
    return write_model(tmp_path_factory.mktemp("deep"), num_hidden_layers=LAYERS, hidden_size=64, intermediate_size=256)


@pytest.fixture
def config(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(tmp_path / "cache"))
    rows = write_rows(tmp_path / "rows.jsonl")
    return run_config(model, rows, tmp_path / "run", {
        "training.max_steps": 2, "training.gradient_checkpointing": True, "adapter.r": 1,
        "model.compute_dtype": "float32", "model.keep_quantized": False,
    })  # fmt: skip


def needed(config: Config, **values: object) -> int:
    """What a run takes on a CPU, by a full prediction."""
    config = with_values(config, {f"model.{key}": value for key, value in values.items()})
    trace = predict(resolve(config, model_config_of(config), "cpu", torch.float32), model_config_of(config), SHAPE,
                    torch.float32)  # fmt: skip
    return Prediction.of(trace, None).breakdown.needed_bytes


def placed(config: Config, limit: int, device: str = "cpu", here: bool = True):
    model_config = model_config_of(config)
    return place_weights(resolve(config, model_config, device, torch.float32), model_config, SHAPE, torch.float32,
                         target_on(device), limit, here=here)  # fmt: skip


@pytest.mark.parametrize("resident", [0, 2])
def test_as_many_layers_stay_as_the_limit_allows(config: Config, resident: int):
    limit = needed(config, weights="disk", resident_layers=resident)
    found = placed(config, limit)
    assert (found.config.model.weights, found.config.model.resident_layers) == ("disk", resident)
    assert found.predicted.needed_bytes == limit
    assert f"{LAYERS - resident} of {LAYERS} layers come from the disk" in str(found)
    if resident:
        assert placed(config, limit - 1).config.model.resident_layers == resident - 1


def test_what_was_said_stays_and_what_does_not_fit_is_not_placed(config: Config):
    limit = needed(config, weights="disk")
    assert placed(config, limit - 1) is None
    for said in ("resident", "host", "disk"):
        assert placed(with_values(config, {"model.weights": said}), limit) is None


def test_the_disk_where_the_host_has_no_room_and_nothing_where_neither_has(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(logging.getLogger("qlora_tool"), "propagate", True)
    caplog.set_level(logging.INFO, "qlora_tool")
    plenty = 1 << 40
    assert placed(config, plenty, "cuda").config.model.weights == "host"
    monkeypatch.setattr(weights, "free_bytes", lambda _: 150_000)  # the buffers on the way have it
    assert placed(config, plenty, "cuda").config.model.weights == "disk"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    caplog.clear()
    assert placed(config, plenty, "cuda") is None
    host, disk = dict.fromkeys(caplog.messages)
    assert re.fullmatch(r"model.weights: auto: not host: that takes .* of host memory, of which .* are free", host)
    assert re.fullmatch(r"model.weights: auto: not disk: the quantized base takes .* in .*cache, and 0.0 MB .*", disk)
    assert placed(config, plenty, "cuda", here=False).config.model.weights == "host"  # of another machine


def test_a_base_that_is_kept_already_needs_no_more_of_the_disk(config: Config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert placed(config, 1 << 40) is None
    monkeypatch.undo()
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(Path(config.training.output_dir).parent / "cache"))
    train(with_values(config, {"model.weights": "disk"}))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert placed(config, 1 << 40).config.model.weights == "disk"
    other = with_values(config, {"adapter.init_lora_weights": "pissa"})  # which takes its own base
    assert placed(other, 1 << 40) is None


def test_a_base_that_an_adapter_brings_is_not_sent_to_the_disk(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
):
    """It cannot be kept there: the run goes on as it would without `auto`, and says why."""
    first = with_values(config, {"adapter.init_lora_weights": "pissa", "training.output_dir": str(tmp_path / "first")})
    train(first)
    again = with_values(config, {"adapter.init_from": str(tmp_path / "first" / "adapter")})
    monkeypatch.setattr(logging.getLogger("qlora_tool"), "propagate", True)
    monkeypatch.setattr(run_report, "available_bytes", lambda *_: 900_000)
    monkeypatch.setattr(run_report, "cure", lambda *_: "take a smaller model")
    caplog.set_level(logging.INFO, "qlora_tool")
    run = train(again, watcher=RunMemory())
    assert run.config.model.weights == "auto"
    assert "model.weights: auto: not disk: this adapter brings a base of its own, which is not kept on the disk" in \
        caplog.messages  # fmt: skip
    assert any("this run needs" in line for line in caplog.messages)


@pytest.mark.parametrize("checkpointing", [True, "auto"])
def test_what_a_run_may_take_is_the_limit_whatever_is_recomputed(
    config: Config, checkpointing: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    memory = RunMemory()
    train(config, watcher=memory, dry_run=True)
    least = memory.predicted

    def choose(*_: object) -> None:
        if checkpointing == "auto":
            raise BudgetTooSmall(least, "with everything recomputed", "a limit")

    monkeypatch.setattr(run_report, "choose_for_run", choose)
    run = train(with_values(config, {
        "training.gradient_checkpointing": checkpointing, "training.max_memory": f"{least.needed_bytes - 1}B",
    }), watcher=memory)  # fmt: skip
    assert (run.config.model.weights, run.config.training.gradient_checkpointing) == ("disk", True)
    assert memory.predicted.needed_bytes < least.needed_bytes


@pytest.mark.parametrize("cache", ["a file", "in a file"])
def test_a_cache_that_cannot_be_written_is_no_place_for_a_base(
    config: Config, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(tmp_path / "file" / ("inner" if cache == "in a file" else "")))
    monkeypatch.setattr(logging.getLogger("qlora_tool"), "propagate", True)
    caplog.set_level(logging.INFO, "qlora_tool")
    assert placed(config, 1 << 40) is None
    said = r"model.weights: auto: not disk: the cache .* cannot be written \(.*\); set QLORA_TOOL_CACHE to .*"
    assert any(re.fullmatch(said, line) for line in caplog.messages)
    with pytest.raises(MachineError, match=r"^model.weights: disk: the cache .* cannot be written \(.*; set QLORA"):
        train(with_values(config, {"model.weights": "disk"}))
    assert (tmp_path / "file").read_text() == "mine"


def test_the_disk_has_room_for_the_whole_file_or_is_not_chosen(config: Config, monkeypatch: pytest.MonkeyPatch):
    """Embeddings are in it, too."""
    train(with_values(config, {"model.weights": "disk"}))
    [kept] = (cache_folder() / "bases").iterdir()
    size = Checkpoint(kept).nbytes
    shutil.rmtree(kept)
    for free, chosen in ((size - 20_000, False), (size + 20_000, True)):  # a little more is counted than is there
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        assert (placed(config, 1 << 40) is not None) is chosen
        monkeypatch.undo()
        monkeypatch.setenv("QLORA_TOOL_CACHE", str(kept.parent.parent))


def test_a_kept_base_that_is_cut_off_is_made_again(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(logging.getLogger("qlora_tool"), "propagate", True)
    config = with_values(config, {"model.weights": "disk"})
    train(config)
    [file] = (cache_folder() / "bases").glob("*/model.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    train(config, resume="never", overwrite=True)
    assert file.read_bytes() == whole
    start = f"{file.parent}: the base that is kept there is not as it was written ("
    [line] = [line for line in caplog.messages if line.startswith(start)]
    assert line.endswith("it was removed, and it is made anew")


def test_a_recomputation_left_to_the_budget_is_all_of_it(config: Config):
    config = with_values(config, {"training.gradient_checkpointing": "auto"})
    assert placed(config, 1 << 40).config.training.gradient_checkpointing is True


@pytest.mark.parametrize("fits", [True, False])
def test_a_run_streams_what_does_not_fit_and_learns_the_same(
    config: Config, fits: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
):
    whole = train(with_values(config, {"model.weights": "resident", "training.output_dir": str(tmp_path / "whole")}))
    memory = RunMemory()
    monkeypatch.setattr(logging.getLogger("qlora_tool"), "propagate", True)
    seen: list[int] = []

    def available(*_: object) -> int:
        seen.append(memory.predicted.needed_bytes if fits or not seen else seen[0])
        return seen[-1] - (not fits)

    monkeypatch.setattr(run_report, "available_bytes", available)
    run = train(config, watcher=memory)
    model = load_config(run.folder.path / "config.yaml").model
    told = {line for line in caplog.messages if line.startswith("model.weights: auto: not all of the base fits")}
    assert (model.weights, len(told)) == (("auto", 0) if fits else ("disk", 1))
    assert fits or model.resident_layers > 0
    assert memory.predicted.needed_bytes <= seen[0] - (not fits)
    ours, theirs = (load_file(one.folder.path / "adapter" / "adapter_model.safetensors") for one in (run, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_profile_streams_what_a_device_has_no_room_for(config: Config, caplog: pytest.LogCaptureFixture):
    config = with_values(config, {"data.max_length": 16, "training.per_device_train_batch_size": 1})
    on_device = profile_run(config, "cpu").predicted
    assert not on_device.elsewhere
    limit = Budget(on_device.needed_bytes - 1, "", False)
    streamed = profile_run(config, "cpu", limit)
    assert streamed.fits and streamed.predicted.elsewhere["disk_bytes"] > 0
    assert streamed.config.model.resident_layers > 0
    said = with_values(config, {"model.weights": "resident"})
    assert profile_run(said, "cpu", limit).fits is False


def test_what_is_measured_is_what_was_placed_and_once(config: Config, monkeypatch: pytest.MonkeyPatch):
    """A run that does not fit is not measured where it does not."""
    config = with_values(config, {"data.max_length": 16, "training.per_device_train_batch_size": 1})
    needed_in_all = profile_run(config, "cpu").predicted.needed_bytes
    measured: list[str] = []
    real = profiling.measure_peak
    monkeypatch.setattr(profiling, "measure_peak", lambda *run: measured.append(run[0].model.weights) or real(*run))
    for missing, where in ((0, "auto"), (1, "disk")):
        found = profile_run(config, "cpu", Budget(needed_in_all - missing, "", False), measure=True)
        assert measured.pop() == where and not measured
        assert found.measured.peak_bytes == pytest.approx(found.predicted.peak_bytes, rel=0.01)
