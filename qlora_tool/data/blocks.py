"""Examples as columns of numbers: how they travel between processes and onto the disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from qlora_tool.data.examples import Example, digests
from qlora_tool.data.labels import IGNORED

if TYPE_CHECKING:
    import numpy

    Numbers = numpy.ndarray[Any, Any]


@dataclass(frozen=True)
class Block:
    """Some examples.

    Attributes:
        tokens: int32, those of all examples, one after the other.
        mask: bool, as many: where a token has a label.
        lengths: int32, tokens of each example.
        trained: int32, labels of each that count in the loss.
        rows: int32, the number of the row of each, from 0 in this block.
        answers: int32, stretches of trained tokens in each.
        digests: uint64, as `examples.digests` gives them.
        where: the row that each comes from, in words.
    """

    tokens: Numbers
    mask: Numbers
    lengths: Numbers
    trained: Numbers
    answers: Numbers
    rows: Numbers
    digests: Numbers
    where: list[str]

    @classmethod
    def of(cls, rows: Iterable[list[Example]]) -> Block:
        """The examples of some rows."""
        import numpy

        numbered = [(number, example) for number, examples in enumerate(rows) for example in examples]
        tokens = [token for _, example in numbered for token in example.input_ids]
        labels = numpy.array([label for _, example in numbered for label in example.labels], dtype=numpy.int32)
        return cls(
            numpy.array(tokens, dtype=numpy.int32),
            labels != IGNORED,
            numpy.array([len(example.input_ids) for _, example in numbered], dtype=numpy.int32),
            numpy.array([example.trained_tokens for _, example in numbered], dtype=numpy.int32),
            numpy.array([example.answers for _, example in numbered], dtype=numpy.int32),
            numpy.array([number for number, _ in numbered], dtype=numpy.int32),
            numpy.array(digests(example for _, example in numbered), dtype=numpy.uint64),
            [example.where for _, example in numbered],
        )

    @classmethod
    def joined(cls, blocks: Sequence[Block]) -> Block:
        """Several as one, their rows counted through."""
        import numpy

        firsts = accumulate((int(block.rows[-1]) + 1 for block in blocks), initial=0)
        rows = [block.rows + first for block, first in zip(blocks, firsts, strict=False)]
        columns = {name: numpy.concatenate([getattr(block, name) for block in blocks])
                   for name in ("tokens", "mask", "lengths", "trained", "answers", "digests")}  # fmt: skip
        return cls(**columns, rows=numpy.concatenate(rows), where=[each for block in blocks for each in block.where])

    def __len__(self) -> int:
        return len(self.lengths)
