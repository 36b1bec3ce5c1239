"""Read a checkpoint tensor by tensor into a model whose linear weights are quantized at once.

What is held at any time is the model so far and one group of tensors: never the whole model unquantized.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from qlora_tool.errors import UserError
from qlora_tool.files.tensors import Checkpoint
from qlora_tool.model.experts import expert_weight_names, is_experts_module, set_expert_weight, use_expert_handles
from qlora_tool.model.parameter_source import ParameterSource, tied_names
from qlora_tool.weights.modules import FrozenEmbedding, FrozenLinear, FrozenWeight
from qlora_tool.weights.quantized import QuantizedTensor, quantize

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qlora_tool.config import ModelConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Quantization:
    """How the base is kept: its linear weights in `kind` nf4, fp4, int8 or none; its `embeddings`, the output
    projection among them, as_stored or in int8."""

    kind: str = "nf4"
    double_quant: bool = True
    embeddings: str = "as_stored"

    @classmethod
    def of(cls, config: ModelConfig) -> Quantization:
        return cls(config.quantization, config.double_quant, config.embeddings)


@dataclass(frozen=True)
class Slot:
    """The place of one weight that may be quantized: `attribute` of the module named `module`.

    `transposed`: the model keeps it as (in, out), or (experts, in, out). `kind`: what it is quantized to whatever the
    linear weights are.
    """

    module: str
    attribute: str
    transposed: bool
    kind: str | None = None


def build_skeleton(config, trust_remote_code: bool = False, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model with its parameters on meta and its computed buffers (rotary frequencies, say) real.

    Args:
        config: its transformers configuration; what it says of quantization is taken out of it.
        trust_remote_code: whether code from the model's folder may run.
        dtype: of buffers that take the model's (gemma's embedding scale); None: as the configuration says.

    Raises:
        UserError: no causal language model, or weights that are quantized by another library than bitsandbytes.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if stored := getattr(config, "quantization_config", None):
        _refuse_other_quantizers(config.model_type, stored)
        del config.quantization_config  # the weights are read by us, whatever they are stored as
    try:
        # Outside of any mode: a skeleton weighs nothing, and a prediction must not see transformers fill it first.
        with _disable_current_modes(), init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code, dtype=dtype or config.dtype
            )
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"config.json, model type {config.model_type!r}: no causal language model can be made of it: {reason}"
        ) from error
    if getattr(model.config, "is_decoder", True) is False and config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise UserError(
            f"model type {config.model_type!r} is no causal language model: its tokens attend to those after them; "
            "choose a model that generates text"
        )
    return model


def _refuse_other_quantizers(model_type: str, stored) -> None:
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    method = getattr(method, "value", method) or "bitsandbytes"  # older files do not say
    if not str(method).startswith("bitsandbytes"):
        raise UserError(
            f"the {model_type} model's weights are quantized by {method}, which is not read; expected unquantized "
            "weights or bitsandbytes' (nf4, fp4, int8): name the model that this one was made from"
        )


def find_slots(model: PreTrainedModel) -> dict[str, Slot]:
    """The weights to quantize, by the name of their parameter: those of all linear modules and experts, except the
    output embeddings and what the model wants kept in fp32."""
    output = model.get_output_embeddings()
    slots = {}
    for name, module in model.named_modules():
        if module is output:
            continue
        if is_linear(module):
            slots[f"{name}.weight"] = Slot(name, "weight", not isinstance(module, nn.Linear))
        elif is_experts_module(module):
            for attribute in expert_weight_names(module):
                slots[f"{name}.{attribute}"] = Slot(name, attribute, module.is_transposed)
    return {name: slot for name, slot in slots.items() if not _stays_in_fp32(model, name)}


def _stays_in_fp32(model: PreTrainedModel, name: str) -> bool:
    wanted = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    return any(re.search(rf"(^|\.){re.escape(part)}(\.|$)", name) for part in wanted)


def find_embedding_slots(model: PreTrainedModel, quantization: Quantization) -> dict[str, Slot]:
    """The weights of input embeddings and output projection by the name of their parameter, where `quantization` keeps
    them in int8. What cannot be kept so stays as stored, with a warning; tied ones both do."""
    if quantization.embeddings == "as_stored":
        return {}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    slots, left = {}, []
    for module, fits, what in (
        (embedding, FrozenEmbedding.can_take_over(embedding), "the input embeddings"),
        (head, head is not None and is_linear(head), "the output projection"),
    ):
        name = names.get(id(module))
        if fits and not _stays_in_fp32(model, name):
            slots[name] = Slot(name.removesuffix(".weight"), "weight", not isinstance(module, nn.Embedding | nn.Linear),
                               "int8")  # fmt: skip
        else:
            left.append(f"{what} ({type(module).__name__ if module is not None else 'none'})")
    if len(slots) == 1 and any(slots.keys() & pair for pair in tied_names(model).items()):
        slots, left = {}, [*left, "what is tied to it"]
    if left:
        _warn_once(f"model.embeddings: int8, but in {model.config.model_type} {' and '.join(left)} cannot be kept so; "
                   "as stored")  # fmt: skip
    return slots


@functools.cache
def _warn_once(line: str) -> None:
    logger.warning(line)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a plain linear one: x·Wᵀ + b.

    Some classes that derive from nn.Linear compute something else with it (llama4's and phimoe's routers, for two):
    they stay as they are.
    """
    from transformers.pytorch_utils import Conv1D

    return type(module) in (nn.Linear, Conv1D) or type(module).__name__ == "FalconLinear"


