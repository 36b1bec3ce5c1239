"""Runs with adapters on embeddings, output projections and experts: they learn, are predicted, resume to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import write_tiny
from tiny_runs import read_metrics, run_config, write_rows
from tokenizers_for_tests import CHATML, byte_level

from qlora_tool import api

PLACES = [
    ("mixtral", {"adapter.target_parameters": ["gate_up_proj", "down_proj"], "adapter.lora_dropout": 0}),
    ("llama-tied", {"adapter.target_modules": ["embed_tokens", "q_proj"], "model.quantization": "int8"}),
    ("gpt2", {"adapter.target_modules": ["wte", "c_attn"], "model.embeddings": "int8"}),
    ("qwen3_moe", {"adapter.target_modules": ["lm_head"], "model.quantization": "none"}),
]


@pytest.mark.parametrize("family, keys", PLACES, ids=[family for family, _ in PLACES])
def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family, keys):
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(tmp_path / "cache"))
    tokenizer = byte_level(CHATML)
    longest = {"n_positions": 256} if family == "gpt2" else {"max_position_embeddings": 256}
    write_tiny(family, tmp_path / "model", vocab_size=len(tokenizer), **longest)
    tokenizer.save_pretrained(tmp_path / "model")
    more = {"training.max_steps": 4, "training.save_steps": 2, "training.gradient_checkpointing": True}
    config = run_config(tmp_path / "model", write_rows(tmp_path / "rows.jsonl"), tmp_path / "run", more | keys)
    run = api.train(config).folder
    losses = [record["loss"] for record in read_metrics(run) if "loss" in record]
    assert losses[-1] < losses[0]
    report = json.loads((run / "memory.json").read_text())
    assert report["predicted"]["peak_bytes"] >= report["measured"]["peak_bytes"] and not report.get("estimated")
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    api.train(config, resume=run / "checkpoints" / "step-000002")
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
