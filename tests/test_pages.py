"""What the pages show is run: every command, every piece of Python and of YAML, on tiny models in a folder of its own.

All of it runs with `tools/test --all tests/test_pages.py`. Each page has a folder in which the files and runs that the
pages speak of are there; its commands run in their order. What cannot be had on every machine is exchanged: a model by
a tiny one, a card by the CPU, a long run by two steps. What is not run at all stands in `pages_not_run.yaml`, with its
reason.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from making.support_tickets import COLUMNS, rows

from qlora_tool import preview
from qlora_tool.cli import main
from qlora_tool.config import Config, load_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
NOT_RUN = yaml.safe_load((ROOT / "tests" / "pages_not_run.yaml").read_text(encoding="utf-8"))
PROGRAMS = r"(qlora-tool|tools/[\w-]+|pip|pipx|uv|python3?|ollama|llama-[\w-]+|vllm|torchrun|accelerate|curl)"
TAKE_A_CONFIGURATION = ("train", "preview", "profile-memory")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, *languages: str) -> list[str]:
    """The code blocks of a page in one of some languages; "" is none."""
    return [text for language, text in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def commands(page: Path) -> list[str]:
    """Every line of a page's code blocks that is typed into a shell, a comment at its end left out."""
    lines = "".join(blocks(page, "", "bash", "console")).replace("\\\n", " ").splitlines()
    lines = [re.sub(r"\s+#( .*)?$", "", line.removeprefix("$ ")) for line in lines]
    return [line.strip() for line in lines if re.match(rf"{PROGRAMS}( |$)", line)]


def why_not_run(command: str) -> str | None:
    return next((reason for start, reason in NOT_RUN.items() if f"{command} ".startswith(f"{start} ")), None)


# --------------------------------------------------------------------------------- fast: what is run, and what is not


def test_every_command_is_ours_or_told_why_it_is_not_run():
    found = {command for page in PAGES for command in commands(page)}
    assert len(found) > 30  # the pattern finds them
    assert [line for line in found if not line.startswith("qlora-tool") and not why_not_run(line)] == []


def test_what_is_told_not_to_run_is_on_a_page():
    found = [command for page in PAGES for command in commands(page)]
    assert [start for start in NOT_RUN if not any(f"{line} ".startswith(f"{start} ") for line in found)] == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_yaml_is_a_configuration(page: Path, tmp_path: Path):
    for text in blocks(page, "yaml"):
        file = tmp_path / "page.yaml"
        values = {"model": {"name_or_path": "demo"}, "data": {"train": "my.csv", "eval": 0.05}}
        for section, keys in yaml.safe_load(text).items():
            values[section] = values.get(section, {}) | keys
        file.write_text(yaml.safe_dump(values), encoding="utf-8")
        assert isinstance(load_config(file), Config)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_is_python(page: Path):
    for text in blocks(page, "python"):
        ast.parse(text)


def test_the_rows_that_the_tutorial_shows_are_of_its_spreadsheet():
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| (.+?) \| (\[.+) \|$", text, re.MULTILINE)
    assert len(rows()) == 60 and len(shown) == 3 and set(shown) <= set(rows())


def test_what_fits_on_a_card_is_what_was_predicted():
    """The table of docs/choosing.md; its figures change with `tools/make recipe-predictions`."""
    text = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| (\d+) GB \| `([\w.-]+)` \| .* \| ([\d.]+) GiB \| ([\d.]+) GiB \|$", text, re.MULTILINE)
    known = json.loads((ROOT / "tests" / "memory" / "recipe_predictions.json").read_text())
    assert len(table) > 10
    for card, name, needed, limit in table:
        assert name.endswith(f"-{card}gb")
        found = [f"{known[name][key] / 2**30:.1f}" for key in ("needed_bytes", "limit_bytes")]
        assert [needed, limit] == found, name


@pytest.mark.parametrize("text", blocks(ROOT / "docs" / "data.md", "jsonl", "csv"))
def test_examples_of_data_are_read_whole(text: str, tmp_path: Path):
    """Every row of every format that the page shows is kept, and something of it is trained."""
    from tokenizers_for_tests import CHATML, byte_level

    base = tmp_path / "model"
    base.mkdir()
    byte_level(CHATML).save_pretrained(base)
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 4096}))
    file = tmp_path / ("rows.jsonl" if text.startswith("{") else "rows.csv")
    file.write_text(text, encoding="utf-8")
    keys = {"model": {"name_or_path": str(base)}, "data": {"train": str(file), "max_length": 2048, "eval": None}}
    found = preview(keys).counts.report
    count = len(text.splitlines()) - (file.suffix == ".csv")
    assert (found.rows, found.kept) == (count, count) and found.trained_tokens > 0


