"""The CUDA context and the workspaces of a machine: how they are told apart from tensors, and that they are kept.

No device is needed: what torch.cuda says is made up.
"""

from __future__ import annotations

import contextlib

import pytest
import torch

from qlora_tool.errors import MachineError, UserError
from qlora_tool.files.cache import cache_folder
from qlora_tool.files.sealed import read_sealed
from qlora_tool.memory.allocator import calibrate as calibration
from qlora_tool.memory.allocator.calibrate import Calibration, cached_calibration, calibrate

GIB = 2**30
NAME = "NVIDIA Made-up 24GB"


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path) -> dict[str, int]:
    """A made-up device; what it says can be changed."""
    says = {"total": 24 * GIB, "used": 530_000_000, "reserved": 20_000_000, "cached": 6_000_000}

    def empty_cache() -> None:  # gives the cached segments back
        says["used"] -= says["cached"]
        says["reserved"] -= says.pop("cached")
        says["cached"] = 0

    fakes = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_name": lambda device=None: NAME,
        "device": lambda device: contextlib.nullcontext(),
        "synchronize": lambda device=None: None,
        "empty_cache": empty_cache,
        "mem_get_info": lambda device=None: (says["total"] - says["used"], says["total"]),
        "memory_reserved": lambda device=None: says["reserved"],
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(calibration, "measure_workspaces", lambda device: (32 * 2**20, 8519680))
    monkeypatch.setattr(calibration, "_load_kernels", lambda device: None)
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(tmp_path))
    return says


def test_the_context_is_what_no_tensor_holds(device: dict[str, int]):
    expected = Calibration(NAME, 510_000_000, 32 * 2**20, 8519680)  # 530 MB in use, 20 MB of them the allocator's
    assert cached_calibration(NAME) is None
    assert calibrate() == expected
    assert cached_calibration(NAME) == expected
    assert cached_calibration("another card") is None


def test_each_device_and_version_is_kept_apart(device: dict[str, int], monkeypatch: pytest.MonkeyPatch):
    first = calibrate()
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert cached_calibration(NAME) is None
    device["used"] += 40_000_000
    second = calibrate()
    assert second.context_bytes == first.context_bytes + 40_000_000
    assert cached_calibration(NAME) == second
    assert len(read_sealed(cache_folder() / "cuda.json")) == 2


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"x": 3}'])
def test_a_broken_file_counts_as_none(device: dict[str, int], content: str):
    cache_folder().mkdir(exist_ok=True)
    (cache_folder() / "cuda.json").write_text(content)
    assert cached_calibration(NAME) is None
    assert calibrate() == cached_calibration(NAME)


def test_a_device_that_others_use_is_refused(device: dict[str, int]):
    device["used"] += 3 * GIB
    with pytest.raises(MachineError, match="other programs"):
        calibrate()
    assert cached_calibration(NAME) is None


def test_without_a_device(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device"):
        calibrate()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="no CUDA device"):
        calibrate(1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_device(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(tmp_path))
    found = calibrate()
    assert 100_000_000 < found.context_bytes < 1_000_000_000
    assert found.workspace_forward in (0, 8519680, 32 * 2**20)
    assert cached_calibration(found.device_name) == found
