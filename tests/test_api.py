"""The functions under the command line: a whole program, what they take, what they refuse, what they do not import."""

from __future__ import annotations

import doctest
import inspect
import json
import logging
import os
import pkgutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from cached_traces import once
from child_process import child_environment
from click.testing import CliRunner
from safetensors.torch import load_file
from tiny_runs import read_metrics, write_model, write_rows

import qlora_tool
from qlora_tool import (
    Config,
    EvaluateResult,
    ExportResult,
    GenerateResult,
    Interrupted,
    MachineError,
    MemoryProfile,
    TrainResult,
    UserError,
    api,
    evaluate,
    export_merged,
    generate,
    profile_memory,
    train,
)
from qlora_tool.cli import main
from qlora_tool.config import load_config, with_values
from qlora_tool.memory import profile

CPU = {"device": "cpu", "compute_dtype": "float32"}
CALLBACKS = {"on_profile", "on_written", "on_text", "on_answer"}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The sections of a tiny run, its model and its data."""
    folder = tmp_path_factory.mktemp("inputs")
    model = write_model(folder / "model")
    return {
        "model": {"name_or_path": model, "compute_dtype": "float32", "device": "cpu"},
        "adapter": {"r": 4},
        "data": {
            "train": write_rows(folder / "rows.jsonl"),
            "eval": {"new": write_rows(folder / "eval.jsonl", 6, 100), "old": folder / "rows.jsonl"},
            "max_length": 128,
        },
        "training": {"output_dir": folder / "run", "max_steps": 3, "per_device_train_batch_size": 2},
    }


@pytest.fixture(scope="module")
def trained(settings: dict[str, Any]) -> TrainResult:
    return train(settings)


# ------------------------------------------------------------------------------------------------ a whole program


def test_every_example_runs(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Functions in the order of the module, then classes, in one folder, as someone would who reads them all."""
    monkeypatch.chdir(tmp_path)
    rows = write_rows(tmp_path / "rows.jsonl")
    values = {**settings, "data": {"train": str(rows), "max_length": 64}, "training": {"output_dir": "a-run"}}
    values["model"] = {**settings["model"], "name_or_path": str(settings["model"]["name_or_path"])}
    Path("my-run.yaml").write_text(yaml.safe_dump(values))
    public = {name: getattr(qlora_tool, name) for name in qlora_tool.__all__ if name != "__version__"}
    functions = {name: one for name, one in public.items() if inspect.isfunction(one)}
    order = sorted(functions, key=lambda name: functions[name].__code__.co_firstlineno)
    classes = [name for name, one in public.items() if inspect.isclass(one)]
    assert len(order) == 8 and len(order) + len(classes) == len(public)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    for name in order + classes:
        (found,) = doctest.DocTestFinder(recurse=False).find(public[name], name, globs={})
        assert found.examples, f"{name} has no example"
        runner = doctest.DocTestRunner(optionflags=flags)
        told: list[str] = []
        assert runner.run(found, out=told.append).failed == 0, "".join(told)


def test_no_public_name_is_also_a_modules():
    """Else `from qlora_tool import name` would give the module, once that has been imported."""
    modules = {module.name for module in pkgutil.iter_modules(qlora_tool.__path__)}
    assert {"api", "training"} <= modules and set(qlora_tool.__all__).isdisjoint(modules)


