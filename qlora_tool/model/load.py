"""Read a checkpoint tensor by tensor into a model whose linear weights are quantized at once.

What is held at any time is the model so far and one group of tensors: never the whole model unquantized.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from qlora_tool.errors import UserError, printable
from qlora_tool.files.tensors import Checkpoint
from qlora_tool.model.config_file import NAME, keys_holding
from qlora_tool.model.experts import is_expert_weight, is_experts_module, use_expert_handles
from qlora_tool.model.parameter_source import ParameterSource, TensorSource, tied_names
from qlora_tool.model.slots import (
    BeyondPeft,
    Prepare,
    Quantization,
    Slot,
    find_embedding_slots,
    find_slots,
    is_linear,
    quantize_parameter,
)
from qlora_tool.model.stored import StoredAs
from qlora_tool.terminal import progress
from qlora_tool.weights.handles import WeightHandle
from qlora_tool.weights.modules import FrozenEmbedding, FrozenLinear
from qlora_tool.weights.quantized import QuantizedTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def attention_options(config) -> dict[str, str]:
    """Which attention transformers is to be told to take, as arguments of `from_config` and `from_pretrained`.

    Scores with a cap need `eager`: `sdpa` has none, and up to transformers 5.17 left the cap out without a word, where
    newer ones choose `eager` themselves.
    """
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    return {"attn_implementation": "eager"} if capped else {}


def auto_class(config) -> Any:
    """transformers' class that makes the model of a configuration: of a multimodal one that it has no causal language
    model for (Qwen's VL, Llava), the model for images and text."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    with_images = config.get_text_config() is not config and not config.get_text_config().is_encoder_decoder
    known = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys() - MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()
    return AutoModelForImageTextToText if with_images and config.model_type in known else AutoModelForCausalLM


class _NeverDropped:
    """Stands in for a `layerdrop` of 0: families draw a number for each layer and compare it with that (OPT, BioGPT,
    XGLM; some versions of transformers at 0 too). The answer is known without the number, which a prediction has not.
    """

    def __gt__(self, other: object) -> bool:
        return False


def _no_model(config: Any, error: Exception) -> str:
    """The line on a configuration that a family's code fails with."""
    folder = getattr(config, "name_or_path", "")
    file = Path(folder) / NAME if folder else NAME
    start = f"{file}, model type {config.model_type!r}: no causal language model can be made of it: "
    value = error.args[0] if isinstance(error, KeyError) and error.args else None
    if value is not None and (keys := keys_holding(config.to_dict(), value)):
        reason = f"{' and '.join(keys[:3])} is {value!r}, which transformers does not know"
    elif "padding_idx" in str(error).lower():  # torch's name for it
        reason = f"pad_token_id is {config.pad_token_id}, which is beyond its vocab_size"
    else:
        reason = " ".join(printable(str(error), 300).split()) or type(error).__name__
    return f"{start}{reason}; correct it, or download the model again"


def build_skeleton(config, trust_remote_code: bool = False, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model with its parameters on meta and its computed buffers (rotary frequencies, say) real.

    Args:
        config: its transformers configuration. What it says of quantization is noted on the model as `stored_as`.
        trust_remote_code: whether code from the model's folder may run.
        dtype: of buffers that take the model's (gemma's embedding scale); None: as the configuration says.

    Raises:
        UserError: no causal language model, or weights that are quantized in a form that cannot be read.
    """
    from accelerate import init_empty_weights
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    stored = StoredAs.of_config(config)
    if hasattr(config, "quantization_config"):
        config = copy.deepcopy(config)
        del config.quantization_config  # the weights are read by us, whatever they are stored as
    if getattr(config, "rescale_every", 0):
        # rwkv halves weights in place whenever it is evaluated, and states with them, for fp16's range alone.
        config = copy.deepcopy(config)
        config.rescale_every = 0
    try:
        # accelerate moves each parameter to meta once its module has made it, so it exists for a moment. Under a
        # prediction's modes that moment would count as memory of the run; a process that trains does not see it either,
        # as the memory is never touched. And buffers stay real, so that what they are computed from can be read off.
        with (_disable_current_modes(), torch.device("cpu"), init_empty_weights(include_buffers=False),
              _NothingDrawn()):  # fmt: skip
            model = auto_class(config).from_config(
                config, trust_remote_code=trust_remote_code, dtype=dtype or config.dtype, **attention_options(config)
            )
    except (ArithmeticError, LookupError, ValueError, TypeError, AttributeError, RuntimeError, AssertionError) as error:
        raise UserError(_no_model(config, error)) from error
    model.stored_as = stored
    for module in model.modules():
        if vars(module).get("layerdrop") == 0:
            module.layerdrop = _NeverDropped()
    if getattr(model.config, "is_decoder", True) is False and config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise UserError(
            f"model type {config.model_type!r} is not a causal language model: its tokens attend to those after them; "
            "choose a model that generates text"
        )
    return model


class _NothingDrawn(TorchFunctionMode):
    """Parameters on meta, which hold nothing, are not filled with random numbers: PyTorch takes a third of a
    millisecond for each."""

    _DRAWS = frozenset({"normal_", "uniform_", "kaiming_uniform_"})  # PyTorch's, or what transformers puts there

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in self._DRAWS:
            drawn = args[0] if args else kwargs["tensor"]
            if drawn.is_meta:
                return drawn
        return func(*args, **kwargs)


def load_base(
    folder: Path,
    config,
    quantization: Quantization,
    device: torch.device,
    compute_dtype: torch.dtype,
    *,
    trust_remote_code: bool = False,
    checkpoint: Checkpoint | None = None,
    open_source: Callable[[PreTrainedModel, torch.device], TensorSource] | None = None,
    prepare: Prepare | None = None,
    streams: Callable[[Loading], Apart] | None = None,
) -> PreTrainedModel:
    """Read a model folder into a frozen model on `device`, its linear weights quantized as they are read.

    What stays unquantized keeps its 16-bit dtype where it is large (embeddings) and takes `compute_dtype` where it is
    small (norms, biases), or fp32 where the family insists on it.

    Args:
        folder: the model's.
        config: its transformers configuration.
        quantization: how its weights are quantized.
        device: where everything lives.
        compute_dtype: what products run in.
        checkpoint: the weights, where they are not the folder's own (a cached quantized base).
        open_source: gives the tensors of a skeleton in the place of a checkpoint (a prediction has shapes alone).
        prepare: a step before quantizing; see `quantize_parameter`.
        streams: what puts weights in their places that are not held on the device.

    Raises:
        UserError: the configuration, the weights, or both together cannot be read as a causal language model.
    """
    loading = Loading.begin(
        folder, config, quantization, device, compute_dtype, trust_remote_code=trust_remote_code,
        checkpoint=checkpoint, open_source=open_source, prepare=prepare,
    )  # fmt: skip
    apart = streams(loading) if streams else None
    names = list(loading.source.names)
    with progress("quantizing" if loading.slots and checkpoint is None else "reading weights", len(names),
                  "tensors") as bar:  # fmt: skip
        for name in names:
            if apart is None or not apart.place(name):
                loading.place(name)
            bar.advance()
    if apart is not None:
        apart.finish()
    return loading.finish()


class Apart(Protocol):
    """What places the weights of a base that are not held on its device."""

    def place(self, name: str) -> bool:
        """Put a weight in its place in the model; False for one that is held on the device."""
        ...

    def finish(self) -> None:
        """All weights are in their places."""
        ...


@dataclass
class Loading:
    """A model whose tensors are put in their places one by one.

    Attributes:
        model: a skeleton, whose linear modules wait for their weights.
        source: gives the tensors.
        slots: of the weights that are quantized.
        embeddings: those of them that are rows to be looked up.
        quantization: how.
        compute_dtype: what products run in.
        device: where everything lives.
        prepare: see `quantize_parameter`.
    """

    model: PreTrainedModel
    source: TensorSource
    slots: Mapping[str, Slot]
    embeddings: Mapping[str, Slot]
    quantization: Quantization
    compute_dtype: torch.dtype
    device: torch.device
    prepare: Prepare | None
    _beyond: dict[str, tuple[int, int]] = field(default_factory=dict)  # bytes as quantized and as stored

    @classmethod
    def begin(
        cls, folder: Path, config: Any, quantization: Quantization, device: torch.device, compute_dtype: torch.dtype, *,
        trust_remote_code: bool = False, checkpoint: Checkpoint | None = None,
        open_source: Callable[[PreTrainedModel, torch.device], TensorSource] | None = None,
        prepare: Prepare | None = None,
    ) -> Loading:  # fmt: skip
        """For the arguments see `load_base`."""
        model = build_skeleton(config, trust_remote_code, compute_dtype)
        slots = find_slots(model, quantization) | (embeddings := find_embedding_slots(model, quantization))
        if any(is_experts_module(module) for module in model.modules()):
            use_expert_handles(model)
        # The source plans on the skeleton's own names, before its modules change.
        if open_source is not None:
            source = open_source(model, device)
        else:
            source = ParameterSource(model, checkpoint or Checkpoint(folder), device)
        _replace_linears(model)
        for slot in embeddings.values():
            if isinstance(module := model.get_submodule(slot.module), nn.Embedding):
                FrozenEmbedding.take_over(module, compute_dtype, device)
        return cls(model, source, slots, embeddings, quantization, compute_dtype, device, prepare)

    def place(self, name: str) -> None:
        """Read a tensor, quantize it where it is to be, and put it in its place."""
        value = self.source.read(name)
        if name in self.slots:
            stored, slot = value, self.slots[name]
            value = quantize_parameter(name, value, slot, self.quantization, self.prepare)
            if slot.beyond_peft and isinstance(stored, Tensor) and isinstance(value, QuantizedTensor):
                self._beyond[name] = (sum(tensor.nbytes for tensor in value.tensors().values()), stored.nbytes)
            del stored
        if name in self.embeddings and isinstance(value, QuantizedTensor):
            value = replace(value, dtype=self.compute_dtype)  # what rows are looked up in
        _place(self.model, name, value, self.compute_dtype)

    def put(self, name: str, handle: WeightHandle) -> None:
        """Put the handle of a weight that is held elsewhere in its place."""
        _place(self.model, name, handle, self.compute_dtype)

    def finish(self) -> PreTrainedModel:
        """The model, frozen, once all is placed."""
        model = self.model
        _tie(model, self.source, self.compute_dtype)
        _place_buffers(model, self.device)
        if self._beyond:
            quantized, unquantized = (sum(sizes) for sizes in zip(*self._beyond.values(), strict=True))
            model.beyond_peft = BeyondPeft(self.quantization.kind, tuple(self._beyond), quantized, unquantized)
        model.requires_grad_(False)
        model.eval()
        return model


def read_unquantized(
    folder: Path, config, device: torch.device, trust_remote_code: bool = False,
    open_source: Callable[[PreTrainedModel, torch.device], TensorSource] | None = None,
) -> Callable[[str], Tensor | QuantizedTensor]:  # fmt: skip
    """What reads a model folder's weights one by one as they are before they are quantized, by parameter name: (out,
    in), or (experts, out, in); one that is quantized in the files already comes as that. `open_source`: see
    `load_base`."""
    model = build_skeleton(config, trust_remote_code)
    slots = find_slots(model)
    source = ParameterSource(model, Checkpoint(folder), device) if open_source is None else open_source(model, device)

    def read(name: str) -> Tensor | QuantizedTensor:
        value = source.read(name)
        turned = isinstance(value, Tensor) and name in slots and slots[name].transposed
        return value.transpose(-1, -2).contiguous() if turned else value

    return read


def frozen_skeleton(config, trust_remote_code: bool = False) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The model without weights twice: as transformers makes it, and with a `FrozenLinear` in the place of every linear
    module, as a model that is read has it."""
    plain, frozen = (build_skeleton(config, trust_remote_code) for _ in range(2))
    _replace_linears(frozen)
    return plain, frozen


