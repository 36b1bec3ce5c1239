"""What rows have and training does not is counted and named: turns, tools, keys, and answers behind max_length."""

from __future__ import annotations

import json

import pytest
from tokenizers_for_tests import CHATML, REWRITING, byte_level, trained_texts

from qlora_tool.config import DataConfig
from qlora_tool.data.prompts import prompts_from_texts
from qlora_tool.data.tokenize import build_dataset, build_evaluation_sets
from qlora_tool.errors import UserError

GENERATION = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
WITH_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML.replace(
    "+ message['content']", "+ (message['content'] or '') + (message.tool_calls | tojson if message.tool_calls else '')"
)
WITHOUT_TOOLS = WITH_TOOLS.replace("{{ tools | tojson }}", "")
CALLING = {"id": "c1", "type": "function", "function": {"name": "search", "arguments": {"for": "ferries"}}}
TOOLS = [{"type": "function", "function": {"name": "search", "description": "Looks things up", "parameters": {}}}]


def user(content, **rest):
    return {"role": "user", "content": content, **rest}


def answer(content, **rest):
    return {"role": "assistant", "content": content, **rest}


def rows(*messages, **columns):
    return [{"messages": list(messages), **columns}]


def made(tmp_path, template, given, **data):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return build_dataset(str(path), DataConfig(**{"max_length": 4096, **data}), byte_level(template))


def trained(dataset):
    return [trained_texts(byte_level(), example.input_ids, example.labels) for example in dataset.examples]


class TestTools:
    @pytest.mark.parametrize("question", ["please search for it", "where?"])
    @pytest.mark.parametrize("calls", [[], [answer("", tool_calls=[CALLING]), {"role": "tool", "content": "none"}]])
    def test_a_name_that_stands_elsewhere_is_not_taken_for_the_tool(self, tmp_path, question, calls):
        given = rows(user(question), *calls, answer("There are none."), tools=TOOLS)
        said = "1 row: the chat template does not write its tools"
        assert said in made(tmp_path, WITHOUT_TOOLS, given).report.warnings()
        assert made(tmp_path, WITH_TOOLS, given).report.warnings() == []
        assert said in made(tmp_path, WITHOUT_TOOLS, given, train_on="all").report.warnings()


    @pytest.mark.parametrize("speech", ["", "I look."])
    def test_calls_of_which_some_are_written(self, tmp_path, speech):
        """As gpt-oss's template writes the first alone."""
        first = WITH_TOOLS.replace("message.tool_calls | tojson", "message.tool_calls[0] | tojson")
        other = {"type": "function", "function": {"name": "book", "arguments": {"boat": "twelve"}}}
        given = rows(user("a"), answer(speech, tool_calls=[CALLING, other]), user("b"), answer("yes"))
        said = ("trained without some of its tool calls, for the chat template does not write all" if speech else
                "not trained, for the chat template writes some of its tool calls, and not all")  # fmt: skip
        dataset = made(tmp_path, first, given)
        assert dataset.report.warnings() == [f"1 answer: {said}"]
        assert len(trained(dataset)[-1]) == (2 if speech else 1)


class TestTurns:
    @pytest.mark.parametrize("train_on", ["completion", "all"])
    @pytest.mark.parametrize("system", ["boats", "How many?", "There 12 How"])
    def test_one_whose_words_stand_elsewhere_too(self, tmp_path, system, train_on):
        without = (
            "{% for m in messages if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
            "{{ '<|im_end|>\\n' }}{% endfor %}" + GENERATION
        )
        given = rows({"role": "system", "content": system}, user("How many?"), answer("There are 12 boats"))
        assert made(tmp_path, without, given, train_on=train_on).report.warnings() == [
            "1 row: the chat template does not write its system turns"
        ]
        assert made(tmp_path, CHATML, given, train_on=train_on).report.warnings() == []

    def test_those_that_only_stand_behind_the_last_answer(self, tmp_path):
        said = ["1 row: nothing is trained of the turns after its last answer"]
        assert made(tmp_path, CHATML, rows(user("a"), answer("b"), user("c"))).report.warnings() == said
        two = rows(user("a"), answer("b"), user("c"), answer("d"), user("e"))
        assert made(tmp_path, CHATML, two).report.warnings() == said
        assert made(tmp_path, CHATML, two, train_on="all").report.warnings() == []

    def test_an_empty_question(self, tmp_path):
        asked = {"": "yes", " \n": "no", "?": "12"}
        given = [{"question": question, "answer": said} for question, said in asked.items()]
        dataset = made(tmp_path, CHATML, given)
        assert dataset.report.kept == 3
        assert dataset.report.warnings() == ["2 rows: trained with an empty question"]

    def test_keys_that_nothing_reads(self, tmp_path):
        given = rows(user("a", name="Bo", id=None), answer("b", masked=True, wieght=0, refusal=None, annotations=[]))
        said = "1 row: nothing reads these keys of its turns: masked, name, wieght"
        assert made(tmp_path, CHATML, given).report.warnings() == [said]
        named = CHATML.replace("message['role'] + '\\n'", "message['role'] + ' ' + (message.name or '') + '\\n'")
        assert made(tmp_path, named, given).report.warnings() == [said.replace("name, ", "")]

    def test_a_tools_name_is_none_of_them(self, tmp_path):
        given = rows(user("a"), {"role": "tool", "name": "search", "tool_call_id": "1", "content": "b"}, answer("c"))
        assert made(tmp_path, CHATML, given).report.warnings() == []


