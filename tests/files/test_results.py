"""A file that an option names for a result: only an earlier result of the same kind is replaced."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from qlora_tool import UserError
from qlora_tool.files import results
from qlora_tool.files.results import MARKS, Kind, Read, new_file

ANSWER = {"prompt": "a", "answer": "b", "tokens": 1, "finish_reason": "stop"}
SCORE = {"loss": 1.0, "perplexity": 2.0, "tokens": 3, "exact_match": None, "token_f1": None}
MADE = {
    results.ANSWERS: [json.dumps(ANSWER), f"{json.dumps(ANSWER)}\n{json.dumps(ANSWER)}\n"],
    results.SCORES: [json.dumps(value) for value in (SCORE, {"a": SCORE, "b": SCORE}, {"run": {"a": SCORE}})],
    results.PREVIEW: [json.dumps({"rows": [], "counts": {}, "eval": {}})],
    results.MEMORY: [json.dumps({"schema": 2, "device": "cpu", "predicted": None, "measured": None})],
    results.UPDATES: [json.dumps({"schema": 1, "adapter": "a", "kept_by_rank": {}, "modules": {}})],
    results.EXPORTED: [json.dumps({"output_dir": "o", "format": "gguf", "files": []})],
    results.PAGE: [f'<!doctype html><meta name="generator" content="{MARKS["report"]}">'],
    results.MEMORY_PLOT: [f'<!doctype html><meta name="generator" content="{MARKS["profile-memory"]}">'],
    results.UPDATES_PLOT: [f"PNG tEXt Software {MARKS['inspect']}"],
}
OTHERS = ["{}", "[]", "{", "[" * 100_000, '{"a": ' * 100_000, '{"prompt": "a", "completion": "b"}\n', "model:\n",
          '{"model_type": "llama"}', "\0\1\2", "plain text", json.dumps(ANSWER) + "\n{}"]  # fmt: skip


def refusal(kind: Kind, file: Path, read: Read | None = None) -> str:
    with pytest.raises(UserError) as raised:
        new_file("--json", file, kind, read or Read())
    (line,) = raised.value.lines
    assert line.startswith(f"--json {file}: ") or line.startswith(f"{file}: ")
    return line


@pytest.mark.parametrize("kind", MADE, ids=lambda kind: kind.wrote)
def test_an_earlier_result_is_replaced_and_nothing_else(kind: Kind, tmp_path: Path):
    file = tmp_path / "out"
    assert new_file("--json", file, kind, Read()) == file
    for text in ("", *MADE[kind]):
        file.write_text(text)
        assert new_file("--json", file, kind, Read()) == file
    for text in [*OTHERS, *(text for other in MADE if other is not kind for text in MADE[other])]:
        file.write_text(text)
        assert refusal(kind, file).endswith("remove it first, or name another file")


@pytest.mark.parametrize("kind", MADE, ids=lambda kind: kind.wrote)
def test_what_the_command_reads_is_refused_even_where_it_is_an_earlier_result(kind: Kind, tmp_path: Path):
    (tmp_path / "folder").mkdir()
    file = tmp_path / "folder" / "out"
    file.write_text(MADE[kind][0])
    os.link(file, tmp_path / "hard")
    (tmp_path / "soft").symlink_to(file)
    for same in (file, tmp_path / "hard", tmp_path / "soft", tmp_path / "folder" / ".." / "folder" / "out"):
        assert "is the data, too" in refusal(kind, same, Read({"the data": file}))
    assert "lies in the data" in refusal(kind, file, Read({"the data": file.parent}))
    assert new_file("--json", file, kind, Read(parts={"a model": file.parent})) == file
    file.write_text("weights")
    assert "lies in a model; name another file" in refusal(kind, file, Read(parts={"a model": file.parent}))
    for name, beside in kind.own:
        (tmp_path / beside).touch()
        (tmp_path / name).write_text(MADE[kind][0])
        assert "belongs to the folder that it lies in" in refusal(kind, tmp_path / name)


def test_what_is_no_file_is_not_replaced(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    assert "a pipe, where a file is expected" in refusal(results.SCORES, tmp_path / "pipe")
    assert "a device" in refusal(results.SCORES, Path("/dev/null"))
    assert "there is no folder" in refusal(results.SCORES, tmp_path / "no" / "out")
    file = tmp_path / "one.html"
    assert "is the file of --json, too" in refusal(results.PAGE, file, Read().and_file("--json", file))
