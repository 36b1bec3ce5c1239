"""Token F1, against values worked by hand."""

from __future__ import annotations

from fractions import Fraction

import pytest

from qlora_tool.inference.likeness import token_f1, words

BY_HAND = [
    # 3 of 4 and 3 of 3 tokens: 2·3/(4 + 3)
    ("the capital is Paris", "capital is paris", Fraction(6, 7)),
    # articles of no language are dropped; each token counts as often as it stands in both: min(3, 1) + min(0, 1)
    ("a a a", "a b", Fraction(2, 5)),
    ("Paris.", "paris!", 1),
    ("Paris", "London", 0),
    ('{"town": "Oslo", "date": "2 July"}', '{"date": "2 July", "town": "Oslo"}', 1),
    ("", "", 1), (" \n", "", 1), ("", "Paris", 0), ("Paris", "", 0), ("...", "Paris", 0),
    # punctuation alone: >, = and >, -
    ("=>", "->", Fraction(1, 2)), ("🙂", "🙂", 1), ("🙂", "🙃", 0),
    # 東 京 都 and 京 都: 2·2/(3 + 2)
    ("東京都", "京都", Fraction(4, 5)),
    ("ＡＢＣ　１２", "abc 12", 1), ("STRASSE", "straße", 1), ("cafe\u0301", "café", 1),
    # one word of two, which its marks do not take apart
    ("हिन्दी भाषा", "हिन्दी", Fraction(2, 3)),
    ("한국어 문장", "한국어", Fraction(2, 3)),
]  # fmt: skip


@pytest.mark.parametrize("answer, expected, value", BY_HAND)
def test_by_hand(answer: str, expected: str, value: Fraction | int):
    assert token_f1(answer, expected) == pytest.approx(float(value), abs=1e-15)
    assert token_f1(expected, answer) == token_f1(answer, expected)


def test_tokens():
    assert words("Don't use snake_case2, x=3.5!") == ["don", "t", "use", "snake_case2", "x", "3", "5"]
    assert words("iPhoneを12台買う") == ["iphone", "を", "12", "台", "買", "う"]
    assert words("ที่นี่ ok") == ["ที่", "นี่", "ok"]  # a consonant with its marks
    assert words("?!") == ["?", "!"]
