"""What is recomputed in backward: the same gradients whatever it is, and nothing that nobody needs."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from tiny_models import tiny_config, tokens, write_tiny

from qlora_tool.adapters.attach import attach
from qlora_tool.config import AdapterConfig
from qlora_tool.errors import UserError
from qlora_tool.model.behaviour import behaviour_of
from qlora_tool.model.causal_lm import CausalLM
from qlora_tool.model.checkpointing import (
    ALL_RECOMPUTED,
    NOTHING_RECOMPUTED,
    Recomputation,
    checkpointed_modules,
    choices_of,
    decoder_layers,
    recomputable_children,
)
from qlora_tool.model.load import load_base
from qlora_tool.model.slots import Quantization
from qlora_tool.model.source import read_model_config
from qlora_tool.ops.loss import linear_cross_entropy
from qlora_tool.weights.handles import WeightHandle

BOTH, ATTENTION, MLP = ("self_attn", "mlp"), ("self_attn",), ("mlp",)


def adapted(family: str, folder, dropout: float = 0.0, **changes):
    """A tiny model with adapters whose B is not zero, in training."""
    write_tiny(family, folder, **changes)
    quantization = Quantization("nf4", False)
    module = load_base(folder, read_model_config(folder), quantization, torch.device("cpu"), torch.float32)
    adapters = attach(module, AdapterConfig(r=4, lora_dropout=dropout), torch.float32, seed=0)
    generator = torch.Generator().manual_seed(1)
    for layer in adapters.layers.values():
        layer.lora_B.data.copy_(0.1 * torch.randn(layer.lora_B.shape, generator=generator))
    module.train()
    return CausalLM(module, folder, quantization, torch.float32), adapters


def gradients(model, adapters) -> list[torch.Tensor]:
    """Of one pass, with the same random numbers each time."""
    torch.manual_seed(3)
    for parameter in adapters.parameters():
        parameter.grad = None
    ids = tokens(2, 12)
    hidden = model.module.base_model(input_ids=ids, use_cache=False)[0].flatten(0, 1)
    linear_cross_entropy(hidden, ids.flatten(), model.project).backward()
    return [parameter.grad for parameter in adapters.parameters()]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "gpt2", "opt", "phi", "phimoe", "deepseek_v3"])
def test_gradients_are_the_same_whatever_is_recomputed(family, dropout, tmp_path):
    model, adapters = adapted(family, tmp_path, dropout)
    model.checkpoint_layers(False)
    expected = gradients(model, adapters)
    assert all(gradient.abs().max() > 0 for gradient in expected)
    layers = list(decoder_layers(model.module).values())
    for first in choices_of(layers[0]):
        for second in choices_of(layers[1]):
            model.checkpoint_layers(Recomputation((first, second)))
            found = gradients(model, adapters)
            assert all(map(torch.equal, found, expected)), (first, second)


@pytest.mark.parametrize(("family", "noise"), [("mixtral", {"router_jitter_noise": 0.3}), ("phimoe", {})])
def test_what_a_family_draws_itself_is_drawn_again(family, noise, tmp_path):
    """Noise before a router, and phimoe's choice of experts, whatever its settings are called."""
    assert behaviour_of(tiny_config(family, **noise)).draws
    model, adapters = adapted(family, tmp_path, **noise)
    model.checkpoint_layers(False)
    expected = gradients(model, adapters)
    torch.manual_seed(4)
    model.checkpoint_layers(True)
    assert all(map(torch.equal, gradients(model, adapters), expected))


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "lfm2"])
def test_where_nothing_is_drawn_no_state_is_kept(family):
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if family == "gpt2" else {}
    assert not behaviour_of(tiny_config(family, **quiet)).draws
    if family == "gpt2":
        assert behaviour_of(tiny_config(family)).draws


@pytest.mark.parametrize(
    ("family", "children"),
    [("llama", BOTH), ("mixtral", BOTH), ("gpt2", ("attn", "mlp")), ("opt", ATTENTION),
     ("gpt_neox", ("attention", "mlp"))],
)  # fmt: skip
def test_children_are_found_by_what_they_hold(family, children, tmp_path):
    """OPT's fc1 and fc2 are linear modules of the layer itself: recomputing one alone would save nothing."""
    model, _ = adapted(family, tmp_path)
    layer, _ = decoder_layers(model.module).values()
    assert recomputable_children(layer) == children
    choices = choices_of(layer)
    assert choices[0] == ALL_RECOMPUTED and choices[-1] == NOTHING_RECOMPUTED
    assert len(choices) == len(set(choices)) == 1 + 2 ** len(children)