class TestContent:
    """Templates that change what is said, and contents in parts."""

    def test_a_template_that_cuts_is_not_given_lists_to_write(self, tmp_path):
        cut = CHATML.replace("message['content']", "message['content'][:5]")
        with pytest.raises(UserError, match="does not write what the assistant says"):
            made(tmp_path, cut, rows(user("How many boats?"), answer("There are 12")))

    def test_nor_one_that_cuts_questions(self, tmp_path):
        cut = CHATML.replace(
            "message['content']",
            "(message['content'] if message['role'] == 'assistant' else message['content'][:5])",
        )
        dataset = made(tmp_path, cut, rows(user("How many boats?"), answer("There are 12")))
        assert trained(dataset) == [["There are 12<|im_end|>\n"]]
        assert "user\nHow m<|im_end|>" in byte_level().decode(dataset.examples[0].input_ids)
        assert dataset.report.warnings() == ["1 row: the chat template does not write its user turns"]

    @pytest.mark.parametrize(
        "part", [{"type": "thinking", "thinking": "12, or so"}, {"type": "reasoning", "text": "12, or so"}]
    )
    def test_a_part_of_reasoning_is_no_answer(self, tmp_path, part):
        thinking = CHATML.replace(
            "+ message['content']",
            "+ ('<think>' + message.reasoning_content + '</think>' if message.reasoning_content else '')"
            " + message['content']",
        )
        given = rows(user("?"), answer([part, {"type": "output_text", "text": "There are 12"}]))
        assert trained(made(tmp_path, thinking, given)) == [["<think>12, or so</think>There are 12<|im_end|>\n"]]
        dataset = made(tmp_path, CHATML, given)
        assert trained(dataset) == [["There are 12<|im_end|>\n"]]
        assert dataset.report.warnings() == [
            "1 answer: trained without the reasoning that the data has, for the chat template writes none"
        ]

    @pytest.mark.parametrize(
        ("turns", "fault"),
        [
            ([user([{"type": "image", "text": "a boat"}]), answer("b")], r"messages\[0\] holds dict .*, expected text"),
            ([user([{"type": "thinking", "thinking": "a"}]), answer("b")], r"messages\[0\]: a user turn with a"),
            ([user("a"), answer([{"type": "reasoning", "summary": []}])], r"messages\[1\] holds dict"),
            ([user("a"), answer([{"type": "thinking", "thinking": "b"}], reasoning="c")], r"messages\[1\]: its part"),
        ],
    )
    def test_parts_of_other_kinds(self, tmp_path, turns, fault):
        with pytest.raises(UserError, match=fault):
            made(tmp_path, CHATML, rows(*turns))

    def test_a_thought_that_nothing_closes(self, tmp_path):
        dataset = made(tmp_path, CHATML, rows(user("a"), answer("<think>12, or")))
        assert dataset.report.warnings() == ["1 answer: trained with a <think> that nothing closes"]

    @pytest.mark.parametrize("train_on", ["completion", "all"])
    def test_half_a_character(self, tmp_path, train_on):
        given = [*rows(user("a"), answer("b \ud83d")), *rows(user("c"), answer("yes"))]
        with pytest.raises(UserError, match=r"rows.jsonl, line 1: \\ud83d is half of a character \(behind '.*b'\)"):
            made(tmp_path, CHATML, given, train_on=train_on)
        dataset = made(tmp_path, CHATML, given, train_on=train_on, on_error="skip")
        assert (dataset.report.kept, dataset.report.faulty) == (1, 1)
        with pytest.raises(UserError, match="half of a character"):
            made(tmp_path, CHATML, [{"text": "\udc00 a"}, {"text": "b c"}])
        with pytest.raises(UserError, match=r"--prompt: .*half of a character"):
            prompts_from_texts(["a \ud83d"], byte_level(CHATML))


