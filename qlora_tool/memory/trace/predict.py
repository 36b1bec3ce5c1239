"""What a training step will take, from the model's configuration alone: the real step, run on fake tensors.

Fake tensors have shapes, dtypes and storages, but no data. Everything else is what training runs: the loader, the
adapters, `train_step`, the optimizer. Two steps are run, as the optimizer's state only exists after the first.
"""

from __future__ import annotations

import copy
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_tool.adapters.attach import attach
from qlora_tool.adapters.fusion import tile_mlps
from qlora_tool.data.batches import Batch, Segments
from qlora_tool.errors import ToolError, UserError
from qlora_tool.memory.trace.classify import name_gradients, name_optimizer, name_weights
from qlora_tool.memory.trace.tracer import Trace, Tracer
from qlora_tool.model.causal_lm import CausalLM
from qlora_tool.model.experts import assuming_routing, even_shares
from qlora_tool.model.load import Quantization, load_base
from qlora_tool.ops.declare import CPU, Target, meant_for
from qlora_tool.training.optimizers import Optimizer, make_optimizer
from qlora_tool.training.step import StepSettings, train_step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    """

    rows: int
    length: int
    trained_tokens: int
    padded: bool = False
    segments: tuple[int, ...] | None = None

    @classmethod
    def full(cls, rows: int, length: int) -> BatchShape:
        """Full rows, every token with a label: what is assumed where there is no data."""
        return cls(rows, length, rows * (length - 1))

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
            mask[0, -1] = 0  # a mask of ones alone would be passed over
        if self.segments is not None:
            positions = torch.cat([torch.arange(length) for length in self.segments]).repeat(self.rows, 1)
        return Batch(
            input_ids=ids, labels=ids.clone(), attention_mask=mask, position_ids=positions,
            predicting=torch.arange(self.trained_tokens), targets=torch.ones(self.trained_tokens, dtype=torch.int64),
            tokens=self.rows * self.length, trained_tokens=self.trained_tokens, where=[],
            segments=None if self.segments is None else Segments.of(self.segments * self.rows),
        )  # fmt: skip


class RandomSource:
    """A skeleton's tensors, made up: fake ones where fake tensors are being made."""

    def __init__(self, model: PreTrainedModel, device: torch.device, dtype: torch.dtype):
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
        self.names = list(self.shapes)
        self._device, self._dtype = device, dtype
        self._integers = {name for name, tensor in model.state_dict().items() if not tensor.is_floating_point()}

    def read(self, name: str) -> Tensor:
        if name in self._integers:
            return torch.zeros(self.shapes[name], dtype=torch.int64, device=self._device)
        # Small, so that nothing overflows and the optimizer takes its steps.
        return torch.randn(self.shapes[name], dtype=self._dtype, device=self._device).mul_(0.02)


def made_up_run(
    config: Config,
    model_config,
    shape: BatchShape,
    compute_dtype: torch.dtype,
    tracer: Tracer | None = None,
    *,
    device: torch.device | str = "cpu",
    watch: Watch | None = None,
    recomputation: Recomputation | None = None,
) -> None:
    """Load a made-up model and run training steps on it.

    Args:
        model_config: the model's transformers configuration; it stays as it is.
        tracer: an open one, to watch it.
        device: where it runs.
        watch: watches it in another way than a tracer does.
        recomputation: what is recomputed of each layer; by default what `gradient_checkpointing` says of all of them.
    """
    watch, device = watch or TracerWatch(tracer), torch.device(device)
    model_config = copy.deepcopy(model_config)  # transformers writes its dtype into what it loads by
    quantization = Quantization.of(config.model)
    stored = getattr(model_config, "dtype", None) or torch.bfloat16
    with watch.phase("load", 0):
        module = load_base(
            Path(), model_config, quantization, device, compute_dtype,
            open_source=lambda model, device: RandomSource(model, device, stored),
        )  # fmt: skip
        model = CausalLM(module, Path(), quantization, compute_dtype)
        adapters = attach(module, config.adapter, compute_dtype, config.training.seed)
        optimizer = make_optimizer(config.training, adapters.parameters())
    tile_mlps(module, config.training.tiled_mlp)
    model.chunked_loss = loss_fits_in_chunks(model)
    model.by_segment = shape.segments is None or attends_by_segment(model)
    model.checkpoint_layers(recomputation or bool(config.training.gradient_checkpointing), watch.recomputation)
    module.train()
    watch.loaded(model, adapters)
    settings = StepSettings(config.training.max_grad_norm, config.training.label_smoothing_factor)
    batches = [shape.batch().to(device) for _ in range(min(2, config.training.gradient_accumulation_steps))]
    for step in range(1, STEPS + 1):
        train_step(model, optimizer, batches, settings, 1e-4, partial(watch.during, optimizer, step))
    watch.finished()


def loss_fits_in_chunks(model: CausalLM) -> bool:
    """What `CausalLM.choose_loss` finds out by comparing numbers, told from the operators alone: whether the model
    does to its hidden states just what `project` does."""
    head, body = model.module.get_output_embeddings(), model.module.base_model
    if head is None or body is model.module or any(parameter.requires_grad for parameter in head.parameters()):
        return False
    ids = torch.ones(1, 6, dtype=torch.int64, device=model.device)
    with torch.no_grad(), _first_layer_only(model.module):
        with _Operators() as whole:
            model.module(input_ids=ids, use_cache=False)
        with _Operators() as parts:
            hidden = body(input_ids=ids, use_cache=False)[0]
            if hidden.shape[-1] != head.in_features:
                return False
            model.project(hidden)
    return whole.names == parts.names


