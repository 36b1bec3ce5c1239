"""Recurrent and convolution layers in packed rows: what each example gives there is what it gives alone."""

from __future__ import annotations

import pytest
import torch
from tiny_models import relative_error, tiny_model

from qlora_tool.data.batches import collate
from qlora_tool.data.tokenize import Example
from qlora_tool.model.behaviour import behaviour_of
from qlora_tool.model.by_example import keep_mixers_apart
from qlora_tool.model.causal_lm import CausalLM
from qlora_tool.model.layout import Layout
from qlora_tool.model.slots import Quantization

LENGTHS = ((9, 24, 5), (11, 13))
HYBRIDS = ("lfm2", "qwen3_next", "qwen3_5_text", "bamba", "falcon_h1", "mamba2", "mamba", "jamba", "recurrent_gemma",
           "granitemoehybrid", "nemotron_h", "zamba2")  # fmt: skip


def examples() -> list[list[Example]]:
    drawn = torch.Generator().manual_seed(0)
    rows = [[torch.randint(3, 131, (length,), generator=drawn).tolist() for length in row] for row in LENGTHS]
    return [[Example(one, one, "here") for one in row] for row in rows]


def model_of(family: str) -> CausalLM:
    torch.manual_seed(0)  # what a family draws by itself, and `tiny_model` only adds to
    module = tiny_model(family)
    for name, parameter in module.named_parameters():
        if name.endswith("A_log"):  # decays of a size that lets something of the past through
            parameter.data.clamp_(-1, 1)
    plainly = behaviour_of(module.config).projects_plainly
    return CausalLM(module, ".", Quantization("none"), torch.float32, projects_plainly=plainly)


@pytest.mark.parametrize("family", HYBRIDS)
def test_loss_and_gradients_are_those_of_the_examples_alone(family):
    model, rows = model_of(family), examples()
    assert behaviour_of(model.config).keeps_apart == "segments"
    assert keep_mixers_apart(model.module)
    weight = model.module.get_input_embeddings().weight
    found = model.loss_sum(collate(rows, pad_token_id=0, packing=True))
    found.backward()
    gradient = weight.grad.clone()
    plain, weight = model_of(family), None
    expected = 0.0
    for example in (one for row in rows for one in row):
        ids = torch.tensor([example.input_ids])
        logits = plain.module(input_ids=ids, use_cache=False).logits[0, :-1]
        expected += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
    expected.backward()
    assert abs(found / expected - 1) < 1e-5
    assert relative_error(gradient, plain.module.get_input_embeddings().weight.grad) < 1e-4


@pytest.mark.parametrize("family", ["lfm2", "mamba2"])
def test_recomputed_layers_know_where_the_examples_are(family):
    gradients = []
    for recomputed in (False, True):
        model = model_of(family)
        keep_mixers_apart(model.module)
        model.module.train()
        model.checkpoint_layers(recomputed)
        model.loss_sum(collate(examples(), pad_token_id=0, packing=True)).backward()
        gradients.append(model.module.get_input_embeddings().weight.grad)
    assert relative_error(*gradients) < 1e-6


@torch.no_grad()
def test_it_would_be_noticed():
    """Without it the second example sees the first."""
    model, rows = model_of("lfm2"), examples()
    loss = model.loss_sum(collate(rows, pad_token_id=0, packing=True))
    keep_mixers_apart(model.module)
    assert abs(loss / model.loss_sum(collate(rows, pad_token_id=0, packing=True)) - 1) > 1e-4


def test_examples_of_about_one_length_go_together():
    layout = Layout(1, 14, (3, 5, 4, 2), padding=frozenset({3}))
    groups, back = layout.places(torch.device("cpu"))
    assert [group.tolist() for group in groups] == [[[0, 1, 2, 2], [8, 9, 10, 11]], [[3, 4, 5, 6, 7]]]
    flat = torch.cat([group.flatten() for group in groups])
    assert flat[back[:12]].tolist() == list(range(12))
