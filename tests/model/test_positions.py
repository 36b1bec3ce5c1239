"""Rotary embeddings whose frequencies depend on a length: each example has those that it has alone."""

from __future__ import annotations

import pytest
import torch
from tiny_models import relative_error, tiny_model

from qlora_tool.data.batches import collate
from qlora_tool.data.tokenize import Example
from qlora_tool.model.causal_lm import CausalLM
from qlora_tool.model.positions import rotate_by_example
from qlora_tool.model.slots import Quantization

# Trained on 16 positions; the frequencies of two of the examples are others.
ROPE = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "longrope": {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16,
                 "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [1.0 + 0.9 * i for i in range(8)]},
}  # fmt: skip
LENGTHS = (9, 24, 5, 40, 13)


def model_of(kind: str) -> CausalLM:
    if kind == "longrope":
        module = tiny_model("phi3", rope_parameters=ROPE[kind], original_max_position_embeddings=16)
    else:
        module = tiny_model("llama", rope_parameters=ROPE[kind], max_position_embeddings=16)
    return CausalLM(module, ".", Quantization("none"), torch.float32)


def examples(*lengths: int) -> list[Example]:
    drawn = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 131, (length,), generator=drawn).tolist() for length in lengths]
    return [Example(one, one, "here") for one in ids]


@torch.no_grad()
def alone(kind: str, example: Example) -> torch.Tensor:
    """In plain transformers, by a model that saw nothing before."""
    return model_of(kind).module.model(input_ids=torch.tensor([example.input_ids]), use_cache=False)[0][0]


@pytest.mark.parametrize("kind", ROPE)
@torch.no_grad()
def test_packed_examples_have_the_frequencies_that_they_have_alone(kind):
    model, rows = model_of(kind), examples(*LENGTHS)
    rotate_by_example(model.module)
    packed = model.hidden_states(collate([rows[:3], rows[3:]], pad_token_id=0, packing=True))
    states = [*packed[0, :38].split(LENGTHS[:3]), *packed[1, :53].split(LENGTHS[3:])]
    for found, example in zip(states, rows, strict=True):
        assert relative_error(found, alone(kind, example)) < 1e-5


@pytest.mark.parametrize("kind", ROPE)
@torch.no_grad()
def test_nothing_is_left_of_a_longer_batch(kind):
    model, (short, long) = model_of(kind), examples(20 if kind == "dynamic" else 12, 60)
    expected = alone(kind, short)
    rotate_by_example(model.module)
    for example in (long, short):
        found = model.hidden_states(collate([[example]], pad_token_id=0, packing=False))[0]
    assert relative_error(found, expected) < 1e-5


@torch.no_grad()
def test_it_would_be_noticed():
    """Without it a long example in the batch changes a short one."""
    model, rows = model_of("longrope"), examples(9, 24)
    packed = model.hidden_states(collate([rows], pad_token_id=0, packing=True))[0, :9]
    assert relative_error(packed, alone("longrope", rows[0])) > 1e-3


def test_other_embeddings_stay_as_they_are():
    model = tiny_model("llama")
    before = type(model.model.rotary_emb)
    assert rotate_by_example(model) == [] and type(model.model.rotary_emb) is before
