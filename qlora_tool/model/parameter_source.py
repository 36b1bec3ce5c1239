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
from qlora_tool.weights.quantized import QuantizedTensor, disk_group, from_disk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


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


class ParameterSource:
    """A checkpoint's tensors under the model's names, each read and converted when it is asked for: a `TensorSource`.

    Args:
        model: a skeleton.
        checkpoint: its weights.
        device: where tensors are read to.

    Attributes:
        names: of all tensors that the checkpoint gives, in its natural order.

    Raises:
        UserError: tensors are missing.
    """

    has_values = True

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint, device: torch.device | str):
        self.model, self.checkpoint, self.device = model, checkpoint, device
        self._stored = {name: group for name in checkpoint if (group := disk_group(name, checkpoint))}
        statistics = {name for group in self._stored.values() for name in group[1:]}
        plan = plan_load(model, [name for name in checkpoint if name not in statistics])
        if plan.unexpected:
            logger.warning("%d tensors of the checkpoint are not used by the model: %s", len(plan.unexpected),
                           missing_names(plan.unexpected, {}))  # fmt: skip
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
        }
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
        if tuple(value.shape) != self.shapes[name] and not (
            isinstance(value, QuantizedTensor) and tuple(value.shape) == _transposed(self.shapes[name])
        ):
            raise UserError(
                f"{self.checkpoint.folder}: tensor {name} has shape {tuple(value.shape)}, but config.json makes it "
                f"{self.shapes[name]}; config.json and the weights are of two models: download the model again"
            )
        return value

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype that a tensor of the model has in the checkpoint."""
        return self.checkpoint[self._groups[name].sources[0][1]].dtype

    def stored_bytes(self, name: str) -> int:
        """The bytes that the checkpoint tensors of one of the model's take."""
        return sum(self.checkpoint[source].nbytes for _, source in self._groups[name].sources)

    def _convert(self, group: LoadGroup) -> dict[str, Tensor | QuantizedTensor]:
        if group.converter is None:
            return group.convert(self.model, self._read_stored)
        try:
            return group.convert(self.model, self._read_plain)
        except (RuntimeError, ValueError, IndexError) as error:
            names = [name for _, name in group.sources]
            raise UserError(
                f"{self.checkpoint.folder}: its tensors {missing_names(names, {})} cannot be combined into "
                f"{group.target} ({str(error).splitlines()[0]}); some are missing, or config.json is "
                "another model's: download the model again"
            ) from error

    def _read_plain(self, name: str) -> Tensor:
        value = self._read_stored(name)
        return value.dequantize(value.dtype) if isinstance(value, QuantizedTensor) else value

    def _read_stored(self, name: str) -> Tensor | QuantizedTensor:
        if name not in self._stored:
            return self.checkpoint.read(name, self.device)
        tensors = {part: self.checkpoint.read(part, self.device) for part in self._stored[name]}
        try:
            return from_disk(name, tensors)
        except (ValueError, KeyError, StopIteration) as error:
            raise UserError(f"{self.checkpoint.folder}: cannot read the quantized weight {name}: {error}") from error


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
            f"{source.checkpoint.folder}: {len(missing)} of the model's {len(source.shapes)} tensors are missing from "
            f"its weights: {missing_names(missing, dict.fromkeys(unexpected))}; download the model again"
        )


def tied_names(model: nn.Module) -> dict[str, str]:
    """{tied parameter: the parameter whose values it shares}; empty where the configuration ties nothing."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})
