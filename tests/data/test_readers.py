"""Tables and JSON as people have them: delimiters, quoting, packed files, spreadsheets, shapes; and broken ones."""

from __future__ import annotations

import bz2
import csv
import datetime
import gzip
import io
import json
import lzma
import random

import openpyxl
import pyarrow
import pyarrow.feather
import pytest

from qlora_tool.data.faults import RowFaults
from qlora_tool.data.sources import read_rows, skipped_files
from qlora_tool.errors import UserError

ROWS = [
    {"question": "Wie, bitte; \"so\"?", "answer": "Ja\tund\nnein"},
    {"question": "It's 5\" wide", "answer": "yes; 'no'"},
    {"question": "", "answer": "a | b"},
    {"question": "plain", "answer": "ünïcode …"},
]


def fields(source) -> list[dict]:
    return [row.fields for row in read_rows(str(source))]


def write(path, content) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def faults(source) -> list[str]:
    with pytest.raises(UserError) as raised:
        list(read_rows(str(source)))
    return [line.replace(str(source), "FILE") for line in raised.value.lines]


def table(rows, **form) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), **form)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


class TestDelimited:
    @pytest.mark.parametrize("ending", [".csv", ".tsv"])
    @pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
    @pytest.mark.parametrize("lineterminator", ["\n", "\r\n"])
    @pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
    def test_whatever_the_module_writes_is_read_again(self, tmp_path, ending, delimiter, lineterminator, quoting):
        text = table(ROWS, delimiter=delimiter, lineterminator=lineterminator, quoting=quoting)
        assert fields(write(tmp_path / f"rows{ending}", text)) == ROWS

    @pytest.mark.parametrize("delimiter", [",", ";", "\t"])
    def test_names_that_nobody_knows(self, tmp_path, delimiter):
        rows = [{"Vopros": row["question"], "Otvet": row["answer"]} for row in ROWS]
        assert fields(write(tmp_path / "rows.csv", table(rows, delimiter=delimiter))) == rows

    def test_backslashes_before_quotes(self, tmp_path):
        text = table(ROWS, doublequote=False, escapechar="\\", quoting=csv.QUOTE_ALL)
        assert '\\"so\\"' in text
        assert fields(write(tmp_path / "rows.csv", text)) == ROWS

    def test_single_quotes(self, tmp_path):
        assert fields(write(tmp_path / "rows.csv", table(ROWS, quotechar="'", quoting=csv.QUOTE_ALL))) == ROWS

    def test_single_quotes_around_words_are_part_of_them(self, tmp_path):
        rows = [{"question": "'a'", "answer": "'b'"}, {"question": "'c'", "answer": "'d'"}]
        assert fields(write(tmp_path / "rows.csv", table(rows))) == rows

    def test_tabs_without_quoting(self, tmp_path):
        text = 'question\tanswer\n"Hello" he said\t5" disk\nplain\tyes\n'
        assert fields(write(tmp_path / "rows.tsv", text)) == [
            {"question": '"Hello" he said', "answer": '5" disk'}, {"question": "plain", "answer": "yes"},
        ]  # fmt: skip

    def test_one_column_with_commas(self, tmp_path):
        assert fields(write(tmp_path / "rows.csv", 'text\n"One, two; three"\n"Four, five"\n')) == [
            {"text": "One, two; three"}, {"text": "Four, five"},
        ]  # fmt: skip

    def test_what_excel_leaves_around_a_table(self, tmp_path):
        text = "sep=;\r\nquestion;answer;;\r\na;b;;\r\n;;;\r\n\r\nc;d\r\n"
        source = write(tmp_path / "rows.csv", text)
        assert [(row.where, row.fields) for row in read_rows(source)] == [
            (f"{source}, line 3", {"question": "a", "answer": "b"}),
            (f"{source}, line 6", {"question": "c", "answer": "d"}),
        ]
        assert faults(write(tmp_path / "rows.csv", "question;;answer\na;x;b\n")) == [
            "FILE, line 2: a cell in column 2, which has no name in the first line; give it one"
        ]

    def test_carriage_returns_alone(self, tmp_path):
        source = write(tmp_path / "rows.csv", "question,answer\ra,b\rc,d\r")
        assert [row.where.rpartition(" ")[2] for row in read_rows(source)] == ["2", "3"]
        assert fields(source) == [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]

    def test_a_faulty_row_does_not_hide_those_behind_it(self, tmp_path):
        source = write(tmp_path / "rows.csv", 'question,answer\n"a"b,c\nd,e\nf\ng,h\n')
        told = RowFaults(skip=True)
        assert [row.fields["question"] for row in read_rows(source, told)] == ["d", "g"]
        assert [line.partition(": ")[0] for line in told.shown()] == [f"{source}, line 2", f"{source}, line 4"]

    def test_a_quote_left_open_does_not_take_all_memory(self, tmp_path, monkeypatch):
        monkeypatch.setattr("qlora_tool.data.readers.delimited.LONGEST_CELL", 1 << 20)
        source = write(tmp_path / "rows.csv", 'question,answer\na,"' + "b\n" * (1 << 20))
        assert faults(source)[0].startswith("FILE, line 2: a cell of more than 1 million characters; is a quote left")

    def test_rows_come_as_they_are_read(self, tmp_path):
        source = write(tmp_path / "rows.csv", "question,answer\na,b\n" + "x,y\n" * 5000 + "broken\n")
        assert next(iter(read_rows(source))).fields == {"question": "a", "answer": "b"}


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": lambda data: _zstandard(data)}


