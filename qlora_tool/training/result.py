"""What a training run came to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_tool.config import Config
    from qlora_tool.training.loop import Run


@dataclass(frozen=True)
class TrainResult:
    """A training run.

    Attributes:
        folder: the run's.
        adapter: the trained adapter's folder, in PEFT's format.
        config: the whole configuration, every default resolved.
        steps: optimizer steps taken, those before a resume included; 0 after a dry run.
        total_steps: optimizer steps of the whole run.
        loss: the mean over the trained tokens of the last logged steps; None after a dry run.
        eval_losses: of the last evaluation, by the data set's name.
        seconds: for all of it, reading data and weights included.
        finished: whether the adapter was written; False after a dry run.
    """

    folder: Path
    adapter: Path
    config: Config
    steps: int
    total_steps: int
    loss: float | None
    eval_losses: dict[str, float]
    seconds: float
    finished: bool

    @classmethod
    def of(cls, run: Run, seconds: float, *, finished: bool) -> TrainResult:
        """The result of a run, which took `seconds`."""
        last = _last_record(run.folder.metrics_file) if finished else {}
        names = list(run.data.evaluations)
        keys = ["eval_loss"] if len(names) == 1 else [f"eval_{name}_loss" for name in names]
        evaluated = {name: last[key] for name, key in zip(names, keys, strict=True) if key in last}
        return cls(
            run.folder.path, run.folder.adapter, run.config, run.progress.step if finished else 0,
            run.plan.total_steps, last.get("loss"), evaluated, seconds, finished,
        )  # fmt: skip


def _last_record(metrics: Path) -> dict[str, Any]:
    """The last line of `metrics.jsonl`: a run logs its last step, and evaluates after it."""
    record: dict[str, Any] = json.loads(metrics.read_text(encoding="utf-8").splitlines()[-1])
    return record
