"""The comparison with PEFT: the verdict is on the mean losses, and both sides give the same loss before any step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from measuring.command import main
from measuring.peft import judge
from tiny_runs import write_model, write_rows


def run(ours: float, peft: float) -> dict:
    return {"ours": {"eval_losses": {0: 4.0, 2: ours}}, "peft": {"eval_losses": {0: 4.0, 2: peft}}}


def test_the_verdict_is_on_the_means():
    verdict = judge([run(1.0, 2.0), run(3.0, 2.0)])
    assert verdict["mean_eval_loss"] == {"ours": 2.0, "peft": 2.0} and verdict["ratio"] == 1.0 and verdict["passed"]
    assert judge([run(1.0, 1.0), run(1.0, 4.0)])["ratio"] == pytest.approx(0.4)  # not 0.625
    assert judge([run(1.019, 1.0)])["passed"] and not judge([run(1.021, 1.0)])["passed"]


def test_both_sides_begin_alike_and_learn(tmp_path: Path, capsys):
    model = write_model(tmp_path / "model")
    for name in ("train", "eval"):
        write_rows(tmp_path / f"{name}.jsonl", 12)
    files = ["--train", str(tmp_path / "train.jsonl"), "--eval", str(tmp_path / "eval.jsonl")]
    outputs = ["--json", str(tmp_path / "c.json"), "--plot", str(tmp_path / "c.png")]
    sizes = ["--rows", "8", "--batch", "4", "--steps", "5", "--seeds", "1", "--eval-every", "2", "--r", "4"]
    code = main("measuring", ["peft", str(model), *files, *outputs, *sizes, "--max-length", "128"])
    results = json.loads((tmp_path / "c.json").read_text())
    assert code == (0 if results["passed"] else 1), capsys.readouterr().err
    (only,) = results["runs"]
    ours, peft = only["ours"], only["peft"]
    assert list(ours["eval_losses"]) == list(peft["eval_losses"]) == ["0", "2", "4", "5"]
    assert ours["eval_losses"]["0"] == pytest.approx(peft["eval_losses"]["0"], rel=1e-5)
    assert ours["losses"][0] == pytest.approx(peft["losses"][0], rel=1e-5)
    for side in (ours, peft):
        assert len(side["losses"]) == 5 and side["eval_losses"]["5"] < side["eval_losses"]["0"]
    # q, k, v, o, gate, up, down of two layers: r * (in + out)
    assert only["trained_weights"] == 2 * 4 * (128 + 96 + 96 + 128 + 192 + 192 + 192)
    assert (tmp_path / "c.png").stat().st_size > 1000