def _zstandard(data: bytes) -> bytes:
    out = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(out, "zstd") as stream:
        stream.write(data)
    return out.getvalue().to_pybytes()


class TestPacked:
    @pytest.mark.parametrize("ending", PACK)
    def test_is_read_as_what_is_in_it(self, tmp_path, ending):
        lines = "".join(json.dumps(row) + "\n" for row in ROWS)
        assert fields(write(tmp_path / f"rows.jsonl{ending}", PACK[ending](lines.encode()))) == ROWS
        assert fields(write(tmp_path / f"rows.csv{ending}", PACK[ending](table(ROWS).encode("utf-16")))) == ROWS
        assert fields(write(tmp_path / f"rows.json{ending}", PACK[ending](json.dumps(ROWS).encode()))) == ROWS
        assert len(fields(tmp_path)) == 3 * len(ROWS)

    @pytest.mark.parametrize("ending", PACK)
    def test_cut_short_is_told_and_never_read_in_part(self, tmp_path, ending):
        draw = random.Random(0)
        lines = "".join(json.dumps({"text": draw.randbytes(200).hex()}) + "\n" for _ in range(2000))
        packed = PACK[ending](lines.encode())
        for part in (len(packed) // 2, len(packed) - 3):
            source = write(tmp_path / f"rows.jsonl{ending}", packed[:part])
            (line,) = faults(source)
            assert line.startswith("FILE: cut short") and line.endswith("; get the file again, whole")
            with pytest.raises(UserError):  # it is no faulty row, so it is not skipped either
                list(read_rows(source, RowFaults(skip=True)))

    @pytest.mark.parametrize("ending", PACK)
    def test_something_else_by_that_name(self, tmp_path, ending):
        (line,) = faults(write(tmp_path / f"rows.csv{ending}", "question,answer\na,b\n"))
        assert line.startswith(f"FILE: not a {ending} file, or broken (")

    @pytest.mark.parametrize("name", ["rows.gz", "rows.parquet.gz", "rows.zip", "rows.xls"])
    def test_what_cannot_be_read_so_says_what_can(self, tmp_path, name):
        (line,) = faults(write(tmp_path / name, "x"))
        assert ".parquet" in line and "FILE: " in line


class TestSpreadsheet:
    def save(self, path, *sheets) -> str:
        book = openpyxl.Workbook()
        book.remove(book.active)
        for number, rows in enumerate(sheets):
            sheet = book.create_sheet(f"Sheet {number + 1}")
            for row in rows:
                sheet.append(row)
        book.save(path)
        return str(path)

    def test_cells_are_text(self, tmp_path):
        day = datetime.datetime(2026, 1, 31)
        rows = [["Question", "Answer", None], ["a", 4], [None, None], [2.5, day], ["b\nc", True]]
        source = self.save(tmp_path / "rows.xlsx", rows, [])
        assert [(row.where, row.fields) for row in read_rows(source)] == [
            (f"{source}, sheet 'Sheet 1', row 2", {"Question": "a", "Answer": "4"}),
            (f"{source}, sheet 'Sheet 1', row 4", {"Question": "2.5", "Answer": "2026-01-31"}),
            (f"{source}, sheet 'Sheet 1', row 5", {"Question": "b\nc", "Answer": "TRUE"}),
        ]

    def test_two_sheets(self, tmp_path):
        head = ["question", "answer"]
        source = self.save(tmp_path / "rows.xlsx", [head, ["a", "b"]], [head, ["c", "d"]], [["notes"]])
        assert faults(source) == [
            "FILE: rows on 2 sheets (Sheet 1, Sheet 2); name one as FILE:Sheet 1, or list several in data.train"
        ]
        assert fields(f"{source}:Sheet 2") == [{"question": "c", "answer": "d"}]
        assert faults(f"{source}:Shet 2")[0].startswith(f"{source}: no sheet 'Shet 2'; did you mean 'Sheet 2'?")

    def test_formulas(self, tmp_path):
        source = self.save(tmp_path / "rows.xlsx", [["question", "answer"], ["1 + 1", "=1+1"], ["a", "b"]])
        (line,) = faults(source)  # openpyxl writes formulas without a result, as Excel never does
        assert line == (
            "FILE, row 2: the formula in column B has no result; open the file in Excel and save it, or paste the "
            "values"
        )
        self.add_results(source)
        told = RowFaults()
        assert [row.fields["answer"] for row in read_rows(source, told)] == ["2", "b"]
        assert told.remarks == [f"{source}: 1 cell holds a formula; read as Excel computed them last"]

    def add_results(self, source):
        import zipfile

        with zipfile.ZipFile(source) as book:
            files = {name: book.read(name) for name in book.namelist()}
        with zipfile.ZipFile(source, "w") as book:
            for name, content in files.items():
                book.writestr(name, content.replace(b"<f>1+1</f><v />", b"<f>1+1</f><v>2</v>")
                              .replace(b"<f>1+1</f><v></v>", b"<f>1+1</f><v>2</v>"))  # fmt: skip

    def test_errors_of_excel_and_cells_beside_the_table(self, tmp_path):
        rows = [["question", "answer"], ["a", "#N/A"], ["b", "c", "beside"], ["d", "e"]]
        assert faults(self.save(tmp_path / "rows.xlsx", rows)) == [
            "FILE, row 2: column B has an error of Excel's (#N/A); mend it, or empty the cell",
            "FILE, row 3: a cell in column C, which has no name in the first row; give it one",
        ]

    def merge(self, path, rows, *ranges) -> str:
        book = openpyxl.Workbook()
        for row in rows:
            book.active.append(row)
        for name in ranges:
            book.active.merge_cells(name)
        book.save(path)
        return str(path)

    @pytest.mark.parametrize(
        ("ranges", "found"),
        [
            (["A2:A3"], "row 3: the cell in column A is merged (A2:A3)"),
            (["A2:A3", "B4:B5"], "row 3: the cell in column A is merged (A2:A3, one of 2 merged ranges)"),
            (["B1:B2"], "row 2: the cell in column B is merged (B1:B2)"),  # a head of two rows
            (["A4:B4"], "row 4: the cell in column B is merged (A4:B4)"),
            (["A4:B5"], "row 4: the cell in column B is merged (A4:B5)"),
        ],
    )
    def test_values_of_merged_cells_are_not_read_as_empty(self, tmp_path, ranges, found):
        rows = [["question", "answer"], *([name, name.upper()] for name in "abcd")]
        source = self.merge(tmp_path / "rows.xlsx", rows, *ranges)
        line = (
            f"FILE, {found}, and the file has the value of merged cells in the first one only; unmerge them in Excel, "
            "and fill the value into every cell"
        )
        assert faults(source) == [line]
        with pytest.raises(UserError):  # the file's fault and not the row's, so it is not skipped either
            list(read_rows(source, RowFaults(skip=True)))

    def test_merged_cells_that_hide_nothing(self, tmp_path):
        rows = [["question", "answer", None, None], ["a", "b"], [None, "c"], ["d", "e"]]
        source = self.merge(tmp_path / "rows.xlsx", rows, "A3:A4", "A5:B7", "C2:D3", "F1:G1")
        rows = [{"question": "a", "answer": "b"}, {"question": "", "answer": "c"}, {"question": "", "answer": "e"}]
        assert fields(source) == rows

    def test_a_title_above_the_names(self, tmp_path):
        rows = [["question", "answer", "by"], *([name] * 3 for name in "abcdefg")]
        tail = (
            ": one cell is filled (Tickets 2026), and 3 in the row below; it looks like a title: delete it, so that "
            "the names of the columns are in the first row"
        )
        for title in (["Tickets 2026"], [None, "Tickets 2026", None]):
            given = [title, [], *rows]
            assert faults(self.save(tmp_path / "rows.xlsx", given)) == [f"FILE, row 1{tail}"]
        assert faults(self.merge(tmp_path / "rows.xlsx", [["Tickets 2026"], *rows], "A1:C1")) == [f"FILE, row 1{tail}"]
        lines = [";".join(row) for row in rows]
        for title in ("Tickets 2026", '"Tickets 2026"', "Tickets 2026;;", "Tickets 2026\n"):
            text = "\n".join([title, *lines])
            for delimiter in ";,\t":
                assert faults(write(tmp_path / "rows.csv", text.replace(";", delimiter))) == [f"FILE, line 1{tail}"]

    def test_what_is_no_title(self, tmp_path):
        assert fields(write(tmp_path / "rows.csv", "Notes 2026\nnot, here\nor, there\n")) == [
            {"Notes 2026": "not, here"}, {"Notes 2026": "or, there"},
        ]  # fmt: skip
        (line,) = faults(self.save(tmp_path / "rows.xlsx", [["text"], ["a", "beside"], ["b"]]))
        assert line == "FILE, row 2: a cell in column B, which has no name in the first row; give it one"

    def test_another_file_by_that_name(self, tmp_path):
        (line,) = faults(write(tmp_path / "rows.xlsx", "question;answer\n"))
        assert line.startswith("FILE: not an .xlsx file, or one with a password (")

    def test_an_empty_one(self, tmp_path):
        assert faults(self.save(tmp_path / "rows.xlsx", [["question", "answer"]])) == [
            "FILE: the file has no rows; expected at least one"
        ]


SHAPES = {
    "list": json.dumps(ROWS),
    "list, indented": json.dumps(ROWS, indent=2),
    "data": json.dumps({"version": 1, "data": ROWS, "more": {"a": []}}),
    "train": json.dumps({"train": ROWS}),
    "a name of its own": json.dumps({"version": [1], "pairs": ROWS}),
    "columns": json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}),
    "pandas": json.dumps({name: {str(i): row[name] for i, row in enumerate(ROWS)} for name in ROWS[0]}),
    "by id": json.dumps({f"id{i}": row for i, row in enumerate(ROWS)}),
    "lines": "\n".join(map(json.dumps, ROWS)),
    "one after the other": " ".join(map(json.dumps, ROWS)),
    "indented, one after the other": "\n".join(json.dumps(row, indent=1) for row in ROWS),
    "the hub's viewer": json.dumps({"rows": [{"row_idx": i, "row": row} for i, row in enumerate(ROWS)]}),
}


