"""The forms in which a checkpoint holds its weights: plain, or quantized by whoever published it.

Told by the names and dtypes of its tensors; what config.json says of quantization refuses the forms that cannot be
read, and settles what tensors alone leave open. No scale is left over in silence: a checkpoint with one that belongs to
nothing is refused, as its weights would be read without it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_tool.errors import UserError
from qlora_tool.files.tensors import Checkpoint, TensorEntry, missing_names
from qlora_tool.model.origin import original_of
from qlora_tool.sizes import counted
from qlora_tool.weights.quantized import QuantizedTensor, disk_group, disk_shape, from_disk
from qlora_tool.weights.scaled import FLOAT8, dequantize_mxfp4, dequantize_scaled

logger = logging.getLogger(__name__)

# What follows a weight's name where its scales lie beside it, by those who write them: DeepSeek and Qwen;
# llm-compressor, modelopt and fbgemm. In the place of a module's `.weight`: DeepSeek-V4, Mistral.
_SCALES_OF_ANY = ("_scale_inv", "_scale")
_SCALES_OF_MODULES = (".scale", ".qscale_weight")
# Of activations and caches, which are not quantized here.
_NOT_OF_WEIGHTS = re.compile(
    r"[._](input_scale|activation_scale|act_scale|input_scale_ub|qscale_act|output_scale|k_scale|v_scale|q_scale|"
    r"kv_scale|prob_scale|k_proj\.output_scale|v_proj\.output_scale|input_zero_point|k_zero_point|v_zero_point)$"
)
_OF_QUANTIZATION = re.compile(
    r"[._](qweight|qzeros|g_idx|qscale_weight|weight_packed|weight_shape|weight_scale_2|weight_global_scale|blocks|SCB"
    r"|absmax|nested_absmax|quant_map|nested_quant_map|codebooks|codes)$|\.quant_state\."
)
_SCALE = re.compile(r"[._](scales?|scale_inv|zero_point)$")  # of a weight, where that lies beside it
_READ = "bitsandbytes' (nf4, fp4, int8), FP8 or MXFP4"


@dataclass(frozen=True)
class StoredAs:
    """What a model's configuration says of how its weights are stored.

    Attributes:
        method: bitsandbytes, fp8, mxfp4 …; empty where it says nothing.
        settings: its `quantization_config`.
        dtype: what quantized weights are dequantized to.
        folder: the model's; None where there is none.
    """

    method: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    folder: Path | None = None

    @classmethod
    def of_config(cls, config: Any) -> StoredAs:
        """Read it off a transformers configuration.

        Raises:
            UserError: a form that cannot be read, naming the model to take instead.
        """
        found = getattr(config, "quantization_config", None)
        folder = Path(config.name_or_path) if getattr(config, "name_or_path", None) else None
        dtype = getattr(config, "dtype", None)
        dtype = dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.bfloat16
        if not found:
            return cls(dtype=dtype, folder=folder)
        settings = found if isinstance(found, Mapping) else found.to_dict()
        method = getattr(settings.get("quant_method"), "value", settings.get("quant_method")) or "bitsandbytes"
        method = "bitsandbytes" if str(method).startswith("bitsandbytes") else str(method)  # older files do not say
        stored = cls(method, settings, dtype, folder)
        stored._refuse_unread(config.model_type)
        return stored

    @classmethod
    def of(cls, model: torch.nn.Module) -> StoredAs:
        """What `build_skeleton` noted on a model."""
        return getattr(model, "stored_as", None) or cls()

    def checkpoint(self) -> Checkpoint | None:
        """The files, where they are all at hand."""
        if self.folder is None or not self.folder.is_dir():
            return None
        try:
            return Checkpoint(self.folder)
        except UserError:  # whoever reads the weights says what is wrong with them
            return None

    @property
    def block(self) -> tuple[int, int] | None:
        """Rows and columns of a weight that share one scale, where the configuration says so."""
        size = self.settings.get("weight_block_size")
        return (int(size[0]), int(size[1])) if size else None

    def _refuse_unread(self, model_type: str) -> None:
        if self.method in ("bitsandbytes", "fp8", "mxfp8", "fbgemm_fp8", "mxfp4"):
            return
        if self.method == "compressed-tensors" and not (found := _not_fp8(self.settings)):
            return
        if self.method == "modelopt" and self.settings.get("quant_algo") == "FP8":
            return
        found = {"compressed-tensors": _not_fp8(self.settings), "modelopt": self.settings.get("quant_algo")}
        kind = f"{self.method} ({found[self.method]})" if found.get(self.method) else self.method
        raise UserError(
            f"{self.folder or model_type}: the {model_type} model's weights are quantized by {kind}, which is not "
            f"supported; expected unquantized weights, or {_READ}: {original_of(self.folder)}"
        )


def _not_fp8(settings: Mapping[str, Any]) -> str | None:
    """What a `compressed-tensors` configuration has that is more than weights × scales in FP8; None for nothing."""
    sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        return str(sparsity)
    if settings.get("transform_config"):
        return "rotated weights"
    for group in (settings.get("config_groups") or {}).values():
        weights = group.get("weights") or {}
        if weights and (weights.get("type"), weights.get("num_bits")) != ("float", 8):
            return f"{weights.get('type', 'int')}{weights.get('num_bits', '')} weights"
    return None


@dataclass(frozen=True)
class StoredTensor:
    """One weight, or another tensor, as a checkpoint holds it.

    Attributes:
        name: as if it were stored plainly.
        parts: the names of the tensors that it is made of.
        form: plain, bitsandbytes, scaled or mxfp4.
    """

    name: str
    parts: tuple[str, ...]
    form: str = "plain"

    @property
    def is_bitsandbytes(self) -> bool:
        return self.form == "bitsandbytes"

    def dtype(self, entries: Mapping[str, TensorEntry], stored: StoredAs) -> torch.dtype:
        """What it has once it is read; of bitsandbytes' its codes'."""
        return stored.dtype if self.form in ("scaled", "mxfp4") else entries[self.parts[0]].dtype

    def nbytes(self, entries: Mapping[str, TensorEntry], stored: StoredAs) -> int:
        """The bytes it takes once it is read; of bitsandbytes' those of its codes."""
        first = entries[self.parts[0]]
        values = {"scaled": first.nbytes, "mxfp4": 2 * first.nbytes}.get(self.form)
        return first.nbytes if values is None else values * stored.dtype.itemsize

    def shape(self, checkpoint: Checkpoint) -> tuple[int, ...]:
        """What it has once it is read, and dequantized."""
        first = checkpoint[self.parts[0]].shape
        if self.form == "mxfp4":
            experts, rows, blocks, half = first
            return (experts, blocks * half * 2, rows)
        return first if self.form != "bitsandbytes" else disk_shape(self.parts, checkpoint.read) or first

    def read(self, read: Callable[[str], Tensor], stored: StoredAs) -> Tensor | QuantizedTensor:
        """The tensor; dequantized, unless it is bitsandbytes'.

        Args:
            read: reads one tensor of the checkpoint.

        Raises:
            ValueError: its parts do not fit together.
        """
        if self.form == "bitsandbytes":
            return from_disk(self.name, {part: read(part) for part in self.parts})
        first = read(self.parts[0])
        if self.form == "scaled":
            packed = stored.settings.get("expert_dtype") == "fp4" and first.dtype == torch.int8
            return dequantize_scaled(first, read(self.parts[1]), stored.dtype, stored.block, packed=packed)
        return dequantize_mxfp4(first, read(self.parts[1]), stored.dtype) if self.form == "mxfp4" else first


