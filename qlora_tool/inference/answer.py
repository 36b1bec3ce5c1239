"""Generate answers to prompts, in batches, each up to its end-of-turn token."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qlora_tool.errors import UserError
from qlora_tool.inference.ends import answer_ends, generation_settings
from qlora_tool.inference.sampling import Sampling
from qlora_tool.model.open import positions_of
from qlora_tool.ops.free_memory import free_bytes
from qlora_tool.terminal import progress
from qlora_tool.weights.handles import WeightHandle

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_tool.data.prompts import Prompt
    from qlora_tool.model.causal_lm import CausalLM


@dataclass(frozen=True)
class Answers:
    """What a model answered.

    Attributes:
        texts: one a prompt, in their order, special tokens left out.
        seconds: for all of them.
        tokens: generated.
    """

    texts: list[str]
    seconds: float
    tokens: int


@torch.no_grad()
def answer(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    done: Callable[[int], None] = lambda count: None,
    ends: list[int] | None = None,
) -> Answers:
    """Answer every prompt.

    Prompts of like length share a batch, padded on the left and masked. An answer ends at its end token, after
    `max_new_tokens`, or where the model's positions end.

    Args:
        done: told how many are answered.
        ends: the tokens that end an answer; None: what the model's files and the tokenizer name.

    Raises:
        UserError: a prompt leaves no room for an answer within the model's positions.
    """
    ends = ends or end_tokens(model, tokenizer)
    limit = positions_of(model.config)
    faults = [
        f"{prompt.where}: {len(prompt.input_ids)} tokens, but the model has {limit} positions; shorten it"
        for prompt in prompts
        if limit and len(prompt.input_ids) >= limit
    ]
    if faults:
        raise UserError(faults)
    torch.manual_seed(sampling.seed)
    model.module.eval()
    model.checkpoint_layers(False)
    texts, tokens, started, answered = [""] * len(prompts), 0, time.perf_counter(), 0
    with dense_weights(model), progress("answering", len(prompts), "prompts") as bar:
        for chosen, room in _batches([len(prompt.input_ids) for prompt in prompts], sampling, limit):
            answers = _answer_batch(model, [prompts[index].input_ids for index in chosen], sampling, ends, room)
            for index, ids in zip(chosen, answers, strict=True):
                texts[index] = tokenizer.decode(ids, skip_special_tokens=True)
                tokens += len(ids)
            answered += len(chosen)
            bar.reach(answered)
            done(answered)
    return Answers(texts, time.perf_counter() - started, tokens)


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
    model: CausalLM, prompts: list[list[int]], sampling: Sampling, ends: list[int], max_new_tokens: int
) -> list[list[int]]:
    """Token ids of each answer, its end token included."""
    longest = max(map(len, prompts))
    pad = ends[0]
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    output = model.module.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=pad,
        use_cache=True, **sampling.arguments(),
    )  # fmt: skip
    return [_until_end(row[longest:].tolist(), ends) for row in output]


def _until_end(ids: list[int], ends: list[int]) -> list[int]:
    """Up to the first end token, which counts; what stands behind it is padding."""
    for position, token in enumerate(ids):
        if token in ends:
            return ids[: position + 1]
    return ids


def end_tokens(model: CausalLM, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: what the model's generation settings name, the tokenizer's end token, and what its
    chat template ends a turn with.

    Raises:
        UserError: there is none.
    """
    found = answer_ends(generation_settings(model.folder), model.config, tokenizer)
    if not found:
        raise UserError(
            f"{model.folder}: neither generation_config.json nor the tokenizer names a token that ends an answer; set "
            "eos_token in tokenizer_config.json"
        )
    return found
