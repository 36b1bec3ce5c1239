"""The training run, top to bottom: prepare, step, log, evaluate, save, resume."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from qlora_tool.adapters.attach import AdapterSet
from qlora_tool.adapters.peft_files import save_adapter
from qlora_tool.build import Setup
from qlora_tool.config import Config, TrainingConfig
from qlora_tool.data.batches import Batch, collate, plan_epoch
from qlora_tool.data.preview import first_row
from qlora_tool.errors import MachineError, UserError
from qlora_tool.files.atomic import replacing_folder, write_json
from qlora_tool.inference.evaluation import EvaluationResult, evaluate_loss
from qlora_tool.model.causal_lm import CausalLM
from qlora_tool.model.tokenizer_files import save_tokenizer
from qlora_tool.ops.products import products_choice, use_products
from qlora_tool.run_folder import RunFolder
from qlora_tool.training.checkpoints import Progress, load_checkpoint, save_checkpoint
from qlora_tool.training.interrupt import Interrupted, StopRequest
from qlora_tool.training.optimizers import LOSS_SCALE_FLOOR, Optimizer, make_optimizer, parameter_groups
from qlora_tool.training.preconditions import refuse_at_once, refuse_dtype
from qlora_tool.training.prepare import describe, prepare_data, provenance
from qlora_tool.training.progress import LiveLine, Metrics, Speed, peak_memory_bytes
from qlora_tool.training.read_late import LateNumbers, StepNumbers
from qlora_tool.training.resume import checkpoint_at, checkpoint_to_resume, refuse_another_run
from qlora_tool.training.run_data import RunData
from qlora_tool.training.schedule import learning_rate, warmup_length
from qlora_tool.training.step import During, StepSettings, no_phases, train_step

if TYPE_CHECKING:
    from accelerate import Accelerator

    from qlora_tool.model.checkpointing import Recomputation

logger = logging.getLogger(__name__)

EPOCHS_LOOKED_AT = 10  # for the largest batch


@dataclass
class Run:
    """A training run and where it stands.

    `padding_free`: whether rows are laid one after the other, as asked for and as the family allows.
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

    @property
    def training(self) -> TrainingConfig:
        return self.config.training


