"""Conversations from a file to trained tokens: what is context, what templates leave out, what bad ones do."""

from __future__ import annotations

import json
import time

import pytest
from tokenizers_for_tests import CHATML, REWRITING, byte_level, trained_texts

from qlora_tool.config import DataConfig
from qlora_tool.data import template as template_module
from qlora_tool.data.prompts import prompts_from_texts, read_prompts
from qlora_tool.data.tokenize import build_dataset
from qlora_tool.errors import UserError

GENERATION = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
# As Qwen's: tools in a system turn of their own, calls as JSON.
CALLING = (
    "{% if tools %}{{ '<|im_start|>system\\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + (m.content or '') }}"
    "{% for call in m.tool_calls or [] %}{{ '<call>' + call.function.name + (call.function.arguments | tojson) }}"
    "{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}" + GENERATION
)
# As DeepSeek-R1's: what stands before </think> is left out; the prompt may open a thought.
STRIPPING_THOUGHTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content.split('</think>')[-1] + '<|im_end|>\\n' }}"
    "{% endfor %}" + GENERATION
)
OPENING_THOUGHTS = STRIPPING_THOUGHTS.replace("assistant\\n' }}{% endif", "assistant\\n<think>\\n' }}{% endif")


def turn(role, content, **rest):
    return {"role": role, "content": content, **rest}


def user(content):
    return turn("user", content)


def answered(content, **rest):
    return {"messages": [user("2 + 2?"), turn("assistant", content, **rest)]}


def made(tmp_path, template, *rows, **data):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return build_dataset(str(path), DataConfig(max_length=4096, **data), byte_level(template))


def trained(dataset):
    tokenizer = byte_level()
    return [trained_texts(tokenizer, example.input_ids, example.labels) for example in dataset.examples]


def notes(dataset):
    return [note.partition(": ")[2] for note in dataset.report.warnings()]


class TestContext:
    @pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}])
    @pytest.mark.parametrize("template", [CHATML, REWRITING])
    def test_it_is_seen_and_not_trained(self, tmp_path, mark, template):
        row = {"messages": [user("2 + 2?"), turn("assistant", "5", **mark), user("No."), turn("assistant", "4")]}
        dataset = made(tmp_path, template, row)
        ((answer,),) = trained(dataset)
        assert answer.endswith("4<|im_end|>\n") and "5" not in answer
        assert "assistant\n5<|im_end|>" in byte_level().decode(dataset.examples[0].input_ids)
        assert dataset.report.warnings() == ["1 answer not trained: marked as context"]

    def test_rows_of_context_alone_are_dropped_and_counted(self, tmp_path):
        dataset = made(tmp_path, CHATML, answered("5", weight=0), answered("4"), answered(""))
        assert trained(dataset) == [["4<|im_end|>\n"]]
        assert dataset.report.warnings() == [
            "1 row dropped: without an answer",
            "1 row dropped: every answer is context (weight: 0, train: false)",
        ]

    def test_an_answer_within_the_prompt(self, tmp_path):
        row = {"prompt": [user("a?"), turn("assistant", "b"), user("c?")], "completion": [turn("assistant", "d")]}
        assert trained(made(tmp_path, CHATML, row)) == [["d<|im_end|>\n"]]

    def test_an_empty_answer_is_no_immediate_end(self, tmp_path):
        row = {"messages": [user("a?"), turn("assistant", ""), user("b?"), turn("assistant", "c")]}
        dataset = made(tmp_path, CHATML, row)
        assert trained(dataset) == [["c<|im_end|>\n"]]
        assert dataset.report.warnings() == ["1 answer not trained: empty"]

    def test_system_turns_alone(self, tmp_path):
        dataset = made(tmp_path, CHATML, {"messages": [turn("system", "s")]}, answered("4"))
        assert dataset.report.warnings() == ["1 row dropped: without an answer"]


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": "è"}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