# ----------------------------------------------------------------------------------------------------- slow: it is run


def write_rows(file: Path, names: tuple[str, str], count: int = 12) -> None:
    """Questions and answers in the form that the file's ending says."""
    pairs = [(question[:40], answer[-40:]) for question, answer in rows()[:count]]
    if file.suffix == ".jsonl":
        text = "".join(f"{json.dumps(dict(zip(names, pair, strict=True)))}\n" for pair in pairs)
        file.write_text(text, encoding="utf-8")
    elif file.suffix == ".csv":
        file.write_text("\n".join(["\t".join(names), *("\t".join(pair) for pair in pairs)]), encoding="utf-8")
    else:
        from openpyxl import Workbook

        book = Workbook()
        for row in (names, *pairs):
            book.active.append(row)
        book.save(file)


def fill(folder: Path) -> Path:
    """The files and runs that the pages speak of, and `model`, the tiny one; the folder itself."""
    from tiny_adapters import write_chat_base, write_peft_adapter, write_run

    base = write_chat_base("llama", folder / "model", max_position_embeddings=131072)
    (folder / "runs").mkdir()
    for name in ("my-run", "my-model", "shell", "math", "other"):
        write_run(folder / "runs" / name, base, adapter={"r": 8}, data={"eval": 0.2}, max_steps=-1, num_train_epochs=1)
    for name in ("my.csv", "my.xlsx", "tickets.xlsx"):
        write_rows(folder / name, COLUMNS)
    for name in ("my.jsonl", "held_out.jsonl", "eval.jsonl", "data/train.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        write_rows(folder / name, ("prompt", "completion"))
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}] * 2
    (folder / "chats.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 12, encoding="utf-8")
    config = {
        "model": {"name_or_path": str(base)}, "adapter": {"r": 4},
        "data": {"train": "my.jsonl", "eval": "eval.jsonl", "max_length": 128},
        "training": {"output_dir": "runs/my-run", "max_steps": 2},
    }  # fmt: skip
    (folder / "my-run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    write_peft_adapter(folder / "outputs" / "adapter", base)
    axolotl = {"base_model": str(base), "adapter": "qlora", "load_in_4bit": True, "lora_r": 4, "lora_alpha": 8,
               "datasets": [{"path": "my.jsonl", "type": "alpaca"}], "lora_target_linear": True}  # fmt: skip
    (folder / "axolotl.yml").write_text(yaml.safe_dump(axolotl), encoding="utf-8")
    source = f'from unsloth import FastLanguageModel\nmodel, tokenizer = FastLanguageModel.from_pretrained("{base}")\n'
    source += 'model = FastLanguageModel.get_peft_model(model, r=4, target_modules=["q_proj"], lora_alpha=8)\n'
    notebook = {"cells": [{"cell_type": "code", "metadata": {}, "outputs": [], "source": source}], "metadata": {}}
    (folder / "notebook.ipynb").write_text(json.dumps(notebook | {"nbformat": 4, "nbformat_minor": 5}))
    return folder


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("pages"))


@pytest.fixture
def folder(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to work in; the current folder, too."""
    copy = tmp_path / "page"
    shutil.copytree(filled, copy)
    for file in copy.glob("runs/*/config.yaml"):  # a run goes on in the copy
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace(f"output_dir: {filled}", f"output_dir: {copy}"), encoding="utf-8")
    monkeypatch.chdir(copy)
    return copy


def as_run(command: str, folder: Path) -> list[str]:
    """The words after `qlora-tool`, with what cannot be had exchanged."""
    words = shlex.split(re.sub(r" > \S+$", "", command))[1:]
    words = [str(folder / "model") if word == "demo" else word for word in words]
    if not words or "--help" in words:
        return words
    if words[0] in TAKE_A_CONFIGURATION and not words[1].startswith("runs/"):
        sets = [f"model.name_or_path={folder / 'model'}", "model.compute_dtype=float32", "data.max_length=128"]
        if words[0] == "train":
            sets += ["model.device=cpu", "training.max_steps=2", "training.save_steps=2"]
            words += [] if "--extend" in words else ["--overwrite"]
        words += [word for item in sets for word in ("--set", item)]
    elif words[0] in ("generate", "evaluate") and "--max-new-tokens" not in words:
        words += ["--max-new-tokens", "4"] if words[0] == "generate" or "--generate" in words else []
    elif words[0] == "export-merged" and Path(words[words.index("--output-dir") + 1]).exists():
        words += ["--overwrite"]
    elif words[:2] in (["recipes", "copy"], ["recipes", "import"]):
        Path(words[-1]).unlink(missing_ok=True)
    return words


def run_command(command: str, folder: Path) -> str:
    """Run a command of ours, which has to end with 0; what it printed."""
    done = CliRunner().invoke(main, as_run(command, folder))
    assert done.exit_code == 0, f"{command}\n{done.output}\n{done.exception!r}"
    return done.output


def run_python(texts: list[str]) -> None:
    """Run a page's blocks of Python one after the other, as in a notebook; they have to raise nothing."""
    names = {"__name__": "page"}
    for text in texts:
        if "train(" in text:
            shutil.rmtree("runs/my-run", ignore_errors=True)  # of another configuration
        if "export_merged(" in text:
            shutil.rmtree("merged", ignore_errors=True)
        short = re.sub(r"\"training\.max_steps\": \d+", '"training.max_steps": 2', text)
        exec(compile(short, "page", "exec"), names)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_what_a_page_shows_runs(page: Path, folder: Path, filled: Path):
    for command in commands(page):
        if not why_not_run(command):
            run_command(command, folder)
    shutil.copy(filled / "my-run.yaml", folder)  # a command may have put a recipe there
    run_python(blocks(page, "python"))


@pytest.mark.slow
@pytest.mark.parametrize("command", ["qlora-tool train nothing.yaml", "qlora-tool generate runs/none --prompt Hi"])
def test_a_command_that_fails_is_found(command: str, folder: Path):
    with pytest.raises(AssertionError, match="error:"):
        run_command(command, folder)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "lines"), [
    ("train my-run.yaml --set training.learning_rate=1e30 --set training.max_grad_norm=0 --set training.max_steps=5",
     ["the loss is nan, on rows my.jsonl, line ",
      "the last good checkpoint is none yet; lower training.learning_rate, or set training.max_grad_norm"]),
    ("train my-run.yaml --set training.learning_rate=1e-9 --set data.eval=null",
     ["warning: nothing was learned: the loss on training rows is ",
      "before the first step; change training.learning_rate, or train for longer",
      "warning: this run has 2 optimizer steps, and of fewer than 30 little is learned: as a try that will do; "
      "else leave training.max_steps out"]),
    ("train my-run.yaml --set training.max_memory=1MB",
     ["error: training.gradient_checkpointing: auto: this run takes at least ", "makes it fit, in 0.8 M"]),
    ("preview my-run.yaml --set data.max_length=32",
     ["error: data.train: nothing to learn from: my.jsonl: 12 rows (prompt_completion), 0 kept; 0 tokens, 0 of them "
      "trained; the longest has 0; chat template: the model's; trained: the answers; 12 rows dropped: data.max_length "
      "32 leaves nothing of the answer; each row needs an answer that begins within data.max_length"]),
    ("preview my-run.yaml --set data.max_length=60", ["12 rows cut at data.max_length 60"]),
    ("preview my-run.yaml --set data.train=names.csv",
     ["error: names.csv, line 2: the columns (Name, Age) are those of no format; needed are messages: "]),
])  # fmt: skip
def test_symptoms_show_the_lines_of_the_page(command: str, lines: list[str], folder: Path):
    (folder / "names.csv").write_text("Name,Age\nHi,4\nHo,5\n", encoding="utf-8")
    with_device = ["--set", "model.device=cpu", "--set", "model.compute_dtype=float32"]
    more = ["--overwrite", *with_device] if command.startswith("train") else []
    printed = CliRunner().invoke(main, [*shlex.split(command), *more]).output
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert [line for line in lines if line not in printed] == []
    assert [line for line in lines if line not in page] == []