def attends_by_segment(model: CausalLM) -> bool:
    """What `CausalLM.keeps_packed_apart` finds out by numbers too: whether the family's code takes segments for a
    mask."""
    batch = BatchShape(1, 8, 1, segments=(4, 4)).batch().to(model.device)
    try:
        with torch.no_grad():
            model.hidden_states(batch)
    except (NotImplementedError, AttributeError, TypeError):
        return False
    return True


@contextmanager
def _first_layer_only(module: nn.Module) -> Iterator[None]:
    """Leave out the other layers meanwhile: they are alike, and each takes its time."""
    with ExitStack() as changes:
        for stack in [part for part in module.modules() if isinstance(part, nn.ModuleList)]:
            if len(stack) > 1 and all(isinstance(layer, GradientCheckpointingLayer) for layer in stack):
                changes.enter_context(patch.object(stack, "_modules", {"0": stack[0]}))
        yield


class _Operators(TorchDispatchMode):
    """The names of what runs meanwhile, views left out."""

    def __init__(self):
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "prim" and not any(result.alias_info for result in func._schema.returns):
            self.names[func._schema.name.replace("aten::div", "aten::mul")] += 1  # by a scale, or by its inverse
        return func(*args, **(kwargs or {}))


class Watch(Protocol):
    """What is told of a run while it goes on."""

    def phase(self, name: str, step: int) -> AbstractContextManager:
        """A phase is going on meanwhile."""

    def recomputation(self) -> AbstractContextManager:
        """A checkpointed region is computed again meanwhile."""

    def loaded(self, model: CausalLM, adapters: AdapterSet) -> None:
        """The model is loaded, its adapters are on it."""

    def during(self, optimizer: Optimizer, step: int, phase: str) -> AbstractContextManager:
        """A phase of a training step is going on meanwhile; gradients are there when `optimizer` begins."""

    def finished(self) -> None:
        """The last step is done; what follows is the end of the process."""


class TracerWatch:
    """Tells a tracer; nobody where there is none."""

    def __init__(self, tracer: Tracer | None):
        self.tracer = tracer

    def phase(self, name: str, step: int) -> AbstractContextManager:
        return self.tracer.phase(name, step) if self.tracer else nullcontext()

    def recomputation(self) -> AbstractContextManager:
        return self.tracer.recomputation() if self.tracer else nullcontext()

    def loaded(self, model: CausalLM, adapters: AdapterSet) -> None:
        if self.tracer:
            name_weights(self.tracer, model.module, adapters)
            self.tracer.follow_modules(model.module, model.checkpointed_layers())

    @contextmanager
    def during(self, optimizer: Optimizer, step: int, phase: str) -> Iterator[None]:
        with self.phase(phase, step):
            if self.tracer and phase == "optimizer":
                name_gradients(self.tracer, optimizer)
            yield
            if self.tracer and phase == "optimizer":
                name_optimizer(self.tracer, optimizer)

    def finished(self) -> None:
        if self.tracer:
            self.tracer.finish()


def predict(
    config: Config, model_config, shape: BatchShape, compute_dtype: torch.dtype,
    recomputation: Recomputation | None = None, target: Target = CPU,
) -> Trace:  # fmt: skip
    """The memory of a run over time, without weights or data. Experts get an even share of tokens each.

    `classify.timeline` makes bytes by part of it, `cuda_timeline` those that a CUDA device takes.

    Args:
        target: the device that it is predicted for; none of it need be here.

    Raises:
        UserError: the model's code cannot run on fake tensors, as where it looks at values; the module is named.
    """
    try:
        with _fake_world(shape), meant_for(target), assuming_routing(even_shares), Tracer(has_data=False) as tracer:
            made_up_run(config, model_config, shape, compute_dtype, tracer, recomputation=recomputation)
    except ToolError:
        raise
    except Exception as error:  # what an unknown architecture's code raises can be anything
        where = _failing_module(error) or f"the {tracer.current_phase} phase"
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(
            f"model type {model_config.model_type!r}: its training step cannot be traced: {where}: {reason}; "
            "measure it with profile-memory --measure instead"
        ) from error
    return tracer.trace


def _failing_module(error: Exception) -> str:
    """The innermost module whose code was running when an error was raised, by name and class; empty if none was."""
    running = [
        module for frame, _ in traceback.walk_tb(error.__traceback__)
        if isinstance(module := frame.f_locals.get("self"), nn.Module)
    ]  # fmt: skip
    if not running:
        return ""
    names = {module: name for name, module in running[0].named_modules()}
    return f"module {names.get(running[-1]) or '(the whole model)'} ({type(running[-1]).__name__})"


@contextmanager
def _fake_world(shape: BatchShape) -> Iterator[None]:
    """Fake tensors, and what would do otherwise with real ones.

    Whether positions begin anew within a row cannot be read off fake tensors, so transformers assumes they do and makes
    a mask of length × length. Where the rows are not packed it is told that they do not.
    """
    with ExitStack() as changes:
        if shape.segments is None:
            unpacked = patch.object(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
            changes.enter_context(unpacked)
        changes.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield
