"""Chat templates, and which parts of what they write are answers.

An answer is all that the template writes for an assistant turn after the generation prompt, up to the next turn or the
end: the end-of-turn token and what follows it included. It is found by rendering the conversation's beginnings, so that
nothing need be known of the template:

    the turns before it, with the generation prompt    <user>2 + 2?<end><assistant>
    and with the turn itself                           <user>2 + 2?<end><assistant>4<end>
    the whole conversation                             <user>2 + 2?<end><assistant>4<end><user>Why?<end>…

Each must begin with the one above it, and what the second adds is the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_tool.data.faults import RowFault
from qlora_tool.data.messages import Conversation, Message
from qlora_tool.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL_TEMPLATE, PLAIN_TEMPLATE = "the model's", "plain"
PLAIN_TEMPLATE_TEXT = """\
{%- for message in messages -%}
{%- if not loop.first %}{{ '\\n\\n' }}{% endif -%}
{{ '### ' + message['role'] | capitalize + ':\\n' + message['content'] -}}
{%- if message['role'] == 'assistant' %}{{ eos_token }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '\\n\\n### Assistant:\\n' }}{% endif -%}
"""


def install_chat_template(tokenizer: PreTrainedTokenizerBase, path: str | None = None) -> str:
    """Give the tokenizer the template that conversations are written with, so that what is saved of it generates alike.

    Args:
        path: a Jinja file that overrides the tokenizer's own template. Without one the tokenizer keeps its own, and
            where it has none it gets a plain one: `### User:`, `### Assistant:`, and an end-of-text token after each
            answer.

    Returns:
        The template's name for logs: "the model's", "plain" or the path.
    """
    plain = ("{{ bos_token }}" if adds_bos(tokenizer) else "") + PLAIN_TEMPLATE_TEXT
    if path is not None:
        tokenizer.chat_template = read_chat_template(Path(path))
        return path
    if not tokenizer.chat_template:
        tokenizer.chat_template = plain
    return PLAIN_TEMPLATE if tokenizer.chat_template == plain else MODEL_TEMPLATE


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts a beginning-of-text token before every text by itself."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def read_chat_template(path: Path) -> str:
    """
    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"data.chat_template: {path}: no such file{did_you_mean(path.name, names)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.chat_template: {path}: cannot be read ({error}); expected a Jinja file") from error


@dataclass(frozen=True)
class SpecialTokens:
    """A tokenizer's special tokens, looked up once: some have thousands, and asking for them takes milliseconds.

    Attributes:
        texts: how they are written.
        ids: their ids.
        anchor: one that text may be put behind without changing its tokens (the end of text); empty if there is none.
    """

    texts: tuple[str, ...]
    ids: frozenset[int]
    anchor: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
        """Those of `tokenizer`: the named ones (bos, eos, …) and all added ones that are marked special."""
        added = getattr(tokenizer, "added_tokens_decoder", {})
        texts = {*tokenizer.all_special_tokens, *(str(token) for token in added.values() if token.special)}
        end = added.get(tokenizer.eos_token_id)
        anchor = tokenizer.eos_token if end is not None and not end.rstrip else ""  # rstrip: it swallows spaces
        if tokenizer(anchor + "a", add_special_tokens=False)["input_ids"][:1] != [tokenizer.eos_token_id]:
            anchor = ""
        return cls(tuple(texts), frozenset(tokenizer.convert_tokens_to_ids(list(texts))), anchor)


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    tools: list | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """The text that the chat template writes, special tokens (and so the beginning-of-text token) included.

    Raises:
        RowFault: the template refuses these turns (no system role, roles that must alternate, …).
        UserError: the template itself is broken.
    """
    import jinja2

    try:
        return tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"the chat template, line {error.lineno}: {error.message}; mend it, or name another with data.chat_template"
        ) from error
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RowFault(f"the chat template refuses this conversation: {reason}") from error


@dataclass(frozen=True)
class RenderedRow:
    """One row as the model sees it.

    Args:
        text: all of it.
        answers: begin and end of every answer that is trained, as positions in `text`.
        where: the row it comes from, and which answer of it where it has one alone (`FILE, line N, answer 2`).
        ends_added: answers that got an end-of-text token because the template ends them with no special token.
    """

    text: str
    answers: list[tuple[int, int]]
    where: str
    ends_added: int = 0


