"""Predict the recipes that have changed, and write the figures into them and into a table.

    tools/make recipe-predictions

The table, tests/memory/recipe_predictions.json, holds what each figure was predicted from: a recipe that is changed
without this fails a test. A model takes some seconds, one of many layers or experts a minute. The models are those of
`recipe_models`; no hub is asked.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import tempfile
from pathlib import Path
from typing import Any

from measuring.results import say

from making.environment import ROOT
from making.recipe_models import MODELS
from qlora_tool.config import Config, load_config, memory_settings
from qlora_tool.config.recipes import Recipe, all_recipes

TABLE = ROOT / "tests" / "memory" / "recipe_predictions.json"
_LINE = re.compile(r"(?m)^# Predicted(?: with --set (?P<set>\S+))?: .*$")
_DEMO = "HuggingFaceTB/SmolLM2-135M-Instruct"


def cases(recipe: Recipe) -> list[str]:
    """What a recipe's lines of figures are for: it as it is (an empty text), or with a key set."""
    return [match["set"] or "" for match in _LINE.finditer(recipe.text)]


def config_of(recipe: Recipe, setting: str, folder: Path) -> Config:
    """The configuration that a figure is predicted from: everything recomputed, the model's config.json in `folder`."""
    config = load_config(recipe.name, [setting] if setting else [])
    name = config.model.name_or_path
    (folder / "config.json").write_text(json.dumps(MODELS[_DEMO if name == "demo" else name]))
    keys = {"model.name_or_path": str(folder)}
    if config.training.gradient_checkpointing == "auto":
        keys["training.gradient_checkpointing"] = True
    if recipe.card_gb is None:
        keys |= {"model.compute_dtype": "float32", "model.device": "cpu"}  # auto depends on the processor
    return load_config(config, keys)


def decided_by(config: Config) -> str:
    """A hash of what a prediction depends on."""
    settings = memory_settings(config) | {
        "model.name_or_path": (Path(config.model.name_or_path) / "config.json").read_text(),
        "data.max_length": config.data.max_length,
        "data.packing": config.data.packing,
        "training.per_device_train_batch_size": config.training.per_device_train_batch_size,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def predict(config: Config, card_gb: int | None) -> dict[str, int | None]:
    """Bytes that a run needs, and that it may take of its card."""
    from qlora_tool.memory.allocator.cards import parse_device_memory
    from qlora_tool.memory.profile_run import profile_run

    budget = parse_device_memory(f"{card_gb}GB") if card_gb else None
    found = profile_run(config, "cuda" if card_gb else "cpu", budget, may_change=True)
    return {"needed_bytes": found.predicted.needed_bytes, "limit_bytes": found.limit.bytes if found.limit else None}


def line_of(setting: str, found: dict[str, Any], card_gb: int | None, everything: bool) -> str:
    """The line of a recipe that says it."""
    start = f"# Predicted{f' with --set {setting}' if setting else ''}: {found['needed_bytes'] / 1e9:.2f} GB"
    how = ", everything recomputed" if everything else ""
    if card_gb is None:
        return f"{start}, in fp32{how}."
    return f"{start}{how}; a run may take {found['limit_bytes'] / 1e9:.2f} GB of such a card."


def predict_recipe(recipe: Recipe, known: dict[str, Any]) -> dict[str, Any]:
    """The entries of a recipe in the table, those that hold as they are."""
    entries = {}
    for setting in cases(recipe):
        with tempfile.TemporaryDirectory() as folder:
            config = config_of(recipe, setting, Path(folder))
            name = " ".join(filter(None, (recipe.name, setting)))
            before, decided = known.get(name), decided_by(config)
            if before is not None and before["decided_by"] == decided:
                entries[name] = before
            else:
                entries[name] = {"decided_by": decided, **predict(config, recipe.card_gb)}
            say(f"{name}: {entries[name]['needed_bytes'] / 1e9:.2f} GB")
            line = line_of(setting, entries[name], recipe.card_gb, config.training.gradient_checkpointing is True)
        text = _LINE.sub(lambda match, s=setting, li=line: li if (match["set"] or "") == s else match[0], recipe.text)
        recipe.path.write_text(text, encoding="utf-8")
    return entries


def add_options(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def run(options: argparse.Namespace) -> None:
    known = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    table: dict[str, Any] = {}
    for recipe in all_recipes():
        table |= predict_recipe(recipe, known)
        TABLE.write_text(json.dumps({**known, **table}, indent=2) + "\n")
    TABLE.write_text(json.dumps(table, indent=2) + "\n")
