"""LoRA as llama.cpp's own adapter file, which it adds to a GGUF file of the base while it runs (`--lora`).

A file holds `NAME.lora_a` and `NAME.lora_b` for each tensor of the base, and one alpha for all. llama.cpp computes
W·x + (alpha / r)·B·(A·x), r being the tensor's own rank (llama_adapter_lora_weight::get_scale), so that ranks may
differ, and scales that do not follow from that alpha are worked into B. Rows of B lie as those of the base's tensor: B
goes through the conversion that the base's weights go through.

Format: https://github.com/ggml-org/llama.cpp, convert_lora_to_gguf.py writes it, src/llama-adapter.cpp reads it.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from qlora_tool.adapters.adapter import Adapter, EmbeddingAdapter
from qlora_tool.errors import UserError
from qlora_tool.export.adapter_only import other_ends
from qlora_tool.export.gguf.families import TensorNames, find_family
from qlora_tool.export.gguf.read_back import decoder, write_as_model
from qlora_tool.export.gguf.write import refuse_unwritable
from qlora_tool.files.atomic import write_text
from qlora_tool.model.open import open_tokenizer
from qlora_tool.model.tokenizer_files import TEMPLATE, has_tokenizer, read_templates
from qlora_tool.weights.quantized import QuantizedTensor

if TYPE_CHECKING:
    from qlora_tool.artifacts import Artifact
    from qlora_tool.export.merge import MergedModel
    from qlora_tool.methods.lora import Lora
    from qlora_tool.model.names import SaveGroup

EMBEDDINGS = "token_embd.weight"  # the only ones that llama.cpp looks up with an adapter
_MERGE = "choose --format gguf, which merges it"


@dataclass(frozen=True)
class LoraPair:
    """LoRA on one tensor of a GGUF file, by llama.cpp's layout.

    Attributes:
        name: the tensor's.
        lora_A: fp32, (r, in); (experts, r, in); of embeddings (vocabulary, r), as they are looked up.
        lora_B: fp32, (out, r); (experts, out, r); of embeddings (dim, r).
        scale: what B·A is multiplied with.
    """

    name: str
    lora_A: Tensor
    lora_B: Tensor
    scale: float

    @property
    def r(self) -> int:
        return self.lora_B.shape[-1]


def refuse_unholdable(artifact: Artifact, merged: MergedModel, with_base: bool) -> None:
    """Refuse what the file cannot hold, or what llama.cpp would compute otherwise from it.

    Args:
        artifact: what is exported.
        merged: its tensors.
        with_base: whether the base that it was trained on is written beside it.

    Raises:
        UserError: such an adapter, or a family that GGUF export does not know.
    """
    with _told_of_adapters():
        refuse_unwritable(merged.skeleton.config)
        if artifact.stack:
            raise UserError(
                "--format gguf: a sum of adapters is not one of them; export them one by one, which llama.cpp sums by "
                f"--lora-scaled, or {_MERGE}"
            )
        _refuse_method(artifact, with_base)
        _refuse_whole_tensors(merged)
        if merged.unties:
            raise UserError(
                "--format gguf: this model's input and output embeddings are one tensor, of which the adapter changes "
                f"one use alone, and llama.cpp has one adapter for both; {_MERGE}"
            )
        for pair in lora_pairs(merged, device="meta"):
            if pair.name.endswith("_embd.weight") and pair.name != EMBEDDINGS:
                raise UserError(
                    f"--format gguf: the adapter is on {pair.name}, which llama.cpp looks up without adapters; {_MERGE}"
                )


@contextmanager
def _told_of_adapters() -> Iterator[None]:
    """Lines that name `--format gguf` name the format that was asked for."""
    try:
        yield
    except UserError as error:
        lines = [line.replace("--format gguf:", "--format gguf-adapter:", 1) for line in error.lines]
        raise UserError(lines) from error


def _refuse_method(artifact: Artifact, with_base: bool) -> None:
    stored = artifact.adapter
    if stored.method.keys.trains_base:
        raise UserError(
            f"--format gguf: this run is {stored.method.name}: it trained the base's own weights, and there is no "
            "adapter; choose --format gguf"
        )
    if stored.method.name != "lora":
        raise UserError(f"--format gguf: llama.cpp's adapters are LoRA, and this one is {stored.method.name}; {_MERGE}")
    if stored.quantized_without is not None and not with_base:
        start = stored.start.get("init_lora_weights") or stored.peft.get("init_lora_weights")
        raise UserError(
            f"--format gguf: the adapter took its start ({start}) out of the base, so that no GGUF file of the base "
            "fits it but the one that --with-base writes; give --with-base"
        )


def _refuse_whole_tensors(merged: MergedModel) -> None:
    """Refuse what is no product of two matrices. PEFT writes adapted embeddings' own weights along: they change
    nothing."""
    stored = merged.adapter
    assert stored is not None
    others = [name for name, tensor in stored.replaced_tensors().items() if not _is_the_bases(merged, name, tensor)]
    others += [f"rows of {name}" for name in stored.token_rows()]
    others += [f"{name}.lora_B.bias" for name, layers in merged.layers.items()
               if any(layer.bias_delta() is not None for layer in layers)]  # fmt: skip
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise UserError(
            "--format gguf: llama.cpp's adapters hold no biases, rows of tokens and tensors trained in full, and this "
            f"one has {others[0]}{more}; {_MERGE}"
        )


def _is_the_bases(merged: MergedModel, name: str, tensor: Tensor) -> bool:
    value = merged.source.read(name)
    return not isinstance(value, QuantizedTensor) and torch.equal(value.to(tensor.dtype), tensor)


def base_of(merged: MergedModel) -> MergedModel:
    """The base of `merged` as it was trained on, without the adapter."""
    return dataclasses.replace(merged, adapter=None, stack=(), prepare=merged.prepare)


def base_said(artifact: Artifact, merged: MergedModel, file: str | None) -> str:
    """Which base the adapter's file is for, in words.

    Args:
        file: of the base that lies beside it, if any.
    """
    name, kind = artifact.model.name_or_path, artifact.model.quantization
    if merged.base == "original":
        return f"{file}, with the original weights of {name}" if file else f"the original weights of {name}"
    quantized = kind != "none"
    if file:
        said = f"{file}, which has the weights that it was trained on" + (f", {kind} dequantized" if quantized else "")
        start = artifact.adapter.quantized_without is not None
        return said + (", without what the adapter took over at its start: no model by itself" if start else "")
    if not quantized:
        return f"{name}, in any GGUF file of its weights"
    return (f"{name} quantized to {kind}, as it was trained; a GGUF file made of its own weights is another base "
            "(--with-base writes the one it was trained on)")  # fmt: skip


def left_to_the_base(artifact: Artifact, base_folder: Path, tokenizer_folder: Path, folder: Path) -> list[str]:
    """What was trained along and is in no adapter's file, so that a GGUF file of the base has to have it. A chat
    template of its own is written beside the file.

    Args:
        tokenizer_folder: the tokenizer's that was trained with.
        folder: the export's.
    """
    found, trained = [], read_templates(tokenizer_folder)
    if isinstance(trained, str) and trained != read_templates(base_folder):
        write_text(folder / TEMPLATE, trained)
        found.append(f"the chat template that it was trained with, which is not the base's: {TEMPLATE} has it "
                     "(llama-server --chat-template-file)")  # fmt: skip
    if has_tokenizer(artifact.adapter.folder) and (ends := other_ends(artifact)):
        names = open_tokenizer(artifact.adapter.folder).convert_ids_to_tokens(ends)
        found.append(f"that an answer ends in {', '.join(names)}, of which the base's settings do not name all")
    return found


def _names_of(merged: MergedModel) -> TensorNames:
    config = merged.skeleton.config
    return TensorNames(find_family(config), config, merged.skeleton.base_model_prefix)


def lora_pairs(merged: MergedModel, device: str = "cpu") -> Iterator[LoraPair]:
    """The LoRA of every tensor of the base's GGUF file that has one, in that file's order.

    Args:
        device: `meta` for the shapes alone.

    Raises:
        UserError: llama.cpp has no place for one of the tensors.
    """
    names = _names_of(merged)
    for group in merged.groups:
        for name in group.names:
            place = name if name in merged.layers else name.removesuffix(".weight")
            for layer in merged.layers.get(place, ()):
                yield from _converted(merged, names, group, name, layer, device)


@torch.no_grad()
def _converted(
    merged: MergedModel, names: TensorNames, group: SaveGroup, name: str, layer: Adapter, device: str
) -> Iterator[LoraPair]:
    """One adapter by the tensors of the file: its rows in the place of the weight's, with r for columns."""
    method = cast("Lora", layer.method)  # `_refuse_method` lets no other through
    lora_A, lora_B = (tensor.detach().to(device, torch.float32) for tensor in
                      method.computing(layer.tensors, layer.settings))  # fmt: skip
    on_embeddings = isinstance(layer, EmbeddingAdapter)
    rows = lora_A.T if on_embeddings else lora_B  # (…, rows of the weight, r)
    slot = merged.slots.get(name)
    turned = rows.transpose(-1, -2) if slot is not None and slot.transposed else rows
    for found, tensor in names.convert(group.convert(merged.skeleton, {name: turned})).items():
        if tensor.shape[-1] != rows.shape[-1]:
            raise ValueError(f"{name}: its columns do not stay as they are in {found}")
        looked_up, product = (tensor, lora_B) if on_embeddings else (lora_A, tensor)
        yield LoraPair(found, looked_up.contiguous(), product.contiguous(), method.scaling(layer.settings))