@dataclass(frozen=True)
class ConversationRenderer:
    """Turns conversations into the rows they are trained as: one, or one an answer.

    Args:
        tokenizer: with the chat template to render with; see `install_chat_template`.
        special: its special tokens.
        every_answer: whether the answers must be told apart (to train on them alone).
    """

    tokenizer: PreTrainedTokenizerBase
    special: SpecialTokens
    every_answer: bool = True

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, *, every_answer: bool = True) -> ConversationRenderer:
        """One for a tokenizer."""
        return cls(tokenizer, SpecialTokens.of(tokenizer), every_answer)

    def rows(self, conversation: Conversation) -> list[RenderedRow]:
        """The rows that a conversation is trained as, each rendered as at inference.

        Raises:
            RowFault: the template refuses the conversation, or an answer cannot be told apart.
            UserError: what no row of this data set can be trained with.
        """
        rendered = render_conversation(self.tokenizer, conversation, self.special, every_answer=self.every_answer)
        return [RenderedRow(rendered.text, rendered.answers, conversation.where, rendered.ends_added)]


@dataclass
class RenderedConversation:
    """A conversation as text.

    Args:
        text: all of it.
        answers: begin and end of every answer, as positions in `text`.
        ends_added: answers that got an end-of-text token because the template ends them with no special token.
    """

    text: str
    answers: list[tuple[int, int]] = field(default_factory=list)
    ends_added: int = 0


def render_conversation(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    special: SpecialTokens,
    *,
    every_answer: bool = True,
) -> RenderedConversation:
    """Render a conversation and find its answers.

    Where the template writes no special token at the end of an answer, the tokenizer's end-of-text token is put there:
    a model that never sees answers end never stops.

    Args:
        every_answer: whether every answer must be found (to train on the answers alone). If not, a template that writes
            earlier turns anew leaves `answers` empty.

    Raises:
        RowFault: the template refuses the conversation, or an answer cannot be told apart.
        UserError: the template rewrites earlier turns, and there are several answers to train on.
    """
    messages, tools = conversation.messages, conversation.tools
    text = render(tokenizer, messages, tools=tools)
    try:
        answers = _answers(tokenizer, conversation, text)
    except (RowFault, UserError):
        if every_answer:
            raise
        answers = []
    rendered = RenderedConversation(text)
    copied, parts, shift = 0, [], 0
    for begin, end in answers:
        added = ""
        if not text[begin:end].rstrip().endswith(special.texts):
            added = _end_of_text(tokenizer)
            rendered.ends_added += 1
        parts += [text[copied:end], added]
        rendered.answers.append((begin + shift, end + shift + len(added)))
        copied, shift = end, shift + len(added)
    rendered.text = "".join([*parts, text[copied:]])
    return rendered


def _answers(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, text: str) -> list[tuple[int, int]]:
    messages, tools = conversation.messages, conversation.tools
    turns = [index for index, turn in enumerate(messages) if turn["role"] == "assistant"]
    answers = []
    for index in turns:
        last = index == len(messages) - 1
        through_turn = text if last else render(tokenizer, messages[: index + 1], tools=tools)
        if not text.startswith(through_turn):
            raise _rewrites(conversation, len(turns))
        if index == 0:
            raise RowFault(
                "the conversation begins with an assistant turn, which answers nothing; begin with a user turn"
            )
        before = render(tokenizer, messages[:index], tools=tools, add_generation_prompt=True)
        if not through_turn.startswith(before):
            if not text.startswith(render(tokenizer, messages[:index], tools=tools)):
                raise _rewrites(conversation, len(turns))
            raise RowFault(
                f"the chat template begins the answer of turn {index + 1} differently from its own generation prompt "
                f"({before[-40:]!r}); name another template with data.chat_template"
            )
        answers.append((len(before), len(through_turn)))
    return answers


def _rewrites(conversation: Conversation, turns: int) -> RowFault | UserError:
    if turns == 1:
        return RowFault("the chat template rewrites the answer when another turn follows; end the row with its answer")
    return UserError(
        f"{conversation.where}: the chat template rewrites earlier turns, so it cannot be trained on several turns "
        f"(this row has {turns} answers): what the model would see of them is not what it was trained on; give rows of "
        "one answer each, name another template with data.chat_template, or set data.train_on: all"
    )


def _end_of_text(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.eos_token is None:
        raise UserError(
            "the chat template ends answers with no special token and the tokenizer has no end-of-text token, "
            "so the model would never learn to stop; set eos_token in the model's tokenizer_config.json"
        )
    return tokenizer.eos_token
