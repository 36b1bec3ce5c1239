"""What `generate --chat` does: one conversation, each turn of which is answered before the next one is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from qlora_tool.data.chat import ConversationRenderer
from qlora_tool.data.faults import RowFault
from qlora_tool.data.labels import check_characters, token_ids
from qlora_tool.data.prompts import NO_TEMPLATE, Prompt, refuse_unwritten
from qlora_tool.errors import UserError
from qlora_tool.inference.answer import Answer, Answers, answer_as_it_is, dense_weights, end_tokens
from qlora_tool.inference.generate import GenerateResult, PromptAnswer, effort_of
from qlora_tool.inference.open import open_artifact
from qlora_tool.inference.peak import PeakMemory
from qlora_tool.model.open import positions_of

if TYPE_CHECKING:
    from qlora_tool.artifacts import Artifact
    from qlora_tool.inference.sampling import Sampling


def chat(
    artifact: Artifact,
    turns: Iterable[str],
    sampling: Sampling,
    system: str | None = None,
    on_text: Callable[[str], None] | None = None,
    on_answer: Callable[[PromptAnswer], None] | None = None,
) -> GenerateResult:
    """Answer the turns of one conversation, which the chat template writes anew for each, as a server does.

    Args:
        turns: what the user says, one after the other; blank ones are passed over.
        system: a system turn before them.
        on_text: told an answer piece by piece, as it is written.
        on_answer: told each turn's answer before the next turn is asked for.

    Raises:
        UserError: the model has no chat template, or it refuses a turn; or the conversation has grown longer than the
            model's positions.
    """
    with PeakMemory() as peak:
        model, tokenizer = open_artifact(artifact)
        peak.watch(model.device)
        if not tokenizer.chat_template:
            raise UserError(f"--chat: {artifact.name}: {NO_TEMPLATE}; ask it with --prompt")
        renderer = ConversationRenderer.of(tokenizer, kwargs=artifact.chat_template_kwargs)
        ends, limit = end_tokens(model, tokenizer), positions_of(model.config)
        said: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
        given: list[PromptAnswer] = []
        seconds = 0.0
        torch.manual_seed(sampling.seed)
        model.module.eval()
        model.checkpoint_layers(False)
        with dense_weights(model):
            for text in turns:
                if not text.strip():
                    continue
                said.append({"role": "user", "content": text})
                prompt = _prompt(renderer, said, f"--chat, turn {len(given) + 1}", limit, system)
                found = answer_as_it_is(model, tokenizer, [prompt], sampling, ends, on_text=on_text)
                seconds += found.seconds
                given.append(PromptAnswer(text, found.each[0]))
                said.append({"role": "assistant", "content": found.each[0].text})
                if on_answer is not None:
                    on_answer(given[-1])
    if not given:
        raise UserError("--chat: nothing was said; give a line for each turn")
    answers: list[Answer] = [one.answer for one in given]
    return GenerateResult(tuple(given), effort_of(Answers(answers, seconds), peak.bytes))


def _prompt(
    renderer: ConversationRenderer, said: list[dict[str, Any]], where: str, limit: int | None, system: str | None
) -> Prompt:
    """The whole conversation, up to where the model answers."""
    try:
        text = renderer.prompt(said)
        check_characters(text)
        refuse_unwritten(system, text)
    except RowFault as fault:
        raise UserError(f"{where}: {fault}") from fault
    ids = token_ids(renderer.tokenizer, text)
    if limit and len(ids) >= limit:
        raise UserError(f"{where}: the conversation has {len(ids)} tokens by now, but the model has {limit} positions; "
                        "begin a new one")  # fmt: skip
    return Prompt(ids, None, where, said[-1]["content"])
