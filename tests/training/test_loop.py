"""Whole runs on a tiny llama: what they leave behind, what the numbers mean, and where they stop."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_adapters import write_peft_adapter
from tiny_models import read_by_transformers
from tiny_runs import adapter_bytes, comparable, read_metrics, run_config, write_model, write_rows
from torch import nn
from transformers import AutoTokenizer

from qlora_tool.adapters.calibration import calibrated
from qlora_tool.build import build
from qlora_tool.build.setup import Setup
from qlora_tool.build.tensors import FromFiles
from qlora_tool.config import load_config
from qlora_tool.errors import MachineError, UserError
from qlora_tool.files import tensors
from qlora_tool.memory.run_report import RunMemory
from qlora_tool.training import loop
from qlora_tool.training.loop import train
from qlora_tool.training.progress import Speed
from qlora_tool.training.read_late import LateNumbers, StepNumbers
from qlora_tool.training.step import StepResult

FIELDS = {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_bytes"}


def partial_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith(".")]


def test_what_a_run_leaves_behind(config, tmp_path):
    run = train(config(training__save_steps=4, training__warmup_steps=2, training__lr_scheduler_type="linear"))
    folder = tmp_path / "run"
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "checkpoints", "config.yaml", "metrics.jsonl",
                                                              "report"]  # fmt: skip
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-000004", "step-000006"]
    names = {path.name for path in (folder / "adapter").iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "qlora_tool.json", "tokenizer_config.json"}
    assert not partial_files(folder)

    metrics = read_metrics(folder)
    assert [record["step"] for record in metrics] == [1, 2, 3, 4, 5, 6]
    assert all(record.keys() == FIELDS for record in metrics)
    assert [record["epoch"] for record in metrics] == [0.125, 0.25, 0.375, 0.5, 0.625, 0.75]  # 30 rows, 4 a step
    rates = [0.005, 0.01, 0.01, 0.0075, 0.005, 0.0025]
    assert [record["learning_rate"] for record in metrics] == pytest.approx(rates)
    assert metrics[0]["tokens_per_second"] is None  # the first step warms up
    assert all(record["tokens_per_second"] > 0 for record in metrics[1:])
    assert all(record["grad_norm"] > 0 and record["peak_memory_bytes"] > 1e8 for record in metrics)
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.2

    provenance = json.loads((folder / "adapter" / "qlora_tool.json").read_text())
    assert (provenance["quantization"], provenance["double_quant"], provenance["block_size"]) == ("nf4", True, 64)
    resolved = load_config(str(folder / "config.yaml"))
    assert resolved == run.config
    assert resolved.training.gradient_checkpointing is False
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(saved) == 28
    assert any(tensor.any() for name, tensor in saved.items() if "lora_B" in name)


def test_training_the_resolved_configuration_repeats_the_run(config, tmp_path):
    train(config(data__packing=True, training__gradient_checkpointing="auto", model__compute_dtype="float32"))
    first = tmp_path / "run"
    again = load_config(str(first / "config.yaml"), [f"training.output_dir={tmp_path / 'again'}"])
    assert again.training.gradient_checkpointing is True
    torch.manual_seed(12345)  # what was drawn before does not matter
    train(again)
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(first)
    assert [comparable(r) for r in read_metrics(tmp_path / "again")] == [comparable(r) for r in read_metrics(first)]
    for name in ("adapter_config.json", "qlora_tool.json"):
        assert (tmp_path / "again" / "adapter" / name).read_bytes() == (first / "adapter" / name).read_bytes()
    for name, changed in (("seed", {"training__seed": 1}), ("dropout", {"adapter__lora_dropout": 0.0})):
        train(config(name, data__packing=True, **changed))
        assert adapter_bytes(tmp_path / name) != adapter_bytes(first)


def test_the_logged_loss_is_the_mean_over_the_tokens_since_the_last_record(config, tmp_path):
    run = train(config("each", training__gradient_accumulation_steps=2))
    train(config("fourth", training__gradient_accumulation_steps=2, training__logging_steps=4))
    each, fourth = read_metrics(tmp_path / "each"), read_metrics(tmp_path / "fourth")
    assert [record["step"] for record in fourth] == [4, 6]
    counts = [
        sum(run.data.train.examples[index].trained_tokens for rows in batches for row in rows for index in row)
        for batches in run.plan.steps(0)
    ]
    assert len(set(counts)) > 1  # else a mean of means would do
    for record, steps in zip(fourth, (slice(0, 4), slice(4, 6)), strict=True):
        total = sum(count * r["loss"] for count, r in zip(counts[steps], each[steps], strict=True))
        assert record["loss"] == pytest.approx(total / sum(counts[steps]), rel=1e-12)
        assert record["grad_norm"] == each[record["step"] - 1]["grad_norm"]
        assert record["learning_rate"] == each[record["step"] - 1]["learning_rate"]


def test_what_is_said_before_a_run(config, caplog, monkeypatch):
    """The same of all data once, one row as one, and no weight of nothing."""
    monkeypatch.setattr(logging.getLogger("qlora_tool"), "propagate", True)
    with caplog.at_level(logging.INFO, "qlora_tool"):
        train(config(data__eval=0.2, training__per_device_train_batch_size=1), dry_run=True)
    told = [record.getMessage() for record in caplog.records]
    assert len([line for line in told if line.startswith("chat template: ")]) == 1
    assert len([line for line in told if " tokens, " in line and " of them trained; the longest has" in line]) == 2
    assert any("a step takes 1 row of up to 128" in line for line in told)
    [model] = (line for line in told if line.startswith("model: "))
    assert "lm_head.weight 0.1 MiB, ...)" in model and " 0.0 MiB" not in model.partition("; unquantized ")[2]


def test_the_plan_sees_every_row_once_an_epoch(config):
    run = train(config(training__max_steps=-1, training__num_train_epochs=1.5, training__gradient_accumulation_steps=3),
                dry_run=True)  # fmt: skip
    steps = list(run.plan.steps(0))
    assert (run.plan.steps_per_epoch, run.plan.total_steps, len(steps)) == (3, 5, 5)  # 8 micro-batches: 3 + 3 + 2
    assert [len(batches) for batches in steps] == [3, 3, 2, 3, 3]
    first = [index for batches in steps[:3] for rows in batches for row in rows for index in row]
    assert sorted(first) == list(range(30))
    assert first != sorted(first)
    second = [index for batches in steps[3:] for rows in batches for row in rows for index in row]
    assert second != first[: len(second)]
    assert list(run.plan.steps(4)) == steps[4:]


@pytest.mark.parametrize("logged_every", [1, 3])
def test_the_speed_counts_steps_alone(monkeypatch, logged_every):
    """Steps of 10 tokens and 2 seconds; between them 100 seconds of evaluating and saving."""
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    speed, found = Speed(), []
    for step in range(1, 10):
        watched = step == 2
        now += 50 if step == 1 else 30 if watched else 2
        speed.step_done(10, counted=not watched)
        if step % logged_every == 0:
            found.append(speed.take())
        paused = speed.pause()
        now += 100
        speed.resume(paused)
    # The first step, which warms up, and one that is watched are left out.
    assert found == ([None, None] + [5.0] * 7 if logged_every == 1 else [5.0] * 3)


def test_a_dry_run_writes_nothing(config, tmp_path):
    run = train(config(), dry_run=True)
    assert run.plan.total_steps == 6
    assert not (tmp_path / "run").exists()


def test_a_dry_run_makes_no_start_from_the_data(config, monkeypatch, caplog):
    """And says so; one that is kept from an earlier run is read. What cannot be made is refused all the same."""
    monkeypatch.setattr(logging.getLogger("qlora_tool"), "propagate", True)
    made = []
    monkeypatch.setattr(build, "calibrated", lambda *args, **to: made.append(args) or calibrated(*args, **to))
    wanted = {"adapter__init_lora_weights": "calibrated", "model__quantization": "nf4", "model__keep_quantized": True}
    for times in (0, 1):
        with caplog.at_level(logging.INFO, "qlora_tool"):
            caplog.clear()
            drawn = train(config(**wanted), dry_run=True, overwrite=bool(times))
        said = [record.getMessage() for record in caplog.records if "when training begins" in record.getMessage()]
        assert len(made) == times * 2 and len(said) == 1 - times
        b = [tensor for name, tensor in drawn.adapters.tensors().items() if "lora_B" in name]
        assert b and all(bool(tensor.any()) is bool(times) for tensor in b)
        if not times:
            train(config(**wanted))
            assert len(made) == 1
    monkeypatch.setattr(FromFiles, "unquantized", lambda *_: refuse())
    with pytest.raises(UserError, match="quantized already"):
        train(config(**wanted), dry_run=True, overwrite=True)


def refuse() -> None:
    raise UserError("quantized already")


# -------------------------------------------------------------------------------------------------------- evaluation


def test_several_sets_are_evaluated_by_name(config, tmp_path):
    sets = {
        name: str(write_rows(tmp_path / f"{name}.jsonl", 7, first=100 * n)) for n, name in enumerate(("near", "far"))
    }
    values = {"model__quantization": "none", "training__eval_steps": 2, "training__logging_steps": 4}
    run = train(config(data__eval=sets, training__max_steps=5, **values))
    metrics = read_metrics(tmp_path / "run")
    assert [record["step"] for record in metrics] == [2, 4, 5]
    assert all(record.keys() == FIELDS | {"eval_loss", "eval_near_loss", "eval_far_loss"} for record in metrics)
    assert all(record["eval_loss"] == record["eval_near_loss"] != record["eval_far_loss"] for record in metrics)

    # What was saved, in PEFT, one row at a time: the mean over the tokens of the whole file.
    reference = peft.PeftModel.from_pretrained(read_by_transformers(Path(run.config.model.name_or_path)),
                                               tmp_path / "run" / "adapter").eval()  # fmt: skip
    for name, dataset in run.data.evaluations.items():
        total, tokens = 0.0, 0
        for example in dataset.examples:
            ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels)[1:]
            with torch.no_grad():
                logits = reference(input_ids=ids).logits[0, :-1]
            total += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
            tokens += int((labels != -100).sum())
        assert metrics[-1][f"eval_{name}_loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_evaluation_does_not_change_the_training(config, tmp_path, inputs):
    train(config("without"))
    train(config("with", data__eval=str(inputs[1]), training__eval_steps=1))
    assert adapter_bytes(tmp_path / "with") == adapter_bytes(tmp_path / "without")
    for one, other in zip(read_metrics(tmp_path / "with"), read_metrics(tmp_path / "without"), strict=True):
        assert comparable(one) == comparable(other) | {"eval_loss": one["eval_loss"]}


def test_without_eval_steps_a_run_is_evaluated_at_its_end(config, tmp_path):
    run = train(config(data__eval=0.2))
    metrics = read_metrics(tmp_path / "run")
    assert ["eval_loss" in record for record in metrics] == [False] * 5 + [True]
    assert len(run.data.evaluations["eval"].examples) == 6
    assert len(run.data.train.examples) == 24


# ------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(("limit", "kept"), [(1, [6]), (2, [4, 6]), (None, [2, 4, 6])])
def test_only_the_newest_checkpoints_are_kept(config, tmp_path, limit, kept):
    train(config(training__save_steps=2, training__save_total_limit=limit))
    folders = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name for path in folders] == [f"step-{step:06d}" for step in kept]
    for path in folders:
        names = {"adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
        assert {file.name for file in path.iterdir()} == names


class DiskFullAt:
    """Lets the kernel refuse what is written to files of a name, from the `count`-th one on: they are /dev/full.
    safetensors puts a new file in a name's place, a device's too; its error on a full disk is raised in its stead."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, count: int):
        self.name, self.count = name, count
        self.open, self.save = Path.open, tensors.save_file
        monkeypatch.setattr(Path, "open", lambda path, *arguments, **options: self(path, *arguments, **options))
        monkeypatch.setattr(tensors, "save_file", self.save_file)

    def __call__(self, path: Path, mode: str = "r", *arguments, **options):
        if mode[0] in "wa" and self.refuses(path):
            path.touch()
            return self.open(Path("/dev/full"), mode, *arguments, **options)
        return self.open(path, mode, *arguments, **options)

    def save_file(self, named, path: Path, metadata):
        if self.refuses(path):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        self.save(named, path, metadata)

    def refuses(self, path: Path) -> bool:
        self.count -= path.name == self.name
        return path.name == self.name and self.count <= 0


