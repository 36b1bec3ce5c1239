"""Merge an adapter into the base it was trained on, tensor by tensor from disk to disk.

W = dequantize(W₄) + Δ, added in fp32 and rounded once to the dtype of the files. Merging into requantized weights, or
into the original 16-bit ones, would lose what was learned: neither is what training saw.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from qlora_tool.adapters.adapter import Adapter
from qlora_tool.adapters.attach_stored import cure_of_misfit, refuse_misfit, refuse_not_repeated, resized
from qlora_tool.adapters.lacking import lacking, say_lacking
from qlora_tool.adapters.peft_reading import for_model
from qlora_tool.adapters.stack import (
    Parts,
    Rows,
    Weighted,
    refuse_unaddable,
    replaced_by,
    replacement,
    rows_by,
    same,
    same_rows,
)
from qlora_tool.adapters.stored import StoredAdapter
from qlora_tool.adapters.token_rows import follows, refuse_rows
from qlora_tool.errors import UserError
from qlora_tool.export.dtypes import FLOAT16_LIMIT, Unfit
from qlora_tool.files.tensors import Checkpoint, TensorSpec
from qlora_tool.model.experts import expert_weight_names, is_experts_module
from qlora_tool.model.names import SaveGroup, plan_save
from qlora_tool.model.parameter_source import ParameterSource, tied_names
from qlora_tool.model.slots import (
    Prepare,
    Quantization,
    Slot,
    find_embedding_slots,
    find_slots,
    is_linear,
    quantize_parameter,
)
from qlora_tool.model.taken_weights import takes_weight
from qlora_tool.model.text_part import is_outside, outside_text
from qlora_tool.once import log_once
from qlora_tool.sizes import noun_of
from qlora_tool.terminal import progress
from qlora_tool.weights.quantized import QuantizedTensor, disk_group, from_disk

_SAMPLE = 1 << 16  # values of a matrix in which float16's rounding is measured
_BFLOAT16_ERROR = 2**-9  # of a matrix over its size, about: half a step of 2⁻⁷ to 2⁻⁸ of each value, at most

logger = logging.getLogger(__name__)


@dataclass
class MergedModel:
    """The merged tensors of a model, under the names of its checkpoint, made one group at a time.

    Args:
        skeleton: the base's modules on meta.
        checkpoint: the base's weights.
        quantization: how the base was quantized while the adapter was trained.
        adapter: to merge; None to export the dequantized base alone.
        stack: adapters whose weighted sum is merged in the place of `adapter`.
        base: `dequantized`: onto what was trained against; `original`: onto the checkpoint's own weights.
        dtype: of the files; None keeps the base's dtypes.
        keeps_wider: tensors that the base stores in more than 16 bits stay so, whatever `dtype` is.
        cached: the quantized base of an earlier run, which spares quantizing; it is what the adapter was trained on,
            unless weights were prepared.
        refuse_coarse: refuse a matrix, too, that float16 rounds worse than bfloat16 does: most of it lies below 1e-5.
        prepare: the step before quantizing that the adapter was trained with, by default what it says itself; see
            `quantize_parameter`.

    Attributes:
        layers: the adapters of each place, by its name.
        replaced: the tensors that adapters replace, with their weights, by parameter name.
        unties: whether the adapter changes one of two tied tensors alone, so that the files hold both.

    Raises:
        UserError: the adapter is not for this base.
    """

    skeleton: torch.nn.Module
    checkpoint: Checkpoint
    quantization: Quantization
    adapter: StoredAdapter | None
    base: str = "dequantized"
    dtype: torch.dtype | None = None
    keeps_wider: bool = False
    cached: Checkpoint | None = None
    refuse_coarse: bool = False
    prepare: Prepare | None = None
    stack: Sequence[Weighted] = ()
    layers: Mapping[str, Sequence[Adapter]] = field(init=False)
    replaced: Mapping[str, Parts] = field(init=False)
    unties: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        if self.adapter:
            self.adapter = for_model(self.adapter, self.skeleton)
        if self.adapter and self.prepare is None:
            self.prepare = self.adapter.prepare()
        self.slots = find_slots(self.skeleton, self.quantization)
        if self.adapter:
            refuse_not_repeated(self.adapter, self.slots)
        self._outside = outside_text(self.skeleton)
        self._embeddings = find_embedding_slots(self.skeleton, self.quantization)
        self.source = ParameterSource(self.skeleton, self.checkpoint, "cpu")
        self._take(self.stack or ([Weighted("", self.adapter, 1.0)] if self.adapter else []))
        self._parameters = {name for name, _ in self.skeleton.named_parameters(remove_duplicate=False)}
        self._biases = _bias_deltas(self.layers, self.source)
        self.names, self._twins = list(self.source.names), {}
        for target, origin in tied_names(self.skeleton).items():
            self._tie(target, origin)
        self.stored_dtype = _common_dtype(self.source, self.skeleton)
        self.groups: list[SaveGroup] = plan_save(self.skeleton, self.names)

    @property
    def default_dtype(self) -> torch.dtype:
        """What the files count as: the dtype of most of them."""
        return self.dtype or self.stored_dtype

    def _take(self, stack: Sequence[Weighted]) -> None:
        """Gather what adapters do to each tensor, those for another base being refused."""
        stack = [replace(one, stored=for_model(one.stored, self.skeleton)) for one in stack]
        shapes, layers = adaptable_shapes(self.skeleton), {}
        if self.stack:
            refuse_unaddable(stack)
        for one in stack:
            adds = one.stored.method.has_delta  # of others, whole weights are all that there is to merge
            left = lacking(self.skeleton, one.stored)
            say_lacking(one.stored, left)
            found = one.scaled().layers(torch.float32, shapes=shapes, left=left) if adds else {}
            self._refuse_misfit(one.stored, found, shapes)
            refuse_rows(self.skeleton, one.stored.token_rows(), found,
                        f"{one.stored.folder}: trainable_token_indices", "merge this adapter with PEFT instead")
            taken = [name for name in found if takes_weight(self.skeleton, name)]
            if taken:
                log_once(
                    logger, logging.WARNING,
                    f"{one.stored.folder}: {len(taken)} of its adapters ({taken[0]} …) are on weights that this family "
                    f"multiplies with itself: the model computes without them, here and under PEFT, so they are not "
                    "merged"
                )
            for name in (name for name in found if name not in taken):
                layers.setdefault(name, []).append(found[name])
        self.layers, self.replaced, self._rows = layers, replaced_by(stack), rows_by(stack, follows(self.skeleton))

    def _refuse_misfit(
        self, stored: StoredAdapter, layers: Mapping[str, Adapter], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        """Refuse an adapter for another base in one line: how much of it does not fit, and the first that does not."""
        faults, replaced = [], stored.replaced_tensors()
        for name in layers:
            try:
                refuse_misfit(stored, [name], shapes, self.skeleton)
            except UserError as fault:
                faults.append(fault.lines[0].removeprefix(f"{stored.folder}: "))
        for name, tensor in replaced.items():
            found, expected = tuple(tensor.shape), self.source.shapes.get(name)
            if expected is None:
                faults.append(f"replaces {name}, which is not a tensor of this model")
            elif found != expected:
                faults.append(f"replaces {name} with one of shape {found}, but it is {expected} in this model"
                              f"{resized(found, expected)}")  # fmt: skip
        for name, (tokens, rows) in (single := stored.token_rows()).items():
            expected = shapes.get(name)
            if expected is None or expected[1] != rows.shape[1] or not all(0 <= one < expected[0] for one in tokens):
                faults.append(f"has rows {tuple(rows.shape)} of {name}, but it is {expected} in this model")
        if faults:
            count = len(layers) + len(replaced) + len(single)
            cure = "" if "was resized" in faults[0] else f"; {cure_of_misfit(stored, self.skeleton, ', with --model')}"
            raise UserError(
                f"{stored.folder}: not for the base {self.checkpoint.folder}: {len(faults)} of its {count} layers "
                f"and tensors {noun_of(len(faults), 'does', 'do')} not fit, the first because it {faults[0]}{cure}"
            )

    def _tie(self, target: str, origin: str) -> None:
        """Of two tied tensors a file holds one, either of the two, until an adapter changes one of them alone."""
        stored = [name for name in (origin, target) if name in self.source.names]
        replaced = [name for name in (origin, target) if name in self.replaced]
        adapted = any(name.removesuffix(".weight") in self.layers for name in (origin, target))
        apart = len(replaced) == 2 and not same(self.replaced[origin], self.replaced[target])
        pair = [name.removesuffix(".weight") for name in (origin, target)]
        apart = apart or not same_rows(*(self._rows.get(name, []) for name in pair))
        if not (adapted or apart or len(replaced) == 1):
            return
        self.unties = True
        if len(stored) == 1:
            twin = target if stored == [origin] else origin
            self.names.append(twin)
            self._twins[twin] = stored[0]

    def specs(self) -> list[list[TensorSpec]]:
        """What every group will write, without reading anything."""
        shapes = self.source.shapes
        result = []
        for group in self.groups:
            dtypes = {name: self._file_dtype(name) for name in group.names}
            meta = {name: torch.empty(shapes[name], dtype=dtype, device="meta") for name, dtype in dtypes.items()}
            converted = group.convert(self.skeleton, meta)
            result.append([TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in converted.items()])
        return result

    def copied_specs(self) -> list[TensorSpec]:
        """What the base's files hold and the model has no use for, which goes along as it is: the towers of a
        multimodal base whose text alone is a model of its own, heads that predict further tokens."""
        return [TensorSpec(name, *self.source.unused_as(name)) for name in self.source.unused]

    def copied(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of `copied_specs`."""
        for name in self.source.unused:
            yield name, self.source.read_unused(name)

    def stream_from(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """The checkpoint tensors by name, in the order of `specs` and then `copied_specs`, from the one with this index
        on."""
        with progress("merging", len(self.groups), "tensors") as bar:
            for group, specs in zip(self.groups, self.specs(), strict=True):
                if index < len(specs):
                    yield from list(self.tensors(group).items())[index:]
                index = max(0, index - len(specs))
                bar.advance()
        for name in self.source.unused[index:]:
            yield name, self.source.read_unused(name)

    @torch.no_grad()
    def tensors(self, group: SaveGroup) -> dict[str, Tensor]:
        """The checkpoint tensors of one group, merged and rounded.

        Raises:
            Unfit: one of them does not fit the files' dtype.
        """
        return group.convert(self.skeleton, {name: self.value(name) for name in group.names})

    @torch.no_grad()
    def value(self, name: str) -> Tensor:
        """One tensor of the model in the dtype of the files, in the orientation of the model."""
        dtype, slot = self._file_dtype(name), self.slots.get(name) or self._embeddings.get(name)
        if slot is not None and self._is_untouched(name):
            slot = replace(slot, kind="none", asked=False)
        layers = self.layers.get(name.removesuffix(".weight"), ())
        value = self._replacement(name, slot) if name in self.replaced else self._base_value(name, slot)
        if name in self._biases:
            value = value.float() + self._biases[name]
        if layers:
            value = value.to(torch.float32, copy=name in self.replaced)  # (out, in)
        for layer in layers:
            value = layer.merge(value)
        if rows := self._rows.get(name.removesuffix(".weight")):
            value = self._with_rows(value, rows, lambda: self._base_value(name, slot),
                                    alone=not self.stack or not (layers or name in self.replaced))  # fmt: skip
        if dtype == torch.float16:
            _refuse_unfit(name, value, self.refuse_coarse)
        if slot is not None and slot.transposed:
            value = value.transpose(-1, -2)
        return value.to(dtype).contiguous()

    def _with_rows(
        self, value: Tensor, rows: Sequence[Rows], base: Callable[[], Tensor], alone: bool
    ) -> Tensor:
        """A weight (vocabulary, dim) with what adapters do to single rows: those themselves, where there are no others'
        changes to add them to (`alone`)."""
        value = value.to(torch.float32, copy=True)
        if alone and len(rows) == 1 and rows[0].weight == 1:
            value[rows[0].tokens] = rows[0].values.float()
            return value
        for one in rows:
            value[one.tokens] += one.change(base)
        return value

    def _replacement(self, name: str, slot: Slot | None) -> Tensor:
        """What adapters put in the place of a tensor, (out, in) where it is a linear module's."""
        turned = slot is not None and slot.transposed
        parts = [(weight, tensor.transpose(-1, -2) if turned else tensor) for weight, tensor in self.replaced[name]]
        return replacement(parts, lambda: self._base_value(name, slot))

    def base_weight(self, place: str) -> Tensor:
        """The weight at a place of `layers` that the adapter was trained on top of, fp32: (out, in) of a linear module,
        (vocabulary, dim) of embeddings, (experts, out, in)."""
        name = place if place in self.slots else f"{place}.weight"
        return self._base_value(name, self.slots.get(name) or self._embeddings.get(name)).float()

    def _base_value(self, name: str, slot: Slot | None) -> Tensor:
        """What the adapter was trained on top of, (out, in) where it is a linear module's."""
        name = self._twins.get(name, name)  # a tied one is quantized, and prepared, under the name it is stored by
        cached = self.cached if self.base == "dequantized" and self.prepare is None else None
        if slot is not None and cached is not None and (tensors := disk_group(name, cached)):
            return from_disk(name, {tensor: cached.read(tensor) for tensor in tensors}).dequantize(torch.float32)
        value = self.source.read(name)
        if slot is not None:
            return self._as_trained_against(name, value, slot)
        return value.dequantize(torch.float32) if isinstance(value, QuantizedTensor) else value

    def _as_trained_against(self, name: str, value: Tensor | QuantizedTensor, slot: Slot) -> Tensor:
        if self.base == "original":
            if isinstance(value, QuantizedTensor):
                raise UserError(
                    f"--base original: {self.checkpoint.folder} is itself quantized; merge onto a 16-bit checkpoint, "
                    "or leave --base at dequantized"
                )
            slot = replace(slot, kind="none")
        quantized = quantize_parameter(name, value, slot, self.quantization, self.prepare)
        return quantized.dequantize(torch.float32) if isinstance(quantized, QuantizedTensor) else quantized

    def _file_dtype(self, name: str) -> torch.dtype:
        stored = self.source.stored_dtype(self._twins.get(name, name))
        if self._is_untouched(name) and stored.is_floating_point:
            return stored
        if name in self.slots or name in self.replaced:
            return self.default_dtype
        if not stored.is_floating_point:  # quantized codes of a parameter, or a buffer of integers
            return self.default_dtype if name in self._parameters else stored
        if self.dtype is None or (self.keeps_wider and stored.itemsize > 2):
            return stored
        return self.dtype

    def _is_untouched(self, name: str) -> bool:
        """Whether a tensor lies beside the text part and the adapter leaves it alone: its bytes stay as they are."""
        module = name.removesuffix(".weight")
        adapted = name in self.replaced or name in self._biases or module in self.layers or module in self._rows
        return not adapted and is_outside(name, self._outside)


def _refuse_unfit(name: str, value: Tensor, refuse_coarse: bool) -> None:
    """Refuse values that float16 makes infinite and, if asked, a matrix that it rounds worse than bfloat16 does.

    Raises:
        Unfit: with the tensor's largest value, or its typical one.
    """
    if value.dtype == torch.float16 or value.numel() == 0:
        return
    low, high = (float(end) for end in value.aminmax())
    largest = max(-low, high)
    if not largest < FLOAT16_LIMIT:  # no number at all is refused too
        raise Unfit(name, f"has values up to {largest:.3g}", largest)
    if refuse_coarse and value.dim() > 1:
        flat = value.reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLE) | 1].float()
        if float((sample - sample.half()).norm()) > _BFLOAT16_ERROR * float(sample.norm()):
            typical = float(sample.square().mean().sqrt())
            raise Unfit(name, f"has typical values of {typical:.1g}, too small for it", largest)


