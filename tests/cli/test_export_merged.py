"""`export-merged` through its entry point: what it prints, every bad input in one line, and kills at random moments."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from child_process import child_environment
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_adapters import write_adapter, write_chat_base, write_run

from qlora_tool.cli import main
from qlora_tool.export import staging
from qlora_tool.export.merge import MergedModel

EXPORT = ("export-merged", "run", "--output-dir", "merged")
PLAIN = ("--no-verify",)
KILLER = Path(__file__).parents[1] / "export" / "killed_exports.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bf16 model `base` and a run `run` on it."""
    folder = tmp_path_factory.mktemp("place")
    base = write_chat_base("llama", folder / "base", dtype=torch.bfloat16)
    write_run(folder / "run", base)
    return folder


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the working folder; its base is the copy's."""
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(place / "base"), str(tmp_path / "base")))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*args: str) -> str:
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.output
    return result.stdout


def error(here: Path, *args: str, code: int = 2) -> str:
    """The only line that a command leaves on stderr, after `error: `; it leaves no file."""
    before = sorted(here.rglob("*"))
    result = CliRunner().invoke(main, args)
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    (line,) = [line for line in result.stderr.splitlines() if "Writing model shards" not in line]
    assert line.startswith("error: ")
    assert sorted(here.rglob("*")) == before
    return line.removeprefix("error: ")


# ----------------------------------------------------------------------------------------------- what it prints


def test_what_is_written_is_verified_and_told(here: Path):
    out = run(*EXPORT, "--json", "done.json")
    lines = out.splitlines()
    assert re.match(r"merged: [\d.]+ [kM]B of float16 in 1 file, ", lines[0])
    assert lines[1] == "dtype float16: every value fits, and it rounds eight times finer than bfloat16"
    assert lines[2].startswith("verified against the trained model (quantized base with its adapter) on ")
    assert lines[-1] == "next: qlora-tool generate merged --prompt '...'"
    done, report = (json.loads(Path(name).read_text()) for name in ("done.json", "merged/export.json"))
    assert report["verification"] == done["verification"]
    assert report["verification"]["left_out"] is None and report["verification"]["mean_kl"] < 1e-5
    assert "seconds" in done and "seconds" not in json.dumps(report)
    assert report["options"]["dtype"] == "auto" and report["dtype"] == "float16"
    hashes = report["provenance"]
    assert hashes["base"]["files"].keys() == {"config.json", "model.safetensors"}
    assert hashes["adapter"]["files"].keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert all(len(digest) == 64 for digest in hashes["data"]["train"].values())


def test_an_adapter_for_llama_cpp_says_which_base_it_is_for(here: Path):
    lines = run(*EXPORT, "--format", "gguf-adapter").splitlines()
    assert re.match(r"merged: [\d.]+ [kM]B of an adapter in 1 file, ", lines[0])
    assert lines[1] == "adapter.gguf: LoRA on 14 tensors of a llama, r 4, alpha 32"
    assert lines[2] == (
        f"its base: {here / 'base'} quantized to nf4, as it was trained; a GGUF file made of its own weights is "
        "another base (--with-base writes the one it was trained on)"
    )
    assert lines[-1] == "next: llama-cli -m BASE.gguf --lora merged/adapter.gguf -p '...'"
    report = json.loads(Path("merged/export.json").read_text())
    assert report["verification"]["mean_kl"] < 1e-9 and report["dtype"] is None
    assert report["verification"]["update"]["error"] < 1e-5
    card = Path("merged/README.md").read_text()
    assert lines[2].removeprefix("its base: ") in card and "--lora merged/adapter.gguf" in card and "ollama" not in card


def test_verification_left_out(here: Path):
    assert "not verified: not asked for" in run(*EXPORT, *PLAIN).splitlines()
    report = json.loads(Path("merged/export.json").read_text())
    assert report["verification"] == {"left_out": "not asked for"}


