"""Measurement: the allocator's own count, and the tracer on real tensors."""

from __future__ import annotations

import gc

import pytest
import torch
from tiny_models import tiny_config

from qlora_tool.config import Config, with_values
from qlora_tool.memory.trace import measure
from qlora_tool.memory.trace.classify import timeline
from qlora_tool.memory.trace.predict import BatchShape, predict

MB = 1_000_000


def peak_of(run, monkeypatch) -> int:
    monkeypatch.setattr(measure, "trial_run", lambda *_arguments, **_options: run())
    return measure.measure_peak(Config(), None, BatchShape.full(1, 1), torch.float32)


def block(millions: int) -> torch.Tensor:
    return torch.empty(millions * MB, dtype=torch.uint8)


def test_the_peak_is_what_was_there_at_once(monkeypatch):
    def run() -> None:
        first, second = block(30), block(20)
        del first
        third = block(25)
        del second, third
        block(40)

    assert peak_of(run, monkeypatch) == 50 * MB


def test_what_an_operator_takes_inside_counts(monkeypatch):
    """No tracer sees it: the allocator does."""
    x = torch.randn(1000, 1000).to(torch.float64)

    def run() -> None:
        torch.linalg.qr(x)

    assert peak_of(run, monkeypatch) >= 2 * x.nbytes


def test_what_was_there_before_does_not_count(monkeypatch):
    """Neither what is kept nor what is freed meanwhile, garbage of an earlier run in a cycle included."""
    before = block(10)
    cycle = [block(60)]
    cycle.append(cycle)
    del cycle

    def run() -> None:
        gc.collect()
        kept = block(30)
        before.zero_()
        del kept

    assert peak_of(run, monkeypatch) == 30 * MB


IN_BACKWARD = {"training.optimizer_in_backward": True, "training.max_grad_norm": 0.0}
STEPS = {
    "recomputed": ({"training.gradient_checkpointing": True}, torch.float32),
    "kept": ({"training.gradient_checkpointing": False}, torch.float32),
    "bf16": ({}, torch.bfloat16),
    "8 bits": ({"training.optim": "adamw_8bit", "adapter.r": 64}, torch.bfloat16),
    "summed": ({"training.gradient_accumulation_steps": 2}, torch.bfloat16),
    "in backward": (IN_BACKWARD, torch.bfloat16),
    "in backward, 8 bits": ({**IN_BACKWARD, "training.optim": "adamw_8bit", "adapter.r": 64}, torch.bfloat16),
    "fp16": ({}, torch.float16),
}


@pytest.mark.parametrize("case", STEPS)
def test_the_tracer_sees_on_real_tensors_what_it_sees_on_fake_ones(case):
    values, dtype = STEPS[case]
    config = with_values(Config(), values)
    arguments = config, tiny_config("llama"), BatchShape.full(2, 32), dtype
    real = timeline(measure.measure_categories(*arguments)).breakdown()
    fake = timeline(predict(config, tiny_config("llama"), *arguments[2:])).breakdown()
    assert (real.at_peak, real.activations) == (fake.at_peak, fake.activations)
    assert {phase: real.phase_peak_bytes[phase] for phase in ("forward", "backward", "optimizer")} == {
        phase: fake.phase_peak_bytes[phase] for phase in ("forward", "backward", "optimizer")
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"training.optim": "adamw_8bit"},
        {"training.gradient_accumulation_steps": 2},
        IN_BACKWARD,
        {**IN_BACKWARD, "training.tiled_mlp": True, "adapter.method": "dora"},
    ],
)
def test_the_peak_of_every_way_to_step_is_the_predicted_one(values, dtype):
    """Adapters larger than the base, so that what is beside them hardly matters. bitsandbytes' 8-bit step on a CPU
    makes five numbers in fp32 of each element, of 512 · 256 at most, that no tracer sees; products in bf16 a little."""
    config = with_values(Config(), {"adapter.r": 256, "training.gradient_checkpointing": True} | values)
    model = tiny_config("llama", hidden_size=256, intermediate_size=512)
    arguments = model, BatchShape.full(1, 32), dtype
    predicted = timeline(predict(config, *arguments)).peak_bytes
    unseen = 512 * 256 * 5 * 4 if config.training.optim == "adamw_8bit" else 0
    slack = (1e-3 if dtype == torch.float32 else 1e-2) * predicted
    assert predicted - slack <= measure.measure_peak(config, *arguments) <= predicted + unseen + slack


@pytest.mark.parametrize(
    "values",
    [{"adapter.modules_to_save": ["lm_head", "embed_tokens"]},
     pytest.param({"adapter.target_modules": ["lm_head", "q_proj"], "adapter.lora_dropout": 0.5},
                  marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_trained_output_projection_is_predicted(values):
    """Its logits are made for some rows at a time, and once more in backward; with a vocabulary that outweighs all else
    that is the peak. Where it drops, each time the state of random numbers is kept to drop the same again."""
    config = with_values(Config(), {"adapter.r": 2, **values})
    model = tiny_config("llama", vocab_size=8192)
    arguments = config, model, BatchShape.full(2, 128), torch.float32
    fake = timeline(predict(*arguments)).breakdown()
    assert fake.peak_bytes == pytest.approx(measure.measure_peak(*arguments), rel=1e-5)
    assert fake.peak_phase == "backward"


WITH_LAYER_NORM = ("gpt_neox", "opt", "bloom", "falcon", "phi", "starcoder2", "stablelm", "mpt", "gpt_bigcode")


@pytest.mark.parametrize(
    "family", ["gpt2", *(pytest.param(family, marks=pytest.mark.slow) for family in ("llama", *WITH_LAYER_NORM))]
)
def test_full_fine_tuning_is_predicted(family):
    """gpt2 drops in every layer, and each that is recomputed keeps the state of random numbers, 5056 bytes."""
    config = with_values(Config(), {"adapter.method": "full", "model.quantization": "none",
                                    "training.gradient_checkpointing": True})  # fmt: skip
    arguments = config, tiny_config(family), BatchShape.full(2, 16), torch.float32
    predicted = timeline(predict(*arguments)).peak_bytes
    assert predicted == pytest.approx(measure.measure_peak(*arguments), rel=1e-4)