full_device = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")


@full_device
@pytest.mark.parametrize("name", ["optimizer.safetensors", "adapter.safetensors"])
def test_a_disk_that_fills_up_while_a_checkpoint_is_saved(config, tmp_path, monkeypatch, name):
    DiskFullAt(monkeypatch, name, 2)
    with pytest.raises(MachineError) as error:
        train(config(training__save_steps=2))
    folder = tmp_path / "run"
    (line,) = error.value.lines
    assert line.startswith(f"no space left for {folder / 'checkpoints' / 'step-000004'}: ")
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000002"]
    assert not partial_files(folder)
    assert not (folder / "adapter").exists()
    monkeypatch.undo()
    train(config(training__save_steps=2))  # with space again it goes on
    train(config("whole", training__save_steps=2))
    assert adapter_bytes(folder) == adapter_bytes(tmp_path / "whole")


@full_device
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "metrics.jsonl"])
def test_a_disk_that_fills_up_while_anything_else_is_written(config, tmp_path, monkeypatch, name):
    DiskFullAt(monkeypatch, name, 1)
    with pytest.raises(MachineError) as error:
        train(config())
    assert "no space left" in error.value.lines[0]
    assert not partial_files(tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_folder_that_cannot_be_renamed_leaves_the_earlier_ones(config, tmp_path, monkeypatch):
    def refuse(source, target, *, replace=os.replace):
        if Path(target).name == "step-000004":
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        replace(source, target)

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(MachineError, match="no space left"):
        train(config(training__save_steps=2))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]