class TestCalls:
    def test_arguments_as_json_and_as_objects_give_the_same_tokens(self, tmp_path):
        wire = {**CALL, "function": {"name": "add", "arguments": json.dumps(CALL["function"]["arguments"])}}
        old = {"role": "assistant", "content": None, "function_call": wire["function"]}
        rows = [answered(None, tool_calls=[CALL]), answered("", tool_calls=[wire]), {"messages": [user("2 + 2?"), old]}]
        dataset = made(tmp_path, CALLING, *({**row, "tools": TOOLS} for row in rows))
        first, *others = [(example.input_ids, example.labels) for example in dataset.examples]
        assert others == [first, first]
        assert trained(dataset)[0] == ['<call>add{"a": 2, "b": "è"}<|im_end|>\n']
        assert dataset.report.warnings() == []

    def test_a_call_as_the_content_of_a_role_of_its_own(self, tmp_path):
        """LLaMA-Factory's form; where the template knows no calls, the text is the answer."""
        call = json.dumps(CALL["function"])
        row = {"conversations": [{"from": "human", "value": "a?"}, {"from": "function_call", "value": call}]}
        plain = {"conversations": [*row["conversations"][:1], {"from": "function_call", "value": "add(2, 2)"}]}
        assert trained(made(tmp_path, CALLING, row, plain)) == [
            ['<call>add{"a": 2, "b": "è"}<|im_end|>\n'],
            ["add(2, 2)<|im_end|>\n"],
        ]
        assert trained(made(tmp_path, CHATML, row)) == [[f"{call}<|im_end|>\n"]]

    def test_out_of_parquet_too(self, tmp_path):
        import pyarrow
        import pyarrow.parquet

        rows = [
            {**answered("", tool_calls=[{"function": {"name": "add", "arguments": {key: "x"}}}]), "tools": TOOLS}
            for key in ("a", "b")
        ]
        path = tmp_path / "rows.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        dataset = build_dataset(str(path), DataConfig(), byte_level(CALLING))
        assert trained(dataset) == [['<call>add{"a": "x"}<|im_end|>\n'], ['<call>add{"b": "x"}<|im_end|>\n']]
        assert "null" not in byte_level().decode(dataset.examples[0].input_ids)

    def test_a_template_that_takes_json_gets_it(self, tmp_path):
        template = CALLING.replace("(call.function.arguments | tojson)", "call.function.arguments")
        row = answered("", tool_calls=[CALL])
        assert trained(made(tmp_path, template, row)) == [['<call>add{"a": 2, "b": "è"}<|im_end|>\n']]

    def test_calls_that_a_template_leaves_out(self, tmp_path):
        result = turn("tool", "4")
        calling = turn("assistant", "", tool_calls=[CALL])
        row = {"messages": [user("2 + 2?"), calling, result, turn("assistant", "4")], "tools": TOOLS}
        both = {"messages": [user("2 + 2?"), turn("assistant", "Let me see.", tool_calls=[CALL])]}
        dataset = made(tmp_path, CHATML, row, both, {"messages": row["messages"][:2]})
        assert trained(dataset) == [["4<|im_end|>\n"], ["Let me see.<|im_end|>\n"]]
        assert dataset.report.warnings() == [
            "1 row dropped: the chat template writes no answer of them",
            "2 answers: not trained, for the chat template does not write tool calls, and the data has only these",
            "1 answer: trained without the tool calls that the data has, for the chat template writes none",
            "1 row: the chat template does not write its tools",
        ]


class TestRoles:
    def test_an_unknown_developer_speaks_as_the_system(self, tmp_path):
        template = "{% for message in messages if message.role != 'developer' %}" + CHATML.partition("%}")[2]
        row = {"messages": [turn("DEVELOPER", "Be brief."), user("a?"), turn("assistant", "b")]}
        dataset = made(tmp_path, template, row)
        text = byte_level().decode(dataset.examples[0].input_ids)
        assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na?")
        (known,) = made(tmp_path, CHATML, row).examples
        assert "<|im_start|>developer\nBe brief." in byte_level().decode(known.input_ids)

    def test_turns_that_a_template_leaves_out_are_named(self, tmp_path):
        template = "{% for message in messages if message.role != 'system' %}" + CHATML.partition("%}")[2]
        row = {"messages": [turn("system", "Be brief."), user("a?"), turn("assistant", "b")]}
        (note,) = notes(made(tmp_path, template, row, answered("4")))
        assert note == "the chat template does not write its system turns"


THINKING = "<think>\nTwo and two.\n</think>\n\n4"


