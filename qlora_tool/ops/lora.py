"""LoRA on frozen weights as single operations with hand-written gradients.

    y_i = x·W_iᵀ + b_i + s_i·(x·A_iᵀ)·B_iᵀ        `lora_linear`: one or several linear modules of one input
    y = down(act(gate(x)) ∘ up(x))                 `lora_gated_mlp`: three of them, each as above

x is saved once for all that share it, x·Aᵀ (tokens × r) beside it, the A's are stacked into one product, the gradient
of x is added up in one buffer, and nothing of the size of W is made for a gradient. The gated MLP keeps gate and up
alone and computes the activation again. `lora_linear_reference` and `lora_gated_mlp_reference` say the same in plain
torch.

Each operation has two autograd nodes. The first computes what backward needs and saves it; the second makes the
output, saves nothing, and computes every gradient from what the first saved. So a checkpointed region that ends in such
an operation is recomputed only up to the first node (non-reentrant checkpointing stops at the last value it needs), and
the base product that comes after is never made again.

Source: LoRA (Hu et al. 2021, arXiv 2106.09685), section 4.1; the gradients are those of the two lines above.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_tool.ops.gated import Activation, gated_gradients_, gated_product, runs_in_one_pass
from qlora_tool.ops.linear import FrozenWeight, frozen_linear
from qlora_tool.ops.products import matmul, matmul_add, scaled_matmul


@dataclass(frozen=True)
class LoraWeights:
    """One linear module with its adapter.

    Attributes:
        weight: the handle of W (out, in), frozen.
        A: (r, in), trained.
        B: (out, r), trained.
        scaling: s.
        bias: (out,), or None.
        frozen: A₀ (r₀, in) and B₀ (out, r₀) of a term −s·(x·A₀ᵀ)·B₀ᵀ that is not trained, or None. It is computed with
            the trained one, as one product of rank r + r₀, so that what is equal cancels before it is rounded; its
            halves are put together where they are used, and never kept.
    """

    weight: FrozenWeight
    A: Tensor
    B: Tensor
    scaling: float
    bias: Tensor | None = None
    frozen: tuple[Tensor, Tensor] | None = None

    def to(self, dtype: torch.dtype) -> LoraWeights:
        """The same with A, B and the bias in `dtype`, differentiably."""
        others = [self.bias] * (self.bias is not None) + list(self.frozen or ())
        if self.A.dtype == self.B.dtype == dtype and all(tensor.dtype == dtype for tensor in others):
            return self
        bias = None if self.bias is None else self.bias.to(dtype)
        frozen = None if self.frozen is None else (self.frozen[0].to(dtype), self.frozen[1].to(dtype))
        return LoraWeights(self.weight, self.A.to(dtype), self.B.to(dtype), self.scaling, bias, frozen)

    @property
    def columns(self) -> int:
        """Of z: r, or r + r₀."""
        return self.A.shape[0] + (0 if self.frozen is None else self.frozen[0].shape[0])

    @property
    def inner(self) -> list[Tensor]:
        """A, and A₀ below it: (columns, in) together."""
        return [self.A] if self.frozen is None else [self.A, self.frozen[0]]

    @property
    def outer(self) -> Tensor:
        """[B, −B₀]: (out, columns)."""
        return self.B if self.frozen is None else torch.cat([self.B, -self.frozen[1]], dim=1)


# ---------------------------------------------------------------------------------------------- one input, any outputs


def lora_linear(x: Tensor, layers: Sequence[LoraWeights]) -> tuple[Tensor, ...]:
    """x (…, in) through every layer → (…, out) each; x in the dtype of matrix products.

    A trained bias gets its gradient too.
    """
    layers = [layer.to(x.dtype) for layer in layers]
    flat = x.reshape(-1, x.shape[-1])
    z = _Keep.apply(flat, layers, *(layer.A for layer in layers))
    outputs = _LoraLinear.apply(flat, z, layers, *_trained(layers))
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)


def lora_linear_reference(x: Tensor, layers: Sequence[LoraWeights]) -> tuple[Tensor, ...]:
    """The same by autograd."""
    layers = [layer.to(x.dtype) for layer in layers]
    return tuple(_reference(x, layer) for layer in layers)


def _reference(x: Tensor, layer: LoraWeights) -> Tensor:
    linear = torch.nn.functional.linear
    branch = linear(linear(x, _stacked([layer])), layer.outer) * layer.scaling
    y = frozen_linear(x, layer.weight) + branch
    return y if layer.bias is None else y + layer.bias


def _trained(layers: Sequence[LoraWeights]) -> list[Tensor | None]:
    """A, B and bias of every layer, in the order in which gradients come back."""
    return [tensor for layer in layers for tensor in (layer.A, layer.B, layer.bias)]


def _stacked(layers: Sequence[LoraWeights]) -> Tensor:
    """The A's of all layers, (Σ columns, in)."""
    matrices = [matrix for layer in layers for matrix in layer.inner]
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices)


