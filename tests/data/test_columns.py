"""Which column is the question and which the answer, whatever they are called; and what is refused as unclear."""

from __future__ import annotations

import pytest

from qlora_tool.data.columns import find_layout
from qlora_tool.data.layout import read_conversations
from qlora_tool.data.sources import Row
from qlora_tool.errors import UserError


def rows(*fields) -> list[Row]:
    return [Row(each, f"FILE, line {number}") for number, each in enumerate(fields, start=1)]


def turns(fields, wanted="auto", **columns):
    given = rows(fields)
    (conversation,) = read_conversations(given, find_layout(given, wanted, columns))
    return [(turn["role"], turn["content"]) for turn in conversation.messages]


def refusal(*fields, wanted="auto", **columns) -> str:
    with pytest.raises(UserError) as raised:
        find_layout(rows(*fields), wanted, columns)
    (line,) = raised.value.lines
    return line


ASKED = [("user", "2 + 2?"), ("assistant", "4")]
PAIRS = [
    ("question", "answer"), ("prompt", "response"), ("prompt", "completion"), ("input", "output"),
    ("instruction", "response"), ("instruction", "output"), ("user", "assistant"), ("query", "reply"),
    ("human", "assistant"), ("query", "response"), ("problem", "solution"), ("question", "output"), ("q", "a"),
    ("input", "target"), ("prompt", "answer"), ("Frage", "Antwort"), ("pregunta", "respuesta"), ("问题", "答案"),
]  # fmt: skip


@pytest.mark.parametrize(("ask", "answer"), PAIRS)
def test_usual_names_in_any_case(ask, answer):
    for write in (str, str.upper, str.title, lambda name: f" {name} ", lambda name: f"{name}:"):
        assert turns({"id": "17", write(answer): "4", write(ask): "2 + 2?"}) == ASKED


@pytest.mark.parametrize("ours", ["completion", "output", "response"])
def test_the_names_of_the_formats_in_other_cases(ours):
    assert turns({"Instruction": "Add.", "Input": "2, 2", "Output": "4"}) == [("user", "Add.\n\n2, 2"), ASKED[1]]
    assert turns({"Instruction": "Add.", "Context": "2, 2", "Response": "4"}) == [("user", "Add.\n\n2, 2"), ASKED[1]]
    assert turns({"Messages": [{"role": "user", "content": "2 + 2?"}]}) == ASKED[:1]
    assert turns({"conversation": [{"from": "human", "value": "2 + 2?"}]}) == ASKED[:1]
    assert find_layout(rows({"Text": "Once"})).document(rows({"Text": "Once"})[0]) == "Once"


def test_what_goes_with_a_question():
    fields = {"question": "Add.", "context": "2, 2", "answer": "4", "System Prompt": "Be brief."}
    assert turns(fields) == [("system", "Be brief."), ("user", "Add.\n\n2, 2"), ASKED[1]]
    assert turns({"prompt": "2 + 2?", "completion": "4", "system_prompt": "s"}) == [("system", "s"), *ASKED]
    assert turns({"question": "2 + 2?", "context": None, "answer": "4"}) == ASKED


@pytest.mark.parametrize("wanted", ["auto", "prompt_completion"])
def test_columns_by_any_name(wanted):
    fields = {"Vopros": "2 + 2?", "Otvet": "4", "Rol": "Be brief.", "id": 5}
    assert turns(fields, wanted, prompt="Vopros", completion="Otvet", system="Rol") == [("system", "Be brief."), *ASKED]
    assert turns(fields | {"prompt": "no", "completion": "no"}, wanted, prompt="vopros", completion="OTVET") == ASKED
    assert turns({"question": "2 + 2?", "answer": "no", "better": "4"}, wanted, completion="better") == ASKED
    assert turns({"first": "Add.", "second": "2, 2", "third": "4"}, instruction="first", input="second",
                 output="third") == [("user", "Add.\n\n2, 2"), ASKED[1]]  # fmt: skip
    assert turns({"talk": [{"role": "user", "content": "2 + 2?"}]}, messages="talk") == ASKED[:1]


