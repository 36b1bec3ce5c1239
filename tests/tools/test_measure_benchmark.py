"""The benchmark: what is counted, what a ratio is, which batches are compared; and a tiny one from end to end."""

from __future__ import annotations

import argparse
import gc
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from measuring import benchmark, ours, sides
from measuring.benchmark import scenarios, worker
from measuring.benchmark.figures import figures_of
from measuring.command import main
from tiny_runs import write_model, write_rows

from qlora_tool.config import Config
from qlora_tool.errors import MachineError

MB = 1_000_000


def block(millions: int) -> torch.Tensor:
    return torch.empty(millions * MB, dtype=torch.uint8)


def test_the_count_is_what_was_there_and_what_came_on_top():
    gc.collect()  # what earlier tests left in cycles must not be freed between the two counts
    before = sides.live_tensor_bytes()
    kept = block(30)
    view = kept[: 5 * MB]  # the same storage: not counted twice

    def step() -> None:
        first = block(20)
        del first
        second, third = block(7), block(8)
        del second, third

    found = sides.peak_tensor_bytes(step, torch.device("cpu"))
    assert found["before_bytes"] - before == pytest.approx(30 * MB, abs=1000) and view.numel() == 5 * MB
    assert found["peak_bytes"] - found["before_bytes"] == pytest.approx(20 * MB, abs=1000)


def test_gradients_that_are_kept_count():
    weight = torch.zeros(MB, requires_grad=True)
    before = sides.live_tensor_bytes()
    weight.sum().backward()
    assert sides.live_tensor_bytes() - before == 4 * MB


def lane(seconds: list[float], tokens: list[int], losses: list[float], peak: int | None, side: str = "a") -> dict:
    return {"side": side, "seconds": seconds, "tokens": tokens, "losses": losses,
            "memory": None if peak is None else {"peak_bytes": peak}}  # fmt: skip


def raw(demands: list[dict]) -> dict:
    """Round by round 200, 100, 50 useful tokens a second against 100, 100, 100."""
    return {
        "sides": {"a": {"device": "NVIDIA H100 80GB HBM3", "recomputed_share": 1.0}, "b": {"device": "cpu"}},
        "lanes": {"ours": lane([1.0, 2.0, 4.0], [200, 200, 200], [4.0, 3.0, 2.1], 40),
                  "peft": lane([1.0, 1.0, 1.0], [100, 100, 100], [4.0, 3.0, 2.0], 100, "b")},
        "ratios": {"ours": ("ours", "peft")}, "facts": {"rows_fill": 0.98}, "demands": demands,
    }  # fmt: skip


def demand(figure: str, of: str, limit: float, at_least: bool = True) -> dict:
    return {"figure": figure, "of": of, "limit": limit, "at_least": at_least}


def test_ratios_are_of_pairs():
    figures = figures_of(raw([]))
    ratio = figures["ratios"]["ours"]
    assert ratio["speed"] == {"median": 1.0, "min": 0.5, "max": 2.0}
    assert ratio["memory"] == 0.4 and ratio["curve"] == pytest.approx(0.05)
    assert figures["lanes"]["ours"]["tokens_per_second"] == pytest.approx(600 / 7)
    # 41.8 GFLOP a token at 800 TFLOP/s: 19.1 k tokens/s with everything recomputed.
    assert figures["lanes"]["ours"]["share_of_bound"] == pytest.approx(600 / 7 / (800e3 / 41.8))
    assert figures["lanes"]["peft"]["share_of_bound"] is None


@pytest.mark.parametrize(
    ("one", "passed"),
    [
        (demand("speed", "ours", 1.0), True), (demand("speed", "ours", 1.01), False),
        (demand("memory", "ours", 0.4, False), True), (demand("memory", "ours", 0.39, False), False),
        (demand("curve", "ours", 0.06, False), True), (demand("curve", "ours", 0.04, False), False),
        (demand("peak_bytes", "ours", 40, False), True), (demand("peak_bytes", "ours", 39, False), False),
        (demand("fact", "rows_fill", 0.97), True), (demand("fact", "rows_fill", 0.99), False),
        (demand("share_of_bound", "peft", 0.0), False),  # not measured is not passed
    ],
)  # fmt: skip
def test_verdicts(one: dict, passed: bool):
    figures = figures_of(raw([one]))
    assert figures["passed"] is passed and [verdict["passed"] for verdict in figures["verdicts"]] == [passed]


def test_a_loss_at_every_row():
    from qlora_tool.data.batches import collate
    from qlora_tool.data.tokenize import Example

    rows = [[Example([5, 6, 7], [-100, -100, 7], "1")], [Example([8, 9], [-100, 9], "2")]]
    batch = collate(rows, pad_token_id=0, packing=False)
    every = ours.every_position_in_the_loss(batch)
    assert every.predicting.tolist() == [0, 1, 3, 4] and every.targets.tolist() == [6, 7, 9, 0]
    assert batch.trained_tokens == 2 and every.trained_tokens == 4 and every.tokens == batch.tokens == 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


def options(model: Path, train: Path) -> argparse.Namespace:
    return argparse.Namespace(
        model=str(model), train=str(train), rows=4, length=None, steps=2, warmup=1, r=4, lr=1e-3, seed=0,
        set=["data.max_length=128"], max_memory="1GB",
    )  # fmt: skip


