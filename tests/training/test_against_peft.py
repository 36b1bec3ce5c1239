"""The whole training step against transformers + PEFT + torch's AdamW: from the same start, the same losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny_runs import run_config, write_model, write_rows
from transformers import AutoModelForCausalLM

from qlora_tool.adapters.peft_files import save_adapter
from qlora_tool.build.setup import Setup
from qlora_tool.data.batches import collate
from qlora_tool.inference.evaluation import evaluate_loss
from qlora_tool.training.optimizers import Optimizer
from qlora_tool.training.prepare import prepare_data
from qlora_tool.training.step import StepSettings, train_step
from qlora_tool.weights.modules import FrozenLinear

STEPS, ROWS, RATE, DECAY = 12, 4, 5e-3, 0.01


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_training_as_peft_trains(tmp_path: Path, method: str, quantization: str):
    model_folder, rows = write_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", STEPS * ROWS)
    held_out = write_rows(tmp_path / "held_out.jsonl", 8, first=100)
    values = {"data.eval": str(held_out), "adapter.lora_dropout": 0.0, "adapter.method": method,
              "model.quantization": quantization}  # fmt: skip
    config = run_config(model_folder, rows, tmp_path / "run", values)
    data, setup = prepare_data(Setup.of(config))
    built = setup.build()
    ours, adapters = built.model, built.adapters
    (tmp_path / "start").mkdir()
    save_adapter(tmp_path / "start", adapters, config.adapter, ours.module, str(model_folder), None)
    theirs = peft_model(model_folder, tmp_path / "start", ours.module)

    optimizer = Optimizer("adamw", adapters.parameters(), DECAY)
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    their_optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=DECAY)
    for step in range(STEPS):
        examples = data.train.examples[step * ROWS : (step + 1) * ROWS]
        batch = collate([[example] for example in examples], pad_token_id=0, packing=False)
        loss = float(train_step(ours, optimizer, [batch], StepSettings(max_grad_norm=0), RATE).loss)
        their_loss = theirs(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        their_loss.backward()
        their_optimizer.step()
        their_optimizer.zero_grad()
        # fp32 sums in another order differ by 1e-6; AdamW divides by the gradient's size, which lets that grow a little
        # with every step.
        assert loss == pytest.approx(float(their_loss.detach()), rel=1e-5 if step == 0 else 1e-3), f"step {step}"

    held = data.evaluations["eval"]
    batch = collate([[example] for example in held.examples], pad_token_id=0, packing=False)
    with torch.no_grad():
        expected = theirs(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    found = evaluate_loss(ours, held, 3, 0)
    assert found.loss == pytest.approx(float(expected), rel=1e-3)
    assert found.tokens == batch.trained_tokens


def peft_model(folder: Path, adapter: Path, ours: torch.nn.Module) -> PeftModel:
    """PEFT's model with the same adapter, on transformers' own modules that hold our dequantized weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    linears = {name: module for name, module in ours.named_modules() if isinstance(module, FrozenLinear)}
    with torch.no_grad():
        for name, linear in linears.items():
            model.get_submodule(name).weight.copy_(linear.weight.dense(torch.float32))
    return PeftModel.from_pretrained(model, adapter, is_trainable=True).train()
