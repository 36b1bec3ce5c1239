"""Rows out of files: what is read, where it is said to stand, and what a broken file is told."""

from __future__ import annotations

import hashlib
import json

import pyarrow
import pyarrow.parquet
import pytest

from qlora_tool.data.faults import RowFaults
from qlora_tool.data.sources import hashes, read_rows, source_files
from qlora_tool.errors import MachineError, UserError

KINDS = ".json, .jsonl, .ndjson, .csv, .tsv, .xlsx, .parquet, .arrow or .txt"


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def faults(source) -> list[str]:
    with pytest.raises(UserError) as raised:
        list(read_rows(source))
    return raised.value.lines


def places(source) -> list[tuple[str, dict]]:
    return [(row.where.removeprefix(str(source)), row.fields) for row in read_rows(source)]


def test_jsonl_rows_are_named_by_line_in_spite_of_bom_blank_lines_and_odd_line_ends(tmp_path):
    text = '{"text": "a\u2028b"}\r\n\n   \n{"text": "c"}\n'
    source = write(tmp_path, "rows.jsonl", b"\xef\xbb\xbf" + text.encode())
    assert places(source) == [(", line 1", {"text": "a\u2028b"}), (", line 4", {"text": "c"})]


def test_a_broken_line_of_jsonl_is_named_with_the_reason(tmp_path):
    lines = ['{"text": "fine"}'] * 20
    lines[16] = '{"text": fine}'
    lines[18] = '["text"]'
    source = write(tmp_path, "rows.jsonl", "\n".join(lines))
    assert faults(source) == [
        f"{source}, line 17: not JSON (Expecting value, column 10)",
        f'{source}, line 19: a list, expected an object such as {{"prompt": "…", "completion": "…"}}',
    ]


def test_of_many_broken_lines_five_are_shown_and_the_rest_counted(tmp_path):
    source = write(tmp_path, "rows.jsonl", "nonsense\n" * 8)
    lines = faults(source)
    assert [line.partition(": ")[0] for line in lines[:5]] == [f"{source}, line {n}" for n in range(1, 6)]
    assert lines[5:] == ["and 3 more faulty rows"]


ENCODED = {
    "a.jsonl": '{"text": "one"}\n{"text": "café “”"}\n', "a.json": '[{"text": "one"},\n{"text": "café “”"}]',
    "a.csv": "text\none\ncafé “”\n", "a.tsv": "text\tid\none\t1\ncafé “”\t2\n",
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_every_usual_encoding_gives_the_same_text(tmp_path, name, encoding):
    source = write(tmp_path, name, ENCODED[name].encode(encoding))
    told = RowFaults()
    assert [row.fields["text"] for row in read_rows(source, told)] == ["one", "café “”"]
    assert not told.lines
    assert bool(told.remarks) == (encoding == "cp1252")
    assert all("read as Windows-1252" in line for line in told.remarks)


def test_a_book_in_another_encoding(tmp_path):
    source = write(tmp_path, "a.txt", "one\ncafé".encode("cp1252"))
    told = RowFaults()
    assert [row.fields["text"] for row in read_rows(source, told)] == ["one\ncafé"]
    assert told.remarks == [
        f"{source}: not UTF-8 (line 2, byte 0xe9): read as Windows-1252; where letters come out wrong, save it as UTF-8"
    ]


def test_a_broken_byte_in_utf8_is_a_faulty_row(tmp_path):
    good = '{"text": "caf\u00e9 \u2026"}\n'.encode()
    source = write(tmp_path, "a.jsonl", good + b'{"text": "\xff"}\n' + good)
    assert faults(source) == [f"{source}, line 2: not UTF-8 (byte 0xff); save the file as UTF-8"]
    source = write(tmp_path, "a.csv", b"text\n" + "café…\n".encode() + b"\xff\n")
    assert faults(source) == [f"{source}, line 3: not UTF-8 (byte 0xff); save the file as UTF-8"]


def test_json_rows_are_named_by_the_line_they_begin_on(tmp_path):
    rows = [{"text": "a"}, {"text": "b", "more": [1, 2]}, {"text": "c"}]
    source = write(tmp_path, "rows.json", json.dumps(rows, indent=2))
    lines = json.dumps(rows, indent=2).split("\n")
    begins = [number for number, line in enumerate(lines, start=1) if line == "  {"]
    assert places(source) == [(f", line {begins[i]} (row {i + 1})", rows[i]) for i in range(3)]


def test_json_with_a_data_list_and_json_with_a_row_a_line(tmp_path):
    text = '{"version": {"data": 1}, "note": "]",\n "data": [{"text": "a"},\n\n {"text": "b"}\n], "end": []}'
    rows = [{"text": "a"}, {"text": "b"}]
    source = write(tmp_path, "wrapped.json", text)
    assert places(source) == [(", line 2 (row 1)", rows[0]), (", line 4 (row 2)", rows[1])]
    source = write(tmp_path, "lines.json", '{"text": "a"}\n{"text": "b"}\n')
    assert places(source) == [(", line 1", rows[0]), (", line 2", rows[1])]


def test_json_in_spite_of_bom_odd_line_ends_and_long_rows(tmp_path):
    rows = [{"text": "a\u2028b\x85"}, {"text": "c" * 5_000_000, "deep": [[{"data": [1]}]]}, {"text": ""}]
    first, second, third = (json.dumps(row, ensure_ascii=False) for row in rows)
    text = f"\r\n[{first},\r\n\r\n\t{second} ,{third}\r\n]\r\n"
    source = write(tmp_path, "rows.json", b"\xef\xbb\xbf" + text.encode())
    assert places(source) == [(f", line {n} (row {i + 1})", rows[i]) for i, n in enumerate([2, 4, 4])]


def test_of_two_lists_of_rows_none_is_left_out_in_silence(tmp_path):
    source = write(tmp_path, "rows.json", '{"data": [{"text": "a"}, {"text": "b"}],\n "d\\u0061ta": [\n{"text": "c"}]}')
    assert faults(source) == [f"{source}, line 2: a second list of rows, 'data' beside 'data'; keep one"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"},\n {"text": }]', ", line 2: not JSON (Expecting value, column 11)"),
        ('[{"text": "a"},\n {"text": "b"}', ", line 2: not JSON (Expecting ',' delimiter, column 15)"),
        ('[{"text": "a"}]\n[]', ", line 2: not JSON (Extra data, column 1)"),
        ('[{"text": "a"},\n 5]', ", line 2 (row 2): a number, expected an object"),
        ('{"rows": [], "size": 3}', ": an object with the keys rows, size; expected a list of objects"),
        ('"text"', ": a string; expected a list of objects"),
        ("[]", ": the file has no rows; expected at least one"),
        (" \n", ": the file has no rows; expected at least one"),
    ],
)
def test_broken_json(tmp_path, content, message):
    source = write(tmp_path, "rows.json", content)
    (line,) = faults(source)
    assert line.startswith(source + message)


