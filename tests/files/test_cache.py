"""The cache is a convenience: where it cannot be written nothing but time is lost, and that is said."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from qlora_tool.errors import MachineError
from qlora_tool.files.cache import cache_folder, clear_cache, read_cached, write_cached
from qlora_tool.files.digest import sha256
from qlora_tool.files.hashes import file_hashes


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
    file = tmp_path / "new" / "predictions" / "1.json"
    assert json.loads(file.read_text())["a"] == 1 and read_cached(file) == {"a": 1}


def _flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[content.index(b"0123abcd") + 3] ^= 1
    file.write_bytes(content)


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _endless(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _large(file: Path) -> None:
    os.truncate(file, 1 << 40)  # sparse


DAMAGES = {
    "a flipped bit": _flipped, "a pipe": _pipe, "a link to what has no end": _endless, "a folder": _folder,
    "a large file": _large, **{
        content[:20]: lambda file, content=content: file.write_text(content)
        for content in (
            "", "5", "null", "[1]", '"x"', "{", '{"a": 5}', '{"sha256": 5}', "[" * 100_000, "\0", "9" * 5_000,
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_as_it_was_written_counts_as_empty_and_is_made_again(tmp_path: Path, monkeypatch, caplog, damage):
    if damage in ("a pipe", "a link to what has no end") and not hasattr(os, "mkfifo"):
        pytest.skip("needs pipes and /dev/zero")
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(tmp_path / "cache"))
    model, file = tmp_path / "model", tmp_path / "cache" / "hashes.json"
    model.mkdir()
    (model / "config.json").write_text("{}")
    expected = file_hashes(model)
    write_cached(file, read_cached(file) | {"another": "0123abcd" * 8})
    DAMAGES[damage](file)
    monkeypatch.setattr(logging.getLogger("qlora_tool"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        assert read_cached(file) == {}
        assert file_hashes(model) == expected
    assert f"{file}: not as it was written" in caplog.text
    assert (damage == "a folder") == ("cannot be written" in caplog.text)
    if damage != "a folder":
        assert list(read_cached(file).values()) == list(expected.values())


def test_a_hash_is_a_hash(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "config.json").write_text("{}")
    expected, file = file_hashes(tmp_path), tmp_path / "cache" / "hashes.json"
    for value in (5, "abc", None, ["0" * 64]):
        write_cached(file, dict.fromkeys(read_cached(file), value))
        assert file_hashes(tmp_path) == expected


def test_a_path_that_is_not_utf_8_has_a_hash(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / os.fsdecode(b"a\xff")
    try:
        folder.mkdir()
    except (OSError, ValueError):
        pytest.skip("no such names here")
    (folder / "config.json").write_text("{}")
    assert file_hashes(folder) == file_hashes(folder) == {"config.json": sha256(folder / "config.json")}


def test_a_file_in_the_place_of_the_cache_is_not_cleared(tmp_path: Path, monkeypatch):
    (tmp_path / "cache").write_text("mine")
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(tmp_path / "cache"))
    with pytest.raises(MachineError, match="is a file; set QLORA_TOOL_CACHE"):
        clear_cache()
    assert (tmp_path / "cache").read_text() == "mine"
