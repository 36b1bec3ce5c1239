"""What is fused, what is not, and that it computes the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from qlora_tool.adapters.adapter import Adapter
from qlora_tool.adapters.fusion import SharedInput, fuse, gated_activation
from qlora_tool.methods import METHODS
from qlora_tool.methods.lora import Lora
from qlora_tool.methods.method import Settings
from qlora_tool.weights.handles import WeightHandle
from qlora_tool.weights.modules import FrozenLinear


def linear(out: int, width: int, *, dropout: float = 0.0, seed: int = 0) -> FrozenLinear:
    generator = torch.Generator().manual_seed(seed)
    module = FrozenLinear(width, out, None)
    module.weight = WeightHandle(torch.randn(out, width, generator=generator) / width**0.5)
    A, B = torch.randn(2, width, generator=generator), torch.randn(out, 2, generator=generator)
    module.add_adapter("default", Adapter(METHODS["lora"], {"lora_A": A, "lora_B": B}, Settings(2, 4, dropout)))
    return module


def mlp(kind=LlamaMLP, act="silu", **options):
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=8, intermediate_size=12, num_attention_heads=2, hidden_act=act)
    config.hidden_activation = act
    module = kind(config)
    for index, name in enumerate(("gate_proj", "up_proj")):
        setattr(module, name, linear(12, 8, seed=index, **options))
    module.down_proj = linear(8, 12, seed=2, **options)
    return module


def gradients(module, x):
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *parameters])]


@pytest.mark.parametrize(("kind", "act", "name"), [
    (LlamaMLP, "silu", "silu"), (Qwen2MLP, "silu", "silu"), (GemmaMLP, "gelu_pytorch_tanh", "gelu tanh"),
    (LlamaMLP, "gelu", "gelu none"), (LlamaMLP, "relu", None),
])  # fmt: skip
def test_a_gated_mlp_is_known_by_what_it_computes(kind, act, name):
    activation = gated_activation(mlp(kind, act))
    assert (activation and activation.name) == name


class Other(LlamaMLP):
    """Of the right names, and something else."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


def test_modules_of_the_right_names_that_compute_something_else_are_left_alone():
    module = mlp(Other)
    assert gated_activation(module) is None
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(3)).requires_grad_()
    expected = gradients(module, x)
    fuse(module)
    assert "forward" not in vars(module)
    # The same sums of at most 12 products, three forward and three backward, in another order.
    rounding = 6 * 12 * 2**-24
    for value, wanted in zip(gradients(module, x), expected, strict=True):
        assert float((value - wanted).abs().max()) < rounding * float(wanted.abs().max())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_fused_mlp_computes_the_same_and_dropout_takes_the_general_path(dropout):
    module = mlp(dropout=dropout)
    x = torch.randn(3, 8, requires_grad=True)
    Lora.fused = False
    try:
        torch.manual_seed(0)
        expected = gradients(module, x)
    finally:
        Lora.fused = True
    fuse(module)
    torch.manual_seed(0)
    found = gradients(module, x)
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    last = module(x).grad_fn
    fused = any("_LoraGated" in type(node).__name__ for node in (last, last.next_functions[0][0]))
    assert fused == (dropout == 0.0)


class Attention(nn.Module):
    def __init__(self, same: bool):
        super().__init__()
        self.same = same
        for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
            setattr(self, name, linear(6, 8, seed=index))

    def forward(self, x):
        other = x if self.same else x + 1
        return self.q_proj(x) * self.k_proj(other) + self.v_proj(other)


@pytest.mark.parametrize("same", [True, False])
def test_projections_of_one_input_run_as_one(same):
    module = Attention(same)
    x = torch.randn(3, 8, requires_grad=True)
    expected = gradients(module, x)
    fuse(module)
    for _ in range(2):
        for value, wanted in zip(gradients(module, x), expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-4)  # sums of squares of size 100
    shared = module.q_proj.adapter.shared
    assert isinstance(shared, SharedInput)
    q, k = module.q_proj(x), module.k_proj(x if same else x + 1)
    together = q.grad_fn.next_functions[0][0] is k.grad_fn.next_functions[0][0]
    assert together == same


def test_one_unfusable_module_among_them_keeps_its_own_way():
    module = Attention(True)
    fuse(module)
    module.k_proj.adapter.dropout = nn.Dropout(0.5)
    torch.manual_seed(0)
    found = module(x := torch.ones(3, 8))
    torch.manual_seed(0)
    q, k, v = (getattr(module, name).adapter for name in ("q_proj", "k_proj", "v_proj"))
    dropped = k.dropout(x)
    expected = [
        x @ getattr(module, name).weight.stored().T + adapter.method.branch(adapter, dropped if adapter is k else x)
        for name, adapter in (("q_proj", q), ("k_proj", k), ("v_proj", v))
    ]
    torch.testing.assert_close(found, expected[0] * expected[1] + expected[2])
