"""Which tokens end an answer: those that a model's files name, and those that its chat template writes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_tool.data.dialect import Dialect
from qlora_tool.data.faults import RowFault
from qlora_tool.data.labels import token_ids
from qlora_tool.data.template import render
from qlora_tool.errors import UserError, printable
from qlora_tool.files.reading import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

SETTINGS = "generation_config.json"
_BEGIN, _LAST = "the first words", "the last words"  # of an answer, as no template writes them by itself
_USER = {"role": "user", "content": "hello"}


def _call(words: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "look", "arguments": {"at": words}}}


_TOOL = {"type": "function", "function": {"name": "look", "description": "Looks at something.", "parameters": {
    "type": "object", "properties": {"at": {"type": "string", "description": "What to look at."}}, "required": ["at"]
}}}  # fmt: skip


@dataclass(frozen=True)
class _Probe:
    """A short conversation with an answer that begins with `_BEGIN` and ends with `_LAST`.

    Attributes:
        answer: the turn.
        behind: turns after it.
        calls: whether it ends with calls of tools, behind which a template may close several things at once.
    """

    answer: dict[str, Any]
    behind: tuple[dict[str, Any], ...] = ()
    calls: bool = False


_PROBES = (
    _Probe({"role": "assistant", "content": _LAST}),
    _Probe({"role": "assistant", "content": _LAST}, behind=({"role": "user", "content": "what else"},)),
    _Probe({"role": "assistant", "reasoning_content": _BEGIN, "content": _LAST}),
    _Probe({"role": "assistant", "content": "", "tool_calls": [_call(_LAST)]}, calls=True),
    _Probe({"role": "assistant", "content": "", "tool_calls": [_call(_BEGIN), _call(_LAST)]}, calls=True),
)


def generation_settings(folder: Path) -> dict[str, Any]:
    """What a folder's `generation_config.json` says; empty where there is none.

    Raises:
        UserError: it is broken.
    """
    file = folder / SETTINGS
    cure = "download the model again"
    found = read_object(file, cure) if file.exists() else {}
    if not all(isinstance(end, int) and not isinstance(end, bool) for end in listed(found.get("eos_token_id"))):
        raise UserError(f"{file}: eos_token_id is {printable(repr(found['eos_token_id']), 80)}, expected a token's "
                        f"number or a list of such; {cure}")  # fmt: skip
    return found


def named_ends(settings: dict[str, Any], config: PreTrainedConfig) -> tuple[list[int], list[int]]:
    """The ends that the generation settings name, and those of the model's configuration."""
    return listed(settings.get("eos_token_id")), listed(getattr(config.get_text_config(), "eos_token_id", None))


def answer_ends(
    settings: dict[str, Any], config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """All tokens that end an answer: the generation settings', the configuration's, the tokenizer's end, and what the
    chat template ends a turn with, in this order and each once."""
    in_settings, in_config = named_ends(settings, config)
    return with_trained([*in_settings, *in_config], tokenizer)


def with_trained(named: Collection[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ends that are named already, and after them those that training with a tokenizer and its template teaches."""
    ends = [*named, *listed(tokenizer.eos_token_id)]
    return list(dict.fromkeys([*ends, *template_ends(tokenizer, ends)]))


def template_ends(tokenizer: PreTrainedTokenizerBase, known: Collection[int] = ()) -> list[int]:
    """The special tokens that a chat template ends answers with, so that every kind of answer has an end: a plain one,
    one with turns after it, one with reasoning, one that calls tools.

    Where a known end follows the answer already, nothing is missing. Else it is the first special token behind the
    answer, behind calls of tools the last, that stands nowhere within an answer.

    Args:
        known: ends that are known without the template.
    """
    if not tokenizer.chat_template:
        return []
    dialect, special = Dialect(tokenizer), set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    rendered = [(probe, *found) for probe in _PROBES if (found := _around(dialect, probe, special))]
    inside = {token for _, within, _ in rendered for token in within}
    ends: list[int] = []
    for probe, _, behind in rendered:
        candidates = [token for token in behind if token not in inside]
        if candidates and not {*known, *ends} & set(candidates):
            ends.append(candidates[-1 if probe.calls else 0])
    return ends


def _around(dialect: Dialect, probe: _Probe, special: Collection[int]) -> tuple[list[int], list[int]] | None:
    """The special tokens within the probe's answer and behind it; None where the template takes no such conversation,
    or does not show it."""
    tokenizer, turns = dialect.tokenizer, dialect.messages([_USER, probe.answer, *probe.behind])
    try:
        text = render(tokenizer, turns, tools=[_TOOL] if probe.calls else None)
    except RowFault:
        return None
    head, found, behind = text.rpartition(_LAST)
    if not found:
        return None
    for turn in probe.behind:
        behind = behind.partition(turn["content"])[0]
    within = head.partition(_BEGIN)[2]
    return tuple([token for token in token_ids(tokenizer, part) if token in special] for part in (within, behind))


def listed(ends: Any) -> list[int]:
    """What `eos_token_id` may be, a number, a list or nothing, as a list."""
    return [end for end in (ends if isinstance(ends, list) else [ends]) if end is not None]
