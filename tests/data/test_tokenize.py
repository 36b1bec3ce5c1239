"""From files to examples: what is kept, cut, dropped and counted, and what the user is told of it."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import replace

import pytest
from tokenizers_for_tests import CHATML, LLAMA_2, REWRITING, WITHOUT_END, byte_level, metaspace, trained_texts

from qlora_tool.config import DataConfig
from qlora_tool.data import encoding
from qlora_tool.data.preview import PreviewCounts
from qlora_tool.data.tokenize import build_dataset, build_evaluation_sets
from qlora_tool.errors import UserError


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def asked(question, answer):
    return {"prompt": question, "completion": answer}


def dataset(source, tokenizer=None, **data):
    return build_dataset(source, DataConfig(**data), tokenizer or byte_level(CHATML))


def failure(source, tokenizer=None, **data) -> list[str]:
    with pytest.raises(UserError) as raised:
        dataset(source, tokenizer, **data)
    return raised.value.lines


def test_examples_and_their_report(tmp_path):
    tokenizer = byte_level(CHATML)
    source = write(tmp_path / "rows.jsonl", asked("hello?", "good day"), asked("how many?", ""), asked("boats?", "12"))
    made = dataset(source, tokenizer)
    assert [trained_texts(tokenizer, example.input_ids, example.labels) for example in made.examples] == [
        ["good day<|im_end|>\n"],
        ["12<|im_end|>\n"],
    ]
    assert [example.where for example in made.examples] == [f"{source}, line 1", f"{source}, line 3"]
    report = made.report
    assert (report.rows, report.kept, report.examples, report.dropped_no_answer) == (3, 2, 2, 1)
    assert made.lengths == [len(example.input_ids) for example in made.examples]
    assert (report.tokens, report.longest) == (sum(made.lengths), max(made.lengths))
    assert report.trained_tokens == len(tokenizer("good day<|im_end|>\n")["input_ids"]) + len(
        tokenizer("12<|im_end|>\n")["input_ids"]
    )
    with open(source, "rb") as stream:
        assert report.files == {source: hashlib.sha256(stream.read()).hexdigest()}
    assert report.lines() == [
        f"{source}: 3 rows (prompt_completion), 2 kept; {report.tokens} tokens, {report.trained_tokens} of them "
        f"trained; the longest has {report.longest}",
        "chat template: the model's; trained: the answers",
        "1 row dropped: without an answer",
    ]


def test_train_on_all_trains_every_token_but_the_first(tmp_path):
    made = dataset(write(tmp_path / "rows.jsonl", asked("hello?", "good day")), train_on="all")
    (example,) = made.examples
    assert example.labels == example.input_ids
    assert made.report.trained_tokens == len(example.input_ids) - 1


class TestLimit:
    """One row of `prompt` tokens before its answer, cut at various lengths."""

    @pytest.fixture
    def row(self, tmp_path):
        source = write(tmp_path / "rows.jsonl", asked("hello?", "good day to you"), asked("a " * 200, "no"))
        whole = dataset(source).examples[0]
        prompt = next(place for place, label in enumerate(whole.labels) if label != -100)
        return source, whole, prompt

    def test_a_cut_row_keeps_its_beginning(self, row):
        source, whole, prompt = row
        made = dataset(source, max_length=prompt + 2)
        (example,) = made.examples
        assert example.input_ids == whole.input_ids[: prompt + 2]
        assert example.labels == whole.labels[: prompt + 2]
        assert example.trained_tokens == made.report.trained_tokens == 2
        assert (made.report.kept, made.report.truncated, made.report.dropped_truncated) == (1, 1, 1)
        assert made.report.warnings() == [
            f"1 row dropped: data.max_length {prompt + 2} leaves nothing of the answer",
            f"1 row cut at data.max_length {prompt + 2}",
        ]

    def test_a_row_that_just_fits_is_not_cut(self, row):
        source, whole, _ = row
        made = dataset(source, max_length=len(whole.input_ids))
        assert made.examples == [whole]
        assert made.report.truncated == 0

    def test_where_nothing_of_any_answer_is_left_it_is_said_why(self, row):
        source, _, prompt = row
        (line,) = failure(source, max_length=prompt)
        assert line.startswith(f"data.train: nothing to learn from: {source}: 2 rows (prompt_completion), 0 kept;")
        assert f"; 2 rows dropped: data.max_length {prompt} leaves nothing of the answer; each row needs" in line


def test_only_rows_without_an_answer(tmp_path):
    (line,) = failure(write(tmp_path / "rows.jsonl", asked("hello?", " "), asked("you?", None)))
    assert line.startswith("data.train: nothing to learn from:")
    assert "2 rows dropped: without an answer; each row needs an answer" in line


def test_rows_that_the_template_refuses_are_named_together(tmp_path):
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    bad = {"messages": [{"role": "system", "content": "s"}, *good["messages"]]}
    source = write(tmp_path / "rows.jsonl", good, *[bad] * 7)
    lines = failure(source, metaspace(LLAMA_2))
    reason = "the chat template refuses this conversation: Conversation roles must alternate user/assistant"
    assert all(line.startswith(f"{source}, line {n}: {reason}") for n, line in zip(range(2, 7), lines, strict=False))
    assert lines[5:] == ["and 2 more faulty rows"]


def test_with_a_template_that_rewrites_turns_each_answer_becomes_an_example(tmp_path):
    turns = [{"role": role, "content": "x"} for role in ["user", "assistant"] * 2]
    source = write(tmp_path / "rows.jsonl", {"messages": turns[:2]}, {"messages": turns})
    made = dataset(source, byte_level(REWRITING))
    assert [example.where for example in made.examples] == [
        f"{source}, line 1",
        f"{source}, line 2, answer 1",
        f"{source}, line 2, answer 2",
    ]
    assert (made.report.kept, made.report.answers) == (2, 3)
    (line,) = made.report.warnings()
    assert line.startswith("1 row became 2 examples, one an answer: the chat template writes earlier turns otherwise")
    together = dataset(source, byte_level(REWRITING), train_on="all")
    assert [example.where for example in together.examples] == [f"{source}, line 1", f"{source}, line 2"]


def test_ends_that_the_template_lacks_are_reported(tmp_path):
    made = dataset(write(tmp_path / "rows.jsonl", asked("a?", "b"), asked("c?", "d")), byte_level(WITHOUT_END))
    assert made.report.ends_added == 2
    assert made.report.warnings() == [
        "the chat template ends answers with no special token: an end-of-text token was put after 2 answers"
    ]


def test_the_template_used_is_reported_and_stays_with_the_tokenizer(tmp_path):
    source = write(tmp_path / "rows.jsonl", asked("a?", "b"))
    tokenizer = byte_level()
    report = dataset(source, tokenizer).report
    assert report.template == "plain"
    assert "chat template: a plain one, as the tokenizer has none; trained: the answers" in report.lines()
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "### User:\nx"
    path = tmp_path / "mine.jinja"
    path.write_text(WITHOUT_END)
    assert dataset(source, tokenizer, chat_template=str(path)).report.template == str(path)


class TestText:
    def document(self, tmp_path, text="Question: how many boats are there? Answer: 12 boats.\n" * 20):
        path = tmp_path / "book.txt"
        path.write_text(text)
        return str(path), text

    @pytest.mark.parametrize("make", [byte_level, metaspace])
    @pytest.mark.parametrize("max_length", [7, 64, 2048])
    def test_nothing_of_a_document_is_lost(self, tmp_path, make, max_length):
        source, text = self.document(tmp_path)
        tokenizer = make()
        made = dataset(source, tokenizer, max_length=max_length)
        ids = [token for example in made.examples for token in example.input_ids]
        assert ids == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]  # metaspace's begins with one <s>
        assert all(example.labels == example.input_ids for example in made.examples)
        assert max(made.lengths) <= max_length
        assert len(made.examples) == -(-len(ids) // max_length)
        assert (made.report.train_on, made.report.template, made.report.rows, made.report.kept) == ("all", None, 1, 1)
        # Every token counts but the first of each example.
        assert made.report.trained_tokens == len(ids) - len(made.examples)

    def test_every_row_of_a_table_is_a_document(self, tmp_path):
        tokenizer = byte_level()
        source = write(tmp_path / "rows.jsonl", {"text": "hello"}, {"text": "  "}, {"text": "good day"})
        made = dataset(source, tokenizer)
        assert [tokenizer.decode(example.input_ids) for example in made.examples] == [
            "hello<|im_end|>",
            "good day<|im_end|>",
        ]
        assert made.report.lines()[1:] == ["1 row dropped: without text"]

    def test_the_last_token_is_never_alone_in_a_row(self, tmp_path):
        tokenizer = byte_level()
        source, text = self.document(tmp_path, "yes " * 9)
        length = len(tokenizer(text)["input_ids"]) + 1
        made = dataset(source, tokenizer, max_length=length - 1)
        assert made.lengths == [length - 2, 2]

    def test_the_token_that_a_text_brings_along_is_not_doubled(self, tmp_path):
        tokenizer = metaspace()
        source, _ = self.document(tmp_path, "<s>hello</s>")
        (example,) = dataset(source, tokenizer).examples
        assert tokenizer.decode(example.input_ids) == "<s>hello</s>"

    def test_completion_asked_for_by_hand_is_an_error(self, tmp_path):
        source, _ = self.document(tmp_path)
        (line,) = failure(source, byte_level(), train_on="completion")
        assert line.startswith(f"data.train_on: completion cannot go with data.train {source}, which is text")
        # As the default it is not, nor for text that is only evaluated.
        assert dataset(source, byte_level()).report.train_on == "all"
        rows = write(tmp_path / "rows.jsonl", asked("a?", "b"))
        data = DataConfig(train=rows, eval=source, train_on="completion")
        tokenizer = byte_level(CHATML)
        _, sets = build_evaluation_sets(data, tokenizer, build_dataset(rows, data, tokenizer))
        assert sets["eval"].report.train_on == "all"

    def test_without_an_end_of_text_token_it_cannot_be_trained(self, tmp_path):
        source, _ = self.document(tmp_path)
        tokenizer = byte_level()
        tokenizer.eos_token = None
        assert "text needs an end-of-text token" in failure(source, tokenizer)[0]


class TestEvaluation:
    @pytest.fixture
    def source(self, tmp_path):
        return write(
            tmp_path / "rows.jsonl", *(asked(f"how much is {n % 90} + 1?", str(n % 90 + 1)) for n in range(100))
        )

    def split(self, source, **data):
        config = DataConfig(train=source, **data)
        tokenizer = byte_level(CHATML)
        return build_evaluation_sets(config, tokenizer, build_dataset(source, config, tokenizer))

    def test_none(self, source):
        train, sets = self.split(source)
        assert len(train.examples) == 100
        assert sets == {}

    def test_a_fraction_is_taken_off_the_training_set(self, source):
        train, sets = self.split(source, eval=0.2)
        evaluation = sets["eval"]
        together = [*train.examples, *evaluation.examples]
        assert len(together) == 100
        assert len({example.where for example in together}) == 100
        assert 20 <= len(evaluation.examples) <= 21  # one more where the last of them has an equal
        # Rows 90 to 99 repeat rows 0 to 9: none of them is in both.
        assert not {tuple(e.input_ids) for e in train.examples} & {tuple(e.input_ids) for e in evaluation.examples}
        for made in (train, evaluation):
            assert made.report.tokens == sum(made.lengths)
            assert made.report.examples == len(made.examples)
        assert train.report.split_off == len(evaluation.examples)
        assert f"{len(evaluation.examples)} of these split off for evaluation" in train.report.lines()[0]
        assert evaluation.report.source == f"{source} (20% of it)"

    def test_of_one_the_noun_is_in_the_singular(self, source, tmp_path):
        """In what is said of a data set, and of what was split off it."""
        train, sets = self.split(source, eval=0.005)
        evaluation = sets["eval"]
        assert len(evaluation.examples) == 1 and evaluation.report.source.endswith(" (0.5% of it)")
        rows = dict(PreviewCounts.of(train).lines())["rows"]
        assert rows.endswith(", 1 example of them split off for evaluation")
        assert evaluation.report.lines()[0].startswith(f"{source} (0.5% of it): 1 row ")
        one = write(tmp_path / "one.jsonl", {"prompt": "a b", "completion": "c d"})
        report = replace(train.report, parts=[(self.split(one, eval=None)[0].report, 1)])
        assert ": 1 row out of 1 (" in report.shares()[0]

    def test_a_fraction_takes_the_same_examples_in_any_order(self, source, tmp_path):
        with open(source) as stream:
            rows = [json.loads(line) for line in stream]
        reversed_source = write(tmp_path / "reversed.jsonl", *reversed(rows))
        chosen = [
            {tuple(example.input_ids) for example in self.split(each, eval=0.1, shuffle=shuffle)[1]["eval"].examples}
            for each, shuffle in ((source, True), (source, False), (reversed_source, True))
        ]
        assert chosen[0] == chosen[1] == chosen[2]

    @pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5])
    def test_a_fraction_takes_conversations_whole(self, tmp_path, fraction):
        """An answer that is evaluated is not in the prompt of one that is trained."""
        rows = [{"messages": [{"role": role, "content": f"{number}"} for role in ["user", "assistant"] * 3]}
                for number in range(20)]  # fmt: skip
        train, sets = build_evaluation_sets(
            data := DataConfig(eval=fraction),
            tokenizer := byte_level(REWRITING),
            build_dataset(write(tmp_path / "rows.jsonl", *rows), data, tokenizer),
        )
        sides = [{e.where.partition(", answer")[0] for e in made.examples} for made in (train, sets["eval"])]
        assert not sides[0] & sides[1]
        assert sum(map(len, sides)) == 20
        assert train.report.answers + sets["eval"].report.answers == 60

    def test_a_fraction_leaves_something_to_train_on(self, tmp_path):
        source = write(tmp_path / "rows.jsonl", asked("a?", "b"))
        with pytest.raises(UserError, match=r"data.eval: a fraction of 0.5 takes the one example of"):
            self.split(source, eval=0.5)

    def test_sets_by_name(self, source, tmp_path):
        other = write(tmp_path / "other.jsonl", {"instruction": "a", "output": "b"})
        train, sets = self.split(source, eval={"same": source, "other": other})
        assert len(train.examples) == 100
        assert {name: (made.report.rows, made.report.format) for name, made in sets.items()} == {
            "same": (100, "prompt_completion"),
            "other": (1, "alpaca"),
        }

    def test_a_set_with_nothing_in_it_is_named(self, source, tmp_path):
        other = write(tmp_path / "other.jsonl", {"instruction": "a", "output": ""})
        with pytest.raises(UserError, match=r"^data.eval.other: nothing to learn from"):
            self.split(source, eval={"other": other})
        with pytest.raises(UserError, match=r"^data.eval: nothing to learn from"):
            self.split(source, eval=other)


@pytest.mark.parametrize("train_on", ["completion", "all"])
@pytest.mark.parametrize("make, template", [(byte_level, CHATML), (metaspace, LLAMA_2), (byte_level, REWRITING)])
def test_what_lies_far_behind_max_length_need_not_be_tokenized(tmp_path, monkeypatch, make, template, train_on):
    """The same examples, labels and counts come of the beginnings of long rows: of words, of one word without an end,
    of texts that tokens are few of; answers before, at and behind max_length."""
    draw, tokenizer = random.Random(3), make(template)
    words = ["hello ", "a", "\u00e9", "boats and ", "\n\n", "<|im_end|>", " 12"]
    rows = []
    for _ in range(60):
        word = draw.choice(words)
        text = [draw.choice([word, draw.choice(words)]) for _ in range(draw.choice([1, 30, 300, 900]))]
        cut = sorted(draw.randrange(len(text) + 1) for _ in range(3))
        parts = ["".join(text[begin:end]) or "no" for begin, end in zip([0, *cut], [*cut, len(text)], strict=True)]
        roles = ["user", "assistant"] * 2
        rows.append({"messages": [{"role": role, "content": part} for role, part in zip(roles, parts, strict=True)]})
    source = write(tmp_path / "rows.jsonl", *rows)
    whole = dataset(source, tokenizer, max_length=40, train_on=train_on)
    longest = []
    monkeypatch.setattr(encoding, "SURELY_TOKENIZED", 100)
    monkeypatch.setattr(encoding, "CHARACTERS_A_TOKEN", 6)
    label = encoding.label_answers
    monkeypatch.setattr(encoding, "label_answers", lambda *given: longest.append(len(given[1].text)) or label(*given))
    beginnings = dataset(source, tokenizer, max_length=40, train_on=train_on)
    assert longest.count(240) > 20
    assert list(beginnings.examples) == list(whole.examples)
    assert beginnings.report == whole.report
