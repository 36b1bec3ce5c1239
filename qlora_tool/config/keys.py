"""Every key of a configuration: its type, its default, and what it is for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, SerializeAsAny, create_model

from qlora_tool.choices import ComputeDtype, DataFormat, Device, Quantization
from qlora_tool.config.schema import choices_of, expected, json_schema, name_of, schemas_of
from qlora_tool.config.types import (
    Columns,
    Epochs,
    Evaluation,
    LayerNumbers,
    ModelName,
    ModuleNames,
    Pattern,
    Prompts,
    Size,
    StepsOrShare,
    Text,
    Training,
)
from qlora_tool.methods import method_keys
from qlora_tool.methods.keys import (
    MOST,
    WHOLE,
    Count,
    Keys,
    Mark,
    MethodKeys,
    NotEmpty,
    NotNegative,
    Positive,
    Rank,
    Share,
)

_K = TypeVar("_K", bound=MethodKeys)
_BY_MODULE = Field(title="a mapping from module names to numbers")
_SEEDS = "a whole number from 0 to 2^64 - 1"  # PyTorch's
_Reporter = Literal["tensorboard", "wandb"]


def _to_reporters(value: Any) -> Any:
    """A single one as a list; `none` as an empty one.

    Raises:
        ValueError: none is one of several.
    """
    if value is None or value == "none":
        return []
    several = list(value) if isinstance(value, list | tuple) else [value]
    if "none" in several:
        raise ValueError("none stands alone; leave it out of the list")
    return several


def _other_name(name: str, key: str, schema: dict[str, Any]) -> ConfigDict:
    """A key that other tools know by another name, which reading turns into ours."""
    other = {name: schema | {"description": f"{key}; read as the same."}}
    return ConfigDict(json_schema_extra=lambda schema: schema["properties"].update(other))


class ModelConfig(Keys):
    """The frozen base model: which one, and how it is held in memory."""

    name_or_path: ModelName = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """Hub id, local folder, or `demo` (a small model that needs no hub)."""
    revision: Annotated[Text, Field(title="a branch, tag or commit of the hub")] | None = None
    """Branch, tag or commit on the hub."""
    quantization: Quantization = "nf4"
    """How the base's linear weights are stored: 4-bit NormalFloat or float, 8-bit integers, or as they are."""
    double_quant: bool = True
    """Quantize the scales of the 4-bit weights too."""
    embeddings: Literal["as_stored", "int8"] = "as_stored"
    """How the input embeddings and the output projection are stored: as they are, or in 8-bit integers."""
    compute_dtype: ComputeDtype = "auto"
    """The dtype of matrix products; auto picks what the device is fast in."""
    device: Device = "auto"
    """Where to run; auto is CUDA where there is a card."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    keep_quantized: Annotated[bool, Mark.FREE_ON_RESUME] = False
    """Cache the quantized base on disk, so that the next run starts in seconds."""
    weights: Annotated[Literal["auto", "resident", "host", "disk"], Mark.FREE_ON_RESUME] = "auto"
    """Where the base's layers lie: on the device, in host memory or on the disk; auto: elsewhere what does not fit."""
    resident_layers: Annotated[int, Field(ge=0, le=MOST), WHOLE, Mark.FREE_ON_RESUME] = 0
    """With weights: host or disk: how many of the first layers are on the device all the same."""
    skip_modules: Literal["as-peft"] | ModuleNames = Field(default_factory=list)
    """Not quantized: names as in bitsandbytes' llm_int8_skip_modules; as-peft: what bitsandbytes leaves under PEFT."""


