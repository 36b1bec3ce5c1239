"""Texts that are no conversations: the tokens a tokenizer puts around them, and prompts to go on with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_tool.data.labels import token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBES = ("a", "b", "1")  # one of which the ids around it do not hold themselves


def added_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and behind every text by itself, whichever of its settings does it:
    `add_bos_token`, `add_eos_token`, a post-processor, a class of sequences with marks of their own."""
    for probe in _PROBES:
        plain, whole = token_ids(tokenizer, probe), token_ids(tokenizer, probe, add_special_tokens=True)
        places = [at for at in range(len(whole) - len(plain) + 1) if whole[at : at + len(plain)] == plain]
        if plain and len(places) == 1:
            return whole[: places[0]], whole[places[0] + len(plain) :]
    return [], []


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text that a model is to go on with: what the tokenizer puts before a text, once, and nothing that
    it puts behind one. An end that was typed stays."""
    before, behind = added_around(tokenizer)
    ids = token_ids(tokenizer, text, add_special_tokens=True)
    if behind and ids[-len(behind) :] == behind:
        ids = ids[: -len(behind)]
    if before and ids[: 2 * len(before)] == 2 * before:  # the text has its own
        ids = ids[len(before) :]
    return ids
