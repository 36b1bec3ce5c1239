"""The inputs that `tools/measure kernels` gives to operations: those of a step of a 7B."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MATRICES = ((4096, 4096), (11008, 4096), (4096, 11008))
BATCHES = ((1, 2048), (4, 1024))
JOINED = {"q, k, v": (4096, 4096, 4096), "gate, up": (11008, 11008)}
HIDDEN, INTERMEDIATE, HEADS, HEAD_DIM = 4096, 11008, 32, 128
EXPERTS, EXPERT_ROWS, EXPERT_SIZES = 128, 128, (1536, 2048)  # of a layer of Qwen3-30B-A3B, 2048 tokens, 8 each
LAYERS, RANK = 32, 16  # of the adapters that AdamW steps with: 40 million weights in 448 tensors


@dataclass(frozen=True)
class Case:
    """One operation at one shape.

    Attributes:
        operation: its name without the namespace.
        what: the shape and kind in words.
        arguments: makes them on a device; another seed, other numbers.
        compared: of the results, so many are; None: all of them.
    """

    operation: str
    what: str
    arguments: Callable[[torch.device, int], tuple[Any, ...]]
    compared: int | None = None


def weight(device: torch.device, seed: int, shape: tuple[int, int], kind: str, double: bool) -> Any:
    """A quantized matrix of random numbers."""
    from qlora_tool.weights.quantized import quantize

    return quantize(random_arguments(device, seed, sizes=(shape,), rest=())[0], kind, double)


def dense_arguments(
    device: torch.device, seed: int, *, shape: tuple[int, int], kind: str, double: bool, dtype: str
) -> tuple[Any, ...]:
    import torch

    of = weight(device, seed, shape, kind, double)
    rest = () if kind == "int8" else (of.nested_scales, of.nested_offset, kind, of.block_size, 0, shape)
    return of.codes, of.scales, *rest, getattr(torch, dtype)


def random_arguments(
    device: torch.device, seed: int, *, sizes: Sequence[tuple[int, ...]], rest: tuple[Any, ...]
) -> tuple[Any, ...]:
    """bf16 tensors of these sizes, and what comes after them."""
    import torch

    draw = torch.Generator(device).manual_seed(seed)
    made = [torch.randn(size, generator=draw, device=device, dtype=torch.bfloat16) for size in sizes]
    return (*made, *rest)


def norm_backward_arguments(
    device: torch.device, seed: int, *, size: tuple[int, ...], passed: bool
) -> tuple[Any, ...]:
    import torch

    grad, x, beside, scaling = random_arguments(device, seed, sizes=(size, size, size, size[-1:]), rest=())
    return grad, beside if passed else None, x, scaling, torch.rsqrt(x.float().square().mean(-1) + 1e-5), 0.0


def grouped_arguments(device: torch.device, seed: int, *, gradient: bool) -> tuple[Any, ...]:
    """Rows of many experts, as many of each, and the experts' matrices, or the gradients of their products."""
    import torch

    (out, width), rows = EXPERT_SIZES, EXPERTS * EXPERT_ROWS
    left, right = ((rows, out), (rows, width)) if gradient else ((rows, width), (EXPERTS, width, out))
    ends = torch.arange(1, EXPERTS + 1, dtype=torch.int32, device=device) * EXPERT_ROWS
    return ends, *random_arguments(device, seed, sizes=(left, right), rest=([EXPERT_ROWS] * EXPERTS,))


def adapter_shapes() -> list[tuple[int, int]]:
    """A and B of every linear module of a 7B."""
    of_layer = [(HIDDEN, HIDDEN)] * 4 + [(INTERMEDIATE, HIDDEN)] * 2 + [(HIDDEN, INTERMEDIATE)]
    return [shape for out, width in of_layer * LAYERS for shape in ((RANK, width), (out, RANK))]


