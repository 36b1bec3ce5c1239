"""The cache is a convenience: where it cannot be written nothing but time is lost, and that is said."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from qlora_tool.errors import MachineError
from qlora_tool.files.cache import cache_folder, clear_cache, write_cached
from qlora_tool.files.hashes import file_hashes, sha256


@pytest.fixture(params=["a file in its place", "no such device"])
def unwritable(request, tmp_path: Path, monkeypatch) -> Path:
    folder = tmp_path / "cache" if request.param == "a file in its place" else Path("/proc/nosuch")
    if request.param == "a file in its place":
        folder.write_text("not a folder")
    elif not Path("/proc").is_dir():
        pytest.skip("needs /proc, a place in which nobody may make a folder")
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(folder))
    return folder


def test_a_cache_that_cannot_be_written_is_said_once_and_stops_nothing(unwritable: Path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("qlora_tool"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        for number in range(3):
            write_cached(cache_folder() / "predictions" / f"{number}.json", {"a": number})
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"the cache {unwritable} cannot be written" in line and "QLORA_TOOL_CACHE" in line


def test_what_is_cached_is_made_each_time(unwritable: Path, tmp_path: Path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    assert file_hashes(model) == file_hashes(model) == {"config.json": sha256(model / "config.json")}


def test_a_cache_that_can_be_written_is(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(tmp_path / "new"))
    write_cached(cache_folder() / "predictions" / "1.json", {"a": 1})
    assert json.loads((tmp_path / "new" / "predictions" / "1.json").read_text()) == {"a": 1}


def test_a_file_in_the_place_of_the_cache_is_not_cleared(tmp_path: Path, monkeypatch):
    (tmp_path / "cache").write_text("mine")
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(tmp_path / "cache"))
    with pytest.raises(MachineError, match="is a file; set QLORA_TOOL_CACHE"):
        clear_cache()
    assert (tmp_path / "cache").read_text() == "mine"
