"""What `preview` shows is what training is given."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_runs import run_config, write_model, write_rows
from tokenizers_for_tests import CHATML, byte_level

from qlora_tool import PreviewResult, UserError, preview
from qlora_tool.config import Config, with_values
from qlora_tool.data import one_source, sources
from qlora_tool.data.batches import Batch
from qlora_tool.training import loop


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    write_model(folder / "model")
    write_rows(folder / "rows.jsonl")
    return folder


def config_of(place: Path, values: dict) -> Config:
    return run_config(place / "model", place / "rows.jsonl", place / "run", values)


class Seen(Exception):
    """Training has been given what it is to learn from."""


def first_batches(config: Config, monkeypatch: pytest.MonkeyPatch, output_dir: Path) -> list[Batch]:
    """What the first step of a real run is given."""
    batches: list[Batch] = []

    def step(model, optimizer, given, *rest):
        batches.extend(given)
        raise Seen

    monkeypatch.setattr(loop, "train_step", step)
    with pytest.raises(Seen):
        loop.train(with_values(config, {"training.output_dir": str(output_dir)}))
    return batches


@pytest.mark.parametrize("values", [
    {"data.packing": True},
    {"data.packing": True, "data.shuffle": False, "data.eval": 0.2, "training.gradient_accumulation_steps": 2},
    {"data.packing": False, "data.padding_free": False, "training.seed": 3},
    {"data.train_on": "all", "data.packing": True, "data.max_length": 60},
])  # fmt: skip
def test_rows_are_what_the_first_step_is_given(
    place: Path, values: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = config_of(place, values)
    batches = first_batches(config, monkeypatch, tmp_path / "run")
    given = [(ids, labels) for batch in batches for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(),
             strict=True)]  # fmt: skip
    shown = preview(config, rows=len(given))
    assert len(shown.rows) == len(given)
    for row, (ids, labels) in zip(shown.rows, given, strict=True):
        length = len(row.input_ids)
        assert (row.input_ids, row.labels) == (ids[:length], labels[:length])
        assert set(labels[length:]) <= {-100}  # padding
    assert [where for row in shown.rows for where in row.where] == [w for batch in batches for w in batch.where]
    assert sum(row.trained_tokens for row in shown.rows) == sum(batch.trained_tokens for batch in batches)


def test_counts_text_and_places(place: Path, tmp_path: Path):
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                      {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bb"}]},
        {"messages": [{"role": "user", "content": "alone"}]},
    ]  # fmt: skip
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    values = {"data.train": str(file), "data.eval": str(place / "rows.jsonl"), "data.shuffle": False}
    result = preview(config_of(place, values), rows=9, json=tmp_path / "preview.json")
    assert isinstance(result, PreviewResult)
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"

    def text(*turns: str) -> str:
        roles = ("user", "assistant") * 2
        return system + "".join(f"<|im_start|>{r}\n{t}<|im_end|>\n" for r, t in zip(roles, turns, strict=False))

    assert [row.text for row in result.rows] == [text("a", "b", "c", "d"), text("a", "bb")]
    trained = [[span.text for span in row.examples[0].spans if span.trained] for row in result.rows]
    assert trained == [["b<|im_end|>\n", "d<|im_end|>\n"], ["bb<|im_end|>\n"]]
    assert [row.where for row in result.rows] == [[f"{file}, line 1"], [f"{file}, line 2"]]
    written = json.loads((tmp_path / "preview.json").read_text())
    assert written == result.as_json()
    tokens = [len(byte_level(CHATML)(row.text, add_special_tokens=False)["input_ids"]) for row in result.rows]
    counts = written["counts"]
    expected = {"rows": 3, "kept": 2, "dropped_no_answer": 1, "tokens": sum(tokens), "longest": max(tokens),
                "over": "all 3 rows", "more_rows": False, "answers_per_row": {"1": 1, "2": 1}}  # fmt: skip
    assert expected.items() <= counts.items()
    assert counts["trained_tokens"] == sum(label != -100 for row in written["rows"] for label in row["labels"])
    assert written["eval"]["eval"]["rows"] == 30


def test_the_first_2000_rows_or_all(place: Path, tmp_path: Path):
    file = tmp_path / "many.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n' * 2000 + '{"prompt": "a", "completion": "bcd"}\n' * 3)
    config = config_of(place, {"data.train": str(file), "data.eval": {"many": str(file)}})
    some, every = preview(config, rows=0), preview(config, rows=0, all=True)
    assert (some.counts.over, some.counts.report.rows) == ("the first 2,000 rows", 2000)
    assert (every.counts.over, every.counts.report.rows) == ("all 2,003 rows", 2003)
    assert some.counts.report.longest < every.counts.report.longest
    assert (some.evaluations["many"].report.rows, some.rows) == (2000, ())
    with pytest.raises(UserError, match="--rows: expected at least 0, found -1"):
        preview(config, rows=-1)


def test_data_that_are_kept_are_counted_whole(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(one_source, "KEPT_FROM", 1)
    monkeypatch.setattr(sources, "HASH_KEPT_FROM", 1)
    file = tmp_path / "many.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n' * 2000 + '{"prompt": "a", "completion": "bcd"}\n' * 3)
    config = config_of(place, {"data.train": str(file), "data.packing": True})
    assert preview(config).counts.over == "the first 2,000 rows"
    every = preview(config, all=True)
    assert preview(config) == every and every.counts.over == "all 2,003 rows"
    file.write_text('{"prompt": "a", "completion": "b"}\n' * 2001)
    assert preview(config).counts.over == "the first 2,000 rows"


def test_of_many_examples_the_first_rows_alone_are_packed(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("qlora_tool.training.preview.PACKED", 5)
    monkeypatch.setattr("qlora_tool.training.preview.FIRST_ROWS", 3)
    monkeypatch.setattr(one_source, "KEPT_FROM", 0)
    config = config_of(place, {"data.packing": False})
    whole = preview(config, rows=100, all=True)  # keeps the data
    assert whole.packed_first is None and whole.rows_per_epoch == len(whole.rows) == whole.counts.report.kept > 5
    some = preview(config, rows=100)
    assert (some.packed_first, some.rows_per_epoch, len(some.rows)) == (3, 3, 3)
    assert some.counts.report.kept == whole.counts.report.kept
    first = {f"{place / 'rows.jsonl'}, line {number}" for number in (1, 2, 3)}
    assert {where for row in some.rows for where in row.where} <= first


def test_no_weights_are_needed_and_no_configuration(place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    expected = preview(config_of(place, {"data.packing": True}))
    bare = shutil.copytree(place / "model", tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    assert preview(config_of(place, {"data.packing": True, "model.name_or_path": str(bare)})) == expected
    (bare / "config.json").unlink()
    assert preview(config_of(place, {"data.packing": True, "model.name_or_path": str(bare)})) == expected
    assert "no config.json in it" in caplog.text


def test_what_training_refuses_is_refused(place: Path):
    with pytest.raises(UserError, match=r"data\.max_length: 4096, but the model's max_position_embeddings is 256"):
        preview(config_of(place, {"data.max_length": 4096}))


def test_a_text_is_trained_whole(place: Path, tmp_path: Path):
    (tmp_path / "book.txt").write_text("Once upon a time.\n" * 40)
    result = preview(config_of(place, {"data.train": str(tmp_path / "book.txt"), "data.shuffle": False}), rows=99)
    assert "".join(row.text for row in result.rows) == "Once upon a time.\n" * 40 + "<|im_end|>"
    assert result.counts.answers == {}
    assert all(row.labels == [-100, *row.input_ids[1:]] for row in result.rows)
    first, second = (row.where[0] for row in result.rows[:2])
    assert first.endswith("book.txt, tokens 1-128") and second.endswith("book.txt, tokens 129-256")


def test_training_shows_its_first_example(place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", "qlora_tool")
    config = config_of(place, {"data.packing": True, "training.output_dir": str(tmp_path / "run")})
    loop.train(config, dry_run=True)
    (line,) = [record.getMessage() for record in caplog.records if "first example" in record.getMessage()]
    example = preview(config, rows=1).rows[0].examples[0]
    assert example.where in line and f"{example.trained_tokens} of them trained" in line
    assert line.endswith(f"⟦{example.spans[1].text}".replace("\n", "↵") + "⟧")
