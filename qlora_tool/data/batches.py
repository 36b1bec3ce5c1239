"""Which examples go into which rows of which batch, and the tensors of a batch.

With packing a row holds several examples. They never see one another: position ids begin anew at each, attention goes
by segment (`model/segments.py`; families that cannot get a mask from transformers, which tells examples apart by their
positions where there is no attention mask), and the first token of each has no label, because the token before it is
another example's. Padding-free batches are the same thing without packing: one row of examples, one after the other.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import TYPE_CHECKING

from qlora_tool.data.labels import IGNORED

if TYPE_CHECKING:
    import torch

    from qlora_tool.data.tokenize import Example

# Batches within which lengths are sorted, as many as transformers takes: enough to sort by, few enough to stay random.
_BATCHES_SORTED_TOGETHER = 50


def plan_epoch(
    lengths: Sequence[int],
    *,
    batch_size: int,
    max_length: int,
    packing: bool,
    shuffle: bool,
    seed: int,
    epoch: int,
    group_by_length: bool = False,
) -> list[list[list[int]]]:
    """Batches of rows of example indices: every example once, the same for the same arguments, whatever random state.

    Without packing a row is one example; grouped by length, those of a batch are about as long. With packing and
    shuffling, rows are filled longest first and come in random order; examples of one length are dealt anew each
    epoch, and the number of rows is the same in all of them. With packing alone, examples stay in the file's order: a
    row takes the next one while it fits.

    Args:
        lengths: tokens of every example, none above max_length.
        batch_size: rows in a batch; the last batch may have fewer.
        max_length: tokens in a packed row, at most.
        seed, epoch: together they decide the order.
        group_by_length: with shuffling and without packing, put examples of like length into a batch. The batches
            still come in random order.

    Raises:
        ValueError: an example is longer than the row it is to be packed into.
    """
    if packing and max(lengths, default=0) > max_length:
        longest = max(lengths)
        raise ValueError(
            f"example {lengths.index(longest)} has {longest} tokens, more than a row's max_length of {max_length}: it "
            "cannot be packed; cut it before, or raise data.max_length"
        )
    # A string seeds alike in every process and Python version (hash() of a tuple would not promise that).
    order = random.Random(f"{seed}, epoch {epoch}")
    indices = list(range(len(lengths)))
    if shuffle:
        order.shuffle(indices)
    if not packing and shuffle and group_by_length:
        return _length_grouped(indices, lengths, batch_size, order)
    if not packing:
        rows = [[index] for index in indices]
    elif shuffle:
        rows = _longest_first(indices, lengths, max_length)
        order.shuffle(rows)
    else:
        rows = _next_fit(indices, lengths, max_length)
    return [rows[begin : begin + batch_size] for begin in range(0, len(rows), batch_size)]


def _length_grouped(
    indices: list[int], lengths: Sequence[int], batch_size: int, order: random.Random
) -> list[list[list[int]]]:
    """Batches of like length: the shuffled examples are sorted a stretch at a time, their batches shuffled again."""
    stretch = batch_size * _BATCHES_SORTED_TOGETHER
    together = []
    for begin in range(0, len(indices), stretch):
        together += sorted(indices[begin : begin + stretch], key=lambda index: -lengths[index])
    batches = [[[index] for index in together[begin : begin + batch_size]]
               for begin in range(0, len(together), batch_size)]  # fmt: skip
    last = [batches.pop()] if len(together) % batch_size else []  # the short one stays at the end
    order.shuffle(batches)
    return batches + last


def _longest_first(indices: Sequence[int], lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Row by row: a length that fills the room left, or else two that do together, or else the longest that fits.

    Best-fit decreasing with a look one step ahead: plain, it leaves every row a rest that is just too short for the
    shortest example. O(n log n), n times some words of bits: lengths that wait are bits of one integer, and those of
    its mirror image, shifted, say which two make up a room. Examples of one length keep their order.
    """
    waiting: defaultdict[int, list[int]] = defaultdict(list)
    for index in reversed(indices):
        waiting[lengths[index]].append(index)
    there = sum(1 << length for length in waiting)
    mirrored = sum(1 << (max_length - length) for length in waiting)
    rows = []
    while there:
        row: list[int] = []
        room = max_length
        while fitting := there & ((2 << room) - 1):
            pairs = there & (mirrored >> (max_length - room))  # bit n is set where n and room - n both wait
            if not there >> room & 1 and pairs and _are_two(pairs, room, waiting):
                fitting = pairs
            length = fitting.bit_length() - 1
            row.append(waiting[length].pop())
            room -= length
            if not waiting[length]:
                there ^= 1 << length
                mirrored ^= 1 << (max_length - length)
        rows.append(row)
    return rows


