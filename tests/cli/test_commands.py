"""The commands that read models: what they print, where, and every bad input through the real entry point.

A fault ends with exit code 2 (1 where the machine is at fault), says so in lines that begin with `error: ` and in
nothing else after them, and leaves everything as it was.
"""

from __future__ import annotations

import gc
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from child_process import child_environment
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_adapters import write_chat_base, write_peft_adapter, write_run

from qlora_tool.cli import main
from qlora_tool.config import choices
from qlora_tool.errors import printable

ROWS = [{"prompt": f"What is {n} and {n}?", "completion": f"It is {n + n}."} for n in range(20)]
CPU = ("--device", "cpu", "--compute-dtype", "float32")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model `base`, a run `run`, rows `good.jsonl` and a configuration `good.yaml`."""
    folder = tmp_path_factory.mktemp("place")
    base = write_chat_base("llama", folder / "base")
    write_run(folder / "run", base)
    gc.freeze()  # a collection before every answer would take half a second
    write_rows(folder / "good.jsonl", ROWS)
    config = {
        "model": {"name_or_path": "base", "compute_dtype": "float32", "device": "cpu"},
        "adapter": {"r": 4},
        "data": {"train": "good.jsonl", "max_length": 64},
        "training": {"output_dir": "new", "max_steps": 2},
    }
    (folder / "good.yaml").write_text(yaml.safe_dump(config))
    yield folder
    gc.unfreeze()


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which commands run in."""
    shutil.copytree(place, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def write_rows(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def invoke(*args: str):
    return CliRunner().invoke(main, [str(arg) for arg in args])


def run(*args: str) -> str:
    """What a command that succeeds prints as its result."""
    result = invoke(*args)
    assert result.exit_code == 0, result.stderr
    assert "error" not in result.stderr
    return result.stdout


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def errors(folder: Path, *args: str, code: int = 2) -> list[str]:
    """The errors of a command that fails and touches nothing."""
    before = contents(folder)
    result = invoke(*args)
    assert result.exit_code == code, (result.stderr, result.exception)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert contents(folder) == before
    assert not any(path.name.startswith(".") for path in folder.rglob("*"))  # nothing half-made is left behind
    lines = result.stderr.splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("error: "))
    assert all(line.startswith("error: ") for line in lines[first:])
    return [line.removeprefix("error: ") for line in lines[first:]]


def error(folder: Path, *args: str, code: int = 2) -> str:
    (line,) = errors(folder, *args, code=code)
    return line


# --------------------------------------------------------------------------------------------------------- train


def train_error(here: Path, *settings: str, code: int = 2) -> str:
    options = [part for setting in settings for part in ("--set", setting)]
    line = error(here, "train", "good.yaml", *options, code=code)
    assert not (here / "new").exists()
    return line


def test_training_tells_what_comes_next(here: Path):
    assert run("train", "good.yaml", "--dry-run") == "dry run: everything is in order; nothing of the run was written\n"
    assert not (here / "new").exists()
    out = run("train", "good.yaml", "--output-dir", "mine")
    assert out.splitlines() == ["adapter: mine/adapter", "report: mine/report.html",
                                "next: qlora-tool export-merged mine --output-dir mine-merged"]  # fmt: skip
    assert (here / "mine" / "adapter" / "adapter_model.safetensors").exists()


def test_all_mistakes_of_a_configuration_at_once(here: Path):
    config = yaml.safe_load((here / "good.yaml").read_text())
    config["adapter"]["r"] = 0
    config["model"]["quantization"] = "nf5"
    config["training"]["lerning_rate"] = 1
    (here / "bad.yaml").write_text(yaml.safe_dump(config))
    assert errors(here, "train", "bad.yaml", "--set", "data.packing=perhaps") == [
        "bad.yaml: model.quantization: expected one of nf4, fp4, int8, none, found 'nf5'; did you mean 'nf4'?",
        "bad.yaml: adapter.r: expected a whole number of at least 1, found 0",
        "--set data.packing: expected true or false, found the text 'perhaps'",
        "bad.yaml: training.lerning_rate: unknown key; did you mean 'learning_rate'?",
    ]


BAD_DATA = {
    "misssing": (None, "misssing.jsonl: no such file or folder; did you mean 'missing.jsonl'?"),
    "empty": ("", "empty.jsonl: the file has no rows; expected at least one"),
    "line17": (
        "".join(f"{json.dumps(row)}\n" for row in ROWS[:16]) + "{oops}\n" + json.dumps(ROWS[0]),
        "line17.jsonl, line 17: not JSON (Expecting property name enclosed in double quotes, column 2)",
    ),
    "columns": (
        '{"instruction": "a", "outptu": "b"}\n',
        "columns.jsonl, line 1: the columns (instruction, outptu) are those of no format; needed are messages: "
        "messages (a list of {role, content}); sharegpt: conversations (a list of {from, value}); prompt_completion: "
        "prompt and completion (or question and answer, …); alpaca: instruction and output, input where there is one; "
        "dolly: instruction and response, context where there is one; text: text; or name them, data.columns: {prompt: "
        "…, completion: …}; 'outptu' is not read; did you mean 'output'?",
    ),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_a_bad_data_file(here: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    """Named before a byte of the weights is read, wherever it is given."""
    text, expected = BAD_DATA[name]
    (here / "missing.jsonl").write_text("x")
    if text is not None:
        (here / f"{name}.jsonl").write_text(text, encoding="utf-8")
    monkeypatch.setattr("qlora_tool.files.tensors.Checkpoint.read", lambda *args: pytest.fail("weights are read"))
    assert train_error(here, f"data.train={name}.jsonl") == expected
    assert train_error(here, f"data.eval={name}.jsonl") == expected
    assert error(here, "evaluate", "run", "--data", f"{name}.jsonl", "--json", "scores.json") == expected
    if name != "columns":
        assert error(here, "generate", "run", "--prompts", f"{name}.jsonl") == expected


def test_a_data_file_without_an_answer(here: Path):
    write_rows(here / "mute.jsonl", [row | {"completion": " "} for row in ROWS[:3]])
    line = train_error(here, "data.train=mute.jsonl")
    assert line.startswith("data.train: nothing to learn from: mute.jsonl: 3 rows")
    assert "3 rows dropped: without an answer; each row needs an answer" in line
    line = error(here, "evaluate", "run", "--data", "mute.jsonl", *CPU)
    assert line.startswith("--data: nothing to learn from: mute.jsonl: 3 rows")


def test_the_limit_of_a_rows_tokens_is_named_as_it_was_typed(here: Path):
    line = error(here, "evaluate", "run", "--data", "good.jsonl", "--max-length", "2", *CPU)
    assert ": --max-length 2 leaves nothing of the answer" in line and "data.max_length" not in line
    assert line.endswith("each row needs an answer that begins within --max-length")
    line = train_error(here, "data.max_length=2")
    assert ": data.max_length 2 leaves nothing of the answer" in line and "--max-length" not in line


def test_a_broken_model_folder(here: Path):
    def changed(name: str) -> Path:
        shutil.copytree(here / "base", here / name)
        return here / name / "model.safetensors"

    changed("no-weights").unlink()
    truncated = changed("truncated")
    size = truncated.stat().st_size
    truncated.write_bytes(truncated.read_bytes()[:-1000])
    shard = changed("no-shard")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (shard.parent / "model.safetensors.index.json").write_text(json.dumps(index))
    shard.unlink()  # which would be read, whatever the index says
    tensors = load_file(changed("no-tensor"))
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, here / "no-tensor" / "model.safetensors", {"format": "pt"})
    expected = {
        "no-weights": "no-weights: no weights in it, where model.safetensors is expected, or shards with "
        "model.safetensors.index.json; name a folder that has them, or download the model again",
        "truncated": "truncated/model.safetensors: truncated, or not a safetensors file (incomplete metadata, file not "
        f"fully covered; {size - 1000} bytes); download it again",
        "no-shard": "no-shard: 1 of 1 shard is missing (model-00001-of-00002.safetensors); download the model again",
        "no-tensor": "no-tensor: 1 of the model's 21 tensors is missing from its weights: "
        "model.layers.1.mlp.up_proj.weight; download the model again",
    }
    for name, line in expected.items():
        assert train_error(here, f"model.name_or_path={name}") == line
        assert error(here, "generate", name, "--prompt", "hello", *CPU) == line
        assert error(here, "export-merged", "run", "--model", name, "--output-dir", "merged") == line


def test_a_model_that_is_not_there(here: Path):
    line = train_error(here, "model.name_or_path=./bsae")
    assert line.startswith("model ./bsae: no such folder; did you mean 'base'?")
    line = error(here, "generate", "./bsae", "--prompt", "hello")
    assert line.startswith("model ./bsae: no such folder; did you mean 'base'?; expected a run's folder, an adapter's")
    line = train_error(here, "model.name_or_path=owner/name", code=1)
    assert line.startswith("model owner/name: no such folder, not in the hub's local cache, and the model hub is out")
    start = line.removesuffix("name a local folder (--set model.name_or_path=FOLDER), or the demo model: --set "
                              "model.name_or_path=demo")  # fmt: skip
    assert start.endswith("connect, or ")
    named = ("--set", "model.name_or_path=owner/name")
    for command in ("preview", "profile-memory"):
        assert error(here, command, "good.yaml", *named, code=1) == line
    found = error(here, "evaluate", "owner/name", "--data", "good.jsonl", code=1)
    assert found == f"{start}name a local folder (or demo)"


def test_an_adapter_in_the_place_of_a_model(here: Path):
    assert train_error(here, "model.name_or_path=run/adapter").startswith("run/adapter: ")


def test_a_folder_in_the_place_of_a_configuration(here: Path):
    assert error(here, "train", "run/adapter").startswith("run/adapter: expected a configuration file or the name of")


def test_targets_that_match_nothing(here: Path):
    names = "it has down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    start = "adapter.target_modules: "
    line = train_error(here, "adapter.target_modules=[q_porj, v_proj]")
    assert line == f"{start}'q_porj' matches no linear module of this model; did you mean 'q_proj'?; {names}"
    assert train_error(here, "adapter.target_modules=attn").startswith(f"{start}'attn' matches no linear module")


def test_a_length_beyond_the_models(here: Path):
    line = train_error(here, "data.max_length=4096")
    assert line.startswith("data.max_length: 4096, but the model's max_position_embeddings is 128; set ")
    line = error(here, "evaluate", "run", "--data", "good.jsonl", "--max-length", "4096", *CPU)
    assert "4096, but the model's max_position_embeddings is 128" in line


def test_an_output_folder_that_holds_another_run(here: Path):
    other = ("train", "good.yaml", "--output-dir", "run")
    line = error(here, *other)
    assert line.startswith("run: holds another run (")
    assert line.endswith("); give another --output-dir, or --overwrite to replace it")
    again = ("train", "run/config.yaml", "--output-dir", "run")
    run("report", "run")  # which it lacks, and would be given
    assert error(here, *again).startswith("run: holds this run, finished; give --overwrite to run it again")
    assert error(here, *again, "--resume", "never").startswith("run: holds a run; give --overwrite to replace it")
    assert error(here, "train", "good.yaml", "--resume", "nowhere").startswith("--resume nowhere: no checkpoint; ")


def test_a_run_killed_after_its_adapter_was_there_is_completed(here: Path):
    """Its page was half-written, and the run that it replaced not removed yet."""
    run("report", "run")
    page = (here / "run/report.html").read_text(encoding="utf-8")
    killed = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from qlora_tool.files.atomic import replacing_file\n"
        "with replacing_file(Path('run/report.html')) as temporary:\n"
        "    temporary.write_text('<html')\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    subprocess.run([sys.executable, "-c", killed], env=child_environment(), check=False)
    (here / "run/report.html").unlink()
    (here / "run/replaced-1").mkdir()
    [half] = (here / "run").glob(".report.html.*")
    adapter = (here / "run/adapter/adapter_model.safetensors").read_bytes()
    again = ("train", "run/config.yaml", "--output-dir", "run")
    assert "error: run: holds this run, finished" in invoke(*again, "--dry-run").stderr
    assert half.exists() and not (here / "run/report.html").exists()
    told = invoke(*again).stderr
    assert "run/report.html: was missing, as the run ended before it was written; it is there now" in told
    assert told.splitlines()[-1].startswith("error: run: holds this run, finished")
    assert len((here / "run/report.html").read_text(encoding="utf-8")) == len(page)  # the time in it is another
    assert not half.exists() and not (here / "run/replaced-1").exists()
    assert (here / "run/adapter/adapter_model.safetensors").read_bytes() == adapter


# ------------------------------------------------------------------------------------------------- export-merged


def test_export_reports_on_stdout_and_in_json(here: Path):
    (here / "deep").mkdir()
    out = run("export-merged", "run", "--output-dir", "merged", "--dtype", "bfloat16", "--json", "deep/done.json")
    done = json.loads((here / "deep" / "done.json").read_text())
    size = sum(tensor.nbytes for tensor in load_file(here / "merged" / "model.safetensors").values())
    assert (done["output_dir"], done["dtype"], done["bytes"]) == ("merged", "bfloat16", size)
    assert done["verification"]["tokens"] > 0
    first, *_, last = out.splitlines()
    assert re.match(r"merged: [\d.]+ [kM]B of bfloat16 in 1 file, ", first)
    assert last == "next: qlora-tool generate merged --prompt '...'"
    out = run("export-merged", "run", "--output-dir", "merged", "--overwrite", "--max-shard-size", "100kB")
    assert len(list((here / "merged").glob("*.safetensors"))) > 1


def test_what_export_refuses(here: Path):
    (here / "taken").mkdir()
    (here / "taken" / "mine.txt").write_text("mine")
    peft = write_peft_adapter(here / "peft", here / "base", target_modules=["q_proj"])
    unfinished = here / "unfinished"
    unfinished.mkdir()
    shutil.copy(here / "run" / "config.yaml", unfinished)
    export = ("--output-dir", "merged")
    expected = {
        ("run", "--output-dir", "taken"): "taken: exists; give --overwrite to replace it, or another --output-dir",
        ("run", "--output-dir", "taken", "--overwrite"): "taken: holds something other than an export, which "
        "--overwrite would delete; give another --output-dir",
        ("run", "--output-dir", ".", "--overwrite"): ".: holds something other than an export, which --overwrite "
        "would delete; give another --output-dir",
        ("run", "--output-dir", "good.yaml"): "good.yaml: a file, where --output-dir expects a folder that does not "
        "exist yet",
        ("base", *export): "base: a model without an adapter; expected a run's folder or an adapter's",
        ("rnu", *export): "rnu: no such folder; did you mean 'run'?; expected a run's folder or an adapter's",
        (peft.name, *export): "peft: PEFT's files do not say how the base was quantized while it was trained; give "
        "--quantization nf4, fp4, int8 or none (with --no-double-quant where the scales were not)",
        ("unfinished", *export): "unfinished: this run is not finished; finish it with `qlora-tool train "
        "unfinished/config.yaml`, which goes on from its last checkpoint",
        ("run", *export, "--max-shard-size", "big"): "--max-shard-size: expected a size such as 24GB (10^9 bytes "
        "each), 22GiB (2^30 bytes each) or a whole number of bytes, found the text 'big'",
        ("run", *export, "--model", "gone"): "model gone: no such folder; expected a model folder, a hub id "
        f"(owner/name), or demo; looked for {here / 'gone'}; it is the base of run: say with --model BASE where it is",
    }
    for args, line in expected.items():
        assert error(here, "export-merged", *args) == line
    line = error(here, "export-merged", "run", *export, "--dtype", "bf16")
    assert line.startswith("'--dtype': 'bf16' is not one of 'auto', 'bfloat16', 'float16', 'float32'; did you mean 'b")
    assert error(here, "export-merged", "run").startswith("missing option '--output-dir' (in 'qlora-tool export-merg")


def test_a_disk_that_is_too_small_is_the_machines_fault(here: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(here)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    line = error(here, "export-merged", "run", "--output-dir", "merged", code=1)
    assert re.match(r"merged: the model takes [\d.]+ [kM]B, and [\d.]+ \w+ are free there; free some, ", line)


# ------------------------------------------------------------------------------------------------------ generate


def answer_of(model: str, prompt: str) -> str:
    return run("generate", model, "--prompt", prompt, "--max-new-tokens", "6", *CPU).removesuffix("\n")


def test_one_prompt_prints_its_answer_alone(here: Path):
    result = invoke("generate", "run", "--prompt", "yes?", "--max-new-tokens", "6", *CPU)
    assert result.exit_code == 0
    assert result.stdout.strip()
    assert result.stderr.startswith("answers: ")
    assert re.search(r" tokens/s, peak memory \d\.\d+ GiB", result.stderr)
    assert result.stdout == answer_of("run", "yes?") + "\n"
    run("export-merged", "run", "--output-dir", "merged")
    assert answer_of("merged", "yes?") == answer_of("run/adapter", "yes?") == answer_of("run", "yes?")


def test_several_prompts_in_their_order(here: Path):
    (here / "questions.txt").write_text("how many boats are there\n\nWho?\r\n", encoding="utf-8")
    write_rows(here / "questions.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "List\nall"}])
    prompts = ["yes?", "a", "how many boats are there", "Who?"]
    args = ["--prompt", "yes?", "--prompt", "a", "--prompts", "questions.txt", "--max-new-tokens", "6", *CPU]

    def shown(prompt: str) -> str:
        answer = answer_of("run", prompt).strip().replace("\n", "\n  ")
        return "> " + prompt.replace("\n", "\n> ") + f"\n  {answer}\n\n"

    assert run("generate", "run", *args) == "".join(map(shown, prompts))
    args = ["--prompts", "questions.jsonl", "--max-new-tokens", "6", "--batch-size", "1", *CPU]
    assert run("generate", "run", *args) == "".join(map(shown, ["a", "List\nall"]))


def test_the_base_beside_what_became_of_it(here: Path):
    run("export-merged", "run", "--output-dir", "merged")
    quantized = ("--quantization", "nf4")
    base = run("generate", "base", *quantized, "--prompt", "Who?", "--max-new-tokens", "6", *CPU).strip()
    for model in ("run", "merged"):
        out = run("generate", model, "--prompt", "Who?", "--compare-base", "--max-new-tokens", "6", *CPU)
        first, second, third, empty, *speeds = out.replace("\n         ", " ").splitlines()
        assert (first, empty) == ("> Who?", "")
        assert second.split() == ["base:", *base.split()]
        assert third.split() == ["tuned:", *answer_of(model, "Who?").split()]
        assert [line.split(":")[0] for line in speeds] == ["base", "tuned"]
        assert all(" tokens/s, peak memory " in line and line.endswith(" GiB") for line in speeds)


def test_sampling_options_reach_the_model(here: Path):
    def sampled(*args: str) -> str:
        return run("generate", "run", "--prompt", "Who?", "--max-new-tokens", "8", *args, *CPU)

    hot = ("--temperature", "3")
    assert sampled(*hot, "--seed", "1") == sampled(*hot, "--seed", "1") != sampled(*hot, "--seed", "2")
    assert sampled(*hot, "--top-k", "1") == sampled(*hot, "--top-p", "0.000001") == sampled()


def test_what_generate_refuses(here: Path):
    tail = " (in 'qlora-tool generate'; see 'qlora-tool generate --help')"
    assert error(here, "generate", "run") == f"nothing to answer: give --prompt TEXT or --prompts FILE, or --chat{tail}"
    line = error(here, "generate", "run", "--prompt", "a", "--top-p", "0.9")
    assert line == f"--top-p and --top-k restrict sampling, and --temperature 0 takes no samples; raise it{tail}"
    line = error(here, "generate", "run", "--prompt", "a", "--seed", "3")
    assert line == f"--seed is of sampling, and --temperature 0 takes no samples; raise that{tail}"
    line = error(here, "generate", "base", "--prompt", "a", "--compare-base")
    assert line == "--compare-base: base does not say what it was made from; give a run or an adapter"
    line = error(here, "generate", "run", "--prompt", "hi " * 100, *CPU)
    assert line.startswith("--prompt: ")
    assert line.endswith(" tokens, but the model has 128 positions; shorten it")
    (here / "long.txt").write_text("a\n" + "hi " * 100 + "\n")
    assert error(here, "generate", "run", "--prompts", "long.txt", *CPU).startswith("long.txt, line 2: ")


# ------------------------------------------------------------------------------------------------------ evaluate


def test_scores_on_stdout_and_in_json(here: Path):
    result = invoke("evaluate", "run", "--data", "good.jsonl", "--json", "scores.json", *CPU)
    assert result.exit_code == 0, result.stderr
    assert "good.jsonl: 20 rows (prompt_completion), 20 kept" in result.stderr
    scores = json.loads((here / "scores.json").read_text())
    assert list(scores) == ["loss", "perplexity", "tokens", "exact_match", "token_f1"]
    assert scores["exact_match"] is scores["token_f1"] is None
    assert result.stdout == (
        f"good: loss {scores['loss']:.4f}  perplexity {scores['perplexity']:.3f}  tokens {scores['tokens']}\n"
    )


def test_scores_of_several_sets_by_name(here: Path):
    text = run("generate", "run", "--prompt", "yes?", "--max-new-tokens", "6", *CPU)
    write_rows(here / "known.jsonl", [{"prompt": "yes?", "completion": text}, {"prompt": "yes?", "completion": "no"}])
    sets = ("--data", "known.jsonl", "--data", "other=good.jsonl", "--generate", "--max-new-tokens", "6")
    out = run("evaluate", "run", *sets, "--json", "scores.json", *CPU)
    scores = json.loads((here / "scores.json").read_text())
    assert list(scores) == ["known", "other"]
    names = ["loss", "perplexity", "tokens", "exact_match", "token_f1", "answers"]
    assert list(scores["known"]) == list(scores["other"]) == names
    assert [(one["where"], one["expected"], one["exact_match"]) for one in scores["known"]["answers"]] == [
        ("known.jsonl, line 1", text.strip(), True), ("known.jsonl, line 2", "no", False)]  # fmt: skip
    assert (scores["known"]["exact_match"], scores["other"]["exact_match"]) == (0.5, 0.0)
    *shown, first, second = out.splitlines()
    assert first.startswith("known: loss ") and "  exact match 50.0%  token F1 " in first
    assert second.startswith("other: loss ") and "  exact match 0.0%  token F1 " in second
    assert shown[:4] == ["known: 2 of 2 answers, those first that are not exact", "", "known.jsonl, line 2",
                         "  prompt:   yes?"]  # fmt: skip
    assert shown[4] == "  expected: no" and shown.index("known.jsonl, line 1") > shown.index("known.jsonl, line 2")
    assert any(line.endswith(" (exact, cut off after 6 tokens)") for line in shown)
    assert "other: 3 of 20 answers, those first that are not exact" in shown


def test_answers_beside_the_base_s(here: Path):
    words = ("--data", "good.jsonl", "--generate", "--max-new-tokens", "4", "--compare-base", *CPU)
    out = run("evaluate", "run", *words, "--show", "2", "--json", "scores.json")
    scores = json.loads((here / "scores.json").read_text())
    block = out.partition("\n\n")[2].partition("\n\n")[0]
    form = r"(.*)\n  prompt:   (.*)\n  expected: (.*)\n  base:     (.*)\n  run:      (.*)"
    found = re.fullmatch(form, block, re.DOTALL)
    assert found and found.groups()[:3] == ("good.jsonl, line 1", ROWS[0]["prompt"], ROWS[0]["completion"])
    for name, shown in zip(("base", "run"), found.groups()[3:], strict=True):
        assert len(scores[name]["answers"]) == 20
        assert shown.rpartition(" (token F1 ")[0].split() == printable(scores[name]["answers"][0]["answer"]).split()
    assert [line.split(":")[0] for line in out.splitlines()[-2:]] == ["base", "run"]
    assert not [line for line in run("evaluate", "run", *words, "--show", "0").splitlines() if "prompt" in line]


def test_a_run_is_scored_as_it_was_trained(here: Path):
    """What counts as trained, and how long rows may be, come from the run."""
    config = yaml.safe_load((here / "run" / "config.yaml").read_text())
    scores = {}
    for train_on, length in [("completion", 128), ("all", 128), ("completion", 30)]:
        config["data"] |= {"train_on": train_on, "max_length": length}
        (here / "run" / "config.yaml").write_text(yaml.safe_dump(config))
        run("evaluate", "run", "--data", "good.jsonl", "--json", "scores.json", *CPU)
        scores[train_on, length] = json.loads((here / "scores.json").read_text())["tokens"]
    assert scores["all", 128] > scores["completion", 128] > scores["completion", 30]
    run("evaluate", "run", "--data", "good.jsonl", "--max-length", "128", "--json", "scores.json", *CPU)
    assert json.loads((here / "scores.json").read_text())["tokens"] == scores["completion", 128]


def test_what_evaluate_refuses(here: Path):
    line = error(here, "evaluate", "run", "--data", "good.jsonl", "--data", "./good.jsonl")
    assert line == "--data: two sets are called 'good'; name them apart, as NAME=FILE"
    line = error(here, "evaluate", "run", "--data", "new=nothing.jsonl")
    assert line.startswith("nothing.jsonl: no such file or folder")
    line = error(here, "evaluate", "run", "--data", "good.jsonl", "--format", "alpacca")
    assert line.startswith("'--format': 'alpacca' is not one of 'auto', ") and "did you mean 'alpaca'?" in line
    assert all(f"'{name}'" in line for name in choices("data.format"))
    line = error(here, "evaluate", "run", "--data", "good.jsonl", "--format", "alpaca", *CPU)
    assert line.startswith("good.jsonl, line 1: the columns (prompt, completion) are not those of the format alpaca; ")
    (here / "text.txt").write_text("The capital of France is Paris.")
    line = error(here, "evaluate", "run", "--data", "text.txt", "--generate", *CPU)
    assert line == "text.txt: --generate compares answers, and no row has one; leave it out to get the loss"
    line = error(here, "evaluate", "run", "--data", "good.jsonl", "--show", "2")
    assert line.startswith("--show is of answers, and none are generated: give --generate too")
    line = error(here, "evaluate", "run", "--data", "good.jsonl", "--max-new-tokens", "256")
    assert line.startswith("--max-new-tokens is of answers, and none are generated: give --generate too")
    assert error(here, "evaluate", "run").startswith("missing option '--data'")
    line = error(here, "evaluate", "run", "--data", "good.jsonl", "--json", "base")
    assert line.startswith("'--json': File 'base' is a directory")


# ------------------------------------------------------------------------------------------------- the whole way


def test_the_program_itself(here: Path):
    """As a process of its own: the module runs, stdout stays clean, the exit code arrives."""
    process = subprocess.run(
        [sys.executable, "-m", "qlora_tool", "train", "good.yaml", "--set", "adapter.r=0", "--set", "data.trian=x"],
        env=child_environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 2
    assert process.stdout == ""
    assert process.stderr == (
        "error: --set adapter.r: expected a whole number of at least 1, found 0\n"
        "error: --set data.trian: unknown key; did you mean 'train'?\n"
    )
