"""The one quantized-weight type: nf4, fp4 and int8, two- and three-dimensional.

Codes and scales are bit-identical to bitsandbytes' (`ops/quantization.py`); the operations also have shape-only
versions, so a `QuantizedTensor` may hold meta and fake tensors. On disk it is bitsandbytes' own form.

A three-dimensional weight (experts, out, in) is quantized expert by expert, each as bitsandbytes would quantize that
matrix alone: no block straddles two experts, and one expert is dequantized without touching the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from bitsandbytes.utils import pack_dict_to_tensor, unpack_tensor_to_dict
from torch import Tensor

from qlora_tool.ops.quantization import (
    DTYPES,
    NESTED_BLOCK_SIZE,
    code_values,
    dequantize_4bit,
    dequantize_int8,
    quantize_4bit,
    quantize_int8,
    quantize_scales,
)

KINDS = ("nf4", "fp4", "int8")
# Of a weight's description in a file whose size is known before its values, and more for each expert's offset in it.
STATE_BYTES, OFFSET_BYTES = 256, 32
BLOCK_SIZE = 64  # weights that share one scale (QLoRA, section 3)


@dataclass(frozen=True)
class QuantizedTensor:
    """A frozen weight of `shape` (out, in) or (experts, out, in), stored in 4 or 8 bits.

    Attributes:
        kind: nf4, fp4 or int8.
        shape: the shape of the weight it stands for.
        dtype: the dtype the weight had before.
        codes: 4-bit: uint8 (n/2,) or (experts, n/2), two weights a byte, the first in the high half.
            int8: int8, of `shape`.
        scales: 4-bit: one a block of 64, (blocks,) or (experts, blocks), fp32, or uint8 under double quantization.
            int8: one a row, fp32, `shape[:-1]`.
        nested_scales: fp32, one for 256 scales; None without double quantization.
        nested_offset: fp32, the mean of the scales, () or (experts,); None without double quantization.
        block_size: weights that share a scale; 0 for int8.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    codes: Tensor
    scales: Tensor
    nested_scales: Tensor | None = None
    nested_offset: Tensor | None = None
    block_size: int = BLOCK_SIZE

    @property
    def double_quant(self) -> bool:
        return self.nested_scales is not None

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def tensors(self) -> dict[str, Tensor]:
        """The tensors it is made of, by field name."""
        named = {name: getattr(self, name) for name in ("codes", "scales", "nested_scales", "nested_offset")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> QuantizedTensor:
        """The same weight with `function` applied to each of its tensors (to another device, say)."""
        return self._with({name: function(tensor) for name, tensor in self.tensors().items()})

    def _with(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...] | None = None) -> QuantizedTensor:
        """The same kind of weight, made of other tensors."""
        return QuantizedTensor(
            self.kind, shape or self.shape, self.dtype, tensors["codes"], tensors["scales"],
            tensors.get("nested_scales"), tensors.get("nested_offset"), self.block_size,
        )  # fmt: skip

    def expert(self, index: int) -> QuantizedTensor:
        """One expert's matrix (out, in) of a three-dimensional weight; its tensors are views."""
        return self._with({name: tensor[index] for name, tensor in self.tensors().items()}, self.shape[1:])

    def experts(self, first: int, stop: int) -> QuantizedTensor:
        """The experts from `first` up to `stop` of a three-dimensional weight; its tensors are views."""
        return self._with({name: tensor[first:stop] for name, tensor in self.tensors().items()},
                          (stop - first, *self.shape[1:]))  # fmt: skip

    def dequantize_at_once(self, dtype: torch.dtype) -> Tensor:
        """All of a three-dimensional weight, as `dequantize` gives it, by one operation."""
        return dequantize_int8(self.codes, self.scales, dtype) if self.kind == "int8" else self._dequantize_4bit(dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32, rows: slice | Tensor | None = None) -> Tensor:
        """The weight as a plain tensor: code × scale in fp32, rounded once to `dtype`.

        Args:
            dtype: of the result.
            rows: only these rows of the (out, in) matrix, (rows, in); all of them by default. Ends must fall on
                block borders (any row does where `in` is a multiple of the block size). Of int8, also the rows that
                an index of any shape names, (*rows.shape, in).

        Returns:
            A tensor of `shape`, or of the rows asked for.
        """
        if isinstance(rows, Tensor):
            if self.kind != "int8" or len(self.shape) != 2:
                raise ValueError("rows by an index: only an int8 matrix has each row by itself")
            found: Tensor = dequantize_int8(self.codes[rows], self.scales[rows], dtype)
            return found
        if rows is not None and rows.step not in (None, 1):
            raise ValueError(f"rows in steps of {rows.step}: expected every row of a range")
        if len(self.shape) == 3:
            if rows is not None:
                raise ValueError("rows of a three-dimensional weight: choose an expert first")
            return torch.stack([self.expert(index).dequantize(dtype) for index in range(self.shape[0])])
        if self.kind == "int8":
            every = slice(None) if rows is None else rows
            dense: Tensor = dequantize_int8(self.codes[every], self.scales[every], dtype)
            return dense
        return self._dequantize_4bit(dtype, rows)

    def _dequantize_4bit(self, dtype: torch.dtype, rows: slice | None = None) -> Tensor:
        codes, shape, first = self.codes, self.shape, 0
        if rows is not None:
            start, stop, _ = rows.indices(shape[0])
            stop = max(start, stop)
            first, last = start * shape[1], stop * shape[1]
            if first % self.block_size or (last % self.block_size and stop != shape[0]):
                raise ValueError(f"rows {start}:{stop} of {shape} do not fall on blocks of {self.block_size}")
            codes = codes[first // 2 : (last + 1) // 2]
            shape = (stop - start, shape[1])
        dense: Tensor = dequantize_4bit(
            codes, self.scales, self.nested_scales, self.nested_offset, self.kind, self.block_size,
            first // self.block_size, shape, dtype,
        )  # fmt: skip
        return dense


def quantize(weight: Tensor, kind: str, double_quant: bool = True) -> QuantizedTensor:
    """Quantize a weight (out, in) or (experts, out, in) on the device it is on.

    Args:
        weight: fp32, bf16 or fp16.
        kind: nf4, fp4 or int8.
        double_quant: 4-bit only: quantize the scales too.

    Raises:
        ValueError: a kind, dtype or number of dimensions that is not there, or (int8) values beyond fp16's range,
            which bitsandbytes rounds through.
    """
    if kind not in KINDS:
        raise ValueError(f"quantization {kind!r}: expected one of {', '.join(KINDS)}")
    if weight.dtype not in DTYPES:
        raise ValueError(f"a weight in {weight.dtype}: expected float32, bfloat16 or float16")
    if weight.dim() == 3:
        return _stack([quantize(matrix, kind, double_quant) for matrix in weight])
    if weight.dim() != 2:
        raise ValueError(f"a weight of shape {tuple(weight.shape)}: expected (out, in) or (experts, out, in)")
    weight = weight.contiguous()
    if kind == "int8":
        codes, scales = quantize_int8(weight)
        return QuantizedTensor(kind, tuple(weight.shape), weight.dtype, codes, scales, block_size=0)
    codes, scales = quantize_4bit(weight.view(-1), kind, BLOCK_SIZE)
    if not double_quant:
        return QuantizedTensor(kind, tuple(weight.shape), weight.dtype, codes, scales)
    return QuantizedTensor(kind, tuple(weight.shape), weight.dtype, codes, *quantize_scales(scales))


def quantized_bytes(shape: Sequence[int], kind: str, double_quant: bool = True) -> int:
    """The bytes that `quantize` makes of a weight: codes, scales, and under double quantization the scales of the
    scales and their mean. At nf4 that is 0.5 bytes a weight and 1/16 for scales, or 1/64 + 1/4096 of double quantized.

    Args:
        shape: (out, in) or (experts, out, in).
        kind: nf4, fp4 or int8.
        double_quant: 4-bit only.
    """
    *experts, rows, width = shape
    count = rows * width
    if kind == "int8":
        return math.prod(experts) * (count + 4 * rows)
    blocks = -(-count // BLOCK_SIZE)
    scales = blocks + 4 * -(-blocks // NESTED_BLOCK_SIZE) + 4 if double_quant else 4 * blocks
    return math.prod(experts) * (-(-count // 2) + scales)


def _stack(matrices: list[QuantizedTensor]) -> QuantizedTensor:
    """(out, in) each → one of (experts, out, in)."""
    first = matrices[0]
    stacked = {name: torch.stack([matrix.tensors()[name] for matrix in matrices]) for name in first.tensors()}
    return first._with(stacked, (len(matrices), *first.shape))


# ---------------------------------------------------------------------------------------------- the form on disk


def _row_scale_name(name: str) -> str:
    return f"{name.removesuffix('.weight')}.SCB"


def to_disk(name: str, weight: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors that stand for the weight `name` in a file, as bitsandbytes writes them.

    A three-dimensional weight, which bitsandbytes has no form for, adds the expert as the first dimension.
    """
    if weight.kind == "int8":
        return {name: weight.codes, _row_scale_name(name): weight.scales}
    state = {
        "quant_type": weight.kind,
        "blocksize": weight.block_size,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    tensors = {
        name: weight.codes.unsqueeze(-1),
        f"{name}.absmax": weight.scales,
        f"{name}.quant_map": code_values(weight.kind, weight.device).clone(),
    }
    if weight.nested_scales is not None and weight.nested_offset is not None:
        state |= {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32"}
        state["nested_offset"] = weight.nested_offset.tolist()
        tensors[f"{name}.nested_absmax"] = weight.nested_scales
        tensors[f"{name}.nested_quant_map"] = code_values("nested", weight.device).clone()
    tensors[f"{name}.quant_state.bitsandbytes__{weight.kind}"] = pack_dict_to_tensor(state)
    return tensors


def of_known_size(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `to_disk` gives, the description with spaces after it: as long as every weight's, whatever numbers are in
    it."""
    return {name: _filled(name, tensor) if ".quant_state.bitsandbytes__" in name else tensor
            for name, tensor in stored.items()}  # fmt: skip


def _filled(name: str, description: Tensor) -> Tensor:
    size = _state_bytes(tuple(unpack_tensor_to_dict(description)["shape"]))
    if description.numel() > size:
        raise ValueError(f"{name}: its description takes {description.numel()} bytes, more than {size}")
    return torch.cat([description, torch.full((size - description.numel(),), ord(" "), dtype=torch.uint8)])


def _state_bytes(shape: tuple[int, ...]) -> int:
    """Room for the description of a weight of a shape (out, in) or (experts, out, in)."""
    return STATE_BYTES + OFFSET_BYTES * (shape[0] if len(shape) == 3 else 0)


def disk_specs(name: str, meta: QuantizedTensor) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes of what `of_known_size` gives for a weight, of which only shapes are looked at."""
    if meta.kind == "int8":
        codes, scales = (torch.int8, tuple(meta.codes.shape)), (torch.float32, tuple(meta.scales.shape))
        return {name: codes, _row_scale_name(name): scales}
    specs = {
        name: (torch.uint8, (*meta.codes.shape, 1)), f"{name}.absmax": (meta.scales.dtype, tuple(meta.scales.shape)),
        f"{name}.quant_map": (torch.float32, (16,)),
    }
    if meta.nested_scales is not None:
        specs[f"{name}.nested_absmax"] = (torch.float32, tuple(meta.nested_scales.shape))
        specs[f"{name}.nested_quant_map"] = (torch.float32, (256,))
    return specs | {f"{name}.quant_state.bitsandbytes__{meta.kind}": (torch.uint8, (_state_bytes(meta.shape),))}


def disk_group(name: str, present: Mapping[str, object]) -> list[str]:
    """The names, among those `present` in a file, that belong to the quantized weight `name`; empty if it is none."""
    if f"{name}.absmax" in present:
        return [name, *(other for other in present if other.startswith(f"{name}."))]
    scales = _row_scale_name(name)
    if scales in present:
        layout = f"{name.removesuffix('.weight')}.weight_format"
        return [name, scales, *([layout] if layout in present else [])]
    return []


def disk_field(name: str, stored: str) -> str | None:
    """The field of `QuantizedTensor` that a tensor of the quantized weight `name` is in a file, by its name there; None
    for a description of it."""
    if stored == _row_scale_name(name):
        return "scales"
    return {name: "codes", f"{name}.absmax": "scales", f"{name}.nested_absmax": "nested_scales"}.get(stored)


def disk_shape(names: Sequence[str], read: Callable[[str], Tensor]) -> tuple[int, ...] | None:
    """The shape of the 4-bit weight that these tensors stand for, of which the small description alone is read; None
    for one in int8, whose codes have it."""
    found = next((name for name in names if ".quant_state.bitsandbytes__" in name), None)
    return tuple(unpack_tensor_to_dict(read(found).cpu())["shape"]) if found else None


def from_disk(name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> QuantizedTensor:
    """Read what `to_disk`, or bitsandbytes, wrote for the weight `name`.

    Args:
        tensors: those that `disk_group` names.
        dtype: what int8 weights count as before quantization (their files do not say).

    Raises:
        ValueError: a block size, a table of values or a layout that is none of bitsandbytes' defaults.
    """
    codes = tensors[name]
    if (scales_name := _row_scale_name(name)) in tensors:
        layout = tensors.get(f"{name.removesuffix('.weight')}.weight_format")
        if layout is not None and int(layout) != 0:
            raise ValueError(f"{name}: int8 weight format {int(layout)}; only the row format (0) can be read")
        return QuantizedTensor("int8", tuple(codes.shape), dtype, codes, tensors[scales_name].float(), block_size=0)
    state_name = next(key for key in tensors if ".quant_state.bitsandbytes__" in key)
    state = unpack_tensor_to_dict(tensors[state_name].cpu())
    kind, shape = state["quant_type"], tuple(state["shape"])
    experts = shape[:-2]
    if codes.dtype != torch.uint8:  # quant_storage: the same bytes under another dtype
        codes = codes.contiguous().view(torch.uint8)
    nested_scales = nested_offset = None
    if f"{name}.nested_absmax" in tensors:
        if state["nested_blocksize"] != NESTED_BLOCK_SIZE:
            raise ValueError(f"{name}: scales in blocks of {state['nested_blocksize']}; expected {NESTED_BLOCK_SIZE}")
        nested_scales = tensors[f"{name}.nested_absmax"]
        nested_offset = torch.tensor(state["nested_offset"], dtype=torch.float32, device=codes.device)
    if not torch.allclose(tensors[f"{name}.quant_map"].float(), code_values(kind, codes.device), atol=1e-6):
        raise ValueError(f"{name}: its table of values is not bitsandbytes' {kind}")
    scales = tensors[f"{name}.absmax"]
    return QuantizedTensor(
        kind, shape, getattr(torch, state["dtype"]), codes.reshape(*experts, -1), scales, nested_scales, nested_offset,
        state["blocksize"],
    )  # fmt: skip
