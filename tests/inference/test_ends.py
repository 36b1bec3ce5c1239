"""The tokens that end an answer, read off templates of every kind."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from tokenizers_for_tests import CHATML, LLAMA_2, byte_level, metaspace

from qlora_tool.inference.ends import template_ends

# As Phi-3's: an end of turn, and an end of text where nothing follows.
PHI_3 = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '</s>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# As Command R7B's: an answer is closed, then the turn.
COMMAND_R = CHATML.replace("<|im_end|>\\n' }}{% endfor", "</s><|im_end|>' }}{% endfor")
# As gpt-oss's: several messages an answer, each with an end of its own; the last, or a call, with another.
HARMONY = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|im_start|>user<s>' + m['content'] + '<|im_end|>' }}"
    "{% else %}{% if m.get('thinking') %}{{ '<|im_start|>analysis<s>' + m['thinking'] + '<|im_end|>' }}{% endif %}"
    "{% if m.get('tool_calls') %}{{ '<|im_start|>to=f<s>' + m['tool_calls'][-1]['function']['arguments'] | tojson"
    " + '<|endoftext|>' }}{% else %}{{ '<|im_start|>final<s>' + m['content'] }}"
    "{{ '</s>' if loop.last else '<|im_end|>' }}{% endif %}{% endif %}{% endfor %}"
)
# As Qwen's with tools: marks around every call within the turn.
CALLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}"
    "{% for call in m.get('tool_calls') or [] %}"
    "{{ '<s>' + call['function']['arguments'] | tojson + '</s>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
)
# As GLM-4.5's: nothing ends a turn but the role of the next.
GLM = "{% for m in messages %}{{ ('<s>' if m['role'] == 'user' else '<|im_start|>') + m['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "known", "expected"),
    [
        (CHATML, [], ["<|im_end|>"]),
        (CHATML, ["<|im_end|>"], []),
        (CHATML, ["<|endoftext|>"], ["<|im_end|>"]),
        (PHI_3, ["<|im_end|>"], ["</s>"]),  # the end of text comes after a conversation's last answer alone
        (COMMAND_R, ["<|im_end|>"], []),
        (HARMONY, [], ["</s>", "<|endoftext|>"]),
        (HARMONY, ["</s>", "<|endoftext|>"], []),  # and never <|im_end|>, with which thoughts end
        (CALLS, [], ["<|im_end|>"]),
        (GLM, [], ["<s>"]),
        (GLM, ["<s>"], []),
    ],
)
def test_every_kind_of_answer_has_an_end(template, known, expected):
    tokenizer = byte_level(template)
    found = template_ends(tokenizer, tokenizer.convert_tokens_to_ids(known))
    assert tokenizer.convert_ids_to_tokens(found) == expected


def test_llama_2():
    assert template_ends(metaspace(LLAMA_2)) == [metaspace().eos_token_id]


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is there from Python 3.11 on")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama3", ["<|eot_id|>"]), ("phi3", ["<|end|>"]), ("qwen3", ["<|im_end|>"]),
        ("gemma_training", ["<end_of_turn>"]), ("deepseekv3", ["<｜end▁of▁sentence｜>"]),
        ("smolvlm", ["<end_of_utterance>"]),
        ("gptoss", ["<|return|>", "<|call|>"]), ("glm4moe", ["<|user|>"]), ("gemma4", ["<turn|>", "<|tool_response>"]),
    ],
)  # fmt: skip
def test_templates_as_they_are_published(name, expected):
    """As their models' own generation settings name them, the end of text aside."""
    file = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates" / f"{name}.jinja"
    template = file.read_text(encoding="utf-8")
    tokenizer = byte_level(template)
    marks = re.findall(r"<\|?[A-Za-z_/]+?\|?>|<｜[^<>]+?｜>", template)
    tokenizer.add_special_tokens({"additional_special_tokens": sorted({*marks, *expected})})
    tokenizer.eos_token = "<|endoftext|>"
    found = template_ends(tokenizer, [tokenizer.eos_token_id])
    assert tokenizer.convert_ids_to_tokens(found) == expected
