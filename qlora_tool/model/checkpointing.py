"""Which activations are recomputed in backward instead of stored (Chen et al. 2016, arXiv 1604.06174), layer by layer.

Of a decoder layer either all is recomputed, or some of its children are (attention, MLP: those that hold
linear modules), or nothing. Both are found by what they are, not by a family's names for them.

What nothing in backward needs is never recomputed: non-reentrant checkpointing stops at the last value that was saved,
and a frozen product saves none (`ops.linear`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_tool.errors import UserError
from qlora_tool.model.boundaries import HostBoundaries
from qlora_tool.model.experts import is_experts_module
from qlora_tool.model.layout import as_now
from qlora_tool.model.slots import is_linear
from qlora_tool.model.text_part import text_modules
from qlora_tool.sizes import counted
from qlora_tool.weights.handles import KeptWeights
from qlora_tool.weights.modules import FrozenLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Recomputed = tuple[str, ...]
"""What is recomputed of a layer: the names of its children that are, or one of the two constants below."""
ALL_RECOMPUTED: Recomputed = ("",)
NOTHING_RECOMPUTED: Recomputed = ()

_MOST_CHILDREN = 3  # with more children than these not every combination is a choice


@dataclass(frozen=True)
class Recomputation:
    """What is recomputed of every decoder layer, the first layer first.

    Attributes:
        keeps_weights: weights that are dequantized while a layer is computed again are kept for its gradients, which
            would dequantize them once more: for one layer at a time, each until its use.
    """

    layers: tuple[Recomputed, ...]
    keeps_weights: bool = False

    @classmethod
    def uniform(cls, recomputed: Recomputed, layers: int, keeps_weights: bool = False) -> Recomputation:
        return cls((recomputed,) * layers, keeps_weights)

    def __str__(self) -> str:
        """`18 of 30 layers not recomputed, 6 with self_attn recomputed, 6 recomputed`."""
        counts = sorted(
            Counter(self.layers).items(),
            key=lambda item: (item[0] == ALL_RECOMPUTED, item[0] != NOTHING_RECOMPUTED, item[0]),
        )
        said = [f"{count} {_said(recomputed)}" for recomputed, count in counts]
        kept = ["with their weights kept for backward"] if self.keeps_weights else []
        if set(self.layers) in ({ALL_RECOMPUTED}, {NOTHING_RECOMPUTED}):
            what = "everything" if ALL_RECOMPUTED in self.layers else "nothing"
            return ", ".join([f"{what} recomputed", *kept])
        first, space, rest = said[0].partition(" ")
        return ", ".join([f"{first} of {counted(len(self.layers), 'layer')}{space}{rest}", *said[1:], *kept])


def _said(recomputed: Recomputed) -> str:
    if recomputed in (ALL_RECOMPUTED, NOTHING_RECOMPUTED):
        return "recomputed" if recomputed == ALL_RECOMPUTED else "not recomputed"
    return f"with {' and '.join(recomputed)} recomputed"


def decoder_layers(model: nn.Module) -> dict[str, GradientCheckpointingLayer]:
    """The text part's layers that can be recomputed, by name; of those within one another the outermost."""
    found: dict[str, GradientCheckpointingLayer] = {}
    for name, module in text_modules(model).items():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, GradientCheckpointingLayer) and not inside:
            found[name] = module
    return found


def recomputable_children(layer: nn.Module) -> Recomputed:
    """The layer's children that can be recomputed by themselves.

    They hold linear modules or experts. A linear module itself is not among them: its input is nearly all that it
    saves for backward.
    """
    return tuple(
        name for name, child in layer.named_children()
        if not _is_linear(child) and any(_is_linear(inner) or is_experts_module(inner) for inner in child.modules())
    )  # fmt: skip


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, FrozenLinear) or is_linear(module)


