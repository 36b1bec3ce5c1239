"""docs/configuration.md, on stdout: every key, from the schema of the configuration.

    tools/make configuration-page > docs/configuration.md

Descriptions and defaults stand beside the keys, in qlora_tool/config/keys.py and qlora_tool/methods/.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from qlora_tool.config import SECTIONS, AdapterConfig
from qlora_tool.config.schema import choices_of, expected, schemas_of, takes_list

_HEAD = """# Every key of a configuration

A configuration is a YAML file of four sections. Every key has a default, so a file holds only what you want to differ.
An unknown key is an error that names the closest one, and all faults of a file are reported together.

```
qlora-tool recipes copy smollm2-cpu my-run.yaml      # a start
qlora-tool train my-run.yaml --set training.max_steps=20 --set adapter.r=8
qlora-tool recipes schema > config.schema.json       # the same as this page, for your editor
```

A run writes its whole configuration, every default resolved, into `config.yaml` in its folder; training that file
again, into another folder, repeats the run. Sizes are such as `24GB` (10⁹ bytes) or `22GiB` (2³⁰).

What the keys that save memory and time buy is told in [speed-and-memory.md](speed-and-memory.md). This page is made by
`tools/make configuration-page`.
"""


def page() -> str:
    """The page, in Markdown."""
    parts = [_HEAD]
    for name, section in SECTIONS.items():
        rows = ["| key | default | values | |", "|---|---|---|---|"]
        for key, schema in schemas_of(section).items():
            field = section.model_fields.get(key)  # None for another tool's name
            default = _code(field.get_default(call_default_factory=True)) if field else ""
            rows.append(f"| `{key}` | {default} | {_values(schema)} | {schema['description']}{_methods(key)} |")
        parts.append(f"## {name}\n\n{section.__doc__}\n\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _values(schema: dict[str, Any]) -> str:
    """What a key may hold."""
    choices = choices_of(schema)
    if choices is None:
        return expected(schema)
    return ", ".join(map(_code, choices)) + (", or a list of them" if takes_list(schema) else "")


def _methods(key: str) -> str:
    """Which methods read a key, where not all do."""
    methods = AdapterConfig.methods
    reading = [name for name, kind in methods.items() if key in kind.model_fields]
    return f" Read by {', '.join(reading)}." if 0 < len(reading) < len(methods) else ""


def _code(value: Any) -> str:
    """A value as YAML has it."""
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def add_options(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def run(options: argparse.Namespace) -> None:
    print(page(), end="")
