"""Products by either library, and which is taken."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qlora_tool.ops import products
from qlora_tool.ops.products import ONEDNN, matmul, matmul_add


@pytest.fixture(params=[True, False], ids=["oneDNN", "BLAS"])
def library(request, monkeypatch):
    if request.param and not products.has_onednn():
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: request.param)
    return request.param


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", [(5, 7, 3), (1, 64, 1), (33, 16, 50), (0, 4, 3)])
def test_products_are_right(library, shape, turned, dtype):
    n, k, m = shape
    left, right, to = normal(n, k, dtype=dtype), normal(k, m, dtype=dtype), normal(n, m, dtype=dtype)
    if turned:
        left, right = left.T.contiguous().T, right.T.contiguous().T
    expected = left.double() @ right.double()
    bound = (k + 2) * torch.finfo(dtype).eps * (left.double().abs() @ right.double().abs() + to.double().abs())
    found = matmul(left, right)
    assert found.dtype == dtype and ((found.double() - expected).abs() <= bound).all()
    exact = to.double() + expected
    assert ((matmul_add(left, right, to).double() - exact).abs() <= bound).all()


def test_the_library_is_what_was_measured(library, monkeypatch):
    taken = []
    monkeypatch.setattr(products, "onednn_matmul", lambda left, right: taken.append(left.dtype) or left @ right)
    matmul(normal(4, 4), normal(4, 4))
    matmul(normal(4, 4, dtype=torch.bfloat16), normal(4, 4, dtype=torch.bfloat16))
    assert taken == ([torch.float32] if library else [])


def test_products_have_shapes_without_data(library):
    with FakeTensorMode():
        left, right, to = torch.empty(2, 3), torch.empty(4, 3).T, torch.empty(2, 4)
        assert matmul(left, right).shape == matmul_add(left, right, to).shape == (2, 4)


@pytest.mark.parametrize(("speed", "faster"), [(200.0, True), (110.0, False), (50.0, False), (0.0, False)])
def test_onednn_has_to_be_clearly_faster(monkeypatch, speed, faster):
    monkeypatch.setattr(products, "kept_measurement", lambda: {"float32": 100.0, ONEDNN: speed, "bfloat16": 1.0})
    assert products.onednn_is_faster.__wrapped__() is faster


@pytest.mark.skipif(
    not products.has_onednn() or torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="oneDNN packs in panels of 64 columns where it has AVX-512",
)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", [(256, 64, 128), (64, 100, 100), (40, 1536, 576), (40, 512, 512)])
def test_the_workspace_of_onednn_is_predicted(monkeypatch, shape, turned):
    """What the allocator hands out in one product beside its result."""
    from torch.profiler import ProfilerActivity, profile

    n, k, m = shape
    left, right = normal(n, k), normal(m, k).T if turned else normal(k, m)
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    matmul(left, right)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        matmul(left, right)
    taken = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    beside = sum(size for size in taken if size > 0) - 4 * n * m
    assert products.onednn_workspace(right.T) == pytest.approx(beside, abs=128)
