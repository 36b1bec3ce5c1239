"""Which examples go into which rows of which batch, and the tensors of a batch.

With packing a row holds several examples. They never see one another: position ids begin anew at each, from which
transformers tells them apart (`masking_utils.find_packed_sequence_indices`, where there is no attention mask), and the
first token of each has no label, because the token before it is another example's.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qlora_tool.data.labels import IGNORED

if TYPE_CHECKING:
    import torch

    from qlora_tool.data.tokenize import Example


def plan_epoch(
    lengths: Sequence[int],
    *,
    batch_size: int,
    max_length: int,
    packing: bool,
    shuffle: bool,
    seed: int,
    epoch: int,
) -> list[list[list[int]]]:
    """Batches of rows of example indices: every example once, the same for the same arguments, whatever random state.

    Without packing a row is one example. With packing and shuffling, rows are filled best-fit decreasing and come in
    random order; examples of one length are dealt anew each epoch, and the number of rows is the same in all of them.
    With packing alone, examples stay in the file's order: a row takes the next one while it fits.

    Args:
        lengths: tokens of every example, none above max_length.
        batch_size: rows in a batch; the last batch may have fewer.
        max_length: tokens in a packed row, at most.
        seed, epoch: together they decide the order.
    """
    if packing and max(lengths, default=0) > max_length:
        raise ValueError(f"an example of {max(lengths)} tokens is longer than max_length {max_length}")
    # A string seeds alike in every process and Python version (hash() of a tuple would not promise that).
    order = random.Random(f"{seed}, epoch {epoch}")
    indices = list(range(len(lengths)))
    if shuffle:
        order.shuffle(indices)
    if not packing:
        rows = [[index] for index in indices]
    elif shuffle:
        rows = _best_fit_decreasing(indices, lengths, max_length)
        order.shuffle(rows)
    else:
        rows = _next_fit(indices, lengths, max_length)
    return [rows[begin : begin + batch_size] for begin in range(0, len(rows), batch_size)]


def _best_fit_decreasing(indices: Sequence[int], lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Longest first, each into the row that it leaves the least room in. Examples of one length keep their order."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for index in sorted(indices, key=lambda index: -lengths[index]):
        length = lengths[index]
        place = bisect_left(room, (length, -1))
        if place < len(room):
            left, row = room.pop(place)
        else:
            left, row = max_length, len(rows)
            rows.append([])
        rows[row].append(index)
        insort(room, (left - length, row))
    return rows


def _next_fit(indices: Sequence[int], lengths: Sequence[int], max_length: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room = -1
    for index in indices:
        if lengths[index] > room:
            rows.append([])
            room = max_length
        rows[-1].append(index)
        room -= lengths[index]
    return rows


@dataclass(frozen=True)
class Batch:
    """The tensors of one forward pass, int64 and (batch, sequence) where nothing else is said.

    Attributes:
        input_ids: padded at the right.
        labels: the id where a token is trained, else -100; not shifted. An example's first token never has one.
        attention_mask: 0 where a row is padded, or None where no row is, and always with packing.
        position_ids: with packing, beginning anew at every example and at the padding; else None.
        predicting: (trained_tokens,), the places in the flattened batch whose logits predict a trained token: each is
            one before its label's.
        targets: (trained_tokens,), the tokens predicted there.
        tokens: input tokens that are not padding.
        trained_tokens: labels that count in the loss.
        where: the rows of data in it, for messages.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    predicting: torch.Tensor
    targets: torch.Tensor
    tokens: int
    trained_tokens: int
    where: list[str]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""

        def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        return replace(
            self,
            input_ids=moved(self.input_ids),
            labels=moved(self.labels),
            attention_mask=moved(self.attention_mask),
            position_ids=moved(self.position_ids),
            predicting=moved(self.predicting),
            targets=moved(self.targets),
        )


def collate(rows: list[list[Example]], *, pad_token_id: int, packing: bool) -> Batch:
    """Put rows of examples into tensors as long as the longest row.

    Args:
        rows: the examples of each row; without packing one a row.
        pad_token_id: fills the end of shorter rows. Any id does, one that is trained elsewhere too: padding is never
            told by its id, but by where it stands.
        packing: whether rows may hold several examples.
    """
    import torch

    if not packing and any(len(row) != 1 for row in rows):
        raise ValueError("without packing a row holds exactly one example")
    sequence = max(sum(len(example.input_ids) for example in row) for row in rows)
    input_ids, labels, positions, mask = [], [], [], []
    for row in rows:
        ids = [token for example in row for token in example.input_ids]
        padding = sequence - len(ids)
        input_ids.append(ids + [pad_token_id] * padding)
        mask.append([1] * len(ids) + [0] * padding)
        labels.append([label for example in row for label in _counted_labels(example)] + [IGNORED] * padding)
        # Padding is a segment of its own: as the last example's next positions it would be attended with it.
        segments = [*(len(example.input_ids) for example in row), padding]
        positions.append([position for length in segments for position in range(length)])
    # A row's first label is never counted, so that none is predicted from another row.
    flat = [label for row in labels for label in row]
    trained = [place for place, label in enumerate(flat) if label != IGNORED]
    tokens = sum(map(sum, mask))
    padded = tokens < sequence * len(rows)
    return Batch(
        input_ids=torch.tensor(input_ids),
        labels=torch.tensor(labels),
        attention_mask=torch.tensor(mask) if padded and not packing else None,
        position_ids=torch.tensor(positions) if packing else None,
        predicting=torch.tensor([place - 1 for place in trained], dtype=torch.int64),
        targets=torch.tensor([flat[place] for place in trained], dtype=torch.int64),
        tokens=tokens,
        trained_tokens=len(trained),
        where=[example.where for row in rows for example in row],
    )


def _counted_labels(example: Example) -> list[int]:
    return [IGNORED, *example.labels[1:]] if example.labels else []
