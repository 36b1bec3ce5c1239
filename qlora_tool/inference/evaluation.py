"""The loss on an evaluation set: the mean over all its trained tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qlora_tool.data.batches import collate
from qlora_tool.data.examples import Examples, as_examples

if TYPE_CHECKING:
    from qlora_tool.data.tokenize import Dataset
    from qlora_tool.model.causal_lm import CausalLM


@dataclass(frozen=True)
class EvaluationResult:
    """The mean loss over `tokens` trained tokens."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


@torch.no_grad()
def evaluate_loss(model: CausalLM, dataset: Dataset | Examples, batch_size: int, pad_token_id: int) -> EvaluationResult:
    """Run the whole set through the model, rows of like length together; their order does not change a sum.

    Args:
        batch_size: rows at a time.
        pad_token_id: what fills short rows up; masked out.
    """
    training = model.module.training
    model.module.eval()
    examples = dataset if isinstance(dataset, Examples) else as_examples(dataset.examples)
    lengths = examples.lengths
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
    total, tokens = 0.0, 0
    for start in range(0, len(by_length), batch_size):
        rows = [[examples[index]] for index in by_length[start : start + batch_size]]
        batch = collate(rows, pad_token_id=pad_token_id, packing=False).to(model.device)
        total += float(model.loss_sum(batch))
        tokens += batch.trained_tokens
    model.module.train(training)
    return EvaluationResult(total / tokens, tokens)
