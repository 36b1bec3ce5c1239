"""Generate answers to prompts, in batches, each up to its end-of-turn token."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from qlora_tool.errors import UserError
from qlora_tool.inference.ends import answer_ends, generation_settings
from qlora_tool.inference.sampling import Sampling
from qlora_tool.model.open import positions_of
from qlora_tool.ops.free_memory import free_bytes
from qlora_tool.terminal import progress
from qlora_tool.weights.handles import WeightHandle

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from qlora_tool.data.prompts import Prompt
    from qlora_tool.model.causal_lm import CausalLM


FinishReason = Literal["stop", "length", "context"]
"""Why an answer ends: its end token, as many tokens as were asked for, or no more positions in the model."""


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: special tokens left out.
        tokens: generated, the end token included.
        finish_reason: why it ends.
    """

    text: str
    tokens: int
    finish_reason: FinishReason

    def as_json(self) -> dict[str, Any]:
        return {"answer": self.text, "tokens": self.tokens, "finish_reason": self.finish_reason}


@dataclass(frozen=True)
class Answers:
    """What a model answered.

    Attributes:
        each: one a prompt, in their order.
        seconds: for all of them.
    """

    each: list[Answer]
    seconds: float

    @property
    def texts(self) -> list[str]:
        return [one.text for one in self.each]

    @property
    def tokens(self) -> int:
        """Generated, in all."""
        return sum(one.tokens for one in self.each)


@torch.no_grad()
def answer(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    done: Callable[[int], None] = lambda count: None,
    ends: list[int] | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Answers:
    """Answer every prompt.

    Prompts of like length share a batch, padded on the left and masked. An answer ends at its end token, after
    `max_new_tokens`, or where the model's positions end.

    Args:
        done: told how many are answered.
        ends: the tokens that end an answer; None: what the model's files and the tokenizer name.
        on_text: told the answer to a single prompt piece by piece, as it is written.

    Raises:
        UserError: a prompt leaves no room for an answer within the model's positions.
    """
    ends = ends or end_tokens(model, tokenizer)
    refuse_no_room(prompts, positions_of(model.config))
    torch.manual_seed(sampling.seed)
    model.module.eval()
    model.checkpoint_layers(False)
    with dense_weights(model), progress("answering", len(prompts), "prompts") as bar:

        def answered(count: int) -> None:
            bar.reach(count)
            done(count)

        return answer_as_it_is(model, tokenizer, prompts, sampling, ends, answered, on_text)


def refuse_no_room(prompts: Sequence[Prompt], limit: int | None) -> None:
    """Refuse prompts that leave no room for an answer.

    Args:
        limit: the model's positions.

    Raises:
        UserError: with a line for each.
    """
    faults = [
        f"{prompt.where}: {len(prompt.input_ids)} tokens, but the model has {limit} positions; shorten it"
        for prompt in prompts
        if limit and len(prompt.input_ids) >= limit
    ]
    if faults:
        raise UserError(faults)


@torch.no_grad()
def answer_as_it_is(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    ends: list[int],
    done: Callable[[int], None] = lambda count: None,
    on_text: Callable[[str], None] | None = None,
) -> Answers:
    """The same as `answer` with the model as it stands: its weights are not held dense, no seed is set, what is
    recomputed in backward stays so. The model must be in evaluation mode."""
    limit, started, answered = positions_of(model.config), time.perf_counter(), 0
    found: dict[int, Answer] = {}
    streamer = None if on_text is None else _streamer(tokenizer, on_text)
    for chosen, room in _batches([len(prompt.input_ids) for prompt in prompts], sampling, limit):
        answers = _answer_batch(model, [prompts[index].input_ids for index in chosen], sampling, ends, room, streamer)
        for index, ids in zip(chosen, answers, strict=True):
            reason: FinishReason = "length" if room == sampling.max_new_tokens else "context"
            reason = "stop" if ids and ids[-1] in ends else reason
            found[index] = Answer(tokenizer.decode(ids, skip_special_tokens=True), len(ids), reason)
        answered += len(chosen)
        done(answered)
    return Answers([found[index] for index in range(len(prompts))], time.perf_counter() - started)


def _streamer(tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> Any:
    """What transformers tells tokens to; it passes whole words on."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                on_text(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _batches(lengths: Sequence[int], sampling: Sampling, limit: int | None) -> Iterator[tuple[list[int], int]]:
    """Indices of prompts of like length, and the tokens there is room for after each of them.

    Prompts that the model's positions leave less room than asked for share a batch only with their equals, so that
    none is cut short by a longer one.
    """

    def room(index: int) -> int:
        return min(sampling.max_new_tokens, limit - lengths[index]) if limit else sampling.max_new_tokens

    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for tokens, equals in itertools.groupby(order, key=room):
        indices = list(equals)
        for start in range(0, len(indices), sampling.batch_size):
            yield indices[start : start + sampling.batch_size], tokens


@contextlib.contextmanager
def dense_weights(model: CausalLM) -> Iterator[None]:
    """Keep the weights dense meanwhile, where they take at most half of the free memory: each token needs all of them,
    and a token of a small batch takes less time than dequantizing them."""
    weights = [module for module in model.module.modules() if isinstance(module, WeightHandle)]
    needed = sum(math.prod(weight.shape) for weight in weights) * model.compute_dtype.itemsize
    held = weights if 2 * needed <= free_bytes(model.device) else []
    try:
        for weight in held:
            weight.hold(model.compute_dtype)
        yield
    finally:
        for weight in held:
            weight.release()


def _answer_batch(
    model: CausalLM, prompts: list[list[int]], sampling: Sampling, ends: list[int], max_new_tokens: int, streamer: Any
) -> list[list[int]]:
    """Token ids of each answer, its end token included."""
    longest = max(map(len, prompts))
    pad = ends[0]
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    output = model.module.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=pad,
        use_cache=True, streamer=streamer, **sampling.arguments(),
    )  # fmt: skip
    return [_until_end(row[longest:].tolist(), ends) for row in output]


def _until_end(ids: list[int], ends: list[int]) -> list[int]:
    """Up to the first end token, which counts; what stands behind it is padding."""
    for position, token in enumerate(ids):
        if token in ends:
            return ids[: position + 1]
    return ids


def end_tokens(model: CausalLM, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer of a model; see `end_tokens_of`."""
    return end_tokens_of(model.folder, model.config, tokenizer)


def end_tokens_of(folder: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: what the model's generation settings name, the tokenizer's end token, and what its
    chat template ends a turn with.

    Args:
        folder: the model's.

    Raises:
        UserError: there is none.
    """
    found = answer_ends(generation_settings(folder), config, tokenizer)
    if not found:
        raise UserError(
            f"{folder}: neither generation_config.json nor the tokenizer names a token that ends an answer; set "
            "eos_token in tokenizer_config.json"
        )
    return found
