"""The weights of a model that may be quantized: where they are, and what is stored for each.

The loader and the merge both come here, so that what is merged onto is what was trained against.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from qlora_tool.errors import UserError
from qlora_tool.model.exceptions import (
    default_skips,
    is_named,
    left_by_bitsandbytes,
    stored_plain,
)
from qlora_tool.model.experts import expert_weight_names, is_experts_module
from qlora_tool.model.parameter_source import tied_names
from qlora_tool.model.text_part import is_outside, outside_text
from qlora_tool.once import log_once
from qlora_tool.sizes import counted, noun_of
from qlora_tool.weights.modules import FrozenEmbedding
from qlora_tool.weights.quantized import QuantizedTensor, quantize, quantized_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qlora_tool.config import ModelConfig

logger = logging.getLogger(__name__)

Prepare = Callable[[str, Tensor], Tensor]  # (name, weight) → the weight to quantize in its place


@dataclass(frozen=True)
class Quantization:
    """How the base is stored: its linear weights in `kind` nf4, fp4, int8 or none, but for the modules that
    `skip_modules` names (or `as-peft`); its `embeddings`, the output projection among them, as_stored or in int8."""

    kind: str = "nf4"
    double_quant: bool = True
    embeddings: str = "as_stored"
    skip_modules: str | tuple[str, ...] = ()

    @classmethod
    def of(cls, config: ModelConfig) -> Quantization:
        skipped = config.skip_modules
        names = skipped if isinstance(skipped, str) else tuple(skipped)
        return cls(config.quantization, config.double_quant, config.embeddings, names)


@dataclass(frozen=True)
class Slot:
    """The place of one weight that may be quantized: `attribute` of the module named `module`.

    Attributes:
        transposed: the model has it as (in, out), or (experts, in, out).
        kind: what it is quantized to whatever the linear weights are; none: it stays as it is stored.
        asked: whether the configuration named it to stay so.
        beyond_peft: whether transformers and bitsandbytes, and so PEFT, leave a weight like this unquantized.
    """

    module: str
    attribute: str
    transposed: bool
    kind: str | None = None
    asked: bool = False
    beyond_peft: bool = False

    def quantized_bytes(self, shape: Sequence[int], quantization: Quantization) -> int | None:
        """What a weight takes here, `shape` being the model's; None where it is not quantized."""
        kind = self.kind or quantization.kind
        if kind == "none":
            return None
        if self.transposed:
            shape = (*shape[:-2], shape[-1], shape[-2])
        return quantized_bytes(shape, kind, quantization.double_quant)


@dataclass(frozen=True)
class BeyondPeft:
    """Weights that are quantized here, and that transformers and bitsandbytes, under PEFT, leave unquantized: the base
    that an adapter is trained on is then another than PEFT's.

    Attributes:
        kind: nf4, fp4 or int8.
        weights: their names.
        bytes: what they take.
        unquantized_bytes: what they would take as they are stored.
    """

    kind: str
    weights: tuple[str, ...]
    bytes: int
    unquantized_bytes: int

    def __str__(self) -> str:
        names = sorted({re.sub(r"\.\d+(?=\.)", ".*", name) for name in self.weights})
        shown = f"{', '.join(names[:2])}{' …' if len(names) > 2 else ''}"
        count = len(self.weights)
        return (
            f"{counted(count, 'weight')} ({shown}) in {self.kind} {noun_of(count, 'takes', 'take')} "
            f"{self.bytes / 1e6:,.1f} MB instead of {self.unquantized_bytes / 1e6:,.1f} MB"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"kind": self.kind, "weights": len(self.weights),
                "names": sorted({re.sub(r"\.\d+(?=\.)", ".*", name) for name in self.weights}),
                "bytes": self.bytes, "unquantized_bytes": self.unquantized_bytes}  # fmt: skip


def find_slots(model: PreTrainedModel, quantization: Quantization | None = None) -> dict[str, Slot]:
    """The weights to quantize, by the name of their parameter: those of all linear modules and experts, except the
    output embeddings and what the model wants in fp32.

    Slots of kind `none` stay as they are stored: what the configuration names, a checkpoint's own exceptions, and what
    lies beside the text part (towers for images), which no training on text changes. Under PEFT that is quantized too.

    Args:
        model: a skeleton, its modules as transformers made them.
        quantization: how the rest is quantized.
    """
    quantization = quantization or Quantization()
    slots, as_peft = _all_slots(model), isinstance(quantization.skip_modules, str)
    outside = [] if as_peft else outside_text(model)
    asked = _asked_for(slots, quantization)
    plain = asked | stored_plain(model, slots) | {name for name in slots if is_outside(name, outside)}
    return {name: replace(slot, kind="none", asked=name in asked) if name in plain else slot
            for name, slot in slots.items()}  # fmt: skip


def _all_slots(model: PreTrainedModel) -> dict[str, Slot]:
    output, skipped = model.get_output_embeddings(), default_skips(model)
    slots = {}
    for name, module in model.named_modules():
        if module is output:
            continue
        if is_linear(module):
            beyond = left_by_bitsandbytes(module) or is_named(name, skipped)
            slots[f"{name}.weight"] = Slot(name, "weight", not isinstance(module, nn.Linear), beyond_peft=beyond)
        elif is_experts_module(module):
            for attribute in expert_weight_names(module):
                slots[f"{name}.{attribute}"] = Slot(name, attribute, module.is_transposed, beyond_peft=True)
    return {name: slot for name, slot in slots.items() if not _stays_in_fp32(model, name)}


