"""Predictions are held against the allocator to the byte, with PyTorch's own products: oneDNN's workspace, which no
tracer sees on the inside, has a test of its own (tests/ops/test_products.py)."""

from __future__ import annotations

import pytest

from qlora_tool.memory.trace import extrapolate
from qlora_tool.ops.products import PYTORCH, use_products


@pytest.fixture(autouse=True, scope="module")
def own_products():
    use_products(PYTORCH)
    yield
    use_products(None)


@pytest.fixture(autouse=True)
def traced_anew():
    """Which models are traced does not depend on the tests before; some put another `predict` there, too."""
    extrapolate._trace.cache_clear()
