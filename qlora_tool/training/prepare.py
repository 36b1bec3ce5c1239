"""From a configuration to everything a run needs, cheapest checks first: data before weights, weights before files."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_tool._version import __version__
from qlora_tool.adapters.attach import AdapterSet, attach
from qlora_tool.adapters.fusion import tile_mlps
from qlora_tool.adapters.peft_files import StoredAdapter, attach_stored, read_adapter
from qlora_tool.adapters.targets import find_targets, settings_for
from qlora_tool.config import Config, with_values
from qlora_tool.data.tokenize import Dataset, build_dataset, build_evaluation_sets
from qlora_tool.errors import UserError
from qlora_tool.model.causal_lm import CausalLM
from qlora_tool.model.open import check_length, choose_device, choose_dtype, open_model, open_tokenizer
from qlora_tool.model.source import read_model_config, resolve
from qlora_tool.weights.quantized import BLOCK_SIZE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_tool.config import AdapterConfig
    from qlora_tool.model.checkpointing import Recomputation

logger = logging.getLogger(__name__)


@dataclass
class RunData:
    """The tokenized data of a run."""

    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    evaluations: dict[str, Dataset]

    @property
    def pad_token_id(self) -> int:
        """What fills short rows up. It is masked out and never has a label, so any token does."""
        for candidate in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if candidate is not None:
                return candidate
        return 0


def resolve_config(config: Config) -> Config:
    """The configuration with every `auto` decided, so that training it again repeats the run.

    `gradient_checkpointing: auto` stays where it depends on memory: the numbers are the same whatever is recomputed.
    """
    device = choose_device(config.model.device)
    values: dict[str, Any] = {
        "model.compute_dtype": str(choose_dtype(config.model.compute_dtype, device)).split(".")[1]
    }
    chosen_later = config.training.max_memory is not None or device.type == "cuda"  # when the data is there
    if config.training.gradient_checkpointing == "auto" and not chosen_later:
        values["training.gradient_checkpointing"] = True
    if config.adapter.init_from:
        values |= settings_of(read_adapter(Path(config.adapter.init_from)), config.adapter)
    return with_values(config, values)


def settings_of(stored: StoredAdapter, config: AdapterConfig) -> dict[str, Any]:
    """The keys of the configuration that an adapter to start from decides.

    Args:
        stored: the adapter.
        config: what was asked for; keys that nobody set are free to follow.

    Raises:
        UserError: keys that somebody set and that contradict the adapter.
    """
    peft = stored.peft
    decided = {
        "method": stored.method, "r": peft["r"], "lora_alpha": peft["lora_alpha"],
        "use_rslora": bool(peft.get("use_rslora")), "bias": peft.get("bias") or "none",
    }  # fmt: skip
    faults = [
        f"adapter.{key}: {getattr(config, key)}, but {stored.folder}, which adapter.init_from names, has {value}; "
        f"leave adapter.{key} out"
        for key, value in decided.items() if key in config.model_fields_set and getattr(config, key) != value
    ]  # fmt: skip
    if faults:
        raise UserError(faults)
    for key in ("target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern"):
        if peft.get(key) and key not in config.model_fields_set:
            decided[key] = peft[key]
    return {f"adapter.{key}": value for key, value in decided.items()}


def prepare_data(config: Config) -> RunData:
    """Read and tokenize the data, and check it against the model's configuration."""
    folder = resolve(config.model.name_or_path, config.model.revision)
    model_config = read_model_config(folder, config.model.trust_remote_code)
    check_length(model_config, config.data.max_length)
    tokenizer = open_tokenizer(folder, config.model.trust_remote_code)
    train = build_dataset(config.data.train, config.data, tokenizer)
    train, evaluations = build_evaluation_sets(config.data, tokenizer, train)
    vocabulary = model_config.get_text_config().vocab_size
    datasets = (train, *evaluations.values())
    highest = max(max(example.input_ids) for dataset in datasets for example in dataset.examples)
    if highest >= vocabulary:
        raise UserError(
            f"{folder}: its tokenizer gives token {highest}, but the model knows only {vocabulary}; tokenizer and "
            "model do not belong together"
        )
    for dataset in datasets:
        for line in dataset.report.lines():
            logger.info(line)
    return RunData(tokenizer, train, evaluations)