class _Keep(torch.autograd.Function):
    """z = x·[A_1; A_2; …]ᵀ, (tokens, Σr); saves x and z for the node that comes after it."""

    @staticmethod
    def forward(ctx, x: Tensor, layers: Sequence[LoraWeights], *A: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        z = matmul(x, _stacked(layers).T)
        ctx.save_for_backward(x, z)
        return z

    @staticmethod
    def backward(ctx, _):
        return (None,) * len(ctx.needs_input_grad)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, z: Tensor, layers: Sequence[LoraWeights], *trained: Tensor | None):
        ctx.saving_node, ctx.layers = z.grad_fn, layers
        return tuple(_outputs(x, z, layers))

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x, z = ctx.saving_node.saved_tensors
        needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        grads = [grad.contiguous() for grad in grads]
        dz, trained = _adapter_gradients(x, z, grads, ctx.layers, needs)
        return _input_gradient(dz, grads, ctx.layers) if needs_x else None, None, None, *trained


def _outputs(x: Tensor, z: Tensor, layers: Sequence[LoraWeights]) -> list[Tensor]:
    outputs, begin = [], 0
    for layer in layers:
        end = begin + layer.columns
        y = matmul(x, layer.weight.dense(x.dtype).T)
        y.addmm_(z[:, begin:end], layer.outer.T, alpha=layer.scaling)
        outputs.append(y if layer.bias is None else y.add_(layer.bias))
        begin = end
    return outputs


