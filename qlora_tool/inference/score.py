"""What `evaluate` measures of one data set: the loss, and how many answers are right to the letter."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_tool.config import DataConfig
from qlora_tool.data.prompts import Prompt, read_prompts
from qlora_tool.data.tokenize import build_dataset
from qlora_tool.errors import UserError
from qlora_tool.inference.answer import Answers, Sampling, answer
from qlora_tool.inference.evaluation import evaluate_loss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_tool.model.causal_lm import CausalLM

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Score:
    """The scores of one data set.

    Attributes:
        loss, perplexity, tokens: over its trained tokens.
        exact_match: share of answers that are right, None without generating.
        answers: what was generated, None without generating.
    """

    loss: float
    perplexity: float
    tokens: int
    exact_match: float | None = None
    answers: Answers | None = None

    def as_json(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("loss", "perplexity", "tokens", "exact_match")}


def score(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    data: DataConfig,
    *,
    sampling: Sampling | None = None,
    batch_size: int = 8,
    done: Callable[[int], None] = lambda count: None,
) -> Score:
    """Score a model on a data source.

    Args:
        data: how the source is read; its `train` and `eval` are not looked at.
        sampling: generate answers too and count the exact matches; None leaves that out.
        batch_size: rows of a forward pass.
        done: told how many answers are generated.

    Raises:
        UserError: see `build_dataset`; and with `sampling`, no row has an answer.
    """
    dataset = build_dataset(source, data, tokenizer, key="--data")
    for line in dataset.report.lines():
        logger.info(line)
    prompts = [] if sampling is None else _with_answers(source, data.format, tokenizer)
    pad = next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
    result = evaluate_loss(model, dataset, batch_size, pad)
    if sampling is None:
        return Score(result.loss, result.perplexity, result.tokens)
    answers = answer(model, tokenizer, prompts, sampling, done)
    right = sum(exact_match(text, prompt.answer) for text, prompt in zip(answers.texts, prompts, strict=True))
    return Score(result.loss, result.perplexity, result.tokens, right / len(prompts), answers)


def _with_answers(source: str, data_format: str, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The prompts of the rows that say what the answer should be."""
    prompts = [prompt for prompt in read_prompts(source, data_format, tokenizer) if (prompt.answer or "").strip()]
    if not prompts:
        raise UserError(f"{source}: --generate compares answers, and no row has one; leave it out to get the loss")
    return prompts


def exact_match(text: str, answer: str) -> bool:
    """Whether a generated answer is the expected one, outer white space aside."""
    return text.strip() == answer.strip()
