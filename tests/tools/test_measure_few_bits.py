"""What files of few bits keep of a run: each way is a cell of its own, held against the live model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from measuring import few_bits
from measuring.command import main


def test_every_way_is_a_cell():
    cells = list(few_bits.cells_of(["f16", "q4_k_m", "nf4"], ["dequantized", "original"], theirs=True))
    assert cells[:2] == [("f16", "auto", "none"), ("q4_k_m", "dequantized", "llama.cpp")]
    assert cells[2:6] == [("q4_k_m", base, rows) for rows in ("none", "auto") for base in ("dequantized", "original")]
    assert len(cells) == 10 and cells[-1] == ("nf4", "original", "auto")
    assert ("q4_k_m", "dequantized", "llama.cpp") not in few_bits.cells_of(["q4_k_m"], ["auto"], theirs=False)


def test_files_are_held_against_the_live_model(two_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """f16 keeps what a live model is to 1e-3; NF4 onto the base's own values is another model. The second time nothing
    is made."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"What is {n}?", "completion": f"It is {n}."}) + "\n"
                            for n in range(4)), encoding="utf-8")  # fmt: skip
    options = ["--eval", str(rows), "--work", str(tmp_path / "work"), "--types", "f16", "nf4", "--bases", "dequantized"]
    arguments = ["few-bits", str(two_runs / "sums"), *options, "--json", str(tmp_path / "found.json")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_bits, "cells_of", lambda *_: [("f16", "auto", "none"), ("nf4", "dequantized", "none")])
        assert main("measuring", arguments) == 0
        patch.setattr(few_bits, "made", None)
        assert main("measuring", arguments) == 0
    exact, rounded = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["cells"]
    assert exact["rows"]["own"]["mean_kl"] < 1e-3 < rounded["rows"]["own"]["mean_kl"]
    shown = capsys.readouterr().out
    assert "nf4" in shown and "kept" in shown