def test_ten_lines_train_predict_export_and_generate(settings: dict[str, Any], tmp_path: Path):
    trained = train(settings, set={"training.max_steps": 4}, output_dir=tmp_path / "run")
    predicted = profile_memory(trained.config, device="cpu")
    exported = export_merged(trained.folder, tmp_path / "merged", dtype="float32")
    said = generate(exported.folder, prompt=["How many are 3 and 4?", "And 5?"], max_new_tokens=5, compare_base=True)
    scored = evaluate(trained.folder, data=settings["data"]["eval"], **CPU)

    assert isinstance(trained, TrainResult)
    records = read_metrics(tmp_path / "run")
    assert (trained.folder, trained.adapter) == (tmp_path / "run", tmp_path / "run" / "adapter")
    assert (trained.steps, trained.total_steps, trained.finished) == (4, 4, True)
    assert (trained.loss, records[-1]["step"]) == (records[-1]["loss"], 4)
    assert (trained.adapter / "adapter_model.safetensors").exists()
    assert trained.config == load_config(trained.folder / "config.yaml")

    assert isinstance(predicted, MemoryProfile)
    assert sum(predicted.predicted.at_peak.values()) == predicted.predicted.peak_bytes > 0
    assert (predicted.measured, predicted.fits, predicted.plan) == (None, None, None)

    assert isinstance(exported, ExportResult)
    tensors = load_file(exported.folder / exported.files[0])
    assert exported.bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert (exported.dtype, exported.format, exported.base) == ("float32", "safetensors", "dequantized")
    assert exported.proof is not None and exported.proof.agreement is not None and exported.not_verified is None

    assert isinstance(said, GenerateResult)
    assert [answer.prompt for answer in said.answers] == ["How many are 3 and 4?", "And 5?"]
    assert said.base_effort is not None
    for effort in (said.effort, said.base_effort):
        assert 0 < effort.tokens <= 10 and effort.seconds > 0 and effort.peak_bytes > 10_000_000
    alone = generate(trained.folder, prompt="And 5?", max_new_tokens=5, **CPU)
    assert [(answer.text, answer.base_text) for answer in alone.answers] == [(said.answers[1].text, None)]
    base = generate(settings["model"]["name_or_path"], prompt="And 5?", max_new_tokens=5, quantization="nf4", **CPU)
    assert said.answers[1].base_text == base.answers[0].text

    assert isinstance(scored, EvaluateResult)
    for name, loss in trained.eval_losses.items():  # by the model that was trained, and by the one that was read
        assert scored.scores[name].loss == pytest.approx(loss, rel=1e-5)
    assert list(trained.eval_losses) == list(scored.scores) == ["new", "old"]
    assert scored.scores["new"].exact_match is None


def test_memory_is_predicted_and_measured_without_the_command_line(trained: TrainResult):
    """The command line used to put this in."""
    memory = json.loads((trained.folder / "memory.json").read_text())
    predicted, measured = memory["predicted"], memory["measured"]  # of the largest batch, and of the second step's
    for part in ("base_weights", "quantization_state", "adapter_weights", "optimizer_state"):
        assert predicted["at_peak"][part] == measured["at_peak"][part] > 0
    assert measured["peak_bytes"] <= predicted["peak_bytes"] < 1.2 * measured["peak_bytes"]


def test_a_dry_run_writes_nothing(settings: dict[str, Any], tmp_path: Path):
    result = train(settings, output_dir=tmp_path / "run", dry_run=True)
    assert (result.finished, result.steps, result.total_steps, result.loss) == (False, 0, 3, None)
    assert not list(tmp_path.iterdir())


def test_one_evaluation_set_is_called_eval(settings: dict[str, Any], tmp_path: Path):
    changes = {"data.eval": settings["data"]["eval"]["new"], "training.max_steps": 1}
    result = train(settings, set=changes, output_dir=tmp_path / "run")
    assert result.eval_losses == {"eval": read_metrics(tmp_path / "run")[-1]["eval_loss"]}


def test_files_are_written_as_the_commands_write_them(trained: TrainResult, settings: dict[str, Any], tmp_path: Path):
    result = evaluate(trained.folder, settings["data"]["train"], json=tmp_path / "scores.json", **CPU)
    assert json.loads((tmp_path / "scores.json").read_text()) == result.as_json() == result.scores["rows"].as_json()
    exported = export_merged(trained.folder, tmp_path / "adapter", format="adapter", json=tmp_path / "done.json")
    assert json.loads((tmp_path / "done.json").read_text()) == exported.facts
    assert exported.proof is None and "nothing was merged" in (exported.not_verified or "")
    plot = tmp_path / "step.html"
    profiled = profile_memory(trained.config, device="cpu", json=tmp_path / "memory.json", plot=plot)
    written = json.loads((tmp_path / "memory.json").read_text())
    assert written == profiled.to_json() and written.items() >= profiled.report.to_json().items()
    assert plot.read_text(encoding="utf-8").lower().startswith("<!doctype html>")