def test_a_column_that_is_not_there():
    fields = {"question": "a", "answer": "b"}
    assert refusal(fields, prompt="qestion") == (
        "data.columns.prompt: FILE, line 1 has no column 'qestion'; did you mean 'question'?"
    )
    assert refusal(fields, completion="xyz") == (
        "data.columns.completion: FILE, line 1 has no column 'xyz'; found are question, answer"
    )


def test_a_row_without_it_is_named_by_the_files_own_name():
    given = rows({"q1": "a", "a1": "b"}, {"q1": "a"}, {"q1": "a", "a1": 4})
    layout = find_layout(given, columns={"prompt": "q1", "completion": "a1"})
    with pytest.raises(UserError) as raised:
        read_conversations(given, layout)
    assert raised.value.lines == [
        "FILE, line 2: no column 'a1', which the format prompt_completion needs (found q1)",
        "FILE, line 3: 'a1' is int 4, expected a string",
    ]


@pytest.mark.parametrize(
    ("fields", "reason", "columns"),
    [
        ({"text": "x", "answer": "y"}, "'text' may be the question or a document",
         "{prompt: text, completion: answer}"),
        ({"text": "x", "Question": "y"}, "'text' may be the answer or a document",
         "{prompt: Question, completion: text}"),
        ({"question": "x", "answer": "y", "response": "z"}, "'answer' and 'response' may each be the answer",
         "{prompt: question, completion: answer}"),
        ({"question": "x", "query": "y", "answer": "z"}, "'question' and 'query' may each be the question",
         "{prompt: question, completion: answer}"),
        ({"Answer": "x", "answer": "y", "question": "z"}, "'Answer' and 'answer' may each be the answer",
         "{prompt: question, completion: Answer}"),
    ],
)  # fmt: skip
def test_what_can_be_read_in_two_ways_is_refused_with_the_line_to_set(fields, reason, columns):
    line = refusal(fields)
    assert reason in line and f"set data.columns: {columns}" in line
    given = dict(part.split(": ") for part in columns.strip("{}").split(", "))
    assert turns(fields, **given) == [("user", fields[given["prompt"]]), ("assistant", fields[given["completion"]])]


def test_text_beside_what_is_no_answer_is_a_document():
    assert find_layout(rows({"text": "x", "url": "y", "id": 1, "user": "u17"})).format == "text"
    assert find_layout(rows({"text": "x", "answer": "y"}), "text").format == "text"
    assert find_layout(rows({"story": "x"}), columns={"text": "story"}).format == "text"


TURNS = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]


@pytest.mark.parametrize(
    ("fields", "columns"),
    [
        ({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, "{completion: chosen}"),
        ({"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": TURNS[1:]}, "{completion: chosen}"),
        ({"question": "2 + 2?", "Chosen": "4", "Rejected": "5"}, "{completion: Chosen}"),
        ({"prompt": "2 + 2?", "chosen": TURNS, "rejected": TURNS}, "{messages: chosen}"),
        ({"chosen": TURNS, "rejected": TURNS, "score": 5}, "{messages: chosen}"),
    ],
)
def test_preferences_are_refused_with_the_line_that_trains_the_chosen(fields, columns):
    line = refusal(fields)
    assert line.startswith("FILE, line 1: preference rows (") and line.endswith(f"set data.columns: {columns}")
    ours, theirs = columns.strip("{}").split(": ")
    assert turns(fields, **{ours: theirs}) == ASKED


def test_a_completion_that_has_the_prompt_in_it():
    given = rows({"prompt": "2 + 2?", "chosen": TURNS})
    with pytest.raises(UserError, match=r"line 1: 'chosen' begins with a user turn, .*data.columns: \{messages: …\}"):
        read_conversations(given, find_layout(given, columns={"completion": "chosen"}))


def test_columns_left_unused_are_known():
    def unused(fields, **columns):
        return find_layout(rows(fields), columns=columns).unused(fields)

    assert unused({"id": 1, "question": "a", "answer": "b", "source": "c"}) == ["id", "source"]
    assert unused({"instruction": "a", "input": "b", "output": "c", "text": "d"}) == ["text"]
    assert unused({"messages": [], "tools": [], "system": "a", "n": 1}) == ["n"]
    assert unused({"a1": "x", "b1": "y", "prompt": "z"}, prompt="a1", completion="b1") == ["prompt"]
    assert unused({"text": "x", "system": "y"}) == ["system"]
