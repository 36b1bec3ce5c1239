"""The model of a run, its adapters on it, whether its tensors are read, random or fake."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qlora_tool.adapters.adapter import Adapter
from qlora_tool.adapters.attach import AdapterSet, attach
from qlora_tool.adapters.attach_stored import attach_stored
from qlora_tool.adapters.calibration import calibrated, is_kept, reads_data
from qlora_tool.adapters.fusion import tile_mlps
from qlora_tool.adapters.initial import refuse_other_places
from qlora_tool.adapters.lacking import started_fresh
from qlora_tool.adapters.peft_names import taken_for_experts
from qlora_tool.adapters.starts import WeightStart, start_facts, taken_out
from qlora_tool.adapters.targets import unmatched_patterns
from qlora_tool.adapters.trained_base import train_biases
from qlora_tool.config import Config
from qlora_tool.methods import METHODS
from qlora_tool.model.causal_lm import CausalLM
from qlora_tool.model.slots import Quantization
from qlora_tool.sizes import counted

if TYPE_CHECKING:
    from torch import Tensor

    from qlora_tool.data.examples import Example
    from qlora_tool.model.checkpointing import Recomputation

from qlora_tool.build.open import open_base
from qlora_tool.build.placement import SAME_ON_CPU, on_card
from qlora_tool.build.tensors import Tensors

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Built:
    """A model with what is trained on it.

    Attributes:
        remarks: what was asked for and could not be done, or costs more than usual, a line each.
    """

    model: CausalLM
    adapters: AdapterSet
    remarks: list[str]


@dataclass(frozen=True)
class Start:
    """What adapters may start from beside the model's files.

    Attributes:
        examples: of the training data.
        checkpoint: the tensors of the checkpoint that the run goes on from, by their names in it.
        dry: nothing is trained, so that what takes a pass through the data is not made.
    """

    examples: Sequence[Example] = ()
    checkpoint: Mapping[str, Tensor] | None = None
    dry: bool = False


def build(
    config: Config,
    model_config: Any,
    tensors: Tensors,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
    recomputation: Recomputation | None = None,
    around_recomputation: Callable[[], AbstractContextManager[None]] = nullcontext,
    start: Start | None = None,
) -> Built:
    """A model with its adapters, ready to train.

    Args:
        config: resolved.
        model_config: the model's transformers configuration; it stays as it is.
        tensors: where they come from.
        device: where everything lives.
        compute_dtype: what products run in.
        recomputation: what is recomputed in backward; by default what `gradient_checkpointing` says of all layers.
        around_recomputation: a context that is open while something is computed again.
        start: what adapters start from beside the model's files.

    Raises:
        UserError, MachineError: the base cannot be read, or the adapter does not fit it.
    """
    model, adapters, remarks = _with_adapters(config, model_config, tensors, device, compute_dtype, start or Start())
    remarks = [*_on_places(config, model, adapters), *remarks]
    if found := model.beyond_peft:
        remarks.append(
            f"model.quantization: {found}; transformers with bitsandbytes, and so PEFT, leaves them unquantized: this "
            "base differs from PEFT's; model.skip_modules: as-peft makes it the same"
        )
    if not tile_mlps(model.module, config.training.tiled_mlp) and config.training.tiled_mlp:
        remarks.append(
            f"training.tiled_mlp: nothing is tiled, as {model.config.model_type} with {config.adapter.method} has no "
            "gated MLP that runs as one operation (plain LoRA without dropout on all of its modules)"
        )
    remarks += _unlike_others(config, model, adapters)
    if not model.pads_apart:
        remarks.append(
            f"{model.config.model_type}: an example in a padded batch would not give what it gives alone; the rows of "
            "a batch go through the model one by one, which is slower"
        )
    if config.data.packing and not model.by_segment:
        remarks.append(
            f"data.packing: {model.config.model_type} keeps packed examples apart by masks of row by row, for which it "
            "takes more memory and time than families that attend to one segment at a time"
        )
    if not model.projects_plainly:
        remarks.append(
            f"{model.config.model_type} changes its logits before the loss: the loss takes the full logits, "
            "which needs more memory"
        )
    if config.training.offload_boundaries and not on_card(device):
        remarks.append("training.offload_boundaries: the model is in host memory already; nothing is moved")
    if config.model.weights == "host" and not on_card(device):
        remarks.append(SAME_ON_CPU)
    model.offload_boundaries = config.training.offload_boundaries and on_card(device)
    model.checkpoint_layers(recomputation or bool(config.training.gradient_checkpointing), around_recomputation)
    model.module.train()
    return Built(model, adapters, remarks)


def _with_adapters(
    config: Config, model_config: Any, tensors: Tensors, device: torch.device, compute_dtype: torch.dtype, start: Start
) -> tuple[CausalLM, AdapterSet, list[str]]:
    """The base with adapters on it as training starts or goes on, and what is to be said of their start."""
    if config.adapter.init_from:
        stored = tensors.adapter(Path(config.adapter.init_from))
        prepare = stored.prepare(compute_dtype) if tensors.makes_starts else None
        model = open_base(config.model, model_config, tensors, device, compute_dtype, prepare)
        model.module.quantized_without = stored.quantized_without
        adapters = attach_stored(model.module, stored, compute_dtype, config.adapter.lora_dropout, config.adapter,
                                 config.training.seed)  # fmt: skip
        # PEFT's file may lack biases that its configuration wants trained.
        adapters.biases |= train_biases(model.module, config.adapter.bias, adapters.layers, compute_dtype)
        refuse_other_places(model.module, adapters, config.adapter, stored)
        return model, adapters, [started_fresh(stored, adapters.fresh)] if adapters.fresh else []
    made = WeightStart.of(
        config.adapter, model_config, Quantization.of(config.model), compute_dtype, config.training.seed,
        config.model.trust_remote_code,
    ) if tensors.makes_starts else None  # fmt: skip
    prepare = taken_out(made, start.checkpoint) if made and start.checkpoint is not None else made
    model = open_base(config.model, model_config, tensors, device, compute_dtype, prepare)
    known, left = (made.tensors, made.not_reached()) if made else ({}, [])
    if tensors.makes_starts and reads_data(config.adapter) and start.checkpoint is None:
        read = tensors.unquantized(model_config, device)
        kept = config.model.keep_quantized and tensors.has_values
        if start.dry and not (kept and is_kept(model, device, config, start.examples)):
            logger.info("adapter.init_lora_weights: calibrated is made from the data when training begins, not in a "
                        "dry run")  # fmt: skip
        else:
            known, left = calibrated(model, config, start.examples, read, keep=tensors.has_values)
    elif start.checkpoint is not None:
        left = []  # said when the run began
    adapters = attach(model.module, config.adapter, compute_dtype, config.training.seed, known)
    if (start_facts(config.adapter) or {}).get("taken_out_of_base"):
        model.module.quantized_without = "this run's adapter"
    remarks = [
        f"adapter.init_lora_weights: {getattr(config.adapter, 'init_lora_weights', '')} has nothing to start from in "
        f"{len(left)} of {counted(len(adapters.layers), 'module')}, such as {left[0]}, which are not quantized or take "
        "no part in a layer; they start as with default"
    ] if left else []  # fmt: skip
    return model, adapters, remarks


def _on_places(config: Config, model: CausalLM, adapters: AdapterSet) -> list[str]:
    """What is to be said of where adapters sit."""
    lines = unmatched_patterns(adapters.layers, config.adapter)
    linears = [name for name, layer in adapters.layers.items() if type(layer) is Adapter]
    why = taken_for_experts(linears, model.config.get_text_config().model_type)
    if why and METHODS[config.adapter.method].peft_type == "LORA":
        lines.append(f"adapter.target_modules: {why} for PEFT's users")
    return lines


def _unlike_others(config: Config, model: CausalLM, adapters: AdapterSet) -> list[str]:
    """Where an adapter is not what one would take it for, a line each."""
    remarks = []
    outputs = (getattr(model.module.get_submodule(name), "o_proj", None) for name in adapters.layers)
    if any(getattr(output, "bias", None) is not None for output in outputs):
        remarks.append(
            f"adapter.method: {config.adapter.method}: o_proj has a bias here, which the prompts add once more, as "
            "under PEFT: training does not begin with what the base gives"
        )
    conv1d = [name for name in adapters.layers if getattr(model.module.get_submodule(name), "transposed", False)]
    if conv1d and not METHODS[config.adapter.method].peft_takes_conv1d:
        remarks.append(
            f"adapter.method: {config.adapter.method}: PEFT cannot load it onto transformers' Conv1D ({conv1d[0]} and "
            f"{len(conv1d) - 1} more here): this adapter is read by qlora-tool alone; export it merged for other tools"
        )
    return remarks
