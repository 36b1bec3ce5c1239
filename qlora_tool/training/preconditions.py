"""What `train` refuses before it reads data or weights or writes anything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qlora_tool.data.template import read_chat_template
from qlora_tool.errors import UserError
from qlora_tool.training.optimizers import FLOAT16_IN_BACKWARD
from qlora_tool.world import World

if TYPE_CHECKING:
    from qlora_tool.config import Config


def refuse_at_once(config: Config) -> None:
    """Refuse what several processes cannot do, missing trackers, a run in its model's folder, and a chat template that
    cannot be read.

    Raises:
        UserError: with a line for each.
    """
    if faults := list(_faults(config)):
        raise UserError(faults)


def _faults(config: Config) -> Iterator[str]:
    size = World.launched().size
    if size > 1 and config.training.optimizer_in_backward:
        yield f"training.optimizer_in_backward: true, but gradients of {size} processes are summed before a step; " \
              "leave it out, or start one process"  # fmt: skip
    if size > 1 and config.training.report_to:
        yield f"training.report_to: {', '.join(config.training.report_to)}, but trackers are not told of {size} " \
              "processes yet; leave it out: metrics.jsonl has it all"  # fmt: skip
    elif missing := _missing_trackers(config.training.report_to):
        install = f"`pip install {' '.join(missing)}` or leave out"
        yield f"training.report_to: {', '.join(missing)}: not installed; {install}"
    model = Path(config.model.name_or_path).expanduser().resolve()
    output = Path(config.training.output_dir).resolve()
    if (model / "config.json").exists() and model in (output, *output.parents):
        yield f"training.output_dir: {config.training.output_dir} lies in the model's own folder " \
              f"({config.model.name_or_path}); give another"  # fmt: skip
    if config.data.chat_template is not None:
        try:
            read_chat_template(Path(config.data.chat_template))
        except UserError as error:
            yield from error.lines


def refuse_dtype(config: Config, compute_dtype: torch.dtype) -> None:
    """Refuse a dtype of matrix products in which the run cannot take its steps.

    Raises:
        UserError: as `OptimizerInBackward` would once the weights are read.
    """
    if config.training.optimizer_in_backward and compute_dtype == torch.float16:
        raise UserError(FLOAT16_IN_BACKWARD)


def _missing_trackers(names: list[str]) -> list[str]:
    if not names:
        return []
    from accelerate.tracking import get_available_trackers

    installed = {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
    return [name for name in names if name not in installed]
