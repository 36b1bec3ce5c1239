"""Checkpoints that know themselves: what is damaged is found, and what a run goes on from is told."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import (
    adapter_bytes,
    as_version_0_1,
    assert_same_run,
    interrupted,
    read_metrics,
    run_config,
    sealed_again,
)

from qlora_tool import api
from qlora_tool.adapters.peft_reading import read_adapter
from qlora_tool.errors import MachineError, UserError
from qlora_tool.files.sealed import read_sealed, write_sealed
from qlora_tool.once import log_once
from qlora_tool.run_folder import RunFolder
from qlora_tool.training import belonging, loop
from qlora_tool.training.checkpoints import Checkpoint
from qlora_tool.training.loop import train


@pytest.fixture(scope="module")
def stopped(inputs, tmp_path_factory) -> Path:
    """A run of six steps that was killed in the fourth; each was saved."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    train(run_config(*inputs, folder, {"training.save_steps": 1, "training.save_total_limit": None}))
    for name in ("adapter", "checkpoints/step-000004", "checkpoints/step-000005", "checkpoints/step-000006"):
        shutil.rmtree(folder / name)
    return folder


@pytest.fixture
def run(stopped, inputs, tmp_path):
    """A copy of that, and its configuration."""
    folder = shutil.copytree(stopped, tmp_path / "run")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace(str(stopped), str(folder)))
    return folder, run_config(*inputs, folder, {"training.save_steps": 1, "training.save_total_limit": None})


def test_files_of_one_name_each_count():
    """Two sources are called rows.jsonl; the first one has changed, the second moved."""
    def files(**found: str) -> dict[str, str]:
        report = SimpleNamespace(files={f"/{folder}/rows.jsonl": digest for folder, digest in found.items()})
        return belonging._of_files(SimpleNamespace(report=report))

    before = files(a="1" * 64, b="2" * 64)
    assert list(belonging._files("data.train", before, files(a="1" * 64, c="2" * 64))) == []
    (line,) = belonging._files("data.train", before, files(a="3" * 64, b="2" * 64))
    assert line.startswith("data.train: rows.jsonl: SHA-256 111111111111 there, SHA-256 333333333333 here")


def line_of(config, **options) -> str:
    with pytest.raises(UserError) as error:
        train(config, **options)
    return error.value.lines[0]


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def test_two_hundred_flipped_bits_of_a_checkpoint_are_found(stopped):
    checkpoint = stopped / "checkpoints" / "step-000003"
    draw, files = random.Random(5), sorted(checkpoint.iterdir())
    for number in range(200):
        file = files[number % len(files)]
        bit = draw.randrange(8 * file.stat().st_size)
        flip(file, bit)
        with pytest.raises(UserError, match="this checkpoint is broken"):
            Checkpoint.read(checkpoint)
        flip(file, bit)
    Checkpoint.read(checkpoint)


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_missing_file_is_found(run, name):
    checkpoint = run[0] / "checkpoints" / "step-000003"
    (checkpoint / name).unlink()
    with pytest.raises(UserError, match="this checkpoint is broken"):
        Checkpoint.read(checkpoint)


def test_files_of_another_checkpoint_and_another_name_are_found(run):
    folder = run[0] / "checkpoints"
    shutil.copy(folder / "step-000002" / "optimizer.safetensors", folder / "step-000003")
    with pytest.raises(UserError, match=r"broken \(optimizer.safetensors is not as it was written: its SHA-256 is"):
        Checkpoint.read(folder / "step-000003")
    shutil.rmtree(folder / "step-000003")
    (folder / "step-000002").rename(folder / "step-000009")
    with pytest.raises(UserError, match=r"step-000009: this checkpoint is broken \(it is of step 2\)"):
        Checkpoint.read(folder / "step-000009")


