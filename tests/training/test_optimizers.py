"""AdamW against torch's and bitsandbytes', exact for weights of 16 bits; summed gradients, the loss scale of fp16, and
states that come back exactly."""

from __future__ import annotations

import io
import math
from itertools import pairwise

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_tool.errors import UserError
from qlora_tool.ops.adamw import join_master
from qlora_tool.training.optimizers import (
    LOSS_SCALE_PATIENCE,
    Optimizer,
    OptimizerInBackward,
    ParameterGroup,
    gradient_norm,
)

SHAPES = [(8, 64), (96, 8), (5,)]
LARGE = [(32, 256), (256, 32)]  # bitsandbytes keeps states of less than 4096 numbers in fp32


def parameters(shapes=SHAPES, dtype=torch.float32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def give_gradients(parameters: list[nn.Parameter], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in parameters:
        parameter.grad = (torch.randn(parameter.shape, generator=generator) * scale).to(parameter.dtype)


def values(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def masters(optimizer: Optimizer) -> list[Tensor]:
    """The exact weights in fp32."""
    found = []
    for parameter, state in zip(optimizer.parameters, optimizer.state_dict()["parameters"], strict=True):
        weight = parameter.detach()
        if "low_bits" in state:
            weight = join_master(weight.flatten(), state["low_bits"])
        found.append(state.get("master", weight).reshape(parameter.shape).clone())
    return found


def state_bytes(optimizer: Optimizer) -> int:
    return sum(tensor.nbytes for tensor in optimizer.state_tensors())


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0, 1e6])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_in_fp32_is_torchs(weight_decay, max_grad_norm):
    ours, theirs = parameters(), parameters()
    optimizer = Optimizer("adamw", ours, weight_decay)
    reference = torch.optim.AdamW(theirs, betas=(0.9, 0.999), weight_decay=weight_decay)
    for step in range(6):
        rate = 1e-2 / (1 + step)
        give_gradients(ours, step)
        give_gradients(theirs, step)
        norm = optimizer.step(rate, max_grad_norm)
        expected = nn.utils.clip_grad_norm_(theirs, max_grad_norm or float("inf"))
        reference.param_groups[0]["lr"] = rate
        reference.step()
        assert float(norm) == pytest.approx(float(expected), rel=1e-6)
        assert all(parameter.grad is None for parameter in ours)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


class Operators(TorchDispatchMode):
    """The names of all that are called, in order."""

    def __init__(self):
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called.append(func._schema.name)
        return func(*args, **(kwargs or {}))


READING = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::equal", "aten::_to_copy"}


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("accumulate", [False, True])
def test_a_step_takes_as_many_operators_for_448_weights_as_for_two(name, dtype, accumulate):
    """Each is a launch or a few; none waits for a device. On CUDA devices each kind of weights is one launch."""
    counts = []
    for pairs in (1, 224):
        ours = parameters([(16, 256), (16, 5)] * pairs, dtype)
        optimizer = Optimizer(name, [ParameterGroup(ours[::2]), ParameterGroup(ours[1::2], rate=16.0)], 0.1)
        for _ in range(2):  # the state comes with the first
            optimizer.before_backward(1e-3, accumulate)
            loss_of(ours).backward()
            with Operators() as operators:
                optimizer.step(1e-3, 1.0)
        counts.append(len(operators.called))
        assert operators.called.count("qlora_tool::adamw") == (1 if name == "adamw" else 2)  # by the kind of moments
        assert not READING & set(operators.called)
    assert counts[0] == counts[1] <= 10


def test_a_parameter_without_a_gradient_stays_as_it_is():
    ours = parameters(dtype=torch.bfloat16)
    before = values(ours)
    optimizer = Optimizer("adamw", ours, weight_decay=0.5)
    ours[0].grad = torch.ones_like(ours[0])
    norm = optimizer.step(0.1)
    assert float(norm) == pytest.approx((8 * 64) ** 0.5)
    assert not torch.equal(ours[0], before[0])
    assert_equal(values(ours[1:]), before[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_200_steps_of_a_cosine_are_fp32_adamws(dtype, max_grad_norm):
    """On the same gradients, which are of 16 bits: torch's optimizer and clipping on weights in fp32 are followed to
    the rounding of each step (2⁻²⁴ of a weight of 2 at most, 200 times, few of them in the same direction), and the
    weights are theirs, rounded."""
    ours, scale = parameters(dtype=dtype), 4.0 if dtype == torch.float16 else 1.0
    exact = [nn.Parameter(parameter.detach().float()) for parameter in ours]
    optimizer, reference = Optimizer("adamw", ours, 0.01), torch.optim.AdamW(exact, weight_decay=0.01)
    for step in range(200):
        rate = 2e-3 * 0.5 * (1 + math.cos(math.pi * step / 200))
        give_gradients(ours, step, 2.0 ** -(step % 7) * 1e-2)
        for parameter, own in zip(exact, ours, strict=True):
            parameter.grad = own.grad.float()
            own.grad *= scale
        optimizer.loss_scale = scale
        expected = nn.utils.clip_grad_norm_(exact, max_grad_norm or float("inf"))
        assert float(optimizer.step(rate, max_grad_norm)) == pytest.approx(float(expected), rel=1e-5)
        reference.param_groups[0]["lr"] = rate
        reference.step()
    for found, expected, weight in zip(masters(optimizer), exact, ours, strict=True):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-6, atol=2e-6)
        neighbours = torch.finfo(dtype).eps * found.abs() / 2 + 1e-7
        assert ((weight - found).abs() <= neighbours).all()  # rounded to the nearest


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
def test_steps_below_the_spacing_of_bf16_add_up(name):
    """200 steps of 2e-5 from 0.015625, where the neighbours are 1.2e-4 apart (6e-5 below): AdamW's step is the rate, as
    the gradient stays the same."""
    ours = [nn.Parameter(torch.full((5000,), 0.015625, dtype=torch.bfloat16))]
    optimizer = Optimizer(name, ours)
    history = []
    for _ in range(200):
        ours[0].grad = torch.ones_like(ours[0])
        optimizer.step(2e-5)
        history.append(float(ours[0][0].detach()))
    assert history[0] == 0.015625
    assert all(after <= before for before, after in pairwise(history))
    # bitsandbytes' nearest 8-bit value of the scale itself is exact, so its moments are here.
    assert masters(optimizer)[0].tolist() == pytest.approx([0.015625 - 200 * 2e-5] * 5000, rel=1e-5)
    assert history[-1] == float(torch.tensor(0.011625).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bits_are_bitsandbytes_on_weights_in_fp32(name, dtype):
    """To the bit where moments are in 8 bits; tensors of less than 4096 numbers have them in fp32, and there the order
    of operations differs."""
    ours = parameters([*LARGE, (37,)], dtype)
    exact = [nn.Parameter(parameter.detach().float()) for parameter in ours]
    optimizer = Optimizer(name, ours, 0.01)
    reference = bnb.optim.AdamW8bit(exact, lr=0.0, betas=(0.9, 0.999), weight_decay=0.01)
    for step in range(20):
        give_gradients(ours, step)
        for parameter, own in zip(exact, ours, strict=True):
            parameter.grad = own.grad.float()
        optimizer.step(rate := 1e-3 / (1 + step))
        reference.param_groups[0]["lr"] = rate
        reference.step()
    assert_equal(masters(optimizer)[:2], [parameter.detach() for parameter in exact[:2]])
    torch.testing.assert_close(masters(optimizer)[2], exact[2].detach(), rtol=1e-6, atol=1e-7)


def test_groups_have_rates_of_their_own():
    first, second, again, alone = parameters(), parameters(seed=1), parameters(), parameters(seed=1)
    grouped = Optimizer("adamw", [ParameterGroup(first), ParameterGroup(second, rate=16.0)], 0.1)
    slow, fast = Optimizer("adamw", again, 0.1), Optimizer("adamw", alone, 0.1)
    assert grouped.parameters == first + second
    for step in range(3):
        for own in (first, second, again, alone):
            give_gradients(own, step)
        grouped.step(1e-3)
        slow.step(1e-3)
        fast.step(1.6e-2)
    assert_equal(values(first + second), values(again + alone))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
def test_every_optimizer_brings_a_loss_down(name, dtype):
    ours = parameters(LARGE, dtype)
    target = [torch.randn(shape, generator=torch.Generator().manual_seed(9)) for shape in LARGE]
    optimizer = Optimizer(name, ours)

    def loss() -> Tensor:
        return sum(((p.float() - t) ** 2).mean() for p, t in zip(ours, target, strict=True))

    before = float(loss().detach())
    for _ in range(60):
        loss().backward()
        optimizer.step(0.05)
    assert float(loss().detach()) < 0.1 * before


@pytest.mark.parametrize(
    ("name", "dtype", "bytes_a_weight"),
    [
        ("adamw", torch.float32, 8),  # two moments
        ("adamw", torch.bfloat16, 10),  # and the other 16 bits
        ("adamw", torch.float16, 12),  # and a master
        ("adamw_8bit", torch.float32, 2 + 8 / 256),  # a scale of each moment for 256 weights
        ("adamw_8bit", torch.bfloat16, 4 + 8 / 256),
        ("paged_adamw_8bit", torch.bfloat16, 4 + 8 / 256),
        ("adamw_8bit", torch.float16, 6 + 8 / 256),
    ],
)
@pytest.mark.parametrize("kind", [Optimizer, OptimizerInBackward])
def test_bytes_of_state(kind, name, dtype, bytes_a_weight):
    if kind is OptimizerInBackward and dtype == torch.float16:
        return  # refused
    ours = parameters(LARGE, dtype)
    optimizer = kind(name, ours)
    loss_of(ours).backward()
    optimizer.step(1e-3)
    codes = 0 if name == "adamw" else 2 * 256 * 4  # what 8 bits stand for
    assert state_bytes(optimizer) == 2 * 32 * 256 * bytes_a_weight + codes
    assert not list(optimizer.gradients())


def test_only_large_moments_in_8_bits_are_paged():
    ours = parameters([(100_000,), (99_999,)], torch.bfloat16)
    for name in ("adamw", "adamw_8bit", "paged_adamw_8bit"):
        optimizer = Optimizer(name, ours)
        give_gradients(ours, 0)
        optimizer.step(1e-3)
        paged = [(tensor.numel(), tensor.dtype) for tensor in optimizer.paged_tensors()]
        assert paged == ([(100_000, torch.uint8)] * 2 if name.startswith("paged") else [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
def test_a_saved_state_comes_back_exactly(name, dtype):
    first = parameters(LARGE, dtype)
    optimizer = Optimizer(name, first, 0.01)
    optimizer.loss_scale /= 4
    for step in range(3):
        give_gradients(first, step, optimizer.loss_scale * 0.01)
        optimizer.step(1e-2, 1.0)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    kept = values(first)

    second = [nn.Parameter(value.clone()) for value in kept]
    other = Optimizer(name, second, 0.01)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for step in range(3, 6):
        for own, each in ((first, optimizer), (second, other)):
            give_gradients(own, step, each.loss_scale * 0.01)
            each.step(1e-2, 1.0)
        assert_equal(values(second), values(first))
    assert not torch.equal(kept[0], first[0])
    assert other.loss_scale == optimizer.loss_scale != Optimizer(name, first).loss_scale
    assert other.state_dict()["good_steps"] == optimizer.state_dict()["good_steps"]


def test_a_state_of_another_optimizer_is_refused():
    def saved(name: str, own: list[nn.Parameter]) -> dict:
        optimizer = Optimizer(name, own)
        give_gradients(own, 0)
        optimizer.step(1e-3)
        return optimizer.state_dict()

    state = saved("adamw", parameters())
    with pytest.raises(ValueError, match="saved by adamw, not by adamw_8bit"):
        Optimizer("adamw_8bit", parameters()).load_state_dict(state)
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match="another precision"):
            Optimizer("adamw", parameters(dtype=dtype)).load_state_dict(state)
        with pytest.raises(ValueError, match="another precision"):
            Optimizer("adamw", parameters()).load_state_dict(saved("adamw", parameters(dtype=dtype)))
    with pytest.raises(ValueError, match="for 3 tensors, not for 2"):
        Optimizer("adamw", parameters(SHAPES[:2])).load_state_dict(state)
    with pytest.raises(ValueError, match=r"another size, not \(8, 63\)"):
        Optimizer("adamw", parameters([(8, 63), *SHAPES[1:]])).load_state_dict(state)


class Version01:
    """What version 0.1 saved, written down here: torch's or bitsandbytes' optimizer over the weights, or of adamw with
    weights of 16 bits over an fp32 master of each."""

    def __init__(self, name: str, own: list[nn.Parameter]):
        halves = own[0].dtype != torch.float32
        self.name, self.own = name, own
        self.masters = [p.detach().float().requires_grad_() for p in own] if halves and name == "adamw" else None
        kind = torch.optim.AdamW if name == "adamw" else bnb.optim.AdamW8bit
        self.inner = kind(self.masters or own, lr=0.0, betas=(0.9, 0.999), weight_decay=0.01)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for parameter, stepped in zip(self.own, self.masters or self.own, strict=True):
            stepped.grad = parameter.grad.to(stepped.dtype)
        self.inner.param_groups[0]["lr"] = rate
        self.inner.step()
        for parameter, stepped in zip(self.own, self.masters or self.own, strict=True):
            parameter.copy_(stepped)

    def state_dict(self) -> dict:
        masters = None if self.masters is None else [master.detach() for master in self.masters]
        return {"name": self.name, "inner": self.inner.state_dict(), "masters": masters, "loss_scale": 1.0,
                "good_steps": 0}  # fmt: skip


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
def test_a_state_of_version_01_goes_on(name, dtype, in_backward):
    """As torch's or bitsandbytes' optimizer goes on, on the exact weights."""
    own = parameters([*LARGE, (37,)], dtype)
    olds = [Version01(name, [parameter]) for parameter in own] if in_backward else [Version01(name, own)]
    for step in range(3):
        give_gradients(own, step)
        for old in olds:
            old.step(1e-2)
    state = olds[0].state_dict()
    if in_backward:
        state = {"name": name, "single": [old.state_dict() for old in olds]}
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    ours = [nn.Parameter(value) for value in values(own)]
    optimizer = Optimizer(name, ours, 0.01)
    optimizer.load_state_dict(torch.load(file, weights_only=True))

    exact = [one for old in olds for one in old.masters or [nn.Parameter(value.float()) for value in values(old.own)]]
    assert_equal(masters(optimizer), values(exact))
    kind = torch.optim.AdamW if name == "adamw" else bnb.optim.AdamW8bit
    reference = kind(exact, lr=1e-2, betas=(0.9, 0.999), weight_decay=0.01)
    inners = [old.inner.state_dict()["state"] for old in olds]
    inner = {number: inners[number][0] for number in range(3)} if in_backward else inners[0]
    reference.load_state_dict({**reference.state_dict(), "state": inner})
    optimizer.loss_scale = 1.0
    for step in range(3, 6):
        give_gradients(ours, step)
        for parameter, one in zip(exact, ours, strict=True):
            parameter.grad = one.grad.float()
        optimizer.step(1e-2)
        reference.step()
    for found, expected in zip(masters(optimizer), exact, strict=True):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-6, atol=1e-6)


def test_an_earlier_state_of_other_weights_is_refused():
    plain, halves = parameters(), parameters(dtype=torch.bfloat16)
    for saved, ours in ((plain, halves), (halves, plain)):
        with pytest.raises(ValueError, match="another precision"):
            Optimizer("adamw", ours).load_state_dict(Version01("adamw", saved).state_dict())
    old = Version01("adamw", plain)
    give_gradients(plain, 0)
    old.step(1e-2)
    with pytest.raises(ValueError, match="more than the 2 tensors"):
        Optimizer("adamw", plain[:2]).load_state_dict(old.state_dict())


# ------------------------------------------------------------------------------------------------- on a CUDA device


def on_card(own: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(parameter.detach().cuda()) for parameter in own]


def moments(optimizer: Optimizer) -> list[Tensor]:
    """First and second of every parameter, fp64, those of 8 bits as what they stand for; on the CPU."""
    found = []
    for state in optimizer.state_dict()["parameters"]:
        for name, code, scales, signed in (
            ("exp_avg", "state1", "absmax1", True), ("exp_avg_sq", "state2", "absmax2", False),
        ):  # fmt: skip
            if name in state:
                found.append(state[name].cpu().double())
                continue
            values = bnb.functional.create_dynamic_map(signed=signed).double()[state[code].cpu().long()]
            found.append(values * state[scales].cpu().double().repeat_interleave(256)[: len(values)])
    return found


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
def test_steps_on_a_card_are_those_on_the_cpu(name, dtype):
    """Each from the same state and gradients. An operation in fp32 is off by 2⁻²⁴ of what it gives, and a step is made
    of twenty; where a moment's two terms nearly cancel by more, which over all weights is a small part. A moment in 8
    bits is, on either side, one of the values around it; the widest gap between those is 0.0141 of the block's
    largest."""
    for step in range(4):
        host = parameters([*LARGE, (37,), (), (331, 331)], dtype, seed=step)
        cpu = Optimizer(name, host, 0.01)
        for earlier in range(step):
            give_gradients(host, earlier, cpu.loss_scale * 0.01)
            cpu.step(1e-2, 0.5)
        card = on_card(host)
        cuda = Optimizer(name, card, 0.01)
        cuda.load_state_dict(cpu.state_dict())
        before = masters(cpu) if step else [value.float() for value in values(host)]
        give_gradients(host, step, cpu.loss_scale * 0.01)
        for parameter, own in zip(card, host, strict=True):
            parameter.grad = own.grad.cuda()
        assert float(cuda.step(1e-2, 0.5)) == pytest.approx(float(cpu.step(1e-2, 0.5)), rel=1e-5)
        for found, expected, earlier in zip(masters(cuda), masters(cpu), before, strict=True):
            bound = 2**-24 * (4 * earlier.norm() + 60 * (expected - earlier).norm())
            assert (found.cpu().double() - expected.double()).norm() <= bound
        for found, expected in zip(moments(cuda), moments(cpu), strict=True):
            gap = 1e-5 if name == "adamw" or len(found) < 4096 else 0.0142
            assert ((found - expected).abs() <= gap * expected.abs().max()).all()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
def test_a_resumed_state_on_a_card_goes_on_to_the_bit(name, dtype):
    """And large moments are paged again where they were."""
    ours = on_card(parameters([(512, 1024), *LARGE, (37,)], dtype))
    one = Optimizer(name, ours)
    for step in range(3):
        give_gradients_on_card(ours, step)
        one.step(1e-2, 1.0)
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    other = Optimizer(name, theirs)
    other.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    for optimizer in (one, other):
        assert [tensor.numel() for tensor in optimizer.paged_tensors()] == [2**19] * 2 * name.startswith("paged")
    for step in range(3, 6):
        for own, optimizer in ((ours, one), (theirs, other)):
            give_gradients_on_card(own, step)
            optimizer.step(1e-2, 1.0)
        assert_equal(values(theirs), values(ours))
    assert_equal(list(other.state_tensors()), list(one.state_tensors()))


def give_gradients_on_card(own: list[nn.Parameter], step: int) -> None:
    host = [nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype)) for parameter in own]
    give_gradients(host, step)
    for parameter, gradient in zip(own, host, strict=True):
        parameter.grad = gradient.grad.cuda()


@pytest.mark.cuda
def test_paged_moments_take_nothing_of_the_allocators():
    before = torch.cuda.memory_allocated()
    ours = on_card(parameters([(4096, 1024)], torch.float32))
    optimizer = Optimizer("paged_adamw_8bit", ours)
    give_gradients_on_card(ours, 0)
    optimizer.step(1e-2)
    paged = list(optimizer.paged_tensors())
    assert [tensor.device.type for tensor in paged] == ["cuda"] * 2
    # The weight in fp32, the scales of its moments' blocks, and the tables of codes
    assert torch.cuda.memory_allocated() - before <= 4 * 2**22 + 2 * 4 * 2**22 // 256 + 4096


@pytest.mark.cuda
def test_where_managed_memory_would_not_fit_the_card_moments_are_not_paged(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (100, 10**9))
    ours = on_card(parameters([(512, 1024)]))
    optimizer = Optimizer("paged_adamw_8bit", ours)
    give_gradients_on_card(ours, 0)
    optimizer.step(1e-2)
    assert not list(optimizer.paged_tensors())
    assert "paged_adamw_8bit runs as adamw_8bit, as its state takes" in caplog.text


@pytest.mark.cuda
@pytest.mark.parametrize("kind", [Optimizer, OptimizerInBackward])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
def test_no_step_waits_for_the_card(name, kind):
    ours = on_card(parameters([(512, 1024), *LARGE, (37,)], torch.bfloat16))
    optimizer = kind(name, ours)
    for step in range(3):
        optimizer.before_backward(1e-3)
        torch.cuda.set_sync_debug_mode("default" if step == 0 else "error")  # the state comes with the first
        try:
            loss_of(ours).backward()
            optimizer.step(1e-3, 1.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_a_step_on_a_card_is_a_few_launches(name):
    ours = on_card(parameters([(16, 256), (16, 5)] * 224, torch.bfloat16))
    optimizer = Optimizer(name, ours)
    for _ in range(2):
        loss_of(ours).backward()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            optimizer.step(1e-3, 1.0)
            torch.cuda.synchronize()
    launched = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert 1 <= len(launched) <= 40, [event.name for event in launched]  # the norms of 448 tensors are some of them


# -------------------------------------------------------------------------------------------------- summed gradients


def backward_of(own: list[nn.Parameter], gradients: list[Tensor]) -> None:
    """A backward pass that gives these gradients."""
    sum((parameter * gradient).sum() for parameter, gradient in zip(own, gradients, strict=True)).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_16_passes_are_summed_in_fp32(dtype):
    """The sum of 16 terms in fp32 is off by 15 · 2⁻²⁴ of the sum of their sizes at most."""
    ours = parameters(dtype=dtype)
    optimizer = Optimizer("adamw", ours)
    exact = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    sizes = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    for turn in range(16):
        generator = torch.Generator().manual_seed(turn)
        gradients = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
        optimizer.before_backward(1e-2, accumulate=True)
        backward_of(ours, gradients)
        for total, size, gradient in zip(exact, sizes, gradients, strict=True):
            total += gradient.double()
            size += gradient.double().abs()
    assert all(parameter.grad is None for parameter in ours) == (dtype != torch.float32)
    found = list(optimizer.gradients())
    for total, size, gradient in zip(exact, sizes, found, strict=True):
        assert gradient.dtype == torch.float32
        assert ((gradient.double() - total).abs() <= 15 * 2**-24 * size).all()
    norm = torch.cat([total.flatten() for total in exact]).norm() / optimizer.loss_scale
    assert float(optimizer.step(1e-2)) == pytest.approx(float(norm), rel=1e-6)
    assert not list(optimizer.gradients())


def test_sums_begin_anew_with_each_step_and_may_be_left_out():
    """Steps of two passes and of one, in turn, are the steps of the summed gradients."""
    ours, theirs = parameters(dtype=torch.bfloat16), parameters(dtype=torch.bfloat16)
    one, other = Optimizer("adamw", ours), Optimizer("adamw", theirs)
    for step, passes in enumerate([1, 2, 1, 3, 2]):
        for turn in range(passes):
            # Small whole numbers: exact in bf16, and so is their sum
            generator = torch.Generator().manual_seed(10 * step + turn)
            gradients = [torch.randint(-9, 10, shape, generator=generator).bfloat16() for shape in SHAPES]
            one.before_backward(1e-2, accumulate=passes > 1)
            backward_of(ours, gradients)
            backward_of(theirs, gradients)
        assert float(one.step(1e-2)) == pytest.approx(float(other.step(1e-2)), rel=1e-6)
        assert_equal(values(ours), values(theirs))


# ------------------------------------------------------------------------------------------------ the scale of fp16


def test_only_fp16_has_a_loss_scale():
    assert Optimizer("adamw", parameters()).loss_scale == 1.0
    assert Optimizer("adamw", parameters(dtype=torch.bfloat16)).loss_scale == 1.0
    assert Optimizer("adamw", parameters(dtype=torch.float16)).loss_scale == 2.0**16


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_gradients_are_scaled_back_before_clipping_and_step(name):
    scaled, plain = parameters(LARGE, torch.float16), parameters(LARGE, torch.float16)
    one, other = Optimizer(name, scaled), Optimizer(name, plain)
    other.loss_scale = 1.0
    give_gradients(scaled, 0, 2.0**-4)
    give_gradients(plain, 0, 2.0**-20 * 2.0**16)  # the same numbers, a power of two apart
    for parameter in scaled:
        parameter.grad *= 2.0**6
    one.loss_scale = 2.0**6
    norm, expected = one.step(1e-3, 0.5), other.step(1e-3, 0.5)
    assert float(norm) == pytest.approx(float(expected), rel=1e-6)
    assert_equal(values(scaled), values(plain))


def test_an_overflow_leaves_the_step_out_and_halves_the_scale():
    ours = parameters(dtype=torch.float16)
    optimizer = Optimizer("adamw", ours)
    give_gradients(ours, 0)
    optimizer.step(1e-3)
    kept, state = values(ours), [tensor.clone() for tensor in optimizer.state_tensors()]
    give_gradients(ours, 1)
    ours[1].grad[3, 3] = float("inf")
    assert not optimizer.step(1e-3, 1.0).isfinite()
    assert optimizer.loss_scale == 2.0**15
    assert_equal(values(ours), kept)
    assert_equal(list(optimizer.state_tensors()), state)
    assert [saved["steps"] for saved in optimizer.state_dict()["parameters"]] == [1, 1, 1]
    give_gradients(ours, 2)
    optimizer.step(1e-3, 1.0)
    assert not torch.equal(ours[0], kept[0])
    assert optimizer.loss_scale == 2.0**15


def test_the_scale_doubles_after_enough_good_steps():
    ours = [nn.Parameter(torch.ones(4, dtype=torch.float16))]
    optimizer = Optimizer("adamw", ours)
    for step in range(LOSS_SCALE_PATIENCE):
        assert optimizer.loss_scale == 2.0**16
        give_gradients(ours, step)
        optimizer.step(1e-5)
    assert optimizer.loss_scale == 2.0**17


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_small_fp16_gradients_are_scaled_back_in_fp32(name):
    """1e-8 is nothing in fp16. AdamW's first step on g is rate · g / (|g| + 1e-8): half the rate."""
    ours = [nn.Parameter(torch.ones(5000, dtype=torch.float16))]
    optimizer = Optimizer(name, ours)
    ours[0].grad = torch.full_like(ours[0], 1e-8 * optimizer.loss_scale)
    norm = optimizer.step(0.5)
    assert float(norm) == pytest.approx(1e-8 * 5000**0.5, rel=1e-3)  # 1e-8 · 2¹⁶ rounded to fp16
    assert ours[0].tolist() == pytest.approx([0.75] * 5000, rel=1e-3)


# ---------------------------------------------------------------------------------------------------------- the norm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_norm_of_16_bit_gradients_is_taken_in_fp32(dtype):
    gradients = [torch.full((n,), 200.0, dtype=dtype) for n in (100_000, 3_000, 7)]
    # 200·√103007 = 64190: rounded to bf16, or summed in fp16, which ends at 65504, it would be another.
    assert float(gradient_norm(gradients)) == pytest.approx(200 * 103_007**0.5, rel=1e-6)
    gradients.append(torch.full((9_000,), 200.0, dtype=dtype))
    assert float(gradient_norm(gradients)) == pytest.approx(200 * 112_007**0.5, rel=1e-6)
    assert float(gradient_norm([])) == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_is_told(bad):
    ours = parameters(dtype=torch.bfloat16)
    optimizer = Optimizer("adamw", ours)
    give_gradients(ours, 0)
    ours[1].grad[0, 0] = bad
    assert not optimizer.step(1e-3, 1.0).isfinite()


# ------------------------------------------------------------------------------------------------ the step in backward


def loss_of(own):
    return sum((index + 1) * parameter.float().square().sum() for index, parameter in enumerate(own))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_steps_in_backward_are_the_steps_after_it(name, dtype):
    ours, theirs = parameters(LARGE, dtype), parameters(LARGE, dtype)
    one, other = OptimizerInBackward(name, ours, 0.01), Optimizer(name, theirs, 0.01)
    for _ in range(3):
        one.before_backward(1e-2)
        loss_of(ours).backward()
        assert all(parameter.grad is None for parameter in ours)
        loss_of(theirs).backward()
        norm, expected = one.step(1e-2), other.step(1e-2)
        assert float(norm) == pytest.approx(float(expected), rel=1e-6)
        assert_equal(values(ours), values(theirs))


def test_one_gradient_lives_at_a_time():
    ours = parameters()
    optimizer = OptimizerInBackward("adamw", ours)
    living = []
    for parameter in ours:
        parameter.register_hook(lambda _: living.append(sum(each.grad is not None for each in ours)))
    before = values(ours)
    optimizer.before_backward(1e-2)
    loss_of(ours).backward()
    assert living == [0] * len(ours)
    assert not any(torch.equal(one, other) for one, other in zip(ours, before, strict=True))


def test_several_passes_cannot_be_stepped_in_backward():
    with pytest.raises(ValueError, match="one backward pass"):
        OptimizerInBackward("adamw", parameters()).before_backward(1e-2, accumulate=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_a_state_in_backward_comes_back(name, dtype):
    """Also to an optimizer that steps after backward: the state is the same."""
    ours = parameters(LARGE, dtype)
    optimizer = OptimizerInBackward(name, ours)
    optimizer.before_backward(1e-2)
    loss_of(ours).backward()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    for kind in (OptimizerInBackward, Optimizer):
        again = [nn.Parameter(value.clone()) for value in values(ours)]
        other = kind(name, again)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        copy = [nn.Parameter(value.clone()) for value in values(ours)]
        reference = Optimizer(name, copy)
        file.seek(0)
        reference.load_state_dict(torch.load(file, weights_only=True))
        for own, each in ((again, other), (copy, reference)):
            each.before_backward(1e-2)
            loss_of(own).backward()
            each.step(1e-2)
        assert_equal(values(again), values(copy))
        assert not torch.equal(again[0], ours[0])


def test_fp16_gradients_cannot_be_stepped_in_backward():
    with pytest.raises(UserError, match="optimizer_in_backward"):
        OptimizerInBackward("adamw", parameters(dtype=torch.float16))
