"""How long a run is, and which examples each of its steps sees."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qlora_tool.config import Config, with_values
from qlora_tool.data.batches import EpochPlan, plan_epoch
from qlora_tool.sizes import counted
from qlora_tool.training.schedule import warmup_length

STEPS_TO_LEARN = 100
"""`num_train_epochs: auto` goes through few rows as often as makes this many steps."""
SHORT_RUN = 30
"""Steps; of a run of fewer a warning says that little is learned."""


@dataclass(frozen=True)
class StepPlan:
    """Which examples each optimizer step sees.

    Attributes:
        config: the run's, with the number of epochs decided.
        lengths: tokens of every training example.
        steps_per_epoch, total_steps: optimizer steps.
        decided: why there are as many epochs as there are, where the configuration left that open; else None.
        processes: that take the micro-batches of a step in turn.
    """

    config: Config
    lengths: Sequence[int]
    steps_per_epoch: int
    total_steps: int
    decided: str | None = None
    processes: int = 1

    @classmethod
    def of(cls, config: Config, lengths: Sequence[int], processes: int = 1) -> StepPlan:
        training = config.training
        passes = training.gradient_accumulation_steps * processes
        steps_per_epoch = math.ceil(len(epoch_batches(config, lengths, 0)) / passes)
        if training.max_steps != -1:
            return cls(config, lengths, steps_per_epoch, training.max_steps, processes=processes)
        epochs, decided = training.num_train_epochs, None
        if epochs == "auto":
            epochs = epochs_to_learn(steps_per_epoch)
            decided = _why(epochs, steps_per_epoch)
            config = with_values(config, {"training.num_train_epochs": epochs})
        return cls(config, lengths, steps_per_epoch, math.ceil(epochs * steps_per_epoch), decided, processes)

    @property
    def epochs(self) -> float:
        """How often the data is gone through."""
        return self.total_steps / self.steps_per_epoch

    def steps(self, done: int) -> Iterator[Sequence[list[list[int]]]]:
        """The micro-batches (rows of example indices) of every step after the first `done`, those of all processes."""
        size = self.config.training.gradient_accumulation_steps * self.processes
        for epoch in range(done // self.steps_per_epoch, math.ceil(self.epochs)):
            batches = epoch_batches(self.config, self.lengths, epoch)
            for index in range(self.steps_per_epoch):
                step = epoch * self.steps_per_epoch + index
                if done <= step < self.total_steps:
                    yield batches[index * size : (index + 1) * size]

    def describe(self) -> str:
        """The run's length in a line."""
        why = f"; {self.decided}" if self.decided else ""
        return f"{counted(self.total_steps, 'step')} ({self.steps_per_epoch} an epoch{why})"

    def too_short(self) -> str | None:
        """What to say of a run that is too short to learn much, with the line that mends it; None of a longer one."""
        if self.total_steps >= SHORT_RUN:
            return None
        training = self.config.training
        epochs = epochs_to_learn(self.steps_per_epoch)
        found = f"this run has {counted(self.total_steps, 'optimizer step')}, and of fewer than {SHORT_RUN} little " \
                "is learned"  # fmt: skip
        if training.max_steps != -1:
            return f"{found}: as a try that will do; else leave training.max_steps out"
        cures = [f"set training.num_train_epochs: auto (here {epochs})"]
        if training.per_device_train_batch_size * training.gradient_accumulation_steps * self.processes > 1:
            cures.append("make a step smaller with training.per_device_train_batch_size and "
                         "training.gradient_accumulation_steps")  # fmt: skip
        if self.config.data.packing:
            cures.append("set data.packing: false, so that each example is a row")
        return f"{found}: {', or '.join(cures)}"

    def without_effect(self) -> list[str]:
        """What to say of settings that a run this short never comes to, with the lines that mend them."""
        training, total = self.config.training, self.total_steps
        said, warmup = [], warmup_length(training.warmup_steps, total)
        if warmup > total:
            highest = training.learning_rate * total / warmup
            said.append(f"training.warmup_steps: {warmup}, but this run has {counted(total, 'step')}: the learning "
                        f"rate gets no higher than {highest:.2e} of {training.learning_rate:.2e}; set it to less, such "
                        "as 0.03, a share of all steps")  # fmt: skip
        before_the_end = (total - 1) // training.eval_steps if training.eval_steps else None
        if training.load_best_model_at_end and before_the_end == 0:
            said.append(f"training.load_best_model_at_end: true, but this run has {counted(total, 'step')} and "
                        f"training.eval_steps is {training.eval_steps}: the last adapter is the only one to choose "
                        "from; lower training.eval_steps")  # fmt: skip
        patience = training.early_stopping_patience
        if patience is not None and before_the_end is not None and before_the_end <= patience:
            said.append(f"training.early_stopping_patience: {patience}, but this run has "
                        f"{counted(before_the_end, 'evaluation')} before its end, too few to stop early; lower "
                        "training.eval_steps or the patience")  # fmt: skip
        return said


def epochs_to_learn(steps_per_epoch: int) -> int:
    """What `num_train_epochs: auto` stands for: one pass, or as many as make `STEPS_TO_LEARN` steps."""
    return max(1, math.ceil(STEPS_TO_LEARN / steps_per_epoch))


def _why(epochs: int, steps_per_epoch: int) -> str:
    chosen = f"num_train_epochs: auto is {epochs}"
    if epochs == 1:
        return f"{chosen}, as one pass has at least {STEPS_TO_LEARN} steps"
    one = counted(steps_per_epoch, "step")
    return f"{chosen}, as one pass has {one} and a run needs some {STEPS_TO_LEARN} to learn"


def epoch_batches(config: Config, lengths: Sequence[int], epoch: int) -> EpochPlan:
    """The micro-batches of an epoch, each of rows of example indices."""
    return plan_epoch(
        lengths, batch_size=config.training.per_device_train_batch_size, max_length=config.data.max_length,
        packing=config.data.packing, shuffle=config.data.shuffle, seed=config.training.seed, epoch=epoch,
        group_by_length=config.training.group_by_length,
    )  # fmt: skip
