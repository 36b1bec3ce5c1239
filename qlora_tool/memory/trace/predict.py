"""What a training step will take, from the model's configuration alone: the real step, run on fake tensors.

Fake tensors have shapes, dtypes and storages, but no data. Everything else is what training runs: the loader, the
adapters, `train_step`, the optimizer. Two steps are run, as the optimizer's state only exists after the first.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, repeat
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qlora_tool.adapters.calibration import start_tokens
from qlora_tool.build.build import Start, build
from qlora_tool.build.resolve import goes_without_padding, packs_apart
from qlora_tool.build.tensors import Random
from qlora_tool.collection import without_collection
from qlora_tool.data.batches import Batch, Segments
from qlora_tool.data.examples import Example
from qlora_tool.errors import ToolError, UserError
from qlora_tool.memory.trace.assumed_world import AssumedWorld, shard_over
from qlora_tool.memory.trace.classify import name_gradients, name_optimizer, name_weights
from qlora_tool.memory.trace.on_meta import LikeCpu
from qlora_tool.memory.trace.tracer import Trace, Tracer
from qlora_tool.model.causal_lm import CausalLM
from qlora_tool.model.experts import assuming_routing, even_shares
from qlora_tool.model.streamed_base import streamed_layer_bytes, weights_elsewhere
from qlora_tool.ops.declare import CPU, Target, meant_for
from qlora_tool.ops.determinism import full_determinism
from qlora_tool.terminal import drawn
from qlora_tool.training.optimizers import Optimizer, make_optimizer, parameter_groups
from qlora_tool.training.step import StepSettings, train_step

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from qlora_tool.adapters.attach import AdapterSet
    from qlora_tool.config import Config
    from qlora_tool.model.checkpointing import Recomputation

STEPS = 2


@dataclass(frozen=True)
class BatchShape:
    """The size of a batch.

    Attributes:
        rows, length: of the padded tensor.
        trained_tokens: labels that count.
        padded: whether some rows are shorter.
        segments: lengths of the examples packed into each row, or None without packing.
        start_tokens: of the training data, that the adapters' start is made of before the steps; 0: it is made of the
            weights alone; None: none is made.
        processes: that take the steps together, each with batches of this shape.
    """

    rows: int
    length: int
    trained_tokens: int
    padded: bool = False
    segments: tuple[int, ...] | None = None
    start_tokens: int | None = None
    processes: int = 1

    @classmethod
    def full(cls, rows: int, length: int) -> BatchShape:
        """Full rows of one example each, every token with a label, in a batch that is laid out by rows."""
        return cls(rows, length, rows * (length - 1))

    @classmethod
    def assumed(cls, config: Config, model_config, processes: int = 1) -> BatchShape:
        """What there is to assume without data: full rows of `max_length` tokens, one example each and every token with
        a label, in the batch that training would make of them, and in what a start is made of.

        Args:
            config: of the run; where the model cannot keep packed examples apart, they are padded.
            processes: that train together.
        """
        rows, length = config.training.per_device_train_batch_size, config.data.max_length
        made_of = start_tokens(config, repeat(length))
        full = replace(cls.full(rows, length), start_tokens=made_of, processes=processes)
        if config.data.packing and packs_apart(config, model_config):
            return replace(full, segments=(length,))
        if goes_without_padding(config, model_config):
            return replace(full, rows=1, length=rows * length, segments=(length,) * rows)
        return full

    @classmethod
    def of(cls, batch: Batch) -> BatchShape:
        """The shape of a real batch; all of its rows are taken to be cut as the first one is."""
        rows, length = batch.input_ids.shape
        segments = None
        if batch.position_ids is not None:
            starts = [*(batch.position_ids[0] == 0).nonzero().flatten().tolist(), length]
            segments = tuple(stop - start for start, stop in pairwise(starts))
        return cls(rows, length, batch.trained_tokens, batch.attention_mask is not None, segments)

    def batch(self) -> Batch:
        """A batch of this shape, of arbitrary tokens."""
        # Not all the same, or all would go to the same experts.
        ids = torch.arange(self.rows * self.length).remainder_(64).view(self.rows, self.length)
        mask = positions = None
        if self.padded:
            mask = torch.ones_like(ids)
            mask[0, -1].zero_()  # a mask of ones alone would be passed over
        if self.segments is not None:
            positions = torch.cat([torch.arange(length) for length in self.segments]).repeat(self.rows, 1)
        return Batch(
            input_ids=ids, labels=ids.clone(), attention_mask=mask, position_ids=positions,
            predicting=torch.arange(self.trained_tokens), targets=torch.ones(self.trained_tokens, dtype=torch.int64),
            tokens=self.rows * self.length, trained_tokens=self.trained_tokens, where=[],
            segments=None if self.segments is None else Segments.of(self.segments * self.rows),
        )  # fmt: skip

    def start(self) -> Start:
        """What the adapters' start is made of beside the weights: arbitrary tokens, as many."""
        tokens = [0] * (self.start_tokens or 0)
        return Start([Example(tokens, tokens, "the start")] if tokens else [])