def adaptable_shapes(skeleton: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every weight that takes an adapter: (out, in) of linear modules, (vocabulary, dim) of embeddings, by
    the module's name; (experts, out, in) of experts, by the parameter's."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in skeleton.named_modules():
        if is_linear(module):
            shape = tuple(module.weight.shape)
            shapes[name] = shape if isinstance(module, torch.nn.Linear) else shape[::-1]  # a Conv1D is (in, out)
        elif isinstance(module, torch.nn.Embedding):
            shapes[name] = tuple(module.weight.shape)
        elif is_experts_module(module):
            for attribute in expert_weight_names(module):
                experts, *sizes = getattr(module, attribute).shape
                shapes[f"{name}.{attribute}"] = (experts, *(sizes[::-1] if module.is_transposed else sizes))
    return shapes


@torch.no_grad()
def _bias_deltas(layers: Mapping[str, Sequence[Adapter]], source: ParameterSource) -> dict[str, Tensor]:
    """What adapters add to biases (PEFT's lora_bias), by parameter name."""
    deltas = {}
    for name, delta in ((name, layer.bias_delta()) for name, found in layers.items() for layer in found):
        if delta is not None:
            if f"{name}.bias" not in source.names:
                raise UserError(f"{name}: the adapter adds a bias, but the model's module has none to merge it into")
            deltas[f"{name}.bias"] = deltas.get(f"{name}.bias", 0) + delta
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
