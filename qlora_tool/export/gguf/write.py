"""Write a merged model as one GGUF file, which llama.cpp, Ollama and transformers read.

Two passes: what every tensor will be is known without reading any, so the header is written first and the tensors
follow one group at a time. Memory holds one group, whatever the size of the model. The same model gives the same bytes.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qlora_tool.errors import UserError
from qlora_tool.export.dtypes import FLOAT16_LIMIT
from qlora_tool.export.gguf.families import TensorNames, find_family
from qlora_tool.export.gguf.mixture import fallbacks, tensor_types
from qlora_tool.export.gguf.settings import add_settings, rope_tensors
from qlora_tool.export.gguf.tokenizer import read_tokenizer
from qlora_tool.export.grids.block_types import BLOCK_TYPES, BlockType
from qlora_tool.export.grids.coded import Coded, coded_blocks
from qlora_tool.export.grids.fit import fit
from qlora_tool.export.grids.threads import on_every_core
from qlora_tool.extras import install_command
from qlora_tool.terminal import progress

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

    from qlora_tool.export.encoding import Encoder
    from qlora_tool.export.merge import MergedModel
    from qlora_tool.model.names import SaveGroup


logger = logging.getLogger(__name__)


def refuse_unwritable(config) -> None:
    """What can be known before anything is read: the package is there, the family is known.

    Args:
        config: the model's transformers configuration.

    Raises:
        UserError: either is not so.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"--format gguf: the package gguf is missing; run {install_command('gguf')}")
    find_family(config)


def write_gguf(
    encoder: Encoder, base_folder: Path, tokenizer_folder: Path, file: Path, gguf_type: str = "f16"
) -> dict[str, Any]:
    """Write `file`, not yet safe from interruption: hand in a path that is renamed afterwards.

    Args:
        encoder: of the merged model; whatever its dtype, its values are rounded once, to `gguf_type`.
        base_folder: the base's; its generation settings name the ends of a turn.
        tokenizer_folder: the tokenizer's, with the chat template.
        file: to write; its stem is the model's name in it.
        gguf_type: of `choices.GgufType`. Norms, biases and other vectors are fp32.

    Returns:
        architecture, tokenizer model and way of splitting, tensors, bytes, parameters.

    Raises:
        UserError: the package is missing, the family or the tokenizer is none that is known, values beyond f16.
    """
    config = encoder.merged.skeleton.config
    refuse_unwritable(config)
    import gguf

    merged = dataclasses.replace(encoder.merged, dtype=torch.float32, keeps_wider=False, refuse_coarse=False)
    family = find_family(config)
    names = TensorNames(family, config, merged.skeleton.base_model_prefix)
    plan = _plan(merged, names, gguf_type)
    _tell_fallbacks(plan, gguf_type, config)
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
        _write_tensors(writer, encoder, merged, names, plan, gguf_type)
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
    import gguf

    shapes: dict[str, tuple[int, ...]] = {}
    for specs in merged.specs():
        meta = {spec.name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for spec in specs}
        shapes |= {name: tuple(tensor.shape) for name, tensor in names.convert(meta).items()}
    if "token_embd.weight" not in shapes and "output.weight" in shapes:
        # The checkpoint holds tied embeddings under the output's name; llama.cpp looks for them at the input.
        shapes = {"token_embd.weight" if name == "output.weight" else name: shape for name, shape in shapes.items()}
    types = tensor_types(shapes, gguf_type, merged.skeleton.config)
    return {name: (shape, gguf.GGMLQuantizationType[types[name]]) for name, shape in shapes.items()}


def _tell_fallbacks(plan: Plan, gguf_type: str, config: Any) -> None:
    """Say once how many tensors have larger types than they would have with rows of another length."""
    count = fallbacks({n: shape for n, (shape, _) in plan.items()}, {n: kind.name for n, (_, kind) in plan.items()},
                      gguf_type, config)  # fmt: skip
    if count:
        kinds = sorted({kind.name.lower() for _, kind in plan.values() if kind.name != "F32"})
        logger.warning(
            "--gguf-type %s: tensors whose rows are no multiple of its blocks: %d; they take llama.cpp's larger types "
            "instead (the file has %s)", gguf_type, count, ", ".join(kinds),
        )  # fmt: skip


def planned_bytes(merged: MergedModel, gguf_type: str) -> int:
    """The bytes of all tensors of the file."""
    names = TensorNames(find_family(merged.skeleton.config), merged.skeleton.config, merged.skeleton.base_model_prefix)
    return sum(_nbytes(shape, kind) for shape, kind in _plan(merged, names, gguf_type).values())


def _nbytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    from gguf.quants import quant_shape_to_byte_shape

    return math.prod(quant_shape_to_byte_shape(shape, kind))


def _file_type(gguf_type: str) -> int:
    import gguf

    return gguf.LlamaFileType[f"MOSTLY_{gguf_type.upper()}"]


def _write_tensors(
    writer, encoder: Encoder, merged: MergedModel, names: TensorNames, plan: Plan, gguf_type: str
) -> None:
    expected, broken, overflow = iter(plan.items()), [], []
    with progress(f"exporting {gguf_type}", len(merged.groups), "tensors") as bar:
        for group in merged.groups:
            encoded = _EncodedGroup(encoder, merged, names, group)
            no_numbers, too_large = _write_group(writer, encoded, expected)
            broken += no_numbers
            overflow += too_large
            bar.advance()
    for found, said in ((broken, "NaN or infinity in {}; the base or the adapter is broken: copy or train it again"),
                        (overflow, "values beyond float16's 65504 in {}; choose bf16")):  # fmt: skip
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise UserError(f"--gguf-type {gguf_type}: {said.format(', '.join(found[:3]) + more)}")


