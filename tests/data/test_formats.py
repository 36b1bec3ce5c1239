"""What the columns of a row are read as."""

from __future__ import annotations

import json

import pytest

from qlora_tool.data.columns import find_layout
from qlora_tool.data.formats import FORMATS
from qlora_tool.data.layout import Layout, read_conversations, read_documents
from qlora_tool.data.sources import Row
from qlora_tool.errors import UserError


def rows(*fields) -> list[Row]:
    return [Row(each, f"file.jsonl, line {number}") for number, each in enumerate(fields, start=1)]


def turns(fields, wanted="auto"):
    given = rows(fields)
    (conversation,) = read_conversations(given, find_layout(given, wanted))
    return [(turn["role"], turn["content"]) for turn in conversation.messages]


def faults(*fields, form=None) -> list[str]:
    given = rows(*fields)
    with pytest.raises(UserError) as raised:
        read_conversations(given, Layout(form) if form else find_layout(given))
    return raised.value.lines


ASKED = [("user", "2 + 2?"), ("assistant", "4")]


@pytest.mark.parametrize(
    ("fields", "form", "expected"),
    [
        (
            {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]},
            "messages",
            ASKED,
        ),
        ({"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}, "sharegpt", ASKED),
        (
            {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "user", "value": "x"}]},
            "sharegpt",
            [("system", "Be brief."), ("user", "x")],
        ),
        ({"conversations": [{"role": "user", "content": "2 + 2?"}]}, "sharegpt", ASKED[:1]),
        ({"instruction": "2 + 2?", "input": "", "output": "4"}, "alpaca", ASKED),
        ({"instruction": "2 + 2?", "output": "4", "text": "Below is …"}, "alpaca", ASKED),
        ({"instruction": "Add.", "input": "2, 2", "output": "4"}, "alpaca", [("user", "Add.\n\n2, 2"), ASKED[1]]),
        ({"instruction": "Add.", "context": "2, 2", "response": "4"}, "dolly", [("user", "Add.\n\n2, 2"), ASKED[1]]),
        ({"instruction": "2 + 2?", "context": None, "response": "4", "category": "qa"}, "dolly", ASKED),
        ({"prompt": "2 + 2?", "completion": "4"}, "prompt_completion", ASKED),
        (
            {
                "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "2 + 2?"}],
                "completion": [{"role": "assistant", "content": "4"}],
            },
            "prompt_completion",
            [("system", "s"), *ASKED],
        ),
        (
            {"system": "Be brief.", "prompt": "2 + 2?", "completion": "4"},
            "prompt_completion",
            [("system", "Be brief."), *ASKED],
        ),
    ],
)
def test_formats_are_told_by_their_columns(fields, form, expected):
    assert find_layout(rows(fields)).format == form
    assert turns(fields) == turns(fields, form) == expected


def test_text_is_no_conversation():
    given = rows({"text": "Once upon a time"}, {"text": None})
    assert find_layout(given).format == "text"
    assert read_documents(given, find_layout(given)) == ["Once upon a time", ""]


def test_lists_may_be_written_as_json_where_cells_are_strings():
    messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    assert turns({"messages": json.dumps(messages)}) == ASKED


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]
    assert turns({"messages": [{"role": "user", "content": parts}]}) == ASKED[:1]


def test_what_templates_may_read_besides_is_kept():
    call = {"function": {"name": "add", "arguments": {"a": 2}}}
    fields = {
        "messages": [
            {"role": "user", "content": "2 + 2?", "name": None},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "4", "name": "add"},
        ],
        "tools": [{"name": "add"}],
    }
    (conversation,) = read_conversations(rows(fields), Layout("messages"))
    assert conversation.tools == [{"type": "function", "function": {"name": "add"}}]
    assert conversation.has_answer
    assert conversation.messages == [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", **call}]},
        {"role": "tool", "content": "4", "name": "add"},
    ]


@pytest.mark.parametrize("answer", ["", "  \n", None])
def test_a_row_without_an_answer_says_so(answer):
    (conversation,) = read_conversations(rows({"prompt": "2 + 2?", "completion": answer}), Layout("prompt_completion"))
    assert not conversation.has_answer


def test_columns_of_no_format_are_listed_with_what_every_format_needs():
    with pytest.raises(UserError) as raised:
        find_layout(rows({"instruction": "a", "ouptut": "b"}, {"id": 1}))
    (line,) = raised.value.lines
    assert line.startswith(
        "file.jsonl, line 1: the columns (instruction, ouptut, id) are those of no format; needed are "
    )
    assert all(f"{name}: {form.form}" in line for name, form in FORMATS.items())
    assert line.endswith("; 'ouptut' is not read; did you mean 'output'?")


def test_a_format_asked_for_must_fit():
    with pytest.raises(UserError) as raised:
        find_layout(rows({"prompt": "a", "completion": "b"}), "dolly")
    assert raised.value.lines == [
        "file.jsonl, line 1: the columns (prompt, completion) are not those of the format dolly; needed are dolly: "
        "instruction and response, context where there is one"
    ]


def test_answers_may_be_missing_where_they_are_not_needed():
    assert find_layout(rows({"prompt": "a"}), need_answers=False).format == "prompt_completion"
    assert find_layout(rows({"instruction": "a", "context": "b"}), need_answers=False).format == "alpaca"
    assert find_layout(rows({"instruction": "a", "response": "b"}), need_answers=False).format == "dolly"
    with pytest.raises(UserError):
        find_layout(rows({"prompt": "a"}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": "hello"}, "'messages' is a string that is not JSON (Expecting value), expected a list"),
        ({"messages": {"role": "user"}}, '\'messages\' is dict {"role": "user"}, expected a list'),
        ({"messages": ["hi"]}, 'messages[0] is str "hi", expected an object such as {role, content} or {from, value}'),
        ({"messages": [{"content": "x"}]}, "messages[0] has no 'role' (found content)"),
        (
            {"messages": [{"role": "user", "contents": "x"}]},
            "messages[0] has no 'content' (found role, contents); 'contents' is not read; did you mean 'content'?",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "asistant", "content": "y"}]},
            "messages[1]: the role is 'asistant'; did you mean 'assistant'?",
        ),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0]: the content is int 5, expected a string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            'messages[0] holds dict {"type": "image", "url": "x"}, expected text alone',
        ),
        ({"prompt": "x", "completion": 4}, "'completion' is int 4, expected a string"),
        ({"text": ["x"]}, "'text' is list [\"x\"], expected a string"),
    ],
)
def test_a_faulty_row_is_named(fields, message):
    assert faults(fields) == [f"file.jsonl, line 1: {message}"]


def test_a_row_with_other_columns_than_the_rest_is_named():
    good = {"prompt": "a", "completion": "b"}
    assert faults(good, {"prompt": "a", "completions": "b"}, good, {}) == [
        "file.jsonl, line 2: no column 'completion', which the format prompt_completion needs "
        "(found prompt, completions); 'completions' is not read; did you mean 'completion'?",
        "file.jsonl, line 4: no column 'prompt', which the format prompt_completion needs (found none at all)",
    ]
