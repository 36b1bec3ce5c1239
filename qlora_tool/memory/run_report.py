"""The memory of a training run: predicted before weights are read, seen in one early step, kept in `memory.json`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING

from qlora_tool.adapters.calibration import start_tokens
from qlora_tool.build.setup import start_is_kept
from qlora_tool.errors import UserError
from qlora_tool.files.atomic import write_json
from qlora_tool.memory.allocator.available import available_bytes
from qlora_tool.memory.allocator.operators import about_estimated_context
from qlora_tool.memory.allocator.target import device_of, target_on
from qlora_tool.memory.breakdown import Breakdown, MemoryReport
from qlora_tool.memory.plan.budget import BudgetTooSmall, choose_for_run
from qlora_tool.memory.plan.cached import cached
from qlora_tool.memory.plan.cure import cure, needed_in_a_step
from qlora_tool.memory.plan.limit import MAX_MEMORY, Limit, limit_on
from qlora_tool.memory.plan.weights import place_weights
from qlora_tool.memory.profile import Prediction
from qlora_tool.memory.trace.classify import timeline
from qlora_tool.memory.trace.extrapolate import forget_traces, predict_deep
from qlora_tool.memory.trace.predict import BatchShape, TracerWatch, Untraceable
from qlora_tool.memory.trace.small_steps import NotMeasured, estimate
from qlora_tool.memory.trace.tracer import Tracer
from qlora_tool.model.streamed_base import weights_elsewhere
from qlora_tool.run_folder import STEP_MEMORY
from qlora_tool.sizes import memory_size
from qlora_tool.training.run import Decided
from qlora_tool.world import World

if TYPE_CHECKING:
    from qlora_tool.build.build import Start
    from qlora_tool.build.setup import Setup
    from qlora_tool.config import Config
    from qlora_tool.data.batches import Batch
    from qlora_tool.model.checkpointing import Recomputation
    from qlora_tool.training.run import Run
    from qlora_tool.training.step import During

logger = logging.getLogger(__name__)

_POINTS = 800  # of the drawing of a step

class RunMemory:
    """A `Watcher` of a run: refuses what will not fit, and writes `memory.json`."""

    def __init__(self) -> None:
        self.predicted: Breakdown | None = None
        self.estimated = False  # whether `predicted` comes from small steps, and not from a trace of this one

    def check(self, setup: Setup, batch: Batch, start: Start | None = None) -> Decided:
        """Predict the run on its largest batch, the making of its adapters' start included, and hold that against what
        the device has.

        Args:
            start: what adapters start from; None: full rows.

        Returns:
            What is recomputed, where `gradient_checkpointing: auto` leaves that to a budget; and where the base lies,
            where `model.weights: auto` does.

        Raises:
            UserError: on CUDA it will not fit. On a CPU, which may swap, and where the prediction is an estimate, that
                is a warning. Or `max_memory` is too small for any choice.
        """
        shape = replace(BatchShape.of(batch), start_tokens=_start_tokens(setup, start),
                        processes=World.launched().size)  # fmt: skip
        try:
            return self._checked(setup, shape)
        finally:
            forget_traces()

    def _checked(self, setup: Setup, shape: BatchShape) -> Decided:
        device = setup.device
        try:
            config, recomputation = self._decide(setup, shape)
        except Untraceable as error:
            self._estimate(setup, shape, error)
            return Decided(None, setup.config)
        assert self.predicted is not None
        free = available_bytes(device, self.predicted.context_bytes or 0)
        needed, target = self.predicted.needed_bytes, target_on(device.type)
        limit = limit_on(setup.config, device.type, free=free) or Limit(free)
        steps = needed_in_a_step(shape, self.predicted)
        when = "at the peak" if steps is None else f"while the start is made, {memory_size(steps)} in a step"
        logger.info("memory: %s predicted %s (rows of up to %d tokens); %s",
                    memory_size(needed), when, shape.length, limit)  # fmt: skip
        if target is not None and target.calibration is None:
            logger.info("memory: estimated in it: %s", about_estimated_context(target.capability))
        if needed > free:
            what = cure(setup.config, setup.model_config, setup.compute_dtype, target, shape, self.predicted,
                        limit.bytes, free)  # fmt: skip
            line = (f"this run needs {memory_size(needed)} at its peak, and {memory_size(free)} are free on {device}; "
                    f"{what}")  # fmt: skip
            if device.type == "cuda":
                raise UserError(line)
            logger.warning(line)
        elif needed > limit.bytes:
            logger.warning("memory: it fits into what is free, but not into the %s that plans use", limit)
        return Decided(recomputation, config)

    def _decide(self, setup: Setup, shape: BatchShape) -> tuple[Config, Recomputation | None]:
        """What the configuration leaves to the device's memory, and what the run takes then: all of the base on the
        device where that fits, and streamed to it where only that does.

        Raises:
            Untraceable: nothing can be predicted.
            BudgetTooSmall: see `choose_for_run`.
        """
        device, config = setup.device, setup.config
        refusal: BudgetTooSmall | None = None
        choice = None
        try:
            choice = choose_for_run(setup, shape)
            self.predicted = choice.predicted if choice else predict_run(setup, shape)
        except BudgetTooSmall as error:
            refusal, self.predicted = error, error.least
        free = available_bytes(device, self.predicted.context_bytes or 0)
        limit = limit_on(config, device.type, free=free) or Limit(free)
        most = limit.bytes if limit.name == MAX_MEMORY else free  # of what is free, a card's margin may be used
        if self.predicted.needed_bytes > most or refusal is not None:
            run = config, setup.model_config, shape, setup.compute_dtype
            placed = place_weights(*run, target_on(device.type), limit.bytes, here=True)
            if placed is not None:
                logger.warning("%s", placed)
                self.predicted = placed.predicted
                return placed.config, None
        if refusal is not None:
            raise refusal
        return config, choice and choice.recomputation

    def _estimate(self, setup: Setup, shape: BatchShape, error: Untraceable) -> None:
        """What there is in the place of a prediction: a warning, and never a refusal."""
        logger.warning("memory: %s", error.why)
        try:
            self.predicted, self.estimated = estimate_run(setup, shape), True
        except NotMeasured as failure:
            logger.warning("memory: nothing is predicted, as small steps cannot be measured either: %s; the run goes "
                           "on, and its second step is measured", failure)  # fmt: skip
            return
        needed, free = self.predicted.needed_bytes, available_bytes(setup.device, 0)
        logger.warning("memory: about %s at the peak, estimated from small steps that were measured (rows of up "
                       "to %d tokens); %s are free on %s%s", memory_size(needed), shape.length, memory_size(free),
                       setup.device,
                       "; if it does not fit, lower training.per_device_train_batch_size or data.max_length"
                       if needed > free else "")  # fmt: skip

    @contextmanager
    def watch(self, run: Run) -> Iterator[During]:
        """See one step: on a CPU by the tracer, which slows it down, on CUDA by the allocator's history."""
        step, cuda = run.progress.step + 1, run.model.device.type == "cuda"
        if cuda:
            from qlora_tool.memory.trace.measure_cuda import RunningStep

            seen = RunningStep(run.model.device)
            watched = seen.watch(run.model, run.adapters, run.optimizer)
            with watched as history, _recomputing(run, history.recomputation):
                yield partial(history.during, run.optimizer, step)
            measured, line = seen.breakdown, seen.timeline
        else:
            logger.info("memory: this step is traced, and so is slower")
            with Tracer() as tracer, _recomputing(run, tracer.recomputation):
                watch = TracerWatch(tracer)
                with tracer.phase("load"):
                    hooks = watch.loaded(run.model, run.adapters)
                with tracer.phase("optimizer"):  # its state came with the step before
                    watch.has_state(run.optimizer)
                yield partial(watch.during, run.optimizer, step)
                for hook in hooks:
                    hook.remove()
            line = timeline(tracer.trace)
            measured = line.breakdown()
        assert measured is not None and line is not None
        measured = replace(measured, elsewhere=weights_elsewhere(run.model.module))
        run.tensor_bytes = measured.peak_bytes
        report = MemoryReport(run.model.device.type, run.config.model_dump(mode="json"), self.predicted, measured,
                              self.estimated, run.world.size)  # fmt: skip
        write_json(run.folder.path / "memory.json", report.to_json())
        write_json(run.folder.notes / STEP_MEMORY, {"step": step, **line.to_json(_POINTS)})


