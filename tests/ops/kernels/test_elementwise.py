"""Norms, rotations and gated products in one pass: in Triton's interpreter against formulas in fp64, and compiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qlora_tool.ops.gated import ACTIVATIONS
from qlora_tool.ops.norm import KINDS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def nans(like: Tensor) -> Tensor:
    """Memory that a kernel has to fill, laid out in order."""
    return torch.full(like.shape, torch.nan, dtype=like.dtype)


def assert_rounded(found: Tensor, exact: Tensor, roundings: float = 0.5, terms: Tensor | None = None) -> None:
    """Each number within so many units in its last place, and eight of fp32's of the largest of `terms`, from which it
    is summed up (by default the largest number there is)."""
    dtype, exact = found.dtype, exact.double()
    largest = (exact if terms is None else terms).abs().amax()
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    bound = (roundings + 0.01) * torch.finfo(dtype).eps * exact.abs() + smallest
    bound += 8 * torch.finfo(torch.float32).eps * largest
    assert ((found.double() - exact).abs() <= bound).all()


# -------------------------------------------------------------------------------------------------------------- norms

SHAPES = [(3, 5), (1, 1), (2, 7, 130), (9, 64), (1, 5000), (0, 8), (3, 2, 4, 128)]


def exact_norm(x: Tensor, weight: Tensor | None, kind) -> Tensor:
    unit = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return unit if weight is None else unit * (kind.offset + weight)


@each_dtype
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_norms_and_their_gradients(interpreted, shape, kind, weighted, dtype):
    module = interpreted("norm")
    x, grad = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    weight = random(shape[-1], dtype=dtype, seed=2) if weighted else None
    y, scale, dx = nans(x), nans(x[..., 0].float()), nans(x)
    module.forward(x, None, weight, 1e-5, kind.offset, kind.rounds, None, y, scale)
    module.backward(grad, None, x, weight, scale, kind.offset, dx)

    exact_x = x.double().requires_grad_()
    exact = exact_norm(exact_x, None if weight is None else weight.double(), kind)
    (exact_dx,) = torch.autograd.grad(exact, exact_x, grad.double())
    if x.numel():
        assert_rounded(y, exact.detach(), 1.1 if kind.rounds else 0.5)
        through = grad.double() * (1 if weight is None else kind.offset + weight.double())
        assert_rounded(dx, exact_dx, terms=through * scale.double().unsqueeze(-1))


@each_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_norms_of_a_sum_and_gradients_that_meet_another(interpreted, shape, dtype):
    module, kind = interpreted("norm"), KINDS[0]
    x, update, grad, passed = (random(*shape, dtype=dtype, seed=seed) for seed in range(4))
    weight = random(shape[-1], dtype=dtype, seed=5)
    total, y, scale, dx = nans(x), nans(x), nans(x[..., 0].float()), nans(x)
    module.forward(x, update, weight, 1e-5, kind.offset, kind.rounds, total, y, scale)
    assert torch.equal(total, x + update)
    module.backward(grad, passed, total, weight, scale, kind.offset, dx)

    exact_x = total.double().requires_grad_()
    exact = exact_norm(exact_x, weight.double(), kind)
    (exact_dx,) = torch.autograd.grad(exact, exact_x, grad.double())
    if x.numel():
        assert_rounded(y, exact.detach(), 1.1)
        through = grad.double() * weight.double() * scale.double().unsqueeze(-1)
        assert_rounded(dx, exact_dx + passed.double(), terms=through.abs().amax() + passed.double().abs().amax())


def test_a_norm_rounds_where_the_family_does(interpreted):
    """Llama's normalized numbers are bf16 before they meet the weight, olmo's are not: the bits tell."""
    module = interpreted("norm")
    x, weight = random(50, 64, dtype=torch.bfloat16), random(64, dtype=torch.bfloat16, seed=2)
    unit = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    for rounds, expected in ((True, weight * unit.bfloat16()), (False, (weight.float() * unit).bfloat16())):
        y = nans(x)
        module.forward(x, None, weight, 1e-5, 0.0, rounds, None, y, nans(x[:, 0].float()))
        assert (y == expected).float().mean() > 0.99


# ---------------------------------------------------------------------------------------------------------- rotations


def exact_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Number by number, as the paper writes it, for x (rows, length, heads, head_dim)."""
    half, result = cos.shape[-1] // 2, x.double().clone()
    cos, sin = cos.double().unsqueeze(2), sin.double().unsqueeze(2)
    for n in range(half):
        first, second = x[..., n].double(), x[..., n + half].double()
        result[..., n] = first * cos[..., n] - second * sin[..., n]
        result[..., n + half] = second * cos[..., n + half] + first * sin[..., n + half]
    return result


@each_dtype
@pytest.mark.parametrize("rows_of_angles", [1, 2])
@pytest.mark.parametrize(("heads", "head_dim", "width"), [((4, 4), 8, 8), ((3, 1), 80, 80), ((6, 2), 128, 64),
                                                           ((1, 0), 64, 12), ((70, 5), 64, 64)])  # fmt: skip
