"""A checkpoint's tensors as a model names and shapes them, read one by one."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from qlora_tool.errors import UserError
from qlora_tool.files.tensors import Checkpoint, missing_names
from qlora_tool.model.names import LoadGroup, plan_load
from qlora_tool.model.resized import fitted
from qlora_tool.model.stored import StoredAs, refuse_leftover_scales, stored_tensors
from qlora_tool.sizes import noun_of
from qlora_tool.weights.by_rows import experts_from_rows, rows_of
from qlora_tool.weights.quantized import QuantizedTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_SUMMED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_COMPUTED = re.compile(r"(rotary_emb\.inv_freq|\.attn\.(masked_)?bias|position_ids)$")  # buffers of older files


class TensorSource(Protocol):
    """Where the tensors of a model come from: a checkpoint, or, for a prediction, nowhere.

    Attributes:
        names: of the parameters and persistent buffers that it gives, in the order they are read in.
        shapes: of the model's tensors, as its modules have them.
        has_values: whether they are a model's values; False: fake or random tensors, whose values say nothing.
    """

    names: Sequence[str]
    shapes: Mapping[str, tuple[int, ...]]
    has_values: bool

    def read(self, name: str) -> Tensor | QuantizedTensor:
        """One tensor, in the orientation of the model; a `QuantizedTensor` (out, in) where it is stored quantized."""
        ...

    def stored_dtype(self, name: str) -> torch.dtype:
        """What `read` gives an unquantized tensor in."""
        ...


class ParameterSource:
    """A checkpoint's tensors under the model's names, each read and converted when it is asked for: a `TensorSource`.

    What is stored in FP8 or MXFP4 is dequantized as it is read.

    Args:
        model: a skeleton.
        checkpoint: its weights.
        device: where tensors are read to.

    Attributes:
        names: of all tensors that the checkpoint gives, in its natural order.
        unused: what the checkpoint has besides, by its own names: towers that a text model leaves out, heads that
            predict further tokens.

    Raises:
        UserError: tensors are missing, or scales are left over.
    """

    has_values = True

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint, device: torch.device | str):
        self.model, self.checkpoint, self.device = model, checkpoint, device
        self._as = StoredAs.of(model)
        self._stored = stored_tensors(checkpoint, self._as)
        plan = plan_load(model, list(self._stored))
        refuse_leftover_scales(checkpoint, plan.unexpected, self._as)
        if plan.unexpected:
            logger.warning("%d tensors of the checkpoint are not used by the model: %s", len(plan.unexpected),
                           missing_names(plan.unexpected, {}))  # fmt: skip
        used = {source for group in plan.groups for _, source in group.sources}
        self.unused: Sequence[str] = [name for name in self._stored if name not in used and not _COMPUTED.search(name)]
        tensors = model.state_dict()
        self.shapes: Mapping[str, tuple[int, ...]] = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self._floats = {name: tensor.is_floating_point() for name, tensor in tensors.items()}
        self._groups = {name: group for group in plan.groups for name in group.targets()}
        self.names: Sequence[str] = list(self._groups)
        self._waiting: dict[str, Tensor] = {}  # read along with another one, not asked for yet
        _refuse_missing(self, plan.unexpected)

    def read(self, name: str) -> Tensor | QuantizedTensor:
        """One tensor of the model; a `QuantizedTensor` where bitsandbytes quantized it before.

        Raises:
            UserError: its shape is not what the model's configuration says, or its file is broken.
        """
        if name not in self._waiting:
            self._waiting |= self._convert(self._groups[name])
        value = self._waiting.pop(name)
        if isinstance(value, Tensor) and self._floats.get(name) and not value.is_floating_point():
            raise UserError(
                f"{self.checkpoint.folder}: tensor {name} holds {str(value.dtype).removeprefix('torch.')}, where "
                "numbers with a fraction are expected; download the model again, or its unquantized weights"
            )
        if isinstance(value, Tensor) and tuple(value.shape) != self.shapes[name]:
            value = fitted(value, self.shapes[name], self.model.config)
        if tuple(value.shape) != self.shapes[name] and not (
            isinstance(value, QuantizedTensor) and tuple(value.shape) == _transposed(self.shapes[name])
        ):
            raise UserError(
                f"{self.checkpoint.folder}: tensor {name} has shape {tuple(value.shape)}, but config.json makes it "
                f"{self.shapes[name]}; config.json and the weights are of two models: download the model again"
            )
        return value

    def read_unused(self, name: str) -> Tensor:
        """One of `unused`, byte for byte where it is not quantized."""
        value = self._read_stored(name)
        return value.dequantize(self._as.dtype) if isinstance(value, QuantizedTensor) else value

    def unused_as(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """The dtype and shape that `read_unused` gives."""
        tensor = self._stored[name]
        dtype = self._as.dtype if tensor.is_bitsandbytes else tensor.dtype(self.checkpoint, self._as)
        return dtype, tensor.shape(self.checkpoint)

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype that a tensor of the model has in the checkpoint, or after dequantizing one in FP8 or MXFP4."""
        return self._stored[self._groups[name].sources[0][1]].dtype(self.checkpoint, self._as)

    def stored_bytes(self, name: str) -> int:
        """The bytes that the checkpoint tensors of one of the model's take, in `stored_dtype`."""
        return sum(self._stored[source].nbytes(self.checkpoint, self._as) for _, source in self._groups[name].sources)

    def _convert(self, group: LoadGroup) -> dict[str, Tensor | QuantizedTensor]:
        if group.converter is None:
            return group.convert(self.model, self._read_stored)
        try:
            return self._joined(group) or group.convert(self.model, self._read_plain)
        except (RuntimeError, ValueError, IndexError) as error:
            names = [name for _, name in group.sources]
            raise UserError(
                f"{self.checkpoint.folder}: its tensors {missing_names(names, {})} cannot be combined into "
                f"{group.target} ({str(error).splitlines()[0]}); some are missing, or config.json is "
                "another model's: download the model again"
            ) from error

    def _joined(self, group: LoadGroup) -> dict[str, QuantizedTensor] | None:
        """Experts that bitsandbytes quantized one by one, codes and scales joined as transformers joins their values;
        None where that is not what they are."""
        names = [name for _, name in group.sources]
        shapes = {target: self.shapes[target] for target in group.targets()}
        if not all(self._stored[name].is_bitsandbytes for name in names) or any(len(s) != 3 for s in shapes.values()):
            return None
        first, rows = None, {}
        for name in names:
            value = self._read_stored(name)
            first = first or value
            if (found := rows_of(value)) is None or (value.kind, value.dtype) != (first.kind, first.dtype):
                return None
            rows[name] = found
        codes, scales = (group.convert(self.model, lambda name, part=part: rows[name][part]) for part in (0, 1))
        try:
            return {target: experts_from_rows(first, codes[target], scales[target], shape)
                    for target, shape in shapes.items()}  # fmt: skip
        except (ValueError, KeyError):  # a conversion that turns them, say
            return None

    def _read_plain(self, name: str) -> Tensor:
        value = self._read_stored(name)
        return value.dequantize(value.dtype) if isinstance(value, QuantizedTensor) else value

    def _read_stored(self, name: str) -> Tensor | QuantizedTensor:
        try:
            value = self._stored[name].read(lambda part: self.checkpoint.read(part, self.device), self._as)
            self._refuse_no_numbers(name, value)
            return value
        except (ValueError, KeyError, StopIteration) as error:
            raise UserError(f"{self.checkpoint.folder}: cannot read the quantized weight {name}: {error}") from error


    def _refuse_no_numbers(self, name: str, value: Tensor | QuantizedTensor) -> None:
        """Refuse a tensor with values that are no finite numbers, while it is at hand."""
        tensors = value.tensors().values() if isinstance(value, QuantizedTensor) else [value]
        for tensor in tensors:
            if tensor.dtype in _SUMMED and not is_finite(tensor):
                count = int((~tensor.isfinite()).sum())
                raise UserError(
                    f"{self.checkpoint[self._stored[name].parts[0]].file}: tensor {name}: {count:,} of its "
                    f"{tensor.numel():,} values {noun_of(count, 'is no finite number', 'are no finite numbers')} (NaN "
                    "or infinite); download the model again, or take an earlier one: the training that made it diverged"
                )


