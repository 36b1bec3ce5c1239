"""What to say of a key that is another tool's, where one of ours is expected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_tool.config.imports.formats import Left, Taken
from qlora_tool.config.imports.reading import FORMATS, recognized

_SHORT = {
    "lr": "training.learning_rate", "epochs": "training.num_train_epochs", "rank": "adapter.r", "steps":
    "training.max_steps", "dropout": "adapter.lora_dropout", "base": "model.name_or_path", "data_path": "data.train",
    "base_model_name": "model.name_or_path", "max_seq_len": "data.max_length", "seq_length": "data.max_length",
    "use_4bit": "model.quantization", "quantize": "model.quantization", "bits": "model.quantization",
    "train_file": "data.train", "validation_file": "data.eval", "train_batch_size":
    "training.per_device_train_batch_size", "grad_accum": "training.gradient_accumulation_steps",
}  # fmt: skip


def known_elsewhere(name: str) -> str:
    """The end of a line on a key that other tools have: ours, or why there is none; empty for one that none has."""
    entries = [(known.name, known.keys[name]) for known in FORMATS if name in known.keys]
    for _, entry in entries:
        if isinstance(entry, Taken):
            how = f" ({entry.how})" if entry.how else ""
            return f"; here it is {entry.ours}{how}"
    if name in _SHORT:
        return f"; here it is {_SHORT[name]}"
    left = [(tool, entry.why) for tool, entry in entries if isinstance(entry, Left)]
    return f", one of {left[0][0]}'s: {left[0][1]}; leave it out" if left else ""


def tool_of(content: Mapping[Any, Any]) -> str:
    """The tool that a configuration was written for, by its keys; empty where none is known."""
    known = recognized(content)
    return known.name if known else ""