STATES = [
    ({"step": -1}, "step is -1; expected a count"), ({"tokens": math.nan}, "tokens is nan"),
    ({"tokens": 1.5}, "tokens is 1.5"), ({"step": True}, "step is True"),
    ({"unlogged_loss": math.inf}, "unlogged_loss"),
    ({"unlogged_tokens": "7"}, "unlogged_tokens is '7'"), ({"products": "MKL"}, "products by 'MKL'"),
    ({"evaluations_since_best": None}, "evaluations_since_best is None"), ({"global_passes": 0}, "global_passes is"),
    ({"untuned": {"loss": "low"}}, "untuned is"), ({"untuned": [1]}, "untuned is"), ({"surprise": 1}, "surprise"),
    ({"best": {"step": 9, "metric": "eval_loss", "value": 1.0, "losses": {}}}, "best is of 'eval_loss' after step 9"),
    ({"best": 3}, "broken"), ({"warmup_from_zero": 0}, "warmup_from_zero"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "said"), STATES, ids=[next(iter(values)) + str(i) for i, (values, _) in
                                                          enumerate(STATES)])  # fmt: skip
def test_values_that_no_run_has_are_found_where_the_hashes_are_right(run, values, said):
    checkpoint = run[0] / "checkpoints" / "step-000003"
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps(state | values))
    sealed_again(checkpoint)
    with pytest.raises(UserError, match=said):
        Checkpoint.read(checkpoint)


def test_a_missing_key_is_found_where_the_hashes_are_right(run):
    checkpoint = run[0] / "checkpoints" / "step-000003"
    state = json.loads((checkpoint / "state.json").read_text())
    for key in ("tokens", "global_passes"):
        (checkpoint / "state.json").write_text(json.dumps({name: state[name] for name in state if name != key}))
        sealed_again(checkpoint)
        with pytest.raises(UserError, match=f"no {key}"):
            Checkpoint.read(checkpoint)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors, numbers: tensors["parameters.0.exp_avg"].fill_(math.nan), "values that are not finite"),
        (lambda tensors, numbers: tensors["parameters.1.exp_avg_sq"].fill_(-1), "values below 0"),
        (lambda tensors, numbers: tensors.pop("parameters.0.exp_avg"), "another precision"),
        (lambda tensors, numbers: tensors.update({"parameters.0.exp_avg": torch.zeros(3)}), "another size"),
        (lambda tensors, numbers: tensors.update({"parameters.0.exp_avg": tensors["parameters.0.exp_avg"].double()}),
         "its exp_avg is saved in torch.float64"),
        (lambda tensors, numbers: tensors.update({"parameters.999.exp_avg": torch.zeros(3)}), "broken"),
        (lambda tensors, numbers: tensors.pop("random.0.cpu"), "broken"),
        (lambda tensors, numbers: tensors.update({"random.0.cpu": torch.zeros(3, dtype=torch.uint8)}), "random numb"),
        (lambda tensors, numbers: numbers["steps"].__setitem__(0, -2), "steps are -2"),
        (lambda tensors, numbers: numbers.update(loss_scale=0.0), "loss scale is 0.0"),
        (lambda tensors, numbers: numbers.pop("good_steps"), "good_steps"),
        (lambda tensors, numbers: numbers.update(name="sgd"), "saved by sgd"),
        (lambda tensors, numbers: numbers["steps"].pop(), "broken"),
    ],
)  # fmt: skip
def test_an_optimizer_of_no_run_is_found_where_the_hashes_are_right(run, inputs, one_run, change, said):
    checkpoint = run[0] / "checkpoints" / "step-000003"
    tensors = load_file(checkpoint / "optimizer.safetensors")
    state = json.loads((checkpoint / "state.json").read_text())
    change(tensors, state["optimizer"])
    save_file(tensors, checkpoint / "optimizer.safetensors")
    (checkpoint / "state.json").write_text(json.dumps(state))
    sealed_again(checkpoint)
    with pytest.raises(UserError, match=said):
        Checkpoint.read(checkpoint).load(one_run.adapters, one_run.optimizer, one_run.world)


@pytest.fixture(scope="module")
def one_run(inputs, tmp_path_factory):
    """A run that is ready for its first step."""
    return train(run_config(*inputs, tmp_path_factory.mktemp("dry") / "run"), dry_run=True)