def test_rotations_and_their_gradients(interpreted, heads, head_dim, width, rows_of_angles, dtype):
    module = interpreted("rotary")
    q, k = (random(2, 5, count, head_dim, dtype=dtype, seed=seed) for seed, count in enumerate(heads))
    q = q.transpose(1, 2).contiguous().transpose(1, 2)  # another layout
    k = torch.stack([k, k], dim=-1)[..., 0]  # numbers that lie apart
    cos, sin = (random(rows_of_angles, 5, width, dtype=dtype, seed=seed) for seed in (3, 4))
    found, turned_back = (nans(q), nans(k)), (nans(q), nans(k))
    module.rotate(q, k, cos, sin, False, *found)
    module.rotate(q, k, cos, sin, True, *turned_back)
    for x, y, dx in zip((q, k), found, turned_back, strict=True):
        exact_x = x.double().requires_grad_()
        exact = exact_rotation(exact_x, cos, sin)
        (exact_dx,) = torch.autograd.grad(exact, exact_x, x.double())
        if x.numel():
            assert_rounded(y, exact.detach())
            assert_rounded(dx, exact_dx)


def test_angles_may_be_wider_than_what_they_turn(interpreted):
    module = interpreted("rotary")
    q, k = (random(1, 3, 2, 16, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    cos, sin = (random(1, 3, 16, dtype=torch.float32, seed=seed) for seed in (3, 4))
    found = nans(q), nans(k)
    module.rotate(q, k, cos, sin, False, *found)
    for x, y in zip((q, k), found, strict=True):
        assert_rounded(y, exact_rotation(x, cos, sin))


# ----------------------------------------------------------------------------------------------------- gated products

EXACT = {
    "silu": torch.nn.functional.silu,
    "gelu none": torch.nn.functional.gelu,
    "gelu tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


@each_dtype
@pytest.mark.parametrize("activation", [activation.name for activation in ACTIVATIONS])
@pytest.mark.parametrize("shape", [(3, 1001), (1, 1), (0, 8), (4, 2048)])
def test_gated_products_and_their_gradients(interpreted, shape, activation, dtype):
    module = interpreted("gated")
    gate, up, grad = (random(*shape, dtype=dtype, seed=seed) for seed in range(3))
    gate = gate * 4
    exact_gate, exact_up = gate.double().requires_grad_(), up.double().requires_grad_()
    exact = EXACT[activation](exact_gate) * exact_up
    of_gate, of_up = torch.autograd.grad(exact, (exact_gate, exact_up), grad.double())

    h = nans(gate)
    module.product(gate, up, activation, h)
    module.gradients(gate, up, grad, activation)
    if h.numel():
        assert_rounded(h, exact.detach())
        assert_rounded(gate, exact.detach())
        assert_rounded(up, of_up)
        assert_rounded(grad, of_gate)


@pytest.mark.parametrize("activation", [activation.name for activation in ACTIVATIONS])
def test_large_numbers_pass_a_gate_or_do_not(interpreted, activation):
    module = interpreted("gated")
    gate, up, grad = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4]), torch.full((5,), 3.0), torch.ones(5)
    h = torch.empty(5)
    module.product(gate, up, activation, h)
    assert h.tolist() == [0, 0, 0, 300, 30000]
    module.gradients(gate, up, grad, activation)
    assert grad.tolist() == [0, 0, 1.5, 3, 3] and up.tolist() == [0, 0, 0, 100, 1e4]


# ----------------------------------------------------------------------------------------------------------- compiled

POINTERS = {torch.float32: "*fp32@16", torch.bfloat16: "*bf16@16", torch.float16: "*fp16@16"}


@each_dtype
def test_norms_compile(assembly, dtype):
    from qlora_tool.ops.kernels import norm

    pointer = POINTERS[dtype]
    types = {"x_at": pointer, "weight_at": pointer, "scale_at": "*fp32@16", "rows": "i32", "width": "i32@16",
             "offset": "fp32"}  # fmt: skip
    sizes = {"ROWS": 1, "COLUMNS": 4096}
    forward, backward = {"y_at": pointer, "eps": "fp32"}, {"grad_at": pointer, "result_at": pointer}
    alone = {"update_at": None, "sum_at": None, "ROUNDS": False, "ROWS": 32, "COLUMNS": 128}
    assembly(norm._forward, types | forward, alone)
    assembly(norm._forward, types | forward | {"update_at": pointer, "sum_at": pointer}, {"ROUNDS": True, **sizes})
    assembly(norm._backward, types | backward, {"passed_at": None, "ROWS": 32, "COLUMNS": 128})
    assembly(norm._backward, types | backward | {"passed_at": pointer}, sizes)


@each_dtype
def test_rotations_compile(assembly, dtype):
    from qlora_tool.ops.kernels import rotary

    pointers = dict.fromkeys(("q_at", "k_at", "cos_at", "sin_at", "q_to", "k_to"), POINTERS[dtype])
    numbers = dict.fromkeys(("length", "stride_angles", "q_heads", "k_heads", "q_row", "q_token", "q_head",
                             "q_column", "k_row", "k_token", "k_head", "k_column"), "i32")  # fmt: skip
    sizes = {"HEAD_DIM": 128, "WIDTH": 96, "TRANSPOSED": True, "HEADS": 32, "HALF": 64, "REST": 32}
    assembly(rotary._rotate, pointers | numbers, sizes)


@each_dtype
@pytest.mark.parametrize("activation", [activation.name for activation in ACTIVATIONS])
def test_gated_products_compile_without_a_barrier(assembly, activation, dtype):
    from qlora_tool.ops.kernels import gated

    types = {"gate_at": POINTERS[dtype], "up_at": POINTERS[dtype], "count": "i32@16"}
    constants = {"ACTIVATION": activation, "NUMBERS": 2048}
    for kernel, result in ((gated._product, "h_at"), (gated._gradients, "grad_at")):
        ptx = assembly(kernel, types | {result: POINTERS[dtype]}, constants)
        assert "bar.sync" not in ptx and ".v4.b32" in ptx