# ------------------------------------------------------------------------------------------------- where a run stops


def test_a_broken_generation_config_is_told_before_training_and_not_at_the_export(config, inputs, tmp_path):
    base = shutil.copytree(inputs[0], tmp_path / "base")
    (base / "generation_config.json").write_text('{"eos_token_id": 2,')
    with pytest.raises(UserError, match=r"base/generation_config\.json: not JSON"):
        train(config(model__name_or_path=str(base)))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_loss_that_is_no_number_stops_the_run(config, tmp_path, inputs):
    with pytest.raises(MachineError) as error:
        train(config(training__learning_rate=1e30, training__warmup_steps=0, training__save_steps=1))
    assert error.value.exit_code == 1
    (line,) = error.value.lines
    assert line.startswith("step 2: the loss is nan, on rows ")
    assert line.count(f"{inputs[1]}, line ") == 4
    assert f"the last good checkpoint is {tmp_path / 'run' / 'checkpoints' / 'step-000001'};" in line
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [1]
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize(("dtype", "cure"), [("float32", False), ("float16", True)])
def test_a_broken_weight_stops_the_run_before_its_first_step(config, tmp_path, monkeypatch, dtype, cure):
    """No learning rate is at fault, as nothing has been trained."""

    def broken(setup, *arguments, build=Setup.build, **named):
        built = build(setup, *arguments, **named)
        built.model.module.model.norm.weight.data[3] = float("nan")
        return built

    monkeypatch.setattr(Setup, "build", broken)
    with pytest.raises(MachineError, match="before the first step the loss is nan, so the base model itself") as error:
        train(config(model__compute_dtype=dtype))
    assert "learning_rate" not in str(error.value) and ("model.compute_dtype: float32" in str(error.value)) == cure
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(("dtype", "steps"), [("float32", 2), ("float16", 17)])
def test_gradients_that_are_no_numbers_stop_the_run(config, tmp_path, monkeypatch, dtype, steps):
    """At once; in fp16 when the loss scale, halved at every such step, has come from 65536 down to 1."""

    def broken(model, optimizer, batches, settings, rate, *_):
        for parameter in optimizer.parameters:
            parameter.grad = torch.full_like(parameter, float("inf") if calls else 0.0)
        calls.append(rate)
        return StepResult(torch.tensor(1.0), optimizer.step(rate, settings.max_grad_norm))

    calls: list[float] = []
    monkeypatch.setattr(loop, "train_step", broken)
    with pytest.raises(MachineError, match=rf"step {steps}: the norm of the gradients is (inf|nan), on rows"):
        train(config(model__compute_dtype=dtype, training__max_steps=40, training__save_steps=1))
    metrics = read_metrics(tmp_path / "run")
    assert len(metrics) == steps - 1
    assert all(record["grad_norm"] is None for record in metrics[1:])  # JSON has no infinity
    saved = load_file(tmp_path / "run" / "checkpoints" / f"step-{steps - 1:06d}" / "adapter.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())


@pytest.mark.parametrize(
    ("bad", "settings", "taken"),
    [
        (4, {}, 5),  # one step late
        (4, {"training__save_steps": 4}, 4),
        (4, {"training__logging_steps": 2}, 4),
        (4, {"training__eval_steps": 4}, 4),
        (6, {}, 6),  # the last
    ],
)
def test_nothing_is_written_of_a_loss_that_is_no_number(config, tmp_path, monkeypatch, inputs, bad, settings, taken):
    """The loss is read when the next step has been launched, or what is written or saved depends on it."""

    def step(model, optimizer, batches, settings, rate, *_):
        calls.append(rate)
        for parameter in optimizer.parameters:
            parameter.grad = torch.zeros_like(parameter)
        loss = torch.tensor(float("nan") if len(calls) == bad else 1.0)
        return StepResult(loss, optimizer.step(rate, settings.max_grad_norm))

    calls: list[float] = []
    monkeypatch.setattr(loop, "train_step", step)
    quiet = {"training__logging_steps": 100, "training__save_steps": 3} | settings
    with pytest.raises(MachineError, match=rf"step {bad}: the loss is nan, on rows"):
        train(config(training__max_steps=6, data__eval=str(inputs[1]), **quiet))
    assert len(calls) == taken
    saved = {path.name for path in (tmp_path / "run" / "checkpoints").glob("*")}
    assert saved == (set() if settings.get("training__save_steps") else {"step-000003"})
    assert not (tmp_path / "run" / "adapter").exists()
    written = tmp_path / "run" / "metrics.jsonl"
    assert not written.exists() or all(record["step"] < bad for record in read_metrics(tmp_path / "run"))


@pytest.mark.cuda
def test_numbers_on_their_way_are_not_waited_for():
    loss = torch.tensor(3.25, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        late = LateNumbers()
        late.add(1, loss, loss * 2, 7, 1.0, ["a", "b"])
        late.add(2, loss + 1, loss, 8, 1.0, ["c"])
        loss.add_(100)  # after the copy
        (found,) = late.read(leave=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found == StepNumbers(1, 3.25, 6.5, 7, 1.0, ["a", "b"])
    assert [numbers.loss for numbers in late.read()] == [4.25]


@pytest.mark.parametrize("scaled", [False, True])
def test_rows_longer_than_the_models_positions(config, tmp_path, inputs, scaled):
    model = tmp_path / "model"
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    write_model(model, max_position_embeddings=64, **({"rope_parameters": rope} if scaled else {}))
    changed = config(model__name_or_path=str(model))
    if scaled:
        assert train(changed).progress.step == 6
        return
    with pytest.raises(UserError) as error:
        train(changed)
    (line,) = error.value.lines
    assert line.startswith("data.max_length: 128, but the model's max_position_embeddings is 64;")
    assert not (tmp_path / "run").exists()


def test_without_a_terminal_a_line_is_printed_for_every_record(config, tmp_path, capsys):
    train(config(training__logging_steps=3, data__eval=0.2))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    loss = [record["loss"] for record in read_metrics(tmp_path / "run")]
    assert len(lines) == 3
    assert lines[0].startswith(f"step 3/6  loss {loss[0]:.4f}  lr ")
    assert lines[1].startswith("step 6: eval loss ")
    assert lines[2].startswith(f"step 6/6  loss {loss[1]:.4f}  lr ")
    assert lines[2].endswith("GiB  0:00 left")


def test_in_a_terminal_one_line_is_redrawn(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as which rich takes what pytest captures for a terminal
    monkeypatch.setenv("COLUMNS", "120")
    train(config(data__eval=0.2))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    last = read_metrics(tmp_path / "run")[-1]
    assert f"loss {last['loss']:.4f}" in shown
    assert "6/6" in shown
    assert f"step 6: eval loss {last['eval_loss']:.4f} over " in shown


def test_a_tokenizer_that_is_not_the_models(config, tmp_path):
    model = tmp_path / "model"
    write_model(model)
    smaller = write_model(tmp_path / "smaller", vocab_size=131)
    for file in model.glob("tokenizer*"):
        (smaller / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="but the model's vocabulary has 131 tokens; use the tokenizer files"):
        train(config(model__name_or_path=str(smaller)))


def test_a_token_that_the_model_does_not_know_in_an_evaluation_file(config, tmp_path, inputs):
    model = tmp_path / "model"
    write_model(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(model)
    evaluation = tmp_path / "eval.jsonl"
    evaluation.write_text(json.dumps({"prompt": "a", "completion": "<new>"}))
    with pytest.raises(
        UserError,
        match=f"gives token {len(tokenizer) - 1}, but the model's vocabulary has {len(tokenizer) - 1} tokens;",
    ):
        train(config(model__name_or_path=str(model), data__eval=str(evaluation)))


def test_an_output_folder_that_is_a_file(config, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match=r"training\.output_dir: .*run is a file"):
        train(config())
    assert (tmp_path / "run").read_text() == "mine"


# ------------------------------------------------------------------------------------- starting from another adapter


@pytest.fixture
def start(inputs, tmp_path):
    """An adapter of PEFT's: its own rank, scale and places."""
    settings = {"r": 6, "lora_alpha": 5, "use_rslora": True, "rank_pattern": {"v_proj": 3}}
    return write_peft_adapter(tmp_path / "start", inputs[0], target_modules=["q_proj", "v_proj"], **settings)


def test_a_run_that_starts_from_an_adapter_goes_on_with_its_kind(inputs, tmp_path, start):
    values = {"adapter.init_from": str(start), "training.learning_rate": 1e-30, "model.quantization": "none"}
    config = run_config(*inputs, tmp_path / "run", values)
    run = train(config.model_copy(update={"adapter": type(config.adapter)(init_from=str(start), lora_dropout=0.2)}))
    assert (run.config.adapter.r, run.config.adapter.lora_alpha, run.config.adapter.use_rslora) == (6, 5, True)
    assert {layer.settings.dropout for layer in run.adapters.layers.values()} == {0.2}
    saved = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["use_rslora"]) == (6, 5, True)
    # Nothing was learnt at that rate: PEFT reads what it wrote, and it works as before.
    ids = torch.tensor([[5, 17, 99, 3, 42]])
    logits = [
        peft.PeftModel.from_pretrained(read_by_transformers(inputs[0]), folder).eval()(input_ids=ids).logits
        for folder in (start, tmp_path / "run" / "adapter")
    ]
    assert float((logits[0] - logits[1]).abs().max()) < 1e-5
    train(load_config(str(tmp_path / "run" / "config.yaml"), [f"training.output_dir={tmp_path / 'again'}"]))
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(tmp_path / "run")


@pytest.mark.parametrize("dry_run", [True, False])
def test_an_adapter_of_another_base_is_told(inputs, tmp_path, caplog, dry_run):
    train(run_config(*inputs, tmp_path / "first", {"training.max_steps": 1}))
    other = shutil.copytree(inputs[0], tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: weight + 0.01 for name, weight in weights.items()}, other / "model.safetensors", {"format": "pt"})
    for base, told in ((inputs[0], 0), (other, 1)):
        caplog.clear()
        values = {"adapter.init_from": str(tmp_path / "first" / "adapter"), "training.max_steps": 1}
        config = run_config(base, inputs[1], tmp_path / f"from-{base.name}", values)
        train(config.model_copy(update={"adapter": type(config.adapter)(init_from=config.adapter.init_from)}),
              dry_run=dry_run)  # fmt: skip
        lines = [line for line in caplog.messages if "it starts on another base than its own" in line]
        assert len(lines) == told
        assert all(line.startswith(f"adapter.init_from: {other}: model.safetensors not as when ") for line in lines)


def test_what_is_recomputed_is_chosen_for_a_run_that_starts_from_an_adapter(inputs, tmp_path):
    """The choice looks at models of few layers, on which an adapter to all layers has no place."""
    model = write_model(tmp_path / "deep", num_hidden_layers=6)
    start = write_peft_adapter(tmp_path / "start", model, target_modules=["q_proj", "v_proj"], r=6, lora_alpha=5)
    values = {"adapter.init_from": str(start), "training.gradient_checkpointing": "auto", "training.max_memory": "1GB"}
    config = run_config(model, inputs[1], tmp_path / "run", values)
    run = train(config.model_copy(update={"adapter": type(config.adapter)(init_from=str(start))}), watcher=RunMemory())
    assert run.model.recomputation is not None and len(run.model.recomputation.layers) == 6


def test_a_configuration_that_contradicts_the_adapter_to_start_from(inputs, tmp_path, start):
    values = {"adapter.init_from": str(start), "adapter.method": "dora", "adapter.lora_alpha": 32}
    with pytest.raises(UserError) as error:
        train(run_config(*inputs, tmp_path / "run", values))
    assert [line.partition(",")[0] for line in error.value.lines] == [
        "adapter.method: dora", "adapter.r: 4", "adapter.lora_alpha: 32"
    ]  # fmt: skip
    values = {"adapter.init_from": str(start), "adapter.r": 6, "adapter.target_modules": ["q_proj", "k_proj"]}
    with pytest.raises(UserError) as error:
        train(run_config(*inputs, tmp_path / "run", values))
    assert error.value.lines[0].startswith("adapter.target_modules: model.layers.0.self_attn.k_proj is among them, but")
    assert not (tmp_path / "run").exists()
