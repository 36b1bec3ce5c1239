"""Whether transformers reads a tokenizer as its `tokenizer.json` says.

transformers 5 builds some classes anew from the vocabulary alone, with the class's own way of splitting: a byte-level
`tokenizer.json` beside `tokenizer_class: LlamaTokenizerFast` then loses every space and line end, and a SentencePiece
one of Llama 2's kind puts its spaces elsewhere. The file is what the model was trained with, and what every other tool
reads; so it counts.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_tool.config.sources import sources_of
from qlora_tool.data.faults import RowFaults
from qlora_tool.data.sources import read_rows
from qlora_tool.errors import UserError
from qlora_tool.model.tokenizer_files import SETTINGS, read_settings
from qlora_tool.once import log_once

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FILE = "tokenizer.json"
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    " leading, two  spaces   three, trailing ",
    "a line\nand another\r\n\n\n\tindented\n",
    "0 1 23 456 7890 3.14159 1,000,000 2026-11-26",
    "Zażółć gęślą jaźń, Größe, naïve café, e\u0301 and é, ﬁ ½ İ",
    "漢字かな交じり文、한국어, русский текст, العربية, हिन्दी, ไทย",
    "😀 👩‍👩‍👧‍👦 🇪🇺 ✈️ ​zero width",
    "def f(x: int) -> str:\n    return f\"{x!r}\"  # it's\n\nif __name__ == '__main__':\n\tprint(f(1))",
    '{"key": [1, null, true], "nested": {"a": "b\\n"}}',
    "<b>I'll, we've; DON'T</b> $5 & 100% [x](https://example.org/?q=1#top) a_b-c\\d `e` ~/f",
)
"""Spaces, line ends, digits, accents, other scripts, emoji, code: what ways of splitting differ on."""
_ROWS, _CHARACTERS = 64, 4000  # of the data, at most
_ASKED_FOR = ("fix_mistral_regex", "split_special_tokens")  # settings that change how text is split, and are meant to


def read_as_written(tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer, if it gives the ids that its `tokenizer.json` does; else the file read as it is, with a warning.

    Args:
        tokenizer: as transformers opened it.
        folder: that it was opened from. One without `tokenizer.json`, or with code of its own, is left alone.

    Raises:
        UserError: nothing reads the file as it is written.
    """
    settings = read_settings(folder)
    if not getattr(tokenizer, "is_fast", False) or not (folder / FILE).exists() or _special_case(tokenizer, settings):
        return tokenizer
    written = _open(folder)
    if (text := first_difference(tokenizer, written, with_special_tokens(tokenizer))) is None:
        return tokenizer
    from transformers import PreTrainedTokenizerFast, __version__

    named = settings.get("tokenizer_class") or type(tokenizer).__name__
    found = f"{folder}: transformers {__version__} reads {_short(text)} otherwise than {FILE} says " \
            f"({_where_they_part(tokenizer, written, text)})"  # fmt: skip
    plain = PreTrainedTokenizerFast.from_pretrained(folder)
    if first_difference(plain, written, with_special_tokens(plain)) is not None:
        raise UserError(
            f"{found}; take out of tokenizer_config.json what makes it so, or install another transformers (pip "
            "install --upgrade transformers)"
        )
    log_once(
        logger, logging.WARNING,
        f"{found}, as tokenizer_config.json names {named}; taken as {FILE} says. Where else this model is used, load "
        "its tokenizer by PreTrainedTokenizerFast"
    )
    return _with_tokens_of(tokenizer, plain)


def is_misread(folder: Path) -> bool:
    """Whether `AutoTokenizer` of the transformers that is here reads a folder's tokenizer otherwise than it is written,
    so that it has to be opened by `PreTrainedTokenizerFast`."""
    from transformers import AutoTokenizer

    if not (folder / SETTINGS).exists():
        return False
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return read_as_written(tokenizer, folder) is not tokenizer
    except (OSError, ValueError, KeyError, TypeError, UserError):  # whoever opens it is told
        return False