class AdapterKeys(Keys):
    """The keys of every adapter; `AdapterConfig` has those of the methods besides.

    Attributes:
        methods: the keys that each method reads beside these, by the method's name.
    """

    model_config = _other_name("use_dora", "PEFT's name for `method: dora`", {"type": "boolean"})
    methods: ClassVar[Mapping[str, type[MethodKeys]]] = {}

    method: str = "lora"
    """The adapter method."""
    r: Rank = 16
    """Rank of the update."""
    lora_alpha: Positive = 32
    """The update is scaled by lora_alpha / r."""
    lora_dropout: Share = 0.0
    """Dropout on the adapter's inputs, in training."""
    target_modules: Literal["all-linear"] | ModuleNames | Pattern = "all-linear"
    """`all-linear` (but the output layer), a list of names that modules end in, or one regular expression."""
    exclude_modules: ModuleNames | Pattern = Field(default_factory=list)
    """Names that modules end in, or one regular expression: left out of target_modules."""
    layers_to_transform: LayerNumbers | None = None
    """The layers, counted from 0, whose modules are adapted; null: all of them."""
    layers_pattern: ModuleNames | NotEmpty = Field(default_factory=list)
    """The name of the list of layers that `layers_to_transform` counts, where names have several numbers."""
    modules_to_save: ModuleNames = Field(default_factory=list)
    """Modules of which every weight is trained, and saved with the adapter."""
    bias: Literal["none", "lora_only", "all"] = "none"
    """Which biases are trained."""
    rank_pattern: Annotated[dict[Pattern, Rank], _BY_MODULE] = Field(default_factory=dict)
    """Ranks of their own, by module name or by a regular expression that names end in."""
    alpha_pattern: Annotated[dict[Pattern, Positive], _BY_MODULE] = Field(default_factory=dict)
    """Values of lora_alpha of their own, in the same way."""
    init_from: Annotated[Text, Field(title="an adapter's folder")] | None = None
    """Start from an existing adapter (a folder)."""

    def of_method(self, kind: type[_K]) -> _K:
        """These keys as the class that a method defined for its own, which type checkers know no other way."""
        assert isinstance(self, kind)
        return self

    def unread(self) -> list[str]:
        """The keys that have a value of their own and that the chosen method does not read."""
        chosen = self.methods[self.method]
        of_methods = {key for kind in self.methods.values() for key in kind.model_fields}
        return [
            key
            for key, field in type(self).model_fields.items()
            if (not chosen.reads(key) or key in of_methods - chosen.model_fields.keys())
            and getattr(self, key) != field.get_default(call_default_factory=True)
        ]


def adapter_config(methods: Mapping[str, type[MethodKeys]]) -> type[AdapterKeys]:
    """The section `adapter`, with the keys of some methods after those of every adapter.

    Args:
        methods: the keys of each, by the name that `adapter.method` has for it.

    Raises:
        TypeError: two classes define a key of one name.
    """
    kinds = list(dict.fromkeys(methods.values()))
    homes: dict[str, type] = {}
    classes: list[type[Keys]] = [AdapterKeys, *kinds]
    for kind in classes:
        for key in kind.model_fields:
            home = next(base for base in kind.__mro__ if key in inspect.get_annotations(base))
            if homes.setdefault(key, home) is not home:
                raise TypeError(f"{home.__name__}.{key}: {homes[key].__name__} has a key of this name; share a base")
    bases = [kind for kind in reversed(kinds) if not any(kind in other.__mro__[1:] for other in kinds)]
    names: Any = Literal[tuple(methods)]
    create: Any = create_model  # its overloads know no bases that are found while running
    section: type[AdapterKeys] = create(
        "AdapterConfig",
        __base__=(*bases, AdapterKeys),
        __module__=__name__,
        __doc__="What is trained.",
        method=(names, AdapterKeys.model_fields["method"]),
    )
    section.methods = dict(methods)
    return section


if TYPE_CHECKING:

    class AdapterConfig(AdapterKeys):
        """What is trained: the keys of every adapter and of the methods."""

        def __init__(self, **keys: Any) -> None: ...
else:
    AdapterConfig = adapter_config(method_keys())


