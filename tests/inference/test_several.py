"""Several adapters on one base: each computes what it computes alone, a switch opens no file, mistakes are one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from child_process import child_environment
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_adapters import (
    FP32,
    IDS,
    artifact_of,
    live_logits,
    write_adapter,
    write_chat_base,
    write_peft_adapter,
)
from tiny_models import write_tiny

from qlora_tool import UserError, evaluate, generate, inspect
from qlora_tool.adapters.switch import Switch
from qlora_tool.artifacts import Artifact, BaseOptions
from qlora_tool.build.open import open_model
from qlora_tool.cli import main
from qlora_tool.inference.options import BASE, parse_adapters
from qlora_tool.inference.several import Opened, find_several

CPU = BaseOptions(**FP32)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory):
    parent = tmp_path_factory.mktemp("bases")
    return lambda family: parent / family if (parent / family).exists() else write_tiny(family, parent / family)


ADAPTERS = {
    "llama": [{}, {"method": "dora", "target_modules": ["q_proj", "down_proj"]}, {"method": "vera"},
              {"modules_to_save": ["lm_head", "norm"], "target_modules": ["v_proj"]}, {"method": "loha", "r": 2},
              {"method": "llama_adapter"}],
    "llama-tied": [{"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]}, {"use_rslora": True}],
    "llama-biased": [{"bias": "all", "target_modules": ["q_proj"]}, {"bias": "lora_only"}],
    "qwen3_moe": [{"target_parameters": ["mlp.experts.down_proj"]}, {"target_modules": ["q_proj", "embed_tokens"]}],
    "gpt2": [{"target_modules": ["c_attn"]}, {"modules_to_save": ["c_fc"], "target_modules": ["c_proj"]}],
}  # fmt: skip


@pytest.mark.parametrize("family", ADAPTERS)
def test_each_computes_what_it_computes_alone(bases, tmp_path: Path, family: str):
    """To the bit, back and forth, and so does the base."""
    base = bases(family)
    assert_each_is_itself({str(number): artifact_of(write_adapter(tmp_path / str(number), base, **settings))
                           for number, settings in enumerate(ADAPTERS[family])})  # fmt: skip


def test_so_does_a_base_that_was_trained_whole(bases, tmp_path: Path):
    rows = {"target_modules": ["embed_tokens"], "trainable_token_indices": {"lm_head": [2]}}
    assert_each_is_itself({
        str(number): artifact_of(write_adapter(tmp_path / str(number), bases("llama"), quantization="none", **settings))
        for number, settings in enumerate([{"method": "full"}, {}, rows])
    })  # fmt: skip


def assert_each_is_itself(artifacts: dict[str, Artifact]) -> None:
    model = open_model(artifacts["0"].model)
    plain = model.module(input_ids=IDS, use_cache=False).logits
    switch = Switch(model.module)
    for name, artifact in artifacts.items():
        switch.add(name, artifact.adapter)
    for name in [*artifacts, *reversed(artifacts)]:
        switch.use(name)
        found = model.module(input_ids=IDS, use_cache=False).logits
        assert torch.equal(found, live_logits(artifacts[name]))
        assert not torch.allclose(found, plain, atol=1e-3)
        switch.use(None)
        assert torch.equal(model.module(input_ids=IDS, use_cache=False).logits, plain)


def test_dropout_stays_off_in_an_adapter_that_was_away(bases, tmp_path: Path):
    """One that is put on a model in training has to hear that it answers now."""
    artifact = artifact_of(write_adapter(tmp_path / "a", bases("llama"), lora_dropout=0.5))
    model = open_model(artifact.model)
    model.module.train()
    switch = Switch(model.module)
    switch.add("a", artifact.adapter)
    model.module.eval()
    switch.use("a")
    first, second = (model.module(input_ids=IDS, use_cache=False).logits for _ in range(2))
    assert torch.equal(first, second)


def test_one_that_does_not_fit_leaves_the_model_as_it_was(bases, tmp_path: Path):
    good, bad = (artifact_of(write_adapter(tmp_path / family, bases(family))) for family in ("llama", "gpt2"))
    model = open_model(good.model)
    plain = model.module(input_ids=IDS, use_cache=False).logits
    switch = Switch(model.module)
    with pytest.raises(UserError, match="not a linear module of this model"):
        switch.add("bad", bad.adapter)
    assert switch.names == []
    assert torch.equal(model.module(input_ids=IDS, use_cache=False).logits, plain)
    with pytest.raises(ValueError, match="no adapter 'bad'"):
        switch.use("bad")


def test_a_switch_opens_no_file_of_the_base(two_runs: Path, tmp_path: Path):
    """The base's folder is gone once it is open, and answers with every adapter are those of each alone."""
    folder = tmp_path / "moved"
    shutil.copytree(two_runs / "model", folder)
    several = find_several(str(folder), [f"sums={two_runs / 'sums'}", f"other={two_runs / 'other'}"], CPU)
    opened = Opened(several)
    shutil.rmtree(folder)
    for name in ("sums", BASE, "other", "sums"):
        model, _ = opened.use(name)
        found = model.module(input_ids=IDS, use_cache=False).logits
        alone = artifact_of(two_runs / name if name != BASE else two_runs / "sums")
        assert torch.equal(found, live_logits(alone if name != BASE else _without_adapter(alone)))