class TestThoughts:
    def test_one_that_the_template_takes_out_of_the_content_is_put_back(self, tmp_path):
        dataset = made(tmp_path, STRIPPING_THOUGHTS, answered(THINKING))
        assert trained(dataset) == [[f"{THINKING}<|im_end|>\n"]]
        assert notes(dataset) == ["reasoning that the chat template leaves out was put back, as the data has it"]

    @pytest.mark.parametrize("row", [answered(THINKING), answered("4", reasoning_content="Two and two."),
                                     answered("Two and two.\n</think>\n\n4")])  # fmt: skip
    def test_it_goes_on_from_a_prompt_that_opens_one(self, tmp_path, row):
        dataset = made(tmp_path, OPENING_THOUGHTS, row)
        assert trained(dataset) == [["Two and two.\n</think>\n\n4<|im_end|>\n"]]

    def test_such_a_prompt_is_closed_where_there_is_none(self, tmp_path):
        dataset = made(tmp_path, OPENING_THOUGHTS, answered("4"))
        assert trained(dataset) == [["\n</think>\n\n4<|im_end|>\n"]]
        assert notes(dataset) == ["the generation prompt opens a block of thoughts, and the data has none: </think> "
                                  "comes first"]  # fmt: skip

    @pytest.mark.parametrize("row", [answered(THINKING), answered("4", reasoning="Two and two.")])
    def test_it_goes_into_the_empty_block_of_a_template_that_always_writes_one(self, tmp_path, row):
        """Kimi K2 Thinking."""
        template = of_roles(USER, "<|im_start|><think></think>{{ m.content }}<|im_end|>")
        assert trained(made(tmp_path, template, row)) == [["<think>Two and two.</think>4<|im_end|>"]]
        assert trained(made(tmp_path, template, answered("4"))) == [["<think></think>4<|im_end|>"]]
        partly = of_roles(USER, "<|im_start|><think>{{ m.reasoning_content }}</think>{{ m.content }}<|im_end|>")
        assert trained(made(tmp_path, partly, row)) == [["<think>Two and two.</think>4<|im_end|>"]]

    @pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
    @pytest.mark.parametrize("read", ["reasoning_content", "reasoning", "thinking"])
    def test_under_whatever_name(self, tmp_path, name, read):
        template = CHATML.replace("+ message['content']", f"+ (message['{read}'] or '') + message['content']")
        assert trained(made(tmp_path, template, answered("4", **{name: "Hm. "}))) == [["Hm. 4<|im_end|>\n"]]

    def test_one_that_the_template_does_not_know_is_named(self, tmp_path):
        dataset = made(tmp_path, CHATML, answered("4", reasoning_content="Two and two."))
        assert trained(dataset) == [["4<|im_end|>\n"]]
        assert notes(dataset) == ["trained without the reasoning that the data has, for the chat template writes none"]


SWITCHED = CHATML.replace("'<|im_start|>assistant\\n' }}{% endif", "'<|im_start|>assistant\\n' + "
                          "('' if enable_thinking else '<think></think>') }}{% endif")  # fmt: skip


def of_roles(user, assistant, start="", end="{% if add_generation_prompt %}<|im_start|>{% endif %}", tool=""):
    """A template of what it writes for each role."""
    return (
        f"{start}{{% for m in messages %}}{{% if m.role == 'user' %}}{user}{{% elif m.role == 'tool' %}}{tool}"
        f"{{% elif m.role == 'assistant' %}}{assistant}{{% endif %}}{{% endfor %}}{end}"
    )


USER, ASSISTANT = "<s>{{ m.content }}</s>", "<|im_start|>{{ m.content }}<|im_end|>"
TURNS = [user("2 + 2?"), turn("assistant", "4"), user("And 5?"), turn("assistant", "9")]


class TestSystemColumn:
    def row(self, column):
        return {"system": column, "messages": [turn("system", "Be brief."), user("a?"), turn("assistant", "b")]}

    def test_it_is_not_doubled(self, tmp_path):
        (example,) = made(tmp_path, CHATML, self.row("Be brief.\n")).examples
        assert byte_level().decode(example.input_ids).count("Be brief.") == 1

    def test_one_that_differs_from_the_turn_is_a_fault(self, tmp_path):
        with pytest.raises(UserError, match=r"line 1: the 'system' column and the system turn differ"):
            made(tmp_path, CHATML, self.row("Be long."))