def _replace_linears(model: PreTrainedModel) -> None:
    """Put a `FrozenLinear` without a weight in the place of every linear module."""
    for name, module in list(model.named_modules()):
        if is_linear(module):
            transposed = not isinstance(module, nn.Linear)  # Conv1D
            out_features, in_features = module.weight.shape[::-1] if transposed else module.weight.shape
            bias = module.bias if module.bias is None else nn.Parameter(module.bias, requires_grad=False)
            model.set_submodule(name, FrozenLinear(in_features, out_features, bias, transposed))


def _place(
    model: PreTrainedModel, name: str, value: Tensor | QuantizedTensor | WeightHandle, compute_dtype: torch.dtype
) -> None:
    """Put the value of a parameter or persistent buffer in its place, in the form and dtype it has there.

    - Linear weights, int8 embeddings and experts: behind handles, as stored where that is not wider than products need.
    - What the family insists on in fp32: in fp32.
    - Embeddings: as stored, too, and looked up rows in the products' dtype.
    - Other parameters: in the products' dtype; buffers as stored.

    A parameter that is in its dtype already stays the same object, so that tied modules share it.
    """
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    is_weight = isinstance(module, FrozenLinear | FrozenEmbedding) and attribute == "weight"
    if is_weight or is_expert_weight(module, value.shape):
        value = narrowed(value, compute_dtype) if isinstance(value, Tensor) else value
        module._parameters.pop(attribute, None)
        if not isinstance(value, WeightHandle):
            value = WeightHandle(value, handle_dtype(model, name, compute_dtype))
        setattr(module, attribute, value)
        return
    if isinstance(value, QuantizedTensor):  # of a module that does more with its weight than multiply by it
        value = value.dequantize(value.dtype)
    elif isinstance(value, WeightHandle):
        value = value.dense(compute_dtype)
    if value.is_floating_point():
        if _is_kept_in_fp32(model, name):
            value = value.float()
        elif type(module) is nn.Embedding:
            value = narrowed(value, compute_dtype)
            if value.dtype != compute_dtype:
                module.register_forward_hook(lambda _module, _input, rows: rows.to(compute_dtype))
        elif attribute not in module._buffers:
            value = value.to(compute_dtype)
    if attribute in module._buffers:
        module._buffers[attribute] = value
    else:
        is_parameter = isinstance(value, nn.Parameter)
        setattr(module, attribute, value if is_parameter else nn.Parameter(value, requires_grad=False))


