"""Examples as text: which stretches are trained, and what is otherwise not to be seen."""

from __future__ import annotations

import pytest
from tokenizers_for_tests import byte_level, metaspace

from qlora_tool.data.spans import ASCII, UNICODE, Span, decode, in_short, marked, spans_of, visible

TOKENIZERS = {"byte_level": byte_level, "metaspace": metaspace}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_spans_are_the_text_and_part_where_labels_do(name: str):
    tokenizer = TOKENIZERS[name]()
    parts = ["<|im_start|>user\nWhat is  the capital?<|im_end|>\n", "Paris , yes.<|im_end|>", " and\n more"]
    ids, labels = [], []
    for number, part in enumerate(parts):
        tokens = tokenizer(part, add_special_tokens=False)["input_ids"]
        ids += tokens
        labels += tokens if number == 1 else [-100] * len(tokens)
    spans = spans_of(tokenizer, ids, labels)
    assert [span.trained for span in spans] == [False, True, False]
    assert "".join(span.text for span in spans) == decode(tokenizer, ids)
    # A SentencePiece kind puts a space of its own before the beginning of a part that it is given alone.
    assert [span.text.strip() for span in spans] == [part.strip() for part in parts]


def test_a_character_of_which_the_prompt_has_some_bytes_is_the_answers():
    tokenizer = byte_level()
    ids = tokenizer("a€b", add_special_tokens=False)["input_ids"]
    assert len(ids) == 5  # € is three bytes, and three tokens
    assert spans_of(tokenizer, ids, [-100, -100, *ids[2:]]) == [Span("a", False), Span("€b", True)]
    assert spans_of(tokenizer, ids, ids) == [Span("a€b", True)]
    assert spans_of(tokenizer, [], []) == []


def test_what_is_not_seen_has_signs():
    text = "  a  b \t\r\nc\u00a0d\u200b\u202e\x1b[2J \n"
    assert visible(text) == "··a  b ⇥␍↵\nc<U+00A0>d<U+200B><U+202E><U+001B>[2J·↵\n"
    assert visible(text, ASCII).isascii()
    assert visible("über 漢字 😀 é") == "über 漢字 😀 é"


def test_borders_stand_around_what_is_trained():
    spans = [Span("2 + 2?\nA: ", False), Span("4<|im_end|>\n", True), Span("next", False)]
    assert marked(spans) == "2 + 2?↵\nA:·⟦4<|im_end|>↵⟧\nnext"
    assert marked(spans, ASCII) == "2 + 2?\\n\nA:_[[4<|im_end|>\\n]]\nnext"
    assert marked([Span("a ⟦0, 1⟧ is a set", True)]) == "⟪a ⟦0, 1⟧ is a set⟫"
    assert UNICODE.marks_for("⟦⟪❰⦃") == UNICODE.marks[-1]


@pytest.mark.parametrize("length", [60, 200, 1100])
def test_in_short_is_one_line_that_shows_both_ends_of_each_stretch(length: int):
    spans = [Span("begin\n" + "q" * 500 + "\nask", False), Span("yes\n" + "a" * 500 + "<|im_end|>\n", True)]
    short = in_short(spans, length)
    assert len(short) < length + 10 and "\n" not in short
    assert short.startswith("begin") and "⟦yes" in short and short.endswith("end|>↵⟧")
    assert ("…" in short) == (length < 1100)
