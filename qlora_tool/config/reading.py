"""A configuration put together from a file, a recipe and `--set`, and checked as a whole."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from qlora_tool.config.contradictions import contradictions
from qlora_tool.config.keys import MAPPINGS, OTHER_NAMES, SECTIONS, Config
from qlora_tool.config.messages import found, message, shortened
from qlora_tool.config.schema import schemas_of
from qlora_tool.config.yaml_file import parse, parse_file, yaml_problem
from qlora_tool.errors import UserError, did_you_mean
from qlora_tool.files.reading import has_half
from qlora_tool.methods.keys import Keys
from qlora_tool.sizes import noun_of

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_ADVISED, _TOLD = 20, 100  # faults: the closest known key is looked for, and a line is shown, of no more of them


def load_config(
    source: str | os.PathLike[str] | Mapping[str, Any] | Config, overrides: Sequence[str] | Mapping[str, Any] = ()
) -> Config:
    """Read a configuration and check all of it.

    Args:
        source: a YAML file, or the name of a shipped recipe; or its sections as a mapping; or a configuration.
        overrides: `KEY=VALUE` each, such as `training.max_steps=20`; values are parsed as YAML. Or a mapping from
            dotted keys to values.

    Raises:
        UserError: with one line for every fault found, each naming the file (or `--set`) and the key; a hundred at
            most, and the others counted.
    """
    if not isinstance(source, str | os.PathLike | Mapping | Config):
        raise UserError(
            "configuration: expected a file, the name of a recipe, a mapping of sections or a Config, found "
            f"{found(source)}"
        )
    draft = _Draft("configuration" if isinstance(source, Mapping | Config) else os.fspath(source))
    if isinstance(source, Config):
        draft.take(source)
    elif isinstance(source, Mapping):
        draft.read(source)
    else:
        draft.read_file()
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            draft.overridden.add(str(key))
            draft.set(str(key), _plain(value))
    else:
        for override in [overrides] if isinstance(overrides, str) else overrides:
            draft.override(str(override))
    draft.read_other_names()
    config = draft.check()
    draft.refuse_faulty()
    return config


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """A copy of `config` in which keys have other values, checked: `{"training.gradient_checkpointing": True}`.

    What a run resolved (`train_on: all` for a text, `auto` settings) is put in this way before `config.yaml` is
    written, so that loading that file again repeats the run.
    """
    draft = _Draft("configuration")
    draft.take(config)
    for key, value in values.items():
        draft.set(key, value)
    changed = draft.check()
    draft.refuse_faulty()
    return changed


def config_to_yaml(config: Config) -> str:
    """The whole configuration as YAML, every default written out, keys in the documented order."""
    text: str = yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True, width=120)
    return text


@dataclass
class _Draft:
    """A configuration being put together, with every fault found in it so far."""

    source: str
    values: dict[str, dict[str, Any]] = field(default_factory=lambda: {name: {} for name in SECTIONS})
    overridden: set[str] = field(default_factory=set)
    given_as: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def fault(self, key: str, message: str) -> None:
        key = self.given_as.get(key, key)
        start = f"--set {key}" if key in self.overridden else f"{self.source}: {key}"
        self.faults.append(f"{start}: {message}")

    def refuse_faulty(self) -> None:
        """Raises:
        UserError: there are faults; those after the first hundred are counted.
        """
        if len(self.faults) > _TOLD:
            more = len(self.faults) - _TOLD
            raise UserError([*self.faults[:_TOLD], f"{self.source}: {more:,} more {noun_of(more, 'fault')}"])
        if self.faults:
            raise UserError(self.faults)

    def _unknown(self, key: str) -> str:
        """What to say of a key that does not exist. The closest one is looked for of the first of them alone."""
        return _unknown_key(key) if len(self.faults) < _ADVISED else "unknown key"

    def take(self, config: Config) -> None:
        """Take in a configuration: the keys that somebody set."""
        sections = {name: getattr(config, name) for name in SECTIONS}
        self.values = {
            name: {key: getattr(section, key) for key in section.model_fields_set} for name, section in sections.items()
        }

    def read_file(self) -> None:
        """Take in the source, a file or a recipe."""
        content, duplicates = parse_file(self.source)
        if not set(content) <= set(SECTIONS) and (tool := _tool_of(content)):
            raise UserError(f"{self.source}: a configuration of {tool}; turn it into one of qlora-tool with `qlora-tool"
                            f" recipes import {self.source} my-run.yaml`")  # fmt: skip
        self.faults += [f"{self.source}, line {line}: '{key}' stands twice; keep one" for key, line in duplicates]
        self.read(content)

    def read(self, content: Mapping[Any, Any]) -> None:
        """Take in a mapping of sections. A section with nothing in it is one of defaults."""
        for name, section in content.items():
            if name not in SECTIONS:
                self.fault(str(name), self._unknown(str(name)))
            elif isinstance(section, Keys):
                self.values[name] = {key: getattr(section, key) for key in section.model_fields_set}
            elif isinstance(section, Mapping):
                self.values[name] = {key: _plain(value) for key, value in section.items()}
            elif section is not None:
                self.fault(name, f"expected a mapping of keys, found {found(section)}")

    def override(self, override: str) -> None:
        """Take in one `KEY=VALUE`."""
        key, equals, value = override.partition("=")
        key = key.strip()
        if not equals or not key:
            self.faults.append(f"--set {override}: expected KEY=VALUE, such as --set training.max_steps=20")
            return
        if has_half(override):
            self.faults.append(f"--set {shortened(override)}: not UTF-8, or half of a character; write it in UTF-8")
            return
        try:
            parsed, _ = parse(value)
        except yaml.YAMLError as error:
            self.faults.append(f"--set {shortened(override)}: not valid YAML: {yaml_problem(error)}; put it in quotes")
            return
        self.overridden.add(key)
        self.set(key, parsed)

    def set(self, key: str, value: Any) -> None:
        """Set one key by its dotted name. What follows a mapping's key is the name of one entry, dots and all."""
        section, _, name = key.partition(".")
        for mapping in MAPPINGS:
            if key.startswith(f"{mapping}."):
                name = mapping.partition(".")[2]
                entries = self.values[section].get(name)
                value = {**(entries if isinstance(entries, dict) else {}), key[len(mapping) + 1 :]: value}
                self.overridden.add(mapping)
        if section not in SECTIONS:
            self.fault(key, self._unknown(key))
        elif not name:
            self.fault(key, f"a section; name one of its keys, such as {section}.{_keys(section)[0]}")
        else:
            self.values[section][name] = value

    def read_other_names(self) -> None:
        """`use_dora` is read as `method: dora`, `activation_checkpointing` as `gradient_checkpointing`."""
        adapter, training = self.values["adapter"], self.values["training"]
        if "use_dora" in adapter:
            use_dora = adapter.pop("use_dora")
            method = adapter.get("method", "lora")
            if not isinstance(use_dora, bool):
                self.fault("adapter.use_dora", f"expected true or false, found {found(use_dora)}")
            elif method not in ("lora", "dora") if use_dora else method == "dora":
                self.fault("adapter.use_dora", f"{found(use_dora)}, but adapter.method is '{method}'; leave one out")
            elif use_dora:
                adapter["method"] = "dora"
        if "activation_checkpointing" in training:
            value = training.pop("activation_checkpointing")
            if "gradient_checkpointing" in training and training["gradient_checkpointing"] != value:
                other = found(training["gradient_checkpointing"])
                message = f"{found(value)}, but gradient_checkpointing, the same thing, is {other}; leave one out"
                self.fault("training.activation_checkpointing", message)
            training["gradient_checkpointing"] = value
            self.given_as["training.gradient_checkpointing"] = "training.activation_checkpointing"

    def check(self) -> Config:
        """The configuration; keys at fault, which `faults` now names, are at their defaults in it."""
        faulty: set[str] = set()
        sections: dict[str, Keys] = {}
        for name, section in SECTIONS.items():
            values = dict(self.values[name])
            if name == "data" and values.get("format") == "text":
                values.setdefault("train_on", "all")
            try:
                sections[name] = section.model_validate(values)
            except ValidationError as error:
                by_key: dict[int | str, list[ErrorDetails]] = {}
                for problem in error.errors(include_url=False):
                    by_key.setdefault(problem["loc"][0], []).append(problem)
                for key, problems in by_key.items():
                    known = key in section.model_fields
                    said = message(problems, schemas_of(section)[str(key)]) if known else self._unknown(f"{name}.{key}")
                    self.fault(f"{name}.{key}", said)
                faulty |= {f"{name}.{key}" for key in by_key}
                sections[name] = section.model_validate({key: values[key] for key in values if key not in by_key})
        config = Config.model_validate(sections)
        for keys, said in contradictions(config):
            if not faulty & set(keys):
                self.fault(keys[0], said)
        return config


def _keys(section: str) -> list[str]:
    return list(SECTIONS[section].model_fields)


def _plain(value: Any) -> Any:
    """A value as YAML would have it: a program may give paths and tuples."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def _tool_of(content: Mapping[Any, Any]) -> str:
    from qlora_tool.config.imports.names import tool_of

    return tool_of(content)


def _unknown_key(key: str) -> str:
    """What to say of a key that does not exist: the closest one of its section, else of all."""
    section, _, name = key.partition(".")
    homes = {own: home for home in SECTIONS for own in _keys(home)}
    wanted = name or section
    if wanted in homes:
        return f"unknown key; did you mean '{homes[wanted]}.{wanted}'?"
    from qlora_tool.config.imports.names import known_elsewhere

    if said := known_elsewhere(wanted):
        return f"unknown key{said}"
    if section in SECTIONS:
        close = did_you_mean(name, [*_keys(section), *OTHER_NAMES[section]])
        return "unknown key" + (close or f"; expected one of {', '.join(_keys(section))}")
    close = did_you_mean(key, [*SECTIONS, *(f"{home}.{own}" for own, home in homes.items())])
    return "unknown key" + (close or f"; expected one of {', '.join(SECTIONS)}")
