"""Whole runs by what a step takes on a card, its operations by their references: the losses are a CPU's."""

from __future__ import annotations

import pytest
from tiny_runs import read_metrics, run_config, write_model, write_rows
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_tool.ops.declare import Target, meant_for
from qlora_tool.training.loop import train

CARD = Target("cuda", (9, 0))


class Operators(TorchDispatchMode):
    """Notes which operators run meanwhile."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return write_model(folder / "model"), write_rows(folder / "rows.jsonl")


@pytest.mark.parametrize("values", [
    {"training.gradient_checkpointing": False},
    {"training.gradient_checkpointing": True},
    {"training.gradient_checkpointing": True, "training.tiled_mlp": True, "model.quantization": "int8"},
    {"data.packing": True, "training.gradient_checkpointing": True},
    {"adapter.method": "dora", "training.gradient_checkpointing": True},
    {"adapter.lora_dropout": 0.1, "training.gradient_checkpointing": True},
    {"adapter.target_modules": ["v_proj"], "adapter.modules_to_save": ["norm"]},
], ids=str)  # fmt: skip
def test_losses_are_those_of_a_cpu(inputs, values, tmp_path):
    losses = []
    for name in ("cpu", "card"):
        config = run_config(*inputs, tmp_path / name, {"adapter.lora_dropout": 0.0} | values)
        if name == "cpu":
            train(config)
        else:
            with meant_for(CARD), Operators() as seen:
                train(config)
            assert {"qlora_tool::add_rms_norm", "qlora_tool::rms_norm_backward", "qlora_tool::rotary"} <= seen.names
        losses.append([record["loss"] for record in read_metrics(tmp_path / name) if "loss" in record])
    assert len(losses[0]) == 6 and losses[1] == pytest.approx(losses[0], rel=1e-4)
