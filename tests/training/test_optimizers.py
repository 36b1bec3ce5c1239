"""AdamW against torch's, master copies, 8-bit states, the loss scale of fp16, and states that come back exactly."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

from qlora_tool.errors import UserError
from qlora_tool.training.optimizers import LOSS_SCALE_PATIENCE, Optimizer, OptimizerInBackward
from qlora_tool.training.step import clip_gradients

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


def test_a_parameter_without_a_gradient_stays_as_it_is():
    ours = parameters(dtype=torch.bfloat16)
    before = values(ours)
    optimizer = Optimizer("adamw", ours, weight_decay=0.5)
    ours[0].grad = torch.ones_like(ours[0])
    norm = optimizer.step(0.1)
    assert float(norm) == pytest.approx((8 * 64) ** 0.5)
    assert not torch.equal(ours[0], before[0])
    assert_equal(values(ours[1:]), before[1:])


def test_steps_that_bf16_would_lose_add_up_in_the_master_copy():
    ours = [nn.Parameter(torch.ones(64, dtype=torch.bfloat16))]
    exact = [nn.Parameter(torch.ones(64))]
    optimizer, reference = Optimizer("adamw", ours), torch.optim.AdamW(exact, lr=1e-4, weight_decay=0.0)
    history = []
    for _ in range(100):  # of 1e-4 each, and bf16's neighbours below 1 are 4e-3 apart
        for parameter in (ours[0], exact[0]):
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(1e-4)
        reference.step()
        history.append(float(ours[0][0].detach()))
    assert history[0] == 1.0
    assert sorted(set(history), reverse=True) == [1.0, 0.99609375, 0.9921875, 0.98828125]  # 0.99, rounded
    assert_equal(values(ours), [exact[0].detach().bfloat16()])


def test_with_bf16_weights_the_optimizer_is_fp32_adamw_on_their_gradients():
    ours = parameters(dtype=torch.bfloat16)
    exact = [nn.Parameter(parameter.detach().float()) for parameter in ours]
    optimizer, reference = Optimizer("adamw", ours, 0.01), torch.optim.AdamW(exact, weight_decay=0.01)
    for step in range(5):
        give_gradients(ours, step)
        for parameter, own in zip(exact, ours, strict=True):
            parameter.grad = own.grad.float()
        optimizer.step(3e-3)
        reference.param_groups[0]["lr"] = 3e-3
        reference.step()
    assert_equal(values(ours), [parameter.detach().bfloat16() for parameter in exact])
    assert {state.dtype for state in optimizer.masters} == {torch.float32}


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


def test_eight_bit_states_take_two_bytes_a_weight():
    ours = parameters(LARGE)
    optimizer = Optimizer("adamw_8bit", ours)
    give_gradients(ours, 0)
    optimizer.step(1e-3)
    for parameter in ours:
        state = optimizer.inner.state[parameter]
        assert state["state1"].dtype == state["state2"].dtype == torch.uint8
        assert state["state1"].numel() == parameter.numel()
    assert optimizer.masters is None


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
    state = Optimizer("adamw", parameters()).state_dict()
    with pytest.raises(ValueError, match="saved by adamw, not by adamw_8bit"):
        Optimizer("adamw_8bit", parameters()).load_state_dict(state)
    with pytest.raises(ValueError, match="another precision"):
        Optimizer("adamw", parameters(dtype=torch.bfloat16)).load_state_dict(state)
    with pytest.raises(ValueError, match="size"):
        Optimizer("adamw", parameters(SHAPES[:2])).load_state_dict(state)


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
    kept, state = values(ours), optimizer.state_dict()["inner"]["state"][0]["step"].clone()
    give_gradients(ours, 1)
    ours[1].grad[3, 3] = float("inf")
    assert not optimizer.step(1e-3, 1.0).isfinite()
    assert optimizer.loss_scale == 2.0**15
    assert_equal(values(ours), kept)
    assert optimizer.state_dict()["inner"]["state"][0]["step"] == state
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


# ---------------------------------------------------------------------------------------------------------- clipping


@pytest.mark.parametrize("max_norm", [0.1, 10.0, 1e6])
def test_clipping_is_torchs(max_norm):
    ours, theirs = parameters(), parameters()
    give_gradients(ours, 0)
    give_gradients(theirs, 0)
    norm = clip_gradients([parameter.grad for parameter in ours], max_norm)
    expected = nn.utils.clip_grad_norm_(theirs, max_norm)
    assert float(norm) == pytest.approx(float(expected), rel=1e-6)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_norm_of_16_bit_gradients_is_taken_in_fp32(dtype):
    gradients = [torch.full((n,), 200.0, dtype=dtype) for n in (100_000, 3_000, 7)]
    # 200·√103007 = 64190: rounded to bf16, or summed in fp16, which ends at 65504, it would be another.
    assert float(clip_gradients(gradients, 0.0)) == pytest.approx(200 * 103_007**0.5, rel=1e-6)
    gradients.append(torch.full((9_000,), 200.0, dtype=dtype))
    assert float(clip_gradients(gradients, 1.0)) == pytest.approx(200 * 112_007**0.5, rel=1e-6)
    assert float(gradients[2][0]) == pytest.approx(112_007**-0.5, rel=2**-8)


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
    loss_of(ours).backward()
    assert living == [0] * len(ours)
    assert len(optimizer._norms) == len(ours)


def test_a_state_in_backward_comes_back_and_fits_no_other_optimizer():
    ours = parameters()
    optimizer = OptimizerInBackward("adamw", ours)
    optimizer.before_backward(1e-2)
    loss_of(ours).backward()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    again = [nn.Parameter(value.clone()) for value in values(ours)]
    other = OptimizerInBackward("adamw", again)
    file.seek(0)
    other.load_state_dict(state := torch.load(file, weights_only=True))
    for own, each in ((ours, optimizer), (again, other)):
        each.before_backward(1e-2)
        loss_of(own).backward()
    assert_equal(values(again), values(ours))
    with pytest.raises(ValueError, match="steps in backward"):
        Optimizer("adamw", parameters()).load_state_dict(state)
    with pytest.raises(ValueError, match="steps after backward"):
        OptimizerInBackward("adamw", parameters()).load_state_dict(Optimizer("adamw", parameters()).state_dict())


def test_fp16_gradients_cannot_be_stepped_in_backward():
    with pytest.raises(UserError, match="optimizer_in_backward"):
        OptimizerInBackward("adamw", parameters(dtype=torch.float16))