def _asked_for(slots: dict[str, Slot], quantization: Quantization) -> set[str]:
    """The weights that the configuration wants unquantized."""
    wanted = quantization.skip_modules
    if isinstance(wanted, str):
        return {name for name, slot in slots.items() if slot.beyond_peft}
    return {name for name, slot in slots.items() if is_named(slot.module, wanted) or is_named(name, wanted)}


def _stays_in_fp32(model: PreTrainedModel, name: str) -> bool:
    wanted = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    return any(re.search(rf"(^|\.){re.escape(part)}(\.|$)", name) for part in wanted)


def find_embedding_slots(model: PreTrainedModel, quantization: Quantization) -> dict[str, Slot]:
    """The weights of input embeddings and output projection by the name of their parameter, where `quantization` keeps
    them in int8. What cannot be quantized stays as stored, with a warning; tied ones both do."""
    if quantization.embeddings == "as_stored":
        return {}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    slots, left = {}, []
    for module, fits, what in (
        (embedding, FrozenEmbedding.can_take_over(embedding), "the input embeddings"),
        (head, head is not None and is_linear(head), "the output projection"),
    ):
        name = names.get(id(module), "")
        if fits and not _stays_in_fp32(model, name):
            slots[name] = Slot(name.removesuffix(".weight"), "weight", not isinstance(module, nn.Embedding | nn.Linear),
                               "int8")  # fmt: skip
        else:
            left.append(f"{what} ({type(module).__name__ if module is not None else 'none'})")
    if len(slots) == 1 and any(slots.keys() & pair for pair in tied_names(model).items()):
        slots, left = {}, [*left, "what is tied to it"]
    if left:
        log_once(logger, logging.WARNING, f"model.embeddings: int8, but in {model.config.model_type} "
                 f"{' and '.join(left)} cannot be quantized and stay as they are stored")  # fmt: skip
    return slots


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a plain linear one: x·Wᵀ + b.

    Some classes that derive from nn.Linear compute something else with it (llama4's and phimoe's routers, for two):
    they stay as they are.
    """
    from transformers.pytorch_utils import Conv1D

    return type(module) in (nn.Linear, Conv1D) or type(module).__name__ == "FalconLinear"


def quantize_parameter(
    name: str, value: Tensor | QuantizedTensor, slot: Slot, quantization: Quantization, prepare: Prepare | None = None
) -> QuantizedTensor | Tensor:
    """What a slot holds: (out, in) or (experts, out, in), quantized unless `kind` is none.

    The loader and the merge both come here, so that what is merged onto is what was trained against.

    Args:
        name: of the parameter.
        value: as the checkpoint has it, in the model's own orientation; a `QuantizedTensor` as `quantize` makes it.
        slot: its place.
        quantization: how the base is quantized.
        prepare: a step before quantizing, given the name and the unquantized weight (out, in), or (experts, out, in),
            in the checkpoint's dtype; what it returns, of the same shape, is quantized in the weight's place.

    Raises:
        UserError: the checkpoint is quantized in another way than asked for, or is quantized and `prepare` is given.
    """
    kind = slot.kind or quantization.kind
    if isinstance(value, QuantizedTensor):
        if prepare is not None:
            raise UserError(
                f"{name}: the checkpoint is already quantized as {value.kind}, but the adapter's start changes weights "
                "before they are quantized; use the 16-bit model that the checkpoint was made from"
            )
        if slot.kind == "none":
            return _kept(name, value, slot)
        if slot.kind not in (None, value.kind):
            value, slot = value.dequantize(value.dtype), replace(slot, transposed=False)
        else:
            return _as_asked_for(name, value, kind, quantization)
    if slot.transposed:
        value = value.transpose(-1, -2).contiguous()
    dtype = value.dtype
    if prepare is not None:
        value = prepare(name, value)
    if kind == "none":
        return value.to(dtype)
    try:
        return replace(quantize(value, kind, quantization.double_quant), dtype=dtype)
    except ValueError as error:
        key = "model.embeddings" if slot.kind else "model.quantization"
        raise UserError(f"{name}: {error}; choose another {key}") from error


def _kept(name: str, value: QuantizedTensor, slot: Slot) -> QuantizedTensor:
    if slot.asked:
        raise UserError(
            f"model.skip_modules: {slot.module}: the checkpoint has it quantized as {value.kind} already, and its "
            f"unquantized values are gone; leave it out, or use the 16-bit model that the checkpoint was made from"
        )
    return value


def _as_asked_for(name: str, value: QuantizedTensor, kind: str, quantization: Quantization) -> QuantizedTensor:
    """A weight that the checkpoint holds quantized, refused where the configuration asks for another quantization."""
    found, asked = (value.kind, value.double_quant), (quantization.kind, quantization.double_quant)
    if len(value.shape) == 3 and value.kind == kind:  # experts joined from matrices; their scales are in fp32 again
        return value
    if found != asked and not value.kind == kind == "int8":
        double = " with double quantization" if value.double_quant else ""
        raise UserError(
            f"{name}: the checkpoint is already quantized as {value.kind}{double}; set "
            f"model.quantization: {value.kind} and model.double_quant: {str(value.double_quant).lower()}"
        )
    return value