def choices_of(layer: nn.Module) -> list[Recomputed]:
    """All that may be recomputed of a layer, from all of it to nothing."""
    children = recomputable_children(layer)
    sizes = range(len(children), 0, -1) if len(children) <= _MOST_CHILDREN else sorted({1, len(children)}, reverse=True)
    return [ALL_RECOMPUTED, *(chosen for size in sizes for chosen in combinations(children, size)), NOTHING_RECOMPUTED]


def checkpoint_layers(
    model: PreTrainedModel,
    recomputed: Recomputation | bool,
    around_recomputation: Callable[[], AbstractContextManager] = nullcontext,
    offload: bool = False,
    draws: bool = True,
) -> Recomputation:
    """Recompute in backward what `recomputed` says, in place of what was recomputed before.

    Args:
        recomputed: of every layer; True: all of every layer, False: nothing.
        around_recomputation: a context that is open while something is computed again.
        offload: hold the inputs of recomputed layers in host memory meanwhile.
        draws: whether the family's own code draws random numbers, and so has to draw the same ones again.

    Returns:
        What is recomputed now.

    Raises:
        UserError: the model's code has no layers that can be recomputed.
        ValueError: `recomputed` is for another model.
    """
    layers = list(decoder_layers(model).values())
    if isinstance(recomputed, bool):
        if recomputed and not layers:
            raise UserError(
                f"{model.config.model_type} has no layers that can be recomputed; set "
                "training.gradient_checkpointing: false"
            )
        recomputed = Recomputation.uniform(ALL_RECOMPUTED if recomputed else NOTHING_RECOMPUTED, len(layers))
    again = around_recomputation
    if recomputed.keeps_weights:
        again = _around_both(around_recomputation, KeptWeights())
    run = partial(
        checkpoint,
        use_reentrant=False,
        preserve_rng_state=draws or has_dropout(model),
        context_fn=lambda: (nullcontext(), _Within(again(), as_now())),
    )
    if offload:
        run = HostBoundaries(run, next(model.parameters()).device)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.gradient_checkpointing = False
        if isinstance(replaced := vars(module).get("forward"), _RecomputedForward):
            replaced.take_off()
    for layer, chosen in zip(layers, recomputed.layers, strict=True):
        if chosen == ALL_RECOMPUTED:
            layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, run
        for name in chosen if chosen != ALL_RECOMPUTED else ():
            _RecomputedForward(layer.get_submodule(name), run)
    return recomputed


class _Within(AbstractContextManager):
    """One context within another. It can be opened more than once where they can."""

    def __init__(self, outer: AbstractContextManager, inner: AbstractContextManager):
        self.outer, self.inner = outer, inner

    def __enter__(self) -> None:
        self.outer.__enter__()
        self.inner.__enter__()

    def __exit__(self, *raised) -> None:
        self.inner.__exit__(*raised)
        self.outer.__exit__(*raised)


def _around_both(
    outer: Callable[[], AbstractContextManager], inner: AbstractContextManager
) -> Callable[[], AbstractContextManager]:
    return lambda: _Within(outer(), inner)


class _RecomputedForward:
    """Stands in for a module's `forward` and has its activations recomputed; hooks stay outside, as with layers."""

    def __init__(self, module: nn.Module, run: Callable):
        self.module, self.run = module, run
        self.own = vars(module).get("forward")  # where something else has put one there already
        self.forward = module.forward
        module.forward = self

    def __call__(self, *args, **kwargs):
        if not self.module.training:
            return self.forward(*args, **kwargs)
        return self.run(partial(self.forward, **kwargs), *args)

    def take_off(self) -> None:
        if self.own is not None:
            self.module.forward = self.own
        else:
            del self.module.forward


def checkpointed_modules(model: nn.Module) -> list[nn.Module]:
    """The layers, and children of layers, that are recomputed in backward."""
    return [
        module for module in model.modules()
        if isinstance(vars(module).get("forward"), _RecomputedForward)
        or (isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing)
    ]  # fmt: skip


def has_dropout(model: nn.Module) -> bool:
    """Whether a module, or an adapter on it, draws what it drops, and so has to draw the same again."""
    return any(isinstance(module, nn.Dropout) and module.p for module in model.modules())
