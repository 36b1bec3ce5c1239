"""The measurement of products: when it is made again, which library it chooses, and what it measures."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest
import torch

from qlora_tool.files.sealed import read_sealed, write_sealed
from qlora_tool.ops import speeds
from qlora_tool.ops.speeds import ONEDNN, PYTORCH, Speeds, compare_with_training, known_speeds, measure_anew


def speeds_of(ratio: float = 1.0, *, age: timedelta = timedelta(0), **more) -> Speeds:
    gflops = {"float32": 100.0, "float32 oneDNN": 100 * ratio, "bfloat16": 60.0}
    slowest = {name: 0.8 * speed for name, speed in gflops.items()}
    date = (datetime.now(timezone.utc) - age).isoformat(timespec="seconds")
    undisturbed = {"spread": 0.02, "processor_share": 0.97}
    return Speeds(date, torch.get_num_threads(), gflops, slowest, ratio, **undisturbed | more)


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(tmp_path))
    return tmp_path / "products.json"


@pytest.fixture
def measured(file, monkeypatch):
    """What measuring finds, one after the other; the last stays."""
    waiting = [speeds_of(1.5)]
    monkeypatch.setattr(speeds, "measure", lambda: waiting.pop(0) if len(waiting) > 1 else waiting[0])
    return waiting


def rewrite(file, **changes) -> None:
    [(machine, data)] = read_sealed(file).items()
    write_sealed(file, {machine: data | changes})


# ---------------------------------------------------------------------------------------------------- when


def test_a_measurement_is_made_once(measured):
    first = known_speeds()
    measured[:] = [speeds_of(0.1)]
    assert known_speeds() == first and first.choice == ONEDNN


def days_ago(days: float) -> str:
    return (datetime.now(timezone.utc) - timedelta(days=days)).isoformat(timespec="seconds")


@pytest.mark.parametrize(
    ("changes", "again"),
    [
        ({"date": days_ago(27)}, False), ({"date": days_ago(29)}, True), ({"date": days_ago(-1)}, True),
        ({"processor_share": 0.5}, False), ({"processor_share": 0.5, "date": days_ago(0.05)}, True),
        ({"spread": 0.6, "date": days_ago(0.05)}, True), ({"in_training": 30.0}, True),
    ],
)  # fmt: skip
def test_what_is_old_doubtful_or_at_odds_with_training_is_measured_again(file, measured, changes, again):
    known_speeds()
    rewrite(file, **changes)
    measured[:] = [speeds_of(2.0)]
    assert (known_speeds().ratio == 2.0) is again


def test_other_threads_instructions_or_torch_are_measured_apart(file, measured, monkeypatch):
    known_speeds()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 97)
    known_speeds()
    monkeypatch.setattr(speeds, "bf16_instructions", lambda: ["none such"])
    known_speeds()
    monkeypatch.setattr(torch, "__version__", "1.0")
    known_speeds()
    machines = read_sealed(file)
    assert len(machines) == 4 and any("97 threads" in machine for machine in machines)


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', '{"machine": 1}', '{"machine": "x", "gflops": {}}',
                                     "WITHOUT A FIGURE", "WITHOUT A DATE", "A WORD FOR A FIGURE"])  # fmt: skip
def test_a_broken_file_is_measured_over(file, measured, content):
    known_speeds()
    if "FIGURE" in content or "DATE" in content:
        changes = {"WITHOUT A FIGURE": {"gflops": {}}, "WITHOUT A DATE": {"date": "today"},
                   "A WORD FOR A FIGURE": {"ratio": "x"}}[content]  # fmt: skip
        rewrite(file, **changes)
    else:
        file.write_text(content)
    measured[:] = [speeds_of(2.0)]
    assert known_speeds().ratio == 2.0 == known_speeds().ratio


def test_the_file_of_earlier_versions_is_measured_over(file, measured):
    gflops = {"float32": 1.0, "float32 oneDNN": 2.0, "bfloat16": 3.0}
    file.write_text(json.dumps({"machine": "x86_64 AVX512 torch 2.13.0", "gflops": gflops}))
    assert known_speeds().ratio == 1.5
    assert len(read_sealed(file)) == 1  # and nothing of it stays


# --------------------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize(
    ("ratio", "earlier", "choice"),
    [(1.2, None, ONEDNN), (1.1, None, PYTORCH), (1.1, ONEDNN, ONEDNN), (1.1, PYTORCH, PYTORCH), (1.0, ONEDNN, PYTORCH),
     (0.0, ONEDNN, PYTORCH), (2.0, PYTORCH, ONEDNN)],
)  # fmt: skip
def test_onednn_has_to_be_clearly_faster_and_stays_until_it_is_not(measured, ratio, earlier, choice):
    if earlier:
        measured[:] = [speeds_of(2.0 if earlier == ONEDNN else 0.5)]
        measure_anew()
    measured[:] = [speeds_of(ratio)]
    assert measure_anew().choice == choice == known_speeds().choice


def test_a_busy_machine_is_measured_twice_and_changes_no_choice(measured):
    busy, busier = speeds_of(0.5, processor_share=0.6), speeds_of(0.4, processor_share=0.3)
    measured[:] = [speeds_of(2.0)]
    assert measure_anew().choice == ONEDNN
    measured[:] = [busier, busy, speeds_of(3.0)]
    found = measure_anew()
    assert (found.ratio, found.choice, found.doubtful) == (0.5, ONEDNN, True)
    measured[:] = [busy, speeds_of(1.0)]  # quiet in the meantime
    found = measure_anew()
    assert (found.ratio, found.choice, found.doubtful) == (1.0, PYTORCH, False)


@pytest.mark.parametrize("choice", [PYTORCH, ONEDNN])
def test_training_disagrees_below_six_tenths_of_the_slowest_shape(measured, choice):
    measured[:] = [speeds_of(2.0)]  # the slowest shapes at 80 and 160
    known_speeds()
    slowest = 80 if choice == PYTORCH else 160
    compare_with_training(choice, 0.61 * slowest)
    assert known_speeds().in_training == 0
    compare_with_training(choice, 0.59 * slowest)
    measured[:] = [replace(speeds_of(1.0))]
    assert known_speeds().ratio == 1.0


def test_training_alone_leaves_no_measurement(file):
    compare_with_training(PYTORCH, 1.0)
    assert not file.exists()


# ---------------------------------------------------------------------------------------------- what is measured


def test_each_library_multiplies_in_turn_for_long_enough(monkeypatch):
    order = []
    for name, product in (("mm", torch.mm), ("onednn_matmul", speeds.onednn_matmul)):
        where = torch if name == "mm" else speeds
        monkeypatch.setattr(where, name, lambda *given, name=name, product=product: order.append(
            (name, str(given[0].dtype))) or product(*given))  # fmt: skip
    monkeypatch.setattr(speeds, "LONGEST", 60.0)
    found = speeds.measure()
    assert found.gflops.keys() == found.slowest.keys() == {"float32", "float32 oneDNN", "bfloat16"}
    assert all(0 < found.slowest[name] <= found.gflops[name] < 1e6 for name in ("float32", "bfloat16"))
    assert 0 < found.processor_share <= 1.1 and found.threads == torch.get_num_threads()
    if speeds.has_onednn():
        assert found.ratio == pytest.approx(found.gflops["float32 oneDNN"] / found.gflops["float32"], rel=1.0)
        turns = [one for one in order if one[1] == "torch.float32"][-20:]
        assert all(one != other for one, other in itertools.pairwise(turns))
        work = 2e-9 * sum(tokens * inner * outer for tokens, inner, outer in speeds.SHAPES)
        rounds = order.count(("onednn_matmul", "torch.float32")) / len(speeds.SHAPES)
        assert rounds >= speeds.ROUNDS and rounds * work / found.gflops["float32 oneDNN"] >= 0.5 * speeds.SECONDS


def test_emulated_products_are_not_measured_for_long(monkeypatch):
    real = torch.mm

    def slow(left, right):
        if left.dtype == torch.bfloat16:
            assert left.shape[0] <= 128
            time.sleep(0.05)
        return real(left, right)

    monkeypatch.setattr(torch, "mm", slow)
    monkeypatch.setattr(speeds, "SECONDS", 0.01)
    found = speeds.measure()
    assert found.gflops["bfloat16"] < 0.1 * found.gflops["float32"]


@pytest.mark.slow
def test_a_busy_machine_is_recognised():
    """Each core has as much else to do."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * torch.get_num_threads())]
    try:
        found = speeds.measure()
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert found.doubtful
