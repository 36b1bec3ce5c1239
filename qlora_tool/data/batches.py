"""Which examples go into which rows of which batch, and the tensors of a batch.

With packing a row holds several examples. They never see one another: position ids begin anew at each, attention goes
by segment (`model/segments.py`; families that cannot get a mask from transformers, which tells examples apart by their
positions where there is no attention mask), and the first token of each has no label, because the token before it is
another example's. Padding-free batches are the same thing without packing: one row of examples, one after the other.
"""

from __future__ import annotations

import operator
import random
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any

from qlora_tool.data.labels import IGNORED

if TYPE_CHECKING:
    import numpy
    import torch

    from qlora_tool.data.tokenize import Example

# Batches within which lengths are sorted, as many as transformers takes: enough to sort by, few enough to stay random.
_BATCHES_SORTED_TOGETHER = 50


class EpochPlan(Sequence[list[list[int]]]):
    """The batches of an epoch, each of rows of example indices, made when they are asked for: what is held is a number
    or two an example, so that a million of them take some megabytes.

    Args:
        indices: of the examples, row after row.
        batch_size: rows in a batch.
        begins: where each row begins in `indices`; None: each is one example.
        order: the rows in the order in which they come; None: as they lie.
    """

    def __init__(
        self, indices: array[int], batch_size: int, begins: array[int] | None = None, order: array[int] | None = None
    ):
        self._indices, self._batch_size, self._begins, self._order = indices, batch_size, begins, order

    @property
    def rows(self) -> int:
        """How many rows there are in all batches."""
        return len(self._indices) if self._begins is None else len(self._begins)

    def __len__(self) -> int:
        return -(-self.rows // self._batch_size)

    def __getitem__(self, item: Any) -> Any:
        if isinstance(item, slice):
            return [self[number] for number in range(*item.indices(len(self)))]
        number = item + len(self) if item < 0 else item
        if not 0 <= number < len(self):
            raise IndexError(item)
        begin = number * self._batch_size
        return [self._row(place) for place in range(begin, min(begin + self._batch_size, self.rows))]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None

    def sums(self, values: Sequence[int]) -> numpy.ndarray:
        """What the examples of each row have of something together, (rows,), in the order of the rows.

        Args:
            values: of every example.
        """
        import numpy

        of_each = numpy.asarray(values, dtype=numpy.int64)[numpy.asarray(self._indices)]
        if self._begins is not None and len(of_each):
            of_each = numpy.add.reduceat(of_each, numpy.asarray(self._begins))
        return of_each if self._order is None else of_each[numpy.asarray(self._order)]

    def _row(self, place: int) -> list[int]:
        row = place if self._order is None else self._order[place]
        if self._begins is None:
            return [self._indices[row]]
        end = self._begins[row + 1] if row + 1 < len(self._begins) else len(self._indices)
        return self._indices[self._begins[row] : end].tolist()


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
) -> EpochPlan:
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
    given = (batch_size, max_length, packing, shuffle, seed, epoch, group_by_length)
    if _latest and _latest[0] is lengths and _latest[1] == given:
        return _latest[2]
    plan = _planned(lengths, *given)
    if isinstance(lengths, array):
        _latest[:] = lengths, given, plan
    return plan


# The plan made last, of a stored data set: a run asks for that of its first epoch several times.
_latest: list[Any] = []


def _planned(
    lengths: Sequence[int],
    batch_size: int,
    max_length: int,
    packing: bool,
    shuffle: bool,
    seed: int,
    epoch: int,
    group_by_length: bool,
) -> EpochPlan:
    # A string seeds alike in every process and Python version (hash() of a tuple would not promise that).
    draw = random.Random(f"{seed}, epoch {epoch}")
    indices = array("i", range(len(lengths)))
    if shuffle:
        draw.shuffle(indices)
    if not packing:
        grouped = shuffle and group_by_length
        return EpochPlan(_length_grouped(indices, lengths, batch_size, draw) if grouped else indices, batch_size)
    if not shuffle:
        return EpochPlan(indices, batch_size, _next_fit(indices, lengths, max_length))
    indices, begins = _longest_first(indices, lengths, max_length)
    rows = array("i", range(len(begins)))
    draw.shuffle(rows)
    return EpochPlan(indices, batch_size, begins, rows)