def _write_group(
    writer, group: _EncodedGroup, expected: Iterator[tuple[str, Any]]
) -> tuple[list[str], list[str]]:
    """Write what is expected next, and let go of it; which tensors hold what is no number, and which have values, or
    scales, that float16 does not hold."""
    broken, overflow = [], []
    for made in list(group.tensors):
        tensor, (name, (shape, kind)) = group.tensors[made], next(expected)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"announced {name} {shape}, got {made} {tuple(tensor.shape)}")
        largest = float(tensor.abs().max()) if tensor.numel() else 0.0
        if not math.isfinite(largest):
            broken.append(name)
        elif largest >= FLOAT16_LIMIT and kind.name not in ("F32", "BF16"):
            overflow.append(f"{name} (up to {largest:.3g})")
        del tensor
        writer.write_tensor_data(group.encoded(made, kind))
    return broken, overflow


class _EncodedGroup:
    """The tensors of one group in llama.cpp's layout, and as the file holds them."""

    def __init__(self, encoder: Encoder, merged: MergedModel, names: TensorNames, group: SaveGroup):
        self._encoder, self._names, self._group = encoder, names, group
        self._trained = merged.base == "dequantized"
        if any(len(merged.source.shapes[name]) == 2 for name in group.names):
            encoder.moments(group.names)  # a layer is gone through before any of its weights is made
        self.tensors = names.convert(merged.tensors(group))
        self._of: dict[int, dict[str, Tensor]] = {}  # by the model's id

    def encoded(self, name: str, kind: GGMLQuantizationType) -> np.ndarray:
        """One of the tensors, which is let go of."""
        tensor = self.tensors.pop(name)
        if kind.name not in BLOCK_TYPES:
            return _encoded(tensor, kind)
        own, encoder = BLOCK_TYPES[kind.name], self._encoder
        moments = encoder.moments(self._group.names) if tensor.dim() == 2 else None
        if moments is not None and len(moments) != tensor.shape[1]:
            moments = None
        adapted = any(one.removesuffix(".weight") in encoder.merged.layers for one in self._group.names)
        bases = encoder.candidates(adapted)
        if moments is None and len(bases) == 1:
            encoder.plain += 1
            own_base = bases[0] == encoder.merged.base
            return block_bytes((tensor if own_base else self._made_by(encoder.model(bases[0]), name)).float(), own)
        trained = tensor if self._trained else self._made_by(encoder.trained, name)
        made = {encoder.merged.base: tensor, "dequantized": trained}
        starts = {base: made[base] if base in made else self._made_by(encoder.model(base), name) for base in bases}
        del made, tensor
        update = trained - self._made_by(encoder.untuned, name) if adapted else None

        def code(weight: Tensor, importance: Tensor | None) -> Coded[Tensor]:
            return coded_blocks(own, weight.reshape(-1, weight.shape[-1]).float(), importance)

        return encoder.encode(code, trained, starts, update, moments).numpy()

    def _made_by(self, model: MergedModel, name: str) -> Tensor:
        """The tensor as another model has it; the group's others are kept until they are asked for."""
        if name not in self._of.get(id(model), ()):
            self._of[id(model)] = self._names.convert(model.tensors(self._group))
        return self._of[id(model)].pop(name)


def _encoded(tensor: Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    """The bytes of one tensor as an array."""
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(kind.name)
    if kind.name in BLOCK_TYPES:
        return block_bytes(tensor.float(), BLOCK_TYPES[kind.name])
    if dtype is None:
        return quantized_blocks(tensor.float(), kind)
    rounded = tensor.to(dtype).contiguous()
    return rounded.view(torch.int16).numpy() if dtype == torch.bfloat16 else rounded.numpy()


def block_bytes(tensor: Tensor, kind: BlockType, at_a_time: int = 1 << 20) -> np.ndarray:
    """The blocks nearest to a tensor, some rows at a time.

    Args:
        tensor: fp32, (…, columns), columns a multiple of the block's size.
        at_a_time: weights; bounds what every thread holds beside the tensor.

    Returns:
        uint8, (rows, bytes of a row).
    """
    from gguf import GGMLQuantizationType

    def encoded(rows: Tensor) -> np.ndarray:
        return kind.pack(fit(kind, rows.reshape(-1, kind.weights))).view(len(rows), -1).numpy()

    return _by_rows(tensor, GGMLQuantizationType[kind.name], encoded, at_a_time)


def quantized_blocks(tensor: Tensor, kind: GGMLQuantizationType, at_a_time: int = 1 << 20) -> np.ndarray:
    """Quantize by the gguf package, some rows at a time: a block is a scale in fp16 and small whole numbers.

    Args:
        tensor: fp32, (…, columns), columns a multiple of the block's size.
        kind: what the package quantizes to, such as Q8_0.
        at_a_time: weights; bounds the package's temporary arrays, every thread's.

    Returns:
        uint8, (rows, bytes of a row).
    """
    from gguf import quants

    def encoded(rows: Tensor) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):  # a block of denormals, whose scale is 0 in fp16
            return quants.quantize(rows.numpy(), kind)

    return _by_rows(tensor, kind, encoded, at_a_time)


def _by_rows(
    tensor: Tensor, kind: GGMLQuantizationType, encoded: Callable[[Tensor], np.ndarray], at_a_time: int
) -> np.ndarray:
    from gguf.quants import quant_shape_to_byte_shape

    rows = tensor.reshape(-1, tensor.shape[-1])
    result = np.empty(quant_shape_to_byte_shape(tuple(rows.shape), kind), np.uint8)
    step = max(1, at_a_time // rows.shape[1])

    def work(start: int) -> None:
        result[start : start + step] = encoded(rows[start : start + step])

    on_every_core(work, range(0, len(rows), step))
    return result