def test_csv_rows_are_named_by_the_line_they_begin_on(tmp_path):
    content = 'instruction,output\nadd,"one\ntwo, three"\n\nsay ""x"",y\n'
    source = write(tmp_path, "rows.csv", b"\xef\xbb\xbf" + content.encode())
    assert places(source) == [
        (", line 2", {"instruction": "add", "output": "one\ntwo, three"}),
        (", line 5", {"instruction": 'say ""x""', "output": "y"}),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n1,2,3\n", ", line 3: 3 cells, expected 2 (a, b)"),
        ("a,b\n1\n", ", line 2: 1 cell, expected 2 (a, b)"),
        ("a,b,a\n1,2,3\n", ", line 1: the column 'a' stands twice; give each a name of its own"),
        ('a,b\n1,"2\n3\n', ", line 2: not CSV (unexpected end of data)"),
        ("a,b\n", ": the file has no rows; expected at least one"),
        ("", ": the file has no rows; expected at least one"),
    ],
)
def test_broken_csv(tmp_path, content, message):
    source = write(tmp_path, "rows.csv", content)
    assert faults(source) == [source + message]


def test_a_csv_cell_may_be_long(tmp_path):
    source = write(tmp_path, "rows.csv", "text\n" + "x" * 300_000 + "\n")
    (row,) = read_rows(source)
    assert len(row.fields["text"]) == 300_000


