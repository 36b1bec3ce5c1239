"""Prompts to generate from: out of a data file, or out of texts typed on the command line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_tool.data.chat import ConversationRenderer
from qlora_tool.data.columns import columns_there, find_layout
from qlora_tool.data.faults import RowFault, RowFaults
from qlora_tool.data.labels import check_characters, token_ids
from qlora_tool.data.layout import read_conversations
from qlora_tool.data.messages import Conversation
from qlora_tool.data.raw_text import prompt_ids
from qlora_tool.data.sources import read_rows
from qlora_tool.data.template import install_chat_template
from qlora_tool.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    Attributes:
        input_ids: the conversation before the answer, with the generation prompt; not truncated.
        answer: what the data says (the last assistant turn's content), None where it says nothing.
        where: the row it comes from.
        text: the question as a person would write it: the last turn before the answer.
        expected: what a model that has learnt the answer writes, special tokens left out: the answer as the chat
            template has it, perhaps with an empty block of thoughts before it. None where `answer` is.
    """

    input_ids: list[int]
    answer: str | None
    where: str
    text: str
    expected: str | None = None


def read_prompts(
    source: str,
    data_format: str,
    tokenizer: PreTrainedTokenizerBase,
    kwargs: Mapping[str, Any] | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[Prompt]:
    """The prompt of every row: the conversation up to its last assistant turn, which is the answer; all of it where
    another turn is the last.

    Args:
        source: a file, a folder or a hub id. In a .txt file each line that is not blank is a prompt.
        data_format: one of `formats.FORMATS`, or `auto`; columns with answers may be missing.
        tokenizer: see `template.install_chat_template`.
        kwargs: what its chat template is given besides (`data.chat_template_kwargs`).
        columns: its columns by what they are read as (`data.columns`), where it has them.

    Raises:
        UserError: the source is missing or broken, or the template refuses a row.
    """
    rows = list(read_rows(source))
    if Path(source).suffix.lower() == ".txt":
        lines = enumerate(rows[0].fields["text"].split("\n"), start=1)
        texts = [(line.rstrip("\r"), f"{source}, line {number}") for number, line in lines if line.strip()]
        return prompts_from_texts(texts, tokenizer, kwargs)
    layout = find_layout(rows, data_format, columns_there(rows, columns or {}), need_answers=False)
    conversations = read_conversations(rows, layout)
    if layout.format == "text":
        given = ((turns.messages[-1]["content"], turns.where) for turns in conversations)
        return prompts_from_texts(given, tokenizer, kwargs)
    install_chat_template(tokenizer)
    renderer = ConversationRenderer.of(tokenizer, kwargs=kwargs)
    prompts, faults = [], RowFaults()
    for conversation in conversations:
        try:
            prompts.append(_prompt(conversation, renderer))
        except RowFault as fault:
            faults.add(conversation.where, fault)
    faults.raise_any()
    return prompts


def prompts_from_texts(
    texts: Iterable[str | tuple[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    kwargs: Mapping[str, Any] | None = None,
) -> list[Prompt]:
    """Each text as a user turn; where the tokenizer has no chat template, as the beginning of a text to go on with.

    Args:
        texts: texts, or pairs of a text and where it comes from (else `--prompt`).
        kwargs: what the chat template is given besides (`data.chat_template_kwargs`).
    """
    prompts = []
    renderer = ConversationRenderer.of(tokenizer, kwargs=kwargs) if tokenizer.chat_template else None
    for item in texts:
        text, where = (item, "--prompt") if isinstance(item, str) else item
        if renderer is not None:
            try:
                prompts.append(_prompt(Conversation([{"role": "user", "content": text}], where), renderer))
            except RowFault as fault:
                raise UserError(f"{where}: {fault}") from fault
        else:
            prompts.append(Prompt(prompt_ids(tokenizer, text), None, where, text))
    return prompts


def _prompt(conversation: Conversation, renderer: ConversationRenderer) -> Prompt:
    messages, answer, expected = conversation.messages, None, None
    if messages and messages[-1]["role"] == "assistant":
        messages, answer = messages[:-1], messages[-1]["content"] or None
    if not messages:
        raise RowFault("nothing stands before the answer; a prompt needs a user turn at least")
    text = renderer.prompt(messages, conversation.tools)
    check_characters(text)
    if len(messages) < len(conversation.messages):
        expected = _expected(conversation, renderer)
    ids = token_ids(renderer.tokenizer, text)
    return Prompt(ids, answer, conversation.where, messages[-1]["content"], expected)


def _expected(conversation: Conversation, renderer: ConversationRenderer) -> str | None:
    last = len(conversation.messages) - 1
    if last not in conversation.answers:
        return None
    try:
        target = renderer.answer(conversation, last).target
    except RowFault:  # it can be asked, though not trained
        return None
    return str(renderer.tokenizer.decode(token_ids(renderer.tokenizer, target), skip_special_tokens=True))
