"""From another tool's keys to a configuration of ours, key by key, and what of it is not taken over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from qlora_tool.config.imports.formats import OMIT, Format, Given, NotDone, NotTaken, Taken
from qlora_tool.config.imports.reading import Expression, read_foreign
from qlora_tool.config.keys import SECTIONS, Config
from qlora_tool.config.messages import shortened
from qlora_tool.config.reading import load_config
from qlora_tool.errors import UserError, did_you_mean

_LONGEST = 60  # characters of a value that is shown


@dataclass(frozen=True)
class Imported:
    """A configuration made from another tool's.

    Attributes:
        tool: whose it was.
        values: ours, by section.
        taken: each of their keys that was taken over, with ours and its value.
        assumed: those among them that the file leaves to the tool's own defaults.
        left: what was not taken over: key, value, why.
        missed: those of the left that have a counterpart here, by key, but not their value.
        refused: those of the left that ask for another kind of training.
    """

    tool: str
    values: dict[str, dict[str, Any]]
    taken: list[tuple[str, str, Any]] = field(default_factory=list)
    assumed: frozenset[str] = frozenset()
    left: list[tuple[str, Any, str]] = field(default_factory=list)
    missed: dict[str, str] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)

    def left_lines(self) -> list[str]:
        """What was not taken over, a line each."""
        return [f"not taken over: {key} = {shown(value)}: {why}" for key, value, why in self.left]


def import_config(file: Path, output: Path | None = None, tool: str | None = None) -> Imported:
    """A configuration of ours that says what another tool's says.

    Args:
        file: theirs; see `imports.reading.read_foreign`.
        output: where ours is going to be; the run's folder is called by it where theirs names none.
        tool: whose it is, where its keys do not tell.

    Raises:
        UserError: it cannot be read, is of no tool that is known, or asks for training that is not done here.
    """
    known, found, defaults = read_foreign(file, tool)
    made = converted(known, found, defaults)
    if made.refused:
        raise UserError([f"{file}: {key} = {shown(value)}: not done here: {why}"
                         for key, value, why in made.left if key in made.refused])  # fmt: skip
    if output is not None and "output_dir" not in made.values["training"]:
        made.values["training"]["output_dir"] = f"runs/{output.stem}"
    return _checked(made)


def converted(known: Format, found: Mapping[str, Any], defaults: Mapping[str, Any]) -> Imported:
    """Their keys as ours, not yet checked as a whole."""
    absent = [key for key in defaults if found.get(key) is None and not _said(known, key, found)]
    usual = {key: defaults[key](found) if callable(defaults[key]) else defaults[key] for key in absent}
    given = Given({**found, **usual})
    made = Imported(known.name, {name: {} for name in SECTIONS}, assumed=frozenset(usual), left=given.left)
    for key, value in given.values.items():
        if value is None:
            continue
        entry = known.keys.get(key)
        if entry is None:
            close = did_you_mean(key, known.keys)
            given.leave(key, value, f"no key of {known.name}'s that is known here{close}")
        elif isinstance(value, Expression):
            given.leave(key, value, "worked out by the program; set it by hand")
            if isinstance(entry, Taken):
                made.missed[key] = entry.ours
        elif isinstance(entry, Taken):
            _take(made, given, key, value, entry)
        elif not any(value == neutral and type(value) is type(neutral) for neutral in entry.neutral):
            given.leave(key, value, entry.why)
            made.refused.extend([key] if entry.refused else [])
    return made


def _said(known: Format, key: str, found: Mapping[str, Any]) -> bool:
    """Whether the file says what a default would say, by another of the tool's keys."""
    ours = _ours(known, key)
    return any(value is not None and _ours(known, other) == ours for other, value in found.items()) if ours else False


def _ours(known: Format, key: str) -> str:
    entry = known.keys.get(key)
    return entry.ours if isinstance(entry, Taken) else ""


def _take(made: Imported, given: Given, key: str, value: Any, entry: Taken) -> None:
    section, _, name = entry.ours.partition(".")
    try:
        turned = entry.convert(value, given) if entry.convert else value
    except NotTaken as reason:
        given.leave(key, value, str(reason))
        made.missed[key] = entry.ours
        made.refused.extend([key] if isinstance(reason, NotDone) else [])
        return
    except (TypeError, ValueError, AttributeError):
        given.leave(key, value, f"not a value that {entry.ours} can have")
        made.missed[key] = entry.ours
        return
    if turned is OMIT:
        return
    values = made.values[section]
    if name in values and values[name] != turned and not _gives_way(name, values, turned):
        given.leave(key, value, f"{entry.ours} is {shown(values[name])} already, by another key of the file")
        return
    values[name] = turned
    made.taken.append((key, entry.ours, turned))


def _gives_way(name: str, values: dict[str, Any], turned: Any) -> bool:
    """DoRA is a kind of LoRA, and both reporters may be told."""
    if name == "report_to":
        turned += [known for known in values[name] if known not in turned]
        return True
    return name == "method" and values[name] == "lora"


def _checked(made: Imported) -> Imported:
    """The same without what a check of the whole refuses, which is listed."""
    for _ in range(len(SECTIONS) * 20):
        try:
            return replace(made, left=_with_defaults(made, load_config(made.values)))
        except UserError as error:
            for line in error.lines:
                key, _, why = line.removeprefix("configuration: ").partition(": ")
                section, _, name = key.partition(".")
                if name not in made.values.get(section, {}):
                    raise
                value = made.values[section].pop(name)
                theirs = next((key for key, ours, _ in made.taken if ours == f"{section}.{name}"), f"{section}.{name}")
                made.taken[:] = [entry for entry in made.taken if entry[1] != f"{section}.{name}"]
                made.left.append((theirs, value, why))
                made.missed[theirs] = f"{section}.{name}"
    raise AssertionError("each round takes a key away")


def _with_defaults(made: Imported, config: Config) -> list[tuple[str, Any, str]]:
    """What was not taken over, with what stands in the place of a value that is none here."""
    lines = []
    for key, value, why in made.left:
        section, _, name = made.missed.get(key, "").partition(".")
        default = getattr(getattr(config, section), name, None) if section else None
        if default is not None and name not in made.values[section]:
            why += f"; {section}.{name}: {shown(default)} (the default) is in its place"
        lines.append((key, value, why))
    return lines


def as_yaml(made: Imported, source: str, name: str) -> str:
    """The configuration as a file, in the order of the keys here, with what was not taken over above it.

    Args:
        source: the file that it was made from.
        name: the file that it is going to be.
    """
    head = [f"Made from {source} ({made.tool}).", "", f"  qlora-tool preview {name}", f"  qlora-tool train {name}"]
    head += ["", *made.left_lines()] if made.left else []
    values = {
        section: {key: made.values[section][key] for key in kind.model_fields if key in made.values[section]}
        for section, kind in SECTIONS.items()
    }
    body: str = yaml.safe_dump({section: keys for section, keys in values.items() if keys}, sort_keys=False,
                               allow_unicode=True, width=120)  # fmt: skip
    return "".join(f"# {' '.join(line.split()) if not line.startswith('  ') else line}".rstrip() + "\n"
                   for line in head) + "\n" + body  # fmt: skip


def shown(value: Any) -> str:
    """A value on a line, as YAML has it."""
    text = yaml.safe_dump(value if not isinstance(value, Expression) else str(value), default_flow_style=True,
                          width=10**6, allow_unicode=True).removesuffix("\n...\n").strip()  # fmt: skip
    return shortened(text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …")