def _are_two(pairs: int, room: int, waiting: dict[int, list[int]]) -> bool:
    """Whether the longest of a pair has a partner: half the room is its own, but only where two such wait."""
    length = pairs.bit_length() - 1
    return 2 * length != room or len(waiting[length]) > 1


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
class Segments:
    """Where the examples of a batch lie, all of its rows flattened to one: made once a batch, for all layers.

    Attributes:
        lengths: tokens of every example, and of the padding at the end of a row, in order.
        offsets: (segments + 1,), int32: where each begins, and where the last one ends (flash attention's cu_seqlens).
        padding: numbers of the segments that are padding.
    """

    lengths: tuple[int, ...]
    offsets: torch.Tensor
    padding: frozenset[int] = frozenset()

    @classmethod
    def of(cls, lengths: Sequence[int], padding: Iterable[int] = ()) -> Segments:
        import torch

        return cls(tuple(lengths), torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), frozenset(padding))

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def runs(self) -> list[tuple[int, int]]:
        """Neighbours of one length together: (how many, their length)."""
        return [(len(list(run)), length) for length, run in groupby(self.lengths)]


@dataclass(frozen=True)
class Batch:
    """The tensors of one forward pass, int64 and (batch, sequence) where nothing else is said.

    Attributes:
        input_ids: padded at the right.
        labels: the id where a token is trained, else -100; not shifted. An example's first token never has one.
        attention_mask: 0 where a row is padded, or None where no row is, and always with packing.
        position_ids: with packing and without padding, beginning anew at every example and at the padding; else None.
        predicting: (trained_tokens,), the places in the flattened batch whose logits predict a trained token: each is
            one before its label's.
        targets: (trained_tokens,), the tokens predicted there.
        tokens: input tokens that are not padding.
        trained_tokens: labels that count in the loss.
        where: the rows of data in it, for messages.
        segments: where the examples lie that must not see one another; None where each has a padded row of its own.
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
    segments: Segments | None = None

    def example_of(self, places: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Which example each of these places in the flattened batch belongs to, counted in order; and how many there
        are. No place of padding is asked for."""
        import torch

        if self.segments is None:
            return places // self.input_ids.shape[1], self.input_ids.shape[0]
        segment = torch.bucketize(places, self.segments.offsets[1:].to(places.device), right=True)
        before = [number in self.segments.padding for number in range(len(self.segments.lengths))]
        skipped = torch.tensor(before, device=places.device).cumsum(0)[segment]
        return segment - skipped, len(self.segments.lengths) - len(self.segments.padding)

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
            segments=self.segments and replace(self.segments, offsets=moved(self.segments.offsets)),
        )


def collate(rows: list[list[Example]], *, pad_token_id: int, packing: bool, padding_free: bool = False) -> Batch:
    """Put rows of examples into tensors as long as the longest row.

    Args:
        rows: the examples of each row; without packing one a row.
        pad_token_id: fills the end of shorter rows. Any id does, one that is trained elsewhere too: padding is never
            told by its id, but by where it stands.
        packing: whether rows may hold several examples.
        padding_free: without packing, lay the rows one after the other into a single one, with no padding.
    """
    import torch

    if not packing and any(len(row) != 1 for row in rows):
        raise ValueError("without packing a row holds exactly one example")
    apart = packing or padding_free
    if padding_free and not packing:
        rows = [[example for row in rows for example in row]]
    sequence = max(sum(len(example.input_ids) for example in row) for row in rows)
    input_ids, labels, segments, mask, padded_segments = [], [], [], [], []
    for row in rows:
        ids = [token for example in row for token in example.input_ids]
        padding = sequence - len(ids)
        input_ids.append(ids + [pad_token_id] * padding)
        mask.append([1] * len(ids) + [0] * padding)
        labels.append([label for example in row for label in counted_labels(example)] + [IGNORED] * padding)
        # Padding is a segment of its own: as the last example's next positions it would be attended with it.
        segments += [len(example.input_ids) for example in row]
        if padding:
            padded_segments.append(len(segments))
            segments.append(padding)
    # A row's first label is never counted, so that none is predicted from another row.
    flat = [label for row in labels for label in row]
    trained = [place for place, label in enumerate(flat) if label != IGNORED]
    tokens = sum(map(sum, mask))
    padded = tokens < sequence * len(rows)
    positions = [position for length in segments for position in range(length)]
    return Batch(
        input_ids=torch.tensor(input_ids),
        labels=torch.tensor(labels),
        attention_mask=torch.tensor(mask) if padded and not apart else None,
        position_ids=torch.tensor(positions).view(len(rows), sequence) if apart else None,
        predicting=torch.tensor([place - 1 for place in trained], dtype=torch.int64),
        targets=torch.tensor([flat[place] for place in trained], dtype=torch.int64),
        tokens=tokens,
        trained_tokens=len(trained),
        where=[example.where for row in rows for example in row],
        segments=Segments.of(segments, padded_segments) if apart else None,
    )


def counted_labels(example: Example) -> list[int]:
    """An example's labels as they count: never the first, which would be predicted from another example."""
    return [IGNORED, *example.labels[1:]] if example.labels else []
