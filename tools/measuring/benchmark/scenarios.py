"""What the benchmark can compare: which sides with which settings, on which batches, and what it must show."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from measuring.ours import (
    batch_of_tokens,
    device_and_dtype,
    every_position_in_the_loss,
    packed_batches,
    padded_batch,
    random_tokens,
    read_data,
    vocabulary_size,
)  # fmt: skip
from qlora_tool.config import Config, parse_size, with_values
from qlora_tool.errors import UserError

if TYPE_CHECKING:
    from qlora_tool.data.batches import Batch
    from qlora_tool.training.run_data import RunData

WEIGHT_DECAY = 0.01
CHECKPOINTING = "training.gradient_checkpointing"


@dataclass(frozen=True)
class Side:
    """A process of its own: `kind` as in `measuring.sides.SIDES`, with what is particular to its configuration."""

    kind: str
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Lane:
    """One thing that is timed: a side on a set of batches."""

    side: str
    batches: str


@dataclass(frozen=True)
class Demand:
    """What must be shown, and the limit.

    Attributes:
        of: the name of a ratio (`speed`, `memory`, `curve`), of a lane (`peak_bytes`, `share_of_bound`), or of a fact.
    """

    figure: str
    of: str
    limit: float
    at_least: bool = True


@dataclass(frozen=True)
class Comparison:
    """All that one run of the benchmark does.

    Attributes:
        sides, lanes: by name. In each round every lane takes one step, in this order.
        batches: the sets that lanes name.
        ratios: a lane and the one that it is held against, by name.
        facts: what else is told, such as how full the rows are.
        peak_memory: whether a step of each lane is counted, apart from the timed ones.
    """

    sides: dict[str, Side]
    lanes: dict[str, Lane]
    batches: dict[str, list[Batch]]
    ratios: dict[str, tuple[str, str]]
    demands: list[Demand] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    peak_memory: bool = True


@dataclass(frozen=True)
class Scenario:
    """A comparison that is known by name.

    Attributes:
        about: a line for the help.
        steps, warmup: rounds that are timed, and before them rounds that are not.
        values: of the configuration, for all sides.
        make: the comparison for a configuration and the command's options.
    """

    about: str
    steps: int
    warmup: int
    values: dict[str, Any]
    make: Callable[[Config, argparse.Namespace], Comparison]


# ----------------------------------------------------------------------------------------------------------- batches


def token_rows(config: Config, options: argparse.Namespace, rows: int, length: int, count: int) -> list[Batch]:
    """`count` batches of full rows, every token trained: the data's tokens one after another, or random ones."""
    if options.train:
        needed = rows * length * count
        stream = [token for example in read_data(config).train.examples for token in example.input_ids]
        stream = (stream * -(-needed // len(stream)))[:needed]
        cut = [stream[start : start + length] for start in range(0, needed, length)]
    else:
        cut = random_tokens(rows * count, length, vocabulary_size(config), config.training.seed)
    return [batch_of_tokens(cut[start : start + rows]) for start in range(0, len(cut), rows)]


def padded_batches(data: RunData, size: int, count: int) -> list[Batch]:
    """The first batches of the file, in its order, one example a row."""
    examples = data.train.examples
    starts = [number * size % max(1, len(examples) - size + 1) for number in range(count)]
    return [padded_batch(examples[start : start + size], data.pad_token_id) for start in starts]


# --------------------------------------------------------------------------------------------------------- scenarios


def _fixed(config: Config, options: argparse.Namespace, ours: dict[str, Side], demands: Sequence[Demand]) -> Comparison:
    """PEFT, checkpointed, against sides of ours, all on the same full rows."""
    rows, length = options.rows or 4, options.length or 256
    sides = {"peft": Side("peft"), **_unsloth(config), **ours}
    lanes = {name: Lane(name, "rows") for name in sides}
    ratios = {name: (name, "peft") for name in sides if name != "peft"}
    batches = {"rows": token_rows(config, options, rows, length, options.steps + options.warmup)}
    return Comparison(sides, lanes, batches, ratios, list(demands), {"rows": rows, "length": length})


def _unsloth(config: Config) -> dict[str, Side]:
    import importlib.util

    if importlib.util.find_spec("unsloth") is None or device_and_dtype(config)[0].type != "cuda":
        return {}
    return {"unsloth": Side("unsloth")}


def _checkpointed(config: Config, options: argparse.Namespace) -> Comparison:
    demands = [Demand("speed", "ours", 1.25), Demand("memory", "ours", 0.45, at_least=False)]
    return _fixed(config, options, {"ours": Side("ours")}, demands)


def _auto(config: Config, options: argparse.Namespace) -> Comparison:
    values = {CHECKPOINTING: "auto", "training.max_memory": options.max_memory}
    demands = [Demand("speed", "ours", 1.4),
               Demand("peak_bytes", "ours", parse_size(options.max_memory), at_least=False)]  # fmt: skip
    return _fixed(config, options, {"ours": Side("ours", values)}, demands)


def _int8(config: Config, options: argparse.Namespace) -> Comparison:
    return _fixed(config, options, {"ours": Side("ours")}, [Demand("speed", "ours", 4.0)])


def _packing(config: Config, options: argparse.Namespace) -> Comparison:
    """Told apart in three steps, each a factor: the same padded batches with a loss at every position (kernels), with
    labelled positions alone (fewer loss rows), and packed rows of about as many tokens (packing)."""
    if not options.train:
        raise UserError("packing: --train FILE is needed, of examples of different lengths")
    data = read_data(config)
    count = options.steps + options.warmup
    padded = padded_batches(data, options.rows or 8, count)
    tensor_tokens = sum(batch.input_ids.numel() for batch in padded) / len(padded)
    rows = max(1, round(tensor_tokens / config.data.max_length))
    packed, fill = packed_batches(data, config, rows, count)
    batches = {"padded, every row": [every_position_in_the_loss(batch) for batch in padded], "padded": padded,
               "packed": packed}  # fmt: skip
    sides = {"peft": Side("peft"), **_unsloth(config), "ours": Side("ours")}
    lanes = {name: Lane(name, "padded") for name in sides if name != "ours"}
    lanes |= {"ours, " + name: Lane("ours", name) for name in batches}
    ratios = {"ours": ("ours, packed", "peft"), "of it, kernels": ("ours, padded, every row", "peft"),
              "of it, fewer loss rows": ("ours, padded", "ours, padded, every row"),
              "of it, packing": ("ours, packed", "ours, padded")}  # fmt: skip
    ratios |= {"unsloth": ("unsloth", "peft")} if "unsloth" in sides else {}
    facts = {
        "rows_fill": fill, "packed_rows_a_batch": rows, "max_length": config.data.max_length,
        "mean_tokens_of_a_padded_tensor": tensor_tokens,
        "mean_tokens_of_a_packed_tensor": sum(batch.input_ids.numel() for batch in packed) / len(packed),
        "share_of_padding": 1 - sum(batch.tokens for batch in padded) / (tensor_tokens * len(padded)),
        "share_of_loss_rows": sum(batch.trained_tokens for batch in padded) / (tensor_tokens * len(padded)),
    }  # fmt: skip
    demands = [Demand("speed", "ours", 1.8), Demand("fact", "rows_fill", 0.97)]
    return Comparison(sides, lanes, batches, ratios, demands, facts)


def _curves(config: Config, options: argparse.Namespace) -> Comparison:
    """The fused and the plain path from the same start, on the same batches."""
    rows, length = options.rows or 4, options.length or 256
    sides = {"plain": Side("plain"), "ours": Side("ours")}
    lanes = {"plain": Lane("plain", "rows"), "ours": Lane("ours", "rows")}
    if options.train:
        batches = padded_batches(read_data(config), options.rows or 8, options.steps + options.warmup)
    else:
        batches = token_rows(config, options, rows, length, options.steps + options.warmup)
    demands = [Demand("curve", "ours", 0.005, at_least=False)]
    return Comparison(sides, lanes, {"rows": batches}, {"ours": ("ours", "plain")}, demands, peak_memory=False)


_SMALLEST = {"training.offload_boundaries": True, "training.tiled_mlp": True, "model.embeddings": "int8"}
SHAPES_7B = {"1 x 2048": (1, 2048), "4 x 1024": (4, 1024)}


def _cuda(config: Config, options: argparse.Namespace) -> Comparison:
    """A 7B's shapes: everything recomputed on both sides, and here what the card has room for."""
    sides = {"peft": Side("peft"), **_unsloth(config), "ours": Side("ours"),
             "auto": Side("ours", {CHECKPOINTING: "auto"}), "smallest": Side("ours", _SMALLEST)}  # fmt: skip
    count = options.steps + options.warmup
    batches = {name: token_rows(config, options, rows, length, count) for name, (rows, length) in SHAPES_7B.items()}
    lanes = {f"{side}, {shape}": Lane(side, shape) for shape in SHAPES_7B for side in sides}
    ratios = {name: (name, f"peft, {lane.batches}") for name, lane in lanes.items() if lane.side != "peft"}
    demands = [Demand("speed", f"ours, {shape}", 2.0) for shape in SHAPES_7B]
    demands += [Demand("share_of_bound", f"{side}, {shape}", 0.6) for side in ("ours", "auto") for shape in SHAPES_7B]
    demands.append(Demand("peak_bytes", "ours, 1 x 2048", 5.3e9, at_least=False))
    demands.append(Demand("peak_bytes", "smallest, 1 x 2048", 4.4e9, at_least=False))
    return Comparison(sides, lanes, batches, ratios, demands)


_CPU = {"model.device": "cpu", "model.compute_dtype": "float32", CHECKPOINTING: True, "data.max_length": 512}
_NF4 = {"model.quantization": "nf4", "model.double_quant": True}
SCENARIOS: dict[str, Scenario] = {
    "checkpointed": Scenario("NF4, 4 x 256, checkpointing on both sides (6 min)", 12, 2, _CPU | _NF4, _checkpointed),
    "auto": Scenario("the same with `auto` and --max-memory here (6 min)", 12, 2, _CPU | _NF4, _auto),
    "int8": Scenario("int8, checkpointing on both sides; PEFT takes a minute a step (8 min)", 4, 1,
                     _CPU | {"model.quantization": "int8"}, _int8),
    "packing": Scenario("--train FILE: padded batches of 8 in PEFT, packed rows here, and why (10 min)", 20, 2,
                        _CPU | _NF4, _packing),
    "curves": Scenario("the fused and the plain path here, the same start: their losses (15 min)", 60, 0,
                       _CPU | _NF4, _curves),
    "cuda": Scenario("a 7B on a CUDA device, 1 x 2048 and 4 x 1024 (2 min)", 6, 2,
                     {"model.device": "cuda", "model.compute_dtype": "bfloat16", CHECKPOINTING: True,
                      "training.optim": "adamw_8bit"} | _NF4, _cuda),
}  # fmt: skip


def configuration(scenario: Scenario, options: argparse.Namespace) -> Config:
    """What all sides have in common: LoRA of r 16 on all linears, AdamW at a constant rate, clipped at 1."""
    values = {
        "model.name_or_path": options.model,
        "adapter.r": options.r,
        "adapter.lora_alpha": 2 * options.r,
        "data.train": options.train or "none.jsonl",
        "training.learning_rate": options.lr,
        "training.lr_scheduler_type": "constant",
        "training.weight_decay": WEIGHT_DECAY,
        "training.seed": options.seed,
    }
    return with_values(Config(), values | scenario.values | set_by_hand(options.set))


def set_by_hand(texts: Sequence[str]) -> dict[str, Any]:
    """What `--set KEY=VALUE` names, the values read as YAML."""
    import yaml

    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text}: expected KEY=VALUE, such as --set adapter.r=8")
        found[key] = yaml.safe_load(value)
    return found
