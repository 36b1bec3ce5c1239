"""Fused operations in the place of what a family's code computes step by step, where both compute the same.

Three things are found by trying them on random numbers, once a class: modules that are an RMSNorm (`ops.norm`);
functions by the name that transformers' modeling files give to rotary position embeddings (`ops.rotary`), in modules
whose forward pass calls one; and layers that add and normalize in turn (`fused_layers`). Such a module's class is
replaced by a subclass with the same name; its parameters, their names and everything else stay. What is not found
computes as it did, and so does any call that the operation does not take: on a CPU, with a trained weight, in a dtype
of its own.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qlora_tool.model.fused_layers import Norm, is_pre_norm, layer_class, weight_of
from qlora_tool.model.trials import AsText, attributes_of, subclass, trying, twin
from qlora_tool.ops.norm import KINDS, WIDEST, NormKind, rms_norm, rms_norm_reference
from qlora_tool.ops.one_pass import in_one_pass
from qlora_tool.ops.rotary import rotary, rotary_reference
from qlora_tool.sizes import counted

ROTARY = "apply_rotary_pos_emb"
_EPSILONS = ("variance_epsilon", "eps", "epsilon", "norm_eps")
_MATCHING = 0.99  # of bf16 results that are equal: rounding elsewhere changes a third of them


@dataclass(frozen=True)
class FusedModules:
    """How many modules compute by a fused operation, by the operation: `RMSNorm`, `RoPE`, `residual + RMSNorm`."""

    modules: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return ", ".join(f"{name} in {counted(count, 'module')}" for name, count in self.modules.items()) or "nothing"


def fuse_modules(model: nn.Module) -> FusedModules:
    """Let the modules of `model` that can be compute by fused operations, if its steps run where those are kernels."""
    if not in_one_pass(torch.empty(0, device=next(model.parameters()).device)):
        return FusedModules()
    counts: Counter[str] = Counter()
    for module in model.modules():
        if "forward" in vars(module):  # something else has put one there
            continue
        if (norm := norm_of(module)) is not None:
            module.__class__ = _norm_class(type(module), norm)
            counts["RMSNorm"] += 1
        elif (norms := _norms_of(module)) is not None:
            module.__class__ = layer_class(type(module), *norms)
            counts["residual + RMSNorm"] += 1
        elif (rotation := rotation_in(type(module))) is not None:
            module.__class__ = _attention_class(type(module), rotation)
            counts["RoPE"] += 1
    return FusedModules(dict(sorted(counts.items())))


# ----------------------------------------------------------------------------------------------------------- RMSNorm


def norm_of(module: nn.Module) -> Norm | None:
    """How a module computes RMSNorm over its last dimension; None if it computes anything else."""
    names = [name for name, _ in module.named_parameters()]
    weight = getattr(module, "weight", None)
    if next(module.children(), None) is not None or next(module.buffers(), None) is not None or names not in (
        [], ["weight"]
    ) or _epsilon(module) is None or (names and weight.dim() != 1):  # fmt: skip
        return None
    width = weight.shape[0] if names else 64
    if width > WIDEST:
        return None
    kind = _tried_norm(type(module), width if names else None, attributes_of(module))
    return None if kind is None else Norm(kind, _epsilon(module))


def _norms_of(layer: nn.Module) -> tuple[Norm, Norm] | None:
    """The two norms of a layer that adds and normalizes in turn."""
    if not is_pre_norm(layer):
        return None
    first, second = norm_of(layer.input_layernorm), norm_of(layer.post_attention_layernorm)
    return None if first is None or second is None else (first, second)


def _epsilon(module: nn.Module) -> float | None:
    found = (getattr(module, name, None) for name in _EPSILONS)
    return next((value for value in found if isinstance(value, float)), None)


@functools.lru_cache(maxsize=256)
def _tried_norm(kind: type[nn.Module], width: int | None, attributes: AsText) -> NormKind | None:
    with trying():
        generator = torch.Generator().manual_seed(0)
        numbers = torch.randn(48, width or 64, generator=generator) + 0.5  # a mean that a LayerNorm would take away
        x = numbers * torch.logspace(-4, 2, 48).unsqueeze(1)  # the smallest rows show ε
        weight = None if width is None else torch.randn(width, generator=generator)
        made = twin(kind, attributes)
        if weight is not None:
            made.weight = nn.Parameter(weight.clone(), requires_grad=False)
        found = {}
        try:
            for dtype in (torch.float32, torch.bfloat16):
                found[dtype] = made.to(dtype)(x.to(dtype))
        except Exception:  # it takes or does something else, whatever that is
            return None
        return next((one for one in KINDS if _is_norm(one, x, weight, _epsilon(made), found)), None)


def _is_norm(
    kind: NormKind, x: Tensor, weight: Tensor | None, eps: float | None, found: dict[torch.dtype, Tensor]
) -> bool:
    for dtype, y in found.items():
        of = None if weight is None else weight.to(dtype)
        expected = rms_norm_reference(x.to(dtype), of, eps, kind)
        if not isinstance(y, Tensor) or y.shape != expected.shape or y.dtype != dtype:
            return False
        if dtype == torch.float32 and not torch.allclose(y, expected, rtol=1e-5, atol=1e-6):
            return False
        if dtype != torch.float32 and (y == expected).float().mean() < _MATCHING:
            return False
    return True


@functools.cache
def _norm_class(kind: type[nn.Module], norm: Norm) -> type[nn.Module]:
    def forward(self: nn.Module, x: Tensor, *rest: Any, **options: Any) -> Tensor:
        if rest or options or not in_one_pass(x) or not norm.takes(self, x):
            result: Tensor = kind.forward(self, x, *rest, **options)
            return result
        return rms_norm(x, weight_of(self), norm.eps, norm.kind)

    return subclass(kind, forward)


# -------------------------------------------------------------------------------------------------------------- RoPE


@dataclass(frozen=True)
class Rotation:
    """A family's function of (q, k, cos, sin, unsqueeze_dim=1) that rotates halves against each other.

    Attributes:
        function: the family's.
        partly: it takes cosines for the first part of a head, and leaves the rest of it as it is.
        narrows: with cosines in fp32 it gives q and k back in their own dtype.
    """

    function: Callable[..., tuple[Tensor, Tensor]]
    partly: bool
    narrows: bool

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **options: Any) -> Any:
        """What the function gives."""
        dim = options.get("unsqueeze_dim", 1)
        if rest or options.keys() - {"unsqueeze_dim"} or dim not in (1, 2) or not self._takes(q, k, cos, sin, dim):
            return self.function(q, k, cos, sin, *rest, **options)
        return rotary(q, k, cos, sin, heads_first=dim == 1)

    def _takes(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dim: int) -> bool:
        if not in_one_pass(q) or q.dtype != k.dtype or q.dim() != 4 or k.dim() != 4 or cos.dim() != 3:
            return False
        rows, length, width = q.shape[0], q.shape[3 - dim], q.shape[3]
        return (
            k.shape[0] == rows and k.shape[3 - dim] == length and k.shape[3] == width and cos.shape == sin.shape
            and cos.shape[0] in (1, rows) and cos.shape[1] == length and cos.shape[2] % 2 == 0
            and (cos.shape[2] == width or (self.partly and cos.shape[2] < width))
            and (cos.dtype == sin.dtype == q.dtype or (self.narrows and cos.dtype == sin.dtype == torch.float32))
            and not (cos.requires_grad or sin.requires_grad)
        )  # fmt: skip


@functools.cache
def rotation_in(kind: type[nn.Module]) -> Rotation | None:
    """What the forward pass of a class rotates queries and keys by; None if it does not, or in another way."""
    forward = kind.forward
    if not isinstance(forward, types.FunctionType) or ROTARY not in forward.__code__.co_names:
        return None
    function = forward.__globals__.get(ROTARY)
    return rotation_of(function) if isinstance(function, types.FunctionType) else None


@functools.cache
def rotation_of(function: Callable[..., Any]) -> Rotation | None:
    """What a function of the field's name for it rotates by; None if it computes anything else."""
    names = list(inspect.signature(function).parameters)
    if names[:4] != ["q", "k", "cos", "sin"] or "unsqueeze_dim" not in names:
        return None
    with trying():
        generator = torch.Generator().manual_seed(0)
        q, k = (torch.randn(2, heads, 5, 8, generator=generator) for heads in (4, 2))
        cos, sin = torch.randn(2, 2, 5, 8, generator=generator)
        angles = torch.randn(2, 2, 5, 8, generator=generator).bfloat16()
        whole = all(_rotates(function, (q.transpose(1, dim), k.transpose(1, dim), cos, sin), dim) for dim in (1, 2))
        if not whole or not _rotates(function, (q.bfloat16(), k.bfloat16(), *angles), 1):
            return None
        return Rotation(
            function,
            partly=_rotates(function, (q, k, cos[..., :4], sin[..., :4]), 1),
            narrows=_rotates(function, (q.bfloat16(), k.bfloat16(), cos, sin), 1),
        )


def _rotates(function: Callable[..., Any], arguments: tuple[Tensor, ...], dim: int) -> bool:
    try:
        found = function(*arguments, unsqueeze_dim=dim)
    except Exception:  # it takes something else
        return False
    if not isinstance(found, tuple) or len(found) != 2:
        return False
    exact = arguments[0].dtype == torch.float32
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if exact else {"rtol": 0.03, "atol": 0.1}  # three roundings to bf16
    return all(
        isinstance(one, Tensor) and one.dtype == other.dtype and torch.allclose(one, other, **tolerance)
        for one, other in zip(found, rotary_reference(*arguments, heads_first=dim == 1), strict=True)
    )


@functools.cache
def _attention_class(kind: type[nn.Module], rotation: Rotation) -> type[nn.Module]:
    """A subclass whose forward pass is the class's own code, its global name for the function bound to `rotation`."""
    own = kind.forward
    bound = types.FunctionType(
        own.__code__, {**own.__globals__, ROTARY: rotation}, own.__name__, own.__defaults__, own.__closure__
    )
    bound.__kwdefaults__ = own.__kwdefaults__
    return subclass(kind, functools.wraps(own)(bound))
