"""The README.md of an export: its header as hubs read it, what it says of the run, and a snippet that runs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tiny_adapters import IDS, artifact_of, live_logits, write_adapter, write_chat_base, write_run
from tiny_models import write_tiny

from qlora_tool import __version__
from qlora_tool.artifacts import Artifact
from qlora_tool.export.model_card import model_card
from qlora_tool.export.options import ExportOptions
from qlora_tool.export.verification import Proof, Update
from qlora_tool.export.verify import Agreement
from qlora_tool.export.write import export_merged

RESULT = {"output_dir": "merged/mine", "base": "dequantized", "dtype": "bfloat16"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_base("llama", tmp_path_factory.mktemp("bases") / "llama")


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    write_run(folder, base, adapter={"method": "dora"}, gradient_accumulation_steps=2, optim="adamw")
    memory = {"device": "cpu", "predicted": {"peak_bytes": 1_410_000_000}, "measured": {"peak_bytes": 1_402_000_000}}
    (folder / "memory.json").write_text(json.dumps(memory))
    return folder


def header(card: str) -> dict:
    start, text, _ = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(text)


def facts(card: str) -> dict[str, str]:
    """The table of how it was made."""
    made = card.split("## How it was made\n")[1]
    lines = [line.strip("| ").split(" | ") for line in made.splitlines() if line.startswith("|")][2:]
    return {key: value for key, value in lines}


def test_a_run_tells_how_it_was_trained(base: Path, run: Path):
    card = model_card(artifact_of(run), base, RESULT, chat=True)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert header(card) == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "license": "unknown",
        "tags": ["qlora-tool", "dora"],
    }  # fmt: skip
    assert "\n# mine\n" in card
    assert f"`{base}`, fine-tuned with its weights quantized to nf4, its scales too, and merged by" in card
    assert f" qlora-tool {__version__}.\n" in card
    assert facts(card) == {
        "base": str(base),
        "adapter": "dora, r 4, alpha 32",
        "adapted modules": "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
        "merged onto": "the dequantized base, added in float32, rounded once to bfloat16",
        "data": str(run.with_name("run.jsonl")),
        "trained on": "the answers",
        "rows a step": "8, of up to 128 tokens, packed",
        "learning rate": "0.01, cosine, warm-up over 0 steps",
        "optimizer": "adamw, weight decay 0.0, gradients clipped at a norm of 1.0",
        "seed": "0",
        "steps": "3",
        "training loss": f"{records[0]['loss']:.3f} → {records[-1]['loss']:.3f}",
        "memory of a training step": "1.31 GiB predicted for the largest batch, 1.31 GiB measured in one step on cpu",
    }
    assert "The base states no licence" in card
    assert "## Verification" not in card


def test_what_the_chat_template_was_given_is_told(base: Path, run: Path):
    """Asked without it, the model sees prompts that it was not trained on."""
    artifact = artifact_of(run)
    data = artifact.run.data.model_copy(update={"chat_template_kwargs": {"enable_thinking": False}})
    artifact = replace(artifact, run=artifact.run.model_copy(update={"data": data}))
    told = facts(model_card(artifact, base, RESULT, chat=True))["chat template"]
    assert told == "given enable_thinking=False; give it the same: apply_chat_template(…, enable_thinking=False)"


def test_verification_is_told_with_its_warnings(base: Path, run: Path):
    agreement = Agreement(5000, 0.68, 7.2, 0.685, 859, 1.82327, 2.5, None, None)
    proof = Proof("original", "bfloat16", "held_out.jsonl (evaluation)", agreement, Update(0.99, 9.5))
    card = model_card(artifact_of(run), base, RESULT, chat=True, proof=proof)
    told = card.split("## Verification\n")[1].split("## How it was made")[0]
    for line in (
        "| rows | 5,000 tokens of held_out.jsonl (evaluation) |",
        "| KL divergence | 0.68 nats on average, 7.2 at worst |",
        "| same likeliest token | 68.50% |",
        "| loss, 859 trained tokens | 1.8233 trained, 2.5000 exported |",
        "| update kept | 99.00%, with a rounding error of 9.5 times its size |",
        proof.warnings()[0],
    ):
        assert f"\n{line}\n" in told
    left_out = Proof("dequantized", "bfloat16", left_out="the base is gone")
    assert "\nLeft out: the base is gone.\n" in model_card(artifact_of(run), base, RESULT, chat=True, proof=left_out)


def test_the_last_evaluation_is_told(base: Path, run: Path, tmp_path: Path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    with (copy / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps({"step": 4, "loss": 1.0, "eval_loss": 2.34567}) + "\n")
        metrics.write(json.dumps({"step": 5, "loss": 0.5}) + "\n")
    found = facts(model_card(artifact_of(copy), base, RESULT, chat=True))
    assert (found["steps"], found["evaluation loss"]) == ("5", "2.346, all evaluation rows")


def test_an_adapter_by_itself_tells_what_it_knows(base: Path, tmp_path: Path):
    adapter = write_adapter(tmp_path / "adapter", base, quantization="int8")
    card = model_card(artifact_of(adapter), base, RESULT, chat=True)
    assert facts(card).keys() == {"base", "adapter", "adapted modules", "merged onto"}
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
        ("---\nlicense: [\n---\n", {"license": "mit"}, "mit"),
        ("---\n- license\n---\n", {}, None),
        ("---\nlicense: caf\xe9\n---\n", {}, None),
        ("---\r\nlicense: mit\r\n---\r\n# Text\r\n", {}, "mit"),
        ("---\n---\n", {}, None),
        (None, {"license": "mit"}, "mit"),
    ],
)
def test_the_licence_is_the_bases(base: Path, run: Path, tmp_path: Path, readme, config, expected):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if readme is not None:
        (folder / "README.md").write_bytes(readme.encode("latin-1"))
    card = model_card(artifact_of(run), folder, RESULT, chat=True)
    assert header(card)["license"] == (expected or "unknown")
    assert ("The base states no licence" in card) == (expected is None)


def test_a_base_from_the_hub_is_linked(base: Path, run: Path):
    artifact = artifact_of(run)
    on_hub = replace(artifact, model=artifact.model.model_copy(update={"name_or_path": "owner/name"}))
    found = header(model_card(on_hub, base, RESULT, chat=True))
    assert (found["base_model"], found["base_model_relation"]) == ("owner/name", "finetune")
    as_adapter = header(model_card(on_hub, base, RESULT | {"format": "adapter"}, chat=True))
    assert (as_adapter["library_name"], as_adapter["base_model_relation"]) == ("peft", "adapter")


def test_hubs_read_the_header(base: Path, run: Path):
    from huggingface_hub import ModelCard

    card = model_card(artifact_of(run), base, RESULT, chat=True)
    read = ModelCard(card)
    assert (read.data.library_name, read.data.license, read.data.pipeline_tag) == (
        "transformers", "unknown", "text-generation",
    )  # fmt: skip
    assert read.text.startswith("\n# mine\n\n`") and not read.text.endswith("\n\n")
    assert model_card(artifact_of(run), base, RESULT, chat=True) == card


def test_gguf_is_loaded_by_ollama_and_transformers(base: Path, run: Path):
    result = RESULT | {"format": "gguf", "dtype": "f16", "files": ["mine.gguf"]}
    card = model_card(artifact_of(run), base, result, chat=True)
    assert "cd merged/mine\nollama create mine -f Modelfile\n" in card
    assert '\nllama-cli -m merged/mine/mine.gguf -p "Hello"\n' in card and "pipeline(" not in card
    assert 'from_pretrained("merged/mine", gguf_file="mine.gguf")' in card
    assert header(card)["library_name"] == "gguf"


@pytest.mark.parametrize("beside", [False, True])
def test_a_gguf_adapter_is_loaded_with_its_base(base: Path, run: Path, beside: bool):
    files = ["adapter.gguf", "base.gguf"][: 1 + beside]
    told = {"file": "adapter.gguf", "base": "the one that it was trained on"}
    result = RESULT | {"format": "gguf-adapter", "dtype": None, "files": files, "gguf_adapter": told}
    artifact = artifact_of(run)
    artifact = replace(artifact, model=artifact.model.model_copy(update={"name_or_path": "owner/name"}))
    card = model_card(artifact, base, result, chat=True)
    model = "merged/mine/base.gguf" if beside else "BASE.gguf"
    assert f'\nllama-cli -m {model} --lora merged/mine/adapter.gguf -p "Hello"\n' in card
    assert "Its base: the one that it was trained on." in card and ("ollama create mine" in card) == beside
    found = header(card)
    assert (found["library_name"], found["base_model_relation"]) == ("gguf", "adapter")
    assert "merged onto" not in facts(card) and "saved as an adapter for llama.cpp" in card


def test_what_quantizing_again_loses_is_told(base: Path, run: Path):
    proof = Proof("dequantized", "nf4", left_out="not asked for", update=Update(0.02, 0.987), finer_base=True)
    card = model_card(artifact_of(run), base, RESULT | {"format": "nf4"}, chat=True, proof=proof)
    assert "| update kept | 2.00%, with a rounding error of 99% of its size |" in card and proof.warnings()[0] in card
    assert "pip install bitsandbytes" in card
    found = facts(card)
    assert found["merged onto"] == "the dequantized base, added in float32, quantized to nf4 again"
    chosen = facts(model_card(artifact_of(run), base, RESULT | {"dtype_reason": "every value fits"}, chat=True))
    assert chosen["why this dtype"] == "every value fits"


def test_an_adapters_snippet_gives_the_trained_model(base: Path, tmp_path: Path):
    """Run as it stands, it opens the base quantized as it was, with the adapter on it."""
    pytest.importorskip("peft")
    adapter = write_adapter(tmp_path / "adapter", base)
    artifact = artifact_of(adapter)
    result = RESULT | {"format": "adapter", "output_dir": str(adapter), "base": str(base)}
    snippet = model_card(artifact, base, result, chat=True).split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(snippet, names)
    found = names["model"].train()(input_ids=IDS, use_cache=False).logits.float()
    torch.testing.assert_close(found, live_logits(artifact), atol=0.02, rtol=0)


def test_an_adapters_base_is_where_a_reader_finds_it(base: Path, tmp_path: Path, monkeypatch):
    """A relative folder is written out, and a base that new tokens were added to is resized first."""
    monkeypatch.chdir(base.parent)
    adapter = write_adapter(tmp_path / "adapter", base)
    artifact = artifact_of(adapter, model=base.name)
    export_merged(artifact, tmp_path / "out", ExportOptions(format="adapter-portable"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert f'from_pretrained("{base.resolve()}", quantization_config=' in card and "resize" not in card
    result = RESULT | {"format": "adapter", "base": str(base), "resize_token_embeddings": 412}
    grown = model_card(artifact, base, result, chat=True)
    assert "\nbase.resize_token_embeddings(412)  # for the tokens that were added\nmodel = Peft" in grown


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
