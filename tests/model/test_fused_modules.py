"""What is found in a family's code to be an RMSNorm or a rotary embedding, and that it computes what it did."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import FAMILIES, tiny_model, tokens
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_tool.model.fused_layers import is_pre_norm
from qlora_tool.model.fused_modules import fuse_modules, norm_of, rotation_of
from qlora_tool.ops.declare import Target, meant_for
from qlora_tool.ops.norm import NormKind

CARD = Target("cuda", (9, 0))
WITHOUT_EITHER = {"opt", "opt-projected", "gpt2", "gpt_bigcode", "gptj", "gpt_neo", "codegen", "bloom", "mpt",
                  "cohere", "cohere2"}  # fmt: skip


class Operators(TorchDispatchMode):
    """Counts the operators that run meanwhile."""

    def __init__(self):
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func._schema.name] = self.counts.get(func._schema.name, 0) + 1
        return func(*args, **(kwargs or {}))


def frozen_norms(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() > 1)
    return model


def results(model: nn.Module) -> list[torch.Tensor]:
    """Logits, and the gradients of everything with two dimensions."""
    logits = model(input_ids=tokens(), use_cache=False).logits
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    of_logits = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    grads = torch.autograd.grad(logits, trained, of_logits, allow_unused=True)
    return [logits, *(grad for grad in grads if grad is not None)]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_model_computes_what_it_did(family):
    plain = frozen_norms(tiny_model(family))
    fused = copy.deepcopy(plain)
    names, kinds = list(plain.state_dict()), [type(module) for module in plain.modules()]
    with meant_for(CARD):
        found = fuse_modules(fused)
        with Operators() as seen:
            fused_results = results(fused)
    assert bool(found.modules) == (family not in WITHOUT_EITHER)
    assert ("RMSNorm" in found.modules) == (seen.counts.get("qlora_tool::rms_norm", 0) > 0)
    calls_another = {"deepseek_v3", "falcon-alibi"}  # that their configuration chooses instead
    assert ("RoPE" in found.modules and family not in calls_another) == ("qlora_tool::rotary" in seen.counts)
    assert list(fused.state_dict()) == names
    assert all(isinstance(module, kind) for module, kind in zip(fused.modules(), kinds, strict=True))
    for one, other in zip(fused_results, results(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("recomputed", [False, True])
def test_what_a_llama_has_of_them(recomputed):
    model = frozen_norms(tiny_model("llama"))
    if recomputed:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    with meant_for(CARD):
        found = fuse_modules(model)
        with Operators() as seen:
            results(model)
    assert found.modules == {"RMSNorm": 5, "RoPE": 2, "residual + RMSNorm": 2}
    assert str(found) == "RMSNorm in 5 modules, RoPE in 2 modules, residual + RMSNorm in 2 modules"
    twice = 2 if recomputed else 1
    assert {name: count for name, count in seen.counts.items() if name.startswith("qlora_tool")} == {
        "qlora_tool::rms_norm": 2 * twice + 1, "qlora_tool::add_rms_norm": 2 * twice,
        "qlora_tool::rms_norm_backward": 5, "qlora_tool::rotary": 2 * twice + 2,
    }  # fmt: skip


@pytest.mark.parametrize("family", ["gemma", "qwen3", "mixtral"])
def test_layers_that_add_and_normalize_in_turn(family):
    with meant_for(CARD):
        assert fuse_modules(tiny_model(family)).modules["residual + RMSNorm"] == 2


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "granite", "phi3", "cohere", "gpt_neox"])
def test_layers_that_do_otherwise(family):
    """Norms after attention, a multiplied or dropped sum, one norm for both, attention and MLP side by side."""
    with meant_for(CARD):
        assert "residual + RMSNorm" not in fuse_modules(tiny_model(family)).modules


def test_a_layer_that_looks_at_what_its_mlp_gives_is_left_alone():
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    class Looking(LlamaDecoderLayer):
        def forward(self, hidden_states, **options):
            x = hidden_states + self.self_attn(hidden_states=self.input_layernorm(hidden_states), **options)[0]
            update = self.mlp(self.post_attention_layernorm(x))
            return x + (update[0] if isinstance(update, tuple) else update)

    class Plain(LlamaDecoderLayer):
        def forward(self, hidden_states, **options):
            x = hidden_states + self.self_attn(hidden_states=self.input_layernorm(hidden_states), **options)[0]
            return x + self.mlp(self.post_attention_layernorm(x))

    layer = tiny_model("llama").model.layers[0]
    found = []
    for kind in (Looking, Plain):
        layer.__class__ = kind
        found.append(is_pre_norm(layer))
    assert found == [False, True]


def test_a_sum_of_two_dtypes_is_taken_as_it_was():
    model = tiny_model("llama").requires_grad_(False)
    layer = model.model.layers[0]
    attended = torch.randn(1, 5, 64).bfloat16()  # given, since a value near a half of bf16 may round either way
    layer.self_attn.register_forward_hook(lambda _module, _args, _output: (attended, None))
    x, angles = torch.randn(1, 5, 64), model.model.rotary_emb(torch.randn(1, 5, 64), torch.arange(5)[None])
    expected = layer(x, position_embeddings=angles)
    with meant_for(CARD):
        fuse_modules(model)
        torch.testing.assert_close(layer(x, position_embeddings=angles), expected)


def test_on_a_cpu_everything_stays():
    model = tiny_model("llama")
    kinds = [type(module) for module in model.modules()]
    assert not fuse_modules(model).modules and [type(module) for module in model.modules()] == kinds
    with meant_for(CARD):
        fuse_modules(model)
    with Operators() as seen:  # one that was built for a card, run here
        results(frozen_norms(model))
    assert not any(name.startswith("qlora_tool") for name in seen.counts)


def test_a_trained_norm_gets_its_gradient():
    model = tiny_model("llama").requires_grad_(False)
    model.model.norm.weight.requires_grad_()
    with meant_for(CARD):
        fuse_modules(model)
        model(input_ids=tokens()).logits.sum().backward()
    plain = tiny_model("llama")
    plain(input_ids=tokens()).logits.sum().backward()
    torch.testing.assert_close(model.model.norm.weight.grad, plain.model.norm.weight.grad)


def test_a_weight_in_a_wider_dtype_widens_as_it_did():
    model = tiny_model("llama").requires_grad_(False)
    with meant_for(CARD):
        fuse_modules(model)
        assert model.model.norm(torch.ones(1, 64, dtype=torch.bfloat16)).dtype == torch.float32


class Centered(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(64)), 1e-6

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class AnotherEpsilon(Centered):
    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 2 * self.eps)).to(x.dtype)


def test_what_is_not_quite_an_rms_norm_is_left_alone():
    assert norm_of(nn.RMSNorm(64, eps=1e-6)) == (NormKind(0.0, rounds=False), 1e-6)
    assert norm_of(nn.LayerNorm(64)) is None and norm_of(nn.LayerNorm(64, bias=False)) is None
    assert norm_of(Centered()) is None and norm_of(AnotherEpsilon()) is None
    assert norm_of(nn.Linear(64, 1)) is None and norm_of(nn.Identity()) is None


@pytest.mark.parametrize(("family", "kind"), [
    ("llama", NormKind(0.0, rounds=True)), ("gemma", NormKind(1.0, rounds=False)),
    ("olmo2", NormKind(0.0, rounds=False)),
])  # fmt: skip
def test_a_familys_norm_is_told_by_its_numbers(family, kind):
    assert norm_of(tiny_model(family).model.norm).kind == kind


def test_rotations_are_told_by_their_numbers():
    from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as by_pairs
    from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as partly
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as by_halves
    from transformers.models.olmo2.modeling_olmo2 import apply_rotary_pos_emb as narrowing

    assert rotation_of(by_pairs) is None
    assert [(one.partly, one.narrows) for one in map(rotation_of, (by_halves, partly, narrowing))] == [
        (False, False), (True, False), (False, True)
    ]  # fmt: skip


def test_the_familys_function_runs_where_the_operation_does_not_fit():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    rotation = rotation_of(apply_rotary_pos_emb)
    q, k, cos, sin = (torch.randn(1, 2, 5, 8), torch.randn(1, 1, 5, 8), *torch.randn(2, 1, 5, 8))
    with meant_for(CARD):
        for arguments in ((q.double(), k.double(), cos, sin), (q.bfloat16(), k.bfloat16(), cos, sin)):
            for one, other in zip(rotation(*arguments), apply_rotary_pos_emb(*arguments), strict=True):
                assert torch.equal(one, other) and one.dtype == other.dtype
