"""`qlora-tool preview`: what a reader sees, with and without colour; and how soon faults of data are told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from child_process import child_environment
from click.testing import CliRunner
from tiny_adapters import write_chat_base

from qlora_tool.cli import main

ROWS = [{"prompt": "2 + 2?", "completion": "4"}, {"prompt": "3 + 3?", "completion": "6\n "}, {"prompt": "4 + 4?",
         "completion": ""}]  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_chat_base("llama", tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    config = {"model": {"name_or_path": "base"}, "data": {"train": "rows.jsonl", "max_length": 128, "shuffle": False}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(*args: str, **environment: str) -> str:
    result = CliRunner(env=environment).invoke(main, ["preview", "run.yaml", *args])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_a_pipe_gets_plain_signs(here: Path):
    lines = printed("--rows", "1").splitlines()
    assert lines[0] == "trained tokens stand between ⟦ and ⟧; ↵ a line end, · a space at an edge"
    assert lines[2].startswith("row 1 of 1: 2 examples, ")
    assert [line for line in lines if line.startswith("── ")] == [
        line for line in lines if line.startswith(("── rows.jsonl, line 1: ", "── rows.jsonl, line 2: "))
    ]
    assert "⟦4<|im_end|>↵⟧" in lines
    begin = lines.index("⟦6↵")
    assert lines[begin + 1] == " <|im_end|>↵⟧"
    said = "\n".join(lines)
    assert "data.train: rows.jsonl, all 3 rows" in said
    assert "3 read, 2 kept" in said and "1 row dropped: without an answer" in said
    assert "\x1b" not in said


def test_of_a_packed_row_a_few_examples_are_shown_and_the_others_counted(here: Path):
    (here / "rows.jsonl").write_text('{"text": "2 + 2?"}\n' * 6)
    lines = printed("--rows", "1", "--json", "rows.json").splitlines()
    assert lines[2].startswith("row 1 of 1: 6 examples, ")
    assert len([line for line in lines if line.startswith("── rows.jsonl, line ")]) == 4
    assert [line for line in lines if line.startswith("── 2 more examples in this row; --json FILE has all")]
    assert len(json.loads((here / "rows.json").read_text())["rows"][0]["where"]) == 6


def test_a_terminal_gets_colour_unless_it_is_not_wanted(here: Path):
    out = printed("--rows", "1", FORCE_COLOR="1", TERM="xterm-256color", COLUMNS="300")
    assert "⟦" not in out
    assert "4<|im_end|>↵" in out and "\x1b[1;4;32m4<|im_end|>" in out
    assert "⟦4<|im_end|>↵⟧" in printed("--rows", "1", FORCE_COLOR="1", TERM="xterm-256color", NO_COLOR="1")


def test_counts_alone(here: Path):
    lines = printed("--rows", "0").splitlines()
    assert not any("⟦" in line or line.startswith("row ") for line in lines)
    assert "data.train: rows.jsonl, all 3 rows" in lines


HEAVY = ("torch", "transformers", "datasets", "pyarrow", "numpy")
FAULTS = [
    ["train", "run.yaml", "--set", "data.train=gone.jsonl"],
    ["train", "run.yaml", "--set", "data.eval=broken.jsonl"],
    ["train", "run.yaml", "--set", "data.train=mute.csv"],
    ["train", "run.yaml", "--set", "data.chat_template=gone.jinja"],
    ["preview", "run.yaml", "--set", "data.train=broken.jsonl"],
    ["evaluate", "run", "--data", "mute.csv"],
    ["evaluate", "run", "--data", "a=broken.jsonl"],
    ["generate", "run", "--prompts", "broken.jsonl"],
    ["export-merged", "run", "--output-dir", "out", "--verify-data", "gone.jsonl"],
]


def test_faults_of_data_are_told_before_anything_heavy_is_imported(here: Path):
    (here / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{oops\n')
    (here / "mute.csv").write_text("prompt,notes\na,b\n")
    code = (
        "import json, sys\n"
        "from qlora_tool.cli import main\n"
        f"for args in {FAULTS!r}:\n"
        "    try:\n"
        "        main(args)\n"
        "    except SystemExit as end:\n"
        f"        print(json.dumps([end.code, sorted(set({HEAVY!r}) & set(sys.modules))]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=child_environment())
    assert [json.loads(line) for line in done.stdout.splitlines()] == [[2, []]] * len(FAULTS)
    lines = done.stderr.splitlines()
    assert len(lines) == len(FAULTS) and all(line.startswith("error: ") for line in lines)
    for line, place in zip(lines, ["gone.jsonl: no such", "broken.jsonl, line 2", "mute.csv, line 2",
                                   "gone.jinja: no such", "broken.jsonl, line 2", "mute.csv, line 2",
                                   "broken.jsonl, line 2", "broken.jsonl, line 2", "gone.jsonl: no such"],
                           strict=True):  # fmt: skip
        assert place in line
