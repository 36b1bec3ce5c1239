"""Merge an adapter into the base it was trained on, tensor by tensor from disk to disk.

W = dequantize(W₄) + Δ, added in fp32 and rounded once to the dtype of the files. Merging into requantized weights, or
into the original 16-bit ones, would lose what was learned: neither is what training saw.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qlora_tool.adapters.method import Adapter
from qlora_tool.adapters.peft_files import StoredAdapter, refuse_misfit
from qlora_tool.errors import UserError
from qlora_tool.model.load import ParameterSource, Quantization, Slot, find_slots, quantize_parameter, tied_names
from qlora_tool.model.names import SaveGroup, plan_save
from qlora_tool.model.tensor_files import Checkpoint, TensorSpec
from qlora_tool.ops.quantized import QuantizedTensor


@dataclass
class MergedModel:
    """The merged tensors of a model, under the names of its checkpoint, made one group at a time.

    Args:
        skeleton: the base's modules on meta.
        checkpoint: the base's weights.
        quantization: how the base was kept while the adapter was trained.
        adapter: to merge; None to export the dequantized base alone.
        base: `dequantized`: onto what was trained against; `original`: onto the checkpoint's own weights.
        dtype: of the files; None keeps the base's dtypes.

    Raises:
        UserError: the adapter is not for this base.
    """

    skeleton: torch.nn.Module
    checkpoint: Checkpoint
    quantization: Quantization
    adapter: StoredAdapter | None
    base: str = "dequantized"
    dtype: torch.dtype | None = None
    layers: Mapping[str, Adapter] = field(init=False)
    whole: Mapping[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.slots = find_slots(self.skeleton)
        self.linears = _linear_shapes(self.skeleton)
        self.source = ParameterSource(self.skeleton, self.checkpoint, "cpu")
        self.layers = self.adapter.layers(torch.float32) if self.adapter else {}
        self.whole = self.adapter.whole_tensors() if self.adapter else {}
        if self.adapter:
            refuse_misfit(self.adapter, self.layers, {name: shape for name, (shape, _) in self.linears.items()})
        self._biases = _bias_deltas(self.layers, self.source)
        tied = tied_names(self.skeleton)
        self.names = [name for name in self.source.names if name not in tied]
        for target, origin in tied.items():  # a file may hold either of the two
            if origin not in self.source.names and target in self.source.names:
                self.names.append(target)
            if target in self.whole:
                self.whole.setdefault(origin, self.whole[target])
        self.default_dtype = self.dtype or _common_dtype(self.source, self.skeleton)
        self.groups: list[SaveGroup] = plan_save(self.skeleton, self.names)

    def specs(self) -> list[list[TensorSpec]]:
        """What every group will write, without reading anything."""
        shapes = self.source.shapes
        result = []
        for group in self.groups:
            meta = {name: torch.empty(shapes[name], dtype=self._file_dtype(name), device="meta") for name in group.names}
            converted = group.convert(self.skeleton, meta)
            result.append([TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in converted.items()])
        return result

    def tensors(self, group: SaveGroup) -> dict[str, Tensor]:
        """The checkpoint tensors of one group, merged and rounded."""
        return group.convert(self.skeleton, {name: self._merged(name) for name in group.names})

    def _merged(self, name: str) -> Tensor:
        """One tensor of the model in the dtype of the files, in the orientation of the model."""
        value = self.source.read(name)
        dtype = self._file_dtype(name)
        if name in self.whole:
            return _rounded(name, self.whole[name].float(), dtype)
        slot = self.slots.get(name)
        layer = self.layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if name in self._biases:
            value = value.float() + self._biases[name]
        if slot is None and layer is None:
            return _rounded(name, value, dtype)
        if slot is not None:
            value = self._as_trained_against(name, value, slot)
        value = value.float()  # (out, in) or (experts, out, in)
        if layer is not None:
            value += layer.delta(value)
        if slot is not None and slot.transposed:
            value = value.transpose(-1, -2)
        return _rounded(name, value, dtype)

    def _as_trained_against(self, name: str, value: Tensor | QuantizedTensor, slot: Slot) -> Tensor:
        if self.base == "original":
            if isinstance(value, QuantizedTensor):
                raise UserError(
                    f"--base original: {self.checkpoint.folder} is itself quantized; merge onto a 16-bit checkpoint, or "
                    "leave --base at dequantized"
                )
            return value.transpose(-1, -2).contiguous() if slot.transposed else value
        kept = quantize_parameter(name, value, slot, self.quantization)
        return kept.dequantize(torch.float32) if isinstance(kept, QuantizedTensor) else kept

    def _file_dtype(self, name: str) -> torch.dtype:
        stored = self.source.stored_dtype(name)
        if name in self.slots or name in self.whole:
            return self.default_dtype
        return stored if self.dtype is None or not stored.is_floating_point else self.dtype


def _rounded(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 → the files' dtype, rounded once.

    Raises:
        UserError: a value does not fit.
    """
    rounded = value.to(dtype).contiguous()
    if dtype == torch.float16 and not rounded.isfinite().all():
        raise UserError(
            f"--dtype float16: {name} has values up to {float(value.abs().max()):.3g}, beyond float16's 65504; choose "
            "bfloat16 or float32"
        )
    return rounded


def _linear_shapes(skeleton: torch.nn.Module) -> dict[str, tuple[tuple[int, int], bool]]:
    """((out, in), transposed) of every linear module by name."""
    from transformers.pytorch_utils import Conv1D

    shapes = {}
    for name, module in skeleton.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)):
            transposed = isinstance(module, Conv1D)
            shape = tuple(module.weight.shape)
            shapes[name] = (shape[::-1] if transposed else shape, transposed)
    return shapes


def _bias_deltas(layers: Mapping[str, Adapter], source: ParameterSource) -> dict[str, Tensor]:
    """What adapters add to biases (PEFT's lora_bias), by parameter name."""
    deltas = {}
    for name, layer in layers.items():
        if (delta := layer.bias_delta()) is not None:
            if f"{name}.bias" not in source.names:
                raise UserError(f"{name}: the adapter adds a bias, but the model's module has none to merge it into")
            deltas[f"{name}.bias"] = delta
    return deltas


def _common_dtype(source: ParameterSource, skeleton: torch.nn.Module) -> torch.dtype:
    """The dtype of the base's files: what most of its unquantized values are stored in."""
    sizes: dict[torch.dtype, int] = {}
    for name in source.names:
        dtype = source.stored_dtype(name)
        if dtype.is_floating_point:
            sizes[dtype] = sizes.get(dtype, 0) + source.stored_bytes(name)
    if not sizes:
        return getattr(skeleton.config, "dtype", None) or torch.bfloat16
    return max(sizes, key=sizes.get)
