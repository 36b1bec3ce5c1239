"""`tools/measure kernels` without a card: its inputs, its comparison, its account, what it prints."""

from __future__ import annotations

import functools
import time
from dataclasses import asdict

import pytest
import torch
from measuring import kernel_cases, kernels
from measuring.kernel_cases import Case, cases
from measuring.kernels import Timed, compare, difference, passes, shares

CPU = torch.device("cpu")


class Clock:
    """A clock for the CPU: one call of each input."""

    device = CPU

    def time(self, call, inputs) -> Timed:
        begin = time.perf_counter()
        for arguments in inputs:
            call(*arguments)
        seconds = (time.perf_counter() - begin) / len(inputs)
        return Timed(1e6 * seconds, 1e6 * seconds)


def case(kind: str = "nf4", dtype: str = "bfloat16") -> Case:
    make = functools.partial(kernel_cases.dense_arguments, shape=(64, 128), kind=kind, double=True, dtype=dtype)
    return Case("dequantize_int8" if kind == "int8" else "dequantize_4bit", kind, make)


@pytest.mark.parametrize(("kind", "read"), [
    ("nf4", 64 * 128 // 2 + 128 + 4 + 4),  # codes, 128 scales in a byte each, one scale of theirs, their mean
    ("int8", 64 * 128 + 64 * 4),
])  # fmt: skip
def test_a_case_is_compared_and_its_bytes_are_counted(kind, read, monkeypatch):
    monkeypatch.setattr(kernels, "ROTATED", 1e5)
    found = compare(case(kind), Clock())
    assert (found.error, found.equal, found.difference) == ("", True, 0.0)
    assert found.nbytes == read + 64 * 128 * 2
    found.shares = shares(found, 1e9)
    assert found.shares["kernel_gb_per_s"] == pytest.approx(found.nbytes / found.kernel.device / 1e3)
    assert found.shares["times_as_fast"] == pytest.approx(found.reference.device / found.kernel.device)
    assert passes(found)


def test_a_wrong_result_and_a_failure_are_told(monkeypatch):
    monkeypatch.setattr(kernels, "ROTATED", 1e5)
    worse = compare(case(), Clock())
    worse.difference = 1e-6  # dequantization has to be equal to the bit
    assert not passes(worse)

    def broken(*arguments):
        raise RuntimeError("out of\nmemory")

    failed = compare(Case("dequantize_4bit", "broken", broken), Clock())
    assert failed.error == "RuntimeError: out of memory" and not passes(failed) and shares(failed, 1e9) == {}
    unknown = compare(Case("no_such_operation", "", broken), Clock())
    assert "no such kernel" in unknown.error and passes(unknown)


def test_the_difference_is_one_of_norms():
    one = torch.tensor([3.0, 4.0])
    assert difference([one], [one]) == 0
    assert difference([one + torch.tensor([0.0, 0.5])], [one]) == pytest.approx(0.1)
    assert difference([one.half()], [one]) == difference([], [one]) == float("inf")


def test_every_dequantization_is_timed_at_each_matrix_of_a_7b():
    known = {(one.operation, one.what.partition(" bfloat16")[0]) for one in cases()}
    for rows, columns in kernel_cases.MATRICES:
        assert ("dequantize_4bit", f"{rows} x {columns} nf4 double") in known
        assert ("dequantize_int8", f"{rows} x {columns} int8") in known


def test_inputs_are_those_that_the_operations_take(monkeypatch):
    """At a small size; operations that this version lacks are passed over, as in a run."""
    for name, small in {"MATRICES": ((64, 128),), "BATCHES": ((1, 8),), "HIDDEN": 32, "INTERMEDIATE": 48, "HEADS": 2,
                        "HEAD_DIM": 16, "LAYERS": 2, "RANK": 8, "EXPERTS": 3, "EXPERT_ROWS": 4,
                            "EXPERT_SIZES": (16, 8)}.items():  # fmt: skip
        monkeypatch.setattr(kernel_cases, name, small)
    monkeypatch.setattr(kernels, "ROTATED", 1.0)
    found = [compare(one, Clock()) for one in cases()]
    assert all(passes(one) for one in found), [one.error for one in found if not passes(one)]
    timed = {one.operation for one in found if one.kernel is not None}
    assert {"dequantize_4bit", "dequantize_int8"} <= timed
    # What quantizes runs at loading alone.
    others = {"quantize_4bit", "quantize_scales", "quantize_int8"}
    declared = {name.partition("::")[2] for name, one in kernels.declared().items() if "cuda" in one.versions}
    assert {name for name in declared if "test" not in name} == timed | others


def test_the_table(capsys, monkeypatch):
    monkeypatch.setattr(kernels, "ROTATED", 1e5)
    good = compare(case(), Clock())
    good.kernel, good.reference = Timed(10.0, 20.0), Timed(40.0, 60.0)
    good.shares = shares(good, 1e12)
    bad = kernels.Figures("rotary", "1 x 8", error="RuntimeError: no")
    products = {"what": "q, k, v", "tokens": 8, "us": {"forward apart": 3.0, "forward joined": 2.0}}
    kernels.show({
        "operations": [asdict(good), asdict(bad)], "products": [products, {"error": "OSError: x"}], "device": "a card",
        "copy_gb_per_s": 1000.0, "kernels_run": True, "lacking": None, "passed": False,
    })  # fmt: skip
    shown = capsys.readouterr().out
    assert "4.00" in shown and "20 / 60" in shown and "RuntimeError: no" in shown and "OSError: x" in shown
    assert "forward joined" in shown and "MISSED" in shown


def test_operations_in_place_are_given_copies():
    def fill(tensor, number):
        tensor.fill_(number)

    x = torch.ones(3)
    assert [one.tolist() for one in kernels.results_of(fill, (x, 2))] == [[2.0] * 3]
    assert x.tolist() == [1.0] * 3


def test_without_a_card_there_is_one_line(monkeypatch, capsys):
    from measuring.command import main

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main("measuring", ["kernels"]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "no CUDA device" in said[0]


@pytest.mark.cuda
def test_on_a_card_one_case_is_timed():
    clock = kernels.DeviceClock(torch.device("cuda", torch.cuda.current_device()))
    found = compare(case(), clock)
    assert found.equal and passes(found) and found.kernel.device > 0
