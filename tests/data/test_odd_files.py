"""Files as other programs leave them: index columns without a name, splits in one file, lock files, wrong endings."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os

import openpyxl
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers_for_tests import CHATML, byte_level

from qlora_tool.config import DataConfig
from qlora_tool.data.faults import RowFaults
from qlora_tool.data.sources import read_rows, skipped_files
from qlora_tool.data.tokenize import build_dataset
from qlora_tool.errors import UserError
from qlora_tool.files.hashes import kept_hashes, sha256

ROW = {"question": "How many?", "answer": "12 boats"}


def fields(source) -> list[dict]:
    return [row.fields for row in read_rows(str(source))]


def remarks(source) -> list[str]:
    faults = RowFaults()
    list(read_rows(str(source), faults))
    return faults.remarks


class TestAnIndexWithoutAName:
    """As pandas writes it, by default."""

    def test_of_a_text_table(self, tmp_path):
        path = tmp_path / "frame.csv"
        path.write_text(",question,answer\n0,How many?,12 boats\n1,Where?,There\n")
        where = {"question": "Where?", "answer": "There"}
        assert fields(path) == [{"Unnamed: 0": "0", **ROW}, {"Unnamed: 0": "1", **where}]
        report = build_dataset(str(path), DataConfig(), byte_level(CHATML)).report
        assert report.kept == 2 and report.warnings() == ["columns not used: Unnamed: 0"]

    def test_of_several_levels(self, tmp_path):
        path = tmp_path / "frame.csv"
        path.write_text(";;question;answer\na;0;How many?;12 boats\n")
        assert fields(path) == [{"Unnamed: 0": "a", "Unnamed: 1": "0", **ROW}]

    def test_of_a_spreadsheet(self, tmp_path):
        book = openpyxl.Workbook()
        for row in ([None, "question", "answer"], [0, "How many?", "12 boats"]):
            book.active.append(row)
        book.save(tmp_path / "frame.xlsx")
        assert fields(tmp_path / "frame.xlsx") == [{"Unnamed: 0": "0", **ROW}]

    def test_cells_beside_the_table_are_faults_still(self, tmp_path):
        path = tmp_path / "table.csv"
        path.write_text("question,,answer\na,b,c\n")
        with pytest.raises(UserError, match="line 2: a cell in column 2, which has no name"):
            fields(path)


class TestSplits:
    @pytest.mark.parametrize("other", ["test", "validation", "held_out"])
    def test_in_one_json_file(self, tmp_path, other):
        path = tmp_path / "all.json"
        path.write_text(json.dumps({"version": 2, "train": [ROW], other: [ROW, ROW], "tags": ["a"], "none": []}))
        assert fields(path) == [ROW]
        assert remarks(path) == [f"{path}: of its lists of rows 'train' is read, and not '{other}'"]

    @pytest.mark.parametrize("folder", ["test", "validation", "eval"])
    def test_in_folders(self, tmp_path, folder):
        for name in ("train", folder):
            (tmp_path / name).mkdir()
            (tmp_path / name / "part-0.jsonl").write_text(json.dumps(ROW) + "\n")
        report = build_dataset(str(tmp_path), DataConfig(), byte_level(CHATML)).report
        assert report.rows == 2
        (warning,) = report.warnings()
        assert f"{folder}/part-0.jsonl read with the others" in warning

    def test_a_folder_that_is_named_so_itself_is_what_was_asked_for(self, tmp_path):
        (tmp_path / "test").mkdir()
        for name in ("a.jsonl", "b.jsonl"):
            (tmp_path / "test" / name).write_text(json.dumps(ROW) + "\n")
        assert build_dataset(str(tmp_path / "test"), DataConfig(), byte_level(CHATML)).report.warnings() == []


def test_files_beside_the_data_are_named_and_not_read(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(ROW) + "\n")
    (tmp_path / "~$a.xlsx").write_bytes(b"owner")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert fields(tmp_path) == [ROW]
    assert skipped_files(str(tmp_path)) == ["dataset_infos.json", "~$a.xlsx"]


def test_a_list_by_the_name_of_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps([ROW, ROW]))
    assert fields(path) == [ROW, ROW]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text(f"{json.dumps(turns)}\n{json.dumps(turns)}\n")
    assert fields(path) == [{"messages": turns}, {"messages": turns}]


TEXT = (json.dumps(ROW) + "\n").encode()


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".json", ".txt"])
@pytest.mark.parametrize(
    ("content", "cure"),
    [
        (gzip.compress(TEXT), r"packed by gzip; rename it to rows\{}.gz"),
        (bz2.compress(TEXT), r"packed by bzip2; rename it to rows\{}.bz2"),
        (lzma.compress(TEXT), r"packed by xz; rename it to rows\{}.xz"),
        (b"PK\x03\x04rest", r"rename it to rows.xlsx, or unpack it"),
        (b"\xd0\xcf\x11\xe0rest", r"an old Excel file; save it as .xlsx"),
    ],
    ids=["gzip", "bzip2", "xz", "zip", "xls"],  # gzip's bytes hold the time
)
def test_a_file_of_another_kind_by_a_text_files_name(tmp_path, ending, content, cure):
    path = tmp_path / f"rows{ending}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=cure.format(ending)):
        fields(path)


def test_a_parquet_file_by_a_text_files_name(tmp_path):
    path = tmp_path / "rows.csv"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW]), path)
    with pytest.raises(UserError, match=r"a Parquet file; rename it to rows\.parquet"):
        fields(path)


class TestTables:
    def test_a_quote_that_is_left_open_is_told(self, tmp_path):
        path = tmp_path / "rows.csv"
        path.write_text('question,answer\n"How many?,12\nWhere?,There\nWhen?,Now\n')
        assert fields(path)[0] == {"question": '"How many?', "answer": "12"}
        assert remarks(path) == [f"{path}: quotes are read as part of the text, for one is left open (line 2)"]

    def test_quotes_within_cells_are_not(self, tmp_path):
        path = tmp_path / "rows.tsv"
        path.write_text('question\tanswer\n6" wide?\tyes, 6"\n')
        assert fields(path) == [{"question": '6" wide?', "answer": 'yes, 6"'}]
        assert remarks(path) == []

    def test_null_characters_are_told(self, tmp_path):
        path = tmp_path / "rows.csv"
        path.write_bytes(b"question,answer\na,b\0\nc,d\0\n")
        assert fields(path) == [{"question": "a", "answer": "b\ufffd"}, {"question": "c", "answer": "d\ufffd"}]
        assert remarks(path) == [f"{path}: null characters (line 2 is the first with one) read as \ufffd"]


def test_a_file_that_changed_and_kept_its_size_and_time_is_hashed_anew(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"a" * 100)
    before = kept_hashes([path])[path]
    stat = path.stat()
    path.write_bytes(b"b" * 100)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert kept_hashes([path])[path] == sha256(path) != before
