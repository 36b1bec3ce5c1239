"""A training run: all that its steps take, and where it stands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from qlora_tool.adapters.attach import AdapterSet
from qlora_tool.build.build import Start
from qlora_tool.build.setup import Setup
from qlora_tool.config import Config, TrainingConfig
from qlora_tool.data.batches import Batch, collate
from qlora_tool.model.causal_lm import CausalLM
from qlora_tool.run_folder import RunFolder
from qlora_tool.training.belonging import belongs_to, made_by
from qlora_tool.training.best import out_of_patience
from qlora_tool.training.checkpoints import Best, Progress
from qlora_tool.training.optimizers import Optimizer
from qlora_tool.training.outcome import Outcome, sampled_loss
from qlora_tool.training.plan import StepPlan
from qlora_tool.training.progress import Metrics
from qlora_tool.training.run_data import RunData
from qlora_tool.training.step import During
from qlora_tool.world import World

if TYPE_CHECKING:
    from accelerate import Accelerator

    from qlora_tool.model.checkpointing import Recomputation
    from qlora_tool.training.samples import Samples


@dataclass
class Run:
    """A training run and where it stands.

    `padding_free`: whether rows are laid one after the other, as asked for and as the family allows. `tensor_bytes`:
    what tensors take at the peak of a step, where a watcher has seen one. `outcome`: once all steps are done. `world`:
    the processes that take the steps together, of which the first one writes. `samples`: prompts that are answered
    while it trains.
    """

    config: Config
    folder: RunFolder
    data: RunData
    model: CausalLM
    adapters: AdapterSet
    optimizer: Optimizer
    plan: StepPlan
    padding_free: bool = False
    progress: Progress = field(default_factory=Progress)
    accelerator: Accelerator | None = None
    tensor_bytes: int | None = None
    outcome: Outcome | None = None
    world: World = field(default_factory=World)
    samples: Samples | None = None

    @property
    def training(self) -> TrainingConfig:
        return self.config.training

    def collate(self, rows: list[list[int]]) -> Batch:
        """The tensors of a micro-batch, of which rows of example indices are given."""
        examples = [[self.data.train.examples[index] for index in row] for row in rows]
        return collate(
            examples, pad_token_id=self.data.pad_token_id, packing=self.config.data.packing,
            padding_free=self.padding_free,
        )  # fmt: skip

    def share(self, micro_batches: Sequence[list[list[int]]]) -> list[Batch]:
        """This process's micro-batches of a step, on the model's device: as many as every other's, as weights may come
        from all of them, so that the last ones of an epoch's last step may not count."""
        world, given = self.world, len(micro_batches)
        found = []
        for turn in range(0, given, world.size):
            number = turn + world.rank
            batch = self.collate(micro_batches[number if number < given else 0])
            found.append((batch if number < given else batch.uncounted()).to(self.model.device))
        return found

    def sampled_loss(self) -> float:
        """The loss on the rows of the first steps, as the model is now."""
        return sampled_loss(self.model, (self.collate(rows) for step in self.plan.steps(0) for rows in step))

    def answer_samples(self, say: Callable[[str], None]) -> None:
        """Answer the run's prompts as it stands, where it has any: written to `metrics.jsonl`, and shown.

        The first of several processes answers, and the others wait.
        """
        samples, step = self.samples, self.progress.step
        if samples is None:
            return
        answers = self.world.on_main(lambda: samples.answer(self.model, self.data))
        if self.world.is_main:
            Metrics(self.folder.metrics_file).write(samples.record(step, answers))
            samples.show(step, answers, say)

    @property
    def is_over(self) -> bool:
        """Whether no step is left, or no evaluation is better than the best for as long as is waited."""
        return self.progress.step >= self.plan.total_steps or out_of_patience(self.progress, self.config)

    @cached_property
    def _facts(self) -> dict[str, Any]:
        return {"made_by": made_by(self.model.device, self.world.size),
                "belongs_to": belongs_to(self.config, self.data)}  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """What checkpoints say besides: who made them, and what they belong to. Gathered once, at the first one."""
        return self._facts

    @property
    def kept(self) -> Best | None:
        """The evaluation whose adapter is kept; None where that of the last step is."""
        return self.progress.best if self.training.load_best_model_at_end else None

    @property
    def kept_step(self) -> int:
        """The step that the adapter is of."""
        return self.kept.step if self.kept else self.progress.step

    def kept_losses(self) -> dict[str, float]:
        """The losses, by their names in `metrics.jsonl`, of the evaluation of the adapter that is kept."""
        if self.kept:
            return dict(self.kept.losses)
        last = self.folder.last_record()
        return {name: value for name, value in last.items() if name.startswith("eval_")}


@dataclass(frozen=True)
class Decided:
    """What a watcher decided for a run, so that it fits.

    Attributes:
        recomputation: in backward; None: what the configuration says.
        config: of the run, where the watcher settled what that left open.
    """

    recomputation: Recomputation | None
    config: Config


class Watcher(Protocol):
    """Whoever wants to see what a run takes; the memory report, say."""

    def check(self, setup: Setup, batch: Batch, start: Start | None = None) -> Decided:
        """Told the largest batch, and what adapters start from, before the weights are read; raises where it will not
        fit."""

    def watch(self, run: Run) -> AbstractContextManager[During]:
        """Open around one early step; gives what `train_step` tells its phases to."""