@pytest.mark.parametrize("form", ["adapter", "adapter-portable", "nf4", "gguf", "gguf-adapter"])
def test_every_other_format(here: Path, form: str):
    more = {"gguf": ["--gguf-type", "q8_0"], "gguf-adapter": ["--with-base"]}
    form_options = ["--format", form, *more.get(form, [])]
    out = run(*EXPORT, *form_options)
    report = json.loads(Path("merged/export.json").read_text())
    assert report["format"] == report["options"]["format"] == form
    assert all((here / "merged" / name).stat().st_size for name in report["files"])
    assert ("not verified: " in out) == form.startswith("adapter")
    if form == "gguf":
        assert report["files"] == ["merged.gguf"] and (here / "merged" / "Modelfile").exists()
        assert out.splitlines()[-1] == "next: ollama create merged -f merged/Modelfile"
    if form == "gguf-adapter":
        assert report["files"] == ["adapter.gguf", "base.gguf"] and report["dtype"] == "f16"
        assert Path("merged/Modelfile").read_text().startswith("FROM ./base.gguf\nADAPTER ./adapter.gguf\n")
        assert out.splitlines()[-1] == "next: ollama create merged -f merged/Modelfile"
        assert report["verification"]["mean_kl"] < 1e-5  # of the base's rounding to f16
    if form in ("nf4", "fp4"):
        kept = report["requantization"]["update_kept"]
        assert report["verification"]["update"]["kept"] == pytest.approx(kept, rel=1e-2, abs=1e-3)
        assert 0.7 < kept < 1.3 and report["encoding"]["calibration"] is None  # from either base, whichever keeps more
        start = report["encoding"]["started_from"]
        assert report["base"] == start and f"codes start from the {start} base with the update added; the near" in out
    again = {path.name: path.read_bytes() for path in (here / "merged").iterdir() if path.is_file()}
    run(*EXPORT, *form_options, "--overwrite")
    assert {path.name: path.read_bytes() for path in (here / "merged").iterdir() if path.is_file()} == again


# ------------------------------------------------------------------------------------------------------- faults


def test_options_that_do_not_go_together(here: Path):
    assert error(here, *EXPORT, "--format", "gguf", "--dtype", "float16") == (
        "--dtype float16: --format gguf has dtypes of its own; give --gguf-type"
    )
    assert error(here, *EXPORT, "--gguf-type", "q4_k_m") == (
        "--gguf-type q4_k_m: is for --format gguf, not safetensors; give both, or none"
    )
    assert error(here, *EXPORT, "--with-base") == (
        "--with-base: is for --format gguf-adapter, not safetensors; give both, or none"
    )
    assert error(here, *EXPORT, "--format", "gguf-adapter", "--gguf-type", "q8_0") == (
        "--gguf-type q8_0: is of the base's file, which --with-base writes; give both, or none: the adapter's is f32"
    )
    assert error(here, *EXPORT, "--verify-data", "gone.jsonl").startswith("gone.jsonl: no such file or folder")
    assert error(here, *EXPORT, "--push-to-hub", "nobody").startswith("--push-to-hub nobody: no hub id, which is OWNER")


def test_nf4_says_beforehand_that_it_rounds_away(here: Path):
    told = {}
    for base in ("dequantized", "original"):
        options = ("--format", "nf4", "--base", base, "--calibration", "none", "--overwrite")
        result = CliRunner().invoke(main, [*EXPORT, *PLAIN, *options])
        told[base] = "--base original or --calibration auto keeps a small one" in result.stderr
        lines = result.stdout.splitlines()[1:]
        assert lines[0] == f"codes start from the {base} base with the update added; the nearest ones"
        assert lines[1] == "not verified: not asked for" and lines[2].startswith("  update kept ")
        assert lines[3].startswith("warning: update kept ") and ("--base original" in lines[3]) == told[base]
        assert "update kept" in Path("merged/README.md").read_text()
    assert told == {"dequantized": True, "original": False}


def test_rows_that_cannot_be_read_cost_nothing(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(MergedModel, "tensors", None)  # nothing may be made
    Path("rows.jsonl").write_text('{"prompt": "What is 3 and 3?", "completion": "It is 6."}\nno row\n')
    assert error(here, *EXPORT, "--verify-data", "rows.jsonl").startswith("rows.jsonl, line 2: ")


def test_an_adapter_for_another_base(here: Path, place: Path):
    write_chat_base("gpt2", here / "other")
    line = error(here, *EXPORT, *PLAIN, "--model", "other")
    assert line.startswith(
        "run/adapter: not for the base other: 14 of its 14 layers and tensors do not fit, the first because it "
        "adapts model."
    )
    assert line.endswith(f"name the base that it was trained on, {place / 'base'}, with --model")


def test_a_base_that_changed_or_went(here: Path):
    file = here / "base" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] * 2}, file, {"format": "pt"})
    line = error(here, *EXPORT)
    assert line.startswith(f"{here / 'base'}: model.safetensors not as when run was trained on it (SHA-256 differs)")
    shutil.rmtree(here / "base")
    assert error(here, *EXPORT).startswith(f"model {here / 'base'}: no such folder")


