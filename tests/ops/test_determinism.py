"""Deterministic kernels: while they are asked for, and in a line where there is none."""

import pytest
import torch

from qlora_tool.errors import UserError
from qlora_tool.ops.determinism import full_determinism


def state() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory


def test_only_meanwhile(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = state()
    with full_determinism(False):
        assert state() == before
    with pytest.raises(ValueError, match="mine"), full_determinism(True):
        assert state() == (True, False)
        raise ValueError("mine")
    assert state() == before


def test_an_operation_without_one_is_named():
    """PyTorch's own refusal, of an operation that has none on a CPU either."""
    with pytest.raises(UserError) as error, full_determinism(True):
        torch.empty(3).put_(torch.tensor([1, 1]), torch.ones(2))
    (line,) = error.value.lines
    assert line.startswith("training.full_determinism: put_ does not have a deterministic implementation, which this")
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match="something else"), full_determinism(True):
        raise RuntimeError("something else")
