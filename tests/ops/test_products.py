"""Products by either library, and which is taken."""

from __future__ import annotations

from datetime import datetime, timezone

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_tool.memory.trace.tracer import Tracer
from qlora_tool.ops import products, speeds
from qlora_tool.ops.declare import CPU, Target, meant_for
from qlora_tool.ops.products import (
    ONEDNN,
    PYTORCH,
    matmul,
    matmul_add,
    products_choice,
    scaled_matmul,
    use_products,
)
from qlora_tool.ops.speeds import has_onednn


@pytest.fixture(params=[ONEDNN, PYTORCH])
def library(request):
    if request.param == ONEDNN and not has_onednn():
        pytest.skip("this PyTorch has no oneDNN")
    use_products(request.param)
    yield request.param
    use_products(None)


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


@pytest.mark.parametrize("target", [CPU, Target("cuda", (9, 0))])
@pytest.mark.parametrize("into", [False, True])
def test_scaled_products_are_right(library, into, target):
    left, right, whole = normal(33, 16), normal(50, 16).T, torch.full((33, 70), torch.nan)
    with meant_for(target):
        found = scaled_matmul(left, right, 0.3, whole[:, 10:60] if into else None)
    expected = 0.3 * (left.double() @ right.double())
    bound = 20 * torch.finfo(torch.float32).eps * (left.double().abs() @ right.double().abs())
    assert ((found.double() - expected).abs() <= bound).all()
    if into:
        assert torch.equal(whole[:, 10:60], found) and whole[:, :10].isnan().all() and whole[:, 60:].isnan().all()


def test_products_are_bit_for_bit_the_librarys(library):
    """The wrapping changes nothing."""
    left, right, to = normal(64, 256), normal(512, 256).T, normal(64, 512)
    if library == ONEDNN:
        direct = torch.ops.mkldnn._linear_pointwise(left, right.T, None, "none", [], "")
        added = torch.ops.mkldnn._linear_pointwise.binary(left, to, right.T, None, "add")
    else:
        direct, added = torch.mm(left, right), torch.addmm(to, left, right)
    assert torch.equal(matmul(left, right), direct)
    assert torch.equal(matmul_add(left, right, to), added)


def test_products_have_shapes_without_data(library):
    with FakeTensorMode():
        left, right, to = torch.empty(2, 3), torch.empty(4, 3).T, torch.empty(2, 4)
        assert matmul(left, right).shape == matmul_add(left, right, to).shape == (2, 4)


# --------------------------------------------------------------------------------------------------------- the choice


@pytest.fixture
def nothing_chosen(tmp_path, monkeypatch):
    """As in a new process with an empty cache."""
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(tmp_path))
    use_products(None)
    yield
    use_products(None)


def measured(monkeypatch, ratio: float) -> list[float]:
    """Measuring finds this; gives what grows by one each time."""
    times: list[float] = []

    def measure() -> speeds.Speeds:
        times.append(ratio)
        torch.ones(1000).sum()  # what a watcher must not see
        gflops = {"float32": 100.0, "float32 oneDNN": 100 * ratio, "bfloat16": 1.0}
        date = datetime.now(timezone.utc).isoformat()
        return speeds.Speeds(date, torch.get_num_threads(), gflops, gflops, ratio, 0.05, 0.95)

    monkeypatch.setattr(speeds, "measure", measure)
    return times


def test_a_process_chooses_once_and_unseen(nothing_chosen, monkeypatch):
    times = measured(monkeypatch, 1.6)
    with Tracer() as tracer, FakeTensorMode():
        assert products_choice() == products_choice() == ONEDNN
    assert len(times) == 1 and not tracer.trace.storages
    monkeypatch.setattr(speeds, "known_speeds", lambda: pytest.fail("measured or read again"))
    assert products_choice() == ONEDNN


@pytest.mark.skipif(not has_onednn(), reason="this PyTorch has no oneDNN")
def test_a_resumed_run_takes_the_choice_it_was_begun_with(nothing_chosen, monkeypatch):
    measured(monkeypatch, 0.5)
    written = []
    for choice in (ONEDNN, PYTORCH):
        use_products(choice)
        written.append(products_choice())
    assert written == [ONEDNN, PYTORCH]
    use_products(None)
    assert products_choice() == PYTORCH  # as measured
    with pytest.raises(ValueError, match="'MKL': expected PyTorch or oneDNN"):
        use_products("MKL")


def test_onednn_written_elsewhere_is_not_asked_of_a_torch_without(nothing_chosen, monkeypatch):
    monkeypatch.setattr(speeds, "has_onednn", lambda: False)
    use_products(ONEDNN)
    assert products_choice() == PYTORCH


# ---------------------------------------------------------------------------------------- what training sees of it


LARGE = (256, 512, 2048)  # 2·256·512·2048 = 5.4e8 operations


def multiply(times: int, shape: tuple[int, int, int] = LARGE) -> None:
    left, right = torch.ones(shape[0], shape[1]), torch.ones(shape[1], shape[2])
    for _ in range(times):
        matmul(left, right)


@pytest.mark.parametrize(("share", "again"), [(0.5, True), (0.7, False)])
def test_a_run_that_is_far_slower_has_the_next_process_measure_again(nothing_chosen, monkeypatch, share, again):
    times = measured(monkeypatch, 0.5)
    assert products_choice() == PYTORCH  # at 100 GFLOP/s
    clock = iter(range(10**6))
    work = 2e-9 * LARGE[0] * LARGE[1] * LARGE[2]
    monkeypatch.setattr(products, "speed_check", products.SpeedCheck(passed_over=3, timed=5))
    monkeypatch.setattr(products.time, "perf_counter", lambda: next(clock) * work / (100 * share))
    multiply(50, (256, 64, 2048))  # LoRA's own are narrow
    multiply(7)
    assert not speeds.known_speeds().in_training
    multiply(1)
    assert products_choice() == PYTORCH and len(times) == 1  # this process goes on as it began
    assert speeds.known_speeds().choice == PYTORCH
    assert len(times) == 1 + again  # and the next one measured
    multiply(20)  # no more is timed
    assert next(clock) <= 12


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_a_product_is_one_operation_to_whoever_watches(library):
    with Operators() as seen:
        matmul(torch.ones(2, 3), torch.ones(3, 4))
    assert [name for name in seen.names if "ones" not in name] == ["qlora_tool::matmul"]