def _without_adapter(artifact):
    return replace(artifact, adapter=None)


OPENED = """
import json, sys
from pathlib import Path
from qlora_tool import evaluate
from qlora_tool.inference import several

opened, base = [], sys.argv[1]
use = several.Opened.use

def watched(self, name):
    if not hooked:
        hooked.append(True)
        sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    return use(self, name)

hooked = []
several.Opened.use = watched
result = evaluate(base, sys.argv[2], adapter=dict(part.split("=") for part in sys.argv[3:]), generate=True,
                  max_new_tokens=3, device="cpu", compute_dtype="float32", compare_base=True)
print(json.dumps([list(result.by_adapter), [path for path in opened if base in path], len(opened)]))
"""


def test_evaluate_opens_no_file_of_the_base_after_the_first_adapter_is_chosen(two_runs: Path):
    """Seen by Python's own hook on `open`: rows and answers, too."""
    rows = two_runs / "sums.jsonl"
    words = [str(two_runs / "model"), str(rows), f"a={two_runs / 'sums'}", f"b={two_runs / 'other'}"]
    done = subprocess.run([sys.executable, "-c", OPENED, *words], capture_output=True, text=True, check=True,
                          env=child_environment())  # fmt: skip
    names, of_the_base, count = json.loads(done.stdout.splitlines()[-1])
    assert (names, of_the_base) == ([BASE, "a", "b"], []) and count > 0


# ---------------------------------------------------------------------------------------------- what commands show


@pytest.fixture
def quiet() -> Iterator[CliRunner]:
    yield CliRunner()


def test_evaluate_has_a_line_an_adapter(two_runs: Path, quiet: CliRunner, tmp_path: Path):
    rows, file = two_runs / "sums.jsonl", tmp_path / "scores.json"
    words = ["evaluate", two_runs / "sums", "--data", rows, "--adapter", f"two={two_runs / 'other'}", "--compare-base",
             "--json", file, "--device", "cpu", "--compute-dtype", "float32"]  # fmt: skip
    result = quiet.invoke(main, list(map(str, words)))
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["base:", "sums:", "two:"]
    assert result.stderr.count("chat template: ") == 1  # one set of rows, the same for all
    scores = json.loads(file.read_text())
    alone = {"sums": two_runs / "sums", "two": two_runs / "other"}
    for name, folder in alone.items():
        assert scores[name] == evaluate(folder, rows, **FP32).as_json()
    plain = evaluate(two_runs / "model", rows, quantization="nf4", max_length=128, **FP32)
    assert scores["base"]["loss"] == pytest.approx(plain.scores["sums"].loss, rel=1e-5)


def test_generate_shows_every_answer_under_its_name(two_runs: Path, quiet: CliRunner):
    words = ["generate", two_runs / "model", "--prompt", "What is 2 and 2?", "--adapter", f"sums={two_runs / 'sums'}",
             "--adapter", f"two={two_runs / 'other'}", "--max-new-tokens", "5", "--device", "cpu", "--compute-dtype",
             "float32", "--compare-base"]  # fmt: skip
    result = quiet.invoke(main, list(map(str, words)))
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("> What is 2 and 2?\n  base: ")
    assert "\n  sums: " in result.stdout and "\n  two:  " in result.stdout
    adapters = {"s": two_runs / "sums", "t": two_runs / "other"}
    found = generate(two_runs / "model", prompt="What is 2 and 2?", adapter=adapters, max_new_tokens=5,
                     **FP32).answers[0]  # fmt: skip
    for name, folder in (("s", "sums"), ("t", "other")):
        alone = generate(two_runs / folder, prompt="What is 2 and 2?", max_new_tokens=5, **FP32).answers[0]
        assert found.by_adapter[name] == alone.text


# ------------------------------------------------------------------------------------------------------- mistakes


def test_names_folders_and_weights(tmp_path: Path):
    (tmp_path / "run:2").mkdir()
    found = parse_adapters(["a=runs/a", "b=runs/b:0.5", "c=C:\\runs\\c", f"d={tmp_path}/run:2", "e=x=y:-1e-1"])
    assert [(one.folder, one.weight) for one in found] == [
        ("runs/a", None), ("runs/b", 0.5), ("C:\\runs\\c", None), (f"{tmp_path}/run:2", None), ("x=y", -0.1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["runs/a"], "--adapter runs/a: expected NAME=FOLDER"),
        (["a=x", "a=y"], "two adapters are called 'a'"),
        (["base=x"], "'base' is the name of the model without an adapter"),
        (["a=x:nan"], "expected a weight that is a finite number and not 0, found nan"),
        (["a=x:0"], "expected a weight that is a finite number and not 0, found 0"),
    ],
)
def test_what_no_option_can_mean(given: list[str], line: str):
    with pytest.raises(UserError) as caught:
        parse_adapters(given)
    (found,) = caught.value.lines
    assert line in found


