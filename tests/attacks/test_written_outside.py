"""Real processes write into the output folder and the cache, and leave nothing anywhere else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from child_process import child_environment
from tiny_adapters import write_chat_base

from qlora_tool.files.cache import cache_folder, place_torchs_cache


def _names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_run_and_its_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    for name in ("cache", "tmp", "home", "in"):
        (tmp_path / name).mkdir()
    write_chat_base("llama", tmp_path / "in/model")
    (tmp_path / "in/data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    config = {
        "model": {"name_or_path": "model", "device": "cpu", "compute_dtype": "float32"}, "adapter": {"r": 4},
        "data": {"train": "data.jsonl", "max_length": 128}, "training": {"output_dir": "../out", "max_steps": 2},
    }  # fmt: skip
    (tmp_path / "in/run.yaml").write_text(yaml.safe_dump(config))
    given = _names(tmp_path / "in")
    env = child_environment(TMPDIR=tmp_path / "tmp", HOME=tmp_path / "home", QLORA_TOOL_CACHE=tmp_path / "cache",
                            XDG_CACHE_HOME=tmp_path / "home/.cache")  # fmt: skip
    for args in (("train", "run.yaml"), ("export-merged", "../out", "--output-dir", "../merged")):
        subprocess.run([sys.executable, "-m", "qlora_tool", *args], cwd=tmp_path / "in", env=env, check=True)
    assert _names(tmp_path / "tmp") == [] and _names(tmp_path / "home") == [] and _names(tmp_path / "in") == given
    assert sorted(os.listdir(tmp_path)) == ["cache", "home", "in", "merged", "out", "tmp"]


def test_torch_keeps_its_own_place_where_the_cache_cannot_take_it(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that it is put back
    for folder in (tmp_path / "file", tmp_path / "file/below"):
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
        monkeypatch.setenv("QLORA_TOOL_CACHE", str(folder))
        place_torchs_cache()
        assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(tmp_path / "later"))
    place_torchs_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(cache_folder() / "torchinductor")
    assert not cache_folder().exists()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    place_torchs_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere"


def test_without_a_home_or_a_current_folder_commands_go_on(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.setenv("QLORA_TOOL_CACHE", "relative")
    place_torchs_cache()
    monkeypatch.delenv("QLORA_TOOL_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    place_torchs_cache()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
