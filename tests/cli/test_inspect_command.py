"""`qlora-tool inspect` as it is typed: its screen, its files, its mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_adapters import write_adapter, write_chat_base, write_run

from qlora_tool.cli import main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    return write_run(folder / "run", write_chat_base("llama", folder / "base"))


def invoke(*args: object):
    return CliRunner().invoke(main, ["inspect", *map(str, args)])


def test_the_screen_and_both_files(run: Path, tmp_path: Path):
    result = invoke(run, "--json", tmp_path / "found.json", "--plot", tmp_path / "found.png")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == f"{run}: lora, r 4, on 14 modules of {run.parent / 'base'}"
    table = [line.split() for line in lines[3:10]]
    assert sorted(row[0] for row in table) == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    ]  # fmt: skip
    assert all(row[1:3] == ["2", "4"] for row in table)
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["method"], found["r"], len(found["modules"]), found["truncated"]) == ("lora", 4, 14, None)
    module = found["modules"]["model.layers.0.self_attn.q_proj"]
    assert module["ratio"] == pytest.approx(module["update_norm"] / module["weight_norm"])
    assert sum(value * value for value in module["singular_values"]) == pytest.approx(module["update_norm"] ** 2)
    assert found["kept_by_rank"]["4"] == pytest.approx(1)
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


def test_a_cut_adapter_says_what_it_lost_and_what_comes_next(run: Path, tmp_path: Path):
    result = invoke(run, "--truncate", 2, "--output-dir", tmp_path / "cut", "--data", run.with_suffix(".jsonl"))
    assert result.exit_code == 0, result.stderr
    kept, loss, following = result.stdout.splitlines()[-3:]
    assert kept.startswith(f"{tmp_path / 'cut'}: cut to rank 2: ") and "of the update kept" in kept
    assert loss.startswith("loss ") and loss.endswith(f"trained tokens of {run.with_suffix('.jsonl')}")
    assert following == f"next: qlora-tool export-merged {tmp_path / 'cut'} --output-dir {tmp_path / 'cut'}-merged"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--truncate", "2"], "--truncate R and --output-dir DIR go together"),
        (["--output-dir", "out"], "--truncate R and --output-dir DIR go together"),
        (["--data", "rows.jsonl"], "--data measures a cut adapter"),
        (["--plot", "a.pdf"], "invalid value for --plot: a.pdf: expected a name that ends in .png"),
        (["--truncate", "9", "--output-dir", "out"], "has updates of rank 4 at most; give a rank below 4"),
    ],
)
def test_mistakes(run: Path, words: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(run, *words)
    assert result.exit_code == 2
    (error,) = [one for one in result.stderr.splitlines() if one.startswith("error: ")]
    assert line in error
    assert not list(tmp_path.iterdir())


def test_what_is_no_adapter(run: Path):
    result = invoke(run.parent / "base")
    assert result.exit_code == 2
    assert "a model without an adapter; expected a run's folder or an adapter's" in result.stderr


def test_dora_on_one_screen(run: Path, tmp_path: Path):
    result = invoke(write_adapter(tmp_path / "dora", run.parent / "base", method="dora"))
    assert result.exit_code == 0, result.stderr
    assert "of s·BA, its low-rank part" in result.stdout and "next:" not in result.stdout
