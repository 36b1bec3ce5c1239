"""Which tokens are answers: against hand-worked text, against transformers' own marks, for templates of many kinds."""

from __future__ import annotations

import itertools
import json

import pytest
from tokenizers_for_tests import (
    CHATML,
    CHATML_WITH_MARKS,
    LLAMA_2,
    REWRITING,
    STRIPPING,
    WITHOUT_END,
    byte_level,
    metaspace,
    trained_texts,
)

from qlora_tool.data.chat import ConversationRenderer
from qlora_tool.data.faults import RowFault
from qlora_tool.data.labels import label_answers, token_ids
from qlora_tool.data.messages import Conversation
from qlora_tool.data.template import SpecialTokens, install_chat_template, render
from qlora_tool.errors import UserError

LONG = 10_000


def conversation(*contents, system=None, first="user") -> Conversation:
    """Turns of the user and the assistant by turns."""
    roles = itertools.cycle(["user", "assistant"] if first == "user" else ["assistant", "user"])
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return Conversation([{"role": "system", "content": system}, *messages] if system else messages, "file, line 1")


def render_conversation(tokenizer, given, **options):
    (row,) = render_rows(tokenizer, given, **options)
    return row


def render_rows(tokenizer, given, **options):
    return ConversationRenderer.of(tokenizer, **options).rows(given).rows


def trained_parts(row) -> list[str]:
    return [row.text[begin:end] for begin, end in row.answers]


def tokenized(tokenizer, given, max_length=LONG, **options):
    rendered = render_conversation(tokenizer, given, **options)
    return label_answers(tokenizer, rendered, SpecialTokens.of(tokenizer), max_length)


def answers(tokenizer, given) -> list[str]:
    return trained_texts(tokenizer, *tokenized(tokenizer, given))


def test_the_end_of_turn_and_what_follows_it_are_trained_in_every_answer():
    tokenizer = byte_level(CHATML)
    given = conversation("hello", "good day", "capital of France?", "Paris.", "thanks")
    assert answers(tokenizer, given) == ["good day<|im_end|>\n", "Paris.<|im_end|>\n"]
    given = conversation("hello", "good day", "capital of France?", "Paris.")
    assert answers(tokenizer, given) == ["good day<|im_end|>\n", "Paris.<|im_end|>\n"]


def test_the_answers_are_those_that_transformers_marks():
    tokenizer, marking = byte_level(CHATML), byte_level(CHATML_WITH_MARKS)
    given = conversation("how many boats?", "There are 12.", "and trips?", "4 a day", system="Answer.")
    expected = marking.apply_chat_template(given.messages, return_assistant_tokens_mask=True, return_dict=True)
    ids, labels = tokenized(tokenizer, given)
    assert ids == expected["input_ids"]
    assert labels == [
        token if mask else -100 for token, mask in zip(expected["input_ids"], expected["assistant_masks"], strict=True)
    ]


def test_a_trained_end_of_turn_is_not_taken_for_padding():
    tokenizer = byte_level(CHATML)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    ids, labels = tokenized(tokenizer, conversation("hello", "good day"))
    ends = [label for token, label in zip(ids, labels, strict=True) if token == tokenizer.eos_token_id]
    # The system turn and the question end with it too, untrained.
    assert ends == [-100, -100, tokenizer.eos_token_id]


def test_llama_2s_answers_and_its_beginnings_of_text():
    tokenizer = metaspace(LLAMA_2)
    ids, labels = tokenized(tokenizer, conversation("hello", " good day ", "capital?", "Paris."))
    assert trained_texts(tokenizer, ids, labels) == ["good day </s>", "Paris. </s>"]
    # One beginning of text for each exchange, as the template writes them: the tokenizer adds none.
    assert token_ids(tokenizer, "hello", add_special_tokens=True)[0] == tokenizer.bos_token_id
    assert [place for place, token in enumerate(ids) if token == tokenizer.bos_token_id] == [
        0,
        ids.index(tokenizer.eos_token_id) + 1,
    ]


