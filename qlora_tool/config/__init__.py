"""The configuration of a run: typed, checked as a whole, read from YAML and written back with every default resolved.

    config = load_config("llama.yaml", ["training.max_steps=20"])
    config.model.name_or_path, config.training.learning_rate

Keys take PEFT's and transformers' names wherever those have one. Paths are relative to the current folder, not to the
configuration's. `config.data.model_fields_set` names the keys that somebody set, as against those left at their
defaults. This module imports neither torch nor transformers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qlora_tool.config.values import (
    evaluation,
    flag,
    found,
    memory_size,
    modules,
    names,
    names_from,
    number,
    one_of,
    parse_size,
    patterns,
    text,
)
from qlora_tool.config.yaml_file import parse_file, yaml_problem
from qlora_tool.errors import UserError, did_you_mean

__all__ = [
    "AdapterConfig",
    "Config",
    "DataConfig",
    "ModelConfig",
    "TrainingConfig",
    "config_schema",
    "config_to_yaml",
    "load_config",
    "parse_size",
    "with_values",
]

QUANTIZATIONS = ("nf4", "fp4", "int8", "none")
COMPUTE_DTYPES = ("auto", "bfloat16", "float16", "float32")
DEVICES = ("auto", "cuda", "cpu")
EMBEDDINGS = ("as_stored", "int8")
ADAPTER_METHODS = ("lora", "dora", "loha")
ADAPTER_STARTS = ("default", "gaussian")
BIASES = ("none", "lora_only", "all")
DATA_FORMATS = ("auto", "messages", "sharegpt", "alpaca", "dolly", "prompt_completion", "text")
SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit")
REPORTERS = ("tensorboard", "wandb")
# What most families call their input embeddings and output projection.
_EMBEDDING_MODULES = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelConfig(_Section):
    """The frozen base model: which one, and how it is kept in memory."""

    name_or_path: Annotated[str, text("a hub id, a folder or demo")] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """Hub id, local folder, or `demo` (a small model that needs no hub)."""
    revision: Annotated[str | None, text("a branch, tag or commit of the hub", optional=True)] = None
    """Branch, tag or commit on the hub."""
    quantization: Annotated[str, one_of(QUANTIZATIONS)] = "nf4"
    """How the base's linear weights are stored: 4-bit NormalFloat or float, 8-bit integers, or as they are."""
    double_quant: Annotated[bool, flag()] = True
    """Quantize the scales of the 4-bit weights too."""
    embeddings: Annotated[str, one_of(EMBEDDINGS)] = "as_stored"
    """How the input embeddings and the output projection are stored: as they are, or in 8-bit integers."""
    compute_dtype: Annotated[str, one_of(COMPUTE_DTYPES)] = "auto"
    """What products are computed in; auto picks what the device is fast in."""
    device: Annotated[str, one_of(DEVICES)] = "auto"
    """Where to run; auto is CUDA where there is a card."""
    trust_remote_code: Annotated[bool, flag()] = False
    """Run Python code that comes with the model."""
    keep_quantized: Annotated[bool, flag()] = False
    """Keep the quantized base on disk, so that the next run starts in seconds."""


class AdapterConfig(_Section):
    """What is trained."""

    model_config = ConfigDict(
        json_schema_extra=lambda schema: schema["properties"].update(
            use_dora={"type": "boolean", "description": "PEFT's name for `method: dora`; read as the same."}
        )
    )

    method: Annotated[str, one_of(ADAPTER_METHODS)] = "lora"
    """The adapter method."""
    r: Annotated[int, number(whole=True, at_least=1)] = 16
    """Rank of the update."""
    lora_alpha: Annotated[float, number(above=0)] = 32
    """The update is scaled by lora_alpha / r."""
    lora_dropout: Annotated[float, number(at_least=0, below=1)] = 0.0
    """Share of the adapter's inputs that training drops."""
    target_modules: Annotated[str | list[str], modules()] = "all-linear"
    """`all-linear` (but the output layer), a list of names that modules end in, or one regular expression."""
    exclude_modules: Annotated[str | list[str], modules(optional=True)] = Field(default_factory=list)
    """Names that modules end in, or one regular expression: left out of target_modules."""
    modules_to_save: Annotated[list[str], names("module names")] = Field(default_factory=list)
    """Modules trained whole and saved with the adapter."""
    bias: Annotated[str, one_of(BIASES)] = "none"
    """Which biases are trained."""
    use_rslora: Annotated[bool, flag()] = False
    """Scale the update by lora_alpha / sqrt(r) instead."""
    init_lora_weights: Annotated[str, one_of(ADAPTER_STARTS, also={True: "default"})] = "default"
    """How A and B start."""
    rank_pattern: Annotated[dict[str, int], patterns(number(whole=True, at_least=1))] = Field(default_factory=dict)
    """Ranks of their own, by module name or by a regular expression that names end in."""
    alpha_pattern: Annotated[dict[str, float], patterns(number(above=0))] = Field(default_factory=dict)
    """Values of lora_alpha of their own, in the same way."""
    init_from: Annotated[str | None, text("an adapter's folder", optional=True)] = None
    """Start from an existing adapter (a folder)."""