class TestAnswersBehindTheLimit:
    LONG = "How many boats? " * 20

    @pytest.mark.parametrize(
        ("template", "multi_turn"), [(CHATML, "one_per_answer"), (REWRITING, "auto"), (CHATML, "auto")]
    )
    def test_they_are_counted(self, tmp_path, template, multi_turn):
        given = rows(user("a"), answer("yes"), user(self.LONG), answer("no"), user("c"), answer("perhaps"))
        dataset = made(tmp_path, template, given, max_length=100, multi_turn=multi_turn)
        assert sum(len(found) for found in trained(dataset)) == dataset.report.answers == 1
        assert "2 answers: not trained, for data.max_length 100 leaves nothing of it" in dataset.report.warnings()
        whole = made(tmp_path, template, given, multi_turn=multi_turn)
        assert whole.report.answers == 3 and not any("max_length" in line for line in whole.report.warnings())


class TestContextAndEmptyTurns:
    def test_where_all_else_is_trained_they_are_not(self, tmp_path):
        given = rows(
            user("a"), answer("five", weight=0), user("b"), answer(""), user("c"), answer("yes"), user("d"),
            answer("no", train=False), user("e"),
        )  # fmt: skip
        (example,) = made(tmp_path, CHATML, given, train_on="all").examples
        left = [token for token, label in zip(example.input_ids, example.labels, strict=True) if label == -100]
        assert byte_level().decode(left) == "five<|im_end|>\n<|im_end|>\nno<|im_end|>\n"
        assert example.input_ids == byte_level()(byte_level().decode(example.input_ids))["input_ids"]

    def test_where_each_answer_is_a_row_they_are_not_either(self, tmp_path):
        given = rows(user("a"), answer("five", weight=0), user("b"), answer("yes"), user("c"), answer("no"))
        dataset = made(tmp_path, CHATML, given, train_on="all", multi_turn="one_per_answer")
        for example in dataset.examples:
            left = [token for token, label in zip(example.input_ids, example.labels, strict=True) if label == -100]
            assert byte_level().decode(left) == "five<|im_end|>\n"
        assert len(dataset.examples) == 2

    @pytest.mark.parametrize("multi_turn", ["auto", "one_per_answer"])
    def test_what_a_template_writes_anew_cannot_be_told_apart(self, tmp_path, multi_turn):
        thought = answer("five", weight=0, reasoning_content="2 + 2")
        given = rows(user("a"), thought, user("b"), answer("yes"))
        with pytest.raises(UserError, match=r"turn 2 is not to be trained, .* set data\.train_on: completion"):
            made(tmp_path, REWRITING, given, train_on="all", multi_turn=multi_turn)
        assert trained(made(tmp_path, REWRITING, given, multi_turn=multi_turn))[0][0].endswith("yes<|im_end|>\n")

    def test_context_that_the_template_does_not_write(self, tmp_path):
        given = rows(user("a"), answer("one", tool_calls=[CALLING], weight=0), user("b"), answer("yes"))
        dataset = made(tmp_path, CHATML, given)
        assert trained(dataset) == [["yes<|im_end|>\n"]]
        assert "1 answer: context of which the chat template does not write all" in dataset.report.warnings()
        assert made(tmp_path, WITH_TOOLS, given).report.warnings() == ["1 answer not trained: marked as context"]


