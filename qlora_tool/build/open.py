"""A base as it computes, and with a stored adapter on it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from qlora_tool.adapters.attach_stored import attach_stored, refuse_not_repeated
from qlora_tool.adapters.resized import fitting_config
from qlora_tool.adapters.stored import StoredAdapter
from qlora_tool.config import ModelConfig
from qlora_tool.model.behaviour import behaviour_of
from qlora_tool.model.by_example import keep_mixers_apart
from qlora_tool.model.causal_lm import CausalLM
from qlora_tool.model.devices import choose_device
from qlora_tool.model.fused_modules import fuse_modules
from qlora_tool.model.open import choose_dtype
from qlora_tool.model.positions import rotate_by_example
from qlora_tool.model.resized import rows_in_files
from qlora_tool.model.segments import leave_out_cudnn
from qlora_tool.model.slots import Prepare, Quantization
from qlora_tool.model.source import read_model_config

if TYPE_CHECKING:

    pass

from qlora_tool.build.placement import SAME_ON_CPU, on_card
from qlora_tool.build.tensors import FromFiles, Tensors

logger = logging.getLogger(__name__)


def open_model(config: ModelConfig, adapter: StoredAdapter | None = None) -> CausalLM:
    """A model as it answers and is evaluated, with a stored adapter on it where there is one.

    Raises:
        UserError, MachineError: the base cannot be read, or the adapter does not fit it.
    """
    device = choose_device(config.device)
    tensors = FromFiles(config)
    model_config = read_model_config(tensors.folder, config.trust_remote_code)
    model_config = fitting_config(model_config, adapter, config.trust_remote_code)
    prepare = None if adapter is None else adapter.prepare()
    if config.weights == "disk" and (prepare is not None or rows_in_files(model_config) is not None):
        logger.warning("model.weights: disk: %s brings a base of its own, which is not kept on the disk; all of it is "
                       "held in memory", adapter.folder if adapter else "the model")  # fmt: skip
        tensors.config = config = config.model_copy(update={"weights": "resident"})
    if config.weights == "host" and not on_card(device):
        logger.info(SAME_ON_CPU)
    model = open_base(config, model_config, tensors, device, choose_dtype(config.compute_dtype, device), prepare)
    if adapter is not None:
        refuse_not_repeated(adapter, getattr(prepare, "reached", ()))
        model.module.quantized_without = adapter.quantized_without
        attach_stored(model.module, adapter)
    return model


def open_base(
    config: ModelConfig, model_config: Any, tensors: Tensors, device: torch.device, compute_dtype: torch.dtype,
    prepare: Prepare | None = None,
) -> CausalLM:  # fmt: skip
    """The base as it computes, without adapters: every example by itself, fused where its family can be."""
    if device.type == "cuda":
        leave_out_cudnn()
    behaviour = behaviour_of(model_config, config.trust_remote_code)
    quantization = Quantization.of(config)
    module = tensors.base(model_config, quantization, device, compute_dtype, prepare)
    keep_mixers_apart(module)
    rotate_by_example(module)
    return CausalLM(
        module, tensors.folder, quantization, compute_dtype,
        projects_plainly=behaviour.projects_plainly, by_segment=behaviour.keeps_apart == "segments",
        pads_apart=behaviour.pads_apart, fused=fuse_modules(module), draws=behaviour.draws,
    )  # fmt: skip
