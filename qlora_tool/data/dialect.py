"""How one chat template wants its turns: found by trying, for templates do not say it.

Some take content as a string and some in parts (`[{"type": "text", "text": …}]`, as SmolVLM and Idefics 3 do), some a
tool call's arguments as an object and some as JSON; few know the role `developer`. What does not fit is often not
refused but left out without a word, so each form is tried on a small conversation, and taken if all of it is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qlora_tool.data.faults import RowFault
from qlora_tool.data.messages import CALL_TEXT, REASONING, TRAIN, Message, reasoning
from qlora_tool.data.template import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The roles that stand in for those that a template does not know.
STAND_INS = {"developer": "system", "function": "tool", "ipython": "tool"}
QUESTION, ANSWER, INSTRUCTION, RESULT = "w7question", "w7answer", "w7instruction", "w7result"
USER: Message = {"role": "user", "content": QUESTION}
CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "w7call000", "type": "function", "function": {"name": "w7name", "arguments": {"w7key": "w7value"}}}
    ],
}
TOOL = {
    "type": "function",
    "function": {
        "name": "w7name",
        "description": "w7",
        "parameters": {"type": "object", "properties": {"w7key": {"type": "string", "description": "w7"}}},
    },
}


@dataclass(frozen=True)
class Dialect:
    """The form that the tokenizer's chat template wants.

    Args:
        tokenizer: with the template.
        kwargs: `data.chat_template_kwargs`.
    """

    tokenizer: PreTrainedTokenizerBase
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)  # by role, the one it is written as; filled as roles turn up

    def messages(self, turns: Sequence[Message]) -> list[Message]:
        """The turns in that form, without the marks that say what is trained."""
        return [self._message(turn) for turn in turns]

    def written_as(self, role: str) -> str:
        """The role that a turn of `role` is written as: the same, but for those that this template does not know."""
        if role in STAND_INS and role not in self.roles:
            stand_in = STAND_INS[role]
            known = self._writes_role(role) or not self._writes_role(stand_in)
            self.roles[role] = role if known else stand_in
        return self.roles.get(role, role)

    @cached_property
    def writes_answers(self) -> bool | None:
        """Whether what the assistant says is written at all; None where the template refuses to say."""
        for parts in (False, True):
            text = self._try([USER, {"role": "assistant", "content": ANSWER}], parts=parts)
            if text is not None:
                return ANSWER in text or (not parts and self.in_parts)
        return None

    @cached_property
    def in_parts(self) -> bool:
        """Whether content has to come in parts."""
        turns = [USER, {"role": "assistant", "content": ANSWER}]
        plain, parted = self._try(turns, parts=False), self._try(turns, parts=True)
        if plain is not None and QUESTION in plain and ANSWER in plain:
            return False
        return parted is not None and QUESTION in parted and ANSWER in parted

    @cached_property
    def arguments_as_json(self) -> bool:
        """Whether a tool call's arguments have to be a string."""
        return not self._writes_calls(as_json=False) and self._writes_calls(as_json=True)

    @cached_property
    def writes_calls(self) -> bool:
        """Whether tool calls are written, in whatever form."""
        return self._writes_calls(as_json=False) or self._writes_calls(as_json=True)

    @cached_property
    def asks_the_date(self) -> bool:
        """Whether the template writes the date of the day."""
        if self._try([USER]) is None:
            return False
        try:
            render(self.tokenizer, self.messages([USER]), kwargs={**self.kwargs, "strftime_now": ""})
        except RowFault as fault:
            return "not callable" in str(fault)
        return False

    def _writes_calls(self, as_json: bool) -> bool:
        call = self._message(CALL, as_json=as_json)
        result = {"role": "tool", "name": "w7name", "tool_call_id": "w7call000", "content": RESULT}
        for turns in ([USER, call], [USER, call, result, {"role": "assistant", "content": ANSWER}]):
            text = self._try(turns, tools=[TOOL])
            if text is not None:
                return "w7value" in text
        return False

    def _writes_role(self, role: str) -> bool:
        if role in ("tool", "function", "ipython"):
            turn = {"role": role, "name": "w7name", "tool_call_id": "w7call000", "content": RESULT}
            text = self._try([USER, self._message(CALL), turn], tools=[TOOL])
            return text is not None and RESULT in text
        text = self._try([{"role": role, "content": INSTRUCTION}, USER])
        return text is not None and INSTRUCTION in text

    def _try(
        self, turns: Sequence[Message], *, parts: bool | None = None, tools: list[Any] | None = None
    ) -> str | None:
        parts = self.in_parts if parts is None else parts
        turns = [{**turn, "content": _parts(turn["content"])} if parts and isinstance(turn["content"], str) else turn
                 for turn in turns]  # fmt: skip
        try:
            return render(self.tokenizer, turns, tools=tools, kwargs=self.kwargs)
        except RowFault:
            return None

    def _message(self, turn: Message, as_json: bool | None = None) -> Message:
        message = {key: value for key, value in turn.items() if key != TRAIN}
        message["role"] = self.written_as(turn["role"])
        if self.in_parts:
            message["content"] = _parts(turn["content"])
        if thought := reasoning(turn):
            # Later transformers give it the first and the last of the names; there are templates for each of the three.
            message.update({name: thought for name in REASONING if not message.get(name)})
        text = message.pop(CALL_TEXT, None)
        if text is not None and not self.writes_calls:
            message["content"] = _parts(text) if self.in_parts else text
            del message["tool_calls"]
        elif turn.get("tool_calls"):
            as_json = self.arguments_as_json if as_json is None else as_json
            message["tool_calls"] = [_call(call, as_json) for call in turn["tool_calls"]]
        return message


def _parts(content: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}]


def _call(call: Mapping[str, Any], as_json: bool) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    if as_json:
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}
