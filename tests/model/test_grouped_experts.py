"""Experts that go through the same operations all together, as on a card, against one after another in fp64."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from tiny_models import read_by_transformers, read_tiny, relative_error, tiny_config, write_tiny
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_tool.adapters.adapter import ExpertsAdapter
from qlora_tool.config import Config, with_values
from qlora_tool.memory.trace.predict import BatchShape, predict
from qlora_tool.memory.trace.recomputation_cost import flops_of
from qlora_tool.methods.lora import METHOD, LoraKeys
from qlora_tool.methods.method import Settings
from qlora_tool.model.experts import assuming_routing, experts_forward, is_experts_module, takes_together
from qlora_tool.ops import grouped
from qlora_tool.ops.declare import CPU, Target, meant_for
from qlora_tool.weights.handles import WeightHandle
from qlora_tool.weights.modules import ExpertsWeight
from qlora_tool.weights.quantized import quantize
from qlora_tool.weights.streamed import Place, StreamedHandle

CARD = Target("cuda", (9, 0))
EXPERTS, HIDDEN, INNER, R = 6, 64, 32, 8
MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "granitemoe", "olmoe", "phimoe", "deepseek_v3"]
ROUTINGS = {
    "some": [[0, 1], [2, 3], [1, 0], [3, 1], [5, 2]],  # the fifth expert gets nothing
    "one expert": [[3]] * 5,
    "one token": [[4, 1]],
    "all": [[3, 2, 1, 0, 5, 4]] * 5,
}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


class Experts(nn.Module):
    """A layer's experts as transformers lays them out, their weights behind handles, with adapters."""

    is_transposed = False

    def __init__(self, kind: str = "nf4", double: bool = True, gate: bool = True, bias: bool = False):
        super().__init__()
        self.num_experts, self.has_gate, self.has_bias = EXPERTS, gate, bias
        first = "gate_up_proj" if gate else "up_proj"
        shapes = {first: (EXPERTS, INNER * (2 if gate else 1), HIDDEN), "down_proj": (EXPERTS, HIDDEN, INNER)}
        self.adapted = nn.ModuleDict()
        for name, shape in shapes.items():
            value = drawn(*shape) / shape[-1] ** 0.5
            handle = WeightHandle(value if kind == "none" else quantize(value, kind, double))
            setattr(self, name, handle)
            self.adapted[name] = ExpertsWeight(handle)
            if bias:
                setattr(self, f"{name}_bias", nn.Parameter(drawn(*shape[:2]), requires_grad=False))

    def adapt(self, r: int = R, name: str = "one", **more: Tensor) -> Experts:
        for place in self.adapted.values():
            experts, out, width = place.weight.shape
            lora_A, lora_B = drawn(experts, r, width, seed=r) / width**0.5, drawn(experts, out, r, seed=r)
            tensors = {"lora_A": lora_A, "lora_B": lora_B}
            tensors |= {key: make(experts, out) for key, make in more.items()}
            place.add_adapter(name, ExpertsAdapter(METHOD, tensors, Settings(r, 3 * r / 2)))
        return self

    def _apply_gate(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return nn.functional.silu(gate) * up

    act_fn = staticmethod(nn.functional.gelu)


@dataclass
class Result:
    output: Tensor
    gradients: dict[str, Tensor]


def run(module: nn.Module, routing: list[list[int]], dtype: torch.dtype, target: Target) -> Result:
    hidden, index = drawn(len(routing), HIDDEN).to(dtype).requires_grad_(), torch.tensor(routing)
    weights = drawn(*index.shape).to(dtype).requires_grad_()
    trained = {name: one for name, one in module.named_parameters() if one.requires_grad}
    with meant_for(target):
        assert takes_together(module, hidden) == (target == CARD)
        y = experts_forward(module, hidden, index, weights)
        found = torch.autograd.grad(y, [hidden, weights, *trained.values()], drawn(*y.shape, seed=5).to(dtype))
    return Result(y.detach(), dict(zip(["hidden", "weights", *trained], found, strict=True)))


def assert_close(found: Result, exact: Result):
    """In norm: sums of up to 64 terms and what follows, some ten roundings of which each passes on what came before."""
    bound = (64**0.5 + 10) * 4 * 2**-24
    assert found.gradients.keys() == exact.gradients.keys() and len(exact.gradients) >= 2
    pairs = {name: (one, exact.gradients[name]) for name, one in found.gradients.items()}
    for name, (one, other) in {"output": (found.output, exact.output), **pairs}.items():
        assert one.shape == other.shape
        assert (one.double() - other.double()).norm() <= bound * other.double().norm(), name


def assert_as_one_by_one(module: nn.Module, routing: list[list[int]]):
    assert_close(run(module, routing, torch.float32, CARD), run(module, routing, torch.float64, CPU))


@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
@pytest.mark.parametrize(("kind", "double"), [("nf4", True), ("nf4", False), ("int8", False), ("none", False)])
def test_output_and_gradients(kind, double, routing):
    assert_as_one_by_one(Experts(kind, double).adapt(), routing)


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_gates_and_biases(gate, bias, routing):
    assert_as_one_by_one(Experts(gate=gate, bias=bias), routing)
    assert_as_one_by_one(Experts(gate=gate, bias=bias).adapt(r=3), routing)


def test_a_norm_after_the_experts():
    module = Experts().adapt()
    module.has_post_expert_norm = True
    module.post_expert_norm = lambda x: x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt()
    assert_as_one_by_one(module, ROUTINGS["some"])


def test_a_bias_of_lora_and_a_symmetric_start():
    """[A; A₀] and [B, −B₀] are those of each expert."""
    routing = ROUTINGS["some"]
    assert_as_one_by_one(Experts().adapt(lora_B_bias=drawn), routing)
    module = Experts().adapt()
    for place in module.adapted.values():
        adapter = place.adapter
        adapter.settings = Settings(R, 12, keys=LoraKeys(init_lora_weights="symmetric"))
        for name in "AB":
            adapter.register_buffer(f"start_{name}", drawn(*adapter.tensors[f"lora_{name}"].shape, seed=9))
    assert_as_one_by_one(module, routing)


@pytest.mark.parametrize("active", [[], ["one"], ["two", "one"]])
def test_adapters_that_are_active_are_added(active):
    module = Experts().adapt().adapt(r=2, name="two")
    for place in module.adapted.values():
        place.set_adapters(active)
    routing = ROUTINGS["some"]
    for target, dtype in ((CARD, torch.float32), (CPU, torch.float64)):
        hidden, index = drawn(len(routing), HIDDEN).to(dtype), torch.tensor(routing)
        with meant_for(target):
            y = experts_forward(module, hidden, index, drawn(*index.shape).to(dtype))
        if target == CARD:
            found = y
    assert relative_error(found.double(), y) < 1e-5
    assert found.requires_grad == bool(active)
    if active:
        for name, one in module.named_parameters():
            one.requires_grad_(any(f"adapters.{key}." in name for key in active))
        assert_as_one_by_one(module, routing)


@pytest.mark.parametrize(("r", "taken"), [(4, 8), (8, 8), (9, 16)])
def test_ranks_that_the_kernel_does_not_take_are_filled_up(r, taken, monkeypatch):
    """In 16 bits, with zeros: the values and the gradients are those of the loop, some roundings apart."""
    ranks, module = [], Experts().adapt(r)
    of_whole_rows = grouped.of_whole_rows
    monkeypatch.setattr(grouped, "of_whole_rows", lambda *pair: ranks.append(of_whole_rows(*pair)) or ranks[-1])
    found, exact = (run(module, ROUTINGS["some"], dtype, target) for dtype, target in
                    ((torch.bfloat16, CARD), (torch.float64, CPU)))  # fmt: skip
    assert [(lora_A.shape[1], lora_B.shape[2]) for lora_A, lora_B in ranks] == [(taken, taken)] * 2
    for name, one in {"output": found.output, **found.gradients}.items():
        right = exact.gradients.get(name, exact.output)
        assert one.shape == right.shape
        assert (one.double() - right).norm() <= 4 * torch.finfo(torch.bfloat16).eps * right.norm()


def test_a_method_that_has_it_expert_by_expert_keeps_that(monkeypatch):
    module = Experts().adapt()
    with meant_for(CARD):
        assert takes_together(module, drawn(1, HIDDEN))
        monkeypatch.setattr(type(METHOD), "groups_experts", False)
        assert not takes_together(module, drawn(1, HIDDEN))
    assert not takes_together(module, drawn(1, HIDDEN))


@pytest.mark.parametrize("experts_at_once", [1, 2, 4])
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_in_pieces_it_is_the_same(routing, experts_at_once, monkeypatch):
    module = Experts().adapt()
    whole = run(module, routing, torch.float32, CARD)
    monkeypatch.setattr(grouped, "PIECE_BYTES", experts_at_once * 2 * INNER * HIDDEN * 4)
    assert_close(run(module, routing, torch.float32, CARD), whole)


class Stream:
    """Bytes of weights, held once: what a stream of one part gives."""

    def __init__(self, weight):
        tensors, self.places, parts, at = weight.tensors(), {}, [], 0
        for name, tensor in tensors.items():
            self.places[name] = Place(at, tensor.dtype, tuple(tensor.shape))
            flat = tensor.contiguous().view(-1).view(torch.uint8)
            parts.append(nn.functional.pad(flat, (0, -flat.numel() % 64)))
            at += parts[-1].numel()
        self.bytes = torch.cat(parts)

    def part(self, index: int) -> Tensor:
        return self.bytes


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_streamed_weights(kind):
    module = Experts(kind).adapt()
    expected = run(module, ROUTINGS["some"], torch.float32, CARD)
    for name, place in module.adapted.items():
        weight = place.weight.stored()
        stream = Stream(weight)
        handle = StreamedHandle(weight, stream.places, stream, 0)
        assert not handle.tensors()
        setattr(module, name, handle)
    found = run(module, ROUTINGS["some"], torch.float32, CARD)
    assert torch.equal(found.output, expected.output)
    assert all(torch.equal(one, expected.gradients[name]) for name, one in found.gradients.items())


# ------------------------------------------------------------------------------------------------------- how many


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function._schema.name.removeprefix("qlora_tool::")] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("experts_at_once", "count"), [(1000, 1), (4, 2), (2, 3)])
def test_operations_are_counted_by_pieces(experts_at_once, count, monkeypatch):
    """Not by experts: a dequantization and a product a piece, forward and backward, of either weight; of either LoRA
    two products forward, four backward."""
    monkeypatch.setattr(grouped, "PIECE_BYTES", experts_at_once * 2 * INNER * HIDDEN * 4)
    module, routing = Experts(), ROUTINGS["all"]
    halves = -(-count // 2)  # of the second weight, half as large
    plain = sum(calls_of(module, routing).values())
    for adapted in (False, True):
        calls = calls_of(module.adapt() if adapted else module, routing)
        assert calls["dequantize_4bit"] == 2 * (count + halves)
        assert calls["grouped_matmul"] == 2 * (count + halves) + (8 if adapted else 0)
        assert calls["grouped_gradient"] == (4 if adapted else 0)
        assert not {"aten::mm", "matmul", "aten::bmm", "aten::addmm"} & calls.keys()
    monkeypatch.setattr(f"{__name__}.EXPERTS", 2 * EXPERTS)
    monkeypatch.setattr(grouped, "PIECE_BYTES", 2 * grouped.PIECE_BYTES)
    twice = calls_of(Experts(), [[2 * expert + one for expert in row for one in (0, 1)] for row in routing])
    assert sum(twice.values()) == plain


def calls_of(module: nn.Module, routing: list[list[int]]) -> Counter[str]:
    with Operators() as operators:
        run(module, routing, torch.float32, CARD)
    return operators.calls


# ------------------------------------------------------------------------------------------------------ whole models


@pytest.mark.parametrize("family", MIXTURES)
def test_families_give_what_transformers_gives(family, tmp_path):
    write_tiny(family, tmp_path)
    ours, theirs = ([module for module in model.modules() if is_experts_module(module)][-1] for model in
                    (read_tiny(tmp_path), read_by_transformers(tmp_path, experts_implementation="eager")))  # fmt: skip
    found = []
    for module, target in ((ours, CARD), (theirs, CPU)):
        hidden, weights = drawn(5, 64).requires_grad_(), drawn(5, 2).requires_grad_()
        index = torch.tensor([[0, 1], [3, 1], [1, 0], [3, 1], [0, 3]])
        with meant_for(target):
            y = experts_forward(module, hidden, index, weights) if module is ours else module(hidden, index, weights)
        found.append((y.detach(), *torch.autograd.grad(y.sum(), (hidden, weights))))
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other) <= 1e-5