def _adapter_gradients(
    x: Tensor, z: Tensor, grads: Sequence[Tensor], layers: Sequence[LoraWeights], needs: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """The gradient of z, (tokens, Σr), and those of A, B and bias of every layer."""
    dz = _inner_gradient(grads, layers)
    return dz, _trained_gradients(x, z, dz, grads, layers, needs)


def _inner_gradient(grads: Sequence[Tensor], layers: Sequence[LoraWeights]) -> Tensor:
    """The gradient of z, (tokens, Σr)."""
    ranks = [layer.columns for layer in layers]
    dz = grads[0].new_empty(grads[0].shape[0], sum(ranks))
    for part, layer, grad in zip(dz.split(ranks, dim=1), layers, grads, strict=True):
        scaled_matmul(grad, layer.outer, layer.scaling, part)
    return dz


def _trained_gradients(
    x: Tensor, z: Tensor, dz: Tensor, grads: Sequence[Tensor], layers: Sequence[LoraWeights], needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of A, B and bias of every layer."""
    ranks, of_B, of_bias = [layer.A.shape[0] for layer in layers], [], []
    z, dz = _trained_columns(z, layers), _trained_columns(dz, layers)
    for index, (part, layer, grad) in enumerate(zip(z.split(ranks, dim=1), layers, grads, strict=True)):
        of_B.append(scaled_matmul(part.T, grad, layer.scaling).T)  # (r, out), turned: faster than (out, r)
        of_bias.append(grad.sum(0) if needs[3 * index + 2] else None)
    of_A = matmul(dz.T, x).split(ranks)
    return [gradient for group in zip(of_A, of_B, of_bias, strict=True) for gradient in group]


def _trained_columns(z: Tensor, layers: Sequence[LoraWeights]) -> Tensor:
    """Of (tokens, Σ columns) those that A and B have a part in, (tokens, Σr)."""
    if all(layer.frozen is None for layer in layers):
        return z
    parts = z.split([layer.columns for layer in layers], dim=1)
    return torch.cat([part[:, : layer.A.shape[0]] for part, layer in zip(parts, layers, strict=True)], dim=1)


def _input_gradient(dz: Tensor, grads: Sequence[Tensor], layers: Sequence[LoraWeights]) -> Tensor:
    """The gradient of x, (tokens, in): through every base weight, and through the A's."""
    dx = None
    for layer, grad in zip(layers, grads, strict=True):
        weight = layer.weight.dense(grad.dtype)
        dx = matmul(grad, weight) if dx is None else matmul_add(grad, weight, dx)
        del weight
    return dx.addmm_(dz, _stacked(layers))


# ---------------------------------------------------------------------------------------------- the gated MLP


def lora_gated_mlp(
    x: Tensor, gate: LoraWeights, up: LoraWeights, down: LoraWeights, activation: Activation, tile: int | None = None
) -> Tensor:
    """down(activation(gate(x)) ∘ up(x)): x (…, in) → (…, out).

    Args:
        tile: tokens that gate and up are made for at a time; backward makes them again, tile by tile, and x is all that
            is kept. None keeps gate and up of all tokens.
    """
    layers = [layer.to(x.dtype) for layer in (gate, up, down)]
    flat = x.reshape(-1, x.shape[-1])
    if tile is not None and flat.shape[0] > tile:
        z = _Keep.apply(flat, layers[:2], gate.A, up.A)
        y = _LoraGatedTiles.apply(flat, z, layers, activation, tile, *_trained(layers))
    else:
        gated, upped = _KeepGated.apply(flat, layers[:2], *_trained(layers[:2]))
        y = _LoraGated.apply(flat, gated, upped, layers, activation, *_trained(layers))
    return y.view(*x.shape[:-1], y.shape[-1])


def lora_gated_mlp_reference(
    x: Tensor, gate: LoraWeights, up: LoraWeights, down: LoraWeights, activation: Activation
) -> Tensor:
    """The same by autograd."""
    gated, upped = lora_linear_reference(x, (gate, up))
    return lora_linear_reference(activation.function(gated) * upped, (down,))[0]


class _KeepGated(torch.autograd.Function):
    """gate(x) and up(x), (tokens, intermediate) each; saves them, x and z."""

    @staticmethod
    def forward(ctx, x: Tensor, layers: Sequence[LoraWeights], *trained: Tensor | None):
        ctx.set_materialize_grads(False)
        z = matmul(x, _stacked(layers).T)
        gated, upped = _outputs(x, z, layers)
        ctx.save_for_backward(x, z, gated, upped)
        return gated, upped

    @staticmethod
    def backward(ctx, *_):
        return (None,) * len(ctx.needs_input_grad)


class _LoraGated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gated: Tensor, upped: Tensor, layers, activation: Activation, *trained: Tensor | None):
        ctx.saving_node, ctx.layers, ctx.activation = gated.grad_fn, layers, activation
        return _gated_output(gated_product(gated, upped, activation), layers[2])

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, z, *inner = ctx.saving_node.saved_tensors
        needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        owned = not torch._C._autograd._get_current_graph_task_keep_graph()  # what was saved is then read once
        dx, trained = _gated_gradients(
            x, z, inner, grad.contiguous(), ctx.layers, ctx.activation, needs_x, needs, owned
        )
        return dx, None, None, None, None, *trained


class _LoraGatedTiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, z: Tensor, layers, activation: Activation, tile: int, *trained: Tensor | None):
        ctx.saving_node, ctx.layers, ctx.activation, ctx.tile = z.grad_fn, layers, activation, tile
        y = x.new_empty(x.shape[0], layers[2].B.shape[0])
        for rows in _tiles(x, tile):
            gated, upped = _outputs(x[rows], z[rows], layers[:2])
            y[rows] = _gated_output(gated_product(gated, upped, activation), layers[2])
            del gated, upped
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, z = ctx.saving_node.saved_tensors
        needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        dx = torch.empty_like(x) if needs_x else None
        sums: list[Tensor | None] = [None] * len(needs)  # in fp32: many tiles would round a 16-bit sum many times
        for rows in _tiles(x, ctx.tile):
            inner = _outputs(x[rows], z[rows], ctx.layers[:2])
            of_x, trained = _gated_gradients(
                x[rows], z[rows], inner, grad[rows].contiguous(), ctx.layers, ctx.activation, needs_x, needs,
                owned=True,
            )  # fmt: skip
            if needs_x:
                dx[rows] = of_x
            sums = [new if new is None else new.float() if old is None else old.add_(new)
                    for old, new in zip(sums, trained, strict=True)]  # fmt: skip
        return dx, None, None, None, None, *(None if total is None else total.to(x.dtype) for total in sums)


