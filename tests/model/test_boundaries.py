"""Checkpoint boundaries that wait in host memory: the same gradients, and nothing left where it was."""

from __future__ import annotations

import weakref
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qlora_tool.model import boundaries
from qlora_tool.model.boundaries import HostBoundaries

RUN = partial(checkpoint, use_reentrant=False)
WIDTH = 8


class Layer(nn.Module):
    """Notes what it is given, without keeping it."""

    def __init__(self, seed: int, given: list):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed)))
        self.given = given

    def forward(self, x: Tensor) -> Tensor:
        self.given.append(weakref.ref(x))
        return torch.tanh(x @ self.weight)


def stack(count: int, device: str = "cpu"):
    given: list = []
    layers = [Layer(seed, given).to(device) for seed in range(count)]
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(9)).to(device).requires_grad_()
    return layers, given, x


def gradients(layers, x: Tensor, run) -> list[Tensor]:
    for layer in layers:
        layer.weight.grad = None
    y = x * 2
    for layer in layers:
        y = run(layer, y)
    y.sum().backward()
    return [layer.weight.grad for layer in layers]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_gradients_are_the_same_step_after_step(count, device):
    layers, _, x = stack(count, device)
    expected = gradients(layers, x, RUN)
    offloading = HostBoundaries(RUN, torch.device(device), smallest=1)
    for _ in range(3):
        for found, wanted in zip(gradients(layers, x, offloading), expected, strict=True):
            assert torch.equal(found, wanted)


def test_all_but_the_last_boundary_leave_and_none_outlives_its_use():
    layers, given, x = stack(4)
    offloading = HostBoundaries(RUN, torch.device("cpu"), smallest=1)
    y = x * 2
    for layer in layers:
        y = offloading(layer, y)
    assert [ref() is not None for ref in given] == [False, False, False, False]  # the last: a detached view of it
    latest, hosts = offloading._latest, []
    assert latest.tensor is not None and latest.host is None
    while (latest := latest.before) is not None:
        hosts.append(latest.host)
        assert latest.tensor is None
    assert len(hosts) == 3
    y.sum().backward()
    assert offloading._latest.tensor is offloading._latest.host is offloading._latest.before is None


def test_small_tensors_and_parameters_stay(monkeypatch):
    moved = []
    monkeypatch.setattr(boundaries._Boundary, "move", lambda self: moved.append(self))
    layers, _, x = stack(3)
    offloading = HostBoundaries(RUN, torch.device("cpu"), smallest=4 * WIDTH * 4 + 1)
    gradients(layers, x, offloading)
    assert not moved and offloading._latest is None
    gradients(layers, x, HostBoundaries(RUN, torch.device("cpu"), smallest=4 * WIDTH * 4))
    assert len(moved) == 2