def test_a_result_replaces_its_like_and_nothing_that_a_command_reads(
    trained: TrainResult, settings: dict[str, Any], tmp_path: Path
):
    rows, model = Path(settings["data"]["train"]), Path(settings["model"]["name_or_path"])
    config, adapter = trained.folder / "config.yaml", trained.adapter
    set_rows = {"data.eval": None}
    calls = {
        "answers.jsonl": lambda file: generate(trained.folder, prompts=rows, max_new_tokens=1, json=file, **CPU),
        "scores.json": lambda file: evaluate(trained.folder, {"a": rows, "b": rows}, json=file, **CPU),
        "preview.json": lambda file: api.preview(config, set=set_rows, json=file),
        "memory.json": lambda file: profile_memory(config, device="cpu", json=file),
        "memory.html": lambda file: profile_memory(config, device="cpu", plot=file),
        "memory.png": lambda file: profile_memory(config, device="cpu", plot=file),
        "updates.json": lambda file: api.inspect(trained.folder, json=file),
        "updates.png": lambda file: api.inspect(trained.folder, plot=file),
        "done.json": lambda file: export_merged(trained.folder, tmp_path / "out", format="adapter", overwrite=True,
                                                json=file),
        "report.html": lambda file: api.report(trained.folder, output=file),
    }  # fmt: skip
    inputs = [rows, config, model / "config.json", model / "model.safetensors", adapter / "adapter_model.safetensors",
              adapter / "adapter_config.json", trained.folder / "memory.json", trained.folder / "metrics.jsonl"]
    before = {file: file.read_bytes() for file in inputs}
    for name, call in calls.items():
        for _ in range(2):
            call(tmp_path / name)
        for file in inputs:
            link = tmp_path / f"link{Path(name).suffix}"  # of a name that a plot takes
            link.unlink(missing_ok=True)
            link.symlink_to(file)
            with pytest.raises(UserError, match="name another"):
                call(link)
    assert {file: file.read_bytes() for file in inputs} == before
    assert api.report(trained.folder, output=trained.folder / "report.html").file == trained.folder / "report.html"


def test_what_fits_into_a_budget(trained: TrainResult, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(profile, "predict_deep", once(profile.predict_deep))
    needed = profile_memory(trained.config, device="cpu").predicted.needed_bytes
    assert profile_memory(trained.config, device="cpu", device_memory=needed).fits is True
    assert profile_memory(trained.config, device="cpu", device_memory=f"{needed - 1}B").fits is False
    seen = []
    with pytest.raises(UserError, match=r"--device-memory: the limit is .* but the base's weights"):
        profile_memory(trained.config, device="cpu", device_memory=1000, on_profile=seen.append)
    assert not seen


# --------------------------------------------------------------------------------------------- what they take


def test_a_configuration_in_every_form_is_the_same(settings: dict[str, Any], tmp_path: Path):
    plain = yaml.safe_load(json.dumps(settings, default=str))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(plain))
    expected = load_config(str(tmp_path / "run.yaml"), ["training.max_steps=7"])
    typed = Config(**{name: section for name, section in plain.items()})
    for source in (tmp_path / "run.yaml", settings, plain, typed):
        for overrides in (["training.max_steps=7"], "training.max_steps=7", {"training.max_steps": 7}):
            assert load_config(source, overrides) == expected
    assert load_config({"model": typed.model, "data": plain["data"]}).model == typed.model
    assert load_config({"adapter": {"use_dora": True}}).adapter.method == "dora"
    assert with_values(load_config(typed), {}).training.model_fields_set == typed.training.model_fields_set


def test_a_recipe_by_its_name(settings: dict[str, Any], tmp_path: Path):
    changes = {f"{section}.{key}": settings[section][key] for section, key in
               [("model", "name_or_path"), ("model", "device"), ("data", "train"), ("data", "max_length")]}  # fmt: skip
    result = train("demo", set=changes | {"data.eval": None}, output_dir=tmp_path / "run", dry_run=True)
    assert result.config.adapter == load_config("demo").adapter