def handle_dtype(model: PreTrainedModel, name: str, compute_dtype: torch.dtype) -> torch.dtype:
    """What products with a weight behind a handle run in."""
    return torch.float32 if _is_kept_in_fp32(model, name) else compute_dtype


def _is_kept_in_fp32(model: PreTrainedModel, name: str) -> bool:
    return any(re.search(rule, name) for rule in model._keep_in_fp32_modules_strict or ())


def narrowed(value: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """A large weight as it is stored, unless that is wider than the products need."""
    wide = value.is_floating_point() and value.dtype.itemsize > 2
    return value.to(compute_dtype) if wide else value


def _tie(model: PreTrainedModel, source: TensorSource, compute_dtype: torch.dtype) -> None:
    """Give tied modules the one weight they share.

    A checkpoint may hold it under either name, or under both; where the two differ the configuration is wrong, and they
    stay apart, as transformers leaves them.
    """
    stored = set(source.names)
    for target, origin in tied_names(model).items():
        found = stored & {target, origin}
        if found == {target}:
            _place(model, origin, _placed(model, target), compute_dtype)
        elif len(found) == 2 and source.has_values and _differ(_placed(model, target), _placed(model, origin)):
            logger.warning("config.json ties %s to %s, but the checkpoint has both, and they differ: they stay apart",
                           target, origin)  # fmt: skip
            model.all_tied_weights_keys.pop(target)
            continue
        if found:
            _place(model, target, _placed(model, origin), compute_dtype)


def _placed(model: PreTrainedModel, name: str) -> Tensor | WeightHandle:
    """What holds the value of a parameter: itself, also where it lies in a handle, or the handle of a quantized one."""
    owner, _, attribute = name.rpartition(".")
    value = getattr(model.get_submodule(owner), attribute)
    stored = value.stored() if isinstance(value, WeightHandle) else value
    return stored if isinstance(stored, Tensor) else value


def _differ(one: Tensor | WeightHandle, other: Tensor | WeightHandle) -> bool:
    """Whether two stored weights do; one that is quantized and one that is not are not compared."""
    if isinstance(one, WeightHandle) and isinstance(other, WeightHandle):
        return any(not torch.equal(tensor, other.tensors()[name]) for name, tensor in one.tensors().items())
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return not torch.equal(one.to(other.dtype), other)
    return False


def _place_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                module._buffers[name] = buffer.to(device)
