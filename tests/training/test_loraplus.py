"""LoRA+: B takes steps that are `loraplus_lr_ratio` times as large as A's; nothing else is another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import read_by_transformers
from tiny_runs import adapter_bytes, comparable, read_metrics, run_config, write_model, write_rows

from qlora_tool.training.loop import train

RATIO, RATE = 16, 1e-3


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return write_model(folder / "model"), write_rows(folder / "rows.jsonl")


@pytest.fixture
def config(inputs, tmp_path):
    return lambda name="run", **values: run_config(*inputs, tmp_path / name, {
        "adapter.loraplus_lr_ratio": RATIO, "adapter.lora_dropout": 0.0, "training.learning_rate": RATE,
        "training.warmup_steps": 0, "training.lr_scheduler_type": "constant", "training.max_grad_norm": 0,
    } | {key.replace("__", "."): value for key, value in values.items()})  # fmt: skip


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("ratio", [RATIO, 0.25, None])
def test_a_first_step_by_hand(config, tmp_path, ratio, in_backward):
    """AdamW's first step is lr · g / (|g| + ε): lr in size wherever the gradient is far above ε = 1e-8. B begins at 0,
    so after it |B| = ratio · lr; A, whose gradient is 0 as long as B is, stays where it is."""
    run = train(config(training__max_steps=1, adapter__loraplus_lr_ratio=ratio,
                       training__optimizer_in_backward=in_backward))  # fmt: skip
    for layer in run.adapters.layers.values():
        B = layer.tensors["lora_B"].detach()
        moved = B[B.abs() > 0.99 * B.abs().max()].abs()
        assert moved.numel() > 0.9 * B.numel()
        # (|g| + ε) / |g| is 1.01 at |g| = 100·ε; rounding of the step is 2⁻²⁴ of it.
        assert float(moved.max()) == pytest.approx((ratio or 1) * RATE, rel=1e-4)


def test_the_step_is_the_ratio_times_as_large(config):
    """Element by element, beside a run without it: small gradients, too."""
    plain, plus = (train(config(name, training__max_steps=1, adapter__loraplus_lr_ratio=ratio))
                   for name, ratio in (("plain", None), ("plus", RATIO)))  # fmt: skip
    for name, layer in plain.adapters.layers.items():
        other = plus.adapters.layers[name].tensors
        assert torch.equal(layer.tensors["lora_A"], other["lora_A"])
        torch.testing.assert_close(other["lora_B"], RATIO * layer.tensors["lora_B"], rtol=1e-5, atol=0)


def test_pefts_files_do_not_tell(config, inputs, tmp_path):
    """What PEFT's LoRA has of it are groups of its optimizer; the adapter is LoRA's."""
    train(config("plus"))
    train(config("plain", adapter__loraplus_lr_ratio=None))
    plus, plain = (tmp_path / name / "adapter" for name in ("plus", "plain"))
    settings = [json.loads((folder / "adapter_config.json").read_text()) for folder in (plus, plain)]
    assert settings[0] == settings[1]
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in (plus, plain)]
    forms = [{name: (value.shape, value.dtype) for name, value in found.items()} for found in tensors]
    assert forms[0] == forms[1]
    assert any(not torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    theirs = peft.PeftModel.from_pretrained(read_by_transformers(inputs[0]), plus)
    [B] = [value for name, value in theirs.named_parameters() if "layers.0.self_attn.q_proj.lora_B" in name]
    assert torch.equal(B, tensors[0]["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"])


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
def test_a_resumed_run_goes_on_exactly(config, tmp_path, optim):
    values = {"training__optim": optim, "adapter__r": 64, "training__save_steps": 3}
    train(config("whole", **values))
    train(config(**values))
    shutil.rmtree(tmp_path / "run" / "adapter")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000006")
    run = train(config(**values))
    assert run.progress.step == 6
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    records = [[comparable(record) for record in read_metrics(tmp_path / name)] for name in ("run", "whole")]
    assert records[0] == records[1]