def stored_tensors(checkpoint: Checkpoint, stored: StoredAs) -> dict[str, StoredTensor]:
    """What a checkpoint holds, by the names that unquantized weights would have.

    Scales of activations and of caches are left out, with a line.

    Raises:
        UserError: weights in FP8 without their scales.
    """
    grouped: dict[str, StoredTensor] = {}
    for name, entry in checkpoint.items():
        if group := disk_group(name, checkpoint):
            grouped[name] = StoredTensor(name, tuple(group), "bitsandbytes")
        elif name.endswith("_blocks") and (scales := f"{name.removesuffix('_blocks')}_scales") in checkpoint:
            plain = name.removesuffix("_blocks")
            grouped[plain] = StoredTensor(plain, (name, scales), "mxfp4")
        elif entry.dtype in FLOAT8 or entry.dtype == torch.int8:
            if scale := _scale_of(name, checkpoint):
                grouped[name] = StoredTensor(name, (name, scale), "scaled")
            elif entry.dtype in FLOAT8 and stored.method and not _SCALE.search(name):  # NVFP4's own scales are in FP8
                raise UserError(
                    f"{checkpoint.folder}: tensor {name} is in FP8, but its scales ({name}_scale_inv, say) are not in "
                    "the files; download the model again"
                )
    taken = {part for tensor in grouped.values() for part in tensor.parts}
    ignored = [name for name in checkpoint if name not in taken and _NOT_OF_WEIGHTS.search(name) and stored.method]
    if ignored:
        logger.info("%d scales of activations or caches are not used, as products here are not quantized: %s",
                    len(ignored), missing_names(ignored, {}))  # fmt: skip
    left = taken | set(ignored)
    found = {name: StoredTensor(name, (name,)) for name in checkpoint if name not in left} | grouped
    order = {name: number for number, name in enumerate(checkpoint)}
    return dict(sorted(found.items(), key=lambda item: order[item[1].parts[0]]))


def _scale_of(name: str, present: Mapping[str, object]) -> str | None:
    stem = name.removesuffix(".weight")
    names = [f"{name}{suffix}" for suffix in _SCALES_OF_ANY]
    names += [f"{stem}{suffix}" for suffix in _SCALES_OF_MODULES] if stem != name else []
    return next((scale for scale in names if scale in present), None)


def refuse_leftover_scales(checkpoint: Checkpoint, unused: list[str], stored: StoredAs) -> None:
    """Refuse a checkpoint with tensors of quantization that belong to no weight that was read.

    Args:
        unused: its tensors that the model has no use for.

    Raises:
        UserError: with the first of them.
    """
    found = [name for name in unused if _OF_QUANTIZATION.search(name) or _is_scale(name, checkpoint)]
    if found:
        method = f" (quantization_config: {stored.method})" if stored.method else " (config.json says nothing of it)"
        raise UserError(
            f"{checkpoint.folder}: {counted(len(found), 'tensor')} of a quantization that cannot be read{method}: "
            f"{missing_names(found, {})}; without them the weights would be wrong: {original_of(checkpoint.folder)}"
        )


def _is_scale(name: str, present: Mapping[str, object]) -> bool:
    weight = _SCALE.sub("", name)
    return weight != name and (weight in present or f"{weight}.weight" in present)