def quantize_parameter(
    name: str, value: Tensor | QuantizedTensor, slot: Slot, quantization: Quantization
) -> QuantizedTensor | Tensor:
    """What a slot holds as it is kept: (out, in) or (experts, out, in), quantized unless `kind` is none.

    Raises:
        UserError: the checkpoint is quantized in another way than asked for.
    """
    kind = slot.kind or quantization.kind
    if isinstance(value, QuantizedTensor) and slot.kind not in (None, value.kind):
        value = value.dequantize(value.dtype)
        slot = replace(slot, transposed=False)
    if isinstance(value, QuantizedTensor):
        if (value.kind, value.double_quant) != (quantization.kind, quantization.double_quant) and not (
            value.kind == kind == "int8"
        ):
            double = " with double quantization" if value.double_quant else ""
            raise UserError(
                f"{name}: the checkpoint is already quantized as {value.kind}{double}; set "
                f"model.quantization: {value.kind} and model.double_quant: {str(value.double_quant).lower()}"
            )
        return value
    if slot.transposed:
        value = value.transpose(-1, -2).contiguous()
    if kind == "none":
        return value
    try:
        return quantize(value, kind, quantization.double_quant)
    except ValueError as error:
        key = "model.embeddings" if slot.kind else "model.quantization"
        raise UserError(f"{name}: {error}; choose another {key}") from error


def load_base(
    folder: Path,
    config,
    quantization: Quantization,
    device: torch.device,
    compute_dtype: torch.dtype,
    *,
    trust_remote_code: bool = False,
    checkpoint: Checkpoint | None = None,
    open_source: Callable[[PreTrainedModel, torch.device], ParameterSource] | None = None,
) -> PreTrainedModel:
    """Read a model folder into a frozen model on `device`, its linear weights quantized as they are read.

    What stays unquantized keeps its 16-bit dtype where it is large (embeddings) and takes `compute_dtype` where it is
    small (norms, biases), or fp32 where the family insists on it.

    Args:
        folder: the model's.
        config: its transformers configuration.
        quantization: how its weights are kept.
        device: where everything lives.
        compute_dtype: what products run in.
        checkpoint: the weights, where they are not the folder's own (a quantized base that was kept).
        open_source: what gives the tensors of a skeleton where no file does (a prediction has shapes alone).

    Raises:
        UserError: the configuration, the weights, or both together cannot be read as a causal language model.
    """
    model = build_skeleton(config, trust_remote_code, compute_dtype)
    slots = find_slots(model) | (embeddings := find_embedding_slots(model, quantization))
    if any(isinstance(module, nn.Module) and is_experts_module(module) for module in model.modules()):
        use_expert_handles(model)
    # The source plans on the skeleton's own names, before its modules change.
    if open_source is not None:
        source = open_source(model, device)
    else:
        source = ParameterSource(model, checkpoint or Checkpoint(folder), device)
    _replace_linears(model)
    for slot in embeddings.values():
        if isinstance(module := model.get_submodule(slot.module), nn.Embedding):
            FrozenEmbedding.take_over(module)
    for name in source.names:
        value = source.read(name)
        if name in slots:
            value = quantize_parameter(name, value, slots[name], quantization)
            if isinstance(value, Tensor):
                value = value.to(_kept_dtype(value, compute_dtype))
            elif name in embeddings:
                value = replace(value, dtype=compute_dtype)  # what rows are looked up in
            _place(model, name, FrozenWeight(value))
        elif isinstance(model.get_submodule(name.rpartition(".")[0]), FrozenLinear) and name.endswith(".weight"):
            if isinstance(value, Tensor):
                value = value.to(_kept_dtype(value, compute_dtype))
            _place(model, name, FrozenWeight(value))
        else:
            _place_plain(model, name, value, compute_dtype)
    _tie(model, compute_dtype)
    _place_buffers(model, device)
    model.requires_grad_(False)
    model.eval()
    return model


