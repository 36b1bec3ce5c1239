"""Prompts out of files and out of texts."""

from __future__ import annotations

import json

import pytest
from tokenizers_for_tests import CHATML, LLAMA_2, byte_level, metaspace

from qlora_tool.data.prompts import prompts_from_texts, read_prompts
from qlora_tool.errors import UserError

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def turn(role, content):
    return {"role": role, "content": content}


def test_the_last_answer_is_what_is_asked_for(tmp_path):
    tokenizer = byte_level(CHATML)
    turns = [turn("user", "hello"), turn("assistant", "good day"), turn("user", "boats?"), turn("assistant", " 12 ")]
    source = write(tmp_path / "rows.jsonl", {"messages": turns}, {"messages": turns[:3]})
    prompts = read_prompts(source, "auto", tokenizer)
    expected = (
        f"{SYSTEM}<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\ngood day<|im_end|>\n"
        "<|im_start|>user\nboats?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [tokenizer.decode(prompt.input_ids) for prompt in prompts] == [expected, expected]
    assert [(prompt.answer, prompt.where, prompt.text) for prompt in prompts] == [
        (" 12 ", f"{source}, line 1", "boats?"),
        (None, f"{source}, line 2", "boats?"),
    ]


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"instruction": "boats?", "output": "12"}, "12"),
        ({"instruction": "boats?", "output": ""}, None),
        ({"instruction": "boats?"}, None),
        ({"prompt": "boats?", "completion": "12"}, "12"),
        ({"prompt": "boats?"}, None),
        ({"text": "boats?"}, None),
    ],
)
def test_answers_may_be_missing(tmp_path, row, answer):
    tokenizer = byte_level(CHATML)
    (prompt,) = read_prompts(write(tmp_path / "rows.jsonl", row), "auto", tokenizer)
    assert tokenizer.decode(prompt.input_ids) == (
        f"{SYSTEM}<|im_start|>user\nboats?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt.answer == answer


def test_a_text_file_holds_a_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"hello\r\n\nboats?\n")
    prompts = read_prompts(str(path), "auto", byte_level(CHATML))
    assert [(prompt.text, prompt.where) for prompt in prompts] == [
        ("hello", f"{path}, line 1"),
        ("boats?", f"{path}, line 3"),
    ]


def test_texts_are_user_turns_where_there_is_a_template_and_else_go_on():
    (prompt,) = prompts_from_texts(["hello"], metaspace(LLAMA_2))
    assert metaspace().decode(prompt.input_ids) == "<s>[INST] hello [/INST]"
    assert (prompt.answer, prompt.where, prompt.text) == (None, "--prompt", "hello")
    tokenizer = metaspace()
    (prompt,) = prompts_from_texts(["hello"], tokenizer)
    assert prompt.input_ids == tokenizer("hello")["input_ids"]  # with <s>, as the tokenizer begins texts
    assert tokenizer.chat_template is None


def test_without_a_template_conversations_get_the_plain_one(tmp_path):
    tokenizer = byte_level()
    (prompt,) = read_prompts(write(tmp_path / "rows.jsonl", {"prompt": "hello", "completion": "x"}), "auto", tokenizer)
    assert tokenizer.decode(prompt.input_ids) == "### User:\nhello\n\n### Assistant:\n"


def test_faulty_rows_are_named_together(tmp_path):
    rows = [{"messages": [turn("assistant", "x")]}, {"messages": [turn("user", "a"), turn("user", "b")]}]
    source = write(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(UserError) as raised:
        read_prompts(source, "auto", metaspace(LLAMA_2))
    first, second = raised.value.lines
    assert first == f"{source}, line 1: nothing stands before the answer; a prompt needs a user turn at least"
    assert second.startswith(f"{source}, line 2: the chat template refuses this conversation: Conversation roles must")