def test_a_prediction_for_a_card_takes_them_together(monkeypatch):
    values = {"training.gradient_checkpointing": True, "adapter.r": R,
              "adapter.target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}  # fmt: skip
    config, model_config = with_values(Config(), values), tiny_config("qwen3_moe", num_hidden_layers=1)
    both = 2 * model_config.moe_intermediate_size * model_config.hidden_size * 2  # bytes of one expert's gate and up
    monkeypatch.setattr(grouped, "PIECE_BYTES", 2 * both)
    shape = BatchShape.full(1, 48)
    traces = {target: predict(config, copy.deepcopy(model_config), shape, torch.bfloat16, target=target)
              for target in (CPU, CARD)}  # fmt: skip
    calls = {target: [call for call in trace.calls if "grouped" in call.operator] for target, trace in traces.items()}
    assert not calls[CPU] and {call.phase for call in calls[CARD]} >= {"forward", "backward"}
    assert {call.operator for call in calls[CARD]} == {"qlora_tool::grouped_matmul", "qlora_tool::grouped_gradient"}
    # The same products, whoever does them: each row times the matrices of its expert.
    assert sum(map(flops_of, traces[CARD].calls)) == sum(map(flops_of, traces[CPU].calls))
    dense = {target: {storage.nbytes for storage in trace.storages if storage.operator == "qlora_tool::dequantize_4bit"
                      and "experts" in storage.module and storage.phase != "load"}
             for target, trace in traces.items()}  # fmt: skip
    assert max(dense[CPU]) == both and max(dense[CARD]) == 2 * both


def test_assumed_shares_are_what_is_computed():
    module, routing = Experts(bias=True).adapt(), ROUTINGS["all"]
    with assuming_routing(lambda total, experts: [total, *[0] * (experts - 1)]):
        assert_as_one_by_one(module, routing)