@pytest.mark.slow
def test_the_tutorial_on_the_model_that_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With the spreadsheet of 60 rows: minutes. The answers have the shape of the rows, in every form of the model."""
    from llama_cpp import Llama
    from making import support_tickets

    monkeypatch.chdir(tmp_path)
    support_tickets.run(argparse.Namespace(file=tmp_path / "tickets.xlsx"))
    printed = {}
    for command in commands(ROOT / "docs" / "tutorial.md"):
        if not why_not_run(command):
            done = CliRunner().invoke(main, shlex.split(command)[1:])
            assert done.exit_code == 0, f"{command}\n{done.output}"
            printed[" ".join(command.split()[:2])] = done.output
    losses = [float(loss) for loss in re.findall(r"eval loss ([\d.]+)", printed["qlora-tool train"])]
    assert losses[-1] < losses[0] / 2
    shape = r"\[(Delivery|Returns|Repairs|Plants|Orders|Billing)\] .*Fern & Spade"
    assert re.search(rf"tuned: {shape}", printed["qlora-tool generate"])
    model = Llama("gguf/tickets/tickets.gguf", n_ctx=512, verbose=False)
    question = [{"role": "user", "content": "The wheel of my barrow fell off."}]
    answer = model.create_chat_completion(question, temperature=0, max_tokens=60)["choices"][0]["message"]["content"]
    assert re.fullmatch(shape, answer)