def test_faults_of_a_mapping_are_reported_together():
    with pytest.raises(UserError) as caught:
        train({"adapter": {"r": 0}, "modle": {}}, set={"training.max_steps": "many"})
    assert [line.split(": expected")[0].split("; did")[0] for line in caught.value.lines] == [
        "configuration: modle: unknown key", "configuration: adapter.r", "--set training.max_steps",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["train", "preview", "profile-memory", "export-merged", "generate", "evaluate",
                                  "inspect"])  # fmt: skip
def test_a_function_takes_what_its_command_takes(name: str):
    """By the same names, with the same defaults."""
    command = main.get_command(click.Context(main), name)
    taken = inspect.signature(getattr(api, name.replace("-", "_"))).parameters
    given = command.make_context(name, [], resilient_parsing=True).params  # defaults alone
    assert given.keys() == taken.keys() - CALLBACKS
    for parameter in command.params:
        if parameter.required:
            assert taken[parameter.name].default is inspect.Parameter.empty
        elif parameter.name in given:
            assert taken[parameter.name].default == given[parameter.name], parameter.name
        if isinstance(parameter, click.Option):
            assert f"--{parameter.name.replace('_', '-')}" in parameter.opts


# ------------------------------------------------------------------------------------------- what they refuse


REFUSED = {
    "generate nothing": (lambda run: generate(run), ["generate", "RUN"]),
    "top_p without sampling": (
        lambda run: generate(run, prompt="a", top_p=0.9), ["generate", "RUN", "--prompt", "a", "--top-p", "0.9"],
    ),
    "a plan for nothing": (
        lambda run: profile_memory(f"{run}/config.yaml", plan=True, device_memory="-1GB"),
        ["profile-memory", "RUN/config.yaml", "--plan", "--device-memory=-1GB"],
    ),
    "a folder that holds the run": (
        lambda run: train(f"{run}/config.yaml", resume="never"), ["train", "RUN/config.yaml", "--resume", "never"],
    ),
    "no such data": (
        lambda run: evaluate(run, "gone.jsonl", **CPU), ["evaluate", "RUN", "--data", "gone.jsonl"],
    ),
    "two sets of one name": (
        lambda run: evaluate(run, ["a.jsonl", "b/a.jsonl"]),
        ["evaluate", "RUN", "--data", "a.jsonl", "--data", "b/a.jsonl"],
    ),
    "a size that is none": (
        lambda run: export_merged(run, "out", max_shard_size="big"),
        ["export-merged", "RUN", "--output-dir", "out", "--max-shard-size", "big"],
    ),
    "a folder that is taken": (
        lambda run: export_merged(run, run), ["export-merged", "RUN", "--output-dir", "RUN"],
    ),
    "a dtype beside a format's own": (
        lambda run: export_merged(run, "out", format="gguf", dtype="float16"),
        ["export-merged", "RUN", "--output-dir", "out", "--format", "gguf", "--dtype", "float16"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_command_ends_with_is_what_a_function_raises(
    trained: TrainResult, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_log: None
):
    monkeypatch.chdir(tmp_path)
    call, words = REFUSED[name]
    with pytest.raises(UserError) as caught:
        call(trained.folder)
    result = CliRunner().invoke(main, [word.replace("RUN", str(trained.folder)) for word in words])
    assert result.exit_code == 2
    usage = f" (in 'qlora-tool {words[0]}'; see 'qlora-tool {words[0]} --help')"
    assert [line.removesuffix(usage) for line in result.stderr.splitlines() if line.startswith("error: ")] == [
        f"error: {line}" for line in caught.value.lines
    ]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda run: generate(run, prompt="a", device="gpu"), "model.device: expected one of auto, cuda, cpu,"),
        (lambda run: generate(run, prompt="a", quantization="nf5"), "model.quantization: expected one of nf4,"),
        (lambda run: generate(run, prompt="a", max_new_tokens=0), "--max-new-tokens: expected at least 1, found 0"),
        (lambda run: generate(run, prompt="a", top_p=2.0), "--top-p: expected a number from 0 to 1, found 2.0"),
        (lambda run: evaluate(run, "rows.jsonl", format="alpacca"), "did you mean 'alpaca'?"),
        (lambda run: evaluate(run, {}), "nothing to score"),
        (lambda run: export_merged(run, "out", format="ggfu"), "--format: expected one of safetensors, gguf, "),
        (lambda run: export_merged(run, "out", dtype="bf16"), "--dtype: expected one of auto, bfloat16, "),
        (lambda run: export_merged(run, "out", gguf_type="q9"), "--gguf-type: expected one of auto, f16, bf16, "),
        (lambda run: profile_memory(f"{run}/config.yaml", device="tpu"), "--device: expected cuda or cpu, found 'tpu'"),
    ],
)  # fmt: skip
def test_values_that_the_command_line_knows_to_refuse(trained: TrainResult, call: Any, line: str):
    with pytest.raises(UserError) as caught:
        call(trained.folder)
    assert line in caught.value.lines[0]