class TestJson:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("block", [1 << 20, 1, 7, 64])
    def test_every_usual_shape(self, tmp_path, shape, block, monkeypatch):
        monkeypatch.setattr("qlora_tool.data.readers.streams.BLOCK", block)
        assert fields(write(tmp_path / "rows.json", SHAPES[shape])) == ROWS

    @pytest.mark.parametrize("shape", ["list, indented", "indented, one after the other", "lines"])
    def test_the_same_by_the_name_of_lines(self, tmp_path, shape):
        assert fields(write(tmp_path / "rows.jsonl", SHAPES[shape])) == ROWS

    def test_conversations_that_are_bare_lists(self, tmp_path):
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        assert fields(write(tmp_path / "rows.json", json.dumps([turns, turns]))) == [{"messages": turns}] * 2
        assert fields(write(tmp_path / "rows.jsonl", json.dumps(turns) + "\n")) == [{"messages": turns}]
        assert fields(write(tmp_path / "one.json", json.dumps({"messages": turns}))) == [{"messages": turns}]

    def test_columns_of_different_lengths(self, tmp_path):
        assert faults(write(tmp_path / "rows.json", '{"question": ["a", "b"], "answer": ["c"]}')) == [
            "FILE: columns of different lengths (question: 2, answer: 1); expected a value of each for every row"
        ]

    def test_items_come_as_they_are_read(self, tmp_path, monkeypatch):
        monkeypatch.setattr("qlora_tool.data.readers.streams.BLOCK", 100)
        many = '{"text": "b"},' * 1000
        for text in (f'[{{"text": "a"}},{many}broken', '{"data": [{"text": "a"}, broken' + " " * 900):
            assert next(iter(read_rows(write(tmp_path / "rows.json", text)))).fields == {"text": "a"}

    def test_places_are_lines_whatever_the_blocks(self, tmp_path, monkeypatch):
        monkeypatch.setattr("qlora_tool.data.readers.streams.BLOCK", 5)
        text = '[\n {"text": "a"},\n\n {"text":\n "b"},\n   {"text": }]'
        assert faults(write(tmp_path / "rows.json", text)) == ["FILE, line 6: not JSON (Expecting value, column 13)"]


