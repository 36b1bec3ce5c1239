"""What a training run came to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_tool.config import Config
    from qlora_tool.training.run import Run


@dataclass(frozen=True)
class TrainResult:
    """A training run.

    Attributes:
        folder: the run's.
        adapter: the trained adapter's folder, in PEFT's format.
        config: the whole configuration, every default resolved.
        steps: optimizer steps taken, those before a resume included; 0 after a dry run.
        total_steps: optimizer steps of the whole run; where it stopped early, those that it would have had.
        loss: the mean over the trained tokens of the last logged steps; None after a dry run, and in other processes
            than the first.
        eval_losses: of the last evaluation, by the data set's name; with `load_best_model_at_end` of the best one.
        seconds: for all of it, reading data and weights included.
        finished: whether the adapter was written; False after a dry run.
        adapter_step: the step that the adapter is of: the last one, or with `load_best_model_at_end` the best
            evaluated; 0 after a dry run.
        best_step, best_metric: after which step the best evaluation was made, and its `metric_for_best_model`; None
            without evaluations.
        learned: whether the adapter changes anything and the loss on training rows fell; None after a dry run.
        warnings: why not, and which evaluation loss is not below the untuned model's, in sentences.
        report: the page about the run; None after a dry run, and in other processes than the first.

    Example:
        >>> from qlora_tool import train
        >>> result = train("my-run.yaml", set={"training.max_steps": 2}, output_dir="short", overwrite=True)
        >>> result.finished, result.steps, result.total_steps, result.report.name
        (True, 2, 2, 'report.html')
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
    adapter_step: int = 0
    best_step: int | None = None
    best_metric: float | None = None
    learned: bool | None = None
    warnings: tuple[str, ...] = ()
    report: Path | None = None

    @classmethod
    def of(cls, run: Run, seconds: float, *, finished: bool) -> TrainResult:
        """The result of a run, which took `seconds`."""
        written = finished and run.world.is_main
        last: dict[str, Any] = run.folder.last_record() if written else {}
        losses = run.kept_losses() if written else {}
        names = list(run.data.evaluations)
        keys = ["eval_loss"] if len(names) == 1 else [f"eval_{name}_loss" for name in names]
        evaluated = {name: losses[key] for name, key in zip(names, keys, strict=True) if key in losses}
        best, outcome = run.progress.best, run.outcome
        return cls(
            run.folder.path, run.folder.adapter, run.config, run.progress.step if finished else 0,
            run.plan.total_steps, last.get("loss"), evaluated, seconds, finished,
            run.kept_step if finished else 0, best and best.step, best and best.value, outcome and outcome.learned,
            outcome.warnings if outcome else (),
        )  # fmt: skip
