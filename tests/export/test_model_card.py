"""The README.md of an export: its header as hubs read it, what it says of the run, and a snippet that runs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from tiny_adapters import artifact_of, write_adapter, write_chat_base, write_run
from tiny_models import write_tiny

from qlora_tool import __version__
from qlora_tool.artifacts import Artifact
from qlora_tool.export.model_card import model_card
from qlora_tool.export.write import ExportOptions, export_merged

RESULT = {"output_dir": "merged/mine", "base": "dequantized", "dtype": "bfloat16"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_base("llama", tmp_path_factory.mktemp("bases") / "llama")


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    return write_run(folder, base, adapter={"method": "dora"}, gradient_accumulation_steps=2, optim="adamw")


def header(card: str) -> dict:
    start, text, _ = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(text)


def facts(card: str) -> dict[str, str]:
    lines = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("|")][2:]
    return {key: value for key, value in lines}


def test_a_run_tells_how_it_was_trained(base: Path, run: Path):
    card = model_card(artifact_of(run), base, RESULT, chat=True)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert header(card) == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["qlora-tool", "dora"],
    }  # fmt: skip
    assert "\n# mine\n" in card
    assert f"`{base}`, fine-tuned with its weights quantized to nf4, its scales too, and merged by" in card
    assert f" qlora-tool {__version__}.\n" in card
    assert facts(card) == {
        "adapter": "dora, r 4, alpha 32",
        "merged onto": "the dequantized base, added in float32, rounded once to bfloat16",
        "data": str(run.with_name("run.jsonl")),
        "trained on": "the answers",
        "learning rate": "0.01, cosine",
        "rows a step": "8",
        "optimizer": "adamw",
        "steps": "3",
        "training loss": f"{records[0]['loss']:.3f} → {records[-1]['loss']:.3f}",
    }
    assert "The base states no licence" in card


def test_the_last_evaluation_is_told(base: Path, run: Path, tmp_path: Path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    with (copy / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps({"step": 4, "loss": 1.0, "eval_loss": 2.34567}) + "\n")
        metrics.write(json.dumps({"step": 5, "loss": 0.5}) + "\n")
    found = facts(model_card(artifact_of(copy), base, RESULT, chat=True))
    assert (found["steps"], found["evaluation loss"]) == ("5", "2.346")


def test_an_adapter_by_itself_tells_what_it_knows(base: Path, tmp_path: Path):
    adapter = write_adapter(tmp_path / "adapter", base, quantization="int8")
    card = model_card(artifact_of(adapter), base, RESULT, chat=True)
    assert facts(card).keys() == {"adapter", "merged onto"}
    assert "fine-tuned with its weights quantized to int8, and" in card
    plain = model_card(artifact_of(adapter, quantization="none"), base, RESULT, chat=True)
    assert "fine-tuned with its weights unquantized and merged" in plain


@pytest.mark.parametrize(
    ("readme", "config", "expected"),
    [
        ("---\nlicense: apache-2.0\nbase_model: a/b\n---\n# Text\nlicense: no\n", {}, "apache-2.0"),
        ('---\ntags: [a]\nlicense: "mit"\n---\n', {}, "mit"),
        ("---\nlicense:\n- mit\n---\n", {"license": "cc-by-4.0"}, "cc-by-4.0"),
        ("# No header\n\nlicense: see below\n", {}, None),
        (None, {"license": "mit"}, "mit"),
    ],
)
def test_the_licence_is_the_bases(base: Path, run: Path, tmp_path: Path, readme, config, expected):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if readme is not None:
        (folder / "README.md").write_text(readme)
    card = model_card(artifact_of(run), folder, RESULT, chat=True)
    assert header(card).get("license") == expected
    assert ("The base states no licence" in card) == (expected is None)


def test_a_base_from_the_hub_is_linked(base: Path, run: Path):
    artifact = artifact_of(run)
    on_hub = replace(artifact, model=artifact.model.model_copy(update={"name_or_path": "owner/name"}))
    assert header(model_card(on_hub, base, RESULT, chat=True))["base_model"] == "owner/name"


@pytest.mark.parametrize("family", ["chat", "text"])
def test_the_snippet_runs(base: Path, tmp_path: Path, capsys, family: str):
    from tokenizers_for_tests import byte_level

    if family == "text":
        base = write_tiny("llama", tmp_path / "base", vocab_size=410)
        byte_level().save_pretrained(base)
    adapter = write_adapter(tmp_path / "adapter", base)
    artifact: Artifact = artifact_of(adapter)
    export_merged(artifact, tmp_path / "merged", ExportOptions())
    snippet = (tmp_path / "merged" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    capsys.readouterr()
    exec(snippet.replace("max_new_tokens=64", "max_new_tokens=3"), {})
    assert capsys.readouterr().out.strip()
