"""Several sources as one: shares, order, what the seed decides and what it does not."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import pytest
from tokenizers_for_tests import CHATML, byte_level

from qlora_tool.config import DataConfig, load_config
from qlora_tool.data.mixture import Share, rows_of_each
from qlora_tool.data.tokenize import build_dataset, build_evaluation_sets
from qlora_tool.errors import UserError


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level(CHATML)


@pytest.fixture
def files(tmp_path):
    """a.jsonl with 30 rows, b.csv with 10, c.txt with one of three examples."""
    rows = [{"prompt": f"a{n}", "completion": f"answer {n}"} for n in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.csv").write_text("Frage;Antwort\n" + "".join(f"b{n};answer {n}\n" for n in range(10)))
    (tmp_path / "c.txt").write_text("yes no perhaps " * 20)
    return {name: str(tmp_path / name) for name in ("a.jsonl", "b.csv", "c.txt")}


def build(train, tokenizer, seed=0, **data):
    config = load_config({"data": {"train": train, "max_length": 60, **data}})
    return build_dataset(config.data.train, config.data, tokenizer, seed=seed)


def places(dataset) -> list[str]:
    return [example.where.rpartition("/")[2] for example in dataset.examples]


def by_file(dataset) -> Counter:
    return Counter(place.partition(",")[0] for place in places(dataset))


def test_a_list_alone_is_one_after_the_other(files, tokenizer):
    made = build([files["a.jsonl"], files["b.csv"]], tokenizer)
    alone = [build(files[name], tokenizer) for name in ("a.jsonl", "b.csv")]
    assert list(made.examples) == [example for one in alone for example in one.examples]
    assert list(made.lengths) == [length for one in alone for length in one.lengths]
    assert made.report.trained_tokens == sum(one.report.trained_tokens for one in alone)
    for name in ("a.jsonl", "b.csv"):
        with open(files[name], "rb") as stream:
            assert made.report.files[files[name]] == hashlib.sha256(stream.read()).hexdigest()


@pytest.mark.parametrize(
    ("weights", "expected"), [((1, 1), (20, 20)), ((3, 1), (30, 10)), ((1, 3), (10, 30)), ((0.5, 0.25), (27, 13)),
                              ((0, 1), (0, 10))],
)  # fmt: skip
def test_weights_are_shares_of_the_rows(files, tokenizer, weights, expected):
    entries = [{"path": files["a.jsonl"], "weight": weights[0]}, {"path": files["b.csv"], "weight": weights[1]}]
    made = build(entries, tokenizer)
    counts = by_file(made)
    assert (counts["a.jsonl"], counts["b.csv"]) == expected
    total = sum(expected)
    shown = made.report.lines()[1:3]
    assert shown[0].startswith(f"  {expected[0] / total:.1%} {files['a.jsonl']}: {expected[0]} rows out of 30 (")
    assert shown[1].startswith(f"  {expected[1] / total:.1%} {files['b.csv']}: {expected[1]} rows out of 10 (")
    assert "Frage as prompt, Antwort as completion" in shown[1]


def test_rows_and_repeats(files, tokenizer):
    made = build([{"path": files["a.jsonl"], "rows": 5}, {"path": files["b.csv"], "repeat": 2.5}], tokenizer)
    assert by_file(made) == {"a.jsonl": 5, "b.csv": 25}
    often = Counter(place for place in places(made) if place.startswith("b.csv"))
    assert set(often.values()) == {2, 3} and len(often) == 10
    assert len({place for place in places(made) if place.startswith("a.jsonl")}) == 5
    more = build([{"path": files["b.csv"], "rows": 23}, files["a.jsonl"]], tokenizer)
    assert by_file(more) == {"b.csv": 23, "a.jsonl": 30}


def test_far_more_rows_than_there_are_are_refused(files, tokenizer):
    """Their numbers alone would fill the memory."""
    for share in ({"rows": 20_000_001}, {"rows": 100_000_000}):
        with pytest.raises(UserError, match=f"{share['rows']:,} rows are asked for by rows and repeat, of 30 that"):
            build([{"path": files["a.jsonl"], **share}], tokenizer)
    assert rows_of_each([Share(repeat=10.0)], [30_000_000]) == [300_000_000]


def test_a_row_of_several_examples_is_taken_whole(files, tokenizer):
    whole = places(build(files["c.txt"], tokenizer))
    assert len(whole) > 1
    made = places(build([{"path": files["c.txt"], "repeat": 2}, {"path": files["a.jsonl"], "rows": 4}], tokenizer))
    assert [place for place in made if place.startswith("c.txt")] == whole * 2
    begin = made.index(whole[0])
    assert made[begin : begin + len(whole)] == whole


def test_the_seed_decides_which_rows_and_nothing_else_does(files, tokenizer):
    entries = [{"path": files["a.jsonl"], "rows": 8}, {"path": files["b.csv"], "weight": None}]
    first = places(build(entries, tokenizer))
    assert places(build(entries, byte_level(CHATML))) == first
    others = [places(build(entries, tokenizer, seed=seed)) for seed in range(1, 4)]
    assert all(other != first for other in others)
    chosen = [place for place in first if place.startswith("a.jsonl")]
    assert chosen == sorted(chosen, key=lambda place: int(place.rpartition(" ")[2]))  # the file's order


def test_sources_are_spread_evenly(files, tokenizer):
    made = places(build([{"path": files["a.jsonl"], "weight": 3}, {"path": files["b.csv"], "weight": 1}], tokenizer))
    for begin in range(0, len(made) - 8, 4):
        assert 1 <= sum(place.startswith("b.csv") for place in made[begin : begin + 8]) <= 3


def test_each_source_is_read_in_its_own_way(files, tokenizer):
    entry = {"path": files["b.csv"], "columns": {"prompt": "Antwort", "completion": "Frage"}}
    made = build([files["a.jsonl"], entry, {"path": files["c.txt"], "format": "text"}], tokenizer)
    b = next(example for example in made.examples if "b.csv" in example.where)
    text = tokenizer.decode(b.input_ids)
    assert text.index("answer 0") < text.index("b0")
    assert made.report.format == "prompt_completion + text" and made.report.train_on == "completion"


def test_a_fraction_for_evaluation_takes_each_example_once_and_out_of_all_repeats(files, tokenizer):
    entries = [{"path": files["b.csv"], "repeat": 4}, files["a.jsonl"]]
    data = load_config({"data": {"train": entries, "eval": 0.25}}).data
    train, sets = build_evaluation_sets(data, tokenizer, build_dataset(data.train, data, tokenizer))
    held = places(sets["eval"])
    assert len(held) == len(set(held)) == 10
    assert not set(held) & set(places(train))
    assert len(set(held) | set(places(train))) == 40
    assert all(count == (4 if place.startswith("b.csv") else 1) for place, count in Counter(places(train)).items())


def test_a_list_for_evaluation(files, tokenizer):
    data = load_config({"data": {"train": files["a.jsonl"], "eval": [files["b.csv"], files["a.jsonl"]]}}).data
    _, sets = build_evaluation_sets(data, tokenizer, build_dataset(data.train, data, tokenizer))
    assert by_file(sets["eval"]) == {"b.csv": 10, "a.jsonl": 30}


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([{"path": "a", "weight": 0}, {"path": "b", "weight": 0.0}], "every weight is 0"),
        ([{"path": "a", "weight": 1}, "b"], "entry 1 has a weight and entry 2 has none"),
        ([{"path": "a", "weight": 1, "rows": 5}], "entry 1 has weight and rows; give one of them"),
        ([{"path": "a", "repeat": 0}], "entry 1: repeat is 0, expected a number above 0"),
        ([{"path": "a", "rows": 0}], "entry 1: rows is 0, expected a whole number from 1 to 100,000,000"),
        ([{"weight": 1}], "entry 1 has no path"),
        ([{"path": "a", "wieght": 1}], "entry 1 has the unknown key 'wieght'; did you mean 'weight'?"),
        ([{"path": "a", "format": "alpacca"}], "entry 1: format is 'alpacca'"),
        ([{"path": "a", "columns": {"promt": "x"}}], "entry 1: columns: unknown key 'promt'; did you mean 'prompt'?"),
    ],
)
def test_a_list_that_cannot_be_meant(entries, reason):
    with pytest.raises(UserError) as raised:
        load_config({"data": {"train": entries}})
    (line,) = raised.value.lines
    assert line.startswith("configuration: data.train: expected ") and reason in line


def test_text_in_a_mixture_does_not_contradict_answers_in_it(files, tokenizer):
    build([files["a.jsonl"], files["c.txt"]], tokenizer, train_on="completion")
    with pytest.raises(UserError, match=r"data.train_on: completion cannot go with data.train .*c\.txt"):
        build([files["c.txt"], files["c.txt"]], tokenizer, train_on="completion")


class TestFaultyRows:
    BROKEN = '{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n{"prompt": "c", "completion": 4}\n{"prompt": "d"}\n'

    def test_are_an_error_with_their_lines(self, tmp_path, tokenizer):
        path = tmp_path / "rows.jsonl"
        path.write_text(self.BROKEN)
        with pytest.raises(UserError) as raised:
            build(str(path), tokenizer)
        assert raised.value.lines[0].startswith(f"{path}, line 2: not JSON")

    def test_are_left_out_and_counted_where_asked_for(self, tmp_path, tokenizer):
        path = tmp_path / "rows.jsonl"
        path.write_text(self.BROKEN)
        made = build(str(path), tokenizer, on_error="skip")
        assert [example.where for example in made.examples] == [f"{path}, line 1"]
        assert made.report.faulty == 3
        (line,) = [line for line in made.report.warnings() if "faulty" in line]
        assert line.startswith(f"3 faulty rows skipped: {path}, line 2: not JSON")
        assert f"{path}, line 3: 'completion' is int 4" in line and f"{path}, line 4: no column" in line

    def test_where_all_are_there_is_nothing_to_learn(self, tmp_path, tokenizer):
        path = tmp_path / "rows.jsonl"
        path.write_text("nonsense\n" * 7)
        with pytest.raises(UserError, match=r"nothing to learn from.*7 faulty rows skipped.*and 2 more"):
            build(str(path), tokenizer, on_error="skip")


def test_a_folder_names_what_it_skips_and_reads_each_file_in_its_own_format(files, tmp_path, tokenizer):
    (tmp_path / "notes.docx").write_text("x")
    with pytest.raises(UserError, match=r"c\.txt: text, and what comes before it in .* is not; name the two apart"):
        build(str(tmp_path), tokenizer)
    (tmp_path / "c.txt").unlink()
    made = build(str(tmp_path), tokenizer)
    assert by_file(made) == {"a.jsonl": 30, "b.csv": 10}
    assert "files not read, as they are no data files: notes.docx" in made.report.warnings()


def test_a_folder_of_which_a_part_looks_held_out(files, tmp_path, tokenizer):
    for name in ("b.csv", "c.txt"):
        (tmp_path / name).unlink()
    (tmp_path / "test.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (line,) = build(str(tmp_path), tokenizer).report.warnings()
    assert line.startswith(f"{tmp_path}: {tmp_path / 'test.jsonl'} read with the others; where that is to be evaluated")


def test_columns_not_used_are_named(tmp_path, tokenizer):
    path = tmp_path / "rows.csv"
    path.write_text("id,question,answer,source\n1,a,b,c\n")
    made = build_dataset(str(path), DataConfig(), tokenizer)
    assert "columns not used: id, source" in made.report.warnings()
