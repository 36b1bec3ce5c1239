"""A prompt without a template never ends in a token that the tokenizer adds by itself, in whichever way it does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import processors
from tokenizers_for_tests import byte_level, metaspace
from transformers import AutoTokenizer

from qlora_tool.data.prompts import prompts_from_texts, read_prompts
from qlora_tool.data.raw_text import added_around


def processed(processor, make=metaspace):
    tokenizer = make()
    tokenizer.backend_tokenizer.post_processor = processor(tokenizer)
    return tokenizer


def template(single: str):
    """A post-processor of the tokenizers library."""

    def make(tokenizer):
        names = {part for part in single.split() if part != "$A"}
        special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in names]
        return processors.TemplateProcessing(single=single, special_tokens=special)

    return make


def roberta(tokenizer):
    pair = [("</s>", tokenizer.convert_tokens_to_ids("</s>")), ("<s>", tokenizer.convert_tokens_to_ids("<s>"))]
    return processors.RobertaProcessing(*pair, trim_offsets=False, add_prefix_space=False)


def bert(tokenizer):
    pair = [("<|endoftext|>", tokenizer.convert_tokens_to_ids("<|endoftext|>")), ("<s>", tokenizer.bos_token_id)]
    return processors.BertProcessing(*pair)


def by_setting(**settings):
    """A tokenizer whose `tokenizer_config.json` asks for ends."""

    def make(folder: Path):
        metaspace().save_pretrained(folder)
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
        return AutoTokenizer.from_pretrained(folder)

    return make


WAYS = {
    "template": (lambda folder: processed(template("<s> $A </s>")), ["<s>"]),
    "only an end": (lambda folder: processed(template("$A </s>")), []),
    "two ends": (lambda folder: processed(template("<s> $A </s> <|endoftext|>")), ["<s>"]),
    "byte level": (lambda folder: processed(template("$A <|endoftext|>"), byte_level), []),
    "roberta": (lambda folder: processed(roberta), ["<s>"]),
    "bert": (lambda folder: processed(bert), ["<s>"]),
    "add_eos_token": (by_setting(add_bos_token=True, add_eos_token=True), ["<s>"]),
    "nothing": (lambda folder: byte_level(), []),
    "a beginning alone": (lambda folder: metaspace(), ["<s>"]),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_prompt_ends_with_what_was_typed(way: str, tmp_path: Path):
    make, before = WAYS[way]
    tokenizer = make(tmp_path)
    assert tokenizer.convert_ids_to_tokens(added_around(tokenizer)[0]) == before
    for text in ["the quick brown", "a", "yes </s>", "ends in <|endoftext|>", "12 boats\n", ""]:
        (prompt,) = prompts_from_texts([text], tokenizer)
        typed = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.convert_ids_to_tokens(prompt.input_ids) == before + tokenizer.convert_ids_to_tokens(typed)


def test_a_beginning_that_was_typed_is_not_there_twice(tmp_path: Path):
    tokenizer = processed(template("<s> $A </s>"))
    (prompt,) = prompts_from_texts(["<s>the quick"], tokenizer)
    assert prompt.input_ids == tokenizer("<s>the quick", add_special_tokens=False).input_ids


def test_prompts_of_a_file_too(tmp_path: Path):
    (tmp_path / "p.txt").write_text("the quick\n")
    (prompt,) = read_prompts(str(tmp_path / "p.txt"), "auto", processed(template("<s> $A </s>")))
    assert prompt.input_ids[-1] != metaspace().eos_token_id
