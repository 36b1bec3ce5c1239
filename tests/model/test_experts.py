"""Mixtures of experts through handles, against transformers' own experts."""

from __future__ import annotations

import pytest
import torch
from tiny_models import logits, read_by_transformers, read_tiny, relative_error, tokens, write_tiny
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_tool.model.experts import expert_weight_names, experts_forward, is_experts_module
from qlora_tool.weights.handles import WeightHandle
from qlora_tool.weights.quantized import quantize

MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "granitemoe", "olmoe", "phimoe", "deepseek_v3"]


def experts_of(model):
    return [module for module in model.modules() if is_experts_module(module)]


def pair(family: str, folder):
    """The experts of one layer, ours and transformers', with the same weights in fp32."""
    write_tiny(family, folder)
    theirs = read_by_transformers(folder, experts_implementation="eager")
    return experts_of(read_tiny(folder))[-1], experts_of(theirs)[-1]


def routed(tokens: int, experts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 64, generator=generator)
    return hidden, torch.tensor(experts), torch.rand(tokens, len(experts[0]), generator=generator)


@pytest.mark.parametrize(
    "experts",
    [
        [[0, 1], [2, 3], [1, 0], [3, 1], [0, 2]],
        [[2, 1]] * 5,  # two of the four get nothing
        [[3], [0], [3], [3], [0]],  # one a token
        [[3, 2, 1, 0]] * 5,  # all of them
        [[1, 1]] * 5,  # the same one twice
    ],
)
@pytest.mark.parametrize("family", MIXTURES)
def test_output_and_gradient_are_those_of_transformers_experts(family, experts, tmp_path):
    ours, theirs = pair(family, tmp_path)
    hidden, index, weights = routed(5, experts)
    results = []
    for module, forward in ((ours, lambda *args: experts_forward(ours, *args)), (theirs, theirs)):
        x, w = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
        y = forward(x, index, w)
        y.backward(torch.ones_like(y))
        results.append((y.detach(), x.grad, w.grad))
        assert module.num_experts == 4
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected) <= 1e-5


@pytest.mark.parametrize("family", MIXTURES)
def test_all_three_dimensional_weights_are_quantized(family, tmp_path):
    model = read_tiny(write_tiny(family, tmp_path), "nf4")
    assert experts_of(model)
    for module in experts_of(model):
        assert expert_weight_names(module) == []  # none is left a parameter
        handles = {name: child for name, child in module.named_children() if isinstance(child, WeightHandle)}
        assert handles.keys() == {"gate_up_proj", "down_proj"}
        width = module.down_proj.shape[-1]
        assert tuple(module.gate_up_proj.shape) == (4, 2 * width, 64)  # (experts, out, in), however transformers has it
        assert tuple(module.down_proj.shape) == (4, 64, width)
        assert all(handle.kind == "nf4" for handle in handles.values())
    assert not [name for name, parameter in model.named_parameters() if parameter.dim() == 3]


def test_gpt_oss_keeps_its_interleaved_gate_its_bias_and_its_turned_weights(tmp_path):
    """Against its definition: even outputs gate, odd ones are the values, both clamped; (up + 1)·gate·σ(1.702·gate)."""
    folder = write_tiny("gpt_oss", tmp_path)
    ours = experts_of(read_tiny(folder))[-1]
    raw = read_by_transformers(folder).state_dict()
    raw = {name.rpartition(".")[2]: tensor for name, tensor in raw.items() if "layers.1.mlp.experts" in name}
    assert raw["gate_up_proj"].shape == (4, 64, 256)  # (experts, in, out), in the file and in transformers' module
    hidden, index, weights = routed(3, [[0, 3], [2, 1], [1, 0]])
    expected = torch.zeros(3, 64)
    for token in range(3):
        for place in range(2):
            expert = int(index[token, place])
            mixed = hidden[token] @ raw["gate_up_proj"][expert] + raw["gate_up_proj_bias"][expert]
            gate, up = mixed[0::2].clamp(max=7), mixed[1::2].clamp(-7, 7)
            value = (up + 1) * gate * torch.sigmoid(1.702 * gate)
            out = value @ raw["down_proj"][expert] + raw["down_proj_bias"][expert]
            expected[token] += weights[token, place] * out
    assert relative_error(experts_forward(ours, hidden, index, weights), expected) <= 1e-5


def test_one_expert_at_a_time_is_dequantized(tmp_path):
    module = experts_of(read_tiny(write_tiny("mixtral", tmp_path), "nf4"))[0]
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.is_floating_point():
                largest = max(largest, result.numel())
            return result

    hidden, index, weights = routed(2, [[0, 1], [2, 3]])
    with Watch():
        y = experts_forward(module, hidden.requires_grad_(), index, weights)
        y.sum().backward()
    assert largest == 256 * 64  # gate and up of one expert, of four


def test_an_expert_nobody_chose_is_not_asked_for(tmp_path):
    module = experts_of(read_tiny(write_tiny("mixtral", tmp_path), "nf4"))[0]
    asked = []
    dense = WeightHandle.dense

    def watched(self, dtype, expert=None):
        asked.append(expert)
        return dense(self, dtype, expert)

    hidden, index, weights = routed(2, [[1, 3], [3, 1]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightHandle, "dense", watched)
        experts_forward(module, hidden, index, weights)
    assert asked == [1, 1, 3, 3]


def test_an_experts_handle_gives_each_experts_matrix():
    weight = torch.randn(3, 20, 64, generator=torch.Generator().manual_seed(0))
    plain, quantized = WeightHandle(weight), WeightHandle(quantize(weight, "nf4"))
    for index in range(3):
        assert torch.equal(plain.dense(torch.bfloat16, index), weight[index].to(torch.bfloat16))
        alone = quantize(weight[index], "nf4").dequantize(torch.bfloat16)
        assert torch.equal(quantized.dense(torch.bfloat16, index), alone)


@pytest.mark.parametrize("family", MIXTURES)
def test_whole_models_give_transformers_logits(family, tmp_path):
    """Through their own routers, with every implementation of experts that transformers has."""
    folder = write_tiny(family, tmp_path)
    found = logits(read_tiny(folder), tokens(3, 20))
    for implementation in ("eager", "batched_mm"):
        reference = read_by_transformers(folder, experts_implementation=implementation)
        assert relative_error(found, logits(reference, tokens(3, 20))) <= 1e-5