@dataclass(frozen=True)
class StepPlan:
    """Which examples each optimizer step sees.

    Attributes:
        config: the run's.
        lengths: tokens of every training example.
        steps_per_epoch, total_steps: optimizer steps.
    """

    config: Config
    lengths: Sequence[int]
    steps_per_epoch: int
    total_steps: int

    @classmethod
    def of(cls, config: Config, lengths: Sequence[int]) -> StepPlan:
        micro_batches = len(epoch_batches(config, lengths, 0))
        steps_per_epoch = math.ceil(micro_batches / config.training.gradient_accumulation_steps)
        total = config.training.max_steps
        if total == -1:
            total = math.ceil(config.training.num_train_epochs * steps_per_epoch)
        return cls(config, lengths, steps_per_epoch, total)

    @property
    def epochs(self) -> float:
        """How often the data is gone through."""
        return self.total_steps / self.steps_per_epoch

    def steps(self, done: int) -> Iterator[list[list[list[int]]]]:
        """The micro-batches (rows of example indices) of every step after the first `done`."""
        size = self.config.training.gradient_accumulation_steps
        for epoch in range(done // self.steps_per_epoch, math.ceil(self.epochs)):
            batches = epoch_batches(self.config, self.lengths, epoch)
            for index in range(self.steps_per_epoch):
                step = epoch * self.steps_per_epoch + index
                if done <= step < self.total_steps:
                    yield batches[index * size : (index + 1) * size]


def epoch_batches(config: Config, lengths: Sequence[int], epoch: int) -> Sequence[list[list[int]]]:
    """The micro-batches of an epoch, each of rows of example indices."""
    return plan_epoch(
        lengths, batch_size=config.training.per_device_train_batch_size, max_length=config.data.max_length,
        packing=config.data.packing, shuffle=config.data.shuffle, seed=config.training.seed, epoch=epoch,
        group_by_length=config.training.group_by_length,
    )  # fmt: skip


class Watcher(Protocol):
    """Whoever wants to see what a run takes; the memory report, say."""

    def check(self, setup: Setup, batch: Batch) -> Recomputation | None:
        """Told the largest batch before the weights are read; raises where it will not fit. Gives what is recomputed
        in backward, where the configuration leaves that to it."""

    def watch(self, run: Run) -> AbstractContextManager[During]:
        """Open around one early step; gives what `train_step` tells its phases to."""


def train(
    config: Config,
    *,
    resume: str = "auto",
    overwrite: bool = False,
    dry_run: bool = False,
    watcher: Watcher | None = None,
) -> Run:
    """Train what the configuration describes and leave the run's folder behind.

    Args:
        resume: auto, never, or a checkpoint's path.
        overwrite: an earlier run in the folder may be replaced.
        dry_run: stop before the first step; nothing is written.
        watcher: sees the largest batch before the weights are read, and the second step.

    Raises:
        UserError: the configuration, the data or the model is at fault, or the run does not fit.
        MachineError: the disk, the network or the device is at fault, or the loss is not a number.
        Interrupted: a signal asked to stop; a checkpoint was saved.
    """
    refuse_at_once(config)
    if resume not in ("auto", "never"):
        checkpoint_at(Path(resume))
    setup = Setup.of(config)
    refuse_dtype(config, setup.compute_dtype)
    folder = RunFolder(Path(config.training.output_dir))
    checkpoint = checkpoint_to_resume(folder, setup.config, resume, overwrite)
    if checkpoint is not None and (products := Progress.read(checkpoint).products):
        use_products(products)  # before anything is predicted or computed
    data, setup = prepare_data(setup)
    config = setup.config
    largest = _largest_batch(config, data, setup.padding_free)
    built = setup.build(recomputation=watcher.check(setup, largest) if watcher is not None else None)
    model, adapters = built.model, built.adapters
    for line in describe(built, config.adapter.init_from):
        logger.info(line)
    for remark in built.remarks:
        logger.warning(remark)
    optimizer = make_optimizer(config.training, parameter_groups(adapters))
    plan = StepPlan.of(config, data.train.lengths)
    run = Run(config, folder, data, model, adapters, optimizer, plan, setup.padding_free)
    logger.info("run: %d steps (%d an epoch) into %s", plan.total_steps, plan.steps_per_epoch, folder.path)
    logger.info(first_row(data.train, next(plan.steps(0))[0][0], data.tokenizer))
    if checkpoint is not None:
        refuse_another_run(checkpoint, config)
    if dry_run:
        return run
    torch.manual_seed(config.training.seed)  # dropout's alone: what was drawn until here does not matter
    _take_over(run, checkpoint)
    folder.write_config(config)
    _fit(run, watcher)
    _save_adapter(run)
    return run


def _largest_batch(config: Config, data: RunData, padding_free: bool) -> Batch:
    """Of all epochs, the batch whose tensor has the most tokens; each epoch deals the rows anew. Of two that have as
    many, one that needs a mask takes more, and then one with more tokens that are trained."""
    lengths, labels, examples = data.train.lengths, data.train.trained, data.train.examples
    epochs = math.ceil(StepPlan.of(config, lengths).epochs)
    packing = config.data.packing

    def size(rows: list[list[int]]) -> tuple[int, bool, int]:
        tokens = [sum(lengths[index] for index in row) for row in rows]
        trained = sum(labels[index] for row in rows for index in row)
        if padding_free and not packing:
            return sum(tokens), False, trained
        return len(tokens) * max(tokens), not packing and len(set(tokens)) > 1, trained

    looked_at = range(min(epochs, EPOCHS_LOOKED_AT))
    batches = (batch for epoch in looked_at for batch in epoch_batches(config, lengths, epoch))
    chosen = [[examples[index] for index in row] for row in max(batches, key=size)]
    return collate(chosen, pad_token_id=data.pad_token_id, packing=packing, padding_free=padding_free)


def _take_over(run: Run, checkpoint: Path | None) -> None:
    """Load the checkpoint, if there is one, and clear the folder of what comes after it."""
    if checkpoint is not None:
        run.progress = load_checkpoint(checkpoint, run.adapters, run.optimizer)
        if run.progress.step > run.plan.total_steps:
            raise UserError(
                f"{checkpoint}: {run.progress.step} steps were trained, but this run has {run.plan.total_steps}; give "
                "more training.max_steps, or resume from an earlier checkpoint"
            )
        logger.info("resumed: step %d, from %s", run.progress.step, checkpoint)
    if run.model.device.type == "cpu":
        run.progress.products = products_choice()
    if checkpoint is not None and run.folder.holds(checkpoint):
        run.folder.rewind(run.progress.step)
    elif run.folder.holds_run():
        run.folder.clear()


def _fit(run: Run, watcher: Watcher | None) -> None:
    """All steps that are left, with what is written and shown around them."""
    run.accelerator = _start_trackers(run)
    total = run.plan.total_steps
    try:
        with StopRequest() as stop, LiveLine(total, run.progress.step) as line:
            _take_steps(run, stop, line, watcher)
    finally:
        if run.accelerator is not None:
            run.accelerator.end_training()


def _take_steps(run: Run, stop: StopRequest, line: LiveLine, watcher: Watcher | None) -> None:
    metrics, speed, late = Metrics(run.folder.metrics_file), Speed(), LateNumbers()
    run.model.module.train()
    settings = StepSettings.of(run.training)
    total, first = run.plan.total_steps, run.progress.step
    for micro_batches in run.plan.steps(run.progress.step):
        batches = [_collate(run, rows).to(run.model.device) for rows in micro_batches]
        rate = _learning_rate(run)
        watched = watcher is not None and run.progress.step == first + 1  # the optimizer's state is there by then
        with watcher.watch(run) if watched else nullcontext(no_phases) as during:
            result = train_step(run.model, run.optimizer, batches, settings, rate, during)
        tokens, trained = (sum(getattr(batch, key) for batch in batches) for key in ("tokens", "trained_tokens"))
        run.progress.step_done(tokens)
        step = run.progress.step
        rows = [where for batch in batches for where in batch.where]
        late.add(step, result.loss, result.grad_norm, trained, run.optimizer.loss_scale, rows)
        evaluated = _is_due(step, run.training.eval_steps, total) and run.data.evaluations
        logged = evaluated or step % run.training.logging_steps == 0 or step == total
        saving = step % run.training.save_steps == 0 or step == total
        # The first two steps are read at once for the sake of the speed, which leaves them out or counts from them.
        numbers = _read(run, late, leave=0 if logged or saving or step <= first + 2 else 1)
        speed.step_done(tokens, counted=not watched)
        record = _record(run, numbers, rate, speed.take()) if logged else None
        paused = speed.pause()
        if evaluated:
            record |= _evaluate(run, line)
        if record is not None:
            metrics.write(record)
            if run.accelerator is not None:
                run.accelerator.log({k: v for k, v in record.items() if k != "step" and v is not None}, step=step)
        line.step(step, record)
        if saving or stop.signal_number:
            _read(run, late, leave=0)  # nothing is saved of a step whose loss is no number
            limit = run.training.save_total_limit
            saved = save_checkpoint(run.folder, run.progress, run.adapters, run.optimizer, limit)
            if stop.signal_number and step < total:
                raise Interrupted(stop.signal_number, [
                    f"stopped after step {step} of {total}; saved {saved}",
                    f"`qlora-tool train {run.folder.config_file}` goes on from there",
                ])  # fmt: skip
        speed.resume(paused)


def _collate(run: Run, rows: list[list[int]]) -> Batch:
    examples = [[run.data.train.examples[index] for index in row] for row in rows]
    return collate(
        examples, pad_token_id=run.data.pad_token_id, packing=run.config.data.packing, padding_free=run.padding_free
    )


def _learning_rate(run: Run) -> float:
    training, total = run.training, run.plan.total_steps
    warmup = warmup_length(training.warmup_steps, total)
    return learning_rate(run.progress.step, training.learning_rate, training.lr_scheduler_type, warmup, total)


def _is_due(step: int, every: int | None, total: int) -> bool:
    return step == total or (every is not None and step % every == 0)


def _read(run: Run, late: LateNumbers, leave: int) -> StepNumbers | None:
    """Take in the numbers of all steps but the last `leave`; those of the last that was read. So that a step whose
    numbers are none is noticed, at the latest, after the step that follows it, and nothing is written between."""
    numbers = None
    for numbers in late.read(leave):
        run.progress.loss_known(numbers.trained_tokens, numbers.loss)
        _refuse_no_number(run, numbers)
    return numbers


def _record(run: Run, numbers: StepNumbers, rate: float, speed: float | None) -> dict[str, Any]:
    """What is logged of the steps since the last record: the loss over all their trained tokens."""
    return {
        "step": run.progress.step,
        "epoch": round(run.progress.step / run.plan.steps_per_epoch, 4),
        "loss": run.progress.take_loss(),
        "learning_rate": rate,
        "grad_norm": numbers.grad_norm,
        "tokens_per_second": None if speed is None else round(speed, 1),
        "peak_memory_bytes": peak_memory_bytes(run.model.device),
    }


def _evaluate(run: Run, line: LiveLine) -> dict[str, float]:
    """The loss on every evaluation set, as `eval_loss` or, with several sets, `eval_NAME_loss` too."""
    results: dict[str, EvaluationResult] = {}
    for name, dataset in run.data.evaluations.items():
        results[name] = evaluate_loss(
            run.model, dataset, run.training.per_device_train_batch_size, run.data.pad_token_id
        )
        line.say(f"step {run.progress.step}: {name} loss {results[name].loss:.4f} over {results[name].tokens} tokens")
    first = next(iter(results.values()))
    named = {f"eval_{name}_loss": result.loss for name, result in results.items()} if len(results) > 1 else {}
    return {"eval_loss": first.loss, **named}


def _refuse_no_number(run: Run, numbers: StepNumbers) -> None:
    """Stop where the loss is not a number, or the gradients are none and the optimizer had no scale left to lower."""
    loss, norm = numbers.loss, numbers.grad_norm
    if math.isfinite(loss) and (math.isfinite(norm) or numbers.loss_scale > LOSS_SCALE_FLOOR):
        return
    found = f"the norm of the gradients is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
    saved = run.folder.checkpoint_folders()
    rows = numbers.rows
    raise MachineError(
        f"step {numbers.step}: {found}, on rows {', '.join(rows[:8])}{' and more' if len(rows) > 8 else ''}; the "
        f"last good checkpoint is {saved[-1] if saved else 'none yet'}; lower training.learning_rate, or set "
        "training.max_grad_norm"
    )


def _start_trackers(run: Run) -> Accelerator | None:
    """The trackers of `report_to`; None where there are none."""
    if not (names := run.training.report_to):
        return None
    from accelerate import Accelerator

    # It only writes: the device is none of its business, and of one process it takes one answer for good.
    accelerator = Accelerator(cpu=True, log_with=names, project_dir=run.folder.path)
    flat = {f"{section}.{key}": value if isinstance(value, (int, float, str, bool)) else str(value)
            for section, values in run.config.model_dump().items() for key, value in values.items()}  # fmt: skip
    accelerator.init_trackers("qlora-tool", flat)
    return accelerator


def _save_adapter(run: Run) -> None:
    """The adapter in PEFT's format, with the tokenizer and our provenance beside it."""
    base = run.config.model.name_or_path
    with replacing_folder(run.folder.adapter) as temporary:
        save_tokenizer(run.data.tokenizer, run.model.folder, temporary)
        save_adapter(
            temporary, run.adapters, run.config.adapter, run.model.module,
            str(run.model.folder) if base == "demo" else base, run.config.model.revision,
        )  # fmt: skip
        write_json(temporary / "qlora_tool.json", provenance(run.config, run.model, run.data))