class DataConfig(Keys):
    """What it is trained on."""

    marks = frozenset({Mark.NOT_IN_MEMORY})

    train: Training = "data/train.jsonl"
    """A .jsonl, .json, .csv, .tsv, .xlsx, .parquet, .arrow or .txt file, packed or not, a folder, or a hub id."""
    eval: Evaluation = None
    """The same; or a fraction of the training data, such as 0.02; or a mapping from names to files."""
    format: DataFormat = "auto"
    """How rows are read; auto tells by their columns."""
    columns: Columns = Field(default_factory=dict)
    """The file's columns by what they are read as, {prompt: …, completion: …}; usual names are found by themselves."""
    on_error: Literal["stop", "skip"] = "stop"
    """A faulty row is an error, or is left out and counted."""
    train_on: Literal["completion", "all"] = "completion"
    """Loss on the answers alone, or on every token. Of format text, every token is trained."""
    max_length: Count = 2048
    """The most tokens in a row."""
    packing: bool = True
    """Several examples a row, never attending to one another."""
    padding_free: bool = True
    """Without packing: a batch's rows one after the other where the family needs no mask for it; false pads them."""
    shuffle: bool = True
    """False keeps the file's order."""
    chat_template: Annotated[Text, Field(title="a Jinja file")] | None = None
    """A Jinja file, used in place of the chat template that comes with the model."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """What the chat template is given besides, such as {enable_thinking: false}; generate takes it from the run."""
    multi_turn: Literal["auto", "together", "one_per_answer"] = "auto"
    """Rows of a conversation; auto: one, but one an answer where the chat template writes earlier turns anew."""


class TrainingConfig(Keys):
    """How it is trained."""

    model_config = _other_name(
        "activation_checkpointing",
        "transformers 5's name for `gradient_checkpointing`",
        {"enum": ["auto", True, False]},
    )

    output_dir: Annotated[Text, Field(title="a folder"), Mark.NOT_IN_MEMORY, Mark.FREE_ON_RESUME] = "runs/my-model"
    """The run's folder, relative to the current folder."""
    num_train_epochs: Annotated[Literal["auto"] | Epochs, SerializeAsAny(), Mark.NOT_IN_MEMORY] = "auto"
    """Passes over the training data; auto: 1, or where rows are few as many as make some 100 optimizer steps."""
    max_steps: Annotated[Count | Literal[-1], WHOLE, Mark.NOT_IN_MEMORY] = -1
    """Stop after this many optimizer steps; -1: num_train_epochs decides."""
    per_device_train_batch_size: Annotated[Count, Mark.NOT_IN_MEMORY] = 4
    """Rows in a forward and backward pass."""
    gradient_accumulation_steps: Count = 1
    """Passes in one optimizer step."""
    group_by_length: Annotated[bool, Mark.NOT_IN_MEMORY] = False
    """Without packing: rows of like length into a batch, so that less is padded."""
    learning_rate: Annotated[Positive, Mark.NOT_IN_MEMORY] = 2.0e-4
    """The highest learning rate."""
    lr_scheduler_type: Annotated[Literal["constant", "linear", "cosine"], Mark.NOT_IN_MEMORY] = "cosine"
    """What the learning rate does after the warmup."""
    warmup_steps: Annotated[StepsOrShare, Mark.NOT_IN_MEMORY] = 0.03
    """Steps over which the learning rate rises, the first above 0; below 1: a share of all steps."""
    weight_decay: NotNegative = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: NotNegative = 1.0
    """Gradients are scaled down to this norm; 0: no clipping."""
    label_smoothing_factor: Share = 0.0
    """Share of the target spread evenly over all tokens."""
    optim: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """The optimizer; adamw_8bit and paged_adamw_8bit are bitsandbytes'."""
    optimizer_in_backward: bool = False
    """Step each weight as soon as its gradient is there, so that no two gradients live at once."""
    # What is recomputed in backward, or fetched from the host, gives the same numbers.
    gradient_checkpointing: Annotated[Literal["auto"] | bool, Mark.FREE_ON_RESUME] = "auto"
    """Recompute activations in the backward pass instead of caching them; auto: as far as memory asks for it."""
    offload_boundaries: Annotated[bool, Mark.FREE_ON_RESUME] = False
    """On CUDA: hold what goes into recomputed layers in pinned host memory until backward needs it."""
    tiled_mlp: bool = False
    """Compute gated MLPs for 1024 tokens at a time and once more in backward, for long contexts."""
    max_memory: Annotated[Size | None, Mark.NOT_IN_MEMORY, Mark.FREE_ON_RESUME] = None
    """What `auto` settings must stay within, e.g. 24GB or 22GiB."""
    seed: Annotated[int, Field(ge=0, le=2**64 - 1, title=_SEEDS), WHOLE, Mark.NOT_IN_MEMORY] = 0
    """Seeds the adapter's start, dropout and the order of the data."""
    full_determinism: bool = False
    """On CUDA: kernels that give the same bits each time; slower, and attention takes more memory."""
    logging_steps: Annotated[Count, Mark.NOT_IN_MEMORY, Mark.FREE_ON_RESUME] = 1
    """Steps between two lines of metrics.jsonl."""
    eval_steps: Annotated[Count | None, Mark.NOT_IN_MEMORY] = None
    """Steps between two evaluations; null: at the end only, where data.eval is set."""
    save_steps: Annotated[Count, Mark.NOT_IN_MEMORY, Mark.FREE_ON_RESUME] = 100
    """Steps between two checkpoints."""
    save_total_limit: Annotated[Count | None, Mark.NOT_IN_MEMORY, Mark.FREE_ON_RESUME] = 2
    """How many checkpoints stay, the newest ones; null: all. A best one that is to be loaded stays besides."""
    load_best_model_at_end: Annotated[bool, Mark.NOT_IN_MEMORY, Mark.FREE_ON_RESUME] = False
    """`adapter/` is that of the best evaluation, not that of the last step; its checkpoint is kept."""
    metric_for_best_model: Annotated[
        NotEmpty, Field(title="loss, or NAME_loss of one of several sets"), Mark.NOT_IN_MEMORY, Mark.FREE_ON_RESUME
    ] = "loss"
    """What is lowest in the best evaluation: the loss on data.eval, on the first of several sets if none is named."""
    early_stopping_patience: Annotated[Count | None, Mark.NOT_IN_MEMORY, Mark.FREE_ON_RESUME] = None
    """Stop after this many evaluations, one after the other, that are no better than the best before; null: never."""
    eval_prompts: Annotated[Prompts, Mark.NOT_IN_MEMORY, Mark.FREE_ON_RESUME] = Field(default_factory=list)
    """Prompts, or how many rows of data.eval, to answer before the first step, at every evaluation and at the end."""
    sharding: Annotated[Literal["none", "fsdp"], Mark.FREE_ON_RESUME] = "none"
    """Of several processes: each holds the whole frozen base, or an equal share of every layer's."""
    report_to: Annotated[
        list[_Reporter],
        BeforeValidator(_to_reporters, json_schema_input_type=list[_Reporter] | _Reporter | Literal["none"]),
        Mark.NOT_IN_MEMORY,
        Mark.FREE_ON_RESUME,
    ] = Field(default_factory=list)
    """Where metrics go besides metrics.jsonl."""


