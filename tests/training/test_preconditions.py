"""What `train` refuses before it reads data or weights or writes anything, whatever else is wrong with the run."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_adapters import write_peft_adapter
from tiny_models import tiny_config, write_tiny
from tiny_runs import run_config

from qlora_tool.config import config_to_yaml, with_values
from qlora_tool.errors import UserError
from qlora_tool.training.loop import train

PROCESSES = ("training.optimizer_in_backward: true, but gradients of 2 processes are summed before a step; leave it "
             "out, or start one process")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run whose model and data do not exist, and a cache that is not there yet."""
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(tmp_path / "cache"))
    missing = tmp_path / "no-model", tmp_path / "no-rows.jsonl"
    return lambda **values: run_config(*missing, tmp_path / "run", {"model.compute_dtype": "auto"} | {
        key.replace("__", "."): value for key, value in values.items()
    })  # fmt: skip


def refused(config, tmp_path: Path) -> list[str]:
    """The lines of the refusal; nothing was written."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        train(config)
    assert sorted(tmp_path.rglob("*")) == before
    return caught.value.lines


def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)


def test_several_processes(config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    two_processes(monkeypatch)
    in_backward = config(training__optimizer_in_backward=True, training__max_grad_norm=0)
    assert refused(in_backward, tmp_path) == [PROCESSES]


def test_a_tracker_that_is_not_installed(config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    assert refused(config(training__report_to=["tensorboard", "wandb"]), tmp_path) == [
        "training.report_to: tensorboard, wandb: not installed; `pip install tensorboard wandb` or leave out"
    ]


def test_a_chat_template_that_is_not_there(config, tmp_path: Path):
    (tmp_path / "short.jinja").write_text("")
    [line] = refused(config(data__chat_template=str(tmp_path / "shrot.jinja")), tmp_path)
    assert line.endswith(f"shrot.jinja: no such file; did you mean '{tmp_path / 'short.jinja'}'?")


def test_all_of_them_at_once(config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    two_processes(monkeypatch)
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    lines = refused(config(training__report_to=["wandb"], data__chat_template="gone.jinja",
                           training__optimizer_in_backward=True, training__max_grad_norm=0), tmp_path)  # fmt: skip
    first, *others = lines
    assert (first, [line.split(":")[0] for line in others]) == (PROCESSES, ["training.report_to", "data.chat_template"])


@pytest.mark.parametrize("value", ["[tensorbord]", "{}"])
def test_a_broken_key(config, tmp_path: Path, value: str):
    """Through the function that a program calls."""
    import qlora_tool

    file = tmp_path / "run.yaml"
    file.write_text(config_to_yaml(config()))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        qlora_tool.train(file, set=[f"training.report_to={value}"])
    assert caught.value.lines[0].startswith("--set training.report_to: expected")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_start_that_is_not_there_and_a_checkpoint_that_is_not_there(config, tmp_path: Path):
    values = {"adapter.init_from": str(tmp_path / "no-adapter"), "model.compute_dtype": "float32"}
    assert "no-adapter" in refused(with_values(config(), values), tmp_path)[0]
    with pytest.raises(UserError, match="--resume nowhere: no checkpoint"):
        train(config(model__compute_dtype="float32"), resume="nowhere")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------- what the model's configuration tells


@pytest.fixture
def without_weights(tmp_path: Path, config):
    """The same with a model's configuration that is there, and no weights: a family by name."""

    def with_family(family: str = "llama", **values):
        tiny_config(family).save_pretrained(tmp_path / family)
        return config(model__name_or_path=str(tmp_path / family), **values)

    return with_family


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"adapter__target_modules": ["q_pro"]}, ["adapter.target_modules: 'q_pro'", "did you mean 'q_proj'?"]),
        ({"adapter__target_modules": ".*attention.*"}, ["adapter.target_modules: '.*attention.*'"]),
        ({"adapter__exclude_modules": ["up_poj"]}, ["adapter.exclude_modules: 'up_poj'", "did you mean 'up_proj'?"]),
        ({"adapter__modules_to_save": ["lm_haed"]}, ["adapter.modules_to_save: no module 'lm_haed'"]),
        ({"adapter__exclude_modules": ".*"}, ["adapter.exclude_modules: no module", "is left to adapt"]),
        ({"family": "mixtral", "adapter__modules_to_save": ["experts"]},
         ["holds experts, which cannot be fully trained"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_model(without_weights, tmp_path: Path, values, said):
    """Before `compute_dtype: auto` is measured, too: its cache is not written."""
    run = without_weights(**values)
    [line] = refused(run, tmp_path)
    assert all(part in line for part in said), line


def test_an_adapter_to_start_from_that_is_of_another_model(without_weights, tmp_path: Path):
    base = write_tiny("llama", tmp_path / "other", hidden_size=128)
    write_peft_adapter(tmp_path / "adapter", base)
    lines = refused(without_weights(adapter__init_from=str(tmp_path / "adapter")), tmp_path)
    assert all("adapter" in line for line in lines)


def test_places_that_fit_are_not_refused(without_weights):
    """What is read next, the tokenizer, is what is missing then."""
    with pytest.raises(UserError, match="no tokenizer in it"):
        train(without_weights(model__compute_dtype="float32", data__max_length=64, adapter__target_modules=["q_proj"]))


def test_trackers_of_several_processes(config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whether they are installed or not: nobody has seen them work so."""
    two_processes(monkeypatch)
    [line] = refused(config(training__report_to=["tensorboard"]), tmp_path)
    assert line.startswith("training.report_to: tensorboard, but trackers are not told of 2 processes")