CONTENTS = ["yes", " yes", "\nyes", "\n\n yes\n", "yes \n\n", "é✓ yes", "12"]
KINDS = {
    "chatml": lambda: byte_level(CHATML),
    "stripping": lambda: byte_level(STRIPPING),
    "without_end": lambda: byte_level(WITHOUT_END),
    "llama_2": lambda: metaspace(LLAMA_2),
    "metaspace_without_end": lambda: metaspace(WITHOUT_END),
    "plain": lambda: byte_level(),
    "metaspace_plain": lambda: metaspace(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("content", CONTENTS)
def test_before_an_answer_stand_the_tokens_that_generation_sees(kind, content):
    tokenizer = KINDS[kind]()
    install_chat_template(tokenizer)
    given = conversation("is it\n\nyes?\n", content)
    ids, labels = tokenized(tokenizer, given)
    seen = tokenizer.apply_chat_template(given.messages[:1], add_generation_prompt=True, return_dict=False)
    assert ids[: len(seen)] == seen
    assert labels == [-100] * len(seen) + ids[len(seen) :]
    # Nothing is lost or doubled: prompt and answer together are the text.
    written = render(tokenizer, given.messages)
    if tokenizer.unk_token_id not in ids:  # metaspace's alphabet does not have all characters
        ends = tokenizer.eos_token if "without_end" in kind else ""
        assert tokenizer.decode(ids) == written + ends


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_long_conversation_the_answers_are_trained_and_nothing_else(kind):
    """In spite of cuts (without_end, stripping) and of beginnings that are not tokenized from the start."""
    tokenizer = KINDS[kind]()
    install_chat_template(tokenizer)
    contents = ["hello", "yes", "and?", " no", "boats?", "\n\n12 boats\n", "trips?", "4"]
    given = conversation(*contents)
    ids, labels = tokenized(tokenizer, given, multi_turn="together")
    expected = []
    for turn in range(1, len(contents), 2):
        before = tokenizer.apply_chat_template(given.messages[:turn], tokenize=False, add_generation_prompt=True)
        through = tokenizer.apply_chat_template(given.messages[: turn + 1], tokenize=False)
        expected.append(through.removeprefix(before) + (tokenizer.eos_token if "without_end" in kind else ""))

    def text(run):  # not tokenizer.decode, which strips the first space of sentencepiece's kind
        return "".join(tokenizer.convert_ids_to_tokens(run)).translate({ord("▁"): " ", ord("Ġ"): " ", ord("Ċ"): "\n"})

    runs = [list(run) for trained, run in itertools.groupby(labels, lambda label: label != -100) if trained]
    assert [text(run) for run in runs] == expected
    assert text(ids).count("boats") == 2


def test_an_answer_that_would_fuse_with_the_prompt_is_cut_from_it():
    tokenizer = byte_level(WITHOUT_END)
    given = conversation("is it?", "yes")
    whole = tokenizer.tokenize("Answer: yes")
    assert whole == ["Answer", ":", "Ġyes"]  # the border lies inside the last of these
    ids, labels = tokenized(tokenizer, given)
    assert tokenizer.convert_ids_to_tokens([label for label in labels if label != -100]) == [
        "y",
        "es",
        "Ċ",
        "<|im_end|>",
    ]
    assert tokenizer.convert_ids_to_tokens(ids)[-6:-4] == [":", "Ġ"]


def test_a_cut_puts_no_space_of_sentencepieces_before_the_answer():
    tokenizer = metaspace(WITHOUT_END)
    assert tokenizer.tokenize("yes") == ["▁yes"]
    ids, labels = tokenized(tokenizer, conversation("is it?", "yes"))
    assert tokenizer.convert_ids_to_tokens([label for label in labels if label != -100])[0] == "y"
    assert tokenizer.decode(ids) == "Question: is it?\nAnswer: yes\n</s>"


class TestEnds:
    def test_an_end_is_put_after_every_answer_that_the_template_does_not_end(self):
        rows = render_rows(byte_level(WITHOUT_END), conversation("a?", "b", "c?", "d"))
        # A row each: a server puts no end between the turns.
        assert [row.text for row in rows] == [
            "Question: a?\nAnswer: b\n<|im_end|>",
            "Question: a?\nAnswer: b\nQuestion: c?\nAnswer: d\n<|im_end|>",
        ]
        assert [trained_parts(row) for row in rows] == [["b\n<|im_end|>"], ["d\n<|im_end|>"]]
        assert [row.ends_added for row in rows] == [1, 1]

    def test_together_they_stand_between_the_turns(self):
        tokenizer, given = byte_level(WITHOUT_END), conversation("a?", "b", "c?", "d")
        row = render_conversation(tokenizer, given, multi_turn="together")
        assert row.text == "Question: a?\nAnswer: b\n<|im_end|>Question: c?\nAnswer: d\n<|im_end|>"
        assert trained_parts(row) == ["b\n<|im_end|>", "d\n<|im_end|>"]
        assert row.ends_added == 2

    @pytest.mark.parametrize("stops", [{"eos_token_id": 1}, {"eos_token_id": [4, 1]}, {}])
    def test_what_the_generation_configuration_stops_at(self, tmp_path, stops):
        """The next role's token where that is among its stops; else the end of text."""
        template = "{% for m in messages %}{{ '<s>' if m.role == 'user' else '</s>' }}{{ m.content }}{% endfor %}"
        tokenizer = byte_level(template + "{% if add_generation_prompt %}</s>{% endif %}")
        assert tokenizer.convert_ids_to_tokens([1, 4]) == ["<|endoftext|>", "<s>"]
        (tmp_path / "generation_config.json").write_text(json.dumps(stops))
        tokenizer.name_or_path = str(tmp_path)
        rows = render_rows(tokenizer, conversation("a?", "b", "c?", "d"))
        if stops.get("eos_token_id") == [4, 1]:
            assert [row.text for row in rows] == ["<s>a?</s>b<s>c?</s>d<s>"]
            assert trained_parts(rows[0]) == ["b<s>", "d<s>"]
        else:
            end = "<|endoftext|>" if stops else "<|im_end|>"
            assert [row.text for row in rows] == [f"<s>a?</s>b{end}", f"<s>a?</s>b<s>c?</s>d{end}"]

    @pytest.mark.parametrize("template", [CHATML, STRIPPING, REWRITING])
    def test_none_is_put_after_one_that_it_ends(self, template):
        assert render_conversation(byte_level(template), conversation("a?", "b")).ends_added == 0

    def test_without_an_end_of_text_token_there_is_nothing_to_put(self):
        tokenizer = byte_level(WITHOUT_END)
        tokenizer.eos_token = None
        with pytest.raises(UserError, match="no special token and the tokenizer has no end-of-text token"):
            render_conversation(tokenizer, conversation("a?", "b"))


class TestRewriting:
    def test_one_answer_at_the_end_is_trained(self):
        expected = ["<think>\n\n</think>\n\nb<|im_end|>\n"]
        assert answers(byte_level(REWRITING), conversation("a?", "b")) == expected

    @pytest.mark.parametrize("multi_turn", ["auto", "one_per_answer"])
    def test_of_several_answers_each_becomes_a_row(self, multi_turn):
        rows = render_rows(byte_level(REWRITING), conversation("a?", "b", "c?", "d"), multi_turn=multi_turn)
        first = "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n"
        assert [row.text for row in rows] == [
            f"{first}<think>\n\n</think>\n\nb<|im_end|>\n",
            f"{first}b<|im_end|>\n<|im_start|>user\nc?<|im_end|>\n<|im_start|>assistant\n"
            "<think>\n\n</think>\n\nd<|im_end|>\n",
        ]
        assert [row.where for row in rows] == ["file, line 1, answer 1", "file, line 1, answer 2"]
        assert [trained_parts(row)[0][-12:] for row in rows] == ["b<|im_end|>\n", "d<|im_end|>\n"]

    def test_together_is_refused_with_the_line_to_set(self):
        with pytest.raises(UserError, match=r"file, line 1: data.multi_turn: together .* set data.multi_turn: one_"):
            render_rows(byte_level(REWRITING), conversation("a?", "b", "c?", "d"), multi_turn="together")

    def test_one_answer_that_is_not_the_last_turn_ends_the_row(self):
        (row,) = render_rows(byte_level(REWRITING), conversation("a?", "b", "c?"))
        assert row.text.endswith("<think>\n\n</think>\n\nb<|im_end|>\n")
        assert row.where == "file, line 1"

    def test_one_row_an_answer_by_request(self):
        rows = render_rows(byte_level(CHATML), conversation("a?", "b", "c?", "d"), multi_turn="one_per_answer")
        assert [trained_parts(row) for row in rows] == [["b<|im_end|>\n"], ["d<|im_end|>\n"]]
        assert rows[1].text.startswith(rows[0].text)

    def test_a_generation_prompt_that_no_answer_begins_with_is_rejected(self):
        template = REWRITING.replace("assistant\\n' }}{% endif %}", "assistant\\n<reason>' }}{% endif %}")
        with pytest.raises(RowFault, match=r"differently from its own generation prompt \('.*<reason>'\)"):
            render_conversation(byte_level(template), conversation("a?", "b"))

    def test_none_of_it_matters_where_every_token_is_trained(self):
        tokenizer, given = byte_level(REWRITING), conversation("a?", "b", "c?", "d")
        rendered = render_conversation(tokenizer, given, every_answer=False)
        assert rendered.text == tokenizer.apply_chat_template(given.messages, tokenize=False)


class TestRefusals:
    def test_what_the_template_refuses_is_passed_on(self):
        with pytest.raises(RowFault, match="refuses this conversation: Conversation roles must alternate"):
            render_conversation(metaspace(LLAMA_2), conversation("a?", "b", system="Be brief."))

    def test_a_conversation_that_begins_with_an_answer(self):
        with pytest.raises(RowFault, match="begins with an assistant turn"):
            render_conversation(byte_level(CHATML), conversation("b", "c?", first="assistant"))

    def test_a_broken_template_is_named_by_line(self):
        tokenizer = byte_level("{{ bos_token }}\n{% for x %}")
        with pytest.raises(UserError, match="the chat template, line 2: "):
            render_conversation(tokenizer, conversation("a?", "b"))


class TestInstalledTemplate:
    def test_the_models_own_stays(self):
        tokenizer = byte_level(CHATML)
        assert install_chat_template(tokenizer) == "the model's"
        assert tokenizer.chat_template == CHATML

    def test_a_file_overrides_it(self, tmp_path):
        path = tmp_path / "short.jinja"
        path.write_text("{% for m in messages %}{{ m['content'] }}|{% endfor %}")
        tokenizer = byte_level(CHATML)
        assert install_chat_template(tokenizer, str(path)) == str(path)
        assert render(tokenizer, conversation("a", "b").messages) == "a|b|"

    def test_a_missing_file_is_answered_with_the_closest_name(self, tmp_path):
        (tmp_path / "short.jinja").write_text("")
        with pytest.raises(
            UserError, match=r"data.chat_template: .*shrot.jinja: no such file; did you mean '.*/short.jinja'"
        ):
            install_chat_template(byte_level(), str(tmp_path / "shrot.jinja"))

    def test_a_plain_one_where_there_is_none_and_it_is_still_called_so_the_second_time(self):
        tokenizer = byte_level()
        assert [install_chat_template(tokenizer) for _ in range(2)] == ["plain", "plain"]
        given = conversation("hello", "good day", "and?", "bye", system="Be brief.")
        assert render(tokenizer, given.messages) == (
            "### System:\nBe brief.\n\n### User:\nhello\n\n### Assistant:\ngood day<|im_end|>"
            "\n\n### User:\nand?\n\n### Assistant:\nbye<|im_end|>"
        )
        assert answers(tokenizer, given) == ["good day<|im_end|>", "bye<|im_end|>"]

    def test_the_plain_one_begins_as_the_tokenizer_begins_texts(self):
        tokenizer = metaspace()
        install_chat_template(tokenizer)
        ids, _ = tokenized(tokenizer, conversation("hello", "good day"))
        assert ids[0] == tokenizer("hello")["input_ids"][0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1


def test_answers_beyond_the_limit_have_no_label_and_the_others_keep_theirs():
    tokenizer = byte_level(CHATML)
    given = conversation("hello", "good day", "capital of France?", "Paris.")
    ids, labels = tokenized(tokenizer, given)
    first = next(place for place, label in enumerate(labels) if label != -100)
    cut_ids, cut_labels = tokenized(tokenizer, given, max_length=first + 2)
    assert cut_ids == ids
    assert cut_labels[: first + 2] == labels[: first + 2]