class TestColumnsThatAreNamed:
    ROW = {"Q": "How many?", "A": "12 boats", "note": "By the pier."}  # noqa: RUF012

    @pytest.mark.parametrize("name", ["context", "input"])
    def test_one_beside_usual_names_is_read(self, tmp_path, name):
        dataset = made(tmp_path, CHATML, [self.ROW], columns={name: "note"})
        assert "user\nHow many?\n\nBy the pier.<|im_end|>" in byte_level().decode(dataset.examples[0].input_ids)
        assert dataset.report.warnings() == []

    def test_tools_beside_usual_names_are_read(self, tmp_path):
        given = [{"Q": "where?", "A": "There", "can": TOOLS}]
        assert made(tmp_path, WITH_TOOLS, given, columns={"tools": "can"}).report.warnings() == []

    @pytest.mark.parametrize(
        ("columns", "fault"),
        [
            ({"prompt": "Q", "completion": "A", "context": "note"},
             r"data.columns.context: rows of the format prompt_completion have none; it reads prompt, completion, "
             r"system, tools; perhaps data.columns: \{instruction: Q, context: note, response: A\}"),
            ({"instruction": "Q", "output": "A", "context": "note"}, r"data.columns.context: rows of the format alp"),
            ({"text": "note", "system": "A"}, r"data.columns.system: rows of the format text have none; it reads text"),
        ],
    )  # fmt: skip
    def test_one_that_the_format_does_not_read_is_an_error(self, tmp_path, columns, fault):
        with pytest.raises(UserError, match=fault):
            made(tmp_path, CHATML, [self.ROW], columns=columns)


def test_patterns_are_told_apart_from_names(tmp_path):
    with pytest.raises(UserError, match=r"\*\.jsonl: no such file, and patterns are not read; name the folder"):
        build_dataset(str(tmp_path / "*.jsonl"), DataConfig(), byte_level(CHATML))


def test_examples_that_are_trained_and_evaluated(tmp_path):
    train = made(tmp_path, CHATML, [{"prompt": str(number), "completion": "yes"} for number in range(30)])
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"Q": str(number), "A": "yes"}) + "\n" for number in range(25, 40)))
    fresh = tmp_path / "fresh.csv"
    fresh.write_text("question,answer\n100,yes\n")
    data = DataConfig(eval={"other": str(other), "fresh": str(fresh)}, max_length=4096)
    _, sets = build_evaluation_sets(data, byte_level(CHATML), train)
    assert sets["other"].report.warnings() == [
        "5 of these 15 examples are in data.train as well: what is learnt by heart looks good on them"
    ]
    assert sets["fresh"].report.warnings() == []
    data = DataConfig(eval=[{"path": str(other), "repeat": 2}], max_length=4096)
    _, sets = build_evaluation_sets(data, byte_level(CHATML), train)
    assert sets["eval"].report.warnings()[-1].startswith("10 of these 30 examples are in data.train as well")


def test_a_fraction_of_one_row_says_what_helps(tmp_path):
    train = made(tmp_path, CHATML, rows(user("a"), answer("b")))
    with pytest.raises(UserError, match=r"it takes one at least; give a file, or data\.eval=null"):
        build_evaluation_sets(DataConfig(eval=0.05), byte_level(CHATML), train)


@pytest.mark.parametrize("value", ["false", "True"])
def test_a_switch_that_is_a_text(tmp_path, value):
    switched = "{% if enable_thinking is defined and enable_thinking is false %}{% endif %}" + CHATML
    with pytest.raises(UserError, match=f"data.chat_template_kwargs.enable_thinking: the text '{value}'"):
        made(tmp_path, switched, rows(user("a"), answer("b")), chat_template_kwargs={"enable_thinking": value})
    made(tmp_path, switched, rows(user("a"), answer("b")), chat_template_kwargs={"enable_thinking": False})


def test_an_answer_that_the_template_joins_to_the_one_before(tmp_path):
    """As Gemma 4's: turns of one role in a row are one, and at inference the first has ended."""
    joining = (
        "{% for m in messages %}{% if loop.index0 == 0 or m.role != messages[loop.index0 - 1].role %}"
        "{{ '<|im_start|>' + m.role + '\\n' }}{% endif %}{{ m.content }}"
        "{% if loop.last or m.role != messages[loop.index0 + 1].role %}{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}"
        + GENERATION
    )
    dataset = made(tmp_path, joining, rows(user("a"), answer("b"), answer("c")))
    texts = [byte_level().decode(example.input_ids) for example in dataset.examples]
    first = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    assert texts == [first, first + "<|im_start|>assistant\nc<|im_end|>\n"]
    assert trained(dataset) == [["b<|im_end|>\n"], ["c<|im_end|>\n"]]
    assert any("joins it to the turn before" in line for line in dataset.report.warnings())
