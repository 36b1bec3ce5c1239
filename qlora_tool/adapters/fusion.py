"""Let modules that share an input, or make up a gated MLP, run as one operation where their adapters allow it.

What is fused is found by what modules are: linear modules of one parent under the names that the field gives to
projections of one input, and parents whose own forward pass, run on small numbers, is that of a gated MLP. Whether a
module's adapter can take the fused operation is asked at every call: dropout, DoRA, a trained base weight and PEFT's
`lora_bias` take the general path.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qlora_tool.adapters.adapter import Adapter
from qlora_tool.model.trials import trying
from qlora_tool.ops.gated import ACTIVATIONS, Activation
from qlora_tool.ops.lora import LoraWeights, lora_gated_mlp, lora_linear
from qlora_tool.weights.modules import FrozenLinear

SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"))
TILE = 1024  # tokens: enough to make the weights' dequantization, once a tile, a small part
GATED_MLP = ("gate_proj", "up_proj", "down_proj")


def fuse(model: nn.Module) -> None:
    """Join the modules of `model` that can run as one; adapters are on it already."""
    for parent in model.modules():
        if all(_adapted(parent, name) for name in GATED_MLP) and (activation := gated_activation(parent)):
            parent.forward = functools.partial(_gated_forward, parent, activation)
        for names in SHARED_INPUT:
            if all(_adapted(parent, name) for name in names):
                shared = SharedInput([getattr(parent, name) for name in names])
                for name in names:
                    getattr(parent, name).adapter.shared = shared


def tile_mlps(model: nn.Module, tiled: bool, tile: int = TILE) -> int:
    """Let the gated MLPs of `model` make their inner values for `tile` tokens at a time, or for all at once.

    Returns:
        How many MLPs do so while training.
    """
    mlps = [module for module in model.modules() if isinstance(vars(module).get("forward"), functools.partial)
            and vars(module)["forward"].func is _gated_forward]  # fmt: skip
    for mlp in mlps:
        mlp.forward = functools.partial(_gated_forward, *vars(mlp)["forward"].args, tile=tile if tiled else None)
    dropping = [mlp for mlp in mlps if any(getattr(mlp, name).adapter.dropout is not None for name in GATED_MLP)]
    return len(mlps) - len(dropping) if tiled else 0


def _adapted(parent: nn.Module, name: str) -> bool:
    child = getattr(parent, name, None)
    return isinstance(child, FrozenLinear) and fused_weights(child) is not None


class SharedInput:
    """Linear modules that are called with one and the same tensor, one after the other.

    The first that is called computes all of them; the others find their outputs waiting. One that comes with another
    tensor after all computes for itself.
    """

    def __init__(self, linears: Sequence[FrozenLinear]):
        self.linears = linears
        self._input: Tensor | None = None
        self._waiting: dict[FrozenLinear, Tensor] = {}

    def output(self, x: Tensor, linear: FrozenLinear) -> Tensor:
        """x (…, in) → (…, out) of `linear`, bias and adapter included."""
        if self._input is not x or linear not in self._waiting:
            weights = {one: found for one in self.linears if (found := fused_weights(one)) is not None}
            alone = linear is not self.linears[0] or len(weights) < len(self.linears)
            together = {linear: weights[linear]} if alone else weights
            outputs = lora_linear(x, list(together.values()))
            self._input, self._waiting = x, dict(zip(together, outputs, strict=True))
        y = self._waiting.pop(linear)
        if not self._waiting:
            self._input = None
        return y


def fused_weights(linear: FrozenLinear) -> LoraWeights | None:
    """What the fused operations take of a module, where they compute what it does as it is now."""
    adapter = linear.adapter
    return adapter.method.fused_weights(adapter, linear) if isinstance(adapter, Adapter) else None


def _gated_forward(mlp: nn.Module, activation: Activation, x: Tensor, *, tile: int | None = None) -> Tensor:
    gate, up, down = (fused_weights(getattr(mlp, name)) for name in GATED_MLP)
    if gate is None or up is None or down is None:
        y: Tensor = type(mlp).forward(mlp, x)
        return y
    return lora_gated_mlp(x, gate, up, down, activation, tile)


def gated_activation(mlp: nn.Module) -> Activation | None:
    """The activation of a module that computes down_proj(act_fn(gate_proj(x)) ∘ up_proj(x)); None if it does not, or
    has an activation that no fused operation knows."""
    known = (activation for activation in ACTIVATIONS if _is_gated_mlp(type(mlp), mlp, activation))
    return next(known, None)


_found: dict[tuple[object, ...], bool] = {}


def _is_gated_mlp(kind: type[nn.Module], mlp: nn.Module, activation: Activation) -> bool:
    """Whether the forward pass of `kind`, on three small matrices, gives what the formula gives."""
    key = (kind, type(getattr(mlp, "act_fn", None)), str(getattr(mlp, "act_fn", None)), activation.name)
    if key not in _found:
        with trying():
            _found[key] = _computes_as(kind, mlp, activation)
    return _found[key]


def _computes_as(kind: type[nn.Module], mlp: nn.Module, activation: Activation) -> bool:
    generator = torch.Generator().manual_seed(0)
    twin = kind.__new__(kind)
    nn.Module.__init__(twin)
    twin.__dict__.update({name: value for name, value in vars(mlp).items() if not name.startswith("_")})
    twin.__dict__.pop("forward", None)
    twin.act_fn = getattr(mlp, "act_fn", None)  # type: ignore[assignment]  # a function is not a module
    gate, up, down = (torch.randn(shape, generator=generator) for shape in ((5, 4), (5, 4), (3, 5)))
    x = torch.randn(7, 4, generator=generator)
    for name, weight in zip(GATED_MLP, (gate, up, down), strict=True):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight)
        setattr(twin, name, linear)
    try:
        found = kind.forward(twin, x)
    except Exception:  # it computes with more than these three: whatever that is, it is not a gated MLP
        return False
    expected = (activation.function(x @ gate.T) * (x @ up.T)) @ down.T
    return isinstance(found, Tensor) and found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5)
