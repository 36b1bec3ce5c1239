"""What is read off a profiler's trace."""

from __future__ import annotations

import pytest
from measuring.step_profile import figures_of_trace


def event(category: str, name: str, ts: float, dur: float = 1.0) -> dict:
    return {"ph": "X", "cat": category, "name": name, "ts": ts, "dur": dur}


def test_a_trace_by_hand():
    found = figures_of_trace([
        {"ph": "M", "name": "process_name"}, event("cpu_op", "aten::mm", 0, 900),
        event("cuda_runtime", "cudaLaunchKernel", 1), event("cuda_driver", "cuLaunchKernelEx", 2),
        event("cuda_runtime", "cudaStreamSynchronize", 3), event("cuda_runtime", "cudaMemcpyAsync", 3),
        event("kernel", "gemm", 1000, 2500), event("kernel", "add", 4000, 500), event("kernel", "gemm", 5000, 500),
        event("gpu_memcpy", "Memcpy DtoH", 6000, 1000),
    ])  # fmt: skip
    assert [(name, *row.values()) for name, row in found["kernels"].items()] == [
        ("gemm", 2, 3.0), ("Memcpy DtoH", 1, 1.0), ("add", 1, 0.5)
    ]  # fmt: skip
    assert found["launches"] == 2 and found["waits"] == {"cudaStreamSynchronize": 1}
    assert found["device_ms"] == pytest.approx(4.5) and found["span_ms"] == pytest.approx(6.0)


def test_a_step_without_kernels():
    assert figures_of_trace([])["span_ms"] == 0.0