# Text of a value, well formed or not: what a library for streams of JSON refuses, changes or lets pass is among it.
VALUES = (
    "NaN", "-Infinity", "123456789012345678901234567890", "1e400", "-0.0", "1.5e-3", "[1, [2, {}]]", "null",
    r'"\ud83d\ude00"', r'"\ud83d"', r'"\u0000"', '"ü…"',
    "01", "+1", ".5", "1.", "'a'", '"a\tb"', '"a\nb"', r'"\x"', "tru", "[1 2]", "[1,]",
    '{"b" 1}', '{"b": 1,}', "{1: 2}", '1} {"a": 2', '1}, {"a": 2', "1} x", "1}}", '1, "a": 2', "1,", "", "[", "]",
)  # fmt: skip
AROUND = {
    "list": "[{}]", "data": '{{"data": [{}], "n": 1}}', "lines": '{{"a": 0}}\n{}', "one of two": '{{\n"a": 0}} {}',
}  # fmt: skip


class TestWhatIsJson:
    """The same in every shape as the standard library says of the whole text: a value equal to its, or a refusal."""

    @pytest.mark.parametrize("around", AROUND)
    @pytest.mark.parametrize("value", VALUES)
    @pytest.mark.parametrize("block", [1 << 20, 3])
    def test_is_what_the_standard_library_says(self, tmp_path, around, value, block, monkeypatch):
        monkeypatch.setattr("qlora_tool.data.readers.streams.BLOCK", block)
        row = f'{{"a": {value}}}'
        text = AROUND[around].format(row)
        path = write(tmp_path / ("rows.jsonl" if around == "lines" else "rows.json"), text)
        read = {"lines": _a_value_a_line, "one of two": _values_one_after_the_other}.get(around, json.loads)
        try:
            expected = read(text)
            if value == '1, "a": 2':  # the library lets the last of two equal keys win
                assert "the key 'a' stands twice" in faults(path)[0]
                return
        except json.JSONDecodeError:
            assert "not JSON" in faults(path)[0]
            return
        expected = expected["data"] if around == "data" else expected
        assert repr(fields(path)) == repr(expected)  # NaN is not equal to itself


def _a_value_a_line(text: str) -> list:
    return [json.loads(line) for line in text.split("\n")]


def _values_one_after_the_other(text: str) -> list:
    values, place = [], 0
    while place < len(text):
        value, place = json.JSONDecoder().raw_decode(text, place)
        values.append(value)
        place += len(text[place:]) - len(text[place:].lstrip())
    return values


def test_arrow_as_datasets_saves_it(tmp_path):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert fields(tmp_path / "saved") == ROWS
    assert skipped_files(str(tmp_path / "saved")) == ["dataset_info.json", "state.json"]
    pyarrow.feather.write_feather(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.arrow", compression="uncompressed")
    assert fields(tmp_path / "rows.arrow") == ROWS


def test_a_folder_names_what_it_does_not_read(tmp_path):
    write(tmp_path / "a.jsonl", '{"text": "a"}\n')
    write(tmp_path / "notes.md", "x")
    write(tmp_path / ".hidden", "x")
    assert skipped_files(str(tmp_path)) == ["notes.md"]
    assert skipped_files(str(tmp_path / "a.jsonl")) == []