def _start_tokens(setup: Setup, start: Start | None) -> int | None:
    """See `BatchShape`. A run that goes on from a checkpoint makes none, nor one that finds it in the cache."""
    if start is None:
        return start_tokens(setup.config, repeat(setup.config.data.max_length))
    if start.checkpoint is not None:
        return None
    tokens = start_tokens(setup.config, (len(example.input_ids) for example in start.examples))
    return None if tokens is None or start_is_kept(setup, start.examples) else tokens


@contextmanager
def _recomputing(run: Run, around: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Meanwhile `around` is open whenever something is computed again."""
    run.model.checkpoint_layers(run.model.recomputation, around)
    yield
    run.model.checkpoint_layers(run.model.recomputation)


def predict_run(setup: Setup, shape: BatchShape) -> Breakdown:
    """What a run takes by the shape of its largest batch; cached."""
    run, target = (setup.config, setup.model_config, shape, setup.compute_dtype), target_on(setup.device.type)
    return cached(
        Breakdown, lambda: Prediction.of(predict_deep(*run, target=device_of(target)), target).breakdown, run, target
    )


def estimate_run(setup: Setup, shape: BatchShape) -> Breakdown:
    """The same from small steps, where the run's own cannot be traced; cached.

    Raises:
        NotMeasured: those cannot be run either.
    """
    run = (setup.config, setup.model_config, shape, setup.compute_dtype)
    return cached(Breakdown, lambda: estimate(*run), run, target_on(setup.device.type), how="small steps")
