"""Files that are damaged, or made to keep a reader busy: a line that names the file, soon, whatever their kind."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import zipfile

import openpyxl
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from tokenizers_for_tests import CHATML, byte_level

from qlora_tool.config import DataConfig
from qlora_tool.data.faults import RowFaults
from qlora_tool.data.readers.rows import MOST_COLUMNS
from qlora_tool.data.sources import read_rows
from qlora_tool.data.tokenize import build_dataset
from qlora_tool.errors import UserError

ROWS = [{"prompt": f"a cat {number}", "completion": "sat"} for number in range(50)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def zstandard(data: bytes) -> bytes:
    out = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(out, "zstd") as stream:
        stream.write(data)
    return out.getvalue().to_pybytes()


PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard}


def fields(path) -> list[dict]:
    return [row.fields for row in read_rows(str(path))]


def spreadsheet(path):
    book = openpyxl.Workbook()
    for row in (list(ROWS[0]), *(list(row.values()) for row in ROWS)):
        book.active.append(row)
    book.save(path)
    return path


def parquet(path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


def arrow(path):
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_stream(str(path), table.schema) as stream:
        stream.write_table(table)
    return path


def packed(path):
    path.write_bytes(PACK[path.suffix](LINES))
    return path


MAKE = {"rows.xlsx": spreadsheet, "rows.parquet": parquet, "rows.arrow": arrow,
        **{f"rows.jsonl{ending}": packed for ending in PACK if ending}}  # fmt: skip


@pytest.mark.parametrize("name", MAKE)
def test_whatever_is_damaged_is_rows_or_a_line_that_names_the_file(tmp_path, name):
    path = MAKE[name](tmp_path / name)
    content = path.read_bytes()
    assert fields(path) == ROWS
    draw = random.Random(name)
    told = 0
    for number in range(120):
        if number % 3:
            damaged = bytearray(content)
            for _ in range(draw.choice((1, 4))):
                damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        else:
            damaged = content[: draw.randrange(len(content))]
        path.write_bytes(damaged)
        try:
            list(read_rows(str(path)))
        except UserError as error:
            assert str(path) in error.lines[0]
            told += 1
    assert told > 40


def change(path, changes) -> None:
    """Write an .xlsx file again with its parts changed; a part that becomes None is left out."""
    with zipfile.ZipFile(path) as book:
        parts = {name: book.read(name) for name in book.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as book:
        for name, content in parts.items():
            made = changes(content) if "sheet1" in name else content
            if made is not None:
                book.writestr(name, made)


def behind_the_rows(text: bytes):
    return lambda sheet: sheet.replace(b"</sheetData>", text + b"</sheetData>")


def with_document_type(sheet: bytes) -> bytes:
    return b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>' + sheet.split(b"?>", 1)[-1]


CELL = b'<c t="inlineStr"><is><t>hi</t></is></c>'
SHEETS = {
    "cell": (behind_the_rows(b'<row r="x"><c r="??"/></row>'), "damaged (could not convert"),
    "date": (behind_the_rows(b'<row><c t="d"><v>nonsense</v></c></row>'), "damaged (Invalid datetime value"),
    "text": (behind_the_rows(b'<row><c t="s"><v>99999</v></c></row>'), "damaged (list index out of range)"),
    "end": (lambda sheet: sheet[:-30], "damaged ("),
    "missing": (lambda sheet: None, "no sheet in it"),
    "document type": (with_document_type, "a document type (<!DOCTYPE), which no spreadsheet has"),
    "wide": (behind_the_rows(b"<row>" + CELL * (MOST_COLUMNS + 1) + b"</row>"), "row 52: more than 10,000 cells"),
    "far": (behind_the_rows(b'<row r="99999999999">' + CELL + b"</row>"), "more than 1,048,576 rows"),
    "farther": (behind_the_rows(b'<row r="' + b"9" * 5000 + b'">' + CELL + b"</row>"), "more than 1,048,576 rows"),
    "long": (behind_the_rows(b" " * (2 << 20)), "more than 1 MiB without a row"),
    "elements": (behind_the_rows(b"<row><c>" + b"<f/>" * 2000 + b"</c></row>"), "more than 1,000 elements"),
}


class TestSpreadsheet:
    @pytest.mark.parametrize("kind", SHEETS)
    def test_what_a_damaged_one_says(self, tmp_path, kind, monkeypatch):
        monkeypatch.setattr("qlora_tool.data.readers.spreadsheet_archive.LONGEST", 1 << 20)
        if kind == "elements":
            monkeypatch.setattr("qlora_tool.data.readers.spreadsheet_archive.MOST_ELEMENTS", 1000)
        changes, told = SHEETS[kind]
        path = spreadsheet(tmp_path / "rows.xlsx")
        change(path, changes)
        with pytest.raises(UserError) as raised:
            fields(path)
        (line,) = raised.value.lines
        assert line.startswith(f"{path}: {told}"), line

    def test_parts_that_are_flagged_as_encrypted(self, tmp_path):
        path = spreadsheet(tmp_path / "rows.xlsx")
        content = bytearray(path.read_bytes())
        with zipfile.ZipFile(path) as book:
            for part in book.infolist():
                content[part.header_offset + 6] |= 1
        place = content.find(b"PK\x01\x02")
        while place >= 0:
            content[place + 8] |= 1
            place = content.find(b"PK\x01\x02", place + 4)
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"one with a password \(File .* is encrypted"):
            fields(path)

    @pytest.mark.parametrize("said", [b"A1:B3", b"A1:A99", b"A1:XFD1048576"])
    def test_rows_and_columns_beyond_what_it_says_of_its_size(self, tmp_path, said):
        path = spreadsheet(tmp_path / "rows.xlsx")
        change(path, lambda sheet: sheet.replace(b"A1:B51", said))
        assert fields(path) == ROWS

    def test_cells_that_are_left_out_at_the_end_of_a_row(self, tmp_path):
        path = spreadsheet(tmp_path / "rows.xlsx")
        change(path, behind_the_rows(b"<row>" + CELL + b"</row>"))
        assert fields(path) == [*ROWS, {"prompt": "hi", "completion": ""}]


LARGE = 8 << 20
ENDLESS = {
    "a line": b"a" * LARGE, "blank lines": b"\n" * LARGE, "separators": b",,,\n" * (LARGE // 4), "blanks": b" " * LARGE,
    "a text": b'[{"prompt": "' + b"a" * LARGE,
}  # fmt: skip


@pytest.mark.parametrize("content", ENDLESS)
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv", ".txt"])
@pytest.mark.parametrize("packing", [packing for packing in PACK if packing])
def test_what_a_packed_file_unpacks_to_without_a_row_has_a_bound(tmp_path, content, ending, packing, monkeypatch):
    for module in ("rows", "streams"):
        monkeypatch.setattr(f"qlora_tool.data.readers.{module}.LONGEST", 1 << 19)
    monkeypatch.setattr("qlora_tool.data.readers.streams.MOST_LINES", 1000)
    monkeypatch.setattr("qlora_tool.data.readers.streams.BLOCK", 1 << 16)
    path = tmp_path / f"rows{ending}{packing}"
    path.write_bytes(PACK[packing](ENDLESS[content]))
    faults = RowFaults()
    with pytest.raises(UserError) as raised:
        list(read_rows(str(path), faults))
    assert str(path) in raised.value.lines[-1]
    assert faults.bytes_read < LARGE / 4


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_a_line_has_a_bound_in_every_encoding(tmp_path, encoding, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "a" * 9000}) + "\n" + "a" * 20_000, encoding=encoding)
    monkeypatch.setattr("qlora_tool.data.readers.streams.LONGEST", 10_000)
    with pytest.raises(UserError, match="line 2 has more than"):
        fields(path)


def test_what_is_wrong_with_rows_is_told_besides(tmp_path, monkeypatch):
    monkeypatch.setattr("qlora_tool.data.readers.streams.MOST_LINES", 10)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"oops\n" * 100)
    with pytest.raises(UserError) as raised:
        fields(path)
    assert raised.value.lines[0] == f"{path}, line 1: not JSON (Expecting value, column 1)"
    assert raised.value.lines[-1].startswith(f"{path}: 10 lines without a row up to line 11 (")


def test_rows_that_are_well_packed_are_no_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr("qlora_tool.data.readers.streams.LONGEST", 1 << 16)
    monkeypatch.setattr("qlora_tool.data.readers.streams.BLOCK", 1 << 12)
    row = {"prompt": "a" * 1000, "completion": "b"}
    for name, text in (("rows.jsonl.xz", f"{json.dumps(row)}\n" * 1000), ("rows.json.xz", json.dumps([row] * 1000))):
        (tmp_path / name).write_bytes(lzma.compress(text.encode()))
        assert fields(tmp_path / name) == [row] * 1000


TWICE = '{"prompt": "a", "prompt": "b", "completion": "c"}'
SHAPES = {
    "rows.jsonl": f'{{"prompt": "a", "completion": "b"}}\n{TWICE}\n',
    "list.json": f'[{{"prompt": "a", "completion": "b"}},\n{TWICE}]',
    "data.json": f'{{"data": [{{"prompt": "a", "completion": "b"}},\n{TWICE}]}}',
    "by_id.json": f'{{"a17": {{"prompt": "a", "completion": "b"}},\n"b03": {TWICE}}}',
    "columns.json": '{"prompt": ["a"],\n"prompt": ["b"], "completion": ["c"]}',
    "each.json": f'{{"prompt": "a",\n"completion": "b"}}\n{TWICE}',
    "inside.jsonl": '\n{"messages": [{"role": "user", "content": "a", "role": "system"}]}\n',
}


class TestKeysThatStandTwice:
    @pytest.mark.parametrize("name", SHAPES)
    def test_are_refused_with_the_row_and_the_key(self, tmp_path, name):
        path = tmp_path / name
        path.write_text(SHAPES[name])
        with pytest.raises(UserError) as raised:
            fields(path)
        (line,) = raised.value.lines
        key = "role" if name == "inside.jsonl" else "prompt"
        assert line.startswith(f"{path}, line {3 if name == 'each.json' else 2}"), line
        assert line.endswith(f": the key '{key}' stands twice in one object; keep one")

    @pytest.mark.parametrize("name", ["rows.jsonl", "list.json", "data.json", "each.json"])
    def test_are_skipped_as_other_faulty_rows(self, tmp_path, name):
        path = tmp_path / name
        path.write_text(SHAPES[name])
        faults = RowFaults(skip=True)
        assert [row.fields for row in read_rows(str(path), faults)] == [{"prompt": "a", "completion": "b"}]
        assert faults.count == 1


class TestTemplatesThatFailSlowly:
    def build(self, tmp_path, template: str, **data):
        (tmp_path / "rows.jsonl").write_bytes(LINES)
        (tmp_path / "slow.jinja").write_text(template)
        config = DataConfig(chat_template=str(tmp_path / "slow.jinja"), **data)
        return build_dataset(str(tmp_path / "rows.jsonl"), config, byte_level(CHATML))

    @pytest.mark.parametrize("on_error", ["stop", "skip"])
    def test_are_given_up_after_a_few_rows(self, tmp_path, monkeypatch, on_error):
        monkeypatch.setattr("qlora_tool.data.template_trial.PATIENCE", 0.5)
        with pytest.raises(UserError, match=r"failed on \d+ conversations one after the other, and took 0\.\d"):
            self.build(tmp_path, "{{ 9999999**59999 }}", on_error=on_error)

    def test_quick_refusals_are_faults_of_rows(self, tmp_path, monkeypatch):
        monkeypatch.setattr("qlora_tool.data.template_trial.PATIENCE", 0.0)
        monkeypatch.setattr("qlora_tool.data.template_trial._SLOW", 60.0)
        with pytest.raises(UserError) as raised:
            self.build(tmp_path, "{{ raise_exception('no') }}")
        assert raised.value.lines[-1] == "and 45 more faulty rows"