def is_finite(tensor: Tensor) -> bool:
    """Whether every value is a finite number: by their sum, which one that is none spoils, in one pass; value by value
    where finite ones add up to more than a number holds."""
    total = tensor.sum(dtype=torch.float32 if tensor.dtype.itemsize <= 4 else None)
    return bool(total.isfinite()) or bool(tensor.isfinite().all())


def _transposed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(…, in, out) → (…, out, in)."""
    return (*shape[:-2], *shape[-2:][::-1])


def _refuse_missing(source: ParameterSource, unexpected: list[str]) -> None:
    model = source.model
    tied = tied_names(model)
    tied |= {name: target for target, name in tied.items()}  # a checkpoint may hold either of the two
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    found = set(source.names)
    missing = [
        name for name in source.shapes
        if name not in found and tied.get(name) not in found and not any(rule.search(name) for rule in ignored)
    ]  # fmt: skip
    if missing:
        raise UserError(
            f"{source.checkpoint.folder}: {len(missing)} of the model's {len(source.shapes)} tensors "
            f"{noun_of(len(missing), 'is', 'are')} missing from "
            f"its weights: {missing_names(missing, dict.fromkeys(unexpected))}; download the model again"
        )


def tied_names(model: nn.Module) -> dict[str, str]:
    """{tied parameter: the parameter whose values it shares}; empty where the configuration ties nothing."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})
