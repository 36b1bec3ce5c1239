"""Steps from the disk beside steps in memory: what is judged, and how the time of a step is told apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from measuring.step_parts import READING, WAITING, disk_bytes_read, parts_of_time
from measuring.streamed import judge

from qlora_tool.weights.quantized import quantize
from qlora_tool.weights.streamed import DiskStream, Part, Place

TOOLS = Path(__file__).parents[2] / "tools"
in_linux = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="reads Linux's /proc")


def turn(*seconds: float, gradients: str = "a", rss: int = 100) -> dict:
    steps = [{"seconds": taken, "parts": {}} for taken in seconds]
    steps.append({"seconds": 1000.0, "parts": {"products": 1.0}})  # told by part, not timed
    return {"loss": 1.5, "gradients": gradients, "rss_bytes": rss, "steps": steps}


def test_what_is_judged():
    turns = {"resident": [turn(10, 12), turn(20, 20, rss=10_000)], "disk": [turn(11, 11), turn(26, 26)]}
    found = judge(turns, 100)
    assert found["ratios"] == [1.0, 1.3] and found["ratio"] == 1.15 and found["passed"]
    assert not judge(turns, 99)["passed"]  # of the process that streams, not of the other
    assert not judge(turns | {"disk": [turn(11, 11), turn(27, 27)]}, 100)["passed"]
    other = judge(turns | {"disk": [turn(11, 11), turn(20, 20, gradients="b")]}, 100)
    assert other["same_loss"] and not other["same_gradients"] and not other["passed"]


def test_time_is_told_by_part(tmp_path: Path, monkeypatch):
    """Of a read that takes a while, the thread that asks for it waits as long; the parts make up the whole."""
    file = tmp_path / "parts"
    file.write_bytes(bytes(range(256)) * 64)
    read, functions = DiskStream._read, (DiskStream.part, Place.of)

    def slowly(*arguments: object) -> None:
        time.sleep(0.2)
        read(*arguments)

    monkeypatch.setattr(DiskStream, "_read", slowly)
    weight = quantize(torch.randn(64, 64), "nf4")
    start = time.perf_counter()
    with parts_of_time() as seconds:
        stream = DiskStream(file, [Part(1, 8193)])
        Place(0, torch.float32, (8, 8)).of(stream.part(0))
        torch.mm(torch.ones(8, 64), weight.dequantize().T)
        time.sleep(0.1)
    total = time.perf_counter() - start
    assert 0.2 <= seconds[WAITING] < 0.3 and 0.2 <= seconds[READING] < 0.3 and 0.1 <= seconds["the rest"] < 0.2
    assert seconds["dequantizing"] > 0 and seconds["products"] > 0
    own = sum(taken for part, taken in seconds.items() if part != READING)
    assert own == pytest.approx(total, abs=0.01)
    assert DiskStream._read is slowly and (DiskStream.part, Place.of) == functions


@in_linux
def test_what_is_read_past_the_page_cache_counts(tmp_path: Path):
    file = tmp_path / "part"
    with file.open("wb") as written:
        written.write(bytes(1 << 20))
        written.flush()
        os.fsync(written.fileno())
    stream = DiskStream(file, [Part(0, 1 << 20)])
    if not stream._file.direct:
        pytest.skip("this file system has no direct reads")
    before = disk_bytes_read()
    stream.part(0)
    assert disk_bytes_read() - before == stream.read_bytes == 1 << 20


@in_linux
@pytest.mark.slow
def test_a_tiny_model(tmp_path: Path):
    model = str(tmp_path / "tiny")
    command = [sys.executable, TOOLS / "make", "kept-base", model, "--shape", "tiny-llama",
               "--compute-dtype", "float32"]  # fmt: skip
    assert subprocess.run(command).returncode == 0
    command = [sys.executable, TOOLS / "measure", "streamed", model, "--length", "32", "--pairs", "1",
               "--compute-dtype", "float32", "--json", tmp_path / "streamed.json"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert "gradient: True" in done.stdout, done.stdout + done.stderr  # its speed says nothing
    found = json.loads((tmp_path / "streamed.json").read_text())
    assert found["same_loss"] and found["same_gradients"]
    (streamed,), (resident,) = found["turns"]["disk"], found["turns"]["resident"]
    assert [step["loss"] for step in streamed["steps"]] == [step["loss"] for step in resident["steps"]]