@pytest.mark.parametrize(
    ("children", "expected"),
    [
        # Of all that a layer computes, only what its last product gives is not needed in backward.
        (ALL_RECOMPUTED, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}),
        # What a child gives is stored, so neither is o_proj's.
        (BOTH, {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}),
        (ATTENTION, {"q_proj", "k_proj", "v_proj"}),
        (MLP, {"gate_proj", "up_proj"}),
        (NOTHING_RECOMPUTED, set()),
    ],
)
@pytest.mark.parametrize("dropout", [0.0, 0.2])  # fused, and not
def test_no_product_is_recomputed_that_nobody_needs(children, expected, dropout, tmp_path, monkeypatch):
    model, adapters = adapted("llama", tmp_path, dropout)
    recomputing, asked, dense = [], Counter(), WeightHandle.dense
    names = {module: name.removesuffix(".weight").rpartition(".")[2] for name, module in model.module.named_modules()
             if isinstance(module, WeightHandle)}  # fmt: skip

    @contextmanager
    def around():
        recomputing.append(True)
        try:
            yield
        finally:  # recomputation ends early, by an exception
            recomputing.pop()

    def counted(self, *rest):
        asked.update([names[self]] if recomputing else [])
        return dense(self, *rest)

    monkeypatch.setattr(WeightHandle, "dense", counted)
    model.checkpoint_layers(Recomputation.uniform(children, 2), around)
    gradients(model, adapters)
    assert asked == dict.fromkeys(expected, 2)
    assert not recomputing


def test_another_policy_takes_the_place_of_the_one_before(tmp_path):
    model, _ = adapted("llama", tmp_path)
    layers = list(decoder_layers(model.module).values())
    before = [dict(vars(module)) for module in model.module.modules()]
    model.checkpoint_layers(Recomputation((BOTH, ALL_RECOMPUTED)))
    assert checkpointed_modules(model.module) == [layers[0].self_attn, layers[0].mlp, layers[1]]
    model.checkpoint_layers(Recomputation((ALL_RECOMPUTED, MLP)))
    assert model.checkpointed_layers() == [layers[0], layers[1].mlp]
    assert model.recomputation == Recomputation((ALL_RECOMPUTED, MLP))
    model.checkpoint_layers(True)
    assert model.checkpointed_layers() == layers
    model.checkpoint_layers(False)
    assert model.checkpointed_layers() == []
    assert model.recomputation == Recomputation((NOTHING_RECOMPUTED, NOTHING_RECOMPUTED))
    for module, earlier in zip(model.module.modules(), before, strict=True):
        assert vars(module).get("forward") is earlier.get("forward")  # a fused one is there again


def test_nothing_is_recomputed_in_evaluation(tmp_path):
    model, _ = adapted("llama", tmp_path)

    def refuse():
        raise AssertionError("checkpointed")

    model.checkpoint_layers(Recomputation((BOTH, ATTENTION)), refuse)
    with pytest.raises(AssertionError, match="checkpointed"):
        model.module(input_ids=tokens(1, 4))
    model.module.eval()
    model.module(input_ids=tokens(1, 4))


def test_a_model_without_layers_to_recompute(tmp_path):
    model, _ = adapted("llama", tmp_path)
    model.module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model.module.config = read_model_config(tmp_path)
    with pytest.raises(
        UserError, match=r"llama has no layers that can be recomputed; set .*gradient_checkpointing: false"
    ):
        model.checkpoint_layers(True)
    model.checkpoint_layers(False)
    assert model.recomputation == Recomputation(())


def test_a_policy_of_another_depth_is_refused(tmp_path):
    model, _ = adapted("llama", tmp_path)
    with pytest.raises(ValueError, match="shorter"):
        model.checkpoint_layers(Recomputation((ALL_RECOMPUTED,)))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ((NOTHING_RECOMPUTED,) * 3, "nothing recomputed"),
        ((ALL_RECOMPUTED,) * 3, "everything recomputed"),
        ((ALL_RECOMPUTED, ALL_RECOMPUTED, MLP, BOTH, NOTHING_RECOMPUTED),
         "1 of 5 layers not recomputed, 1 with mlp recomputed, 1 with self_attn and mlp recomputed, 2 recomputed"),
    ],
)  # fmt: skip
def test_a_policy_in_words(layers, expected):
    assert str(Recomputation(layers)) == expected
