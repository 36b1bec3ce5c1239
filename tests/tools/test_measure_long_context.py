"""Growth with length: the fits find the coefficients they were given, and what a line or attention does not explain."""

from __future__ import annotations

import pytest
from measuring.long_context import judge

LENGTHS = (256, 512, 1024, 2048, 4096)


def rows(quadratic: float = 1e-6, attention: float = 1e-6, bend: float = 0.0) -> list[dict]:
    return [
        {"length": n, "peak_bytes": 1e8 + 2e5 * n + bend * n**2, "seconds": 0.5 + 4e-3 * n + quadratic * n**2,
         "attention_seconds": 1e-5 * n + attention * n**2}
        for n in LENGTHS
    ]  # fmt: skip


def test_the_fits():
    found = judge(rows())
    assert found["memory"]["bytes_a_token"] == pytest.approx(2e5) and found["memory"]["worst_off"] < 1e-6
    assert found["memory"]["bytes_at_rest"] == pytest.approx(1e8) and found["memory"]["passed"]
    assert found["time"]["step"] == pytest.approx([0.5, 4e-3, 1e-6])
    assert found["time"]["quadratic_left"] == pytest.approx(0, abs=1e-6) and found["time"]["passed"]


def test_memory_that_bends_is_no_line():
    assert not judge(rows(bend=50))["memory"]["passed"]


def test_a_quadratic_part_beyond_attention():
    found = judge(rows(quadratic=2e-6))["time"]
    step = 0.5 + 4e-3 * 4096 + 2e-6 * 4096**2
    assert found["quadratic_left"] == pytest.approx(1e-6 * 4096**2 / step) and not found["passed"]
