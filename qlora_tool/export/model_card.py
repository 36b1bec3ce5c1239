"""The README.md of an exported model: what it was made from, how, and how to load it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from qlora_tool import __version__
from qlora_tool.artifacts import Artifact
from qlora_tool.run_folder import RunFolder

_LOAD = """```python
from transformers import pipeline

generate = pipeline("text-generation", model="{folder}")
print({call})
```"""
_CHAT = 'generate([{"role": "user", "content": "Hello"}], max_new_tokens=64)[0]["generated_text"][-1]["content"]'
_TEXT = 'generate("Once upon a time", max_new_tokens=64)[0]["generated_text"]'


def model_card(artifact: Artifact, base_folder: Path, result: dict[str, Any], *, chat: bool) -> str:
    """The card in Markdown, with the header that model hubs read.

    Args:
        artifact: what was merged.
        base_folder: its base's.
        result: what `export_merged` returns.
        chat: whether the tokenizer has a chat template.
    """
    base = artifact.model.name_or_path
    header: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if "/" in base and not Path(base).exists():
        header["base_model"] = base
    if licence := _licence(base_folder):
        header["license"] = licence
    header["tags"] = ["qlora-tool", artifact.adapter.method]
    sections = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {Path(result['output_dir']).name}",
        f"`{base}`, fine-tuned with its weights {_quantization(artifact)} and merged by qlora-tool {__version__}.",
        _LOAD.format(folder=result["output_dir"], call=_CHAT if chat else _TEXT),
        "## How it was made",
        _table(_facts(artifact, result)),
    ]
    if licence is None:
        sections.append("The base states no licence in its files: see where it comes from before you pass this on.")
    return "\n\n".join(sections) + "\n"


def _quantization(artifact: Artifact) -> str:
    kind = artifact.model.quantization
    if kind == "none":
        return "unquantized"
    double = ", its scales too" if kind != "int8" and artifact.model.double_quant else ""
    return f"quantized to {kind}{double},"


def _licence(folder: Path) -> str | None:
    """What the header of the base's card says, else its config.json."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.exists() else ""
    header = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license:[ \t]*[\"']?([^\s\"']+)", header[1], re.MULTILINE) if header else None
    if found:
        return found[1]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config.get("license")


def _facts(artifact: Artifact, result: dict[str, Any]) -> dict[str, Any]:
    peft = artifact.adapter.peft
    facts = {
        "adapter": f"{artifact.adapter.method}, r {peft['r']}, alpha {peft['lora_alpha']}",
        "merged onto": f"the {result['base']} base, added in float32, rounded once to {result['dtype']}",
    }
    if artifact.run is not None:
        data, training = artifact.run.data, artifact.run.training
        facts |= {
            "data": data.train,
            "trained on": "the answers" if data.train_on == "completion" else "every token",
            "learning rate": f"{training.learning_rate}, {training.lr_scheduler_type}",
            "rows a step": training.per_device_train_batch_size * training.gradient_accumulation_steps,
            "optimizer": training.optim,
        }
        facts |= _losses(artifact.adapter.folder.parent)
    return facts


def _losses(run: Path) -> dict[str, Any]:
    file = RunFolder(run).metrics_file
    if not file.exists():
        return {}
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    if not records:
        return {}
    losses = {"steps": records[-1]["step"], "training loss": f"{records[0]['loss']:.3f} → {records[-1]['loss']:.3f}"}
    evaluated = [record["eval_loss"] for record in records if "eval_loss" in record]
    return losses | ({"evaluation loss": f"{evaluated[-1]:.3f}"} if evaluated else {})


def _table(facts: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items())])