def test_a_broken_newest_checkpoint_falls_back_to_the_one_before(run, config, tmp_path, caplog):
    folder, here = run
    for step in (2, 3):
        flip(folder / "checkpoints" / f"step-00000{step}" / "optimizer.safetensors", 4000)
    with caplog.at_level(logging.WARNING):
        train(here)
    lines = [record.getMessage() for record in caplog.records if "is broken" in record.getMessage()]
    assert len(lines) == 2
    assert lines[0].startswith(f"{folder / 'checkpoints' / 'step-000003'}: this checkpoint is broken (optimizer.safet")
    assert lines[0].endswith(f"; going on from {folder / 'checkpoints' / 'step-000001'}")
    assert sorted(path.name for path in (folder / "set-aside-1").iterdir()) == ["step-000002", "step-000003"]
    train(config("whole"))
    assert_same_run(folder, tmp_path / "whole")


def test_with_no_checkpoint_that_is_whole_nothing_is_done(run):
    folder, config = run
    for path in (folder / "checkpoints").iterdir():
        flip(path / "state.json", 80)
    before = sorted(path for path in folder.rglob("*"))
    assert line_of(config).endswith("give --overwrite to start anew")
    assert sorted(path for path in folder.rglob("*")) == before
    one = folder / "checkpoints" / "step-000003"
    assert line_of(config, resume=str(one)).startswith(f"{one}: this checkpoint is broken (state.json is not as it was")


def test_an_earlier_versions_checkpoint_goes_on_with_one_warning(run, config, tmp_path, caplog):
    folder, here = run
    for path in (folder / "checkpoints").iterdir():
        as_version_0_1(path)
    with caplog.at_level(logging.WARNING):
        train(here)
    (line,) = [record.getMessage() for record in caplog.records if "version 0.1" in record.getMessage()]
    assert line.startswith(f"{folder / 'checkpoints' / 'step-000003'}: of version 0.1, without a list of its files")
    train(config("whole"))
    assert_same_run(folder, tmp_path / "whole")


# ------------------------------------------------------------------------------------------------ what differs is said


def changed(inputs, folder: Path, tmp_path: Path, kind: str):
    """The run's configuration, on inputs that are changed in one thing."""
    model, rows = shutil.copytree(inputs[0], tmp_path / "model"), shutil.copy(inputs[1], tmp_path / "rows.jsonl")
    settings = json.loads((model / "config.json").read_text())
    if kind == "epsilon":
        (model / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 1e-3}))
    elif kind == "base":
        tensors = load_file(model / "model.safetensors")
        next(iter(tensors.values())).view(-1)[0] += 1
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
    elif kind == "data":
        lines = Path(rows).read_text().splitlines()
        Path(rows).write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
    elif kind == "template":
        (template,) = model.glob("chat_template*")
        template.write_text(template.read_text().replace("<|im_end|>", "<|im_end|> ", 1))
    return run_config(model, rows, folder, {"training.save_steps": 1, "training.save_total_limit": None})


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("epsilon", "config.json: rms_norm_eps: 1e-06 there, 0.001 here"),
        ("base", "the base: model.safetensors: SHA-256 "),
        ("data", "data.train: rows.jsonl: SHA-256 "), ("template", "the chat template: SHA-256 "), ("same", None),
    ],
)  # fmt: skip
def test_other_inputs_are_refused_and_allowed_when_asked_for(run, inputs, tmp_path, caplog, kind, said):
    folder, _ = run
    here = changed(inputs, folder, tmp_path, kind)
    text = (folder / "config.yaml").read_text()
    for old, new in zip(inputs, (tmp_path / "model", tmp_path / "rows.jsonl"), strict=True):
        text = text.replace(str(old), str(new))
    (folder / "config.yaml").write_text(text)
    if said is not None:
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        line = line_of(here)
        path = folder / "checkpoints" / "step-000003"
        assert line.startswith(f"{path}: what it belongs to has changed ({said}")
        assert line.endswith("give --overwrite to start anew, or --allow-changes to go on all the same")
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    with caplog.at_level(logging.WARNING):
        train(here, allow_changes=True)
    assert len(read_metrics(folder)) == 6
    found = [record.getMessage() for record in caplog.records if "--allow-changes" in record.getMessage()]
    assert len(found) == (said is not None)


