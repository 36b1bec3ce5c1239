"""Norms, rotations and whole models that compute by them on a card, against fp64."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import tiny_model, tokens
from torch import Tensor, nn

from qlora_tool.model.fused_modules import fuse_modules
from qlora_tool.ops import norm
from qlora_tool.ops.norm import KINDS, NormKind, add_and_norm, rms_norm
from qlora_tool.ops.rotary import rotary

pytestmark = pytest.mark.cuda
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def off(found: Tensor, exact: Tensor) -> float:
    """The norm of the difference over that of the exact one."""
    found, exact = found.detach().double().cpu(), exact.detach().double().cpu()
    return float(torch.linalg.vector_norm(found - exact) / torch.linalg.vector_norm(exact))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", [(2, 37, 4096), (5, 3, 8, 128), (3, 5001), (1, 1, 20000), (64, 80)])
@pytest.mark.parametrize("triton", [True, False])
def test_norms(device, triton, shape, kind, dtype, monkeypatch):
    """By Triton's kernels, and by PyTorch's where there is no Triton."""
    if not triton:
        monkeypatch.setattr(norm, "usable", lambda _: False)
    x = drawn(*shape).to(device, dtype).requires_grad_()
    weight = drawn(shape[-1], seed=1).to(device, dtype)
    grad, update, passed = (drawn(*shape, seed=seed).to(device, dtype) for seed in (2, 3, 4))
    y = rms_norm(x, weight, 1e-5, kind)
    (dx,) = torch.autograd.grad(y, x, grad)
    expected, gradient = _exact_norm(x, weight, kind, grad)
    assert y.dtype == dx.dtype == dtype and y.is_contiguous()
    assert off(y, expected) < torch.finfo(dtype).eps and off(dx, gradient) < 2 * torch.finfo(dtype).eps
    total, y = add_and_norm(x, update, weight, 1e-5, kind)
    (dx,) = torch.autograd.grad((total, y), x, (passed, grad))
    expected, gradient = _exact_norm(total, weight, kind, grad)
    assert torch.equal(total, x + update)
    gradient = gradient + passed.double().cpu()
    assert off(y, expected) < torch.finfo(dtype).eps and off(dx, gradient) < 2 * torch.finfo(dtype).eps


def _exact_norm(x: Tensor, weight: Tensor, kind: NormKind, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The norm and the gradient of x, in fp64."""
    exact = x.detach().double().cpu().requires_grad_()
    unit = exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = unit * (kind.offset + weight.double().cpu())
    return expected, torch.autograd.grad(expected, exact, grad.double().cpu())[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "key_heads", "head_dim", "width"), [(32, 8, 128, 128), (3, 1, 80, 80), (4, 4, 96, 48)]
)
@pytest.mark.parametrize("heads_first", [True, False])
def test_rotations(device, heads, key_heads, head_dim, width, heads_first, dtype):
    q, k = (drawn(2, 37, count, head_dim, seed=count).to(device, dtype) for count in (heads, key_heads))
    if heads_first:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    q.requires_grad_(), k.requires_grad_()
    angles = drawn(1, 37, width // 2, seed=3).repeat(1, 1, 2)
    cos, sin = angles.cos().to(device, dtype), angles.sin().to(device, dtype)
    found = rotary(q, k, cos, sin, heads_first)
    for x, y in zip((q, k), found, strict=True):
        grad = drawn(*y.shape, seed=4).to(device, dtype)
        (dx,) = torch.autograd.grad(y, x, grad, retain_graph=True)
        exact = x.detach().double().cpu().requires_grad_()
        dim = 1 if heads_first else 2
        c, s = cos.double().cpu().unsqueeze(dim), sin.double().cpu().unsqueeze(dim)
        first, second = exact[..., : width // 2], exact[..., width // 2 : width]
        turned = exact[..., :width] * c + torch.cat([-second, first], -1) * s
        expected = torch.cat([turned, exact[..., width:]], -1)
        (gradient,) = torch.autograd.grad(expected, exact, grad.double().cpu())
        assert off(y, expected) < torch.finfo(dtype).eps and off(dx, gradient) < torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "olmo2", "phi3", "glm4", "stablelm"])
def test_models_are_as_near_to_fp64_as_they_were(device, family, dtype):
    """Logits and gradients of a tiny model, both ways. They may differ by what either is off, a few times over."""
    model = tiny_model(family, hidden_size=256, intermediate_size=512, head_dim=64)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() > 1)
    plain = copy.deepcopy(model).to(device, dtype)
    fused = copy.deepcopy(plain)
    if device.type == "cuda":
        assert fuse_modules(fused).modules
    exact, before, after = (_results(one) for one in (model.double(), plain, fused))
    for wanted, one, other in zip(exact, before, after, strict=True):
        print(f"{off(one, wanted):.1e} {off(other, wanted):.1e}")
        assert off(other, wanted) < 2 * off(one, wanted) + 8 * torch.finfo(torch.float32).eps


def _results(model: nn.Module) -> list[Tensor]:
    """Logits, and the gradient of everything that has one."""
    device = next(model.parameters()).device
    logits = model(input_ids=tokens(2, 40).to(device), use_cache=False).logits
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(logits, trained, drawn(*logits.shape, seed=6).to(logits), allow_unused=True)
    return [logits, *(grad for grad in grads if grad is not None)]
