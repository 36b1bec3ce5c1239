"""A config.json whose values are none that a model can have: one line with the file, the key and a cure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from qlora_tool.errors import UserError
from qlora_tool.model.load import build_skeleton
from qlora_tool.model.source import read_model_config

LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 32,
         "intermediate_size": 64, "head_dim": 16}  # fmt: skip
CASES = [
    *({"rope_theta": value} for value in (0, -5, "x", [], float("inf"))),
    *({"rope_parameters": {"rope_type": "default", "rope_theta": value}} for value in (0, -5, "x")),
    {"rope_parameters": {"rope_type": "nope", "rope_theta": 10000.0}}, {"hidden_act": "nope"},
    *({"dtype": value} for value in ("int8", 5, "nope", {})), {"torch_dtype": "int8"},
    {"head_dim": 0}, {"pad_token_id": 10**9}, {"eos_token_id": "x"}, {"bos_token_id": 2**40},
    *({"text_config": value} for value in ({"hidden_size": 3}, 3, [], "x")),
]  # fmt: skip


@pytest.mark.parametrize("change", CASES, ids=str)
def test_what_no_model_can_have_is_one_line(tmp_path: Path, change: dict[str, Any]):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **change}))
    with pytest.raises(UserError) as raised:
        build_skeleton(read_model_config(tmp_path))
    (line,) = raised.value.lines
    (key,) = change
    names = [key, *(change[key] if isinstance(change[key], dict) else [])]
    assert line.startswith(str(tmp_path / "config.json")) and any(name in line for name in names)
    assert line.endswith("download the model again")


def test_what_models_have_is_taken(tmp_path: Path):
    LlamaConfig(**LLAMA, eos_token_id=[1, 2], pad_token_id=-1, dtype="bfloat16").save_pretrained(tmp_path)
    assert read_model_config(tmp_path).vocab_size == 32