def check_on(tokenizer: PreTrainedTokenizerBase, folder: Path, texts: Iterable[str]) -> None:
    """Hold a tokenizer against its `tokenizer.json` on texts of the data too.

    Args:
        tokenizer: from `read_as_written`.
        folder: that it was opened from.
        texts: some of the data.

    Raises:
        UserError: a text gets other ids.
    """
    if not getattr(tokenizer, "is_fast", False) or not (folder / FILE).exists() \
            or _special_case(tokenizer, read_settings(folder)):  # fmt: skip
        return
    written = _open(folder)
    if (text := first_difference(tokenizer, written, texts)) is not None:
        from transformers import __version__

        raise UserError(
            f"{folder}: transformers {__version__} reads {_short(text)} of the data otherwise than {FILE} says "
            f"({_where_they_part(tokenizer, written, text)}); install another transformers (pip install --upgrade "
            "transformers)"
        )


def check_on_data(tokenizer: PreTrainedTokenizerBase, folder: Path, source: str | Sequence[Any]) -> None:
    """`check_on` what is written in the first rows of data, which are a source or a list as `data.train` has it.

    Raises:
        UserError: see `check_on` and `read_rows`.
    """
    faults = RowFaults()  # which are told elsewhere
    rows = (row for each in sources_of(source) for row in itertools.islice(read_rows(each.path, faults), _ROWS))
    check_on(tokenizer, folder, (text for row in rows for text in _strings(row.fields)))


def _strings(value: Any) -> Iterator[str]:
    """All that is written in a field, whatever its shape."""
    if isinstance(value, str):
        yield value[:_CHARACTERS].encode(errors="ignore").decode()  # half characters are told elsewhere
    elif isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(part)


def with_special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts to compare on, and some with the tokenizer's special tokens between words, as templates have them."""
    special = list(dict.fromkeys(tokenizer.all_special_tokens))[:6]
    return [*TEXTS, *(f"one{token}two {token} three{token}\nfour" for token in special)]


def first_difference(
    tokenizer: PreTrainedTokenizerBase, written: Tokenizer, texts: Iterable[str]
) -> str | None:
    """The first text that a tokenizer and its file give different ids; None where there is none.

    Texts with tokens that transformers adds to those of the file, as `tokenizer_config.json` may ask, are left out.
    """
    known = set(written.get_vocab(with_added_tokens=True))
    added = [token for token in tokenizer.get_added_vocab() if token not in known]
    for text in texts:
        if any(token in text for token in added):
            continue
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if ids != written.encode(text, add_special_tokens=False).ids:
            return text
    return None


def _special_case(tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]) -> bool:
    """Whether something asks for another reading: code of the model's own, or a setting."""
    own_code = not type(tokenizer).__module__.startswith("transformers.")
    return own_code or any(settings.get(name) for name in _ASKED_FOR)


def _open(folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    written = Tokenizer.from_file(str(folder / FILE))
    written.no_truncation()
    written.no_padding()
    return written


def _with_tokens_of(tokenizer: PreTrainedTokenizerBase, plain: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """`plain` with the special tokens that the other one's class has by default, where nothing else names them."""
    for name, token in tokenizer.special_tokens_map.items():
        known = isinstance(token, str) and token in plain.get_vocab()
        if known and getattr(plain, name, None) is None:
            setattr(plain, name, token)
    return plain


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _where_they_part(tokenizer: PreTrainedTokenizerBase, written: Tokenizer, text: str) -> str:
    """The tokens of both from the first that differs, to be read by people: `Ġ 4, for Ġ4`."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"], written.encode(text, add_special_tokens=False).ids]
    start = next((at for at, (left, right) in enumerate(zip(*ids, strict=False)) if left != right), min(map(len, ids)))
    shown = [" ".join(str(written.id_to_token(index)) for index in part[start : start + 4]) for part in ids]
    return ", for ".join(repr(part)[1:-1] or "nothing" for part in shown)
