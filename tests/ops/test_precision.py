"""Which dtype `auto` stands for."""

from __future__ import annotations

import pytest
import torch

from qlora_tool.ops import precision
from qlora_tool.ops.precision import choose_compute_dtype
from qlora_tool.ops.speeds import Speeds


@pytest.mark.parametrize(("bfloat16", "dtype"), [(200.0, torch.bfloat16), (0.2, torch.float32), (70.0, torch.float32)])
def test_auto_on_a_cpu_is_the_faster_as_measured(monkeypatch, bfloat16, dtype):
    gflops = {"float32": 50.0, "float32 oneDNN": 80.0, "bfloat16": bfloat16}
    found = Speeds("2026-01-01T00:00:00+00:00", 2, gflops, gflops, 1.6, 0.0, 1.0)
    monkeypatch.setattr(precision, "known_speeds", lambda: found)
    assert choose_compute_dtype(torch.device("cpu")) == dtype


@pytest.mark.parametrize(("supported", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_on_a_card_asks_the_card(monkeypatch, supported, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: supported)
    monkeypatch.setattr(precision, "known_speeds", lambda: pytest.fail("measured the CPU"))
    assert choose_compute_dtype(torch.device("cuda")) == dtype