def _length_grouped(indices: array[int], lengths: Sequence[int], batch_size: int, draw: random.Random) -> array[int]:
    """Examples so that batches are of like length: the shuffled ones are sorted a stretch at a time, their batches
    shuffled again."""
    stretch = batch_size * _BATCHES_SORTED_TOGETHER
    together = array("i")
    for begin in range(0, len(indices), stretch):
        together.extend(sorted(indices[begin : begin + stretch], key=lambda index: -lengths[index]))
    batches = array("i", range(len(together) // batch_size))
    draw.shuffle(batches)
    order = array("i")
    for batch in batches:
        order.extend(together[batch * batch_size : (batch + 1) * batch_size])
    order.extend(together[len(batches) * batch_size :])  # the short one stays at the end
    return order


def _longest_first(
    indices: array[int], lengths: Sequence[int], max_length: int
) -> tuple[array[int], array[int]]:
    """Row by row: a length that fills the room left, or else two that do together, or else the longest that fits.

    Best-fit decreasing with a look one step ahead: plain, it leaves every row a rest that is just too short for the
    shortest example. O(n log n), n times some words of bits: lengths that wait are bits of one integer, and those of
    its mirror image, shifted, say which two make up a room. Examples of one length keep their order.

    Returns:
        The indices row by row, and where each row begins.
    """
    by_length, waiting, count = _by_length(indices, lengths)
    there = sum(1 << length for length in waiting)
    mirrored = sum(1 << (max_length - length) for length in waiting)
    packed, begins = array("i"), array("i")
    while there:
        begins.append(len(packed))
        room = max_length
        while fitting := there & ((2 << room) - 1):
            pairs = there & (mirrored >> (max_length - room))  # bit n is set where n and room - n both wait
            if not there >> room & 1 and pairs and _are_two(pairs, room, count):
                fitting = pairs
            length = fitting.bit_length() - 1
            packed.append(by_length[waiting[length]])
            room -= length
            waiting[length] += 1
            count[length] -= 1
            if not count[length]:
                there ^= 1 << length
                mirrored ^= 1 << (max_length - length)
    return packed, begins


def _by_length(
    indices: array[int], lengths: Sequence[int]
) -> tuple[array[int], dict[int, int], dict[int, int]]:
    """The indices sorted by length, those of one length in their order; and by length, where its first one is and how
    many there are."""
    import numpy

    order = numpy.frombuffer(indices, dtype=numpy.int32) if len(indices) else numpy.zeros(0, numpy.int32)
    given = numpy.asarray(lengths, dtype=numpy.int32)[order]
    found, begins, counts = numpy.unique(numpy.sort(given), return_index=True, return_counts=True)
    by_length = array("i", order[numpy.argsort(given, kind="stable")].tobytes())
    return by_length, *(dict(zip(found.tolist(), each.tolist(), strict=True)) for each in (begins, counts))


def _are_two(pairs: int, room: int, count: dict[int, int]) -> bool:
    """Whether the longest of a pair has a partner: half the room is its own, but only where two such wait."""
    length = pairs.bit_length() - 1
    return 2 * length != room or count[length] > 1


def _next_fit(indices: array[int], lengths: Sequence[int], max_length: int) -> array[int]:
    """Where each row begins."""
    begins = array("i")
    room = -1
    for place, index in enumerate(indices):
        if lengths[index] > room:
            begins.append(place)
            room = max_length
        room -= lengths[index]
    return begins


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
        position_ids: with packing and without padding, beginning anew at every example and at the padding, in which
            they stay below the longest example's length; else None.
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

    def uncounted(self) -> Batch:
        """The same tokens with none of them trained: what it gives is 0, and so are its gradients."""
        import torch

        none = self.predicting[:0]
        return replace(self, labels=torch.full_like(self.labels, IGNORED), predicting=none, targets=none, tokens=0,
                       trained_tokens=0, where=[])  # fmt: skip

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device. To a CUDA device it goes through pinned memory: a copy from any other
        waits for all that the device was asked for before, so that the step before would not overlap with this one's
        launches."""
        pinned = str(device).startswith("cuda")

        def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
            if tensor is None or not pinned or tensor.is_cuda:
                return None if tensor is None else tensor.to(device)
            return tensor.pin_memory().to(device, non_blocking=True)

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
    longest = max(len(example.input_ids) for row in rows for example in row)
    input_ids, labels, segments, mask, padded_segments = [], [], [], [], []
    for row in rows:
        ids = [token for example in row for token in example.input_ids]
        padding = sequence - len(ids)
        input_ids.append(ids + [pad_token_id] * padding)
        mask.append([1] * len(ids) + [0] * padding)
        labels.append([label for example in row for label in counted_labels(example)] + [IGNORED] * padding)
        # Padding is in segments of its own: as the last example's next positions it would be attended with it.
        segments += [len(example.input_ids) for example in row]
        for length in _cut(padding, longest):
            padded_segments.append(len(segments))
            segments.append(length)
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


def _cut(padding: int, longest: int) -> list[int]:
    """The lengths of a row's segments of padding. None is longer than the longest example: there are models that take
    other rotary embeddings for a batch with greater positions (longrope, dynamic NTK)."""
    whole, rest = divmod(padding, longest)
    return [longest] * whole + [rest] * bool(rest)


def counted_labels(example: Example) -> list[int]:
    """An example's labels as they count: never the first, which would be predicted from another example."""
    return [IGNORED, *example.labels[1:]] if example.labels else []
