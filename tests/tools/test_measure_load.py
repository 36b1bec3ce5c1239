"""The load's memory: what counts as finished, where the limit lies, and that the measured process is a fresh one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from measuring.load import judge, load_and_measure
from measuring.processes import in_fresh_process, resident_bytes

from qlora_tool.errors import UserError

TOOLS = Path(__file__).parents[2] / "tools"
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")


def test_the_limit():
    figures = {"quantized_bytes": 3_000, "unquantized_bytes": 500, "largest_tensor_bytes": 200}
    limit = 3_000 + 500 + 2 * 200 + 600_000_000
    verdict = judge({**figures, "rss_peak_bytes": limit})
    assert verdict == {"finished_bytes": 3_500, "limit_bytes": limit, "passed": True}
    assert not judge({**figures, "rss_peak_bytes": limit + 1})["passed"]


def test_the_peak_remembers_what_is_gone():
    before = resident_bytes("VmRSS")
    block = torch.ones(300_000_000, dtype=torch.uint8)  # touched, so resident
    assert resident_bytes("VmRSS") - before > 290_000_000
    del block
    assert resident_bytes("VmRSS") - before < 10_000_000
    assert resident_bytes("VmHWM") - before > 290_000_000
    assert resident_bytes("VmRSS", 2**22 + 1) is None  # beyond the highest process number


def test_a_process_that_fails_says_why(capfd):
    """What a module of the package offers by name is called there; its exit code tells whose fault it is."""
    with pytest.raises(UserError, match="load_and_measure: ended with exit code 2"):
        in_fresh_process(load_and_measure, name_or_path="/no/such/model", device="cpu")
    assert capfd.readouterr().err.startswith("error: ")
    with pytest.raises(UserError, match="/no/such/model"):
        in_fresh_process(load_and_measure, quiet=True, name_or_path="/no/such/model", device="cpu")
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_a_tiny_model(tmp_path: Path):
    model = str(tmp_path / "tiny")
    made = subprocess.run([sys.executable, TOOLS / "make", "random-model", model, "--shape", "tiny-llama"], text=True)
    assert made.returncode == 0
    command = [sys.executable, TOOLS / "measure", "load", model, "--json", str(tmp_path / "load.json")]
    done = subprocess.run([*command, "--plot", str(tmp_path / "load.png")], capture_output=True, text=True)
    figures = json.loads((tmp_path / "load.json").read_text())
    assert done.returncode == 0 and figures["passed"], done.stdout + done.stderr

    linears = 2 * [64 * 64, 32 * 64, 32 * 64, 64 * 64, 128 * 64, 128 * 64, 64 * 128]  # q, k, v, o, gate, up, down
    # Half a byte a weight, a byte a block of 64, 4 bytes for 256 blocks, 4 for the mean.
    assert figures["quantized_bytes"] == sum(n // 2 + n // 64 + -(-n // 64 // 256) * 4 + 4 for n in linears)
    assert figures["checkpoint_bytes"] == 2 * (sum(linears) + 2 * 256 * 64 + 5 * 64)
    assert figures["largest_tensor_bytes"] == 2 * 256 * 64
    assert figures["finished_bytes"] < figures["rss_before_bytes"] <= figures["rss_peak_bytes"]
    # The curve is of the process that was measured; the last samples come after the peak was read.
    assert 0 < max(size for _, size in figures["samples"]) < figures["rss_peak_bytes"] + 20_000_000
    assert (tmp_path / "load.png").stat().st_size > 1000
    assert "passed" in done.stdout
