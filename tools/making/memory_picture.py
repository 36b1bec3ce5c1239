"""The picture of the README: where the memory of a run goes, in 16 bits and in NF4, predicted.

    tools/make memory-picture docs/memory.svg

Three predictions of the recipe `llama-3.1-8b-12gb`, from the model's config.json in `recipe_models`; a minute. No hub
is asked. The text is the system's own font, and the colours follow the reader's choice of light or dark.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from html import escape
from pathlib import Path
from typing import Any

from measuring.results import say

from making.recipe_models import MODELS
from qlora_tool import profile_memory
from qlora_tool.files.atomic import write_text

RECIPE, MODEL, CARD = "llama-3.1-8b-12gb", "meta-llama/Llama-3.1-8B-Instruct", "12GB"
GIB = 2**30
RUNS = (
    ("Base in 16 bits", {"model.quantization": "none", "training.gradient_checkpointing": True}),
    ("Base in NF4", {"training.gradient_checkpointing": True}),
    ("NF4, using all of the card", {"training.gradient_checkpointing": "auto"}),
)
PARTS = (  # what is shown as one, its colour, and the parts of `at_peak` in it
    ("base", "#3b6fb6", ("base_weights", "quantization_state", "other_weights")),
    ("adapter, gradients, optimizer", "#d9822b", ("adapter_weights", "gradients", "optimizer_state")),
    ("activations", "#5a9e6f", ("activations",)),
    ("working memory, CUDA", "#9a9a9a", ()),  # all else that the card has to hold
)
WIDTH, SHOWN, BAR = 560, 660, 30  # units of the drawing, pixels where there is room for them, units


def predicted(folder: Path, keys: dict[str, Any]) -> tuple[list[float], float]:
    """GiB of each of `PARTS`, and what a run may take of the card (0 where none was given)."""
    fills_card = keys["training.gradient_checkpointing"] == "auto"
    profile = profile_memory(RECIPE, set={"model.name_or_path": str(folder)} | keys, device="cuda",
                             device_memory=CARD if fills_card else None)  # fmt: skip
    found = profile.predicted
    shown = [sum(found.at_peak[name] for name in names) for _, _, names in PARTS]
    shown[-1] = found.needed_bytes - sum(shown)
    return [part / GIB for part in shown], profile.limit.bytes / GIB if profile.limit else 0.0


def drawing(bars: list[tuple[str, list[float]]], card: float) -> str:
    """The SVG: one bar a run under its name, the card as a line; narrow enough to be read on a phone."""
    scale = (WIDTH - 80) / max(sum(parts) for _, parts in bars)
    top, each = 96, BAR + 34
    height = top + len(bars) * each
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{SHOWN}" role="img" '
        'aria-labelledby="title" font-family="system-ui, sans-serif" font-size="15">',
        '<title id="title">Memory of a training step of Llama 3.1 8B: '
        + "; ".join(f"{escape(name)}: {sum(parts):.1f} GiB" for name, parts in bars) + "</title>",
        "<style>text{fill:#1f2328} .card{stroke:#c0392b} .of-card{fill:#c0392b} "
        "@media (prefers-color-scheme: dark){text{fill:#e6edf3} .card{stroke:#ff7b72} .of-card{fill:#ff7b72}}</style>",
    ]  # fmt: skip
    for number, (name, colour, _) in enumerate(PARTS):
        x, y = number % 2 * WIDTH // 2, 18 + number // 2 * 24
        lines.append(f'<rect x="{x}" y="{y - 12}" width="13" height="13" fill="{colour}"/>')
        lines.append(f'<text x="{x + 20}" y="{y}">{escape(name)}</text>')
    for row, (name, parts) in enumerate(bars):
        y, x = top + row * each, 0.0
        lines.append(f'<text x="0" y="{y - 7}">{escape(name)}</text>')
        for part, (_, colour, _) in zip(parts, PARTS, strict=True):
            lines.append(f'<rect x="{x:.1f}" y="{y}" width="{part * scale:.1f}" height="{BAR}" fill="{colour}"/>')
            x += part * scale
        lines.append(f'<text x="{x + 8:.1f}" y="{y + 20}">{sum(parts):.1f} GiB</text>')
    x = card * scale
    lines.append(f'<line class="card" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 20}" y2="{height - 26}" stroke-width="2" '
                 'stroke-dasharray="6 4"/>')  # fmt: skip
    lines.append(f'<text class="of-card" x="{x:.1f}" y="{top - 26}" text-anchor="middle">'
                 "what a run may use of a 12 GB card</text>")  # fmt: skip
    return "\n".join([*lines, "</svg>", ""])


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="the .svg file to write")


def run(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(json.dumps(MODELS[MODEL]), encoding="utf-8")
        bars, card = [], 0.0
        for title, keys in RUNS:
            parts, card = predicted(Path(name), keys)
            bars.append((title, parts))
            say(f"{title}: {sum(parts):.2f} GiB")
    write_text(options.file, drawing(bars, card))
