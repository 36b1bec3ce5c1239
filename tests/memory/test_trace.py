"""The tracer: births and deaths, whose they are, and what a dispatch mode changes that must be undone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from itertools import accumulate

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import checkpoint

from qlora_tool.memory.trace.measure import allocations
from qlora_tool.memory.trace.tracer import Storage, Trace, Tracer

N = 1000  # values of a tensor
BYTES = 4 * N


def living(trace: Trace) -> list[Storage]:
    return [storage for storage in trace.storages if storage.death is None]


# ----------------------------------------------------------------------------------------------- births and deaths


@pytest.mark.parametrize("world", [nullcontext, FakeTensorMode], ids=["real", "fake"])
def test_a_storage_is_born_once_and_dies_with_its_last_tensor(world):
    with world(), Tracer() as tracer:
        x = torch.ones(N)
        view = x.view(10, -1)[2:]
        x.add_(1.0)
        del x
        assert [storage.nbytes for storage in living(tracer.trace)] == [BYTES]
        del view
        y = torch.zeros(N, dtype=torch.int8)
        del y
    first, second = tracer.trace.storages
    assert (first.birth, first.death, first.operator) == (0, 1, "aten::ones")
    assert (second.nbytes, second.birth, second.death) == (N, 2, 3)
    assert tracer.trace.events == [(first, 1), (first, -1), (second, 1), (second, -1)]


def test_results_of_several_tensors_are_all_seen():
    with Tracer() as tracer:
        values, indices = torch.ones(N).sort()
    assert [storage.nbytes for storage in tracer.trace.storages] == [BYTES, BYTES, 2 * BYTES]
    assert tracer.storage_of(values).operator == tracer.storage_of(indices).operator == "aten::sort"


def test_meta_and_empty_tensors_take_nothing():
    with Tracer() as tracer:
        kept = [torch.ones(N, device="meta"), torch.ones(0)]
    assert not tracer.trace.storages and len(kept) == 2


def test_a_tensor_from_before_is_unknown_until_it_is_adopted():
    x = torch.ones(N)
    with Tracer() as tracer:
        x.add_(1.0)
        assert tracer.storage_of(x) is None or tracer.storage_of(x).operator == "aten::add_"
    with Tracer() as tracer:
        life = tracer.adopt(x, "existing")
        assert tracer.adopt(x.view(-1)) is life is tracer.storage_of(x)
    assert (life.operator, life.nbytes) == ("existing", BYTES)


# ------------------------------------------------------------------------------------------- phases and modules


def test_what_is_born_and_dies_knows_its_phase_and_step():
    with Tracer() as tracer:
        with tracer.phase("forward", 1):
            x = torch.ones(N)
            with tracer.phase("backward"):
                inner = torch.ones(N)
            y = torch.ones(N)
        with tracer.phase("optimizer", 2):
            del x
    found = [(storage.phase, storage.step) for storage in tracer.trace.storages]
    assert found == [("forward", 1), ("backward", 1), ("forward", 1)]
    assert (tracer.trace.storages[0].died_in, tracer.trace.storages[0].died_in_step) == ("optimizer", 2)
    assert list(tracer.trace.phases()) == ["forward", "backward", "forward", "optimizer"]
    assert inner.shape == y.shape


def test_a_phase_goes_on_until_the_next_begins():
    with Tracer() as tracer:
        with tracer.phase("load", 0):
            weight = torch.ones(N)
        batch = torch.ones(N)
        for step in (1, 2):
            for phase in ("forward", "backward", "optimizer"):
                with tracer.phase(phase, step):
                    torch.ones(N)
            torch.ones(N)
    found = [(storage.phase, storage.step) for storage in tracer.trace.storages]
    assert found == [("load", 0)] * 2 + [
        (phase, step) for step in (1, 2) for phase in ("forward", "backward", "optimizer", "optimizer")
    ]
    assert weight.shape == batch.shape


def test_random_states_of_trials_are_not_the_runs():
    with Tracer() as tracer:
        kept = torch.get_rng_state()
        with _disable_current_modes():
            tried = torch.get_rng_state()
    assert [(storage.nbytes, storage.operator) for storage in tracer.trace.storages] == [(kept.nbytes, "get_rng_state")]
    assert torch.equal(tried, kept)


def test_the_end_of_the_process_is_no_part_of_the_run():
    with Tracer() as tracer:
        x = torch.ones(N)
        tracer.finish()
        del x
    [storage] = tracer.trace.storages
    assert tracer.trace.events == [(storage, +1)] and storage.death == 1


class Inner(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.exp()


class Outer(nn.Module):
    """Works before, in and after another module; the other may fail."""

    def __init__(self):
        super().__init__()
        self.inner = Inner()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x.sin())
        return x.cos()


def test_modules_are_followed_in_and_out():
    model = nn.Sequential(Outer())
    x = torch.ones(N)
    with Tracer() as tracer:
        tracer.follow_modules(model, [])
        model(x)
        x.tan()
    found = [(storage.operator, storage.module) for storage in tracer.trace.storages]
    assert found == [("aten::sin", "0"), ("aten::exp", "0.inner"), ("aten::cos", "0"), ("aten::tan", "")]


def test_a_module_that_fails_is_left_too(monkeypatch):
    model = nn.Sequential(Outer())
    monkeypatch.setattr(Inner, "forward", lambda self, x: x @ torch.ones(3, 3))
    with Tracer() as tracer:
        tracer.follow_modules(model, [])
        with pytest.raises(RuntimeError):
            model(torch.ones(2, 2))
        torch.ones(N)
    assert tracer.trace.storages[-1].module == ""


def test_what_goes_into_a_checkpointed_module_is_its_boundary():
    model = nn.Sequential(Outer(), Outer())
    with Tracer() as tracer:
        tracer.follow_modules(model, [model[1]])
        with tracer.phase("forward", 1):
            x = torch.ones(N)
            model(x)
        with tracer.phase("backward", 1):
            model(x)
    boundaries = [(storage.operator, storage.phase) for storage in tracer.trace.storages if storage.category]
    assert boundaries == [("aten::cos", "forward")]  # the first module's result, once


def test_a_checkpointed_region_is_recomputed_and_marked():
    with Tracer() as tracer:
        weight = torch.ones(N, requires_grad=True)
        with tracer.phase("forward", 1):
            y = checkpoint(lambda x: x.sin().exp().cos(), weight, use_reentrant=False,
                           context_fn=lambda: (nullcontext(), tracer.recomputation()))  # fmt: skip
            loss = y.sum()
        with tracer.phase("backward", 1):
            loss.backward()
    again = [storage.operator for storage in tracer.trace.storages if storage.recomputed]
    assert again == ["aten::sin", "aten::exp"]  # up to the last value that backward needs: cos keeps its input
    assert all(storage.phase == "backward" for storage in tracer.trace.storages if storage.recomputed)


# ------------------------------------- what a dispatch mode changes, held against the allocator of an untraced run


def gradient_of_a_leaf(x, w, again) -> torch.Tensor:
    return (x * w).sum()


def one_residual(x, w, again) -> torch.Tensor:
    h = x * w
    return (h + h.sin().exp()).sum()


def three_uses(x, w, again) -> torch.Tensor:
    h = x * w
    return (h.sin() + h.cos() + h.exp()).sum()


def many_residuals(x, w, again) -> torch.Tensor:
    h = x * w
    for _ in range(4):
        h = h + (h.sin() * w).tanh()
    return h.sum()


def norm_with_a_residual(x, w, again) -> torch.Tensor:
    h = x * w
    for _ in range(3):
        h = h + nn.functional.layer_norm(h, (h.shape[-1],)).exp()
    return h.sum()


def recomputed_residuals(x, w, again) -> torch.Tensor:
    h = x * w
    for _ in range(3):
        h = checkpoint(lambda h: h + (h.sin() * w).tanh(), h, use_reentrant=False,
                       context_fn=lambda: (nullcontext(), again()))  # fmt: skip
    return h.sum()


PROGRAMS = [gradient_of_a_leaf, one_residual, three_uses, many_residuals, norm_with_a_residual, recomputed_residuals]


BLOCK = 64 * 1024 * 4  # bytes of their tensors; statistics and scalars are smaller


def two_passes(program: Callable, tracer: Tracer | None = None) -> None:
    """Backward twice into the same gradient."""
    again = tracer.recomputation if tracer else nullcontext

    def during(phase: str):
        return tracer.phase(phase, 1) if tracer else nullcontext()

    x, w = torch.full((64, 1024), 0.5), torch.full((64, 1024), 0.5, requires_grad=True)
    for _ in range(2):
        with during("forward"):
            loss = program(x, w, again)
        with during("backward"):
            loss.backward()


@pytest.mark.parametrize("world", [nullcontext, FakeTensorMode], ids=["real", "fake"])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_gradients_take_what_an_untraced_run_takes(program, world):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        two_passes(program)
    measured = [size for _, size in sorted(allocations(profiler)) if abs(size) >= BLOCK]
    with world(), Tracer() as tracer:
        two_passes(program, tracer)
    traced = [sign * storage.nbytes for storage, sign in tracer.trace.events if storage.nbytes >= BLOCK]
    assert Counter(traced) == Counter(measured)  # a copy too many or too few is one allocation and one free
    assert max(accumulate(traced)) == max(accumulate(measured))
    assert not living(tracer.trace)


def test_the_optimizers_question_of_finite_gradients_is_answered_yes():
    with FakeTensorMode(), Tracer(has_data=False) as tracer:
        with tracer.phase("optimizer", 1):
            assert bool(torch.ones(()).isfinite())
        with tracer.phase("forward", 1), pytest.raises(Exception, match="_local_scalar_dense"):
            bool(torch.ones(()).isfinite())
