"""Token ids of rendered conversations, and which of them are trained."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from qlora_tool.data.chat import RenderedRow
from qlora_tool.data.faults import RowFault
from qlora_tool.data.template import SpecialTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a token that is not trained, as in transformers and torch's cross_entropy


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = False) -> list[int]:
    """The ids of a text, without a warning where there are more than the model takes."""
    return tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]


def check_characters(text: str) -> None:
    """
    Raises:
        RowFault: half of a character, which JSON can have (an emoji cut in two) and tokenizers cannot.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"\\u{ord(text[error.start]):04x}"
        before = " ".join(text[max(0, error.start - 30) : error.start].split())
        raise RowFault(f"{code} is half of a character (behind {before!r}); mend it, or take it out") from error


def label_answers(
    tokenizer: PreTrainedTokenizerBase, rendered: RenderedRow, special: SpecialTokens, max_length: int
) -> tuple[list[int], list[int]]:
    """Token ids and labels of a rendered conversation, not yet truncated. No special token is added to the template's.

    The tokens before an answer are those of the prompt by itself, which is what generation sees. Where tokenizing all
    at once would give others (`Answer: ` and `yes` fused to ` yes`), the text is cut between prompt and answer and the
    two are tokenized apart. At its other end, an answer has the tokens that begin in it. Labels come from these places
    alone, never from comparing ids with the padding token's.

    Args:
        max_length: answers that begin after so many tokens need no label.

    Returns:
        `input_ids` and `labels` of one length; a label is the id itself where it is an answer's, else -100.
    """
    text = _CutText(tokenizer, rendered.text, special)
    spans = []
    for begin, end in rendered.answers:
        prompt = text.beginning(begin)
        if len(prompt) >= max_length:
            break
        if text.ids[: len(prompt)] != prompt:
            text.cut(begin, prompt)
        spans.append((len(prompt), _end(tokenizer, text.ids, text.beginning(end))))
    labels = [IGNORED] * len(text.ids)
    for begin, end in spans:
        labels[begin:end] = text.ids[begin:end]
    return text.ids, labels


class _CutText:
    """A text, its ids, and the ids of its beginnings; cut where tokens must not reach across.

    A beginning is tokenized from the last special token before its end: no token reaches across one, and a long
    conversation would otherwise be tokenized from the start for each of its answers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str, special: SpecialTokens):
        self.tokenizer, self.text, self.special = tokenizer, text, special
        self.cuts: list[int] = []
        # borders: the end of each special token, in characters and in tokens.
        self.ids, self.borders = self._tokenize(0, len(text))

    def cut(self, position: int, before: list[int]) -> None:
        """Let no token reach across `position`, which lies behind all earlier cuts; `before` are the ids up to it."""
        ids, borders = self._tokenize(position, len(self.text))
        kept = [border for border in self.borders if border[0] <= position]
        if kept and before[: kept[-1][1]] != self.ids[: kept[-1][1]]:
            kept = []
        self.cuts.append(position)
        self.ids = before + ids
        self.borders = kept + [(end, len(before) + count) for end, count in borders]

    def beginning(self, end: int) -> list[int]:
        """The ids of `text[:end]` by itself."""
        if end == len(self.text):
            return self.ids
        place = bisect_right(self.borders, end, key=lambda border: border[0])
        if place and (not self.cuts or self.borders[place - 1][0] >= self.cuts[-1]):
            border, count = self.borders[place - 1]
            rest, _ = self._tokenize(border, end) if border < end else ([], [])
            if self.ids[count : count + len(rest)] == rest:
                return self.ids[:count] + rest
        bounds = [0, *(position for position in self.cuts if position < end), end]
        return [token for begin, stop in pairwise(bounds) for token in self._tokenize(begin, stop)[0]]

    def _tokenize(self, begin: int, end: int) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a piece of the text, and its borders where the tokenizer knows them. Some tokenizers put a space
        before what they take for the beginning of a text; behind a special token, with which nothing fuses, they do
        not, so a piece from the middle is tokenized behind one."""
        anchor = self.special.anchor if begin else ""
        fast = bool(getattr(self.tokenizer, "is_fast", False))
        encoded = self.tokenizer(
            anchor + self.text[begin:end], add_special_tokens=False, verbose=False, return_offsets_mapping=fast
        )
        ids = encoded["input_ids"]
        skipped = 1 if anchor else 0
        borders = [
            (stop + begin - len(anchor), place + 1 - skipped)
            for place, (_, stop) in enumerate(encoded["offset_mapping"] if fast else [])
            if place >= skipped and ids[place] in self.special.ids
        ]
        return ids[skipped:], borders


def _end(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], beginning: Sequence[int]) -> int:
    """How many of `ids` belong to a text that begins with the tokens `beginning`. Where the two part, a token reaches
    into what follows; it begins inside, so it belongs, unless white space is all that it has of the inside."""
    if ids[: len(beginning)] == beginning:
        return len(beginning)
    parted = (place for place, (left, right) in enumerate(zip(ids, beginning, strict=False)) if left != right)
    place = next(parted, len(ids) - 1)
    return place + bool(tokenizer.decode(beginning[place:]).strip())