class TestTurnsBefore:
    """Prompts that are not how the template begins the answered conversation, as published templates have them."""

    def texts(self, dataset):
        return [byte_level().decode(example.input_ids) for example in dataset.examples]

    def test_an_empty_block_in_the_prompt_alone(self, tmp_path):
        """Gemma 4's larger models."""
        header = "<|im_start|><|channel>thought<channel|>"
        template = of_roles(USER, ASSISTANT, end=f"{{% if add_generation_prompt %}}{header}{{% endif %}}")
        dataset = made(tmp_path, template, {"messages": TURNS})
        assert trained(dataset) == [["4<|im_end|>"], ["9<|im_end|>"]]
        assert self.texts(dataset) == [
            f"<s>2 + 2?</s>{header}4<|im_end|>",
            f"<s>2 + 2?</s><|im_start|>4<|im_end|><s>And 5?</s>{header}9<|im_end|>",
        ]

    def test_a_system_prompt_in_the_last_question(self, tmp_path):
        """Mistral 7B and Nemo: it moves on, and is gone once the question is answered."""
        asked = "<s>{{ messages[0].content + ' ' if loop.last and messages[0].role == 'system' }}{{ m.content }}</s>"
        row = {"messages": [turn("system", "Brief!"), *TURNS]}
        dataset = made(tmp_path, of_roles(asked, "{{ m.content }}<|im_end|>", end=""), row)
        assert trained(dataset) == [["4<|im_end|>"], ["9<|im_end|>"]]
        assert self.texts(dataset) == [
            "<s>Brief! 2 + 2?</s>4<|im_end|>",
            "<s>2 + 2?</s>4<|im_end|><s>Brief! And 5?</s>9<|im_end|>",
        ]

    def test_a_header_that_is_not_written_after_a_tool(self, tmp_path):
        """Apertus: the answer goes on in the turn of the call; its generation prompt begins another."""
        said = (
            "{{ '<|im_start|>' if messages[loop.index0 - 1].role != 'tool' }}{{ m.content }}"
            "{% for call in m.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}<|im_end|>"
        )
        template = of_roles(USER, said, tool="[{{ m.content }}]")
        calling = turn("assistant", "", tool_calls=[CALL])
        row = {"messages": [user("2 + 2?"), calling, turn("tool", "4"), turn("assistant", "Four.")]}
        dataset = made(tmp_path, template, row)
        assert trained(dataset)[-1] == ["Four.<|im_end|>"]
        assert self.texts(dataset)[-1].endswith("<|im_end|>[4]<|im_start|>Four.<|im_end|>")

    def test_other_white_space(self, tmp_path):
        """Hermes 2 and 3: a line end after each result of a tool but the last."""
        dataset = made(tmp_path, of_roles(USER + "{{ '\\n' if not loop.last }}", ASSISTANT), answered("4"))
        assert trained(dataset) == [["4<|im_end|>"]]
        assert self.texts(dataset) == ["<s>2 + 2?</s><|im_start|>4<|im_end|>"]
        (note,) = notes(dataset)
        assert note == "the chat template has other white space in the turns before it than in its generation prompt"

    def test_a_header_that_is_always_written(self, tmp_path):
        """Command R7B with tools."""
        template = of_roles(USER, "<s><|im_start|>{{ m.content }}<|im_end|>", end="<s><|im_start|>")
        dataset = made(tmp_path, template, {"messages": TURNS})
        assert trained(dataset) == [["4<|im_end|>", "9<|im_end|>"]]

    @pytest.mark.parametrize(
        ("written", "target"),
        [
            ("{{ '<think>' + m.reasoning_content + '</think>' if m.reasoning_content else '</think>' }}", "</think>4"),
            ("{{ '<think>' + m.reasoning_content + '</think>,' if m.reasoning_content }}", "</think>,4"),
            ("", "\n</think>\n\n4"),
        ],
    )
    def test_an_opened_thought_is_closed_as_the_template_does(self, tmp_path, written, target):
        """GLM 4.7; Command A; templates that do not know how."""
        template = of_roles(USER, f"<|im_start|>{written}{{{{ m.content }}}}<|im_end|>",
                            end="{# </think> #}{{ '<|im_start|><think>' if add_generation_prompt }}")  # fmt: skip
        dataset = made(tmp_path, template, answered("4"))
        assert trained(dataset) == [[f"{target}<|im_end|>"]]
        assert "the data has none: </think> comes first" in notes(dataset)[0]


class TestDate:
    def test_one_that_changes_by_the_day_is_told(self, tmp_path):
        dated = "{% if not date %}{% set date = strftime_now('%Y') %}{% endif %}{{ date }}" + CHATML
        (note,) = notes(made(tmp_path, dated, answered("4")))
        assert note == "the chat template writes the date of the day, so rows that are made on another day differ"
        assert notes(made(tmp_path, dated, answered("4"), chat_template_kwargs={"date": "2026"})) == []


