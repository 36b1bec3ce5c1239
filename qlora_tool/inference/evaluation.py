"""The loss on an evaluation set: the mean over all its trained tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qlora_tool.data.batches import collate
from qlora_tool.data.examples import Examples, as_examples
from qlora_tool.terminal import progress
from qlora_tool.world import ALONE, World

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
def evaluate_loss(
    model: CausalLM, dataset: Dataset | Examples, batch_size: int, pad_token_id: int, world: World = ALONE
) -> EvaluationResult:
    """Run the whole set through the model, rows of like length together; their order does not change a sum.

    Args:
        batch_size: rows at a time.
        pad_token_id: what fills short rows up; masked out.
        world: the processes that share the set, each of which gets the result.
    """
    training = model.module.training
    model.module.eval()
    examples = dataset if isinstance(dataset, Examples) else as_examples(dataset.examples)
    lengths = examples.lengths
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
    starts = range(0, len(by_length), batch_size)
    total, tokens = 0.0, 0
    with progress("evaluating", len(by_length), "rows") as bar:
        for turn in range(0, len(starts), world.size):
            # A process without a batch of its own goes through the first one, as weights may come from all of them.
            counts = turn + world.rank < len(starts)
            start = starts[turn + world.rank if counts else 0]
            rows = [[examples[index]] for index in by_length[start : start + batch_size]]
            batch = collate(rows, pad_token_id=pad_token_id, packing=False).to(model.device)
            total += counts * float(model.loss_sum(batch))
            tokens += counts * batch.trained_tokens
            bar.advance(len(rows) * world.size)
    model.module.train(training)
    total, tokens = world.sums([total, tokens])
    return EvaluationResult(total / tokens, int(tokens))