def refusal(name: Path, *given: str, **options) -> str:
    """The one line."""
    with pytest.raises(UserError) as caught:
        Opened(find_several(str(name), given, BaseOptions(**FP32, **options)))
    (line,) = caught.value.lines
    return line


def test_adapters_that_are_none(two_runs: Path, bases, tmp_path: Path):
    base = two_runs / "model"
    assert f"no such folder; did you mean '{two_runs / 'sums'}'?" in refusal(base, f"a={two_runs / 'sumz'}")
    assert "--adapter a=demo: a base, not an adapter; expected a run's folder" in refusal(base, "a=demo")
    assert "a model without an adapter" in refusal(base, f"a={base}")
    assert "two adapters are called 'sums'" in refusal(two_runs / "sums", f"sums={two_runs / 'other'}")
    assert "two adapters are called 'sums'" in refusal(two_runs / "sums" / "adapter", f"sums={two_runs / 'other'}")
    assert "without weights; export-merged adds them up" in refusal(base, f"a={two_runs / 'sums'}:0.5")
    pickled = tmp_path / "pickled"
    shutil.copytree(two_runs / "sums" / "adapter", pickled)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    assert "its weights are a pickle" in refusal(base, f"a={pickled}")
    broken = tmp_path / "broken"
    shutil.copytree(two_runs / "sums" / "adapter", broken)
    tensors = load_file(broken / "adapter_model.safetensors")
    name = sorted(tensors)[3]
    save_file(tensors | {name: torch.full_like(tensors[name], float("nan"))}, broken / "adapter_model.safetensors")
    assert "remove manifest.json" in refusal(base, f"a={broken}")  # its hash is another
    (broken / "manifest.json").unlink()
    assert f"1 of its {len(tensors)} tensors holds values that are not finite numbers" in refusal(base, f"a={broken}")


def _naming(adapter: Path, base: str) -> Path:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))
    return adapter


def test_adapters_for_another_base(two_runs: Path, bases, tmp_path: Path, caplog):
    """By hash, by name where nothing else is known, by shape, and by how the base was quantized."""
    sums = f"sums={two_runs / 'sums'}"
    other = tmp_path / "model-2"
    shutil.copytree(two_runs / "model", other)
    tensors = load_file(other / "model.safetensors")
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1}, other / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    assert "model.safetensors not as when" in refusal(other, sums)
    alone = tmp_path / "alone"
    shutil.copytree(two_runs / "sums" / "adapter", alone)
    facts = json.loads((alone / "qlora_tool.json").read_text())
    facts["base"]["name_or_path"] = str(other)
    (alone / "qlora_tool.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="bring the old files back, or name a base with --model"):
        evaluate(alone, two_runs / "sums.jsonl", **FP32)
    assert evaluate(alone, two_runs / "sums.jsonl", model=other, **FP32).scores
    cut = inspect(alone, truncate=1, output_dir=tmp_path / "cut").truncation
    assert cut is not None and cut.losses is None and "SHA-256 differs" in (cut.no_losses or "")
    Opened(find_several(str(other), [sums], BaseOptions(**FP32, model=str(other))))
    assert "put on it all the same, as --model names it" in caplog.text

    llama = write_chat_base("llama", tmp_path / "llama")
    named = _naming(write_peft_adapter(tmp_path / "peft", llama), "owner/another")
    assert "names owner/another as its base, not" in refusal(llama, f"a={named}", quantization="none")
    same = _naming(write_peft_adapter(tmp_path / "same", llama), "owner/LLAMA")
    Opened(find_several(str(llama), [f"a={same}"], BaseOptions(**FP32, quantization="none")))

    wide = write_tiny("llama", tmp_path / "wide", intermediate_size=192)
    shaped = _naming(write_peft_adapter(tmp_path / "shaped", wide, target_modules=["up_proj"]), "owner/llama")
    line = refusal(llama, f"a={shaped}", quantization="none")
    assert "up_proj as (192, " in line and f"it is not for the base {llama}" in line

    plain = write_adapter(tmp_path / "plain", two_runs / "model", quantization="none")
    line = refusal(two_runs / "model", sums, f"b={plain}")
    assert "trained on a base with quantization none, and sums" in line and "one base cannot be both" in line
    assert "name one of the two" in refusal(two_runs / "model", sums, model="elsewhere")
