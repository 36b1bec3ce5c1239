"""How far two models agree, on distributions whose divergence is known."""

from __future__ import annotations

import math

import pytest
import torch

from qlora_tool.export.verify import Agreement, compare

ROWS = [[0, 1, 0], [1, 1]]


def model_of(*probabilities: list[float]):
    """A model whose next-token distribution depends on the token alone; its logits are off by a constant."""
    table = torch.tensor(probabilities).log() + 3.0
    return lambda ids: table[ids]


def test_a_model_agrees_with_itself():
    model = model_of([0.5, 0.25, 0.25], [0.1, 0.2, 0.7])
    found = compare(ROWS, model, model, max_tokens=100)
    assert found == Agreement(5, pytest.approx(0, abs=1e-12), pytest.approx(0, abs=1e-12), 1.0)


def test_divergence_is_from_the_live_model_and_by_token():
    live = model_of([0.5, 0.25, 0.25], [0.1, 0.2, 0.7])
    exported = model_of([0.25, 0.5, 0.25], [0.1, 0.2, 0.7])
    kl = 0.5 * math.log(2) + 0.25 * math.log(0.5)  # Σ p·log(p/q) after token 0; none after token 1
    found = compare(ROWS, live, exported, max_tokens=100)
    assert found == Agreement(5, pytest.approx(2 * kl / 5, rel=1e-5), pytest.approx(kl, rel=1e-5), 3 / 5)


def test_no_more_tokens_than_asked_for():
    seen = []
    model = model_of([0.5, 0.5], [0.5, 0.5])

    def live(ids):
        seen.append(ids.tolist())
        return model(ids)

    assert compare([*ROWS, [0, 0, 0]], live, model, max_tokens=4).tokens == 4
    assert seen == [[[0, 1, 0]], [[1]]]
