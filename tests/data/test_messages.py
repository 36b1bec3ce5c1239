"""Turns as people write them: roles by many names, marks of what is context, tools and tool calls in every form."""

from __future__ import annotations

import json

import pytest

from qlora_tool.data.faults import RowFault
from qlora_tool.data.messages import as_context, read_conversation, read_turns


def turn(role, content="x", **rest):
    return {"role": role, "content": content, **rest}


def read(*turns, tools=None):
    return read_conversation(read_turns(list(turns), "messages"), "file, line 1", tools)


class TestRoles:
    @pytest.mark.parametrize(
        ("written", "role"),
        [
            ("USER", "user"),
            ("Human", "user"),
            ("prompter", "user"),
            ("Assistant ", "assistant"),
            ("gpt", "assistant"),
            ("agent", "assistant"),
            ("model", "assistant"),
            ("AI", "assistant"),
            ("System", "system"),
            ("Developer", "developer"),
            ("observation", "tool"),
            ("tool_response", "tool"),
        ],
    )
    @pytest.mark.parametrize(("role_key", "content_key"), [("role", "content"), ("from", "value")])
    def test_by_their_usual_names_in_any_case(self, written, role, role_key, content_key):
        assert read_turns([{role_key: written, content_key: "x"}], "c") == [turn(role)]

    def test_the_keys_of_both_kinds_may_be_mixed(self):
        """As a table has them whose rows come from both."""
        written = {"role": None, "content": None, "from": "human", "value": "x"}
        assert read_turns([written, {"role": "user", "value": "x"}], "c") == [turn("user"), turn("user")]

    def test_one_that_is_misspelt_is_named(self):
        with pytest.raises(RowFault, match=r"c\[0\]: the role is 'asistant'; did you mean 'assistant'"):
            read_turns([turn("asistant")], "c")

    def test_one_that_only_some_templates_know_passes(self):
        assert read_turns([turn("Critic")], "c") == [turn("Critic")]


class TestContext:
    @pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}, {"train": 0}])
    def test_an_answer_marked_so_is_not_trained(self, mark):
        conversation = read(turn("user"), turn("assistant", **mark), turn("user"), turn("assistant", weight=1))
        assert (conversation.answers, conversation.context) == ([3], [1])

    @pytest.mark.parametrize("mark", [{"weight": 1}, {"train": True}, {"weight": None}, {}])
    def test_others_are(self, mark):
        assert read(turn("user"), turn("assistant", **mark)).answers == [1]

    def test_one_mark_is_enough(self):
        assert not read(turn("user"), turn("assistant", weight=1, train=False)).has_answer

    @pytest.mark.parametrize("value", [0.5, "no", 2, [0]])
    def test_a_mark_that_is_neither_is_refused(self, value):
        with pytest.raises(RowFault, match=r"messages\[0\]: 'weight' is .*, expected 0 or 1"):
            read(turn("assistant", weight=value))

    def test_the_answers_in_a_prompt(self):
        turns = as_context(read_turns([turn("user"), turn("assistant")], "prompt"))
        conversation = read_conversation([*turns, turn("assistant")], "")
        assert (conversation.answers, conversation.context) == ([2], [1])

    def test_an_empty_answer_is_none(self):
        conversation = read(turn("user"), turn("assistant", " \n"), turn("user"), turn("assistant"))
        assert (conversation.answers, conversation.empty_answers) == ([3], [1])

    def test_thoughts_alone_are_one(self):
        assert read(turn("user"), turn("assistant", "", reasoning_content="hm")).answers == [1]


SCHEMA = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"},
                                                                                   "unit": {"type": "string"}}}},
}  # fmt: skip
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}


def calls(*written, tools=None, **rest):
    return read(turn("user"), turn("assistant", None, tool_calls=list(written), **rest), tools=tools).messages[1].get(
        "tool_calls"
    )


class TestCalls:
    @pytest.mark.parametrize(
        "written",
        [
            CALL,
            {"function": CALL["function"]},
            CALL["function"],
            {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}},
            {"name": "weather", "parameters": {"city": "Rome"}},
            json.dumps(CALL),
            # As Parquet gives back what was written beside a call with other arguments.
            {**CALL, "id": None, "function": {"name": "weather", "arguments": {"city": "Rome", "a": None, "b": None}}},
        ],
    )
    def test_all_forms_are_one(self, written):
        assert calls(written) == [CALL]

    def test_the_whole_list_as_json(self):
        (_, message) = read(turn("user"), {"role": "assistant", "tool_calls": json.dumps([CALL])}).messages
        assert message == {"role": "assistant", "content": "", "tool_calls": [CALL]}

    @pytest.mark.parametrize("arguments", [{"city": "Rome"}, '{"city": "Rome"}'])
    def test_the_old_function_call(self, arguments):
        old = {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": arguments}}
        assert read(turn("user"), old).messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}

    def test_a_null_that_the_schema_knows_or_that_was_written_by_hand_stays(self):
        expected = {"city": "Rome", "unit": None}
        function = {"name": "weather", "arguments": {**expected, "a": None}}
        assert calls(function, tools=[SCHEMA])[0]["function"]["arguments"] == expected
        function = {"name": "weather", "arguments": json.dumps(expected)}
        assert calls(function)[0]["function"]["arguments"] == expected

    @pytest.mark.parametrize("arguments", ["", None, "{}"])
    def test_no_arguments(self, arguments):
        assert calls({"name": "now", "arguments": arguments})[0]["function"] == {"name": "now", "arguments": {}}

    @pytest.mark.parametrize(
        ("call", "reason"),
        [
            ({"name": "weather", "arguments": "city=Rome"}, "the arguments of weather is a string that is not JSON"),
            ({"name": "weather", "arguments": "[1]"}, r"the arguments of weather is list \[1\], expected an object"),
            ({"arguments": {}}, r"messages\[1\].tool_calls\[0\] has no function's name \(found arguments\)"),
            (7, r"messages\[1\].tool_calls\[0\] is int 7, expected an object"),
        ],
    )
    def test_what_is_none_is_named(self, call, reason):
        with pytest.raises(RowFault, match=reason):
            calls(call)


class TestTools:
    @pytest.mark.parametrize(
        "written", [[SCHEMA], json.dumps([SCHEMA]), [json.dumps(SCHEMA)], [SCHEMA["function"]],
                    [{"type": "function", **SCHEMA["function"]}]]
    )  # fmt: skip
    def test_all_forms_are_one(self, written):
        assert read(turn("user"), tools=written).tools == [SCHEMA]

    def test_arrows_nulls_are_taken_out(self):
        properties = {"city": {"type": "string", "enum": None}, "a": None}
        given = {**SCHEMA["function"], "parameters": {"type": "object", "properties": properties, "required": None}}
        (tool,) = read(turn("user"), tools=[given]).tools
        assert tool["function"]["parameters"] == {"type": "object", "properties": {"city": {"type": "string"}}}

    @pytest.mark.parametrize("nothing", [None, [], "", "[]"])
    def test_none(self, nothing):
        assert read(turn("user"), tools=nothing).tools is None

    def test_what_is_none_is_named(self):
        with pytest.raises(RowFault, match=r"tools\[0\] has no 'name' \(found description\)"):
            read(turn("user"), tools=[{"description": "x"}])
