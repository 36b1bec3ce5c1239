"""How like an answer is to the expected one, where exact match is too strict: the F1 score of their tokens.

As in SQuAD (Rajpurkar et al. 2016, arXiv 1606.05250), with P the share of the answer's tokens that the expected one
has, R the share of the expected one's that the answer has, each token counted as often as it stands in both:

    F1 = 2·P·R / (P + R) = 2·common / (tokens of the one + tokens of the other)

SQuAD's tokens are English: articles are dropped, words end at spaces. Here they are of any language.
"""

from __future__ import annotations

import unicodedata
from collections import Counter

# Scripts that put no spaces between words, by how Unicode names their characters; each character is a token.
_UNSPACED = ("CJK ", "HIRAGANA ", "KATAKANA", "BOPOMOFO ", "YI ", "THAI ", "LAO ", "KHMER ", "MYANMAR ", "TIBETAN ")


def words(text: str) -> list[str]:
    """The tokens that are compared.

    Compatible characters are one (full-width letters are letters) and case does not count. A token is a run of letters,
    digits, their marks and underscores; of scripts without spaces between words (Chinese, Japanese, Thai, Lao, Khmer,
    Burmese, Tibetan) each character with its marks is one. Punctuation and signs count only where there is nothing
    else: then each is a token.
    """
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    found: list[str] = []
    open_word = False  # whether the next letter goes on with the last token
    for letter in plain:
        kind = unicodedata.category(letter)[0]
        if kind == "M" and found:
            found[-1] += letter
        elif kind in "LNM" or letter == "_":
            alone = unicodedata.name(letter, "").startswith(_UNSPACED)
            if open_word and not alone:
                found[-1] += letter
            else:
                found.append(letter)
            open_word = not alone
        else:
            open_word = False
    return found or [letter for letter in plain if not letter.isspace()]


def token_f1(answer: str, expected: str) -> float:
    """F1 of an answer's tokens, from 0 (none in common) to 1 (the same, in whatever order); two texts without any are
    the same, one without has none in common."""
    ours, theirs = words(answer), words(expected)
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))
