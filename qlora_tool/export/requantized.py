"""A merged model quantized again, as a bitsandbytes checkpoint in NF4 or FP4 that plain transformers loads.

How much of the update is left is measured while the weights are written, and returned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qlora_tool.errors import UserError
from qlora_tool.export.beside import write_config
from qlora_tool.export.encoding import Encoder
from qlora_tool.export.grids.coded import Coded, coded_4bit
from qlora_tool.export.read_by_bitsandbytes import is_read_everywhere, why_left
from qlora_tool.export.shards import write_at_once
from qlora_tool.files.tensors import TensorSpec
from qlora_tool.model.names import SaveGroup
from qlora_tool.model.taken_weights import takes_weight
from qlora_tool.sizes import counted
from qlora_tool.weights.quantized import QuantizedTensor, disk_specs, of_known_size, quantize, to_disk

if TYPE_CHECKING:
    from qlora_tool.artifacts import Artifact
    from qlora_tool.export.merge import MergedModel


@dataclass
class UpdateLoss:
    """What quantization does to the update Δ = trained − base of the adapted weights, summed over them. Base is what
    was trained against, trained what came of it, whatever the update was added to before it was quantized.

    Attributes:
        error: ‖quantized − trained‖².
        kept: ⟨quantized − base, Δ⟩.
        update: ‖Δ‖².
        weights: how many weight matrices.
    """

    error: float = 0.0
    kept: float = 0.0
    update: float = 0.0
    weights: int = 0

    def add(self, quantized: Tensor, trained: Tensor, update: Tensor) -> None:
        """Count one weight; all three fp32, (out, in)."""
        away = quantized - trained
        self.error += float(away.square().sum(dtype=torch.float64))
        self.kept += float(((away + update) * update).sum(dtype=torch.float64))
        self.update += float(update.square().sum(dtype=torch.float64))
        self.weights += 1

    def figures(self) -> dict[str, float | None]:
        """`relative_error`: ‖quantized − trained‖ / ‖Δ‖; `update_kept`: ⟨quantized − base, Δ⟩ / ‖Δ‖², 1 where all of
        the update is left and 0 where nothing; None where there is no update."""
        if not self.update:
            return {"relative_error": None, "update_kept": None, "adapted_weights": self.weights}
        return {
            "relative_error": (self.error / self.update) ** 0.5,
            "update_kept": self.kept / self.update,
            "adapted_weights": self.weights,
        }


@dataclass
class _Writer:
    """The tensors of the checkpoint one group after another, quantized on the way."""

    encoder: Encoder
    kind: str
    double_quant: bool
    loss: UpdateLoss = field(default_factory=UpdateLoss)

    @classmethod
    def of(cls, artifact: Artifact, encoder: Encoder, kind: str) -> _Writer:
        """Scales are quantized twice where those of the artifact's base were."""
        same = artifact.model.quantization in ("nf4", "fp4")
        return cls(encoder, kind, artifact.model.double_quant if same else True)

    @property
    def merged(self) -> MergedModel:
        return self.encoder.merged

    @property
    def dtype(self) -> torch.dtype:
        """Of what is not quantized."""
        return self.merged.default_dtype

    def quantizes(self, group: SaveGroup, specs: list[TensorSpec]) -> bool:
        """Whether a group is one weight matrix that bitsandbytes has a module for.

        Experts are not modules of their own, and what is fused on loading cannot be so in four bits; a weight that was
        fully trained is not quantized, nor one that was left unquantized for training, nor one that transformers leaves
        as it is or that the family's code multiplies with by itself, or whose rows not every reader finds.
        """
        return self._could_quantize(group, specs) and is_read_everywhere(
            self._matrix(group, specs), self.kind, self.double_quant
        )

    def _could_quantize(self, group: SaveGroup, specs: list[TensorSpec]) -> bool:
        """The same, whatever its shape."""
        name = group.names[0]
        return (
            len(group.names) == len(specs) == 1
            and name in self.merged.slots
            and self.merged.slots[name].kind != "none"
            and name not in self.merged.replaced
            and len(specs[0].shape) == 2
            and specs[0].shape == tuple(self.merged.source.shapes[name])
            and _becomes_4bit(self.merged.skeleton, name.removesuffix(".weight"))
        )

    def specs(self) -> list[TensorSpec]:
        result = []
        for group, specs in zip(self.merged.groups, self.merged.specs(), strict=True):
            if not self.quantizes(group, specs):
                result += specs
                continue
            empty = torch.empty(self._matrix(group, specs), dtype=self.dtype, device="meta")
            meta = quantize(empty, self.kind, self.double_quant)
            result += [TensorSpec(name, *form) for name, form in disk_specs(specs[0].name, meta).items()]
        return result + self.merged.copied_specs()

    def _matrix(self, group: SaveGroup, specs: list[TensorSpec]) -> tuple[int, int]:
        """The shape (out, in) of a group's one weight."""
        out, width = specs[0].shape[:: -1 if self.merged.slots[group.names[0]].transposed else 1]
        return out, width

    def left(self) -> list[tuple[int, int]]:
        """The shapes (out, in) of the weights that stay as they are for their shapes alone."""
        return [self._matrix(group, specs) for group, specs in zip(self.merged.groups, self.merged.specs(), strict=True)
                if self._could_quantize(group, specs) and not self.quantizes(group, specs)]  # fmt: skip

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for group, specs in zip(self.merged.groups, self.merged.specs(), strict=True):
            if not self.quantizes(group, specs):
                for name, tensor in self.merged.tensors(group).items():
                    self._refuse_no_number(name, tensor)
                    yield name, tensor
                continue
            quantized = self._encoded(group)
            yield from of_known_size(to_disk(specs[0].name, dataclasses.replace(quantized, dtype=self.dtype))).items()
        yield from self.merged.copied()

    def _encoded(self, group: SaveGroup) -> QuantizedTensor:
        encoder, moments = self.encoder, self.encoder.moments(group.names)  # before any weight is made
        trained = self._weight(encoder.trained, group)
        self._refuse_no_number(group.names[0], trained)
        adapted = group.names[0].removesuffix(".weight") in self.merged.layers
        starts = {base: trained if (model := encoder.model(base)) is encoder.trained else self._weight(model, group)
                  for base in encoder.candidates(adapted)}  # fmt: skip
        update = trained - self._weight(encoder.untuned, group) if adapted else None
        quantized = encoder.encode(self._code, trained, starts, update, moments)
        if update is not None:
            self.loss.add(quantized.dequantize(), trained, update)
        return quantized

    def _refuse_no_number(self, name: str, tensor: Tensor) -> None:
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"--format {self.kind}: NaN or infinity in {name}; the base or the adapter is broken: copy "
                            "or train it again")  # fmt: skip

    def _code(self, weight: Tensor, importance: Tensor | None) -> Coded[QuantizedTensor]:
        return coded_4bit(quantize(weight, self.kind, self.double_quant))

    def _weight(self, model: MergedModel, group: SaveGroup) -> Tensor:
        """The one weight of a group, fp32, (out, in)."""
        (weight,) = model.tensors(group).values()
        return weight.T.contiguous() if self.merged.slots[group.names[0]].transposed else weight


