"""The calibrated start: adapters that make good the quantization's error on inputs as the layers get them.

Some rows of the training data go once through the model, whose layers compute with their 16-bit weights, one after the
other: what is held is one layer in 16 bits, the second moments of its modules' inputs, and one batch of hidden states.
Source: QERA (Zhang et al. 2024, arXiv 2410.06040), CLoQ (Deng et al. 2025, arXiv 2501.18475); the fit itself is
`ops.low_rank.weighted_fit`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qlora_tool.adapters.adapter import generator_for
from qlora_tool.adapters.starts import reads_weights
from qlora_tool.adapters.targets import find_targets, settings_for
from qlora_tool.data.batches import Batch, collate
from qlora_tool.data.examples import Example
from qlora_tool.errors import MachineError, UserError
from qlora_tool.files.atomic import replacing_folder
from qlora_tool.files.cache import cache_folder, telling_unwritable
from qlora_tool.files.sealed import first_change, listing, read_sealed, write_sealed
from qlora_tool.files.tensors import SINGLE_NAME, read_all, write_all
from qlora_tool.methods import METHODS
from qlora_tool.methods.method import Method, Settings
from qlora_tool.model.cached_base import base_identity
from qlora_tool.model.checkpointing import decoder_layers
from qlora_tool.ops.low_rank import weighted_fit
from qlora_tool.weights.handles import WeightHandle
from qlora_tool.weights.modules import FrozenLinear
from qlora_tool.weights.quantized import QuantizedTensor

if TYPE_CHECKING:
    from qlora_tool.config import AdapterConfig, Config
    from qlora_tool.model.causal_lm import CausalLM

logger = logging.getLogger(__name__)

_LIST_NAME = "manifest.json"
MOST_TOKENS = 1 << 14  # of all rows together: four to thirty times the width of a layer
LENGTH = 512  # tokens of a block at most
CHUNK = 2048  # tokens that are brought to fp32 at a time

Read = Callable[[str], "Tensor | QuantizedTensor"]  # a parameter's name → its unquantized value, (out, in)


def calibration_batch(examples: Sequence[Example], rows: int, length: int) -> Batch:
    """The first rows of the data, their tokens one after the other, cut into blocks of one length: no padding, whose
    inputs would count, and no mask, which not every family takes.

    Args:
        examples: of the training data.
        rows: of them.
        length: tokens of a block at most.
    """
    tokens: list[int] = []
    for index in range(min(rows, len(examples))):
        tokens += examples[index].input_ids
        if len(tokens) >= MOST_TOKENS:
            break
    length = min(length, LENGTH, len(tokens))
    blocks = [tokens[begin : begin + length] for begin in range(0, min(len(tokens), MOST_TOKENS) - length + 1, length)]
    return collate([[Example(block, block, "calibration")] for block in blocks], pad_token_id=0, packing=False)


def reads_data(config: AdapterConfig) -> bool:
    """Whether adapters start from the data."""
    return getattr(config, "init_lora_weights", "") == "calibrated"


def start_tokens(config: Config, lengths: Iterable[int]) -> int | None:
    """How many tokens of the training data the adapters' start is made of: 0 where it is made of the weights alone,
    None where it is drawn, or an adapter goes on.

    Args:
        config: of the run.
        lengths: of the examples, in order.
    """
    adapter = config.adapter
    if adapter.init_from:
        return None
    if not reads_data(adapter):
        return 0 if reads_weights(adapter) else None
    total = 0
    for length in islice(lengths, adapter.calibration_rows):  # type: ignore[attr-defined]  # a key of LoRA's
        total += length
        if total >= MOST_TOKENS:
            return MOST_TOKENS
    return total


@torch.no_grad()
def calibrated(
    model: CausalLM, config: Config, examples: Sequence[Example], read: Read, *, keep: bool = True
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """A and B of every module that is quantized and sees an input, fp32, by its name; and the names of the others. With
    `keep_quantized` they are kept beside the base: the next run of the same model, data and settings reads them.

    Args:
        model: the quantized base, without adapters.
        config: of the run.
        examples: of its training data.
        read: gives unquantized weights.
        keep: False for weights of no model, from which nothing is kept.

    Raises:
        ValueError: no examples.
        UserError: the checkpoint is quantized already.
        MachineError: the device has no memory for the rows.
    """
    if not len(examples):
        raise ValueError("the calibrated start needs examples of the training data")
    method = METHODS[config.adapter.method]
    settings, batch = _settings(model, config), _batch(config, examples)
    kept = _kept(model, model.device, config, settings, batch) if keep and config.model.keep_quantized else None
    found: dict[str, dict[str, Tensor]] = {}
    if kept is not None and (start := _read_kept(kept)) is not None:
        for key, tensor in start.items():
            module, _, name = key.rpartition(".")
            found.setdefault(module, {})[name] = tensor.to(model.device)
        return found, [name for name in settings if name not in found]
    training, hooks = model.module.training, []
    model.module.train(False)
    for name, layer in decoder_layers(model.module).items():
        share = _LayerPass(name, layer, method, settings, read, model.compute_dtype, config.training.seed, found)
        hooks += [layer.register_forward_pre_hook(share.begin), layer.register_forward_hook(share.end)]
    try:
        model.hidden_states(batch.to(model.device))
    except torch.OutOfMemoryError as error:
        raise MachineError(
            f"adapter.init_lora_weights: calibrated: {batch.tokens} tokens of the training data do not fit beside the "
            "model in one layer's pass; lower adapter.calibration_rows"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        model.module.train(training)
    if kept is not None:
        with telling_unwritable(), replacing_folder(kept) as temporary:
            made = {f"{module}.{name}": tensor for module, own in found.items() for name, tensor in own.items()}
            write_all(temporary / SINGLE_NAME, made, {"format": "pt"})
            write_sealed(temporary / _LIST_NAME, {"files": listing(temporary)})
    return found, [name for name in settings if name not in found]


def is_kept(model: CausalLM, device: torch.device, config: Config, examples: Sequence[Example]) -> bool:
    """Whether the start of a run is kept with the quantized base already.

    Args:
        model: see `calibrated`; its weights are not asked for.
        device: where the run computes.
    """
    return (_kept(model, device, config, _settings(model, config), _batch(config, examples)) / SINGLE_NAME).exists()


def _settings(model: CausalLM, config: Config) -> dict[str, Settings]:
    return {name: settings_for(name, config.adapter) for name in find_targets(model.module, config.adapter)}


def _batch(config: Config, examples: Sequence[Example]) -> Batch:
    rows = config.adapter.calibration_rows  # type: ignore[attr-defined]  # a key of LoRA's
    return calibration_batch(examples, rows, config.data.max_length)


def _kept(
    model: CausalLM, device: torch.device, config: Config, settings: Mapping[str, Settings], batch: Batch
) -> Path:
    """Where a start is kept with the quantized base: a folder named by all that it is made of."""
    method = METHODS[config.adapter.method]
    modules = {name: [one.r, method.scaling(one), one.keys.model_dump()] for name, one in settings.items()}
    made_of = [base_identity(model.folder), str(model.quantization), str(model.compute_dtype), str(device.type),
               config.training.seed, modules, batch.input_ids.tolist()]  # fmt: skip
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "bases" / f"calibrated-{digest[:32]}"


def _read_kept(kept: Path) -> dict[str, Tensor] | None:
    """The tensors of a kept start; None where none is kept, or, with a warning, not as it was written."""
    if not kept.exists():
        return None
    try:
        changed = first_change(kept, read_sealed(kept / _LIST_NAME)["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        changed = f"{_LIST_NAME}: {error}"
    if changed is None:
        return read_all(kept / SINGLE_NAME)
    logger.warning("the start that is kept in %s is not as it was written (%s); it is made again", kept, changed)
    shutil.rmtree(kept, ignore_errors=True)
    return None


def _moments(x: Tensor) -> Tensor:
    """Σ x·xᵀ of (tokens, in), fp32, (in, in)."""
    total = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float32)
    for part in x.split(CHUNK):
        part = part.float()
        total.addmm_(part.T, part)
    return total


class _LayerPass:
    """One layer's share: its weights in 16 bits while it computes, then the fits of its modules."""

    def __init__(
        self, name: str, layer: nn.Module, method: Method, settings: Mapping[str, Settings], read: Read,
        dtype: torch.dtype, seed: int, found: dict[str, dict[str, Tensor]],
    ):  # fmt: skip
        self.handles = {f"{name}.{inner}": module for inner, module in layer.named_modules()
                        if isinstance(module, WeightHandle) and module.kind != "none"}  # fmt: skip
        self.linears = {f"{name}.{inner}": module for inner, module in layer.named_modules()
                        if isinstance(module, FrozenLinear) and f"{name}.{inner}" in settings
                        and f"{name}.{inner}.weight" in self.handles}  # fmt: skip
        self.method, self.settings, self.read, self.found = method, settings, read, found
        self.dtype, self.seed = dtype, seed
        self.moments: dict[str, Tensor] = {}
        self.shared: list[tuple[Tensor, Tensor]] = []  # inputs and their moments: siblings take one input
        self.weights: dict[str, Tensor] = {}
        self.hooks: list[torch.utils.hooks.RemovableHandle] = []

    def begin(self, *_: object) -> None:
        for name, handle in self.handles.items():
            value = self.read(name)
            if isinstance(value, QuantizedTensor):
                raise UserError(
                    f"adapter.init_lora_weights: calibrated needs unquantized weights, but {name} is already quantized "
                    f"as {value.kind} in the checkpoint; use the 16-bit model that it was made from"
                )
            handle.lend(value.to(self.dtype))
            if name.removesuffix(".weight") in self.linears:
                self.weights[name] = value
        for name, linear in self.linears.items():
            self.hooks.append(linear.register_forward_pre_hook(self._noting(name)))

    def _noting(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            (x,) = inputs
            known = next((moments for seen, moments in self.shared if seen is x), None)
            if known is None:
                self.shared.append((x, known := _moments(x.reshape(-1, x.shape[-1]))))
            self.moments[name] = self.moments[name] + known if name in self.moments else known

        return note

    def end(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()
        for handle in self.handles.values():
            handle.release()
        self.shared.clear()
        for name, moments in self.moments.items():
            settings, handle = self.settings[name], self.handles[f"{name}.weight"]
            error = self.weights[f"{name}.weight"].float() - handle.dense(torch.float32)
            generator = generator_for(self.seed, name)
            lora_B, lora_A = weighted_fit(error / self.method.scaling(settings), moments, settings.r, generator)
            self.found[name] = {"lora_A": lora_A, "lora_B": lora_B}
        self.weights.clear()
        self.moments.clear()
        self.hooks.clear()
