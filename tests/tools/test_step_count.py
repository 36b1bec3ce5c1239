"""What a 7B's step on a card launches and moves, counted on two of its layers and on four: limits that hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from measuring.memory_cuda import CONFIGURATIONS
from measuring.step_count import class_of, counted

LAYERS = 32


def shallow(layers: int, keeps_weights: bool = False) -> dict[str, Any]:
    one = CONFIGURATIONS["llama-7b-4x1024"]
    return counted(replace(one, model=one.model | {"num_hidden_layers": layers}).step(), keeps_weights)


@pytest.fixture(scope="module")
def counts() -> tuple[dict[str, Any], dict[str, Any]]:
    return shallow(2), shallow(4)


def of_all(counts: tuple[dict[str, Any], dict[str, Any]], key: str) -> dict[str, float]:
    """By class, of all layers: each adds what the third and the fourth add."""
    two, four = (found[key] for found in counts)
    return {kind: two[kind] + (LAYERS - 2) / 2 * (four[kind] - two[kind]) for kind in two}


def test_products_are_those_of_the_model(counts):
    """By hand, a layer's products with its seven weights: seven forward, six once more (the last is not needed), seven
    backward; LoRA's, of which q, k and v share one with the A's and gate and up another: 4 + 7, 3 + 6, and backward
    7 into z, 4 out of it, 7 for B and 4 for A, one of them with h = act(gate) ∘ up anew."""
    two, four = (found["launches"]["products"] for found in counts)
    assert (four - two) / 2 == (7 + 6 + 7) + (4 + 7) + (3 + 6) + (7 + 4 + 7 + 4 + 1)


def test_launches_bytes_passes_and_waits(counts):
    launches, moved = of_all(counts, "launches"), of_all(counts, "bytes")
    assert sum(launches.values()) < 15_000 / 3
    assert moved["elementwise"] / LAYERS < 4.5e9
    assert launches["dequantization"] / (7 * LAYERS) < 2.9
    assert launches["optimizer"] < 16
    assert [found["waits"] for found in counts] == [{}, {}]
    assert [found["weights"] for found in counts] == [14, 28]


def test_kept_weights_are_made_twice_and_not_three_times():
    """Forward, and in the recomputation or, down's, in backward."""
    found = shallow(2, keeps_weights=True)
    assert found["dequantizations"] == 2 * 14 == 2 * found["weights"]


def test_classes():
    found = [class_of(*pair) for pair in (
        ("aten::addmm_", "forward"), ("qlora_tool::matmul", "backward"), ("qlora_tool::dequantize_int8", "forward"),
        ("torch_attn::_varlen_attn", "forward"), ("aten::mul", "backward"), ("aten::mul", "optimizer"),
    )]  # fmt: skip
    assert found == ["products", "products", "dequantization", "attention", "elementwise", "optimizer"]