def write_adapter_gguf(merged: MergedModel, file: Path, base: str) -> dict[str, Any]:
    """Write the adapter of `merged`, not yet safe from interruption: hand in a path that is renamed afterwards.

    Args:
        base: what the base is called.

    Returns:
        architecture, tensors, r (the lowest and the highest rank), alpha, and `scaled`: of how many tensors the scale
        is in B, whose values were rounded to fp32 for it (by 6e-8 of each at most).

    Raises:
        UserError: values that fp32 does not hold times their scale.
    """
    import gguf

    plan = list(lora_pairs(merged, device="meta"))
    alpha = common_alpha(plan)
    writer = gguf.GGUFWriter(file, find_family(merged.skeleton.config).architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_name(file.stem)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, base)
    for pair in plan:
        for suffix, tensor in (("lora_a", pair.lora_A), ("lora_b", pair.lora_B)):
            writer.add_tensor_info(f"{pair.name}.{suffix}", tuple(tensor.shape), np.dtype(np.float32), tensor.nbytes)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for pair in lora_pairs(merged):
            for tensor in (pair.lora_A, scaled(pair, alpha)):
                if not bool(tensor.isfinite().all()):
                    raise UserError(f"--format gguf-adapter: the adapter of {pair.name} has values that float32 does "
                                    "not hold times its scale; it diverged: train it again")  # fmt: skip
                writer.write_tensor_data(tensor.numpy())
    finally:
        writer.close()
    ranks = [pair.r for pair in plan]
    return {"architecture": writer.arch, "tensors": len(plan), "r": [min(ranks), max(ranks)], "alpha": alpha,
            "scaled": sum(not _follows(pair, alpha) for pair in plan)}  # fmt: skip


