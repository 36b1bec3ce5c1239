"""Which rows of a fused projection are what, against what the family's attention does with them."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qlora_tool.model.projection_parts import LAYOUTS, parts_of

FUSED = ("c_attn", "Wqkv", "qkv_proj", "query_key_value")
FAMILIES = [
    ("gpt2", {}), ("mpt", {}), ("phi3", {}), ("phi3", {"num_key_value_heads": 4}), ("bloom", {}), ("gpt_neox", {}),
    ("gpt_neox", {"num_attention_heads": 2}), ("falcon", {}), ("falcon-alibi", {}), ("falcon", {"multi_query": False}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}), ("gpt_bigcode", {}),
    ("gpt_bigcode", {"multi_query": False}), ("codegen", {}), ("dbrx", {}), ("persimmon", {}),
    ("gpt_neox_japanese", {}), ("openai-gpt", {}),
]  # fmt: skip
GATED = ["phi3", "glm", "glm4"]


def fused(family: str, changes: dict, endings: tuple[str, ...]) -> tuple[nn.Module, str, int]:
    torch.manual_seed(0)
    config = tiny_config(family, **changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    name = next(name for name, _ in model.named_modules() if name.endswith(endings))
    module = model.get_submodule(name)
    return model, name, module.weight.shape[1 if type(module).__name__ == "Conv1D" else 0]


def by_what_they_do(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The first token attends to itself whatever its q and k are, so only v reaches its output; of another token's, the
    ones after it see k and v, and nothing but itself its q."""
    seen = {}

    def cut(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        seen["output"] = output.detach().requires_grad_()
        return seen["output"]

    handle = model.get_submodule(name).register_forward_hook(cut)
    states = model(input_ids=torch.tensor([[5, 9, 17]]), use_cache=False, output_hidden_states=True).hidden_states[1]
    handle.remove()
    weights = torch.randn(states.shape[-1])

    def reached_by(token: int) -> Tensor:
        total = (states[0, token] * weights).sum()
        return torch.autograd.grad(total, seen["output"], retain_graph=True)[0].reshape(3, -1) != 0

    v, seen_later, all_of_itself = reached_by(0)[0], reached_by(2)[1], reached_by(2)[2]
    found = {"q": all_of_itself & ~v & ~seen_later, "k": seen_later & ~v, "v": v}
    return {part: rows.nonzero().flatten() for part, rows in found.items()}


@pytest.mark.parametrize("family, changes", FAMILIES, ids=str)
def test_q_k_and_v(family, changes):
    model, name, out_features = fused(family, changes, FUSED)
    parts, expected = parts_of(model.config, name, out_features), by_what_they_do(model, name)
    assert list(parts) == ["q", "k", "v"] and sum(len(rows) for rows in parts.values()) == out_features
    for part, rows in parts.items():
        assert rows.sort().values.tolist() == expected[part].tolist(), part


@pytest.mark.parametrize("family", GATED)
def test_gate_and_up(family):
    """The MLP is linear in up: twice of it, before the down projection, gives twice; of gate it does not."""
    model, name, out_features = fused(family, {}, ("gate_up_proj",))
    parts, mlp = parts_of(model.config, name, out_features), model.get_submodule(name.rpartition(".")[0])
    x = torch.randn(3, 64)
    for part, linear in (("up", True), ("gate", False)):
        factors = torch.ones(out_features).index_fill(0, parts[part], 2.0)
        plain = mlp(x)
        handle = mlp.gate_up_proj.register_forward_hook(lambda _m, _i, output, factors=factors: output * factors)
        assert torch.allclose(mlp(x), 2 * plain, rtol=1e-4, atol=1e-6) is linear
        handle.remove()


def test_every_layout_is_held_against_its_family():
    tried = {(tiny_config(family).model_type, "gate_up_proj") for family in GATED}
    for family, changes in FAMILIES:
        model, name, _ = fused(family, changes, FUSED)
        tried.add((model.config.model_type, name.rpartition(".")[2]))
    assert tried == set(LAYOUTS)


def test_where_nothing_is_known():
    assert parts_of(tiny_config("llama"), "model.layers.0.self_attn.q_proj", 64) == {}
    assert parts_of(tiny_config("phi3"), "model.layers.0.self_attn.o_proj", 64) == {}
