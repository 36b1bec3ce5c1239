"""A tokenized example as text that shows what is trained of it, and what is otherwise not to be seen.

    <|im_start|>user↵
    2 + 2?<|im_end|>↵
    <|im_start|>assistant↵
    ⟦4<|im_end|>↵⟧

Special tokens stand as they are written. Each line end has a sign and breaks the line; spaces at an edge, tabs, control
characters and characters without a width have signs too, so that nothing in a data file can do anything to a terminal.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import TYPE_CHECKING

from qlora_tool.data.labels import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Span:
    """A stretch of text whose tokens are all trained, or all not."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Signs:
    """What stands for what is not to be seen, and for the borders of what is trained.

    Attributes:
        marks: pairs of borders; the first pair that the text itself does not have is taken.
        codes: how a character without a sign of its own is written, from its code.
    """

    line_end: str
    space: str
    tab: str
    carriage_return: str
    marks: tuple[tuple[str, str], ...]
    codes: str = "<U+{:04X}>"

    def marks_for(self, texts: Iterable[str]) -> tuple[str, str]:
        """Borders that none of these texts has; the last pair where they have all."""
        used = "".join(texts)
        free = (pair for pair in self.marks if not any(mark in used for mark in pair))
        return next(free, self.marks[-1])


UNICODE = Signs("↵", "·", "⇥", "␍", (("⟦", "⟧"), ("⟪", "⟫"), ("❰", "❱"), ("⦃", "⦄")))
ASCII = Signs("\\n", "_", "\\t", "\\r", (("[[", "]]"), ("{{{", "}}}"), ("<<<", ">>>"), ("[|[", "]|]")))


def spans_of(tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int], labels: Sequence[int]) -> list[Span]:
    """The text of an example, in stretches that are trained or not; together they are the whole text.

    Args:
        labels: -100 where a token is not trained.
    """
    runs = [(trained, len(list(run))) for trained, run in groupby(label != IGNORED for label in labels)]
    ends = list(accumulate(length for _, length in runs))
    text = decode(tokenizer, input_ids)
    apart = [decode(tokenizer, input_ids[end - length : end]) for (_, length), end in zip(runs, ends, strict=True)]
    if "".join(apart) == text:
        return [Span(piece, trained) for piece, (trained, _) in zip(apart, runs, strict=True)]
    # A character lies across a border, or the tokenizer takes the space before a text for its own: places are sought.
    borders = [0, *(_beginning(text, decode(tokenizer, input_ids[:end])) for end in ends[:-1]), len(text)]
    return [Span(text[begin:end], trained) for (begin, end), (trained, _) in zip(pairwise(borders), runs, strict=True)]


def decode(tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int]) -> str:
    """The text of some tokens, special ones as they are written, white space as it is."""
    return tokenizer.decode(list(input_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _beginning(text: str, beginning: str) -> int:
    """How many characters of `text` the tokens of `beginning` write. One of which they have some bytes alone, which are
    decoded to a replacement character, belongs to what follows."""
    same = 0
    for left, right in zip(text, beginning, strict=False):
        if left != right:
            break
        same += 1
    return same


def visible(text: str, signs: Signs = UNICODE) -> str:
    """The text with signs for what is not to be seen; lines break behind the sign of their end."""
    edges = re.sub(r"^ +| +$| +(?=\r?\n)", lambda spaces: signs.space * len(spaces[0]), text)
    return "".join(map(_sign, edges, [signs] * len(edges)))


def _sign(character: str, signs: Signs) -> str:
    named = {"\n": f"{signs.line_end}\n", "\t": signs.tab, "\r": signs.carriage_return, " ": " "}
    if character in named:
        return named[character]
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zs", "Zl", "Zp")
    return signs.codes.format(ord(character)) if hidden else character


def marked(spans: Sequence[Span], signs: Signs = UNICODE, marks: tuple[str, str] | None = None) -> str:
    """Spans as one visible text, borders around what is trained. A border stands before the line end that it follows.

    Args:
        marks: the borders; by default such as the text does not have.
    """
    before, after = marks or signs.marks_for(span.text for span in spans)
    parts = []
    for span in spans:
        text = visible(span.text, signs)
        if span.trained:
            broken = text.endswith("\n")
            text = before + text.removesuffix("\n") + after + "\n" * broken
        parts.append(text)
    return "".join(parts)


def in_short(spans: Sequence[Span], length: int = 300) -> str:
    """Spans marked in one line of about so many characters, shortened outside and inside of what is trained alike."""
    too_long = sum(len(span.text) for span in spans) > length
    room = max(12, length // max(1, len(spans)))
    short = []
    for span in spans:
        text = span.text
        if len(text) > room and too_long:
            keep = (room - 3) // 2
            text = f"{text[:keep]} … {text[-keep:]}"
        short.append(Span(text, span.trained))
    return marked(short, marks=UNICODE.marks_for(span.text for span in spans)).replace("\n", "")