def test_another_version_is_refused_and_other_libraries_are_warned_of(run, monkeypatch, caplog):
    _, config = run
    monkeypatch.setattr(belonging, "__version__", "9.9.9")
    assert "what it belongs to has changed (qlora-tool: 0" in line_of(config)
    monkeypatch.undo()
    monkeypatch.setattr(belonging, "version", lambda name: "0.0.1")
    with caplog.at_level(logging.WARNING):
        train(config)
    (line,) = [record.getMessage() for record in caplog.records if "was made elsewhere" in record.getMessage()]
    assert "transformers: " in line and "bitsandbytes: " in line
    assert line.endswith("the run goes on, and not to the bit")


def test_keys_that_change_numbers_are_allowed_when_asked_for(run):
    folder, config = run
    other = config.model_copy(update={"training": config.training.model_copy(update={"learning_rate": 5e-3})})
    line = line_of(other)
    assert "holds another run (training.learning_rate: 0.01 there, 0.005 here)" in line and "--allow-changes" in line
    train(other, allow_changes=True)
    rates = [record["learning_rate"] for record in read_metrics(folder)]
    assert max(rates[3:]) <= 5e-3 < rates[1]


def test_a_manifest_that_says_nothing_of_where_it_belongs_is_refused(run):
    folder, config = run
    file = folder / "checkpoints" / "step-000003" / "manifest.json"
    manifest = read_sealed(file)
    write_sealed(file, {key: value for key, value in manifest.items() if key != "belongs_to"})
    assert "does not say what it belongs to" in line_of(config)


# --------------------------------------------------------------------------------------------------- nothing is lost


def test_overwriting_keeps_the_earlier_run_until_the_new_one_is_done(config, tmp_path, stop_in_step):
    train(config())
    before = adapter_bytes(tmp_path / "run")
    interrupted(stop_in_step, config(training__seed=3), 2, overwrite=True)
    aside = tmp_path / "run" / "replaced-1"
    assert adapter_bytes(aside) == before
    assert (aside / "checkpoints" / "step-000006" / "manifest.json").exists()
    train(config(training__seed=3))
    assert not aside.exists()
    assert adapter_bytes(tmp_path / "run") != before


def test_two_runs_at_once_into_one_folder(config, tmp_path, monkeypatch):
    lines = []

    def second(*arguments, train_step=loop.train_step):
        if not lines:
            lines.append(line_of(config()))
            lines.append(line_of(config(), dry_run=True))
            lines.append(line_of(config(), overwrite=True))
        return train_step(*arguments)

    monkeypatch.setattr(loop, "train_step", second)
    train(config())
    assert all(line.startswith(f"{tmp_path / 'run'}: process ") and "trains into it; wait" in line for line in lines)
    assert len(read_metrics(tmp_path / "run")) == 6
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_users_adapter_where_a_run_would_write_is_left(config, tmp_path):
    adapter = tmp_path / "run" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    for options in ({}, {"overwrite": True}):
        assert line_of(config(), **options).startswith(f"{adapter}: no run wrote it")
    assert [path.name for path in (tmp_path / "run").rglob("*")] == ["adapter", "adapter_config.json"]


