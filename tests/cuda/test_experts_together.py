"""A layer's experts on a card, all together and one after another, against fp64."""

from __future__ import annotations

import pytest
import torch
from rehearsal import REHEARSAL
from torch import Tensor, nn

from qlora_tool.adapters.adapter import ExpertsAdapter
from qlora_tool.methods.lora import METHOD
from qlora_tool.methods.method import Settings
from qlora_tool.model import experts
from qlora_tool.ops import grouped
from qlora_tool.ops.declare import CPU, Target, meant_for, target_of
from qlora_tool.weights.handles import WeightHandle
from qlora_tool.weights.modules import ExpertsWeight
from qlora_tool.weights.quantized import QuantizedTensor, quantize

pytestmark = pytest.mark.cuda
EXPERTS, HIDDEN, INNER = 16, 256, 128


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


class Experts(nn.Module):
    """As transformers lays them out; `exact` is in fp64 on the CPU, of the same weights."""

    has_gate, is_transposed = True, False

    def __init__(self, kind: str, double: bool, r: int, bias: bool, device: torch.device, exact: bool):
        super().__init__()
        self.num_experts, self.has_bias, self.adapted = EXPERTS, bias, nn.ModuleDict()
        dtype, where = (torch.float64, torch.device("cpu")) if exact else (torch.bfloat16, device)
        for name, (out, width) in {"gate_up_proj": (2 * INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}.items():
            value = (drawn(EXPERTS, out, width) / width**0.5).bfloat16()
            stored = value if kind == "none" else quantize(value, kind, double)
            if exact:
                stored = stored.dequantize().double() if isinstance(stored, QuantizedTensor) else stored.double()
                handle = WeightHandle(stored)
            else:
                move = stored.map if isinstance(stored, QuantizedTensor) else lambda put, value=value: put(value)
                handle = WeightHandle(move(lambda tensor: tensor.to(device)))
            setattr(self, name, handle)
            self.adapted[name] = ExpertsWeight(handle)
            lora = {"lora_A": drawn(EXPERTS, r, width) / width**0.5, "lora_B": drawn(EXPERTS, out, r) / r**0.5}
            lora = {key: one.bfloat16().to(where, dtype) for key, one in lora.items()}
            self.adapted[name].add_adapter("one", ExpertsAdapter(METHOD, lora, Settings(r, 3 * r)))
            if bias:
                self.register_buffer(f"{name}_bias", drawn(EXPERTS, out).bfloat16().to(where, dtype))

    def _apply_gate(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return nn.functional.silu(gate) * up


def run(module: Experts, index: Tensor, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    hidden, weights = (drawn(*shape).bfloat16().to(device, dtype).requires_grad_() for shape in
                       ((len(index), HIDDEN), index.shape))  # fmt: skip
    y = experts.experts_forward(module, hidden, index.to(device), weights)
    trained = [one for one in module.parameters() if one.requires_grad]
    grad = drawn(*y.shape, seed=1).bfloat16().to(device, dtype)
    return [y.detach(), *torch.autograd.grad(y, [hidden, weights, *trained], grad)]


@pytest.mark.parametrize("tokens", [1, 300])
@pytest.mark.parametrize(
    ("kind", "double", "r", "bias"),
    [("nf4", True, 8, False), ("nf4", False, 16, True), ("int8", False, 8, False), ("none", False, 8, True),
     ("nf4", True, 4, False)],  # of which the kernel takes none of LoRA's products
)  # fmt: skip
@pytest.mark.parametrize("at_once", [5, 1000])
def test_together_and_one_after_another(device, tokens, kind, double, r, bias, at_once, monkeypatch):
    """In norm within four of bf16's steps, as a chain of ten roundings of half a step and less is; of one token's
    weights, whose gradients are sums of HIDDEN terms of either sign, in terms of their sizes. Experts 3 and 4 get
    nothing."""
    monkeypatch.setattr(grouped, "PIECE_BYTES", at_once * 2 * INNER * HIDDEN * 2)
    scores = torch.rand(tokens, EXPERTS, generator=torch.Generator().manual_seed(tokens))
    scores[:, 3:5] = 0
    index = scores.topk(2).indices
    exact = run(Experts(kind, double, r, bias, device, exact=True), index, torch.device("cpu"), torch.float64)
    module = Experts(kind, double, r, bias, device, exact=False)
    card = Target("cuda", (9, 0)) if REHEARSAL else target_of(torch.empty(0, device=device))
    for target in (card, CPU):  # for a CPU: one after another
        with meant_for(target):
            assert experts.takes_together(module, torch.empty(0, device=device)) == (target == card)
            found = run(module, index, device, torch.bfloat16)
        for place, (one, right) in enumerate(zip(found, exact, strict=True)):
            size = right.norm() * (HIDDEN**0.5 if place == 2 and tokens == 1 else 1)
            off = (one.double().cpu() - right).norm() / size
            print(f"{target.type}: {float(off) / torch.finfo(torch.bfloat16).eps:.2f} steps")
            assert off < 4 * torch.finfo(torch.bfloat16).eps


def test_nothing_waits_but_for_the_counts(device, no_waiting, monkeypatch):
    module = Experts("nf4", True, 8, False, device, exact=False)
    index = torch.arange(600).view(300, 2).remainder(EXPERTS)
    run(module, index, device, torch.bfloat16)  # kernels are compiled
    counts = [600 // EXPERTS + (expert < 600 % EXPERTS) for expert in range(EXPERTS)]
    ends = torch.tensor(counts).cumsum(0).to(device, torch.int32)
    monkeypatch.setattr(experts, "_groups", lambda *_: grouped.Groups(tuple(counts), ends))
    hidden = drawn(300, HIDDEN).bfloat16().to(device).requires_grad_()
    index, weights = index.to(device), torch.ones(300, 2, dtype=torch.bfloat16, device=device)
    with no_waiting():
        experts.experts_forward(module, hidden, index, weights).sum().backward()
    assert hidden.grad.isfinite().all()