def adamw_arguments(device: torch.device, seed: int) -> tuple[Any, ...]:
    """bf16 weights and gradients, moments in 8 bits, all zero but the gradients: the first step of a run."""
    import bitsandbytes.functional as bnb
    import torch

    shapes = adapter_shapes()
    gradients = random_arguments(device, seed, sizes=shapes, rest=())
    sizes = [gradient.numel() for gradient in gradients]

    def zeros(dtype: torch.dtype, block: int = 1) -> list[Tensor]:
        return [torch.zeros(-(-size // block), dtype=dtype, device=device) for size in sizes]

    codes = [bnb.create_dynamic_map(signed=signed).to(device) for signed in (True, False)]
    count, weights = len(shapes), [torch.zeros_like(gradient) for gradient in gradients]
    return (
        weights, list(gradients), zeros(torch.int16), zeros(torch.uint8), zeros(torch.uint8),
        zeros(torch.float32, 256), zeros(torch.float32, 256), codes, None, [1] * count, [1e-4] * count, 0.0,
    )  # fmt: skip


def cases() -> list[Case]:
    """All that are known, those of operations that this version does not have too."""
    found = []

    def dense(shape: tuple[int, int], kind: str, double: bool = False, dtype: str = "bfloat16") -> None:
        what = f"{shape[0]} x {shape[1]} {kind}{' double' if double else ''} {dtype}"
        make = functools.partial(dense_arguments, shape=shape, kind=kind, double=double, dtype=dtype)
        found.append(Case("dequantize_int8" if kind == "int8" else "dequantize_4bit", what, make))

    for shape in MATRICES:
        dense(shape, "nf4", True)
        dense(shape, "int8")
    dense(MATRICES[0], "nf4")
    dense(MATRICES[0], "fp4", True)
    dense(MATRICES[0], "nf4", True, "float16")
    dense(MATRICES[0], "nf4", True, "float32")
    for rows, length in BATCHES:
        hidden, inner = (rows, length, HIDDEN), (rows * length, INTERMEDIATE)
        heads, angles = (rows, length, HEADS, HEAD_DIM), (1, length, HEAD_DIM)

        def add(operation: str, make: Callable[..., tuple[Any, ...]], what: str = f"{rows} x {length}", **of: Any):
            found.append(Case(operation, what, functools.partial(make, **of)))

        add("rms_norm", random_arguments, sizes=(hidden, hidden[-1:]), rest=(1e-5, 0.0, True))
        add("add_rms_norm", random_arguments, sizes=(hidden, hidden, hidden[-1:]), rest=(1e-5, 0.0, True))
        for passed, where in ((False, "alone"), (True, "beside a residual")):
            add("rms_norm_backward", norm_backward_arguments, f"{rows} x {length} {where}", size=hidden, passed=passed)
        add("rotary", random_arguments, sizes=(heads, heads, angles, angles), rest=(False,))
        add("gated_product", random_arguments, sizes=(inner, inner), rest=("silu",))
        add("gated_gradients_", random_arguments, sizes=(inner,) * 3, rest=("silu",))
    of_experts = f"{EXPERTS} experts, {EXPERT_ROWS} rows each"
    for operation, gradient in (("grouped_matmul", False), ("grouped_gradient", True)):
        found.append(Case(operation, of_experts, functools.partial(grouped_arguments, gradient=gradient)))
    found.append(Case("adamw", f"{2 * 7 * LAYERS} weights, 8 bits", adamw_arguments, 2 * 7 * LAYERS))
    return found


def product_calls(sizes: Sequence[int], tokens: int, device: torch.device) -> dict[str, Callable[[], Any]]:
    import torch

    from qlora_tool.ops.kernels.dequantize import dequantize_4bit
    from qlora_tool.ops.quantization import NESTED_BLOCK_SIZE, code_values

    weights = [weight(device, seed, (size, HIDDEN), "nf4", True) for seed, size in enumerate(sizes)]
    x, *grads = random_arguments(device, 0, sizes=((tokens, HIDDEN), *((tokens, size) for size in sizes)), rest=())
    codes, nested = code_values("nf4", device), code_values("nested", device)

    def together() -> Tensor:
        dense = x.new_empty(sum(sizes), HIDDEN)
        for one, part in zip(weights, dense.split(list(sizes)), strict=True):
            dequantize_4bit(one.codes, codes, one.scales, nested, one.nested_scales, one.nested_offset,
                            one.block_size, NESTED_BLOCK_SIZE, 0, part)  # fmt: skip
        return dense

    def gradient_apart() -> Tensor:
        dx = None
        for grad, one in zip(grads, weights, strict=True):
            dense = one.dequantize(torch.bfloat16)
            dx = torch.mm(grad, dense) if dx is None else dx.addmm_(grad, dense)
        return dx

    return {
        "forward apart": lambda: [torch.mm(x, one.dequantize(torch.bfloat16).T) for one in weights],
        "forward joined": lambda: torch.mm(x, together().T),
        "gradient apart": gradient_apart,
        "gradient joined": lambda: torch.mm(torch.cat(grads, 1), together()),
    }