def _becomes_4bit(model: torch.nn.Module, module: str) -> bool:
    """Whether transformers makes bitsandbytes' module of one: not of classes derived from nn.Linear (falcon's, say)."""
    from transformers.pytorch_utils import Conv1D

    return type(model.get_submodule(module)) in (torch.nn.Linear, Conv1D) and not takes_weight(model, module)


def requantized_bytes(artifact: Artifact, merged: MergedModel, kind: str) -> int:
    """The bytes of the tensors that `write_requantized` writes."""
    return sum(spec.nbytes for spec in _Writer.of(artifact, Encoder(merged, [merged.base]), kind).specs())


def write_requantized(
    artifact: Artifact, encoder: Encoder, folder: Path, kind: str = "nf4", max_shard_size: int = 5 * 10**9
) -> dict[str, Any]:
    """Write shards and config.json into `folder`; tokenizer and generation settings are the caller's.

    Args:
        artifact: what is exported; scales are quantized twice where its base's were.
        encoder: makes the codes; its model's dtype is that of what is not quantized, and of products.
        folder: an empty one.
        kind: nf4 or fp4.
        max_shard_size: bytes of a file at most.

    Returns:
        files, bytes, quantized and unquantized weight matrices, `left_unquantized` (which not every reader would read
        rightly, in words, or None), and the loss: `relative_error`, `update_kept` (see `UpdateLoss.figures`).

    Raises:
        UserError: there is nothing in the model that transformers would load in 4 bits.
    """
    writer, merged = _Writer.of(artifact, encoder, kind), encoder.merged
    quantized = {group.names[0] for group, specs in zip(merged.groups, merged.specs(), strict=True)
                 if writer.quantizes(group, specs)}  # fmt: skip
    left = writer.left()
    why = why_left(left, kind, writer.double_quant) if left else None
    if not quantized and left:
        raise UserError(f"--format {kind}: no weight would be read as it was trained: {why}; choose --format "
                        "safetensors")  # fmt: skip
    if not quantized:
        raise UserError(
            f"--format {kind}: transformers quantizes no weight of a {merged.skeleton.config.model_type} model; choose "
            "--format safetensors"
        )
    specs = writer.specs()
    files = write_at_once(specs, writer.tensors(), folder, max_shard_size)
    write_config(merged, folder, _settings(merged, quantized, kind, writer.double_quant))
    return {
        "files": files,
        "bytes": sum(spec.nbytes for spec in specs),
        "quantized_weights": len(quantized),
        "unquantized_weights": len(merged.slots) - len(quantized),
        "left_unquantized": f"{len(left)} of {counted(len(left) + len(quantized), 'weight')}: {why}" if left else None,
        **writer.loss.figures(),
    }


def _settings(merged: MergedModel, quantized: set[str], kind: str, double_quant: bool) -> dict[str, Any]:
    """config.json's `quantization_config`."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=merged.default_dtype, llm_int8_skip_modules=_plain_linears(merged, quantized),
    ).to_dict()  # fmt: skip


def _plain_linears(merged: MergedModel, quantized: set[str]) -> list[str]:
    """The linear modules that the files hold unquantized; transformers must not make 4-bit modules of them."""
    from transformers.pytorch_utils import Conv1D

    return sorted(
        name for name, module in merged.skeleton.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and f"{name}.weight" not in quantized
    )  # fmt: skip