def _kept_dtype(value: Tensor, compute_dtype: torch.dtype) -> torch.dtype:
    """Large plain weights stay as they are stored, unless that is wider than the products need."""
    if not value.is_floating_point() or value.dtype.itemsize <= 2:
        return value.dtype
    return compute_dtype


def _replace_linears(model: PreTrainedModel) -> None:
    """Put a `FrozenLinear` without a weight in the place of every linear module."""
    for name, module in list(model.named_modules()):
        if is_linear(module):
            transposed = not isinstance(module, nn.Linear)  # Conv1D
            out_features, in_features = module.weight.shape[::-1] if transposed else module.weight.shape
            bias = module.bias if module.bias is None else nn.Parameter(module.bias, requires_grad=False)
            model.set_submodule(name, FrozenLinear(in_features, out_features, bias, transposed))


def _place(model: nn.Module, name: str, weight: FrozenWeight) -> None:
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(module, FrozenLinear | FrozenEmbedding):
        module.weight = weight
    else:
        set_expert_weight(module, attribute, weight)


def _place_plain(model: nn.Module, name: str, value: Tensor, compute_dtype: torch.dtype) -> None:
    """A parameter or persistent buffer that is neither a linear weight nor experts."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    if value.is_floating_point() and any(re.search(rule, name) for rule in model._keep_in_fp32_modules_strict or ()):
        value, compute_dtype = value.float(), torch.float32
    if attribute in module._buffers:
        module._buffers[attribute] = value
        return
    if type(module) is nn.Embedding:
        # Stored in 16 bits, looked up, and only then brought to the dtype of the products.
        value = value.to(_kept_dtype(value, compute_dtype))
        if value.dtype != compute_dtype:
            module.register_forward_hook(lambda _module, _input, output: output.to(compute_dtype))
    elif value.is_floating_point():
        value = value.to(compute_dtype)
    setattr(module, attribute, nn.Parameter(value, requires_grad=False))


def _tie(model: PreTrainedModel, compute_dtype: torch.dtype) -> None:
    """Give tied modules the one parameter they share.

    A checkpoint may hold it under either name, or under both; where the two differ the configuration is wrong, and they
    stay apart, as transformers leaves them.
    """
    for target, source in tied_names(model).items():
        found = _placed(model, target)
        if _placed(model, source) is None and isinstance(found, Tensor):
            _place_plain(model, source, found, compute_dtype)
        elif _placed(model, source) is None and found is not None:
            _place(model, source, found)
        shared = _placed(model, source)
        if shared is None:  # on meta, where nothing looks read
            shared = model.get_parameter(source)
        if _differ(found, shared):
            logger.warning("config.json ties %s to %s, but the checkpoint has both, and they differ: they stay apart",
                           target, source)  # fmt: skip
            model.all_tied_weights_keys.pop(target)
            continue
        module = model.get_submodule(target.rpartition(".")[0])
        if isinstance(module, FrozenLinear) and isinstance(shared, Tensor) and target.endswith(".weight"):
            shared = FrozenWeight(shared)
        setattr(module, target.rpartition(".")[2], shared)


def _differ(one: Tensor | FrozenWeight | None, other: Tensor | FrozenWeight) -> bool:
    if isinstance(one, FrozenWeight) and isinstance(other, FrozenWeight):
        return any(_differ(tensor, getattr(other, name)) for name, tensor in one.quantized.tensors().items())
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    return not torch.equal(one.to(other.dtype), other)


def _placed(model: nn.Module, name: str) -> nn.Parameter | FrozenWeight | None:
    """What was read for a parameter: itself (a linear module's too, where it is plain), a quantized weight, or None."""
    owner, _, attribute = name.rpartition(".")
    value = getattr(model.get_submodule(owner), attribute)
    if isinstance(value, FrozenWeight):
        return value if value.quantized else value.plain
    return None if value is None or value.is_meta else value


def _place_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                module._buffers[name] = buffer.to(device)
