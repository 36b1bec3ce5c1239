"""One optimizer step, from micro-batches to new weights: the same function trains, measures and predicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qlora_tool.training.objective import NextToken, Objective
from qlora_tool.world import ALONE, World

if TYPE_CHECKING:
    from qlora_tool.config import TrainingConfig
    from qlora_tool.data.batches import Batch
    from qlora_tool.model.causal_lm import CausalLM
    from qlora_tool.training.optimizers import Optimizer


@dataclass(frozen=True)
class StepSettings:
    """What a step needs to know of the configuration.

    Attributes:
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them.
        objective: what the step makes small.
    """

    max_grad_norm: float = 1.0
    objective: Objective = field(default_factory=NextToken)

    @classmethod
    def of(cls, training: TrainingConfig) -> StepSettings:
        return cls(training.max_grad_norm, NextToken(training.label_smoothing_factor))


@dataclass(frozen=True)
class StepResult:
    """What a step gives back, as tensors: reading them waits for the device.

    Attributes:
        loss: mean over the trained tokens of all micro-batches, fp32.
        grad_norm: of all gradients, before clipping, fp32.
    """

    loss: Tensor
    grad_norm: Tensor


During = Callable[[str], AbstractContextManager]


def no_phases(phase: str) -> AbstractContextManager:
    """Nobody wants to know of phases."""
    return nullcontext()


def train_step(
    model: CausalLM,
    optimizer: Optimizer,
    micro_batches: Sequence[Batch],
    settings: StepSettings,
    learning_rate: float,
    during: During = no_phases,
    world: World = ALONE,
) -> StepResult:
    """Forward and backward over the micro-batches, then one optimizer step.

    The loss is the sum of the objective's over all micro-batches, divided by their weights together: each trained token
    of the global batch counts the same, so neither accumulation nor the number of rows changes it.

    Args:
        micro_batches: on the model's device.
        learning_rate: of this step.
        during: called with `forward`, `backward` and `optimizer`; its context is open in that phase.
        world: the processes that take the step together, each with micro-batches of its own: the loss, the gradients
            and their norm are those of all.
    """
    objective = settings.objective
    total = world.sums([sum(objective.weight(batch) for batch in micro_batches)])[0]
    loss = torch.zeros((), dtype=torch.float32, device=model.device)
    for batch in micro_batches:
        with during("forward"):
            part = objective.loss_sum(model, batch) / total
            scaled = part * optimizer.loss_scale
        with during("backward"):
            optimizer.before_backward(learning_rate, accumulate=len(micro_batches) * world.size > 1)
            scaled.backward()
        loss += part.detach()
    if world.size > 1:
        with during("optimizer"):
            optimizer.sum_over(world)
    with during("optimizer"):  # by itself, as its gradients are the sums from here on
        grad_norm = optimizer.step(learning_rate, settings.max_grad_norm)
    return StepResult(world.sum(loss), grad_norm)
