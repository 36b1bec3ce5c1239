"""What one layer holds while its gradients are made, for every method: less than one matrix of the weight's size."""

from __future__ import annotations

import pytest
import torch
from one_layer import Live, frozen_linear, noise, trained

from qlora_tool.methods import METHODS, loha
from qlora_tool.methods.method import Settings

OUT, IN, R = 512, 384, 3
WEIGHT = OUT * IN * 4  # bytes


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.has_delta])
def test_no_gradient_of_the_weights_size_is_made(method: str, monkeypatch: pytest.MonkeyPatch):
    """LoHa's update has to be made, so it is made in pieces; the same bound then holds for it."""
    monkeypatch.setattr(loha, "CHUNK", OUT * IN // 16)
    linear = frozen_linear(OUT, IN)
    adapter = trained(method, linear, Settings(R, 4.0))
    x = noise(3, IN, seed=6).requires_grad_()
    with Live() as live:
        adapter(x, linear).sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    assert live.peak < WEIGHT / 2
    weight = linear.weight.dense(torch.float32)
    with Live() as live:
        torch.nn.functional.linear(x, adapter.delta(weight) + weight).sum().backward()
    assert live.peak > WEIGHT  # as it is where the merged weight is made: what no layer may do
