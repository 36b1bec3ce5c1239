"""docs/configuration.md, on stdout: every key, from the schema of the configuration.

    tools/make configuration-page > docs/configuration.md

Descriptions and defaults stand in qlora_tool/config/, beside the keys.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from qlora_tool.config import SECTIONS, config_schema

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
_KINDS = {"string": "text", "integer": "a whole number", "number": "a number", "boolean": "`true`, `false`",
          "array": "a list", "object": "a mapping", "null": "`null`"}  # fmt: skip


def page() -> str:
    """The page, in Markdown."""
    definitions = config_schema()["$defs"]
    parts = [_HEAD]
    for name, section in SECTIONS.items():
        schema = definitions[section.__name__]
        rows = ["| key | default | values | |", "|---|---|---|---|"]
        for key, found in schema["properties"].items():
            default = _code(section.model_fields[key].get_default(call_default_factory=True)) if (
                key in section.model_fields) else ""  # fmt: skip
            rows.append(f"| `{key}` | {default} | {_values(found)} | {found['description']} |")
        parts.append(f"## {name}\n\n{schema['description']}\n\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _values(schema: dict[str, Any]) -> str:
    """What a key may hold, as its part of the schema says."""
    if "anyOf" in schema:
        return ", ".join(dict.fromkeys(map(_values, schema["anyOf"])))
    if "enum" in schema:
        return ", ".join(map(_code, schema["enum"]))
    return _code(schema["const"]) if "const" in schema else _KINDS[schema["type"]]


def _code(value: Any) -> str:
    """A value as YAML has it."""
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def add_options(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def run(options: argparse.Namespace) -> None:
    print(page(), end="")