class Watch:
    """What is told of a run while it goes on; this one does nothing with it."""

    def phase(self, name: str, step: int) -> AbstractContextManager:
        """A phase is going on meanwhile."""
        return nullcontext()

    def recomputation(self) -> AbstractContextManager:
        """A checkpointed region is computed again meanwhile."""
        return nullcontext()

    def whole(self, model: CausalLM, adapters: AdapterSet) -> None:
        """The model is loaded, and is about to be shared out over processes."""

    def loaded(self, model: CausalLM, adapters: AdapterSet) -> Sequence[RemovableHandle]:
        """The model is loaded, its adapters are on it. Gives the hooks that it put there."""
        return ()

    def has_gradients(self, optimizer: Optimizer) -> None:
        """Backward is done, and `optimizer` begins."""

    def has_state(self, optimizer: Optimizer) -> None:
        """`optimizer` is done with a step."""

    def finished(self) -> None:
        """The last step is done; what follows is the end of the process."""

    @contextmanager
    def during(self, optimizer: Optimizer, step: int, phase: str) -> Iterator[None]:
        """A phase of a training step is going on meanwhile."""
        with self.phase(phase, step):
            if phase == "optimizer":
                self.has_gradients(optimizer)
            yield
            if phase == "optimizer":
                self.has_state(optimizer)


class TracerWatch(Watch):
    """Tells a tracer."""

    def __init__(self, tracer: Tracer):
        self.tracer = tracer

    def phase(self, name: str, step: int) -> AbstractContextManager:
        return self.tracer.phase(name, step)

    def recomputation(self) -> AbstractContextManager:
        return self.tracer.recomputation()

    def finished(self) -> None:
        self.tracer.finish()

    def whole(self, model: CausalLM, adapters: AdapterSet) -> None:
        name_weights(self.tracer, model.module, adapters)

    def loaded(self, model: CausalLM, adapters: AdapterSet) -> Sequence[RemovableHandle]:
        name_weights(self.tracer, model.module, adapters)
        self.tracer.trace.elsewhere = weights_elsewhere(model.module)
        self.tracer.trace.layer_bytes = streamed_layer_bytes(model.module)
        return self.tracer.follow_modules(model.module, model.checkpointed_layers())

    def has_gradients(self, optimizer: Optimizer) -> None:
        name_gradients(self.tracer, optimizer)

    def has_state(self, optimizer: Optimizer) -> None:
        name_optimizer(self.tracer, optimizer)


def trial_run(
    config: Config, model_config, shape: BatchShape, compute_dtype: torch.dtype,
    recomputation: Recomputation | None = None, *, watch: Watch, device: torch.device | str = "cpu", steps: int = STEPS,
) -> None:  # fmt: skip
    """Load a model with random weights and run training steps on it; on CUDA by deterministic kernels where asked for.

    Args:
        model_config: the model's transformers configuration; it stays as it is.
        recomputation: what is recomputed of each layer; by default what `gradient_checkpointing` says of all of them.
        watch: told what is going on.
        device: where it runs.
        steps: how many.
    """
    device = torch.device(device)
    with full_determinism(config.training.full_determinism and device.type == "cuda"):
        _trial_run(config, model_config, shape, compute_dtype, recomputation, watch, device, steps)


