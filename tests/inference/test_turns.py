"""A conversation of several turns, a system turn, and answers as JSON: through the functions and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_adapters import write_chat_base
from transformers import AutoTokenizer

from qlora_tool.api import generate
from qlora_tool.cli import main
from qlora_tool.errors import UserError
from qlora_tool.inference import chat as module

CPU = {"device": "cpu", "compute_dtype": "float32", "max_new_tokens": 6}
WORDS = ("--device", "cpu", "--compute-dtype", "float32", "--max-new-tokens", "6")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_base("llama", tmp_path_factory.mktemp("chat") / "llama")


def turn(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


def test_each_turn_is_answered_behind_all_before_it(base: Path, monkeypatch):
    """As a server renders them: the whole conversation each time."""
    prompts: list[list[int]] = []
    answer = module.answer_as_it_is

    def seen(model, tokenizer, asked, *rest, **options):
        prompts.append(asked[0].input_ids)
        return answer(model, tokenizer, asked, *rest, **options)

    monkeypatch.setattr(module, "answer_as_it_is", seen)
    told: list[str] = []
    pieces: list[str] = []
    said = generate(base, chat=["Who?", "  ", "a\nb"], system="Be brief.", on_answer=lambda one: told.append(one.text),
                    on_text=pieces.append, **CPU)  # fmt: skip
    first, second = said.answers
    assert told == [first.text, second.text] and (first.prompt, second.prompt) == ("Who?", "a\nb")
    assert "".join(pieces).split() == f"{first.text}{second.text}".split()
    begin = turn("system", "Be brief.") + turn("user", "Who?") + "<|im_start|>assistant\n"
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert prompts[0] == tokenizer(begin)["input_ids"]
    whole = f"{begin}{first.text}<|im_end|>\n{turn('user', 'a' + chr(10) + 'b')}<|im_start|>assistant\n"
    assert prompts[1] == tokenizer(whole)["input_ids"]
    alone = generate(base, prompt="Who?", system="Be brief.", **CPU).answers[0]
    assert alone == first and alone.answer.tokens == said.effort.tokens - second.answer.tokens


def test_a_turn_beyond_the_context(base: Path):
    said: list[str] = []
    with pytest.raises(UserError, match=r"^--chat, turn 3: the conversation has 1\d\d tokens by now, but the model has "
                                        r"128 positions; begin a new one$"):  # fmt: skip
        generate(base, chat=["hi", "hi " * 12, "hi " * 20, "never"], on_answer=lambda one: said.append(one.text), **CPU)
    assert len(said) == 2


def test_why_answers_end(base: Path, monkeypatch):
    one = generate(base, prompt="Who?", **CPU).answers[0].answer
    assert (one.tokens, one.finish_reason) == (6, "length")
    long = generate(base, prompt="hi " * 28, **CPU | {"max_new_tokens": 200}).answers[0].answer
    assert long.finish_reason == "context" and long.tokens < 128
    monkeypatch.setattr("qlora_tool.inference.answer.answer_ends", lambda *_: list(range(500)))
    assert generate(base, prompt="Who?", **CPU).answers[0].answer.finish_reason == "stop"


def test_a_model_without_a_template(tmp_path: Path):
    base = write_chat_base("llama", tmp_path / "plain")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = None
    (base / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(base)
    with pytest.raises(UserError, match=r"^--chat: .*plain: the model has no chat template, so a text has no turns"):
        generate(base, chat=["Who?"], **CPU)
    with pytest.raises(UserError, match=r"^--system: the model has no chat template, .*; leave it out$"):
        generate(base, prompt="Who?", system="Be brief.", **CPU)


def test_system_turns_that_nobody_would_see(tmp_path: Path):
    """Of a template that leaves them out, and before rows that bring their own."""
    base = write_chat_base("llama", tmp_path / "deaf")
    deaf = "{% for turn in messages if turn['role'] != 'system' %}{{ turn['content'] }}\n{% endfor %}assistant: "
    (base / "chat_template.jinja").write_text(deaf)
    with pytest.raises(UserError, match=r"^--prompt: the chat template does not write system turns; leave out"):
        generate(base, prompt="Who?", system="Be brief.", **CPU)
    with pytest.raises(UserError, match=r"^--chat, turn 1: the chat template does not write system turns"):
        generate(base, chat=["Who?"], system="Be brief.", **CPU)


def test_a_system_turn_before_the_rows_of_a_file(base: Path, tmp_path: Path):
    rows = [{"messages": [{"role": "user", "content": "Who?"}]}]
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]) + "\n")
    found = generate(base, prompts=tmp_path / "rows.jsonl", system="Be brief.", **CPU)
    assert found.answers == generate(base, prompt="Who?", system="Be brief.", **CPU).answers
    assert found.answers != generate(base, prompt="Who?", **CPU).answers
    rows[0]["messages"].insert(0, {"role": "system", "content": "Be long."})
    (tmp_path / "own.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(UserError, match="line 1: has a system turn of its own; leave out --system"):
        generate(base, prompts=tmp_path / "own.jsonl", system="Be brief.", **CPU)


def test_the_command(base: Path, tmp_path: Path):
    def invoke(*words: str, typed: str = ""):
        return CliRunner().invoke(main, ["generate", str(base), *words, *WORDS], input=typed)

    answers = generate(base, chat=["Who?", "yes?"], **CPU).answers
    shown = invoke("--chat", typed="Who?\n\nyes?\n")
    assert shown.exit_code == 0
    told = [" ".join(one.text.split()) for one in answers]
    assert " ".join(shown.stdout.split()) == f"> Who? {told[0]} > yes? {told[1]}".strip()
    assert "cut off: 2 of 2 answers, after 6 tokens (--max-new-tokens)\n" in shown.stderr
    lines = invoke("--chat", "--json", typed="Who?\nyes?\n").stdout.splitlines()
    assert [json.loads(line) for line in lines] == [one.as_json() for one in answers]
    assert list(json.loads(lines[0])) == ["prompt", "answer", "tokens", "finish_reason"]
    file = tmp_path / "answers.jsonl"
    assert invoke("--prompt", "Who?", "--json", str(file)).stdout == answers[0].text + "\n"
    assert [json.loads(line)["answer"] for line in file.read_text(encoding="utf-8").splitlines()] == [answers[0].text]
    refused = invoke("--chat", "--prompt", "a", "--compare-base")
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: --chat talks with one model, and --prompt and --compare-base cannot go")
    assert invoke("--chat").stderr.startswith("error: --chat: nothing was said")
