"""From a configuration to everything a run needs, cheapest checks first: data before weights, weights before files."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_tool import __version__
from qlora_tool.adapters.attach import AdapterSet, attach
from qlora_tool.adapters.peft_files import attach_stored, read_adapter
from qlora_tool.config import Config, with_values
from qlora_tool.data.tokenize import Dataset, build_dataset, build_evaluation_sets
from qlora_tool.errors import UserError
from qlora_tool.model.causal_lm import CausalLM
from qlora_tool.model.open import check_length, choose_device, choose_dtype, open_model, open_tokenizer
from qlora_tool.model.source import read_model_config, resolve
from qlora_tool.ops.quantized import BLOCK_SIZE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    """The configuration with every `auto` decided, so that training it again repeats the run."""
    device = choose_device(config.model.device)
    values: dict[str, Any] = {"model.compute_dtype": str(choose_dtype(config.model.compute_dtype, device)).split(".")[1]}
    if config.training.gradient_checkpointing == "auto":
        values["training.gradient_checkpointing"] = True
    return with_values(config, values)


def prepare_data(config: Config) -> RunData:
    """Read and tokenize the data, and check it against the model's configuration."""
    folder = resolve(config.model.name_or_path, config.model.revision)
    model_config = read_model_config(folder, config.model.trust_remote_code)
    check_length(model_config, config.data.max_length)
    tokenizer = open_tokenizer(folder, config.model.trust_remote_code)
    train = build_dataset(config.data.train, config.data, tokenizer)
    train, evaluations = build_evaluation_sets(config.data, tokenizer, train)
    vocabulary = model_config.get_text_config().vocab_size
    highest = max(max(example.input_ids) for example in train.examples)
    if highest >= vocabulary:
        raise UserError(
            f"{folder}: its tokenizer gives token {highest}, but the model knows only {vocabulary}; tokenizer and model "
            "do not belong together"
        )
    for dataset in (train, *evaluations.values()):
        for line in dataset.report.lines():
            logger.info(line)
    return RunData(tokenizer, train, evaluations)


def prepare_model(config: Config) -> tuple[CausalLM, AdapterSet]:
    """Read the base and put the adapters on it, ready to train."""
    model = open_model(config.model)
    if config.adapter.init_from:
        stored = read_adapter(Path(config.adapter.init_from))
        adapters = attach_stored(model.module, stored, model.compute_dtype)
        logger.info("adapter: starts from %s", stored.folder)
    else:
        adapters = attach(model.module, config.adapter, model.compute_dtype, config.training.seed)
    model.choose_loss()
    model.checkpoint_layers(bool(config.training.gradient_checkpointing))
    for line in describe(model, adapters):
        logger.info(line)
    return model, adapters


def describe(model: CausalLM, adapters: AdapterSet) -> list[str]:
    """What is kept and what is trained, in bytes, for the log."""
    plain = model.unquantized_bytes()
    largest = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in list(plain.items())[:3])
    kind = model.quantization.kind
    if kind in ("nf4", "fp4") and model.quantization.double_quant:
        kind += " with double quantization"
    trained = adapters.parameters()
    dtype = str(trained[0].dtype).removeprefix("torch.")
    return [
        f"model: {model.config.model_type}, {kind} {model.quantized_bytes() / 1e6:.1f} MB; unquantized "
        f"{sum(plain.values()) / 1e6:.1f} MB ({largest}{', ...' if len(plain) > 3 else ''})",
        f"adapter: {len(adapters.layers)} linear modules, {sum(p.numel() for p in trained) / 1e6:.2f} M trained weights "
        f"in {dtype}; products in {str(model.compute_dtype).removeprefix('torch.')} on {model.device}",
    ]


def provenance(config: Config, model: CausalLM, data: RunData) -> dict[str, Any]:
    """What `qlora_tool.json` keeps beside the adapter: what it was trained on and how."""
    from qlora_tool.model.kept_hashes import file_hashes

    return {
        "qlora_tool": __version__,
        "base": {
            "name_or_path": config.model.name_or_path,
            "revision": config.model.revision,
            "files": file_hashes(model.folder),
        },
        "quantization": config.model.quantization,
        "double_quant": config.model.double_quant,
        "block_size": BLOCK_SIZE,
        "compute_dtype": config.model.compute_dtype,
        "method": config.adapter.method,
        "data": {
            "train": data.train.report.files,
            "eval": {name: dataset.report.files for name, dataset in data.evaluations.items()},
        },
    }
