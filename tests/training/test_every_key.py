"""Every key of a configuration with every kind of value that it takes, through `qlora-tool train` with all that a user
has on: an evaluation set, checkpoints, the memory report.

Each run gives every key one of its values, so a dozen runs do. Values come from the keys' own schema: choices, booleans,
numbers at their bounds and typical ones. Texts, lists and mappings are given below; a key that has no values fails.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
import yaml
from accelerate.tracking import get_available_trackers
from click.testing import CliRunner
from tiny_adapters import write_peft_adapter
from tiny_runs import read_metrics, write_model
from tokenizers_for_tests import CHATML

from qlora_tool.cli import main
from qlora_tool.config import SECTIONS, Config, choices, with_values
from qlora_tool.config.schema import choices_of, options_of, schemas_of
from qlora_tool.errors import UserError
from qlora_tool.ops.products import PYTORCH, use_products

KEYS = [f"{section}.{key}" for section, keys in SECTIONS.items() for key in keys.model_fields]
DEFAULTS = {f"{section}.{key}": field.get_default(call_default_factory=True)
            for section, keys in SECTIONS.items() for key, field in keys.model_fields.items()}  # fmt: skip

FORMATS = ("messages", "sharegpt", "alpaca", "dolly", "prompt_completion", "text")

# Files have their names in the folder that runs are started in; EVAL is one of the format of the training data.
EVAL = "eval.jsonl"
TEXTS: dict[str, list[Any]] = {
    "model.name_or_path": ["base"],
    "model.revision": [None, "main"],
    "adapter.target_modules": ["all-linear", ["q_proj", "down_proj"], r".*\.(q|v|up)_proj"],
    "adapter.exclude_modules": [[], ["k_proj"], r".*layers\.1\.mlp.*"],
    "adapter.modules_to_save": [[], ["lm_head"], ["norm", "layers.0.self_attn.o_proj"]],
    "adapter.rank_pattern": [{}, {"q_proj": 2, r"layers\.0\..*": 8}],
    "adapter.alpha_pattern": [{}, {"down_proj": 4.5}],
    "adapter.init_from": [None, "start"],
    "data.train": [f"{name}.jsonl" for name in FORMATS] + [f"alpaca.{end}" for end in ("json", "csv", "parquet")]
    + ["text.txt", "prompt_completion"],
    "data.eval": [0.2, None, EVAL, {"one": EVAL, "other": EVAL}],
    "data.chat_template": [None, "chat.jinja"],
    "training.output_dir": ["run"],
    "training.max_memory": [None, "2GB", 1_500_000_000],
    "training.report_to": [[], "none"],  # what is installed, or not, has a test of its own
}  # fmt: skip
TYPICAL: dict[str, list[float]] = {
    "adapter.r": [64],  # large enough for moments in 8 bits
    "adapter.lora_alpha": [32], "adapter.lora_dropout": [0.1], "adapter.loraplus_lr_ratio": [16],
    "data.max_length": [96], "training.num_train_epochs": [1], "training.max_steps": [2],
    "training.per_device_train_batch_size": [3], "training.gradient_accumulation_steps": [2],
    "training.learning_rate": [2e-4], "training.warmup_steps": [0.03, 1], "training.weight_decay": [0.1],
    "training.max_grad_norm": [1.0], "training.label_smoothing_factor": [0.1], "training.seed": [7],
    "training.logging_steps": [2], "training.eval_steps": [2], "training.save_steps": [100],
    "training.save_total_limit": [2],
}  # fmt: skip
# With all that a user has on; where a key's values have all been seen.
USUAL = {"data.eval": 0.2, "training.eval_steps": 1, "training.save_steps": 1, "training.max_steps": 2,
         "data.max_length": 96, "training.per_device_train_batch_size": 3}  # fmt: skip
# What no run on this machine can go through: a test of its own says how each is refused.
REFUSED = [("model.device", "cuda"), ("data.max_length", 1)]
OMITTED = object()  # the key is left out
OF_THE_START = [key for key in KEYS if key.startswith("adapter.")
                and key not in ("adapter.init_from", "adapter.lora_dropout", "adapter.loraplus_lr_ratio")]  # fmt: skip


def values_of(key: str) -> list[Any]:
    """The values that a key goes through: of numbers typical ones first, then bounds."""
    if key in TEXTS:
        return TEXTS[key]
    section, _, name = key.partition(".")
    schema = schemas_of(SECTIONS[section])[name]
    if (choices := choices_of(schema)) is not None:
        return [value for value in choices if (key, value) not in REFUSED]
    found: list[Any] = []
    for option in options_of(schema):
        if "const" in option or option["type"] == "null":
            found.append(option.get("const"))
        else:
            assert option["type"] in ("integer", "number") and key in TYPICAL, f"{key} needs values here for {option}"
            found += TYPICAL[key]
            found.append(option.get("minimum", TYPICAL[key][0] / 1000))
            found += [option["exclusiveMaximum"] - 0.001] if "exclusiveMaximum" in option else []
    return [value for value in found if (key, value) not in REFUSED]


def with_company(key: str, value: Any) -> Run:
    """A value, with those of other keys that it cannot go without."""
    if key == "data.train":
        return {key: value} | ({"data.train_on": "all"} if value.startswith("text") else {})
    if key == "data.format" and value != "auto":
        return {key: value} | with_company("data.train", f"{value}.jsonl")
    if (key, value) == ("training.group_by_length", True):
        return {key: value, "data.packing": False}
    if (key, value) == ("training.optimizer_in_backward", True):
        return {key: value, "training.max_grad_norm": 0}
    return {key: value}


Run = dict[str, Any]
VALUES = {key: values_of(key) for key in KEYS}
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
    name = file.partition(".")[0]
    return (
        form not in ("auto", name)
        or (name == "text" and run.get("data.train_on", "completion") == "completion")
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


def written(folder: Path, run: Run) -> Path:
    """The run's configuration as a file."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in run.items():
        section, _, name = key.partition(".")
        if value is not OMITTED:
            sections.setdefault(section, {})[name] = value
    form = run["data.train"].partition(".")[0]
    text = yaml.safe_dump(sections).replace(EVAL, f"eval-{form}.jsonl")
    (folder / "run.yaml").write_text(text)
    return folder / "run.yaml"


