"""JSON that nobody's program writes: deep, or with endless numbers. It is text that is no JSON, wherever it is read."""

from __future__ import annotations

import json
import re

import pytest

from qlora_tool.config.imports.reading import _cells
from qlora_tool.data.faults import RowFault
from qlora_tool.data.sources import read_rows
from qlora_tool.data.tool_calls import _parsed, calls_in_text
from qlora_tool.errors import UserError
from qlora_tool.export.model_card import _object
from qlora_tool.export.staging import REPORT, written_by_export
from qlora_tool.files.lock import locked
from qlora_tool.files.reading import json_value, read_object
from qlora_tool.reporting.found import _json
from qlora_tool.run_folder import RunFolder, _logged_step, remove_listed
from qlora_tool.training.checkpoints import STATE, Progress

ODD = {"deep": "[" * 100_000, "deep, and closed": "[" * 100_000 + "]" * 100_000, "objects": '{"a":' * 100_000,
       "a long number": "9" * 5000, "cut": '{"a": [1'}  # fmt: skip

odd = pytest.mark.parametrize("text", ODD.values(), ids=ODD)


@odd
def test_it_is_a_value_error_as_other_text_that_is_no_json(text):
    for given in (text, text.encode()):
        with pytest.raises(json.JSONDecodeError):
            json_value(given)


@odd
def test_it_is_a_line_in_files_that_people_hand_in(tmp_path, text):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(UserError, match=r"config\.json: "):
        read_object(file, "download it again")


@odd
def test_it_is_a_broken_checkpoint(tmp_path, text):
    (tmp_path / STATE).write_text(text)
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        Progress.read(tmp_path)


@odd
def test_it_is_as_if_there_were_nothing_where_that_will_do(tmp_path, text):
    for name in (REPORT, "list.json", "metrics.jsonl"):
        (tmp_path / name).write_text(text + "\n")
    assert written_by_export(tmp_path) is None
    assert _json(tmp_path / "list.json") is None
    assert _object(tmp_path / "list.json") == {}
    assert RunFolder(tmp_path).records() == []
    assert _logged_step(text) is None
    remove_listed(tmp_path, "list.json")
    assert (tmp_path / "list.json").exists()


@odd
def test_it_holds_no_lock(tmp_path, text):
    (tmp_path / ".lock").write_text(text)
    with locked(tmp_path / ".lock", "busy"):
        pass


@odd
def test_it_is_a_fault_of_a_row(tmp_path, text):
    assert calls_in_text(text) == []
    with pytest.raises(RowFault, match="arguments is a string that is not JSON"):
        _parsed(text, "arguments", dict, "an object")
    for name, content in (("rows.jsonl", f'{{"a": {text}}}\n'), ("rows.json", f'[{{"a": {text}}}]')):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=f"{name}, line 1"):
            list(read_rows(str(tmp_path / name)))


@odd
def test_it_is_no_notebook_and_no_model(tmp_path, text):
    with pytest.raises(ValueError, match="not a notebook"):
        _cells(text)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json, line 1: "):  # a data file among others, then
        list(read_rows(str(tmp_path)))
