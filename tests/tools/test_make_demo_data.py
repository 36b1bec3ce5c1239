"""The demo task: the same rows every time, answers copied from the text, no value shared between the two halves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MAKE = Path(__file__).parents[2] / "tools" / "make"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, MAKE, "demo-data", *map(str, arguments)], capture_output=True, text=True)


def rows(folder: Path, seed: int, count: int, *options: str) -> list[tuple[str, str]]:
    """The text and the answer of each row."""
    file = folder / f"{seed}{''.join(options)}.jsonl"
    done = run("--seed", seed, "--rows", count, *options, file)
    assert done.returncode == 0, done.stderr
    conversations = [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(conversations) == count
    assert all([message["role"] for message in one] == ["system", "user", "assistant"] for one in conversations)
    return [(one[1]["content"], one[2]["content"]) for one in conversations]


def test_same_options_same_bytes(tmp_path: Path):
    run("--seed", 7, "--rows", 50, tmp_path / "a.jsonl")
    run("--seed", 7, "--rows", 50, tmp_path / "b.jsonl")
    run("--seed", 8, "--rows", 50, tmp_path / "c.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    first, other = ((tmp_path / name).read_text().splitlines() for name in ("a.jsonl", "c.jsonl"))
    assert not set(first) & set(other)


def test_the_same_row_in_every_python(tmp_path: Path):
    text, answer = rows(tmp_path, 1, 1)[0]
    assert text == (
        "Hey there, this is Mr Tamtira Raviwall, please send 145 ochre hinges to 6863 Redrebridge by 2 February. "
        "Thanks!"
    )
    assert answer == (
        '{"customer": "Mr Tamtira Raviwall", "items": "145 ochre hinges", "town": "6863 Redrebridge", '
        '"date": "2 February"}'
    )


@pytest.mark.parametrize("split", ["train", "eval"])
def test_answers_are_strict_json_that_copies_the_text(tmp_path: Path, split: str):
    for text, answer in rows(tmp_path, 3, 300, "--split", split):
        order = json.loads(answer)
        assert list(order) == ["customer", "items", "town", "date"]
        assert json.dumps(order) == answer
        assert all(text.count(value) == 1 for value in order.values()), text


def values(answers: list[str]) -> dict[str, set[str]]:
    """Every value, and every part of one that carries it: names, numbers, kinds of things, things."""
    found: dict[str, set[str]] = {}
    for answer in answers:
        order = json.loads(answer)
        _, first_name, surname = order["customer"].split()
        number, kind, thing = order["items"].split()
        postcode, town = order["town"].split()
        parts = {"first": first_name, "surname": surname, "number": number, "kind": kind, "thing": thing}
        for name, value in {**order, **parts, "postcode": postcode, "town name": town}.items():
            found.setdefault(name, set()).add(value)
    return found


def test_no_value_of_an_evaluation_row_is_in_any_training_row(tmp_path: Path):
    train = values([answer for seed in range(4) for _, answer in rows(tmp_path, seed, 1500)])
    held_out = values([answer for seed in range(4) for _, answer in rows(tmp_path, seed, 1500, "--split", "eval")])
    for name in train:
        assert not train[name] & held_out[name], name
    # Enough different ones that the halves are no accident, and that a model cannot learn them by heart.
    assert min(len(found[name]) for found in (train, held_out) for name in ("kind", "thing")) > 30
    assert min(len(found[name]) for found in (train, held_out) for name in ("first", "surname", "town name")) > 1000


def test_faults_are_one_line_each(tmp_path: Path):
    none = run("--rows", 0, tmp_path / "x.jsonl")
    assert none.returncode == 2 and "at least 1 expected" in none.stderr
    taken = run("--rows", 1, tmp_path)
    assert taken.returncode == 1
    assert taken.stderr.startswith(f"error: cannot write {tmp_path}: {tmp_path} is a folder, where something else is")
    assert len(taken.stderr.splitlines()) == 1
    assert not list(tmp_path.parent.glob(".*.partial"))
