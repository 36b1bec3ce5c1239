"""docs/coming-from.md, on stdout: what becomes of the keys of PEFT, Axolotl, Unsloth and others.

    tools/make coming-from-page > docs/coming-from.md

The tables stand in qlora_tool/config/imports/.
"""

from __future__ import annotations

import argparse

from qlora_tool.config.imports.formats import Format, Left, Taken
from qlora_tool.config.imports.reading import FORMATS

_HEAD = """# Coming from PEFT, Axolotl, Unsloth or LLaMA-Factory

```
qlora-tool recipes import axolotl.yml my-run.yaml        # Axolotl's and LLaMA-Factory's YAML, Unsloth Studio's
qlora-tool recipes import outputs/adapter my-run.yaml    # a PEFT adapter's folder, or its adapter_config.json
qlora-tool recipes import notebook.ipynb my-run.yaml     # a notebook or program with Unsloth or PEFT
qlora-tool preview my-run.yaml
```

Each key that has a counterpart is taken over, and shown; each that has none is listed with the reason, on the screen
and at the top of the file. Where a file leaves out what its tool takes by default, and that is not the default here,
the tool's own value is written down. Programs are parsed and never run: literals and names of literals are read, and
what a program works out is listed. What the tables below do not have is listed, too.

Three things differ for all of them:

- The base is quantized here whatever its folder says: `model.quantization: nf4` is `load_in_4bit: true`.
- `gradient_checkpointing: auto` decides by the memory there is. The numbers are the same.
- `data.train_on: completion` trains the answers alone, told apart by the model's own chat template.

A configuration of another tool in the place of ours is refused with the line to type, and so is a key of theirs in ours
(`load_in_4bit: true`). This page is made by `tools/make coming-from-page`.
"""


def page() -> str:
    """The page, in Markdown."""
    return "\n".join([_HEAD, *(_table(known) for known in FORMATS)])


def _table(known: Format) -> str:
    taken = {key: entry for key, entry in known.keys.items() if isinstance(entry, Taken)}
    rows = [f"| `{key}` | `{entry.ours}` | {_cell(entry.how)} |" for key, entry in taken.items()]
    reasons: dict[str, list[str]] = {}
    for key, entry in known.keys.items():
        if isinstance(entry, Left):
            reasons.setdefault(entry.why, []).append(f"`{key}`")
    left = [f"| {', '.join(keys)} | {_cell(why)} |" for why, keys in reasons.items()]
    return "\n".join([f"## {known.name}", "", f"| {known.name}'s | here | |", "|---|---|---|", *rows, "",
                      "| not taken over | |", "|---|---|", *left, ""])  # fmt: skip


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def add_options(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def run(options: argparse.Namespace) -> None:
    print(page(), end="")