def prepare_model(config: Config, recomputation: Recomputation | None = None) -> tuple[CausalLM, AdapterSet]:
    """Read the base and put the adapters on it, ready to train.

    Args:
        recomputation: what is recomputed in backward; by default what `gradient_checkpointing` says of all layers.
    """
    model = open_model(config.model)
    if config.adapter.init_from:
        stored = read_adapter(Path(config.adapter.init_from))
        adapters = attach_stored(model.module, stored, model.compute_dtype, config.adapter.lora_dropout)
        _refuse_other_places(model, adapters, config.adapter, stored)
        logger.info("adapter: starts from %s", stored.folder)
    else:
        adapters = attach(model.module, config.adapter, model.compute_dtype, config.training.seed)
    if not tile_mlps(model.module, config.training.tiled_mlp) and config.training.tiled_mlp:
        logger.warning("training.tiled_mlp: nothing is tiled, as %s has no gated MLPs with plain LoRA on all of their "
                       "modules", model.config.model_type)  # fmt: skip
    model.choose_loss()
    model.offload_boundaries = config.training.offload_boundaries and model.device.type == "cuda"
    if config.training.offload_boundaries and not model.offload_boundaries:
        logger.warning("training.offload_boundaries: the model is in host memory already; nothing is moved")
    model.checkpoint_layers(recomputation or bool(config.training.gradient_checkpointing))
    for line in describe(model, adapters):
        logger.info(line)
    return model, adapters


def _refuse_other_places(model: CausalLM, adapters: AdapterSet, config: AdapterConfig, stored: StoredAdapter) -> None:
    """Refuse a configuration that names other modules than the adapter to start from is on, or other ranks."""
    wanted = {name: settings_for(name, config) for name in find_targets(model.module, config)}
    faults = [
        f"adapter.target_modules: {name} is {'' if name in wanted else 'not '}among them, but {stored.folder}, which "
        f"adapter.init_from names, is {'' if name in adapters.layers else 'not '}on it; leave target_modules out"
        for name in sorted(wanted.keys() ^ adapters.layers.keys())
    ]
    for name in wanted.keys() & adapters.layers.keys():
        found = adapters.layers[name].settings
        if (found.r, found.alpha) != (wanted[name].r, wanted[name].alpha):
            faults.append(
                f"adapter.rank_pattern, adapter.alpha_pattern: {name} would have r {wanted[name].r} and lora_alpha "
                f"{wanted[name].alpha}, but has {found.r} and {found.alpha} in {stored.folder}; leave the patterns out"
            )
    if faults:
        raise UserError(faults[:3])


def describe(model: CausalLM, adapters: AdapterSet) -> list[str]:
    """What is kept and what is trained, in bytes, for the log."""
    plain = model.unquantized_bytes()
    largest = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in list(plain.items())[:3])
    kind = model.quantization.kind
    if kind in ("nf4", "fp4") and model.quantization.double_quant:
        kind += " with double quantization"
    if model.quantization.embeddings == "int8":
        kind += ", embeddings in int8,"
    trained = adapters.parameters()
    dtype = str(trained[0].dtype).removeprefix("torch.")
    return [
        f"model: {model.config.model_type}, {kind} {model.quantized_bytes() / 1e6:.1f} MB; unquantized "
        f"{sum(plain.values()) / 1e6:.1f} MB ({largest}{', ...' if len(plain) > 3 else ''})",
        f"adapter: {len(adapters.layers)} linear modules, {sum(p.numel() for p in trained) / 1e6:.2f} M trained "
        f"weights in {dtype}; products in {str(model.compute_dtype).removeprefix('torch.')} on {model.device}",
    ]


def provenance(config: Config, model: CausalLM, data: RunData) -> dict[str, Any]:
    """What `qlora_tool.json` keeps beside the adapter: what it was trained on and how."""
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
        "block_size": BLOCK_SIZE,
        "compute_dtype": config.model.compute_dtype,
        "method": config.adapter.method,
        "data": {
            "train": data.train.report.files,
            "eval": {name: dataset.report.files for name, dataset in data.evaluations.items()},
        },
    }
