"""What transformers reads off a batch to decide which masks to make, told beforehand.

Whether positions begin anew within a row, and whether any token is padding, transformers finds out by looking at
values: on a card that waits for all that the device has still to do, once a micro-batch or more, and on fake tensors
there is nothing to look at, so that it assumes the worst. Collating knows both. `known` says them for the time of a
forward pass; the masks are the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import masking_utils

if TYPE_CHECKING:
    from qlora_tool.data.batches import Batch


@dataclass(frozen=True)
class Known:
    """What is known of a batch.

    Attributes:
        begins_anew: whether there is a row in which positions begin anew.
        padded: whether its attention mask has zeros.
    """

    begins_anew: bool
    padded: bool

    @classmethod
    def of(cls, batch: Batch) -> Known:
        """Of a batch as `collate` makes it: it has a mask where a row is padded, and only there."""
        begins_anew = batch.segments is not None and len(batch.segments.lengths) > len(batch.input_ids)
        return cls(begins_anew, padded=batch.attention_mask is not None)


_known: ContextVar[Known | None] = ContextVar("known", default=None)


@contextmanager
def known(batch: Batch) -> Iterator[None]:
    """Masks that are made meanwhile are of this batch."""
    before = _known.set(Known.of(batch))
    try:
        yield
    finally:
        _known.reset(before)


def known_padding() -> bool | None:
    """Whether the batch that masks are being made of has padding; None: nothing was said."""
    said = _known.get()
    return None if said is None else said.padded


_looking = masking_utils.find_packed_sequence_indices


def _examples_by_position(position_ids: Tensor) -> Tensor | None:
    """transformers' `find_packed_sequence_indices`: the number of the example within its row, (rows, length), or None
    where each row is a single one."""
    said = _known.get()
    if said is None:
        return _looking(position_ids)
    if not said.begins_anew:
        return None
    steps = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1)
    return (steps != 1).cumsum(-1)


# Both of the functions that make masks look it up in their module. It is transformers' own outside of `known`.
masking_utils.find_packed_sequence_indices = _examples_by_position