@pytest.mark.parametrize("tries", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_a_flipped_bit_of_an_adapter_is_found(config, tmp_path, caplog, tries):
    train(config())
    adapter = tmp_path / "run" / "adapter"
    draw, files = random.Random(1), sorted((tmp_path / "run" / "adapter").iterdir())
    caplog.clear()
    read_adapter(adapter)
    assert not caplog.records
    for number in range(tries):
        log_once.cache_clear()
        caplog.clear()
        copy = shutil.copytree(adapter, tmp_path / str(number))
        file = copy / files[number % len(files)].name
        flip(file, draw.randrange(8 * file.stat().st_size))
        refused = ""
        try:
            read_adapter(copy)
        except UserError as error:
            refused = str(error)
        assert refused or [record for record in caplog.records if str(copy) in record.getMessage()], file
        assert "adapter_model.safetensors" in refused or file.name != "adapter_model.safetensors"


# ------------------------------------------------------------------------------------------------ what a machine does


@pytest.mark.parametrize(("empty", "save_steps"), [(False, 2), (True, 2), (True, 100)])
def test_a_folder_that_is_removed_while_it_is_trained_into(config, tmp_path, monkeypatch, empty, save_steps):
    """With another, empty one in its place or none, seen at the next checkpoint or, at last, at the end."""
    folder, moved = tmp_path / "run", tmp_path / "moved"

    def step(*arguments, train_step=loop.train_step):
        begun = folder / ("metrics.jsonl" if save_steps > 2 else "checkpoints/step-000002")
        if begun.exists() and not moved.exists():
            folder.rename(moved)
            if empty:
                folder.mkdir()
        return train_step(*arguments)

    monkeypatch.setattr(loop, "train_step", step)
    with pytest.raises(MachineError, match=f"{folder}: was removed or moved while the run trained into it; put"):
        train(config(training__save_steps=save_steps))
    monkeypatch.undo()
    assert not (folder / "adapter").exists() and not (folder / "checkpoints").exists()
    shutil.rmtree(folder, ignore_errors=True)
    moved.rename(folder)
    train(config(training__save_steps=save_steps))
    train(config("whole"))
    assert_same_run(folder, tmp_path / "whole")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_stderr_that_is_full_closed_or_gone_does_not_end_a_run(config, tmp_path, monkeypatch):
    closed = Path("/dev/full").open("w")  # noqa: SIM115 -- closed at once, and used so
    closed.close()
    with Path("/dev/full").open("w") as full:
        for number, stream in enumerate((full, closed, None)):
            monkeypatch.setattr(sys, "stderr", stream)
            assert train(config(f"run-{number}")).progress.step == 6
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()


def test_a_failing_disk_says_where_the_run_goes_on(config, tmp_path, monkeypatch):
    folder = tmp_path / "run"

    def fail(source, target, replace=os.replace):
        if Path(target).name == "step-000004":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(MachineError) as error:
        train(config(training__save_steps=2))
    (line,) = error.value.lines
    saved = folder / "checkpoints" / "step-000002"
    assert "step-000004: Input/output error; the disk fails" in line
    assert line.endswith(f"; the same command then goes on from {saved}")
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000002"]


ODD = {
    "a pipe": os.mkfifo, "a link to an endless device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": os.mkdir, "a link to nothing": lambda path: path.symlink_to("nowhere"),
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", ["manifest.json", "state.json", "adapter.safetensors", "optimizer.safetensors"])
def test_no_file_of_a_checkpoint_is_read_that_is_none(run, name, odd):
    """Nor waited for: a pipe nobody writes into, a device without an end. The checkpoint before it is taken."""
    folder, _ = run
    file = folder / "checkpoints" / "step-000003" / name
    file.unlink()
    ODD[odd](file)
    with pytest.raises(UserError, match="this checkpoint is broken"):
        Checkpoint.read(file.parent)


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", ["state.json", "adapter.safetensors", "optimizer.pt"])
def test_nor_one_of_an_earlier_version(run, name, odd):
    checkpoint = run[0] / "checkpoints" / "step-000003"
    as_version_0_1(checkpoint)
    (checkpoint / name).unlink()
    ODD[odd](checkpoint / name)
    with pytest.raises(UserError, match="this checkpoint is broken"):
        Checkpoint.read(checkpoint)


@pytest.mark.parametrize("linked", ["", "checkpoints", "checkpoints/step-000003", "checkpoints/step-000003/state.json",
                                    "report", "report/rows.json", "metrics.jsonl", "config.yaml"])  # fmt: skip
def test_a_run_that_is_replaced_keeps_what_its_links_lead_to(run, tmp_path, linked):
    """The folder of the earlier run, or anything in it, lies elsewhere: all of that stays."""
    folder, _ = run
    aside, elsewhere = RunFolder(folder).put_aside(), tmp_path / "elsewhere"
    assert (aside / linked).exists()
    (aside / linked).rename(elsewhere)
    (aside / linked).symlink_to(elsewhere)
    paths = [elsewhere, *elsewhere.rglob("*")]
    before = {path: path.read_bytes() for path in paths if path.is_file()}
    RunFolder(folder).remove_replaced()
    assert before and {path: path.read_bytes() for path in before if path.exists()} == before


def test_what_a_link_leads_to_is_never_removed(run, tmp_path):
    """A checkpoint that lies elsewhere: the run goes on from the one before, and the files stay."""
    folder, config = run
    newest, elsewhere = folder / "checkpoints" / "step-000003", tmp_path / "elsewhere"
    newest.rename(elsewhere)
    newest.symlink_to(elsewhere)
    before = {path.name: path.read_bytes() for path in elsewhere.iterdir()}
    train(config)
    train(config, overwrite=True)
    assert {path.name: path.read_bytes() for path in elsewhere.iterdir()} == before


@pytest.mark.parametrize("text, broken", [
    ("[1]\n", 1), ('{"step": "x"}\n' * 2, 2), ('{"step": 1e999}\n{}\n', 2), ("garbage\n", 1), ("[" * 10**5 + "\n", 1),
], ids=str)  # fmt: skip
def test_records_that_are_none_are_counted(run, text, broken, caplog):
    folder, config = run
    metrics = folder / "metrics.jsonl"
    metrics.write_text(text + metrics.read_text())
    train(config)
    assert [record["step"] for record in read_metrics(folder)] == [1, 2, 3, 4, 5, 6]
    said = "1 line of it is no record of a step; it is left out" if broken == 1 else \
        f"{broken} lines of it are no records of a step; they are left out"  # fmt: skip
    assert f"{metrics}: {said}" in caplog.messages


def test_records_that_are_gone_are_told(run, caplog):
    folder, config = run
    (folder / "metrics.jsonl").unlink()
    train(config)
    assert f"{folder / 'metrics.jsonl'}: has no records of the 3 steps that were done; it begins after them" \
        in caplog.messages  # fmt: skip


@pytest.mark.parametrize("name", ["metrics.jsonl", "memory.json", "report.html", "config.yaml", ".lock"])
def test_a_pipe_in_the_place_of_a_runs_file_is_refused(run, name):
    folder, config = run
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert str(folder / name) in line_of(config)


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize("place, reason", [
    ("/proc/x/run", "/proc is the system's own"), ("/dev/null/run", "/dev/null is no folder"),
    ("{model}", "lies in the model's own folder"), ("{model}/deep/run", "lies in the model's own folder"),
])  # fmt: skip
def test_a_place_where_no_run_can_be_is_refused_by_a_dry_run_too(inputs, place, reason, dry_run):
    model = inputs[0]
    before = sorted(model.iterdir())
    line = line_of(run_config(*inputs, Path(place.format(model=model))), dry_run=dry_run)
    assert line.startswith("training.output_dir: ") and reason in line
    assert sorted(model.iterdir()) == before


@pytest.mark.parametrize("odd", ODD)
def test_no_file_of_a_finished_run_is_waited_for(inputs, tmp_path, odd):
    """Every file that the report reads, one at a time: what is none is as good as not there, or refused in a line."""
    run, copy = tmp_path / "run", tmp_path / "copy"
    train(run_config(*inputs, run, {"training.max_steps": 2, "training.save_steps": 1}))
    files = [file.relative_to(run) for file in run.rglob("*") if file.is_file()]
    assert len(files) > 12
    for file in files:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run, copy)
        (copy / file).unlink()
        ODD[odd](copy / file)
        with contextlib.suppress(UserError, MachineError):
            api.report(copy, output=tmp_path / "page.html")
            assert (tmp_path / "page.html").stat().st_size > 1000