def test_packed_rows_hold_about_as_many_tokens(model: Path, tmp_path: Path):
    asked = options(model, write_rows(tmp_path / "rows.jsonl", 60))
    scenario = scenarios.SCENARIOS["packing"]
    found = scenario.make(scenarios.configuration(scenario, asked), asked)
    padded, packed = found.batches["padded"], found.batches["packed"]
    assert [batch.where for batch in padded[:2]] == [
        [f"{tmp_path / 'rows.jsonl'}, line {line}" for line in range(start, start + 4)] for start in (1, 5)
    ]
    size = sum(batch.input_ids.numel() for batch in padded) / len(padded)
    rows = found.facts["packed_rows_a_batch"]
    assert rows >= 1 and abs(rows * 128 - size) <= 64  # half a row
    assert packed[0].input_ids.shape[0] == rows and packed[0].position_ids is not None
    assert found.facts["rows_fill"] == pytest.approx(_fill(asked), abs=1e-9)
    # The factors multiply to the whole: each begins where the one before ends.
    chain = [found.ratios[name] for name in ("of it, kernels", "of it, fewer loss rows", "of it, packing")]
    assert chain[0][1] == found.ratios["ours"][1] and chain[-1][0] == found.ratios["ours"][0]
    assert all(earlier[0] == later[1] for earlier, later in pairwise(chain))


def _fill(asked: argparse.Namespace) -> float:
    """Tokens over room, of all rows of the epoch, counted in its batches."""
    asked.steps = 1000
    scenario = scenarios.SCENARIOS["packing"]
    every = scenario.make(scenarios.configuration(scenario, asked), asked).batches["packed"]
    return sum(batch.tokens for batch in every) / (128 * sum(batch.input_ids.shape[0] for batch in every))


@pytest.mark.slow
def test_both_sides_step_in_turn_from_the_same_start(model: Path, tmp_path: Path, capsys):
    file = tmp_path / "found.json"
    sizes = ["--steps", "2", "--warmup", "1", "--rows", "2", "--length", "32", "--r", "4", "--lr", "1e-3"]
    outputs = ["--json", str(file), "--plot", str(tmp_path / "b.png")]
    code = main("measuring", ["benchmark", "checkpointed", str(model), *sizes, *outputs])
    found = json.loads(file.read_text())
    assert code == (0 if found["passed"] else 1) and found["finished"]
    here, peft = found["lanes"]["ours"], found["lanes"]["peft"]
    assert here["losses"] == pytest.approx(peft["losses"], rel=1e-3) and len(here["seconds"]) == 2
    assert here["tokens"] == peft["tokens"] == [64, 64]
    assert 0 < here["peak_bytes"] < peft["peak_bytes"]
    assert here["categories"]["peak_bytes"] == pytest.approx(here["peak_bytes"], rel=0.1)
    assert found["sides"]["ours"]["recomputed_share"] == 1.0
    assert (tmp_path / "b.png").stat().st_size > 1000
    assert "ours" in capsys.readouterr().out


def test_the_plain_side_takes_no_fused_operation(model: Path, monkeypatch):
    from qlora_tool.adapters import fusion
    from qlora_tool.methods import lora
    from qlora_tool.ops import lora as ops_lora

    calls = []
    monkeypatch.setattr(lora.Lora, "fused", True)  # the plain side sets it, for all of its process
    for module, name in ((ops_lora, "lora_linear"), (fusion, "lora_linear"), (fusion, "lora_gated_mlp")):
        monkeypatch.setattr(module, name, _counted(getattr(module, name), calls))
    asked = options(model, Path("none.jsonl"))
    config = scenarios.configuration(scenarios.SCENARIOS["curves"], asked)
    batch, losses = ours.random_row(40, 200), {}
    for kind in ("ours", "plain"):
        side = sides.SIDES[kind](config, batch)
        calls.clear()
        losses[kind] = [side.step(batch) for _ in range(3)]
        assert bool(calls) is (kind == "ours")
    assert losses["ours"] == pytest.approx(losses["plain"], rel=1e-5) and losses["ours"][2] < losses["ours"][0]


def _counted(function, calls: list):
    def counting(*arguments, **options):
        calls.append(function)
        return function(*arguments, **options)

    return counting


def test_a_lane_that_fails_leaves_the_others(model: Path, tmp_path: Path, monkeypatch):
    """Here PEFT's side ends, as where memory is out; the other lane is timed to the end, and nothing is passed."""

    class FakeWorker:
        def __init__(self, name, kind, config, batches):
            self.kind, self.facts = kind, {"trained_weights": 1, "device": "cpu"}

        def ask(self, **command):
            return {}

        def try_to(self, do, batch):
            if self.kind == "peft" and batch[1] == 2:
                return {"error": "out of memory"}
            return {"seconds": 1.0, "loss": 2.0, "tokens": 10, "peak_bytes": 5}

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(benchmark, "Worker", FakeWorker)
    file = tmp_path / "found.json"
    sizes = ["--steps", "4", "--warmup", "1", "--rows", "1", "--length", "8"]
    assert main("measuring", ["benchmark", "checkpointed", str(model), *sizes, "--json", str(file)]) == 1
    lanes = json.loads(file.read_text())["lanes"]
    assert lanes["peft"]["error"] == "out of memory" and len(lanes["peft"]["seconds"]) == 1
    assert len(lanes["ours"]["seconds"]) == 4 and lanes["ours"]["peak_bytes"] == 5


def test_a_side_that_cannot_be_built_says_why(tmp_path: Path):
    torch.save({"rows": []}, tmp_path / "batches.pt")
    with pytest.raises(MachineError, match=r"^mine: .*max\(\)"):
        worker.Worker("mine", "ours", Config(), tmp_path / "batches.pt")
