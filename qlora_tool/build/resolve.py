"""What a run does where that differs from what was asked, decided before weights or data are read."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from qlora_tool.adapters.initial import initial_settings, started_from
from qlora_tool.adapters.lacking import further_targets
from qlora_tool.adapters.stored import StoredAdapter
from qlora_tool.config import Config, ModelConfig, with_values
from qlora_tool.model.behaviour import behaviour_of
from qlora_tool.once import log_once

if TYPE_CHECKING:

    pass


logger = logging.getLogger(__name__)


def resolve(
    config: Config, model_config: Any, device_type: str, compute_dtype: torch.dtype | None = None
) -> Config:
    """The configuration as it will be run, so that training it again repeats the run.

    `gradient_checkpointing: auto` stays where it depends on memory: the numbers are the same whatever is recomputed.

    Args:
        model_config: the model's transformers configuration.
        device_type: cuda or cpu.
        compute_dtype: what products run in there; None: as the configuration has it.

    Raises:
        UserError: an adapter to start from that contradicts what was asked for.
    """
    values: dict[str, Any] = {} if compute_dtype is None else {"model.compute_dtype": name_of(compute_dtype)}
    chosen_later = config.training.max_memory is not None or device_type == "cuda"  # when the largest batch is known
    if config.training.gradient_checkpointing == "auto" and not chosen_later:
        values["training.gradient_checkpointing"] = recomputes = _recomputes(config, model_config)
        if not recomputes:
            logger.warning("training.gradient_checkpointing: %s has no layers that can be recomputed; what they "
                           "save for backward is kept", model_config.model_type)  # fmt: skip
    if (stored := started_from(config.adapter)) is not None:
        further = further_targets(stored, model_config, config.model.trust_remote_code)
        values |= initial_settings(stored, config.adapter, further)
        values |= _initial_base(stored, config.model)
    if not packs(config, model_config):
        values["data.packing"] = False
    return with_values(config, values)


def packs(config: Config, model_config: Any) -> bool:
    """Whether rows are packed: where that is asked for and the family can. Where it cannot, a warning says so."""
    if config.data.packing and not packs_apart(config, model_config):
        log_once(logger, logging.WARNING, f"data.packing: in a {model_config.model_type} model packed examples would "
                                          "attend to one another; rows are padded instead")  # fmt: skip
        return False
    return config.data.packing


def _initial_base(stored: StoredAdapter, config: ModelConfig) -> dict[str, Any]:
    """What the base of an adapter to start from had unquantized: what PEFT leaves, where it is PEFT's."""
    provenance = stored.provenance
    found = "as-peft" if provenance is None else provenance.get("skip_modules", [])
    if config.quantization == "none" or found == config.skip_modules:
        return {}
    if "skip_modules" not in config.model_fields_set:
        return {"model.skip_modules": found}
    logger.warning("model.skip_modules: %s, but %s, which adapter.init_from names, was trained on a base with %s: it "
                   "goes on from other answers than it gave", config.skip_modules, stored.folder, found)  # fmt: skip
    return {}


def _recomputes(config: Config, model_config: Any) -> bool:
    return behaviour_of(model_config, config.model.trust_remote_code).recomputes


def packs_apart(config: Config, model_config: Any) -> bool:
    """Whether the model keeps examples apart that lie in one row; attention in chunks of fixed places (llama4) cuts
    them where a row is longer than a chunk."""
    chunk = getattr(model_config.get_text_config(), "attention_chunk_size", None)
    if chunk is not None and config.data.max_length > chunk:
        return False
    return behaviour_of(model_config, config.model.trust_remote_code).keeps_apart is not None


def goes_without_padding(config: Config, model_config: Any) -> bool:
    """Whether rows that are not packed are laid one after the other: where that is asked for and attention goes by
    segment. A family that needs masks would get one of all rows by all rows, larger than those of the rows together."""
    by_segment = behaviour_of(model_config, config.model.trust_remote_code).keeps_apart == "segments"
    return config.data.padding_free and by_segment


def name_of(dtype: torch.dtype) -> str:
    """A dtype as configurations have it: bfloat16."""
    return str(dtype).removeprefix("torch.")
