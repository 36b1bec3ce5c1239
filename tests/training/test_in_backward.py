"""`training.optimizer_in_backward` from the command line, with all that a user has on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from tiny_runs import adapter_bytes, comparable, read_metrics, write_model, write_rows

from qlora_tool.cli import main


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return write_model(folder / "model"), write_rows(folder / "rows.jsonl")


def train(inputs: tuple[Path, Path], folder: Path, dtype: str, **training) -> None:
    model, rows = inputs
    config = {
        "model": {"name_or_path": str(model), "compute_dtype": dtype, "device": "cpu"},
        "adapter": {"r": 64, "lora_dropout": 0.1},  # large enough for moments in 8 bits
        "data": {"train": str(rows), "eval": 0.2, "max_length": 128},
        "training": {
            "output_dir": str(folder), "max_steps": 3, "learning_rate": 1e-2, "max_grad_norm": 0.0,
            "gradient_checkpointing": True, "eval_steps": 1, "save_steps": 1, "warmup_steps": 0, **training,
        },
    }  # fmt: skip
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    result = CliRunner().invoke(main, ["train", str(file)])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(("dtype", "optim"), [("float32", "adamw"), ("bfloat16", "adamw_8bit")])
def test_it_trains_as_without_and_resumes(inputs, tmp_path, dtype, optim):
    train(inputs, tmp_path / "after", dtype, optim=optim)
    train(inputs, tmp_path / "within", dtype, optim=optim, optimizer_in_backward=True)
    records = [[comparable(record) for record in read_metrics(tmp_path / name)] for name in ("after", "within")]
    for one, other in zip(*records, strict=True):
        assert one.pop("grad_norm") == pytest.approx(other.pop("grad_norm"), rel=1e-5)  # summed in another order
        assert one == other
    assert adapter_bytes(tmp_path / "within") == adapter_bytes(tmp_path / "after")
    memory = json.loads((tmp_path / "within" / "memory.json").read_text())
    after = json.loads((tmp_path / "after" / "memory.json").read_text())
    assert memory["measured"]["peak_bytes"] == pytest.approx(memory["predicted"]["peak_bytes"], rel=0.01)
    there = [report["measured"]["phase_peak_bytes"]["optimizer"] for report in (memory, after)]
    assert there[1] - there[0] > 0.99 * after["measured"]["at_peak"]["adapter_weights"]  # no gradient is left by then
    assert memory["measured"]["at_peak"]["optimizer_state"] == after["measured"]["at_peak"]["optimizer_state"] > 0

    whole = [comparable(record) for record in read_metrics(tmp_path / "within")]
    shutil.rmtree(tmp_path / "within" / "adapter")
    for step in (2, 3):
        shutil.rmtree(tmp_path / "within" / "checkpoints" / f"step-{step:06}")
    train(inputs, tmp_path / "within", dtype, optim=optim, optimizer_in_backward=True)
    assert [comparable(record) for record in read_metrics(tmp_path / "within")] == whole
    assert adapter_bytes(tmp_path / "within") == adapter_bytes(tmp_path / "after")
