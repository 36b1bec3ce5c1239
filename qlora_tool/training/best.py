"""The best evaluation of a run: which it is, that its checkpoint stays, and when to stop as none is better.

The best one is always a checkpoint like any other: a run that is killed and resumed goes on from that or a later one,
which names it, so that neither the adapter nor the count of evaluations since is lost.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_tool.config import evaluation_losses
from qlora_tool.errors import UserError
from qlora_tool.files.atomic import replacing_folder
from qlora_tool.run_folder import is_checkpoint
from qlora_tool.sizes import counted
from qlora_tool.training.checkpoints import Best, Progress, checkpoint_tensors, read_manifest

if TYPE_CHECKING:
    from qlora_tool.adapters.attach import AdapterSet
    from qlora_tool.config import Config
    from qlora_tool.run_folder import RunFolder

logger = logging.getLogger(__name__)


def metric_of(config: Config) -> str:
    """The name that `metric_for_best_model` has in `metrics.jsonl`."""
    return evaluation_losses(config)[config.training.metric_for_best_model]


def note_evaluation(progress: Progress, metric: str, losses: Mapping[str, float]) -> bool:
    """Take in an evaluation, and say whether it is the best so far: lower than all before it."""
    value, best = losses[metric], progress.best
    if best is None or value < best.value or best.value != best.value:  # better than none is: a number
        progress.best, progress.evaluations_since_best = Best(progress.step, metric, value, dict(losses)), 0
        return True
    progress.evaluations_since_best += 1
    return False


def best_so_far(progress: Progress, config: Config) -> dict[str, float]:
    """What an evaluation's record says of the best one, where that decides anything."""
    training, best = config.training, progress.best
    if best is None or not (training.load_best_model_at_end or training.early_stopping_patience):
        return {}
    return {"best_metric": best.value, "best_step": best.step}


def out_of_patience(progress: Progress, config: Config) -> bool:
    """Whether as many evaluations as `early_stopping_patience` were no better than the best before them."""
    patience = config.training.early_stopping_patience
    return patience is not None and progress.evaluations_since_best >= patience


def take_best_along(progress: Progress, config: Config, checkpoint: Path, folder: RunFolder) -> None:
    """On a resume: see that the best evaluation so far is of the metric that is asked for and has its checkpoint in
    this run's folder, copied where the run goes on in another one. Else forget it, and say so.

    Args:
        checkpoint: the one that is resumed from.
    """
    best = progress.best
    if best is None:
        return
    why = None
    if best.metric != metric_of(config):
        why = f"is of {best.metric}, not of training.metric_for_best_model"
    elif config.training.load_best_model_at_end:
        source = checkpoint if best.step == progress.step else checkpoint.parent / folder.checkpoint(best.step).name
        if not is_checkpoint(source):
            why = f"has no checkpoint left ({source})"
        elif not folder.holds(source):
            with replacing_folder(folder.checkpoint(best.step)) as temporary:
                shutil.copytree(source, temporary, symlinks=True, dirs_exist_ok=True)
    if why is not None:
        logger.warning("the best evaluation so far, %s %.4f after step %d, %s: the best counts anew from here on",
                       best.metric, best.value, best.step, why)  # fmt: skip
        progress.best, progress.evaluations_since_best = None, 0


def load_best(progress: Progress, adapters: AdapterSet, folder: RunFolder) -> None:
    """Put the best evaluation's weights in the place of the last ones.

    Raises:
        UserError: its checkpoint cannot be read.
    """
    best = progress.best
    if best is None or best.step == progress.step:
        return
    path = folder.checkpoint(best.step)
    try:
        read_manifest(path)
        tensors = checkpoint_tensors(path)
    except UserError as error:
        raise UserError(
            f"{error.lines[0].rpartition('; ')[0]}; it is the best evaluation's: set "
            "training.load_best_model_at_end: false to keep the last step's adapter"
        ) from error
    adapters.load(tensors, str(path))


def describe_best(progress: Progress, config: Config) -> str | None:
    """What `adapter/` is, for the log: the best or the last; None where nothing was evaluated more than once."""
    best = progress.best
    if best is None or config.training.eval_steps is None:
        return None
    found = f"{best.metric} {best.value:.4f} after step {best.step}"
    if config.training.load_best_model_at_end:
        before = (progress.untuned or {}).get(best.metric)
        worse = "" if before is None or best.value < before else \
            f"; that is no better than the {before:.4f} before the first step"  # fmt: skip
        return f"adapter/ is the best one: {found}, of {counted(progress.step, 'step')}{worse}"
    if best.step == progress.step:
        return None
    return f"adapter/ is the last step's; the best was {found} (training.load_best_model_at_end: true keeps that one)"
