"""The comparison of methods: the rate is chosen by validation, cells are made once, gains are told from full's."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from measuring import methods
from measuring.command import main
from tiny_runs import write_model, write_rows


def found(method: str, loss: float, values: int = 10) -> dict[str, Any]:
    return {"method": method, "values": values, "losses": {"own": loss}}


UNTUNED = {"none": {"losses": {"own": 4.0}}}


def test_gain_is_the_way_from_the_base_to_full():
    cells = [found("full", 2.0), found("full", 2.2), found("lora", 2.3), found("lora", 2.5)]
    assert methods.gain("lora", cells, UNTUNED) == pytest.approx(1.6 / 1.9)
    assert methods.gain("full", cells, UNTUNED) == pytest.approx(1)
    assert methods.gain("lora", cells[2:], UNTUNED) is None and methods.gain("lora", cells, {}) is None


def test_the_intrinsic_dimension_is_the_smallest_that_reaches_nine_tenths():
    sizes = [found("vera-all", 2.1, 300), found("vera-qv", 2.19, 200), found("vera-v", 2.21, 100)]
    cells = [found("full", 2.0), *sizes]  # 95 %, 90.5 % and 89.5 % of the gain
    assert methods.intrinsic_dimension(cells, UNTUNED) == "200 (vera-qv)"
    assert methods.intrinsic_dimension([cells[0], sizes[2]], UNTUNED) == "more than the 100 tried"
    assert methods.intrinsic_dimension(sizes, UNTUNED) is None


@pytest.mark.parametrize("best", range(len(methods.RATES)))
def test_the_rate_is_the_lowest_of_a_valley(best: int, monkeypatch: pytest.MonkeyPatch):
    def cell(options: Namespace, method: str, task: str, rate: float, seed: int) -> dict[str, Any]:
        assert seed == 7
        return {"losses": {"validation": abs(methods.RATES.index(rate) - best)}}

    monkeypatch.setattr(methods, "cell", cell)
    assert methods.best_rate(Namespace(seeds=[7, 8]), "lora", "shell") == methods.RATES[best]


def compare(folder: Path, chosen: list[str]) -> tuple[int, dict[str, Any]]:
    """Run the comparison of some methods on a tiny model, and read what it wrote."""
    if not (folder / "model").exists():
        write_model(folder / "model")
        for name in ("a", "b"):
            write_rows(folder / f"{name}.jsonl", 12)
    task = f"={folder / 'a.jsonl'}:{folder / 'b.jsonl'}"
    options = ["--task", f"one{task}", "--task", f"two{task}", "--answers", "one", "--work", str(folder / "work")]
    sizes = ["--steps", "3", "--batch", "2", "--r", "4", "--max-length", "256", "--validation-rows", "2"]
    sizes += ["--answer-rows", "2", "--seeds", "0"]
    outputs = ["--json", str(folder / "results.json")]
    code = main("measuring", ["methods", str(folder / "model"), *options, *sizes, *outputs, "--methods", *chosen])
    return code, json.loads((folder / "results.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_cells_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(methods, "RATES", (5e-3,))
    code, results = compare(tmp_path, ["lora", "full"])
    assert code == 0
    lora, full = (next(cell for cell in results["cells"] if cell["method"] == name) for name in ("lora", "full"))
    assert lora["losses"].keys() == {"validation", "own", "other"} and lora["losses"]["own"] != lora["untuned"]["own"]
    assert lora["values"] == 2 * 4 * (128 + 96 + 96 + 128 + 192 + 192 + 192) < full["values"]
    assert 0 <= lora["exact_match"] <= 1 and results["untuned"]["one"].keys() == {"nf4", "none"}
    shown = capsys.readouterr().out
    assert "untuned, 16 bits" in shown and "full" in shown and "100%" in shown

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a cell that is there is not made again")

    monkeypatch.setattr(methods, "trained", never)
    assert compare(tmp_path, ["lora", "full"])[1]["cells"] == results["cells"]


@pytest.mark.slow
def test_all_methods_train_about_as_many_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(methods, "RATES", (1e-3,))
    code, results = compare(tmp_path, list(methods.METHODS))
    assert code == 0
    values = {cell["method"]: cell["values"] for cell in results["cells"]}
    assert values.keys() == methods.METHODS.keys()
    for method in ("lora, rslora", "lora+", "lora, symmetric", "lora, pissa", "lora, loftq", "loha", "additive"):
        assert values[method] == values["lora"], method
    assert max(values[name] for name in ("vera", "vera-all", "vera-qv", "vera-v")) < values["lora"] < values["full"]
