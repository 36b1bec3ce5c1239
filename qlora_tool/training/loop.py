"""The training run, top to bottom: prepare, step, log, evaluate, save, resume."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy
import torch

from qlora_tool.adapters.initial import started_from
from qlora_tool.artifacts import changed_base_of
from qlora_tool.build.build import Start
from qlora_tool.build.setup import Setup
from qlora_tool.config import Config
from qlora_tool.data.batches import Batch, collate
from qlora_tool.data.preview import first_row
from qlora_tool.errors import MachineError
from qlora_tool.inference.evaluation import EvaluationResult, evaluate_loss
from qlora_tool.model.devices import choose_device
from qlora_tool.model.streamed_base import disk_of
from qlora_tool.ops.determinism import full_determinism
from qlora_tool.ops.products import use_products
from qlora_tool.run_folder import RunFolder
from qlora_tool.sizes import counted
from qlora_tool.training.belonging import belongs_to, made_by
from qlora_tool.training.best import best_so_far, metric_of, note_evaluation
from qlora_tool.training.checkpoints import save_checkpoint
from qlora_tool.training.finish import finish, save_trained, start_trackers
from qlora_tool.training.going_on import checkpoint_at
from qlora_tool.training.how_long import note_speed
from qlora_tool.training.interrupt import Interrupted, StopRequest
from qlora_tool.training.optimizers import LOSS_SCALE_FLOOR, make_optimizer, parameter_groups
from qlora_tool.training.plan import StepPlan, epoch_batches
from qlora_tool.training.preconditions import refuse_at_once, refuse_dtype
from qlora_tool.training.prepare import choices_made, describe, prepare_data, run_lines
from qlora_tool.training.processes import as_it_was, refuse_disagreement, resumed, share_out
from qlora_tool.training.progress import DiskWaits, LiveLine, Metrics, Speed, memory_in_words, peak_memory_bytes
from qlora_tool.training.read_late import LateNumbers, StepNumbers
from qlora_tool.training.resume import refuse_another_run, refuse_changes
from qlora_tool.training.rows_note import note_rows
from qlora_tool.training.run import Run, Watcher
from qlora_tool.training.run_data import RunData
from qlora_tool.training.samples import read_samples, refuse_from_disk
from qlora_tool.training.schedule import learning_rate, warmup_length
from qlora_tool.training.step import StepSettings, no_phases, train_step
from qlora_tool.training.takeover import alone_in, refuse_nothing_left, remove_replaced, take_over
from qlora_tool.world import World

logger = logging.getLogger(__name__)

EPOCHS_LOOKED_AT = 10  # for the largest batch


def train(
    config: Config,
    *,
    resume: str = "auto",
    extend: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    watcher: Watcher | None = None,
    allow_changes: bool = False,
) -> Run:
    """Train what the configuration describes and leave the run's folder behind.

    Args:
        resume: auto, never, or a checkpoint's path.
        extend: the folder's run goes on for longer than it was to.
        overwrite: an earlier run in the folder may be replaced.
        dry_run: stop before the first step; nothing is written.
        watcher: sees the largest batch before the weights are read, and the second step.
        allow_changes: a run goes on though base, data, template, version or keys that change its numbers are others.

    Raises:
        UserError: the configuration, the data or the model is at fault, or the run does not fit.
        MachineError: the disk, the network or the device is at fault, or the loss is not a number.
        Interrupted: a signal asked to stop; a checkpoint was saved.
    """
    refuse_at_once(config)
    device = choose_device(config.model.device).type
    world = World.join(device) if World.launched().size > 1 else World()
    with (world.until_done(), alone_in(Path(config.training.output_dir), world, dry_run),
          full_determinism(config.training.full_determinism and device == "cuda")):  # fmt: skip
        return _train(config, world, Path(resume) if resume not in ("auto", "never") else resume, extend, overwrite,
                      dry_run, watcher, allow_changes)  # fmt: skip


def _train(
    config: Config, world: World, resume: str | Path, extend: bool, overwrite: bool, dry_run: bool,
    watcher: Watcher | None, allow_changes: bool,
) -> Run:  # fmt: skip
    asked = config
    if not isinstance(resume, str):
        world.on_main(partial(checkpoint_at, resume))
    setup = world.locally_first(partial(Setup.of, config))
    refuse_dtype(config, setup.compute_dtype)
    folder = RunFolder(Path(config.training.output_dir))
    checkpoint = world.on_main(
        lambda: resumed(folder, setup.config, str(resume), overwrite, extend, world.size, allow_changes)
    )
    if checkpoint is not None and (products := checkpoint.progress.products):
        use_products(products)  # before anything is predicted or computed
    data, setup = world.locally_first(partial(prepare_data, setup))
    config = setup.config
    plan = StepPlan.of(config, data.train.lengths, world.size)
    config = plan.config
    setup = replace(setup, config=config)
    refuse_disagreement(world, setup, data)
    if checkpoint is not None:
        world.on_main(partial(refuse_another_run, folder, checkpoint.path,
                              as_it_was(config, checkpoint, world.size), str(resume), extend, allow_changes))
        world.on_main(lambda: refuse_changes(checkpoint, belongs_to(config, data), made_by(setup.device, world.size),
                                             allow_changes))  # fmt: skip
        if extend:
            refuse_nothing_left(checkpoint, plan)
    largest = _largest_batch(plan, data, setup.padding_free)
    samples = world.each(partial(read_samples, config, data, setup.model_config, largest.tokens))
    start = Start(data.train.examples, None if checkpoint is None else checkpoint.tensors, dry_run)
    recomputation = None
    if watcher is not None:
        decided = world.on_main(lambda: watcher.check(setup, largest, start))
        recomputation, config = decided.recomputation, decided.config
        setup = replace(setup, config=config)
        refuse_from_disk(config)
    build = partial(setup.build, recomputation=recomputation, start=start)
    kept = config.model.keep_quantized or config.model.weights == "disk"
    built = world.locally_first(build) if kept else world.each(build)
    model, adapters = built.model, built.adapters
    if world.size > 1:
        share_out(model, adapters, config, world)
    elif config.training.sharding != "none":
        logger.warning("training.sharding: %s, but this is one process: nothing is shared out",
                       config.training.sharding)  # fmt: skip
    for line in choices_made(asked, config):
        logger.debug(line)
    for line in describe(built, config.adapter):
        logger.info(line)
    for remark in built.remarks:
        logger.warning(remark)
    if (other := world.on_main(partial(_another_base, config, model.folder))) is not None:
        logger.warning("adapter.init_from: %s: it starts on another base than its own", other)
    optimizer = make_optimizer(config.training, parameter_groups(adapters))
    run = Run(config, folder, data, model, adapters, optimizer, plan, setup.padding_free, world=world,
              samples=samples)  # fmt: skip
    for line in run_lines(run, 0 if checkpoint is None else checkpoint.progress.step, dry_run):
        logger.info(line)
    logger.info(first_row(data.train, next(plan.steps(0))[0][0], data.tokenizer))
    for warning in [plan.too_short(), *plan.without_effect()]:
        if warning is not None:
            logger.warning(warning)
    if dry_run:
        return run
    # Dropout's alone: what was drawn until here does not matter. No two processes drop the same.
    torch.manual_seed((config.training.seed + world.rank) % 2**64)
    take_over(run, checkpoint)
    world.advise("start it again with the same launcher: it begins anew, as no checkpoint is there yet "
                 "(training.save_steps)" if checkpoint is None else
                 f"start it again with the same launcher: it goes on from {checkpoint.path}")  # fmt: skip
    world.on_main(partial(folder.write_config, config))
    world.on_main(partial(note_rows, run))
    if run.progress.step == 0:
        run.progress.untuned = {"loss": _loss_of_the_base(run)} | _evaluate(run, logger.info)
        run.answer_samples(logger.info)
    _fit(run, watcher)
    finish(run)
    world.on_main(partial(save_trained, run))
    world.on_main(partial(remove_replaced, folder))
    return run


def _another_base(config: Config, folder: Path) -> str | None:
    """That the adapter which a run starts from was trained on other weights than those in `folder`, in words."""
    if (stored := started_from(config.adapter)) is None:
        return None
    return changed_base_of(stored, str(stored.folder), folder)


def _loss_of_the_base(run: Run) -> float:
    """The untuned model's loss on the first training rows.

    Raises:
        MachineError: it is not a number: no learning rate is at fault yet.
    """
    loss = run.sampled_loss()
    if not math.isfinite(loss):
        dtype = run.config.model.compute_dtype
        cure = "set model.compute_dtype: float32, whose range is larger, or " if dtype == "float16" else ""
        raise MachineError(
            f"{run.config.model.name_or_path}: before the first step the loss is {loss}, so the base model itself "
            f"gives no numbers (products in {dtype}); {cure}see whether its weights are whole, or download it again"
        )
    return loss


def _largest_batch(plan: StepPlan, data: RunData, padding_free: bool) -> Batch:
    """Of all epochs, the batch whose tensor has the most tokens; each epoch deals the rows anew. Of two that have as
    many, one that needs a mask takes more, and then one with more tokens that are trained."""
    config, examples = plan.config, data.train.examples
    packing, size = config.data.packing, config.training.per_device_train_batch_size
    found: list[tuple[tuple[int, bool, int], list[list[int]]]] = []
    for epoch in range(min(math.ceil(plan.epochs), EPOCHS_LOOKED_AT)):
        batches = epoch_batches(config, plan.lengths, epoch)
        tokens, trained = batches.sums(plan.lengths), batches.sums(data.train.trained)
        begins = numpy.arange(0, batches.rows, size)
        most, least = numpy.maximum.reduceat(tokens, begins), numpy.minimum.reduceat(tokens, begins)
        if padding_free and not packing:
            total, masked = numpy.add.reduceat(tokens, begins), numpy.zeros(len(begins), dtype=bool)
        else:
            total = most * numpy.diff(begins, append=batches.rows)
            masked = (most > least) & (not packing)
        largest = numpy.lexsort((-begins, numpy.add.reduceat(trained, begins), masked, total))[-1]
        measure = int(total[largest]), bool(masked[largest]), int(numpy.add.reduceat(trained, begins)[largest])
        found.append((measure, batches[int(largest)]))
    chosen = [[examples[index] for index in row] for row in max(found, key=itemgetter(0))[1]]
    return collate(chosen, pad_token_id=data.pad_token_id, packing=packing, padding_free=padding_free)


def _fit(run: Run, watcher: Watcher | None) -> None:
    """All steps that are left, with what is written and shown around them."""
    run.accelerator = start_trackers(run)
    total, speed = run.plan.total_steps, Speed()
    try:
        with StopRequest() as stop, LiveLine(total, run.progress.step, shown=run.world.is_main) as line:
            _take_steps(run, stop, line, speed, watcher)
    except MachineError as error:
        if isinstance(error.__cause__, OSError) and (saved := run.folder.checkpoint_folders()):
            error.lines = [f"{line}; the same command then goes on from {saved[-1]}" for line in error.lines]
        raise
    finally:
        if run.world.is_main:
            note_speed(run.config, run.model.device, run.world.size, speed)
        if run.accelerator is not None:
            run.accelerator.end_training()


def _take_steps(run: Run, stop: StopRequest, line: LiveLine, speed: Speed, watcher: Watcher | None) -> None:
    metrics, late, world = Metrics(run.folder.metrics_file), LateNumbers(), run.world
    run.model.module.train()
    settings, waits = StepSettings.of(run.training), DiskWaits(disk_of(run.model.module))
    total, first = run.plan.total_steps, run.progress.step
    for micro_batches in _steps_left(run):
        batches = run.share(micro_batches)
        rate = _learning_rate(run)
        # The optimizer's state is there by then. One process tells for all.
        watched = watcher is not None and run.progress.step == first + 1 and world.is_main
        with watcher.watch(run) if watched else nullcontext(no_phases) as during:
            result = train_step(run.model, run.optimizer, batches, settings, rate, during, world)
        own = [sum(getattr(batch, key) for batch in batches) for key in ("tokens", "trained_tokens")]
        tokens, trained = (int(count) for count in world.sums(own))
        run.progress.step_done(tokens)
        step = run.progress.step
        rows = [where for batch in batches for where in batch.where]
        late.add(step, result.loss, result.grad_norm, trained, run.optimizer.loss_scale, rows)
        due = _is_due(step, run.training.eval_steps, total)
        evaluated = due and run.data.evaluations
        logged = evaluated or step % run.training.logging_steps == 0 or step == total
        saving = step % run.training.save_steps == 0 or step == total
        # The first two steps are read at once for the sake of the speed, which leaves them out or counts from them.
        numbers = _read(run, late, leave=0 if logged or saving or step <= first + 2 else 1)
        speed.step_done(tokens, counted=not watched)
        if (waiting := waits.step_done()) is not None:
            logger.warning(waiting)
        record = _record(run, numbers, rate, speed.take()) if logged else None
        paused = speed.pause()
        if evaluated:
            losses = _evaluate(run, line.say)
            is_best = note_evaluation(run.progress, metric_of(run.config), losses)
            record |= losses | best_so_far(run.progress, run.config)
            saving = saving or (is_best and run.training.load_best_model_at_end) or run.is_over
        if record is not None and world.is_main:
            metrics.write(record)
            if run.accelerator is not None:
                run.accelerator.log({k: v for k, v in record.items() if k != "step" and v is not None}, step=step)
        if due:
            run.answer_samples(line.say)
        line.step(step, record, memory_in_words(run.model.device, run.tensor_bytes) if logged else "")
        signal_number = int(world.highest(stop.signal_number or 0))
        if saving or signal_number:
            _read(run, late, leave=0)  # nothing is saved of a step whose loss is no number
            saved = save_checkpoint(run.folder, run.progress, run.adapters, run.optimizer, run.training, world,
                                    run.facts)  # fmt: skip
            world.advise(f"start it again with the same launcher: it goes on from step {step} ({saved})")
            if signal_number and not run.is_over:
                raise Interrupted(signal_number, [
                    f"stopped after step {step} of {total}; saved {saved}",
                    f"`qlora-tool train {run.folder.config_file}` goes on from there",
                ], told_elsewhere=not world.is_main)  # fmt: skip
        speed.resume(paused)


def _steps_left(run: Run) -> Iterator[Sequence[list[list[int]]]]:
    """The micro-batches of every step, until the last one or until no evaluation is better than the best."""
    for micro_batches in run.plan.steps(run.progress.step):
        if run.is_over:
            return
        yield micro_batches


def _learning_rate(run: Run) -> float:
    training, total = run.training, run.plan.total_steps
    warmup = warmup_length(training.warmup_steps, total)
    return learning_rate(run.progress.step, training.learning_rate, training.lr_scheduler_type, warmup, total,
                         from_zero=run.progress.warmup_from_zero)  # fmt: skip


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


def _evaluate(run: Run, say: Callable[[str], None]) -> dict[str, float]:
    """The loss on every evaluation set, as `eval_loss` or, with several sets, `eval_NAME_loss` too."""
    results: dict[str, EvaluationResult] = {}
    for name, dataset in run.data.evaluations.items():
        results[name] = evaluate_loss(
            run.model, dataset, run.training.per_device_train_batch_size, run.data.pad_token_id, run.world
        )
        over = counted(results[name].tokens, "token")
        say(f"step {run.progress.step}: {name} loss {results[name].loss:.4f} over {over}")
    if not results:
        return {}
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
