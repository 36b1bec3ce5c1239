"""A whole run in seconds: a tiny llama with a tokenizer, a data file of thirty rows, and a configuration for both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import write_tiny
from tokenizers_for_tests import CHATML, byte_level

from qlora_tool.config import Config, with_values
from qlora_tool.files.sealed import listing, read_sealed, write_sealed
from qlora_tool.training.interrupt import Interrupted
from qlora_tool.training.loop import train
from qlora_tool.training.optimizer_files import read_optimizer

ROWS = 30


def write_model(folder: Path, **changes) -> Path:
    """A tiny llama (fp32, two layers, 256 positions) and the tokenizer that its vocabulary is of."""
    tokenizer = byte_level(CHATML)
    write_tiny("llama", folder, **({"vocab_size": len(tokenizer), "max_position_embeddings": 256} | changes))
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(file: Path, rows: int = ROWS, first: int = 0) -> Path:
    """Questions and answers of different lengths, no two alike."""
    lines = []
    for index in range(first, first + rows):
        other = index * 7 % 11
        answer = f"{index + other} " * (1 + index % 4)
        lines.append({"prompt": f"How many are {index} and {other}?", "completion": answer})
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return file


def run_config(model: Path, data: Path, output_dir: Path, values: dict[str, Any] | None = None) -> Config:
    """A run of six steps over rows of four examples, with dropout; `values` by dotted key.

    Computed in fp32, whatever the machine is fast in, so that the same numbers come out of it.
    """
    return with_values(Config(), {
        "model.name_or_path": str(model), "model.compute_dtype": "float32", "model.device": "cpu",
        "adapter.r": 4, "adapter.lora_dropout": 0.1,
        "data.train": str(data), "data.max_length": 128, "data.packing": False,
        "training.output_dir": str(output_dir), "training.max_steps": 6, "training.per_device_train_batch_size": 4,
        "training.learning_rate": 1e-2, "training.gradient_checkpointing": False,
    } | (values or {}))  # fmt: skip


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def comparable(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what differs from run to run: speed and memory."""
    return {key: value for key, value in record.items() if key not in ("tokens_per_second", "peak_memory_bytes")}


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def interrupted(stop_in_step, config, step: int, **options) -> None:
    stop_in_step(step)
    with pytest.raises(Interrupted) as raised:
        train(config, **options)
    assert raised.value.exit_code == 130


def assert_same_run(folder: Path, expected: Path) -> None:
    assert adapter_bytes(folder) == adapter_bytes(expected)
    assert [comparable(r) for r in read_metrics(folder)] == [comparable(r) for r in read_metrics(expected)]


def as_version_0_1(checkpoint: Path) -> None:
    """Write a checkpoint as version 0.1 did: the optimizer's state pickled, and no list of files."""
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    numbers = state.pop("optimizer")
    torch.save(read_optimizer(checkpoint / "optimizer.safetensors", numbers), checkpoint / "optimizer.pt")
    (checkpoint / "state.json").write_text(json.dumps(state), encoding="utf-8")
    (checkpoint / "optimizer.safetensors").unlink()
    (checkpoint / "manifest.json").unlink()


def sealed_again(checkpoint: Path) -> None:
    """Let a checkpoint's list of files be that of what lies in it now: no hash tells what was changed."""
    manifest = read_sealed(checkpoint / "manifest.json")
    write_sealed(checkpoint / "manifest.json", manifest | {"files": listing(checkpoint, manifest["files"])})