def test_parquet(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a"}]}, {"messages": None}]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert places(path) == [(", row 1", rows[0]), (", row 2", rows[1])]
    path.write_bytes(path.read_bytes()[:-10])
    (line,) = faults(str(path))
    assert line.startswith(f"{path}: not a Parquet file (")


def test_a_text_file_is_one_row(tmp_path):
    source = write(tmp_path, "book.txt", "One line.\n\nAnother.\n")
    assert places(source) == [("", {"text": "One line.\n\nAnother.\n"})]
    assert faults(write(tmp_path, "blank.txt", "\n\n")) == [
        f"{tmp_path / 'blank.txt'}: the file has no rows; expected at least one"
    ]


def test_a_folder_is_all_its_data_files_in_order_of_name(tmp_path):
    write(tmp_path, "b.jsonl", '{"text": "2"}\n{"text": "3"}')
    write(tmp_path, "a.txt", "1")
    write(tmp_path, "c/d.csv", "text\n4\n")
    write(tmp_path, "notes.md", "no data")
    write(tmp_path, ".hidden/x.txt", "no")
    write(tmp_path, ".b.jsonl", "half written")
    rows = list(read_rows(str(tmp_path)))
    assert [row.fields["text"] for row in rows] == ["1", "2", "3", "4"]
    assert rows[2].where == f"{tmp_path / 'b.jsonl'}, line 2"
    assert [file.name for file in source_files(str(tmp_path))] == ["a.txt", "b.jsonl", "d.csv"]


def test_a_folder_without_data_files(tmp_path):
    write(tmp_path, "notes.md", "no data")
    (line,) = faults(str(tmp_path))
    assert line == (
        f"{tmp_path}: a folder without data files; expected {KINDS} files in it"
    )


def test_the_folder_of_a_model_an_adapter_or_a_run_is_not_read_as_data(tmp_path):
    write(tmp_path, "model/config.json", '{"model_type": "llama"}')
    write(tmp_path, "one/adapter_config.json", "{}")
    write(tmp_path, "run/adapter/adapter_config.json", "{}")
    write(tmp_path, "run/metrics.jsonl", '{"step": 1}')
    for name, what in (("model", "a model's"), ("one", "an adapter's"), ("run", "a run's")):
        assert faults(str(tmp_path / name)) == [
            f"{tmp_path / name}: {what} folder, not one of data; name a file of rows, or a folder of such files"
        ]
    write(tmp_path, "rows/config.json", '[{"text": "1"}]')
    assert [row.fields for row in read_rows(str(tmp_path / "rows"))] == [{"text": "1"}]


def test_a_missing_file_is_answered_with_the_closest_name(tmp_path):
    write(tmp_path, "train.jsonl", "{}")
    assert faults(str(tmp_path / "trian.jsonl")) == [
        f"{tmp_path}/trian.jsonl: no such file or folder; did you mean '{tmp_path}/train.jsonl'?"
    ]
    assert faults(str(tmp_path / "missing" / "x.jsonl")) == [
        f"{tmp_path}/missing/x.jsonl: no such file; there is no folder {tmp_path}/missing either"
    ]


def test_a_misspelt_name_here_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "data/train.jsonl", "{}")
    assert faults("dat") == ["dat: no such file or folder; did you mean 'data'?"]
    assert faults("data/train") == ["data/train: no such file or folder; did you mean 'data/train.jsonl'?"]


def test_a_file_of_another_kind(tmp_path):
    (line,) = faults(write(tmp_path, "rows.xyz", "x"))
    assert f"the unknown ending '.xyz'; expected {KINDS}" in line


def test_hashes_are_those_of_the_files(tmp_path):
    source = write(tmp_path, "a.txt", "one")
    assert hashes(str(tmp_path)) == {source: hashlib.sha256(b"one").hexdigest()}


class TestHub:
    def test_out_of_reach_is_the_machines_fault_in_one_line(self, monkeypatch):
        import datasets
        import huggingface_hub

        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(MachineError) as raised:
            list(read_rows("someone/some-data"))
        (line,) = raised.value.lines
        assert line.startswith("someone/some-data: no such file or folder, and the hub cannot be reached (")

    @pytest.mark.parametrize(
        ("source", "asked"),
        [
            ("someone/some-data", ("someone/some-data", None, "train")),
            ("someone/some-data:test", ("someone/some-data", None, "test")),
            ("someone/some-data:main:test", ("someone/some-data", "main", "test")),
        ],
    )
    def test_split_and_configuration(self, monkeypatch, source, asked):
        import datasets

        calls = []

        def load_dataset(name, configuration, *, split):
            calls.append((name, configuration, split))
            return datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        rows = [(row.where, row.fields) for row in read_rows(source)]
        assert calls == [asked]
        assert rows == [
            (f"{source}, row 1", {"text": "a"}),
            (f"{source}, row 2", {"text": "b"}),
        ]
        lines = b'{"text": "a"}\n{"text": "b"}\n'
        assert hashes(source) == {source: hashlib.sha256(lines).hexdigest()}

    def test_an_unknown_split_is_the_users_fault(self, monkeypatch):
        import datasets

        def load_dataset(name, configuration, *, split):
            raise ValueError(f'Unknown split "{split}".\nShould be one of train.')

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        (line,) = faults("someone/some-data:tset")
        assert line.startswith('someone/some-data:tset: Unknown split "tset". Should be one of train.; name a split as')
