"""Ollama's Modelfile: known shapes of chat templates, and what is left to the GGUF file."""

from __future__ import annotations

import re

import pytest
from tokenizers_for_tests import CHATML, LLAMA_2, WITHOUT_END, byte_level
from transformers import AutoTokenizer

from qlora_tool.export.gguf.modelfile import SHAPES, find_shape, modelfile, write_modelfile

LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ '<s>' }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + "
    "' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + '</s>' }}{% endif %}"
    "{% endfor %}"
)


def with_template(template: str | None, bos: str = "<s>"):
    tokenizer = byte_level(template)
    tokenizer.bos_token, tokenizer.eos_token = bos, "</s>"
    return tokenizer


@pytest.mark.parametrize(
    ("template", "shape", "system"),
    [
        (CHATML, "chatml", "You are a helpful assistant."),
        (LLAMA_3, "llama3", None),
        (GEMMA, "gemma", None),
        (MISTRAL, "mistral", None),
    ],
)
def test_known_templates_are_told(template, shape, system):
    found, default = find_shape(with_template(template))
    assert (found.name, default) == (shape, system)


@pytest.mark.parametrize("template", [LLAMA_2.replace("[INST]", "[ASK]"), WITHOUT_END, None])
def test_others_are_left_to_the_gguf_file(template):
    text = modelfile(with_template(template), "model.gguf")
    assert "\nTEMPLATE" not in text and "# No TEMPLATE" in text
    assert 'PARAMETER stop "</s>"' in text


def rendered(go_template: str, system: str | None, prompt: str) -> str:
    """What Ollama makes of a template of this form for one question: `if` and three fields are all there is."""
    text = re.sub(r"\{\{ if \.System \}\}(.*?)\{\{ end \}\}", r"\1" if system else "", go_template, flags=re.DOTALL)
    text = text.replace("{{ .System }}", system or "").replace("{{ .Prompt }}", prompt)
    return text[: text.index("{{ .Response }}")]


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("template", [CHATML, LLAMA_3])
def test_ollama_writes_what_the_model_was_trained_on(template, system):
    tokenizer = with_template(template)
    shape, default = find_shape(tokenizer)
    messages = [{"role": "user", "content": "Why?"}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered(shape.go_template(), system or default, "Why?") == expected.removeprefix("<s>")


def test_the_file(tmp_path):
    tokenizer = with_template(CHATML)
    tokenizer.save_pretrained(tmp_path)
    turn = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": [{turn}]}}', encoding="utf-8")
    write_modelfile(tmp_path / "Modelfile", "my-model.gguf", tmp_path, tmp_path)
    lines = (tmp_path / "Modelfile").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "FROM ./my-model.gguf"
    assert 'SYSTEM """You are a helpful assistant."""' in lines
    ends = ("<|im_end|>", "<|endoftext|>", tokenizer.eos_token)  # the template's, the settings', the tokenizer's
    assert lines[-3:] == [f'PARAMETER stop "{end}"' for end in ends]
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == CHATML
    assert len({shape.name for shape in SHAPES}) == len(SHAPES)
