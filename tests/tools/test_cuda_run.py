"""The run on a CUDA machine, without one: time limits, what is left behind, the search for the longest sequence."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from making.nf4_model import write_nf4_model
from making.random_model import SHAPES
from measuring import cuda
from measuring.command import main
from measuring.longest import longest


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def test_parts_share_the_time():
    now = [100.0]
    budget = cuda.TimeBudget(60, clock=lambda: now[0])
    assert budget.for_part(40) == 40 and budget.for_part(90) == 60
    now[0] += 45
    assert budget.left() == 15 and budget.for_part(40) == 15
    now[0] += 8
    assert budget.for_part(40) == 0 and budget.for_part(5) == 5  # 7 s are too few for a long part
    now[0] += 100
    assert budget.left() == 0 and budget.for_part(5) == 0


def test_the_parts_fit_into_nine_minutes_with_something_of_each(tmp_path: Path):
    parts = cuda.parts_for(tmp_path)
    assert cuda.SECONDS <= 540
    first = [part for part in parts if part.name in ("device", "tests", "model", "benchmark", "caps")]
    assert sum(part.limit for part in first) <= cuda.SECONDS - cuda.LEAST


def test_every_part_leaves_something_behind(tmp_path: Path):
    pid = tmp_path / "child.pid"
    child = f"import subprocess as s; p = s.Popen({python('import time; time.sleep(600)')}); " \
            f"open({str(pid)!r}, 'w').write(str(p.pid)); print('begun', flush=True); p.wait()"  # fmt: skip
    parts = [
        cuda.Part("good", python("print('all is well')"), 30),
        cuda.Part("bad", python("print('x'); raise SystemExit(3)"), 30),
        cuda.Part("long", python(child), 3),
        cuda.Part("needs", python("print('never')"), 30, tmp_path / "absent"),
        cuda.Part("after", python("print('still here')"), 30),
    ]
    outcomes = cuda.run_parts(parts, tmp_path, cuda.TimeBudget(300), {"device": "none"})
    assert {name: one.status for name, one in outcomes.items()} == {
        "good": "passed", "bad": "failed", "long": "cut", "needs": "left out", "after": "passed",
    }  # fmt: skip
    kept = json.loads((tmp_path / "cuda_check.json").read_text())
    assert kept["device"] == "none" and kept["parts"]["bad"]["exit_code"] == 3
    assert kept["parts"]["long"]["last_line"] == "begun"  # what it said before it was cut
    assert (tmp_path / "good.log").read_text() == "all is well\n"
    assert not _is_running(int(pid.read_text()))  # nothing of a part that was cut goes on


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{process}/stat")  # killed, and not waited for by anybody yet
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


def test_no_time_left(tmp_path: Path):
    outcomes = cuda.run_parts([cuda.Part("late", python("print(1)"), 30)], tmp_path, cuda.TimeBudget(1), {})
    assert outcomes["late"].status == "left out" and not (tmp_path / "late.log").exists()


def test_without_cuda_one_line(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main("measuring", ["cuda", str(tmp_path / "r")]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: PyTorch sees no CUDA device")
    assert len(said.err.splitlines()) == 1 and not (tmp_path / "r").exists()


@pytest.mark.parametrize("fits", [0, 300, 5000, 70_000, 10**6])
@pytest.mark.parametrize("guess", [256, 4000, 66_000, 900_000])
def test_the_longest_sequence_is_bracketed(fits: int, guess: int):
    tried = []

    def trains(length: int) -> bool:
        tried.append(length)
        return length <= fits

    good, bad = longest(trains, guess, 131_072)
    assert good <= fits and (bad is None or bad > fits)
    assert all(256 <= length <= 131_072 for length in tried)
    if fits > 131_072:
        assert (good, bad) == (131_072, None)
    else:
        assert bad - good <= max(256, 0.03 * bad)
    assert len(tried) == len(set(tried))
    if abs(guess - fits) < 0.08 * fits:
        assert len(tried) <= 4  # a good guess is nearly all it takes


def test_nf4_weights_are_read_as_any_quantized_checkpoint(tmp_path: Path):
    from qlora_tool.build.open import open_model
    from qlora_tool.config import ModelConfig

    size = write_nf4_model(tmp_path / "nf4", SHAPES["tiny-llama"], "cpu")
    model = open_model(ModelConfig(name_or_path=str(tmp_path / "nf4"), compute_dtype="float32", device="cpu"))
    linears = 2 * [64 * 64, 32 * 64, 32 * 64, 64 * 64, 128 * 64, 128 * 64, 64 * 128]
    assert model.quantized_bytes() == sum(n // 2 + n // 64 + -(-n // 64 // 256) * 4 + 4 for n in linears)
    assert size < 2 * (sum(linears) + 2 * 256 * 64)

    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", device_map={"": "cpu"})
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        weight = theirs.get_submodule(name).weight
        expected = dequantize_4bit(weight.data, weight.quant_state).float()
        found = model.module.get_submodule(name).weight.dense(torch.float32)
        assert expected.std() > 0.01 and torch.allclose(found, expected, rtol=1e-2, atol=1e-6)  # theirs is in bf16
