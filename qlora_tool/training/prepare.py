"""From a configuration to everything a run needs, cheapest checks first: data before weights, weights before files."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from qlora_tool._version import __version__
from qlora_tool.adapters.starts import start_facts
from qlora_tool.build.build import Built
from qlora_tool.build.setup import Setup
from qlora_tool.config import Config, with_values
from qlora_tool.model.causal_lm import CausalLM
from qlora_tool.model.source import resolve as resolve_model
from qlora_tool.training.run_data import RunData, read_run_data
from qlora_tool.weights.quantized import BLOCK_SIZE

logger = logging.getLogger(__name__)


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
    if left := model.left_linears:
        kind += f", {left} linear modules left as stored,"
    trained = adapters.parameters()
    dtype = str(trained[0].dtype).removeprefix("torch.")
    return [
        f"model: {model.config.model_type}, {kind} {model.quantized_bytes() / 1e6:.1f} MB; unquantized "
        f"{sum(plain.values()) / 1e6:.1f} MB ({largest}{', ...' if len(plain) > 3 else ''})",
        f"adapter: {adapters.places}, {sum(p.numel() for p in trained) / 1e6:.2f} M trained "
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
        **({"start": start} if (start := start_facts(config.adapter)) else {}),
        "chat_template_kwargs": config.data.chat_template_kwargs,
        "data": {
            "train": data.train.report.files,
            "eval": {name: dataset.report.files for name, dataset in data.evaluations.items()},
        },
    }
