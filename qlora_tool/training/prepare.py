"""From a configuration to everything a run needs, cheapest checks first: data before weights, weights before files."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_tool._version import __version__
from qlora_tool.build import Built, Setup
from qlora_tool.config import Config, with_values
from qlora_tool.data.tokenize import Dataset, build_dataset, build_evaluation_sets
from qlora_tool.errors import UserError
from qlora_tool.model.causal_lm import CausalLM
from qlora_tool.model.open import check_length, open_tokenizer
from qlora_tool.model.source import resolve as resolve_model
from qlora_tool.model.tokenizer_check import check_on_data
from qlora_tool.weights.quantized import BLOCK_SIZE

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


def prepare_data(setup: Setup) -> tuple[RunData, Setup]:
    """Read and tokenize the data, and check it against the model's configuration.

    Returns:
        The data, and the setup with what they decide: a text found as such is trained on every token.
    """
    config = setup.config
    folder = resolve_model(config.model.name_or_path, config.model.revision, weights=False)
    data = read_run_data(config, folder, setup.model_config)
    for dataset in (data.train, *data.evaluations.values()):
        for line in dataset.report.lines():
            logger.info(line)
    decided = with_values(config, {"data.train_on": data.train.report.train_on})
    return data, replace(setup, config=decided)


def read_run_data(config: Config, folder: Path, model_config: Any, *, first: int | None = None) -> RunData:
    """The tokenized data of a run.

    Args:
        folder: the model's, which has the tokenizer.
        model_config: the model's transformers configuration; None where there is none to check the data against.
        first: read no more rows of a source than this.

    Raises:
        UserError: the data or the tokenizer is at fault, or they do not fit the model.
        MachineError: the hub cannot be reached.
    """
    if model_config is not None:
        check_length(model_config, config.data.max_length)
    tokenizer = open_tokenizer(folder, config.model.trust_remote_code)
    seed = config.training.seed
    train = build_dataset(config.data.train, config.data, tokenizer, first=first, seed=seed)
    check_on_data(tokenizer, folder, config.data.train)
    train, evaluations = build_evaluation_sets(config.data, tokenizer, train, first=first, seed=seed)
    data = RunData(tokenizer, train, evaluations)
    if model_config is not None:
        _refuse_foreign_tokens(data, folder, model_config.get_text_config().vocab_size)
    return data


def _refuse_foreign_tokens(data: RunData, folder: Path, vocabulary: int) -> None:
    datasets = (data.train, *data.evaluations.values())
    highest = max(dataset.highest_token for dataset in datasets)
    if highest >= vocabulary:
        raise UserError(
            f"{folder}: its tokenizer gives token {highest}, but the model's vocabulary has {vocabulary} tokens; "
            "use the tokenizer files that came with the model"
        )


def describe(built: Built, init_from: str | None) -> list[str]:
    """What is frozen and what is trained, in bytes, for the log."""
    model, adapters = built.model, built.adapters
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
        f"weights in {dtype}; matrix products in {str(model.compute_dtype).removeprefix('torch.')} on {model.device}",
        *([f"adapter: starts from {init_from}"] if init_from else []),
        *([f"kernels: {model.fused} of the family's own"] if model.device.type == "cuda" else []),
    ]


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
        "data": {
            "train": data.train.report.files,
            "eval": {name: dataset.report.files for name, dataset in data.evaluations.items()},
        },
    }
