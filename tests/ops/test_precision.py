"""Which dtype `auto` stands for, from the measurement that is kept."""

from __future__ import annotations

import json

import pytest
import torch

from qlora_tool.ops import products
from qlora_tool.ops.precision import choose_compute_dtype
from qlora_tool.ops.products import ONEDNN, kept_measurement, measure_products

CPU = torch.device("cpu")


@pytest.fixture
def kept_file(tmp_path, monkeypatch):
    """Where the measurement is kept; empty, and measuring gives what `measured` holds, counting how often."""
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(tmp_path))
    return tmp_path / "products.json"


@pytest.fixture
def measured(monkeypatch):
    calls = []

    def measure():
        calls.append(None)
        return {"float32": 50.0, ONEDNN: 40.0, "bfloat16": 60.0}

    monkeypatch.setattr(products, "measure_products", measure)
    return calls


def rewrite(file, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(("bfloat16", "dtype"), [(200.0, torch.bfloat16), (0.2, torch.float32), (50.0, torch.float32)])
def test_auto_on_a_cpu_is_the_faster_by_the_kept_measurement(kept_file, measured, bfloat16, dtype):
    kept_measurement()
    rewrite(kept_file, gflops={"float32": 50.0, ONEDNN: 40.0, "bfloat16": bfloat16})
    assert choose_compute_dtype(CPU) == dtype
    assert len(measured) == 1


def test_a_measurement_is_made_once(kept_file, measured):
    assert kept_measurement() == kept_measurement() == {"float32": 50.0, ONEDNN: 40.0, "bfloat16": 60.0}
    assert len(measured) == 1


def test_another_machine_or_torch_measures_again(kept_file, measured):
    kept_measurement()
    machine = json.loads(kept_file.read_text())["machine"]
    assert torch.__version__ in machine
    slow = {"float32": 1.0, ONEDNN: 0.1, "bfloat16": 0.5}
    rewrite(kept_file, machine=machine.replace(torch.__version__, "1.0"), gflops=slow)
    assert choose_compute_dtype(CPU) == torch.bfloat16
    assert len(measured) == 2
    assert json.loads(kept_file.read_text()) == {"machine": machine, "gflops": kept_measurement()}
    assert kept_measurement()["float32"] == 50.0


def test_a_processor_with_other_bf16_instructions_measures_again(kept_file, measured, monkeypatch):
    """PyTorch calls both AVX512, and a home folder may be shared."""
    for count, instructions in enumerate([[], ["avx512_bf16"], ["amx_bf16", "avx512_bf16"]], start=1):
        monkeypatch.setattr(products, "_bf16_instructions", lambda found=instructions: found)
        kept_measurement()
        assert len(measured) == count


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', '{"machine": 1}', "MACHINE ALONE", "MACHINE, NO NUMBERS"])
def test_a_broken_file_is_measured_over(kept_file, measured, content):
    kept_measurement()
    machine = json.loads(kept_file.read_text())["machine"]
    if content.startswith("MACHINE"):
        content = json.dumps({"machine": machine} | ({"gflops": {}} if "NUMBERS" in content else {}))
    kept_file.write_text(content)
    assert choose_compute_dtype(CPU) == torch.bfloat16
    assert len(measured) == 2


def test_the_measurement_is_of_both_dtypes():
    speeds = measure_products()
    assert speeds.keys() == {"float32", ONEDNN, "bfloat16"}
    assert all(0 < speed < 1e6 for speed in speeds.values())


@pytest.mark.parametrize(("supported", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_on_a_card_asks_the_card(monkeypatch, measured, supported, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: supported)
    assert choose_compute_dtype(torch.device("cuda")) == dtype
    assert not measured