def common_alpha(pairs: list[LoraPair]) -> float:
    """The alpha, in fp32, from which most tensors' scales follow; never 0, which llama.cpp takes for a scale of 1."""
    found = Counter(_as_fp32(pair.scale * pair.r) for pair in pairs)
    usable = [alpha for alpha, _ in found.most_common() if alpha and math.isfinite(alpha)]
    return usable[0] if usable else 1.0


def scaled(pair: LoraPair, alpha: float) -> Tensor:
    """B as it goes into a file of this alpha: as it is where the scale is the one that llama.cpp takes, else times what
    is missing, rounded once."""
    if _follows(pair, alpha):
        return pair.lora_B
    return (pair.lora_B.double() * (pair.scale / scale_read(alpha, pair.r))).float()


def scale_read(alpha: float, r: int) -> float:
    """The scale that llama.cpp takes, as it computes it, in fp32."""
    return float(np.float32(alpha) / np.float32(r)) if alpha else 1.0


def _follows(pair: LoraPair, alpha: float) -> bool:
    return _as_fp32(pair.scale) == scale_read(alpha, pair.r)


def _as_fp32(value: float) -> float:
    with np.errstate(over="ignore"):  # infinite then, and refused
        return float(np.float32(value))


def adapter_bytes(merged: MergedModel) -> int:
    """The bytes of all tensors of the file."""
    return sum(pair.lora_A.nbytes + pair.lora_B.nbytes for pair in lora_pairs(merged, device="meta"))


def updates(file: Path) -> Callable[[str], Tensor | None]:
    """What an adapter file adds to each tensor of its base, by the tensor's name, in its layout and in fp32; None: it
    leaves that one alone."""
    import gguf

    reader = gguf.GGUFReader(file)
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    stored = {tensor.name: tensor for tensor in reader.tensors}

    def values(name: str) -> Tensor:
        found = gguf.dequantize(stored[name].data, stored[name].tensor_type)
        return torch.from_numpy(np.require(found, np.float32, ["C", "W"]))

    def update(name: str) -> Tensor | None:
        if f"{name}.lora_a" not in stored:
            return None
        lora_A, lora_B = values(f"{name}.lora_a"), values(f"{name}.lora_b")
        product = lora_A @ lora_B.T if name == EMBEDDINGS else lora_B @ lora_A
        return product * scale_read(alpha, lora_B.shape[-1])

    return update


def read_adapter_back(merged: MergedModel, file: Path, base: Path | None, folder: Path) -> None:
    """Write the base plus what an adapter file adds to it as a model folder in fp32, which plain transformers loads.

    Args:
        merged: the model that the file was written from; of the adapter no values are taken.
        file: the adapter's.
        base: the base's GGUF file; None takes the values that were trained on.
        folder: an empty one.

    Raises:
        MachineError: there is no space for it.
    """
    merged, update = base_of(merged), updates(file)
    merged.dtype = torch.float32
    names, held = _names_of(merged), None if base is None else decoder(base)

    def of_group(group: SaveGroup) -> Callable[[str], Tensor]:
        own = held or names.convert(merged.tensors(group)).__getitem__

        @lru_cache(maxsize=1)  # experts of one layer are one tensor of the file
        def value(name: str) -> Tensor:
            added = update(name)
            return own(name).float() if added is None else own(name).float() + added

        return value

    write_as_model(merged, of_group, folder)
