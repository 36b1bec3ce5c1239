"""How one chat template wants its turns: found by trying, for templates do not say it.

Some take content as a string and some in parts (`[{"type": "text", "text": …}]`, as SmolVLM and Idefics 3 do), some a
tool call's arguments as an object and some as JSON; few know the role `developer`. What does not fit is often not
refused but left out without a word, so each form is tried on a small conversation, and taken if all of it is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qlora_tool.data.faults import RowFault
from qlora_tool.data.messages import CALL_TEXT, REASONING, TRAIN, Message, reasoning
from qlora_tool.data.template import render, template_sources

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The roles that stand in for those that a template does not know.
STAND_INS = {"developer": "system", "function": "tool", "ipython": "tool"}
QUESTION, ANSWER, INSTRUCTION, RESULT = "w7question", "w7answer", "w7instruction", "w7result"
SHAPES_KEPT = 1000  # of conversations, by the roles of their turns
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
    keys_read: dict[str, bool] = field(default_factory=dict)  # by key of a turn, what `reads` found
    left_out: dict[Any, frozenset[str]] = field(default_factory=dict)  # by shape, what `leaves_out` found

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
        # A template that cuts what it is given may write the list itself, as Python or JSON has it: no content either.
        as_it_is = parted is not None and any(mark in parted for mark in ("'type':", '"type":', '\\"type\\"'))
        return parted is not None and not as_it_is and QUESTION in parted and ANSWER in parted

    @cached_property
    def arguments_as_json(self) -> bool:
        """Whether a tool call's arguments have to be a string."""
        return not self._writes_calls(as_json=False) and self._writes_calls(as_json=True)

    @cached_property
    def writes_calls(self) -> bool:
        """Whether tool calls are written, in whatever form."""
        return self._writes_calls(as_json=False) or self._writes_calls(as_json=True)

    def reads(self, key: str) -> bool:
        """Whether the template reads a key of a turn."""
        if key not in self.keys_read:
            word = re.compile(rf"\b{re.escape(key)}\b")
            self.keys_read[key] = any(word.search(source) for source in template_sources(self.tokenizer))
        return self.keys_read[key]

    def leaves_out(self, turns: Sequence[Message], tools: list[Any] | None) -> frozenset[str]:
        """The roles of turns like these that the template leaves out, whatever they say: found with a word of its own
        in the place of each content, for what a turn says may stand elsewhere too."""
        said = [turn["role"] != "assistant" and bool(turn["content"].strip()) for turn in turns]
        kinds = ((turn["role"], says, *sorted(turn)) for turn, says in zip(turns, said, strict=True))
        shape = (tuple(kinds), bool(tools))
        if shape not in self.left_out:
            words = [f"w7turn{place}w7" for place in range(len(turns))]
            marked = [{**turn, "content": word} if says else turn
                      for turn, word, says in zip(turns, words, said, strict=True)]  # fmt: skip
            try:
                text = render(
                    self.tokenizer, self.messages(marked), tools=tools, add_generation_prompt=True, kwargs=self.kwargs
                )
            except RowFault:
                return frozenset()
            lost = frozenset(turn["role"] for turn, word, says in zip(turns, words, said, strict=True)
                             if says and word not in text)  # fmt: skip
            if len(self.left_out) >= SHAPES_KEPT:
                self.left_out.clear()
            self.left_out[shape] = lost
        return self.left_out[shape]

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
