"""A wrong thing in the place of every command's main argument, and a newcomer's mistakes: one line, with the cure,
before anything heavy is imported."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from child_process import child_environment
from click.testing import CliRunner

from qlora_tool.cli import main

FILES = Path(__file__).parents[1] / "compatibility" / "files" / "0.1.0"
OF_CONFIG = (["train"], ["preview"], ["profile-memory"])
OF_RUN = (["export-merged", "--output-dir", "out"], ["inspect"])
OF_MODEL = (["generate", "--prompt", "x"], ["evaluate", "--data", "data.jsonl"])
ANY = "model.name_or_path=OWNER/NAME"
# What stands in the place, and what the line must say where a configuration is expected, a run, and a model.
WRONG = {
    "data.jsonl": ("smollm2-cpu --set data.train=data.jsonl", "a data file", "a data file; that goes to --"),
    "data.csv.gz": ("smollm2-cpu --set data.train=data.csv.gz", "a data file", "a data file; that goes to --"),
    "model.gguf": (ANY, "llama-cli -m model.gguf", "llama-cli -m model.gguf"),
    "ggufs": (ANY, "llama-cli -m FILE", "llama-cli -m FILE"),
    "base/model.safetensors": ("model.name_or_path=base", "that they lie in: base", "that they lie in: base"),
    "weights.bin": ("smollm2-cpu --set model.name_or_path=FOLDER", "runs here: runs/done", "runs/done"),
    "base": ("smollm2-cpu --set model.name_or_path=base", "a model without an adapter", None),
    "empty": ("found a folder", "neither a run nor an adapter in it", "an empty folder"),
    "runs/done": ("its configuration is runs/done/config.yaml", None, None),
    "runs/done/adapter": ("recipes import runs/done/adapter my-run.yaml", None, None),
    "run.yaml": (None, "(training.output_dir); runs here: runs/done", "(training.output_dir); runs here: runs/done"),
    "runs/dnoe": ("`qlora-tool recipes` lists", "did you mean 'runs/done'?", "'runs/done'?; expected a run's folder, "),
    "./bsae": (None, "did you mean 'base'?", "did you mean 'base'?"),
    "base/config.json": ("smollm2-cpu --set model.name_or_path=base", "a model without an adapter", "lies in: base"),
    "runs/done/adapter/adapter_config.json": ("recipes import runs/done/adapter/adapter_config.json my-run.yaml",
                                              "lies in: runs/done/adapter", "lies in: runs/done/adapter"),
    "demo": (None, "demo: a base, not an adapter; expected a run's folder or an adapter's", None),
    "runs/other-thing": ("`qlora-tool recipes` lists", "runs here: runs/done", "runs here: runs/done"),
    "smolm2-cpu": ("did you mean 'smollm2-cpu'?", "no such folder", "no such folder"),
    "qwen3-8b-24gb": (None, "`qlora-tool train qwen3-8b-24gb` makes a run", "`qlora-tool train qwen3-8b-24gb`"),
    "rnu.yaml": ("did you mean 'run.yaml'?", "no such folder", "no such folder"),
    "other-config.yml": ("recipes copy smollm2-cpu other-config.yml` writes one", "no such folder", "no such folder"),
    "Qwen/Qwen3-8B": ("--set model.name_or_path=Qwen/Qwen3-8B", "no such folder", None),
    "https://huggingface.co/Qwen/Qwen3-8B": ("--set model.name_or_path=Qwen/Qwen3-8B", "Qwen/Qwen3-8B", "hub id alone"),
    "https://example.org/x": (ANY, "a web address", "a web address"),
}  # fmt: skip
CASES = [
    (command, thing, said)
    for thing, expected in WRONG.items()
    for commands, said in zip((OF_CONFIG, OF_RUN, OF_MODEL), expected, strict=True)
    for command in commands
    if said is not None
]


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("things")
    for name in ("empty", "ggufs", "runs"):
        (folder / name).mkdir()
    shutil.copytree(FILES / "runs" / "finished", folder / "runs" / "done")
    shutil.copytree(FILES / "base", folder / "base")
    for name in ("model.gguf", "ggufs/a.gguf"):
        (folder / name).write_bytes(b"GGUF\x03\0\0\0")
    for name in ("data.jsonl", "data.csv.gz", "fruit.xlsx", "weights.bin"):
        (folder / name).write_text('{"prompt": "a", "completion": "b"}\n')
    (folder / "run.yaml").write_text("model: {name_or_path: base}\n")
    return folder


def refusal(*words: str) -> str:
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2, (words, result.output)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(("command", "thing", "said"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_wrong_thing_in_the_place_of_the_main_argument(things, monkeypatch, command, thing, said):
    monkeypatch.chdir(things)
    assert said in refusal(*command, thing)


# Mistakes that newcomers make with a command, and what the line says to type instead.
CONFIG_MISTAKES = {
    ("demo", "--set", "training.lerning_rate=1"): "did you mean 'learning_rate'?",
    ("demo", "--set", "learning_rate=1e-4"): "did you mean 'training.learning_rate'?",
    ("demo", "--set", "model.load_in_4bit=true"): "here it is model.quantization (true: nf4)",
    ("demo", "--set", "training.max_steps"): "expected KEY=VALUE, such as --set training.max_steps=20",
    ("demo", "--set", "model.quantization=nf"): "did you mean 'nf4'?",
    ("demo", "--set", "model.name_or_path=base/config.json"): "did you mean 'base'?",
    ("demo", "--set", "model.name_or_path=base/model.safetensors"): "did you mean 'base'?",
    ("demo", "--set", "adapter.r=big"): "expected a whole number of at least 1",
    ("demo", "--sett", "training.max_steps=1"): "did you mean '--set'?",
    ("demo", "extra.yaml"): "unexpected extra argument (extra.yaml)",
    ("demo", "data.jsonl"): "did you mean '--set data.train=data.jsonl'?",
    ("demo", "base"): "did you mean '--set model.name_or_path=base'?",
    ("demo", "training.max_steps=3"): "did you mean '--set training.max_steps=3'?",
    ("demo", "--set", "data.train", "data.jsonl"): "did you mean '--set data.train=data.jsonl'?",
    ("--set", "learning_rate", "1e-4", "demo"): "did you mean '--set training.learning_rate=1e-4'?",
    ("demo", "--max-steps", "10"): "no option '--max-steps'; did you mean '--set training.max_steps=10'?",
    ("demo", "--data.train=my data.jsonl"): "did you mean '--set data.train=\"my data.jsonl\"'?",
    ("demo", "--learning-rat", "1e-4"): "did you mean '--set training.learning_rate=1e-4'?",
    ("demo", "--lr", "1e-4"): "did you mean '--set training.learning_rate=1e-4'?",
    ("demo", "--load-in-4bit"): "here it is model.quantization (true: nf4): --set model.quantization=VALUE",
    ("--packing", "demo"): "did you mean '--set data.packing=true'?",
    ("demo", "--no-packing"): "did you mean '--set data.packing=false'?",
    ("demo", "--data", "data.jsonl"): "did you mean '--set data.train=data.jsonl'?",
    ("--config", "run.yaml"): "no option '--config'; write run.yaml without it",
    ("demo", "--prompt", "x"): "no option '--prompt' here; generate has it",
    ("dmo",): "did you mean 'demo'?",
    (): "missing argument 'CONFIG'",
}
MISTAKES = {
    "train": CONFIG_MISTAKES | {("demo", "--output_dir", "x"): "did you mean '--output-dir'?",
                                ("demo", "--device", "cpu"): "did you mean '--set model.device=cpu'?",
                                ("demo", "--device", "gpu"): "did you mean '--set model.device=cuda'?",
                                ("demo", "--quantization", "NF4"): "did you mean '--set model.quantization=nf4'?",
                                ("demo", "--gpu", "24GB"): "no option '--gpu'",
                                ("demo", "--extend", "--overwrite"): "give one of the two"},
    "preview": CONFIG_MISTAKES | {("demo", "--rows", "many"): "'many' is not a valid integer"},
    "profile-memory": CONFIG_MISTAKES | {("demo", "--gpu", "24GB"): "did you mean '--device-memory 24GB'?",
                                         ("demo", "--device", "gpu"): "did you mean 'cuda'?"},
    "export-merged": {
        (): "missing argument 'RUN_OR_ADAPTER'", ("runs/done",): "missing option '--output-dir'",
        ("runs/done", "out"): "missing option '--output-dir'; did you mean '--output-dir out'?",
        ("runs/done", "--output", "out"): "did you mean '--output-dir out'?",
        ("runs/done", "--output-dir", "out", "--format", "ggfu"): "did you mean 'gguf'?",
        ("runs/done", "--output-dir", "out", "--gguf-type", "q4km"): "did you mean 'q4_k_m'?",
        ("runs/done", "--output-dir", "out", "--gguf-type", "Q4_K_M"): "did you mean 'q4_k_m'?",
        ("runs/done", "--output-dir", "out", "--gguf-type", "q4-k-m"): "did you mean 'q4_k_m'?",
        ("runs/done", "--output-dir", "out", "--min-kept", "95%"): "did you mean 0.95?",
        ("runs/done", "--output-dir", "out", "--dtype", "float61"): "did you mean 'float16'?",
        ("runs/done", "--output-dir", "out", "--max-shard-size", "5 giga"): "did you mean 5GB?",
        ("runs/done", "--output-dir", "out", "--max-shard-size", "5"): "did you mean 5GB?",
        ("runs/done", "--output-dir", "out", "--quantization", "4bit"): "did you mean 'nf4'?",
        ("runs/done", "--output-dir", "out", "--verfy"): "did you mean '--verify'?",
    },
    "generate": {
        (): "missing argument 'RUN_OR_MODEL'", ("runs/done",): "give --prompt TEXT or --prompts FILE",
        ("runs/done", "--prompt", ""): "--prompt: expected a text, found an empty one",
        ("runs/done", "hi there"): "did you mean '--prompt \"hi there\"'?",
        ("runs/done", "hi", "there"): "did you mean '--prompt \"hi there\"'?",
        ("runs/done", "a $5 note"): "did you mean '--prompt 'a $5 note''?",
        ("runs/done", "--set", "x=1"): "no option '--set' here; train, preview and profile-memory have it",
        ("runs/done", "--max-steps", "3"): "a key of a configuration: qlora-tool train CONFIG --set training.max_steps",
        ("runs/done", "--question", "x"): "did you mean '--prompt x'?", ("--run", "runs/done"): "runs/done without it",
         ("runs/done", "--promt", "x"): "'--prompt'?",
        ("runs/done", "--prompt", "x", "--temperature", "warm"): "'warm' is not a valid float",
        ("runs/done", "--prompt", "x", "--temperature", "-1"): "not in the range x>=0",
        ("runs/done", "--prompt", "x", "--top-p", "2"): "not in the range 0<=x<=1",
        ("runs/done", "--prompt", "x", "--max-tokens", "9"): "did you mean '--max-new-tokens 9'?",
        ("runs/done", "--prompt", "x", "--device", "gpu"): "did you mean 'cuda'?",
        ("runs/done", "--prompt", "x", "--chat-template-kwargs", "a=1"): "expected such as",
    },
    "evaluate": {
        (): "missing argument 'RUN_OR_MODEL'", ("runs/done",): "missing option '--data'",
        ("runs/done", "data.jsonl"): "missing option '--data'; did you mean '--data data.jsonl'?",
        ("runs/done", "--prompt", "x"): "no option '--prompt' here; generate has it",
        ("runs/done", "--data", "data.jsonl", "--format", "alpca"): "did you mean 'alpaca'?",
        ("runs/done", "--data", "data.jsonl", "--max-length", "1"): "not in the range x>=2",
        ("runs/done", "--data", "data.jsonl", "--generat"): "did you mean '--generate'?",
        ("runs/done", "--data", "data.jsonl", "--batch-size", "0"): "not in the range x>=1",
        ("runs/done", "--data", "data.jsonl", "--json", "no/s.json"): "no",
        ("runs/done", "--data", "data.jsonl", "--model"): "'--model' requires an argument",
        ("runs/done", "--dat", "data.jsonl"): "did you mean '--data'?",
    },
    "inspect": {
        (): "missing argument 'RUN_OR_ADAPTER'", ("runs/done", "--truncate", "2"): "--output-dir DIR go together",
        ("runs/done", "--output-dir", "x"): "--output-dir DIR go together",
        ("runs/done", "--truncate", "0"): "not in the range x>=1", ("runs/done", "--plot", "a.pdf"): "ends in .png",
        ("runs/done", "--data", "data.jsonl"): "give --truncate R and --output-dir DIR with it",
        ("runs/done", "--rank", "4"): "no option '--rank'", ("runs/done", "8"): "unexpected extra argument (8)",
        ("runs/done", "--json"): "'--json' requires an argument", ("runs/done", "--al"): "did you mean '--all'?",
    },
    "recipes": {
        ("shwo",): "did you mean 'show'?", ("show",): "missing argument 'NAME'",
        ("show", "dmeo"): "did you mean 'demo'?",
        ("copy", "demo"): "missing argument 'FILE'", ("copy", "dmeo", "x.yaml"): "did you mean 'demo'?",
        ("copy", "demo", "run.yaml"): "exists already", ("import",): "missing argument 'FILE'",
        ("import", "nothing.yml"): "name a configuration of PEFT", ("import", "run.yaml"): "of qlora-tool already",
        ("smollm2-cpu",): "no command 'smollm2-cpu'; did you mean 'show smollm2-cpu'?",
        ("show", "smolm2"): "error: no recipe 'smolm2'; did you mean 'smollm2-cpu'?",
        ("show", "xyz"): "error: no recipe 'xyz'; `qlora-tool recipes` lists those that there are",
        ("copy", "x.yaml", "smollm2-cpu"): "did you mean `qlora-tool recipes copy smollm2-cpu x.yaml`?",
        ("import", "smollm2-cpu", "x.yaml"): "did you mean `qlora-tool recipes copy smollm2-cpu x.yaml`?",
        ("import", "smollm2-cpu"): "did you mean `qlora-tool recipes show smollm2-cpu`?",
        ("import", "data.jsonl"): "data.jsonl: a data file, not a configuration; expected a configuration of PEFT",
        ("import", "fruit.xlsx"): "a spreadsheet, not a configuration",
        ("import", "run.yaml", "--from", "axoltl"): "'Axolotl'",
    },
    "doctor": {
        ("--mesure",): "did you mean '--measure'?", ("--clear",): "did you mean '--clear-cache'?",
        ("cuda",): "unexpected extra argument (cuda)", ("--json",): "no option '--json'",
        ("--measure=1",): "does not take a value", ("--set", "a=1"): "no option '--set' here; train, preview and",
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("command", "words", "said"),
    [(command, words, said) for command, found in MISTAKES.items() for words, said in found.items()],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value[:20],
)
def test_a_newcomers_mistake(things, monkeypatch, command, words, said):
    monkeypatch.chdir(things)
    assert said in refusal(command, *words)


def test_mistakes_are_answered_without_torch(things: Path):
    """What takes seconds is importing torch; a mistake is told before."""
    lines = [[*command, thing] for command, thing, _ in CASES]
    lines += [["train", "demo", "--set", "training.lerning_rate=1"], ["generate", "runs/dnoe", "--prompt", "x"]]
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom qlora_tool.cli import main\n"
        f"for words in {lines!r}:\n"
        "    assert CliRunner().invoke(main, words).exit_code == 2, words\n"
        "    assert 'torch' not in sys.modules, words\n"
    )
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=things, env=child_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
