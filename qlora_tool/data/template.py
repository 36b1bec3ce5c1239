"""The chat template that conversations are written with: where it comes from, and what it writes.

A template is a program that came with a model: whatever it raises is a fault of it or of the row, and it may not run
for ever.
"""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_tool.data.faults import RowFault
from qlora_tool.data.messages import Message
from qlora_tool.data.template_trial import CURE, MEMORY, Refusals, try_template
from qlora_tool.data.time_limit import TimeIsUp, TooMuch, time_limit
from qlora_tool.errors import UserError, did_you_mean, did_you_mean_path
from qlora_tool.files.reading import read_text
from qlora_tool.sizes import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GIVEN = ("messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now")
LARGEST = 4 << 20  # bytes: the longest ones have a hundredth of it
_refusals: dict[tuple[str, ...], Refusals] = {}  # by template
SECONDS = 5.0  # for one rendering: a thousand turns take a hundredth of it
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
    if not path.exists() and not path.is_symlink():
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"data.chat_template: {path}: no such file{did_you_mean_path(path, names)}")
    try:
        return read_text(path, "expected a Jinja file", LARGEST)
    except UserError as error:
        raise UserError([f"data.chat_template: {line}" for line in error.lines]) from error


def check_template_kwargs(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> None:
    """
    Raises:
        UserError: `data.chat_template_kwargs` has a name that the template does not read, or one that is given anyway.
    """
    given = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters} - {"documents", "kwargs"}
    if taken := sorted(given.intersection(kwargs)):
        raise UserError(f"data.chat_template_kwargs: '{taken[0]}' is not a template's own: it is given with each row")
    sources = "\n".join(template_sources(tokenizer))
    for name, value in kwargs.items():
        if str(value).lower() in ("true", "false") and not isinstance(value, bool):
            raise UserError(
                f"data.chat_template_kwargs.{name}: the text '{value}', which is no truth value to a template; "
                f"expected {str(value).lower()} without quotes"
            )
        if not re.search(rf"\b{re.escape(name)}\b", sources):
            known = sorted(_variables(sources))
            close = did_you_mean(name, known) or f"; it reads {', '.join(known) or 'none of its own'}"
            raise UserError(f"data.chat_template_kwargs: the chat template does not read '{name}'{close}")


def template_sources(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The text of the template; several where a model has one for tools besides."""
    template = tokenizer.chat_template or ""
    return tuple(template.values()) if isinstance(template, dict) else (template,)


def _variables(source: str) -> set[str]:
    """The names that a template takes from outside, without those that every template is given."""
    import jinja2
    from jinja2 import meta

    marks = re.compile(r"{%-?\s*(end)?generation\s*-?%}")  # transformers' own statement
    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(marks.sub("", source))
    except jinja2.TemplateSyntaxError:
        return set()
    return {name for name in meta.find_undeclared_variables(tree) if name not in GIVEN and not name.endswith("_token")}


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
    tools: list[Any] | None = None,
    add_generation_prompt: bool = False,
    kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The text that the chat template writes, special tokens (and so the beginning-of-text token) included.

    Args:
        kwargs: `data.chat_template_kwargs`.

    Raises:
        RowFault: the template refuses these turns (no system role, roles that must alternate, …).
        UserError: the template itself is broken, takes too long, or is slow to refuse one after the other.
    """
    import jinja2

    sources = template_sources(tokenizer)
    try_template(sources, messages, kwargs or {})
    refusals = _refusals.setdefault(sources, Refusals())
    begin = time.monotonic()
    try:
        with time_limit(SECONDS, MEMORY):
            text = tokenizer.apply_chat_template(
                list(messages), tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt, **kwargs or {}
            )
    except (TooMuch, MemoryError) as error:
        raise UserError(f"the chat template makes more of a conversation of {counted(len(messages), 'turn')} than "
                        f"memory holds; {CURE}") from error  # fmt: skip
    except TimeIsUp as error:
        raise UserError(
            f"the chat template wrote a conversation of {counted(len(messages), 'turn')} for {SECONDS:g} seconds and "
            f"was not done (an endless loop?); {CURE}"
        ) from error
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"the chat template, line {error.lineno}: {error.message}; {CURE}"
        ) from error
    except Exception as error:  # a template is a program: it may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        refusals.refused(time.monotonic() - begin, reason)
        raise RowFault(f"the chat template refuses this conversation: {reason}") from error
    assert isinstance(text, str)
    refusals.written()
    return text
