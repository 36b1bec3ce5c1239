"""What training makes small: of a batch, the sum of its losses and what that sum is divided by.

`train_step` knows nothing else of it. Within an objective the adapters can be switched off
(`AdapterSet.disabled`): the model is then the untrained one, a reference that takes no memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from qlora_tool.data.batches import Batch
    from qlora_tool.model.causal_lm import CausalLM


class Objective(Protocol):
    """A kind of training."""

    def weight(self, batch: Batch) -> float:
        """What the batch counts for: losses are summed over a global batch and divided by the sum of these."""
        ...

    def loss_sum(self, model: CausalLM, batch: Batch) -> Tensor:
        """The sum of the batch's losses, a scalar in fp32."""
        ...


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of every trained token, each of which counts the same.

    Attributes:
        label_smoothing: share of the target that is spread evenly over the vocabulary.
    """

    label_smoothing: float = 0.0

    def weight(self, batch: Batch) -> float:
        """The trained tokens."""
        return batch.trained_tokens

    def loss_sum(self, model: CausalLM, batch: Batch) -> Tensor:
        """See `CausalLM.loss_sum`."""
        return model.loss_sum(batch, self.label_smoothing)

    def by_example(self, model: CausalLM, batch: Batch) -> Tensor:
        """The same sum for each example of the batch, fp32, (examples,), in order; differentiable."""
        return model.example_losses(batch, self.label_smoothing)
