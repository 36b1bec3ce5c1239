"""Sequences to train on, and collections of them: in memory, or a choice out of others."""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from qlora_tool.data.chat import row_of
from qlora_tool.data.labels import IGNORED

if TYPE_CHECKING:
    import numpy


@dataclass(frozen=True)
class Example:
    """One sequence to train on.

    Attributes:
        input_ids: at most max_length token ids.
        labels: as many; the id itself where the token is trained, else -100. Not shifted: the model does that, so the
            first label never counts.
        where: the row it comes from.
    """

    input_ids: list[int]
    labels: list[int]
    where: str

    @property
    def trained_tokens(self) -> int:
        """The labels that count in the loss."""
        return len(self.labels) - 1 - self.labels[1:].count(IGNORED)

    @property
    def answers(self) -> int:
        """Stretches of trained tokens."""
        return sum(before == IGNORED != label for before, label in pairwise([IGNORED, *self.labels]))


def digests(examples: Iterable[Example]) -> list[int]:
    """64 bits of each example that tell its tokens from others': the first of their SHA-256. Answers of one
    conversation have those of its first: the later ones have the earlier ones in their prompts, and must not part."""
    found: list[int] = []
    row = None
    for example in examples:
        if row is not None and row_of(example.where) == row:
            found.append(found[-1])
        else:
            row = row_of(example.where)
            tokens = array("q", example.input_ids).tobytes()
            found.append(int.from_bytes(hashlib.sha256(tokens).digest()[:8], "big"))
    return found


class Examples(Sequence[Example]):
    """Examples, each made when it is asked for, and numbers of all of them that are at hand without that.

    Attributes:
        lengths: tokens of each.
        trained: labels of each that count in the loss.
        answers: stretches of trained tokens in each.
        rows: the number of the row that each comes from; those of one row are neighbours.
        digests: as `digests` gives them.
        highest: the highest token in any.
    """

    lengths: Sequence[int]
    trained: Sequence[int]
    answers: Sequence[int]
    rows: Sequence[int]
    highest: int

    @property
    def digests(self) -> numpy.ndarray[Any, Any]:
        raise NotImplementedError

    def example(self, index: int) -> Example:
        """One of them, by its number from 0."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, item: Any) -> Any:
        if isinstance(item, slice):
            return [self.example(index) for index in range(*item.indices(len(self)))]
        index = item + len(self) if item < 0 else item
        if not 0 <= index < len(self):
            raise IndexError(f"example {item} of {len(self)}")
        return self.example(int(index))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(
            one == another for one, another in zip(self, other, strict=True)
        )

    __hash__ = None


class ExampleList(Examples):
    """Examples in memory.

    Args:
        examples: these.
        rows: the number of the row of each; None: one row each.
    """

    def __init__(self, examples: Iterable[Example], rows: Iterable[int] | None = None):
        self._examples = list(examples)
        self.lengths = [len(example.input_ids) for example in self._examples]
        self.trained = [example.trained_tokens for example in self._examples]
        self.answers = [example.answers for example in self._examples]
        self.rows = list(range(len(self._examples)) if rows is None else rows)
        self.highest = max((max(example.input_ids, default=0) for example in self._examples), default=0)

    @property
    def digests(self) -> numpy.ndarray[Any, Any]:
        import numpy

        return numpy.array(digests(self._examples), dtype=numpy.uint64)

    def example(self, index: int) -> Example:
        return self._examples[index]


class Selection(Examples):
    """A choice out of other examples, in any order and any of them more than once.

    Args:
        parts: what is chosen from, counted through.
        indices: the choice; None: all of them, in order.
    """

    def __init__(self, parts: Sequence[Examples], indices: Sequence[int] | None = None):
        import numpy

        self.parts = parts
        self._ends = list(accumulate(map(len, parts)))
        total = self._ends[-1] if self._ends else 0
        self.indices = array("i", range(total) if indices is None else indices)
        taken = numpy.frombuffer(self.indices, dtype=numpy.int32) if self.indices else numpy.zeros(0, numpy.int32)
        self._taken = taken

        def chosen(columns: Sequence[Sequence[int]]) -> array[int]:
            whole = numpy.concatenate([numpy.asarray(column, dtype=numpy.int32) for column in columns])
            return array("i", whole[taken].tobytes())

        self.lengths = chosen([part.lengths for part in parts])
        self.trained = chosen([part.trained for part in parts])
        self.answers = chosen([part.answers for part in parts])
        rows, first = [], 0
        for part in parts:
            own = numpy.asarray(part.rows, dtype=numpy.int32) + first
            first = int(own[-1]) + 1 if len(own) else first
            rows.append(own)
        self.rows = chosen(rows)
        self.highest = max((part.highest for part in parts), default=0)

    @property
    def digests(self) -> numpy.ndarray[Any, Any]:
        import numpy

        found: numpy.ndarray[Any, Any] = numpy.concatenate([part.digests for part in self.parts])[self._taken]
        return found

    def example(self, index: int) -> Example:
        place = self.indices[index]
        part = bisect_right(self._ends, place)
        return self.parts[part].example(place - (self._ends[part - 1] if part else 0))


def as_examples(examples: Sequence[Example]) -> Examples:
    """`examples` with their numbers; a list is counted through."""
    return examples if isinstance(examples, Examples) else ExampleList(examples)