class DataConfig(_Section):
    """What it is trained on."""

    train: Annotated[str, text("a file, a folder or a hub id")] = "data/train.jsonl"
    """A .json, .jsonl, .csv, .parquet or .txt file, a folder, or a hub id. Paths are relative to the current folder."""
    eval: Annotated[float | str | dict[str, str] | None, evaluation()] = None
    """The same; or a fraction of the training data, such as 0.02; or a mapping from names to files."""
    format: Annotated[str, one_of(DATA_FORMATS)] = "auto"
    """How rows are read; auto tells by their columns."""
    train_on: Annotated[str, one_of(("completion", "all"))] = "completion"
    """Loss on the answers alone, or on every token. Format text is always trained whole."""
    max_length: Annotated[int, number(whole=True, at_least=1)] = 2048
    """The most tokens in a row."""
    packing: Annotated[bool, flag()] = True
    """Several examples a row, never attending to one another."""
    padding_free: Annotated[bool, flag()] = True
    """Without packing: a batch's rows one after the other, with nothing to fill up; false pads them to one length."""
    shuffle: Annotated[bool, flag()] = True
    """False keeps the file's order."""
    chat_template: Annotated[str | None, text("a Jinja file", optional=True)] = None
    """A Jinja file, used in place of the chat template that comes with the model."""


class TrainingConfig(_Section):
    """How it is trained."""

    model_config = ConfigDict(
        json_schema_extra=lambda schema: schema["properties"].update(
            activation_checkpointing={
                "enum": ["auto", True, False],
                "description": "transformers 5's name for `gradient_checkpointing`; read as the same.",
            }
        )
    )

    output_dir: Annotated[str, text("a folder")] = "runs/my-model"
    """The run's folder, relative to the current folder."""
    num_train_epochs: Annotated[float, number(above=0)] = 1
    """Passes over the training data."""
    max_steps: Annotated[int, number(whole=True, at_least=1, also=(-1,))] = -1
    """Stop after this many optimizer steps; -1: num_train_epochs decides."""
    per_device_train_batch_size: Annotated[int, number(whole=True, at_least=1)] = 4
    """Rows in a forward and backward pass."""
    gradient_accumulation_steps: Annotated[int, number(whole=True, at_least=1)] = 1
    """Passes in one optimizer step."""
    group_by_length: Annotated[bool, flag()] = False
    """Without packing: rows of like length into a batch, so that less is padded."""
    learning_rate: Annotated[float, number(above=0)] = 2.0e-4
    """The highest learning rate."""
    lr_scheduler_type: Annotated[str, one_of(SCHEDULES)] = "cosine"
    """What the learning rate does after the warmup."""
    warmup_steps: Annotated[float, number(at_least=0, fraction=True)] = 0.03
    """Steps over which the learning rate rises; below 1: a share of all steps."""
    weight_decay: Annotated[float, number(at_least=0)] = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: Annotated[float, number(at_least=0)] = 1.0
    """Gradients are scaled down to this norm; 0: no clipping."""
    label_smoothing_factor: Annotated[float, number(at_least=0, below=1)] = 0.0
    """Share of the target spread evenly over all tokens."""
    optim: Annotated[str, one_of(OPTIMIZERS)] = "adamw"
    """The optimizer; adamw_8bit and paged_adamw_8bit are bitsandbytes'."""
    optimizer_in_backward: Annotated[bool, flag()] = False
    """Step each weight as soon as its gradient is there, so that no two gradients live at once."""
    gradient_checkpointing: Annotated[str | bool, one_of(("auto",), also={True: True, False: False})] = "auto"
    """Recompute activations in the backward pass instead of keeping them; auto: as far as memory asks for it."""
    offload_boundaries: Annotated[bool, flag()] = False
    """On CUDA: keep what goes into recomputed layers in pinned host memory until backward needs it."""
    tiled_mlp: Annotated[bool, flag()] = False
    """Compute gated MLPs for 1024 tokens at a time and once more in backward, for long contexts."""
    max_memory: Annotated[str | int | None, memory_size()] = None
    """What `auto` settings must stay within, e.g. 24GB or 22GiB."""
    seed: Annotated[int, number(whole=True, at_least=0)] = 0
    """Seeds the adapter's start, dropout and the order of the data."""
    logging_steps: Annotated[int, number(whole=True, at_least=1)] = 1
    """Steps between two lines of metrics.jsonl."""
    eval_steps: Annotated[int | None, number(whole=True, at_least=1, also=(None,))] = None
    """Steps between two evaluations; null: at the end only, where data.eval is set."""
    save_steps: Annotated[int, number(whole=True, at_least=1)] = 100
    """Steps between two checkpoints."""
    save_total_limit: Annotated[int | None, number(whole=True, at_least=1, also=(None,))] = 2
    """Checkpoints kept, the newest ones; null: all."""
    report_to: Annotated[list[str], names_from(REPORTERS)] = Field(default_factory=list)
    """Where metrics go besides metrics.jsonl."""