def _trial_run(
    config: Config, model_config, shape: BatchShape, compute_dtype: torch.dtype, recomputation: Recomputation | None,
    watch: Watch, device: torch.device, steps: int,
) -> None:  # fmt: skip
    with watch.phase("load", 0):
        built = build(
            config, model_config, Random(shape.start_tokens is not None, config.model), device=device,
            compute_dtype=compute_dtype, recomputation=recomputation, around_recomputation=watch.recomputation,
            start=shape.start(),
        )  # fmt: skip
        model, adapters = built.model, built.adapters
        if shape.processes > 1 and config.training.sharding == "fsdp":
            watch.whole(model, adapters)
            shard_over(shape.processes, model, adapters)
        optimizer = make_optimizer(config.training, parameter_groups(adapters))
    watch.loaded(model, adapters)
    settings, world = StepSettings.of(config.training), AssumedWorld(size=shape.processes)
    batches = [shape.batch().to(device) for _ in range(min(2, config.training.gradient_accumulation_steps))]
    for step in range(1, steps + 1):
        train_step(model, optimizer, batches, settings, 1e-4, partial(watch.during, optimizer, step), world)
    watch.finished()


class Untraceable(UserError):
    """A model's code cannot run on fake tensors: no reason to refuse a run, only to do without its prediction.

    Args:
        why: in a line, without what to do.
    """

    def __init__(self, why: str):
        super().__init__(f"{why}; measure it with profile-memory --measure instead")
        self.why = why


def predict(
    config: Config, model_config, shape: BatchShape, compute_dtype: torch.dtype,
    recomputation: Recomputation | None = None, target: Target = CPU, steps: int = STEPS,
) -> Trace:  # fmt: skip
    """The memory of a run over time, without weights or data. Experts get an even share of tokens each.

    `classify.timeline` makes bytes by part of it, `cuda_timeline` those that a CUDA device takes.

    Args:
        target: the device that it is predicted for; none of it need be here.
        steps: how many are traced; optimizer state is there from the second on.

    Raises:
        Untraceable: the model's code cannot run on fake tensors, as where it looks at values; the module is named.
    """
    with drawn.hushed(), without_collection():
        return _predict(config, model_config, shape, compute_dtype, recomputation, target, steps)


def _predict(
    config: Config, model_config, shape: BatchShape, compute_dtype: torch.dtype, recomputation: Recomputation | None,
    target: Target, steps: int,
) -> Trace:  # fmt: skip
    run = config, model_config, shape, compute_dtype, recomputation
    if shape.processes == 1:
        try:
            return traced_on_meta(*run, target, steps)
        except Exception:  # whatever it is, fake tensors show it too, or have no trouble with it
            pass
    tracer = Tracer(has_data=False)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), meant_for(target), assuming_routing(even_shares), tracer:
            tracer.trace.deterministic = config.training.full_determinism
            trial_run(*run, watch=TracerWatch(tracer), steps=steps)
    except ToolError:
        raise
    except Exception as error:  # what an unknown architecture's code raises can be anything
        where = _failing_module(error) or f"the {tracer.current_phase} phase"
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise Untraceable(
            f"model type {model_config.model_type!r}: its training step cannot be traced: {where}: {reason}"
        ) from error
    return tracer.trace


def traced_on_meta(
    config: Config, model_config, shape: BatchShape, compute_dtype: torch.dtype, recomputation: Recomputation | None,
    target: Target, steps: int = STEPS,
) -> Trace:  # fmt: skip
    """The same trace from meta tensors, in a third of the time.

    Raises:
        Exception: of any kind; fake tensors may do what meta tensors do not, being on a device.
    """
    tracer = Tracer(has_data=False, on_meta=True)
    with LikeCpu(), meant_for(target), assuming_routing(even_shares), tracer:
        tracer.trace.deterministic = config.training.full_determinism
        trial_run(config, model_config, shape, compute_dtype, recomputation, watch=_MetaWatch(tracer), device="meta",
                  steps=steps)  # fmt: skip
    return tracer.trace


class _MetaWatch(TracerWatch):
    """Tells a tracer of meta tensors. Function modes are off in backward, where layers are computed again."""

    def recomputation(self) -> AbstractContextManager:
        return _within(LikeCpu(), super().recomputation())


@contextmanager
def _within(*contexts: AbstractContextManager) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def _failing_module(error: Exception) -> str:
    """The innermost module whose code was running when an error was raised, by name and class; empty if none was."""
    frames = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    running = [module for module in frames if isinstance(module, nn.Module)]
    if not running:
        return ""
    whole = next((model.module for model in frames if isinstance(model, CausalLM)), running[0])
    names = {module: name for name, module in whole.named_modules()}
    return f"module {names.get(running[-1]) or '(the whole model)'} ({type(running[-1]).__name__})"