def test_values_that_overflow_float16(here: Path):
    file = here / "run" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: t * 1e8 if "up_proj.lora_B" in name else t for name, t in tensors.items()}, file)
    assert "damaged, or written by another program" in error(here, *EXPORT, *PLAIN)
    (file.parent / "manifest.json").unlink()
    line = error(here, *EXPORT, *PLAIN, "--dtype", "float16")
    assert line.startswith("--dtype float16: model.layers.") and line.count("up_proj.weight has values up to ") == 2
    out = run(*EXPORT, *PLAIN)
    assert "dtype bfloat16: float16 does not hold every value: model.layers.0.mlp.up_proj.weight has values up" in out


def test_a_family_that_gguf_does_not_know(here: Path):
    base = write_chat_base("gpt_neo", here / "neo")
    write_adapter(here / "neo-adapter", base)
    line = error(here, "export-merged", "neo-adapter", "--output-dir", "merged", "--format", "gguf")
    assert "gguf" in line and "gpt_neo" in line


def test_the_hub_out_of_reach_leaves_the_export(here: Path):
    result = CliRunner().invoke(main, [*EXPORT, *PLAIN, "--push-to-hub", "me/model"])
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: --push-to-hub me/model: the model hub is out of reach")
    assert "the export stays in merged" in line
    assert (here / "merged" / "model.safetensors").exists()


def test_a_push_uploads_the_folder(here: Path, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    uploaded = {}

    class Hub:
        def create_repo(self, repo, exist_ok):
            return f"https://hub/{repo}"

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            uploaded[repo_id] = sorted(path.name for path in Path(folder_path).iterdir())

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert "uploaded: https://hub/me/model" in run(*EXPORT, *PLAIN, "--push-to-hub", "me/model").splitlines()
    assert uploaded == {"me/model": sorted(path.name for path in (here / "merged").iterdir())}


def test_two_exports_at_once(here: Path, monkeypatch: pytest.MonkeyPatch):
    whole, second = MergedModel.tensors, []

    def export_in_between(self, group):
        if not second:
            second.append(None)
            second[0] = CliRunner().invoke(main, [*EXPORT, *PLAIN])
        return whole(self, group)

    monkeypatch.setattr(MergedModel, "tensors", export_in_between)
    run(*EXPORT, *PLAIN)
    assert second[0].exit_code == 2, second[0].output
    assert f"error: {here / 'merged'}: process {os.getpid()} on " in second[0].stderr
    assert "is exporting to it; wait for that export, or give another --output-dir" in second[0].stderr


# -------------------------------------------------------------------------------------------------------- kills


@pytest.mark.parametrize(
    ("options", "kills"),
    [(("--max-shard-size", "30kB"), 5), pytest.param(("--format", "gguf"), 5, marks=pytest.mark.slow),
     pytest.param(("--format", "gguf-adapter", "--with-base"), 5, marks=pytest.mark.slow)],
    ids=["shards", "gguf", "gguf-adapter"],
)
def test_killed_at_random_moments_and_run_again(here: Path, tmp_path: Path, options, kills: int):
    environment = child_environment(OMP_NUM_THREADS=1)
    command = [sys.executable, KILLER, str(here / "run"), str(tmp_path / "killed"), str(kills), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    expected = contents(tmp_path / "killed" / "undisturbed" / "model")
    assert len(report["kills"]) == kills and report["calls"] > 20
    for kill in report["kills"]:
        assert kill["code"] == -signal.SIGKILL
        folder = tmp_path / "killed" / str(kill["moment"])
        assert kill["finished"] or kill["second"] == 0
        assert contents(folder / "model") == expected
        assert kill["finished"] or not staging.staging_root(folder / "model").exists()
    assert any(kill["growing"] for kill in report["kills"])


@pytest.mark.parametrize("options", [("--format", "gguf"), ("--format", "gguf-adapter", "--with-base")], ids=" ".join)
def test_killed_just_as_a_file_is_finished(here: Path, options, monkeypatch: pytest.MonkeyPatch):
    run(*EXPORT, *PLAIN, *options)
    expected = contents(here / "merged")
    whole = staging.Staging.whole

    @contextmanager
    def killed(self, name):
        with whole(self, name) as file:
            yield file
        raise KeyboardInterrupt

    files = [name for name in expected if name.endswith(".gguf")]
    for _ in files:
        with monkeypatch.context() as patch:
            patch.setattr(staging.Staging, "whole", killed)
            assert CliRunner().invoke(main, [*EXPORT, *PLAIN, *options, "--overwrite"]).exit_code != 0
    monkeypatch.setattr(staging.Staging, "whole", None)  # all are there
    run(*EXPORT, *PLAIN, *options, "--overwrite")
    assert contents(here / "merged") == expected


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
