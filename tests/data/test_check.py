"""What is said of data before a tokenizer is there."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from qlora_tool.config import DataConfig
from qlora_tool.data import check
from qlora_tool.data.check import check_data, check_source, check_sources
from qlora_tool.data.sources import Row
from qlora_tool.errors import UserError


def write(file: Path, *rows: dict) -> str:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(file)


def test_the_faults_of_all_sources_are_told_together(tmp_path: Path):
    good = write(tmp_path / "good.jsonl", {"prompt": "a", "completion": "b"})
    mute = write(tmp_path / "mute.jsonl", {"prompt": "a"})
    number = write(tmp_path / "number.jsonl", {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": 5})
    data = DataConfig(train=mute, eval={"a": good, "b": number, "c": f"{tmp_path}/gone.jsonl"},
                      chat_template=f"{tmp_path}/gone.jinja")  # fmt: skip
    with pytest.raises(UserError) as caught:
        check_data(data)
    starts = [f"data.chat_template: {tmp_path}/gone.jinja: no such file", f"{mute}, line 1: the columns (prompt) are",
              f"{number}, line 2: 'completion' is int 5", f"{tmp_path}/gone.jsonl: no such file or folder"]  # fmt: skip
    assert len(caught.value.lines) == len(starts)
    assert [line.startswith(start) for line, start in zip(caught.value.lines, starts, strict=True)] == [True] * 4
    check_data(DataConfig(train=good, eval=0.5))
    check_data(DataConfig(train=good, eval={"a": good}))


def test_answers_of_a_text_that_somebody_asked_for(tmp_path: Path):
    text = write(tmp_path / "text.jsonl", {"text": "a"})
    check_data(DataConfig(train=text))
    check_data(DataConfig(train=text, train_on="all"))
    with pytest.raises(UserError, match=r"^data\.train_on: completion cannot go with data\.train"):
        check_data(DataConfig(train=text, train_on="completion"))


def test_questions_alone_do_to_generate(tmp_path: Path):
    mute = write(tmp_path / "mute.jsonl", {"prompt": "a"})
    check_sources([mute], need_answers=False)
    with pytest.raises(UserError):
        check_sources([mute])


def test_reading_ends_after_a_while(monkeypatch: pytest.MonkeyPatch):
    """A source without an end, of which the last row that is looked at is in order."""
    monkeypatch.setattr(check, "SECONDS", 0.05)
    row = Row({"prompt": "a", "completion": "b"}, "endless, line 1")
    endless = SimpleNamespace(rows=lambda faults: itertools.repeat(row))
    monkeypatch.setattr(check, "source_parts", lambda source: [endless])
    assert check_source("endless") == "prompt_completion"
