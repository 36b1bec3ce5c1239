"""Mistakes that are told before anything heavy is imported: each in a process of its own, where importing it fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from child_process import child_environment

FILES = Path(__file__).parents[1] / "compatibility" / "files" / "0.1.0"
HEAVY = ("torch", "transformers", "numpy", "accelerate")
TRAIN = ("train", "runs/done/config.yaml")
PROFILE = ("profile-memory", "demo", "--device-memory")
EXPORT = ("export-merged", "runs/done", "--output-dir", "out")

# The command, and what its one line must say.
MISTAKES = {
    ("report", "runs/dnoe"): "no such folder; did you mean 'runs/done'?; expected a run's folder",
    ("report", "demo"): "`qlora-tool train demo` makes a run",
    ("report", "data.csv"): "found a data file; name the run that was trained on it; runs here: runs/",
    ("report", "merged"): "found a merged model; it was made from runs/done: `qlora-tool report runs/done`",
    ("report", "base"): "found a model; runs here: runs/",
    ("report", "runs/done/adapter"): "found the adapter of one: `qlora-tool report runs/done`",
    ("report", "adapter"): "found an adapter alone; `qlora-tool inspect adapter` shows what it learned",
    ("report", "ggufs"): "found a folder of models for llama.cpp; name the run that it was made from",
    ("report", "runs"): "found a folder without config.yaml, so that no run lies there; runs here: runs/",
    ("generate", "base", "--prompt", "x", "--adapter", "runs/done"): "such as --adapter done=runs/done",
    ("evaluate", "base", "--data", "data.csv", "--adapter", "runs/done/adapter"): "--adapter done=runs/done/adapter",
    (*EXPORT, "--adapter", "runs/done"): "such as --adapter done=runs/done",
    ("generate", "base", "--prompt", "x", "--adapter", "a=runs/dnoe"): "--adapter a=runs/dnoe: no such folder; did you",
    ("generate", "base", "--prompt", "x", "--adapter", "a=runs/done:2"): "export-merged adds them up",
    ("generate", "base", "--prompt", "x", "--adapter", "a=runs/half"): "runs/half: this run is not finished",
    ("generate", "runs/half", "--prompt", "x"): "runs/half: this run is not finished",
    ("generate", "runs", "--prompt", "x"): "found a folder with none of these in it; runs here: runs/",
    ("evaluate", "runs", "--data", "data.csv"): "found a folder with none of these in it; runs here: runs/",
    ("inspect", "runs/half"): "runs/half: this run is not finished",
    ("inspect", "around"): "no adapter_config.json in it; the adapter lies in around/adapter",
    ("export-merged", "demo", "--output-dir", "out"): "`qlora-tool train demo` makes a run",
    ("export-merged", "runs/half", "--output-dir", "out"): "finish it with `qlora-tool train runs/half/config.yaml`",
    ("export-merged", "around", "--output-dir", "out"): "the adapter lies in around/adapter",
    (*EXPORT, "--gguf-type", "q4_k_m"): "--gguf-type q4_k_m: is for --format gguf, not safetensors; give both, or none",
    (*EXPORT, "--format", "gguf", "--dtype", "float16"): "--format gguf has dtypes of its own; give --gguf-type",
    (*EXPORT, "--format", "gguf", "--min-kept", "95"): "--min-kept 95: expected a share of what training gained, above",
    (*EXPORT, "--min-kept", "0.9"): "set --format gguf, or leave it out",
    (*EXPORT, "--with-base"): "--with-base: is for --format gguf-adapter, not safetensors",
    (*EXPORT, "--format", "nf4", "--calibration", "rows.jsonl"): "--calibration rows.jsonl: no such file",
    (*EXPORT, "--format", "gguf", "--gguf-type", "auto", "--no-verify"): "leave out --no-verify",
    ("export-merged", "runs/done", "--output-dir", "full"): "full: exists; give --overwrite to replace it, or another",
    ("export-merged", "runs/done", "--output-dir", "full", "--overwrite"): "holds something other than an export",
    ("export-merged", "runs/done", "--output-dir", "data.csv"): "data.csv: a file, where --output-dir expects a folder",
    ("inspect", "runs/done", "--truncate", "2", "--output-dir", "out"): "of rank 2 at most; give a rank below 2",
    ("inspect", "adapter", "--truncate", "9", "--output-dir", "out"): "adapter has updates of rank 2 at most",
    ("inspect", "runs/done", "--truncate", "1", "--output-dir", "full"): "full: exists; give --overwrite to replace it",
    **{(command, "demo"): "name yours: --set data.train=YOUR_FILE --set data.eval=null, or make them in a checkout of "
       "the source with `tools/make demo-data --seed 1 --rows 480 demo/train.jsonl` and `tools/make demo-data "
       for command in ("train", "preview")},
    ("preview", "demo", "--set", "data.train=my.jsonl", "--set", "data.eval=null"): "my.jsonl: no such file or folder",
    TRAIN: "runs/done: holds this run, finished; give --overwrite to run it again, another --output-dir, or --extend",
    (*TRAIN, "--resume", "never"): "runs/done: holds a run; give --overwrite to replace it, or another --output-dir",
    (*TRAIN, "--set", "adapter.r=4"): "runs/done: holds another run (adapter.r: 2 there, 4 here)",
    (*TRAIN, "--set", "training.max_steps=9"): "a shorter one; give --extend to go on from its last checkpoint",
    (*TRAIN, "--resume", "nowhere"): "--resume nowhere: no checkpoint; expected a folder such as",
    (*TRAIN, "--output-dir", "new", "--extend"): "--extend: new holds no run to go on with",
    (*TRAIN, "--output-dir", "data.csv"): "training.output_dir: data.csv is a file; expected a folder",
    (*TRAIN, "--output-dir", "foreign"): "no run wrote it, as no config.yaml lies beside it",
    **{(command, "runs/done/config.yaml", "--set", f"model.name_or_path={name}"): said
       for command in ("train", "preview", "profile-memory") for name, said in {
        "runs/done": "start from its adapter: --set model.name_or_path=base --set adapter.init_from=runs/done/adapter",
        "around": "start from its adapter: --set model.name_or_path=base --set adapter.init_from=around/adapter",
        "runs/half": "it is a run, and not finished: `qlora-tool train runs/half/config.yaml` goes on with it",
        "ggufs": "it holds models for llama.cpp, which are not trained; name the model that they were made from: --set",
        "exported": "which are not trained; name the model that they were made from: --set model.name_or_path=base",
        "ggufs/a.gguf": "a model for llama.cpp, which is not trained", "data.csv": "data.csv: not a folder; expected",
        "full": "no config.json in it, so it is not a model folder; name one that has it, or download it again",
        "./bsae": "no such folder; did you mean 'base'?",
    }.items()},
    (*EXPORT, "--model", "bare"): "bare: no weights in it, where model.safetensors is expected, or shards with model.",
    (*EXPORT, "--model", "pickled"): "pickled: its weights are pickles (pytorch_model.bin)",
    ("generate", "bare", "--prompt", "x"): "name a folder that has them, or download the model again",
    ("evaluate", "runs/done", "--data", "data.csv", "--model", "bare"): "bare: no weights in it",
    ("train", "runs/done/config.yaml", "--set", "model.name_or_path=bare"): "bare: no weights in it",
    **{(*PROFILE, *words): said for words, said in {
        ("24",): "'24' is neither a size nor a card such as rtx-4090; did you mean 24GB?",
        ("0",): "expected a size above 0, such as 24GB",
        ("-1GB",): "expected a size above 0", ("rtx-4091",): "such as rtx-4090", ("huge",): "not in the table of cards",
        ("rtx-3080",): "exists with 10 GB and 12 GB", ("m2 max",): "not one of NVIDIA's cards",
        ("rtx-4090", "--device", "cpu"): "a card, but the prediction is for a CPU",
    }.items()},
}  # fmt: skip


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs, their base, an export, an adapter alone, GGUF files; and modules that fail when they are imported."""
    folder = tmp_path_factory.mktemp("early")
    for name in ("base", "data", "merged"):
        shutil.copytree(FILES / name, folder / name)
    shutil.copytree(FILES / "runs" / "finished", folder / "runs" / "done")
    shutil.copytree(FILES / "runs" / "stopped", folder / "runs" / "half")
    shutil.copytree(FILES / "runs" / "finished" / "adapter", folder / "adapter")
    shutil.copytree(folder / "adapter", folder / "around" / "adapter")
    for name in ("ggufs", "exported", "foreign/adapter", "bare", "pickled", "failing", "full", "runs/done/report"):
        (folder / name).mkdir(parents=True)
    for name in HEAVY:
        (folder / "failing" / f"{name}.py").write_text(f"raise RuntimeError('{name} was imported')\n")
    for name in ("ggufs", "exported"):
        (folder / name / "a.gguf").write_bytes(b"GGUF\x03\0\0\0")
    shutil.copy(folder / "merged" / "qlora_tool.json", folder / "exported")
    (folder / "full" / "notes.txt").write_text("mine\n")
    for name in ("bare", "pickled"):
        shutil.copy(folder / "base" / "config.json", folder / name)
    (folder / "pickled" / "pytorch_model.bin").touch()
    (folder / "data.csv").write_text("prompt,completion\na,b\n")
    config = folder / "runs" / "done" / "config.yaml"
    config.write_text(config.read_text().replace("runs/finished", "runs/done"))
    (folder / "runs" / "done" / "report.html").touch()
    exports = {str((folder / "merged").resolve()): {"format": "safetensors"}}
    (folder / "runs" / "done" / "report" / "exports.json").write_text(json.dumps(exports))
    return folder


@pytest.mark.parametrize(("words", "said"), MISTAKES.items(), ids=[" ".join(words) for words in MISTAKES])
def test_a_mistake_is_told_before_anything_heavy_is_imported(things: Path, words: tuple[str, ...], said: str):
    environment = child_environment(HF_HUB_OFFLINE=1)
    environment["PYTHONPATH"] = os.pathsep.join([str(things / "failing"), environment["PYTHONPATH"]])
    done = subprocess.run([sys.executable, "-m", "qlora_tool", *words], cwd=things, env=environment,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ") and said in line
