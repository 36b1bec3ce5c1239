"""From a configuration to everything a run needs, cheapest checks first: data before weights, weights before files."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qlora_tool._version import __version__
from qlora_tool.adapters.starts import start_facts
from qlora_tool.build.build import Built
from qlora_tool.build.setup import Setup
from qlora_tool.config import AdapterConfig, Config, TrainingConfig, with_values
from qlora_tool.model.causal_lm import CausalLM
from qlora_tool.model.source import resolve as resolve_model
from qlora_tool.sizes import MIB, counted, memory_size, noun_of
from qlora_tool.training.how_long import describe_length, measured_speed
from qlora_tool.training.run_data import RunData, read_run_data
from qlora_tool.weights.handles import WeightHandle
from qlora_tool.weights.quantized import BLOCK_SIZE

if TYPE_CHECKING:
    from qlora_tool.training.run import Run

logger = logging.getLogger(__name__)


def prepare_data(setup: Setup) -> tuple[RunData, Setup]:
    """Read and tokenize the data, and check it against the model's configuration.

    Returns:
        The data, and the setup with what they decide: a text found as such is trained on every token.
    """
    config = setup.config
    folder = resolve_model(config.model.name_or_path, config.model.revision, weights=False)
    data = read_run_data(config, folder, setup.model_config)
    told = ""
    for dataset in (data.train, *data.evaluations.values()):
        for line in dataset.report.lines():
            if line != told:
                logger.info(line)
            told = line if line.startswith("chat template: ") else told  # mostly the same for all of the data
    decided = with_values(config, {"data.train_on": data.train.report.train_on})
    return data, replace(setup, config=decided)


def describe(built: Built, adapter: AdapterConfig) -> list[str]:
    """What is frozen and what is trained, in bytes, for the log."""
    model, adapters = built.model, built.adapters
    plain = model.unquantized_bytes()
    named = [f"{name} {memory_size(size)}" for name, size in plain.items() if size >= MIB / 20][:3]  # not 0.0 MiB
    largest = f" ({', '.join(named)}{', ...' if len(plain) > len(named) else ''})" if named else ""
    kind = model.quantization.kind
    if kind in ("nf4", "fp4") and model.quantization.double_quant:
        kind += " with double quantization"
    if model.quantization.embeddings == "int8":
        kind += ", embeddings in int8,"
    if left := model.left_linears:
        kind += f", {counted(left, 'linear module')} left as stored,"
    trained = adapters.parameters()
    dtype = str(trained[0].dtype).removeprefix("torch.")
    return [
        f"model: {model.config.model_type}, {kind} {memory_size(model.quantized_bytes())}; unquantized "
        f"{memory_size(sum(plain.values()))}{largest}",
        f"adapter: {_method(adapter)} on {adapters.places}, {_trained(model, trained)} in {dtype}; matrix products in "
        f"{str(model.compute_dtype).removeprefix('torch.')} on {model.device}",
        *([f"adapter: starts from {adapter.init_from}"] if adapter.init_from else []),
        *([f"kernels: {model.fused} of the family's own"] if model.device.type == "cuda" else []),
    ]


def _method(adapter: AdapterConfig) -> str:
    """The method, with the settings that it has of rank and scale: `lora, r 16, lora_alpha 32,`."""
    settings = [f"{name} {value:g}" for name in ("r", "lora_alpha") if isinstance(value := getattr(adapter, name, None),
                                                                                  int | float)]  # fmt: skip
    return f"{', '.join([adapter.method, *settings])}{',' if settings else ''}"


def _trained(model: CausalLM, trained: Sequence[Tensor]) -> str:
    """How many weights are trained, and of how many: those of the base and of the adapter."""
    handles = [module for module in model.module.modules() if isinstance(module, WeightHandle)]
    inside = {id(tensor) for handle in handles for tensor in handle.parameters()}
    others = sum(p.numel() for p in model.module.parameters() if id(p) not in inside)
    number = sum(p.numel() for p in trained)
    every = others + sum(math.prod(handle.shape) for handle in handles)
    return f"{number / 1e6:.2f} M of {every / 1e6:,.1f} M weights trained ({number / every:.2%})"


def run_lines(run: Run, done: int, dry_run: bool = False) -> list[str]:
    """How much is trained on, for how long, and where it goes, for the log.

    Args:
        done: steps that lie behind.
        dry_run: whether it stops before the first step.
    """
    training, evaluations = run.training, run.data.evaluations
    speed = measured_speed(run.config, run.model.device, run.world.size)
    named = ", ".join(f"{name} {len(dataset.examples):,}" for name, dataset in evaluations.items())
    count, tokens = len(run.data.train.examples), sum(run.data.train.lengths)
    rows = f"rows: {count:,} {noun_of(count, 'example')} of {tokens:,} {noun_of(tokens, 'token')}"
    step = training.per_device_train_batch_size * training.gradient_accumulation_steps * run.world.size
    return [
        f"{rows}, a step takes {counted(step, 'row')} of up to {run.config.data.max_length:,}"
        + (f"; evaluated on: {named}" if named else ""),
        f"run: {run.plan.describe()} into {run.folder.path}",
        f"how long: {describe_length(run.plan, done, speed, bool(evaluations), dry_run)}",
        "files there: adapter, metrics.jsonl, memory.json, report.html; a checkpoint "
        + _when_saved(training, run.plan.total_steps, bool(evaluations)),
    ]


def _when_saved(training: TrainingConfig, total: int, evaluated: bool) -> str:
    """After which steps there are checkpoints, as the loop saves them."""
    every = training.save_steps
    if every == 1:
        return "every step"
    said = ["after the last step"] if every >= total else [f"every {every} steps", "after the last one"]
    if training.load_best_model_at_end and evaluated:
        said.append("after every evaluation that is the best so far")
    return " and ".join(said) if len(said) < 3 else f"{', '.join(said[:-1])} and {said[-1]}"


def choices_made(given: Config, decided: Config) -> list[str]:
    """What became of settings that were left open, for `--verbose`."""
    before, after = given.model_dump(mode="json"), decided.model_dump(mode="json")
    return [f"chosen: {section}.{key}: auto is {after[section][key]}"
            for section, values in before.items() for key, value in values.items()
            if value == "auto" and key in after[section] and after[section][key] != "auto"]  # fmt: skip


def provenance(config: Config, model: CausalLM, data: RunData) -> dict[str, Any]:
    """What `qlora_tool.json` says beside the adapter: what it was trained on and how."""
    from qlora_tool.files.hashes import file_hashes

    return {
        "qlora_tool": __version__,
        "base": {
            "name_or_path": config.model.name_or_path,
            "revision": config.model.revision,
            "files": file_hashes(model.folder),
        },
        "quantization": config.model.quantization,
        "double_quant": config.model.double_quant,
        "embeddings": config.model.embeddings,
        "skip_modules": config.model.skip_modules,
        "beyond_peft": found.as_dict() if (found := model.beyond_peft) else None,
        "block_size": BLOCK_SIZE,
        "compute_dtype": config.model.compute_dtype,
        "method": config.adapter.method,
        **({"start": start} if (start := start_facts(config.adapter)) else {}),
        "chat_template_kwargs": config.data.chat_template_kwargs,
        "data": {
            "train": data.train.report.files,
            "eval": {name: dataset.report.files for name, dataset in data.evaluations.items()},
        },
    }
