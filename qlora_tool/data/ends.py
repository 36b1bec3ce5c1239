"""Where an answer ends that the chat template does not end.

A model that never sees answers end never stops. Some templates write no end: of GLM's the next turn's role is the end,
and its generation configuration stops there; others write nothing at all, and get the end of text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_tool.data.answers import Answer, Write
from qlora_tool.data.dialect import ANSWER, CALL, RESULT, USER
from qlora_tool.data.faults import RowFault
from qlora_tool.data.messages import Message
from qlora_tool.data.template import SpecialTokens
from qlora_tool.errors import UserError
from qlora_tool.files.reading import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Ends:
    """The ends of answers.

    Args:
        tokenizer: of the model; beside its files lies the generation configuration.
        special: its special tokens.
        write: renders turns without tools.
    """

    tokenizer: PreTrainedTokenizerBase
    special: SpecialTokens
    write: Write

    def missing(self, answer: Answer, messages: Sequence[Message]) -> str:
        """What has to follow an answer: empty where it ends in a special token, else the token that ends it, with the
        white space before it.

        Raises:
            UserError: there is no token to end it with.
        """
        ended = answer.target.rstrip().endswith(self.special.texts)
        calls = messages[answer.turn].get("tool_calls")
        if ended and not (calls and self._none_in_template and not answer.target.rstrip().endswith(self.stops)):
            return ""
        return self._next_role(answer, messages) or self._end_of_text()

    def header(self, answer: Answer) -> str:
        """The beginning of the next answer at the end of this one: some templates write it whether asked to or not (as
        those of Command R7B do). Empty where there is none."""
        ends = [answer.target.rfind(stop) + len(stop) for stop in self.stops if stop in answer.target]
        header = answer.target[max(ends) :] if ends else ""
        begins = any(token in header for token in self.special.texts) and answer.prompt.endswith(header)
        return header if begins else ""

    @cached_property
    def stops(self) -> tuple[str, ...]:
        """The tokens at which generation stops."""
        return generation_stops(self.tokenizer)

    @cached_property
    def _none_in_template(self) -> bool:
        """Whether the template writes no special token after what the assistant says."""
        try:
            text = self.write([USER, {"role": "assistant", "content": ANSWER}])
        except RowFault:
            return False
        _, found, behind = text.rpartition(ANSWER)
        return bool(found) and not any(token in behind for token in self.special.texts)

    def _next_role(self, answer: Answer, messages: Sequence[Message]) -> str:
        """The token that begins the next turn, where generation stops at it."""
        if messages[answer.turn].get("tool_calls"):
            turns = [USER, CALL, {"role": "tool", "name": "w7name", "tool_call_id": "w7call000", "content": RESULT}]
        else:
            turns = [USER, {"role": "assistant", "content": ANSWER}, USER]
        for shown in ([*messages[: answer.turn + 1], turns[-1]], turns):  # of the first, reasoning may be taken out
            try:
                through, text = self.write(shown[:-1]), self.write(shown)
            except RowFault:
                continue
            if text.startswith(through):
                behind = text[len(through) :]
                token = next((stop for stop in self.stops if behind.lstrip().startswith(stop)), None)
                return behind[: behind.index(token) + len(token)] if token else ""
        return ""

    def _end_of_text(self) -> str:
        end: str | None = self.tokenizer.eos_token
        if end is None:
            raise UserError(
                "the chat template ends answers with no special token and the tokenizer has no end-of-text token, "
                "so the model would never learn to stop; set eos_token in the model's tokenizer_config.json"
            )
        return end if end in self.stops or not self.stops else self.stops[0]


def generation_stops(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The tokens at which generation stops, by the files beside the tokenizer's: the generation configuration, else the
    model's; else the tokenizer's end of text."""
    for name in ("generation_config.json", "config.json"):
        for folder in _folders(tokenizer):
            found = _read(folder / name).get("eos_token_id")
            if found is not None:
                ids = found if isinstance(found, list) else [found]
                tokens = [tokenizer.convert_ids_to_tokens(token) for token in ids]
                return tuple(token for token in tokens if token)
    return (tokenizer.eos_token,) if tokenizer.eos_token else ()


def _folders(tokenizer: PreTrainedTokenizerBase) -> list[Path]:
    """The tokenizer's folder, and the base's where that is an adapter's."""
    folder = Path(tokenizer.name_or_path or "")
    if not tokenizer.name_or_path or not folder.is_dir():
        return []
    base = _read(folder / "adapter_config.json").get("base_model_name_or_path")
    if base is None:
        return [folder]
    if Path(base).is_dir():
        return [folder, Path(base)]
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(base, "config.json")
    return [folder, Path(cached).parent] if isinstance(cached, str) else [folder]


def _read(file: Path) -> dict[str, object]:
    try:
        return read_object(file, "")
    except UserError:  # whoever opens it says what is wrong with it
        return {}
