"""The additive update: the formula in fp64, the LoRA that equals it, and how it starts."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from one_layer import disagreement, fill, frozen_linear, noise, relative_error, started, trained
from safetensors.torch import load_file
from tiny_models import logits, read_by_transformers, read_tiny, tokens, write_tiny
from torch import Tensor, nn

from qlora_tool.adapters.attach import attach
from qlora_tool.adapters.attach_stored import attach_stored
from qlora_tool.adapters.peft_files import save_adapter
from qlora_tool.adapters.peft_reading import read_adapter
from qlora_tool.config import AdapterConfig, load_config
from qlora_tool.errors import UserError
from qlora_tool.methods import METHODS
from qlora_tool.methods.method import Settings

# Out, in, r: rows and columns; blocks; blocks that one side, or both, cut off; one block that is not whole.
CASES = [(96, 64, 1), (96, 64, 8), (96, 64, 9), (50, 64, 8), (48, 61, 8), (10, 64, 12)]
FP32 = 2 * (96 + 64) * 2**-24  # sums of in, or of out, products


def identities(r: int, size: int) -> Tensor:
    """I(1 × size/r): identities side by side, the last one as far as it goes, (r, size), fp64."""
    return torch.eye(r, dtype=torch.double).repeat(1, size // r + 1)[:, :size]


def formula(tensors: dict[str, Tensor]) -> Tensor:
    A, B = tensors["additive_A"], tensors["additive_B"]
    return A @ identities(A.shape[1], B.shape[1]) + identities(B.shape[0], A.shape[0]).T @ B


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(("out_features", "in_features", "r"), CASES)
def test_output_and_gradients_follow_the_formula(out_features, in_features, r, quantization):
    linear = frozen_linear(out_features, in_features, quantization)
    adapter = trained("additive", linear, Settings(r, 32.0))
    assert disagreement(adapter, linear, formula) < FP32
    weight = linear.weight.dense(torch.float32)
    exact = formula({name: tensor.detach().double() for name, tensor in adapter.tensors.items()})
    assert relative_error(adapter.delta(weight).detach(), exact) < 2**-23
    x = noise(8, in_features, seed=6)
    merged = nn.functional.linear(x, adapter.merge(weight.clone()), linear.bias)
    assert relative_error(adapter(x, linear).detach(), merged.detach()) < FP32


def test_of_rank_1_it_is_a_sum_for_each_row_and_each_column():
    linear = frozen_linear(3, 2)
    adapter = started("additive", linear, Settings(1, 32.0))
    with torch.no_grad():
        adapter.tensors["additive_A"].copy_(torch.tensor([[1.0], [2.0], [3.0]]))
        adapter.tensors["additive_B"].copy_(torch.tensor([[10.0, 20.0]]))
    delta = adapter.delta(torch.zeros(3, 2))
    assert delta.tolist() == [[11, 21], [12, 22], [13, 23]]


def test_the_first_step_is_the_bases_and_moves_both():
    linear = frozen_linear(96, 64)
    adapter, x = started("additive", linear, Settings(8, 32.0)), noise(5, 64, seed=6)
    y = adapter(x, linear)
    assert torch.equal(y, linear(x))
    gradients = torch.autograd.grad(y.square().sum(), list(adapter.parameters()))
    assert all(bool(gradient.abs().min() > 0) for gradient in gradients)


@pytest.mark.parametrize("family", ["llama", "gpt2", "llama-odd"])
def test_the_lora_that_it_is_saved_as_gives_its_logits_in_peft(family, tmp_path):
    base = write_tiny(family, tmp_path / "base")
    config = AdapterConfig(method="additive", r=5, lora_dropout=0.1, rank_pattern={"down_proj": 8, "c_proj": 3})
    model = read_tiny(base)
    adapters = attach(model, config, torch.float32, seed=0)
    fill(adapters.parameters())
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_adapter(folder, adapters, config, model, str(base), None)
    found = logits(model.eval(), tokens())
    theirs = peft.PeftModel.from_pretrained(read_by_transformers(base), folder).eval()
    assert relative_error(found, logits(theirs, tokens())) < 1e-5
    again, stored = read_tiny(base), read_adapter(folder)
    attach_stored(again, stored)
    assert stored.method is METHODS["lora"]
    assert relative_error(logits(again.eval(), tokens()), found) < 1e-5
    written = json.loads((folder / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["lora_dropout"]) == (10, 10, 0.1)
    ranks = {name: tensor.shape[0] for name, tensor in load_file(folder / "adapter_model.safetensors").items()
             if "lora_A" in name}  # fmt: skip
    assert all(rank == 2 * (config.rank_pattern.get(name.split(".")[-3], 5)) for name, rank in ranks.items())


@pytest.mark.parametrize("setting", ["lora_alpha: 16", "alpha_pattern: {q_proj: 4}", "use_rslora: true"])
def test_keys_that_it_does_not_read_are_refused(setting, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"adapter: {{method: additive, {setting}}}")
    with pytest.raises(UserError, match=rf"adapter\.{setting.partition(':')[0]}.*additive"):
        load_config(str(file))