class Config(_Section):
    """The whole configuration of a run."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)


SECTIONS: dict[str, type[_Section]] = {
    "model": ModelConfig,
    "adapter": AdapterConfig,
    "data": DataConfig,
    "training": TrainingConfig,
}
# Names that other tools have for our keys; `_read_other_names` turns them into ours.
OTHER_NAMES = {"adapter": ("use_dora",), "model": (), "data": (), "training": ("activation_checkpointing",)}
# Keys whose value is a mapping: `--set adapter.rank_pattern.NAME=8` sets one entry of it.
MAPPINGS = ("adapter.rank_pattern", "adapter.alpha_pattern", "data.eval")


def load_config(
    source: str | os.PathLike[str] | Mapping[str, Any] | Config, overrides: Sequence[str] | Mapping[str, Any] = ()
) -> Config:
    """Read a configuration and check all of it.

    Args:
        source: a YAML file, or the name of a shipped recipe; or its sections as a mapping; or a configuration.
        overrides: `KEY=VALUE` each, such as `training.max_steps=20`; values are parsed as YAML. Or a mapping from
            dotted keys to values.

    Raises:
        UserError: with one line for every fault found, each naming the file (or `--set`) and the key.
    """
    draft = _Draft("configuration" if isinstance(source, Mapping | Config) else os.fspath(source))
    if isinstance(source, Config):
        draft.take(source)
    elif isinstance(source, Mapping):
        draft.read(source)
    else:
        draft.read_file()
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            draft.overridden.add(key)
            draft.set(key, _plain(value))
    else:
        for override in [overrides] if isinstance(overrides, str) else overrides:
            draft.override(override)
    draft.read_other_names()
    config = draft.check()
    if draft.faults:
        raise UserError(draft.faults)
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
    if draft.faults:
        raise UserError(draft.faults)
    return changed


def config_to_yaml(config: Config) -> str:
    """The whole configuration as YAML, every default written out, keys in the documented order."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True, width=120)


def config_schema() -> dict[str, Any]:
    """The JSON schema of a configuration file, for editors."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
    schema["title"] = "qlora-tool configuration"
    return schema


@dataclass
class _Draft:
    """A configuration being put together, with every fault found in it so far."""

    source: str
    values: dict[str, dict[str, Any]] = field(default_factory=lambda: {name: {} for name in SECTIONS})
    overridden: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)

    def fault(self, key: str, message: str) -> None:
        start = f"--set {key}" if key in self.overridden else f"{self.source}: {key}"
        self.faults.append(f"{start}: {message}")

    def take(self, config: Config) -> None:
        """Take in a configuration: the keys that somebody set."""
        sections = {name: getattr(config, name) for name in SECTIONS}
        self.values = {
            name: {key: getattr(section, key) for key in section.model_fields_set} for name, section in sections.items()
        }

    def read_file(self) -> None:
        """Take in the source, a file or a recipe."""
        content, duplicates = parse_file(self.source)
        self.faults += [f"{self.source}, line {line}: '{key}' stands twice; keep one" for key, line in duplicates]
        self.read(content)

    def read(self, content: Mapping[Any, Any]) -> None:
        """Take in a mapping of sections. A section with nothing in it is one of defaults."""
        for name, section in content.items():
            if name not in SECTIONS:
                self.fault(str(name), _unknown_key(str(name)))
            elif isinstance(section, _Section):
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
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            self.faults.append(f"--set {override}: not valid YAML: {yaml_problem(error)}; put it in quotes")
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
            self.fault(key, _unknown_key(key))
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
            elif method not in ("lora", "dora") or (method == "dora" and not use_dora):
                self.fault("adapter.use_dora", f"{found(use_dora)}, but adapter.method is '{method}'; leave one out")
            elif use_dora:
                adapter["method"] = "dora"
        if "activation_checkpointing" in training:
            value = training.pop("activation_checkpointing")
            if training.get("gradient_checkpointing", value) != value:
                other = found(training["gradient_checkpointing"])
                message = f"{found(value)}, but gradient_checkpointing, the same thing, is {other}; leave one out"
                self.fault("training.activation_checkpointing", message)
            training["gradient_checkpointing"] = value

    def check(self) -> Config:
        """The configuration; keys at fault, which `faults` now names, are at their defaults in it."""
        faulty = set()
        sections = {}
        for name, section in SECTIONS.items():
            values = dict(self.values[name])
            if name == "data" and values.get("format") == "text":
                values.setdefault("train_on", "all")
            try:
                sections[name] = section.model_validate(values)
            except ValidationError as error:
                for problem in error.errors():
                    key = str(problem["loc"][0])
                    unknown = problem["type"] == "extra_forbidden"
                    self.fault(f"{name}.{key}", _unknown_key(f"{name}.{key}") if unknown else _message(problem))
                    faulty.add(f"{name}.{key}")
                sound = {key: value for key, value in values.items() if f"{name}.{key}" not in faulty}
                sections[name] = section.model_validate(sound)
        config = Config(**sections)
        for keys, message in _contradictions(config):
            if not faulty & set(keys):
                self.fault(keys[0], message)
        return config


def _plain(value: Any) -> Any:
    """A value as YAML would have it: a program may give paths and tuples."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def _message(problem: Any) -> str:
    return str(problem["ctx"]["error"]) if problem["type"] == "value_error" else str(problem["msg"])


