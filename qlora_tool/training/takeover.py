"""A run's folder taken over: by one process at a time, and with nothing lost of what lies in it."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from qlora_tool.errors import UserError
from qlora_tool.files.atomic import disk_errors
from qlora_tool.files.lock import locked, refuse_locked
from qlora_tool.ops.products import products_choice
from qlora_tool.run_folder import RunFolder
from qlora_tool.sizes import counted, noun_of
from qlora_tool.training.best import out_of_patience, take_best_along
from qlora_tool.training.checkpoints import Checkpoint, Progress
from qlora_tool.training.going_on import busy_folder
from qlora_tool.training.plan import StepPlan
from qlora_tool.training.run import Run
from qlora_tool.world import World

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def alone_in(path: Path, world: World, dry_run: bool) -> Iterator[None]:
    """Hold the lock of a run's folder; the first of several processes holds it for all.

    Args:
        dry_run: nothing is written: a lock that another process holds is refused all the same.

    Raises:
        UserError: another process trains into the folder, or the folder is none.
        MachineError: the folder cannot be written.
    """
    folder = RunFolder(path)
    busy = busy_folder(path)
    with contextlib.ExitStack() as held:

        def hold() -> None:
            folder.refuse_foreign()
            if dry_run:
                refuse_locked(folder.lock, busy)
            else:
                held.enter_context(locked(folder.lock, busy))

        world.on_main(hold)
        try:
            yield
        except OSError as error:  # of a call that nothing else gives a line to
            where = error.filename
            if not isinstance(where, (str, bytes)) or not Path(os.fsdecode(where)).is_relative_to(path):
                raise
            with disk_errors(Path(os.fsdecode(where))):
                raise


def refuse_nothing_left(checkpoint: Checkpoint, plan: StepPlan) -> None:
    """Refuse to go on with a run for longer that would end where the checkpoint is.

    Raises:
        UserError: naming the key to raise.
    """
    progress, training = checkpoint.progress, plan.config.training
    if progress.step >= plan.total_steps:
        raise UserError(
            f"--extend: {checkpoint.path} is of step {progress.step}, and this run has {plan.total_steps}; raise "
            f"training.{'num_train_epochs' if training.max_steps == -1 else 'max_steps'}"
        )
    if out_of_patience(progress, plan.config):
        since = progress.evaluations_since_best
        raise UserError(
            f"--extend: {checkpoint.path}: {counted(since, 'evaluation')} {noun_of(since, 'was', 'were')} no better "
            f"than the best, and training.early_stopping_patience is {training.early_stopping_patience}; raise it, "
            "or set it to null"
        )


def take_over(run: Run, checkpoint: Checkpoint | None) -> None:
    """Load the checkpoint, if there is one, and clear the folder of what comes after it."""
    if checkpoint is not None:
        run.progress = checkpoint.load(run.adapters, run.optimizer, run.world)
        if (step := run.progress.step) > run.plan.total_steps:
            raise UserError(
                f"{checkpoint.path}: {counted(step, 'step')} {noun_of(step, 'was', 'were')} trained, but this run has "
                f"{run.plan.total_steps}; "
                "give more training.max_steps, or resume from an earlier checkpoint"
            )
        varies = run.model.device.type != "cpu" and not run.training.full_determinism
        about = "; on a card not to the bit (training.full_determinism)" if varies else ""
        logger.info("resumed: step %d, from %s%s", run.progress.step, checkpoint.path, about)
    if run.model.device.type == "cpu":
        run.progress.products = products_choice()
    run.progress.global_passes = run.training.gradient_accumulation_steps * run.world.size
    run.progress = run.world.on_main(partial(_tidied, run, checkpoint))


def _tidied(run: Run, checkpoint: Checkpoint | None) -> Progress:
    """Where the run stands, its folder without what comes after that."""
    if checkpoint is not None and run.folder.holds(checkpoint.path):
        if (aside := run.folder.rewind(run.progress.step)) is not None:
            logger.info("run: what lay in %s of later steps is kept in %s", run.folder.path, aside)
    elif run.folder.holds_run():
        is_worth_keeping = run.folder.adapter.exists() or run.folder.checkpoint_folders()
        aside = run.folder.put_aside()
        if is_worth_keeping:
            logger.info("run: the one that this replaces is kept in %s until this one is done", aside)
        else:
            run.folder.remove_replaced(aside)
    if checkpoint is not None:
        take_best_along(run.progress, run.config, checkpoint.path, run.folder)
    return run.progress


def remove_replaced(folder: RunFolder) -> None:
    """Remove the runs that this one, which is done, replaces."""
    for path in folder.remove_replaced():
        logger.warning("%s: keeps what no run is known to have written; remove it if you do not need it", path)