# -------------------------------------------------------------------------------------------------------------- inputs


def rows(name: str, first: int, count: int) -> list[dict[str, Any]]:
    """Rows of a format with as many tokens each, no two alike: numbers of one digit are one token."""
    made = []
    for index in range(first, first + count):
        ask, answer = f"{index // 10 % 10} {index % 10} {index // 100}", f"Paris {index % 10} {index // 10 % 10}"
        made.append({
            "messages": {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]},
            "sharegpt": {"conversations": [{"from": "human", "value": ask}, {"from": "gpt", "value": answer}]},
            "alpaca": {"instruction": ask, "output": answer},
            "dolly": {"instruction": ask, "response": answer},
            "prompt_completion": {"prompt": ask, "completion": answer},
            "text": {"text": f"{ask} {answer}"},
        }[name])  # fmt: skip
    return made


def write_jsonl(file: Path, content: list[dict[str, Any]]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(f"{json.dumps(row)}\n" for row in content))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with biases, an adapter on it, data in every format and kind of file."""
    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "base", attention_bias=True, mlp_bias=True)
    write_peft_adapter(folder / "start", folder / "base", target_modules=["q_proj", "down_proj"])
    for name in FORMATS:
        write_jsonl(folder / f"{name}.jsonl", rows(name, 0, 48))
        write_jsonl(folder / f"eval-{name}.jsonl", rows(name, 100, 6))
    write_jsonl(folder / "prompt_completion" / "first.jsonl", rows("prompt_completion", 0, 24))
    write_jsonl(folder / "prompt_completion" / "second.jsonl", rows("prompt_completion", 24, 24))
    table = pa.Table.from_pylist(rows("alpaca", 0, 48))
    (folder / "alpaca.json").write_text(json.dumps(table.to_pylist()))
    pyarrow.csv.write_csv(table, folder / "alpaca.csv")
    pyarrow.parquet.write_table(table, folder / "alpaca.parquet")
    (folder / "text.txt").write_text(" ".join(row["text"] for row in rows("text", 0, 400)))
    (folder / "chat.jinja").write_text(CHATML)
    return folder


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
    assert DEFAULTS.keys() == VALUES.keys()
    assert len(RUNS) <= 20


@pytest.mark.parametrize("number", range(len(RUNS)))
def test_a_run(here: Path, number: int):
    run = RUNS[number]
    result = CliRunner().invoke(main, ["train", str(written(here, run))])
    assert result.exit_code == 0, (run, result.output, result.exception)
    folder = here / "run"
    records, steps = read_metrics(folder), run["training.max_steps"]
    if steps == -1:
        reached, wanted = records[-1]["epoch"], run["training.num_train_epochs"]
        assert reached >= wanted > reached - reached / records[-1]["step"] - 1e-4
        steps = records[-1]["step"]
    logged = [step for step in range(1, steps + 1) if step % run["training.logging_steps"] == 0]
    every = run["training.eval_steps"]
    evaluated = [step for step in range(1, steps + 1) if step == steps or (every and step % every == 0)]
    evaluated = evaluated if run["data.eval"] is not None else []
    assert [record["step"] for record in records] == sorted({*logged, *evaluated, steps})
    assert [record["step"] for record in records if "eval_loss" in record] == evaluated
    names = {"eval_one_loss", "eval_other_loss"} if isinstance(run["data.eval"], dict) else set()
    assert all(names <= record.keys() for record in records if "eval_loss" in record)
    assert (folder / "adapter" / "adapter_model.safetensors").stat().st_size > 0
    saved = [step for step in range(1, steps + 1) if step % run["training.save_steps"] == 0 or step == steps]
    saved = saved[-(run["training.save_total_limit"] or steps) :]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [f"step-{step:06}" for step in saved]
    if steps > 1:
        memory = json.loads((folder / "memory.json").read_text())
        predicted, measured = (memory[kind]["peak_bytes"] for kind in ("predicted", "measured"))
        assert abs(measured / predicted - 1) < 0.03, (measured / predicted, run)


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


def test_rows_of_one_token(here: Path):
    assert "nothing to learn from" in refusal(here, data__max_length=1)


def test_steps_in_backward_with_gradients_that_are_scaled_together(here: Path):
    line = refusal(here, model__compute_dtype="float16", training__optimizer_in_backward=True,
                   training__max_grad_norm=0, data__train="no-such-file.jsonl")  # fmt: skip
    assert "training.optimizer_in_backward: true, but float16 gradients" in line  # before the data are missed


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