def _contradictions(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """Keys that are right by themselves and wrong together: the keys, the one to blame first, and what to say."""
    adapter, data, training = config.adapter, config.data, config.training
    if data.format == "text" and data.train_on == "completion":
        message = "completion cannot go with data.format text, which is trained whole; leave it out, or set it to all"
        yield ("data.train_on", "data.format"), message
    if training.eval_steps is not None and data.eval is None:
        message = f"{training.eval_steps}, but there is nothing to evaluate; set data.eval, or leave eval_steps out"
        yield ("training.eval_steps", "data.eval"), message
    if training.group_by_length and data.packing:
        message = "true, but packed rows are of one length already; set data.packing: false, or leave it out"
        yield ("training.group_by_length", "data.packing"), message
    if training.group_by_length and not data.shuffle:
        message = "true, but data.shuffle: false keeps the file's order; leave one of the two out"
        yield ("training.group_by_length", "data.shuffle"), message
    if training.optimizer_in_backward and training.gradient_accumulation_steps > 1:
        message = "true, but gradients of several passes are summed before a step; leave one of the two out"
        yield ("training.optimizer_in_backward", "training.gradient_accumulation_steps"), message
    if training.optimizer_in_backward and training.max_grad_norm:
        message = "true, but clipping needs all gradients before the first step; set training.max_grad_norm: 0"
        yield ("training.optimizer_in_backward", "training.max_grad_norm"), message
    whole = [name for name in adapter.modules_to_save if name.rpartition(".")[2] in _EMBEDDING_MODULES]
    if config.model.embeddings == "int8" and whole:
        message = f"int8, but adapter.modules_to_save trains '{whole[0]}' whole; leave one of the two out"
        yield ("model.embeddings", "adapter.modules_to_save"), message
    both = [name for name in adapter.modules_to_save if name in adapter.target_modules]
    if both and not isinstance(adapter.target_modules, str):
        message = f"'{both[0]}' is in adapter.target_modules too; a module is either trained whole or adapted"
        yield ("adapter.modules_to_save", "adapter.target_modules"), message


def _keys(section: str) -> list[str]:
    return list(SECTIONS[section].model_fields)


def _unknown_key(key: str) -> str:
    """What to say of a key that does not exist: the closest one of its section, else of all."""
    section, _, name = key.partition(".")
    homes = {own: home for home in SECTIONS for own in _keys(home)}
    wanted = name or section
    if wanted in homes:
        return f"unknown key; did you mean '{homes[wanted]}.{wanted}'?"
    if section in SECTIONS:
        close = did_you_mean(name, [*_keys(section), *OTHER_NAMES[section]])
        return "unknown key" + (close or f"; expected one of {', '.join(_keys(section))}")
    close = did_you_mean(key, [*SECTIONS, *(f"{home}.{own}" for own, home in homes.items())])
    return "unknown key" + (close or f"; expected one of {', '.join(SECTIONS)}")