def _tiles(x: Tensor, tile: int) -> list[slice]:
    return [slice(start, start + tile) for start in range(0, x.shape[0], tile)]


def _gated_output(h: Tensor, down: LoraWeights) -> Tensor:
    return _outputs(h, matmul(h, _stacked([down]).T), [down])[0]


def _gated_gradients(
    x: Tensor, z: Tensor, inner: list[Tensor], grad: Tensor, layers: Sequence[LoraWeights], activation: Activation,
    needs_x: bool, needs: Sequence[bool], owned: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:  # fmt: skip
    """The gradient of x (None where not needed), and of A, B and bias of gate, up and down.

    Args:
        inner: gate(x) and up(x); the list is emptied, so that they are gone when they are of no more use.
        owned: nobody else needs them, so that they may be written over.
    """
    gated, upped = inner
    inner.clear()
    *layers, down = layers
    if runs_in_one_pass(gated, activation):
        d_gate, d_up, of_down = _gradients_in_one_pass(gated, upped, grad, down, activation, owned, needs[6:])
    else:
        d_gate, d_up, of_down = _gradients_by_steps(gated, upped, grad, down, activation, needs[6:])
    del gated, upped
    grads = [d_gate, d_up]
    dz, of_layers = _adapter_gradients(x, z, grads, layers, needs[:6])
    return _input_gradient(dz, grads, layers) if needs_x else None, [*of_layers, *of_down]


def _gradients_by_steps(
    gated: Tensor, upped: Tensor, grad: Tensor, down: LoraWeights, activation: Activation, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """The gradients of gate(x) and up(x), and of A, B and bias of down."""
    active = activation.function(gated)
    h = active * upped
    dz, of_down = _adapter_gradients(h, matmul(h, _stacked([down]).T), [grad], [down], needs)
    del h
    dh = _input_gradient(dz, [grad], [down])
    d_up = active.mul_(dh)
    return activation.gradient(dh.mul_(upped), gated), d_up, of_down


def _gradients_in_one_pass(
    gated: Tensor, upped: Tensor, grad: Tensor, down: LoraWeights, activation: Activation, owned: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor | None]]:  # fmt: skip
    """The same; where gate(x) and up(x) are of no more use (`owned`), what comes out takes their memory."""
    dz = _inner_gradient([grad], [down])
    d_gate = _input_gradient(dz, [grad], [down])  # of h, to begin with
    h, d_up = (gated, upped) if owned else (gated.clone(), upped.clone())
    gated_gradients_(h, d_up, d_gate, activation)
    return d_gate, d_up, _trained_gradients(h, matmul(h, _stacked([down]).T), dz, [grad], [down], needs)