def test_the_machines_faults_are_its_own(tmp_path: Path):
    with pytest.raises(MachineError, match="the model hub is out of reach"):
        generate("owner/name", prompt="a")


# ------------------------------------------------------------------------------------------- how they are stopped


class Signals(logging.Handler):
    """Sends a signal once the log says that a step is traced: in the middle of a run's second step."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number

    def emit(self, record: logging.LogRecord) -> None:
        if "this step is traced" in record.getMessage():
            signal.raise_signal(self.number)


@pytest.fixture
def own_log() -> Iterator[None]:
    """Undo what a command sets for its process."""
    logger, environment = logging.getLogger("qlora_tool"), dict(os.environ)
    before = logger.handlers[:], logger.propagate, logger.level
    yield
    logger.handlers, logger.propagate = before[:2]
    logger.setLevel(before[2])
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_raises_and_the_command_has_its_exit_code(
    settings: dict[str, Any], tmp_path: Path, number: int, code: int, own_log: None
):
    log = logging.getLogger("qlora_tool.memory.run_report")
    handler, level = Signals(number), log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        with pytest.raises(Interrupted) as caught:
            train(settings, output_dir=tmp_path / "run")
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(yaml.safe_load(json.dumps(settings, default=str))))
        words = ["train", tmp_path / "run.yaml", "--output-dir", tmp_path / "again"]
        result = CliRunner().invoke(main, [str(word) for word in words])
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    saved = tmp_path / "run" / "checkpoints" / "step-000002"
    assert (caught.value.signal_number, caught.value.exit_code) == (number, code)
    assert caught.value.lines[0] == f"stopped after step 2 of 3; saved {saved}" and saved.is_dir()
    assert result.exit_code == code
    assert result.stderr.splitlines()[-2:] == [line.replace("/run", "/again") for line in caught.value.lines]
    assert train(settings, output_dir=tmp_path / "run").steps == 3  # goes on from there


# ---------------------------------------------------------------------------------------- what is not imported


def test_operations_import_no_compiler():
    """bitsandbytes lets torch compile two of its own as it is imported: 0.6 s of every start."""
    code = (
        "import os, sys\n"
        "import qlora_tool.ops\n"
        "assert 'bitsandbytes' in sys.modules and 'TORCHDYNAMO_DISABLE' not in os.environ\n"
        "assert 'torch._inductor.compile_fx' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=child_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys\n"
        "import qlora_tool\n"
        "light = {'qlora_tool', 'qlora_tool._version', 'qlora_tool.errors'}\n"
        "own = {name for name in sys.modules if name.partition('.')[0] == 'qlora_tool'}\n"
        "assert own == light, own\n"
        "assert 'pydantic' not in sys.modules\n"
        "assert set(qlora_tool.__all__) <= set(dir(qlora_tool))\n"
        "from qlora_tool import Config, Interrupted, evaluate, export_merged, generate, profile_memory, train\n"
        "heavy = {'torch', 'transformers', 'numpy', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "try: train({'adapter': {'r': 0}})\n"
        "except qlora_tool.UserError: pass\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=child_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(getattr(qlora_tool, name) for name in qlora_tool.__all__)


def test_a_name_that_does_not_exist():
    with pytest.raises(AttributeError, match="module 'qlora_tool' has no attribute 'trian'"):
        qlora_tool.trian  # noqa: B018
