"""Which device is taken, and that a card which is not used is never left out in silence."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from qlora_tool.errors import UserError
from qlora_tool.model import devices
from qlora_tool.model.devices import choose_device


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine without any card, as PyTorch tells of it; changed by name."""

    def has(cuda=None, hip=None, devices_seen=False, mps=False, xpu=False, driver=False, init=None):
        monkeypatch.setattr(torch, "version", SimpleNamespace(cuda=cuda, hip=hip))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: devices_seen)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Radeon")
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.xpu, "is_available", lambda: xpu)
        monkeypatch.setattr(torch.xpu, "get_device_name", lambda *_: "Arc")
        monkeypatch.setattr(devices.shutil, "which", lambda name: None)
        file = tmp_path / "version"
        if driver:
            file.write_text("NVRM")
        monkeypatch.setattr(devices, "NVIDIA_DRIVER", file)

        def start():
            if init is not None:
                raise RuntimeError(init)

        monkeypatch.setattr(torch.cuda, "init", start)

    return has


def test_a_card_is_taken(machine, caplog):
    machine(cuda="13.0", devices_seen=True)
    assert [choose_device(name).type for name in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]
    assert not caplog.records


def test_a_machine_without_a_card(machine, caplog):
    machine(cuda=None)
    assert choose_device("auto").type == "cpu" and not caplog.records
    with pytest.raises(UserError, match="PyTorch sees no CUDA device here"):
        choose_device("cuda")


TOO_OLD = "The NVIDIA driver on your system is too old."


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        ({"hip": "6.4", "devices_seen": True}, "Radeon is not used: AMD's cards are not supported"),
        ({"mps": True}, "Apple's GPU is not used"),
        ({"xpu": True}, "Arc is not used: Intel's cards are not supported"),
        ({"driver": True}, "this PyTorch is built without CUDA"),
        ({"driver": True, "cuda": "13.0", "init": TOO_OLD}, f"cannot use it: {TOO_OLD}"),
        ({"driver": True, "cuda": "13.0"}, "CUDA_VISIBLE_DEVICES may hide them"),
    ],
)
def test_a_card_that_is_not_used_is_named_once(machine, caplog, seen, said):
    machine(**seen)
    with caplog.at_level(logging.WARNING):
        assert choose_device("auto").type == choose_device("auto").type == "cpu"
    assert [said in record.message for record in caplog.records] == [True]
    assert caplog.records[0].message.endswith("; running on the CPU")
    with pytest.raises(UserError, match=r"model.device: cuda, but .*doctor"):
        choose_device("cuda")
    assert choose_device("cpu").type == "cpu"