class TestKwargs:
    def test_they_reach_the_template_in_training_and_in_prompts(self, tmp_path):
        assert trained(made(tmp_path, SWITCHED, answered("4"), chat_template_kwargs={"enable_thinking": True})) == [
            ["4<|im_end|>\n"]
        ]
        tokenizer = byte_level(SWITCHED)
        prompts = [
            *prompts_from_texts(["2 + 2?"], tokenizer, {"enable_thinking": False}),
            *prompts_from_texts(["2 + 2?"], tokenizer, {"enable_thinking": True}),
            *read_prompts(str(tmp_path / "rows.jsonl"), "auto", tokenizer, {"enable_thinking": True}),
        ]
        ends = [tokenizer.decode(prompt.input_ids).rpartition("assistant\n")[2] for prompt in prompts]
        assert ends == ["<think></think>", "", ""]

    @pytest.mark.parametrize(
        ("kwargs", "reason"),
        [
            ({"enable_thinkng": False}, "does not read 'enable_thinkng'; did you mean 'enable_thinking'"),
            ({"date": "x"}, "does not read 'date'; it reads enable_thinking"),
            ({"messages": []}, "'messages' is not a template's own"),
            ({"tokenize": True}, "'tokenize' is not a template's own"),
        ],
    )
    def test_what_the_template_does_not_read_is_refused(self, tmp_path, kwargs, reason):
        with pytest.raises(UserError, match=f"^data.chat_template_kwargs: .*{reason}"):
            made(tmp_path, SWITCHED, answered("4"), chat_template_kwargs=kwargs)

    def test_a_prompt_that_leaves_no_room_for_the_thought(self, tmp_path):
        template = (
            "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
            "{{ '<think>' + (m.reasoning_content or '') + '</think>' }}{% endif %}{{ m.content + '<|im_end|>\\n' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>' }}"
            "{% if not enable_thinking %}{{ '</think>' }}{% endif %}{% endif %}"
        )
        row = answered("4", reasoning_content="Two and two.")
        closed = made(tmp_path, template, row)
        assert trained(closed) == [["4<|im_end|>\n"]]
        assert "trained without the reasoning" in notes(closed)[0] and "enable_thinking: true" in notes(closed)[0]
        opened = made(tmp_path, template, row, chat_template_kwargs={"enable_thinking": True})
        assert trained(opened) == [["Two and two.</think>4<|im_end|>\n"]]


class TestBadTemplates:
    @pytest.mark.parametrize(
        "template",
        [
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "{% macro f(x) %}{% for a in range(9999) %}{{ 'x' * 999 }}{% endfor %}{% endmacro %}"
            "{% for a in range(99999) %}{% set y = f(a) %}{% endfor %}",
        ],
    )
    def test_a_loop_without_an_end_is_stopped(self, tmp_path, monkeypatch, template):
        monkeypatch.setattr(template_module, "SECONDS", 0.5)
        begin = time.monotonic()
        with pytest.raises(UserError, match=r"was not done .*; mend it, or name another with data\.chat_te") as raised:
            made(tmp_path, template, answered("4"), answered("4"))
        assert len(raised.value.lines) == 1
        assert time.monotonic() - begin < 10  # a process of its own is started for one of them

    @pytest.mark.parametrize(
        "expression", ["range(10**12)", "1 // 0", "none.x.y", "'a' * 10**13", "messages | no_such_filter"]
    )
    def test_whatever_one_raises_is_a_line(self, tmp_path, expression):
        with pytest.raises(UserError) as raised:
            made(tmp_path, f"{{% for x in {expression} %}}{{% endfor %}}{CHATML}", answered("4"))
        assert len(raised.value.lines) == 1
        assert "the chat template" in raised.value.lines[0]

    def test_one_without_end_in_itself(self, tmp_path):
        with pytest.raises(UserError, match="the chat template refuses this conversation: maximum recursion depth"):
            made(tmp_path, "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", answered("4"))

    def test_one_that_drops_every_answer(self, tmp_path):
        template = CHATML.replace("for message in messages %}", "for message in messages if message.role == 'user' %}")
        with pytest.raises(UserError, match="the chat template does not write what the assistant says"):
            made(tmp_path, template, answered("4"))

    def test_one_that_drops_what_is_no_word(self, tmp_path):
        template = CHATML.replace("+ message['content'] +", "+ message['content'].replace('🙂', '') +")
        with pytest.raises(UserError, match=r"does not write the answer of turn 2 \('🙂'\) as the data has it"):
            made(tmp_path, template, answered("🙂"))

    def test_one_that_writes_part_of_an_answer(self, tmp_path):
        template = CHATML.replace("+ message['content'] +", "+ message['content'][:12] +")
        with pytest.raises(UserError, match=r"line 1: the chat template does not write the answer of turn 2 \('It is"):
            made(tmp_path, template, answered("It is four, I am sure."))

    def test_a_conversation_that_starts_with_an_answer(self, tmp_path):
        row = {"messages": [turn("assistant", "Hello!"), user("2 + 2?"), turn("assistant", "4")]}
        with pytest.raises(UserError, match=r"line 1: .*begins with an assistant turn.* mark it as context \(we"):
            made(tmp_path, CHATML, row)
        row["messages"][0]["weight"] = 0
        assert trained(made(tmp_path, CHATML, row)) == [["4<|im_end|>\n"]]