class Config(Keys):
    """The whole configuration of a run.

    Example:
        >>> from qlora_tool import Config
        >>> config = Config(data={"train": "rows.jsonl"}, training={"max_steps": 4})
        >>> config.training.max_steps, config.adapter.method, config.model.quantization
        (4, 'lora', 'nf4')
    """

    model: ModelConfig = Field(default_factory=ModelConfig)
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)


SECTIONS: dict[str, type[Keys]] = {
    "model": ModelConfig,
    "adapter": AdapterConfig,
    "data": DataConfig,
    "training": TrainingConfig,
}
# Names that other tools have for our keys; reading turns them into ours.
OTHER_NAMES = {"adapter": ("use_dora",), "model": (), "data": (), "training": ("activation_checkpointing",)}
# Keys whose value is a mapping: `--set adapter.rank_pattern.NAME=8` sets one entry of it.
MAPPINGS = (
    "adapter.rank_pattern", "adapter.alpha_pattern", "data.eval", "data.columns", "data.chat_template_kwargs",
)  # fmt: skip


def config_schema() -> dict[str, Any]:
    """The JSON schema of a configuration file, for editors."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **json_schema(Config)}
    schema["title"] = "qlora-tool configuration"
    schema["description"] = schema["description"].partition("\n")[0]  # without the example, which is Python's
    return schema


def choices(key: str) -> tuple[str, ...]:
    """The values that a key may have, as YAML has them: `choices("model.quantization")`.

    Raises:
        KeyError: there is no such key, or its values cannot be listed.
    """
    section, _, name = key.partition(".")
    values = choices_of(schemas_of(SECTIONS[section])[name])
    if values is None:
        raise KeyError(f"{key} takes {expected(schemas_of(SECTIONS[section])[name])}")
    return tuple(map(name_of, values))
