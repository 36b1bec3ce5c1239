"""Write a merged model as one GGUF file, which llama.cpp, Ollama and transformers read.

Two passes: what every tensor will be is known without reading any, so the header is written first and the tensors
follow one group at a time. Memory holds one group, whatever the size of the model. The same model gives the same bytes.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qlora_tool.errors import UserError
from qlora_tool.export.gguf.families import TensorNames, find_family
from qlora_tool.export.gguf.settings import add_settings, rope_tensors
from qlora_tool.export.gguf.tokenizer import read_tokenizer

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

    from qlora_tool.export.merge import MergedModel


def refuse_unwritable(config) -> None:
    """What can be known before anything is read: the package is there, the family is known.

    Args:
        config: the model's transformers configuration.

    Raises:
        UserError: either is not so.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError("--format gguf: the package gguf is missing; run pip install 'qlora-tool[gguf]'")
    find_family(config)


def write_gguf(
    merged: MergedModel, base_folder: Path, tokenizer_folder: Path, file: Path, gguf_type: str = "f16"
) -> dict[str, Any]:
    """Write `file`, not yet safe from interruption: hand in a path that is renamed afterwards.

    Args:
        merged: whatever its dtype, its values are rounded once, to `gguf_type`.
        base_folder: the base's; its generation settings name the ends of a turn.
        tokenizer_folder: the tokenizer's, with the chat template.
        file: to write; its stem is the model's name in it.
        gguf_type: f16, bf16 or q8_0. Norms, biases and other vectors are fp32.

    Returns:
        architecture, tokenizer model and way of splitting, tensors, bytes, parameters.

    Raises:
        UserError: the package is missing, the family or the tokenizer is none that is known, values beyond f16.
    """
    config = merged.skeleton.config
    refuse_unwritable(config)
    import gguf

    merged = dataclasses.replace(merged, dtype=torch.float32, keeps_wider=False, refuse_coarse=False)
    family = find_family(config)
    names = TensorNames(family, config, merged.skeleton.base_model_prefix)
    plan = _plan(merged, names, gguf_type)
    extra = rope_tensors(config)
    vocabulary = plan["token_embd.weight"][0][0]
    tokenizer = read_tokenizer(tokenizer_folder, base_folder, vocabulary)

    writer = gguf.GGUFWriter(file, family.architecture)
    writer.add_type("model")
    writer.add_name(file.stem)
    writer.add_file_type(_file_type(gguf_type))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_settings(writer, family, config, vocabulary)
    tokenizer.add_to(writer)
    for name, tensor in extra.items():
        writer.add_tensor_info(name, tuple(tensor.shape), np.dtype(np.float32), tensor.nbytes)
    for name, (shape, kind) in plan.items():
        writer.add_tensor_info(name, shape, np.dtype(np.float32), _nbytes(shape, kind), raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in extra.values():
            writer.write_tensor_data(tensor.numpy())
        _write_tensors(writer, merged, names, plan)
    finally:
        writer.close()
    return {
        "architecture": family.architecture,
        "tokenizer": f"{tokenizer.model}, {tokenizer.pre}",
        "gguf_type": gguf_type,
        "tensors": len(plan) + len(extra),
        "bytes": file.stat().st_size,
        "parameters": sum(math.prod(shape) for shape, _ in plan.values()),
    }


Plan = dict[str, tuple[tuple[int, ...], "GGMLQuantizationType"]]


def _plan(merged: MergedModel, names: TensorNames, gguf_type: str) -> Plan:
    """Shape and type of every tensor in the order of writing, by the same conversion on tensors without values."""
    plan: Plan = {}
    for specs in merged.specs():
        meta = {spec.name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for spec in specs}
        for name, tensor in names.convert(meta).items():
            plan[name] = tuple(tensor.shape), _stored_type(name, tuple(tensor.shape), gguf_type)
    if "token_embd.weight" not in plan and "output.weight" in plan:
        # The checkpoint holds tied embeddings under the output's name; llama.cpp looks for them at the input.
        plan = {"token_embd.weight" if name == "output.weight" else name: entry for name, entry in plan.items()}
    return plan


def _stored_type(name: str, shape: tuple[int, ...], gguf_type: str) -> GGMLQuantizationType:
    import gguf

    kinds = gguf.GGMLQuantizationType
    fp32 = len(shape) == 1 or name.endswith("_norm.weight") or name.startswith("position_embd") or "gate_inp" in name
    if fp32:  # llama.cpp's operators take these in no other type
        return kinds.F32
    if gguf_type == "q8_0":
        return kinds.Q8_0 if shape[-1] % 32 == 0 else kinds.F16  # blocks of 32 must not straddle rows
    return kinds.F16 if gguf_type == "f16" else kinds.BF16


def _nbytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    from gguf.quants import quant_shape_to_byte_shape

    return math.prod(quant_shape_to_byte_shape(shape, kind))


def _file_type(gguf_type: str) -> int:
    import gguf

    kinds = gguf.LlamaFileType
    return {"f16": kinds.MOSTLY_F16, "bf16": kinds.MOSTLY_BF16, "q8_0": kinds.MOSTLY_Q8_0}[gguf_type]


def _write_tensors(writer, merged: MergedModel, names: TensorNames, plan: Plan) -> None:
    expected, overflow = iter(plan.items()), []
    for group in merged.groups:
        overflow += _write_group(writer, names.convert(merged.tensors(group)), expected)
    if overflow:
        more = f" and {len(overflow) - 3} more" if len(overflow) > 3 else ""
        raise UserError(
            f"--gguf-type f16: values beyond float16's 65504 in {', '.join(overflow[:3])}{more}; choose bf16"
        )


def _write_group(writer, tensors: dict[str, Tensor], expected: Iterator[tuple[str, Any]]) -> list[str]:
    """Write what is expected next, and let go of it; which tensors have values that f16 does not hold."""
    overflow = []
    for made in list(tensors):
        tensor, (name, (shape, kind)) = tensors.pop(made), next(expected)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"announced {name} {shape}, got {made} {tuple(tensor.shape)}")
        data = _encoded(tensor, kind)
        if kind.name == "F16" and not np.isfinite(data).all():
            overflow.append(f"{name} (up to {float(tensor.abs().max()):.3g})")
        writer.write_tensor_data(data)
    return overflow


def _encoded(tensor: Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    """The bytes of one tensor as an array."""
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(kind.name)
    if dtype is None:
        return quantized_blocks(tensor.float(), kind)
    rounded = tensor.to(dtype).contiguous()
    return rounded.view(torch.int16).numpy() if dtype == torch.bfloat16 else rounded.numpy()


def quantized_blocks(tensor: Tensor, kind: GGMLQuantizationType, at_a_time: int = 1 << 22) -> np.ndarray:
    """Quantize by the gguf package, some rows at a time: a block is a scale in fp16 and small whole numbers.

    Args:
        tensor: fp32, (…, columns), columns a multiple of the block's size.
        kind: what the package quantizes to, such as Q8_0.
        at_a_time: weights; bounds the package's temporary arrays.

    Returns:
        uint8, (rows, bytes of a row).
    """
    from gguf import quants

    rows = tensor.reshape(-1, tensor.shape[-1]).numpy()
    result = np.empty(quants.quant_shape_to_byte_shape(rows.shape, kind), np.uint8)
    step = max(1, at_a_time // rows.shape[1])
    with np.errstate(over="ignore", invalid="ignore"):  # a block of denormals, whose scale is 0 in fp16
        for start in range(0, len(rows), step):
            result[start : start + step] = quants.quantize(rows[start : start + step], kind)
    return result
