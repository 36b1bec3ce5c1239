"""Prompts to generate from: out of a data file, or out of texts typed on the command line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_tool.data.chat import ConversationRenderer
from qlora_tool.data.columns import columns_there, find_layout
from qlora_tool.data.faults import RowFault, RowFaults
from qlora_tool.data.kept import is_written
from qlora_tool.data.labels import check_characters, token_ids
from qlora_tool.data.layout import read_conversations
from qlora_tool.data.messages import Conversation
from qlora_tool.data.raw_text import prompt_ids
from qlora_tool.data.sources import read_rows
from qlora_tool.data.template import install_chat_template
from qlora_tool.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_TEMPLATE = "the model has no chat template, so a text has no turns"


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
    system: str | None = None,
) -> list[Prompt]:
    """The prompt of every row: the conversation up to its last assistant turn, which is the answer; all of it where
    another turn is the last.

    Args:
        source: a file, a folder or a hub id. In a .txt file each line that is not blank is a prompt.
        data_format: one of `formats.FORMATS`, or `auto`; columns with answers may be missing.
        tokenizer: see `template.install_chat_template`.
        kwargs: what its chat template is given besides (`data.chat_template_kwargs`).
        columns: its columns by what they are read as (`data.columns`), where it has them.
        system: a system turn before every row.

    Raises:
        UserError: the source is missing or broken, the template refuses a row, or one has a system turn of its own.
    """
    rows = list(read_rows(source))
    if Path(source).suffix.lower() == ".txt":
        lines = enumerate(rows[0].fields["text"].split("\n"), start=1)
        texts = [(line.rstrip("\r"), f"{source}, line {number}") for number, line in lines if line.strip()]
        return prompts_from_texts(texts, tokenizer, kwargs, system)
    layout = find_layout(rows, data_format, columns_there(rows, columns or {}), need_answers=False)
    conversations = read_conversations(rows, layout)
    if layout.format == "text":
        given = ((turns.messages[-1]["content"], turns.where) for turns in conversations)
        return prompts_from_texts(given, tokenizer, kwargs, system)
    install_chat_template(tokenizer)
    renderer = ConversationRenderer.of(tokenizer, kwargs=kwargs)
    prompts, faults = [], RowFaults()
    for conversation in conversations:
        try:
            prompts.append(_prompt(conversation, renderer, system))
        except RowFault as fault:
            faults.add(conversation.where, fault)
    faults.raise_any()
    return prompts


def prompts_from_texts(
    texts: Iterable[str | tuple[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    kwargs: Mapping[str, Any] | None = None,
    system: str | None = None,
) -> list[Prompt]:
    """Each text as a user turn; where the tokenizer has no chat template, as the beginning of a text to go on with.

    Args:
        texts: texts, or pairs of a text and where it comes from (else `--prompt`).
        kwargs: what the chat template is given besides (`data.chat_template_kwargs`).
        system: a system turn before each.

    Raises:
        UserError: the template refuses a text, or there is a system turn and no template that writes it.
    """
    prompts = []
    if system is not None and not tokenizer.chat_template:
        raise UserError(f"--system: {NO_TEMPLATE}; leave it out")
    renderer = ConversationRenderer.of(tokenizer, kwargs=kwargs) if tokenizer.chat_template else None
    for item in texts:
        text, where = (item, "--prompt") if isinstance(item, str) else item
        if renderer is not None:
            try:
                prompts.append(_prompt(Conversation([{"role": "user", "content": text}], where), renderer, system))
            except RowFault as fault:
                raise UserError(f"{where}: {fault}") from fault
        else:
            prompts.append(Prompt(prompt_ids(tokenizer, text), None, where, text))
    return prompts


def _prompt(conversation: Conversation, renderer: ConversationRenderer, system: str | None = None) -> Prompt:
    messages, answer, expected = conversation.messages, None, None
    if system is not None:
        if messages and messages[0]["role"] in ("system", "developer"):
            raise RowFault("has a system turn of its own; leave out --system")
        messages = [{"role": "system", "content": system}, *messages]
        conversation = replace(conversation, messages=messages)
    if messages and messages[-1]["role"] == "assistant":
        messages, answer = messages[:-1], messages[-1]["content"] or None
    if not messages:
        raise RowFault("nothing stands before the answer; a prompt needs a user turn at least")
    text = renderer.prompt(messages, conversation.tools)
    check_characters(text)
    refuse_unwritten(system, text)
    if len(messages) < len(conversation.messages):
        expected = _expected(conversation, renderer)
    ids = token_ids(renderer.tokenizer, text)
    return Prompt(ids, answer, conversation.where, messages[-1]["content"], expected)


def refuse_unwritten(system: str | None, text: str) -> None:
    """Refuse a system turn that a template has left out of its text.

    Raises:
        RowFault: naming the option.
    """
    if system is not None and not is_written(system, text):
        raise RowFault("the chat template does not write system turns; leave out --system, and say it in the prompt")


def _expected(conversation: Conversation, renderer: ConversationRenderer) -> str | None:
    last = len(conversation.messages) - 1
    if last not in conversation.answers:
        return None
    try:
        target = renderer.answer(conversation, last).target
    except RowFault:  # it can be asked, though not trained
        return None
    return str(renderer.tokenizer.decode(token_ids(renderer.tokenizer, target), skip_special_tokens=True))
