"""AdamW, with moments in fp32 or in bitsandbytes' 8 bits, whose steps are exact in fp32 whatever the weights are in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakMethod

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from qlora_tool.errors import UserError
from qlora_tool.ops.adamw import slices_of
from qlora_tool.training.paged_memory import PagedMemory
from qlora_tool.training.parameter_state import ParameterState, is_paged, step_together

if TYPE_CHECKING:
    from qlora_tool.adapters.attach import AdapterSet
    from qlora_tool.config import TrainingConfig
    from qlora_tool.world import World

LOSS_SCALE_FLOOR, LOSS_SCALE_CEILING, LOSS_SCALE_PATIENCE = 1.0, 2.0**24, 1000
FLOAT16_IN_BACKWARD = (
    "training.optimizer_in_backward: true, but the scale of float16 gradients needs all of them at once; leave it "
    "out, or set model.compute_dtype: bfloat16"
)


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are trained at the same rate.

    Attributes:
        parameters: none of them in another group.
        rate: times the learning rate is theirs.
    """

    parameters: Sequence[nn.Parameter]
    rate: float = 1.0


class Optimizer:
    """AdamW over the trained parameters.

    Gradients are read in fp32: their norm, the factor that clips them, the loss scale that is taken out of them, and
    the sum over several backward passes.

    Args:
        name: adamw, adamw_8bit or paged_adamw_8bit.
        parameters: what is trained; a list of parameters is one group.
        weight_decay: decoupled (Loshchilov & Hutter 2019, arXiv 1711.05101).

    Attributes:
        parameters: of all groups, in order.
        loss_scale: what the loss is multiplied by before backward. Only fp16 gradients need one: it halves when they
            overflow (the step is left out) and doubles after a thousand steps that did not.
    """

    def __init__(
        self, name: str, parameters: Sequence[nn.Parameter] | Sequence[ParameterGroup], weight_decay: float = 0.0
    ):
        self.name, self.weight_decay = name, weight_decay
        self.parameters: list[nn.Parameter] = []
        self._rates: list[float] = []
        for entry in parameters:
            group = entry if isinstance(entry, ParameterGroup) else ParameterGroup([entry])
            self.parameters += group.parameters
            self._rates += [group.rate] * len(group.parameters)
        self._states: dict[int, ParameterState] = {}  # by the parameter's number, from its first step on
        self._sums: dict[int, Tensor] = {}  # of gradients of 16 bits over several backward passes, by the number
        self._summing, self._sums_gradients = False, False
        self._codes = _eight_bit_codes(self.parameters) if name != "adamw" else None
        self._pages: PagedMemory | None = None
        self._scaled = any(parameter.dtype == torch.float16 for parameter in self.parameters)
        self.loss_scale = 2.0**16 if self._scaled else 1.0
        self._good_steps = 0

    def before_backward(self, learning_rate: float, accumulate: bool = False) -> None:
        """Told before each backward pass.

        Args:
            learning_rate: of the step that it is for.
            accumulate: whether the step has several backward passes: gradients of 16 bits are then summed in fp32, each
                as soon as it is there. Gradients in fp32 are summed by autograd.
        """
        self._summing = accumulate
        if accumulate and not self._sums_gradients:
            halves = [number for number, parameter in enumerate(self.parameters) if parameter.dtype.itemsize == 2]
            _on_gradients(self._add_to_sum, self.parameters, halves)
            self._sums_gradients = True

    @torch.no_grad()
    def _add_to_sum(self, number: int, gradient: Tensor) -> None:
        if not self._summing:
            return
        self.parameters[number].grad = None
        if number not in self._sums:
            self._sums[number] = gradient.float()
            return
        for total, piece in zip(slices_of(self._sums[number]), slices_of(gradient), strict=True):
            total.add_(piece.float())

    @torch.no_grad()
    def sum_over(self, world: World) -> None:
        """Put the sums of all processes' gradients, in fp32, in the place of this one's."""
        if world.size == 1:
            return
        own = [self._gradient(number) for number in range(len(self.parameters))]
        for number, total in world.sum_each(own, self.parameters):
            self._sums[number], self.parameters[number].grad, own[number] = total, None, None

    def _gradient(self, number: int) -> Tensor | None:
        found = self._sums.get(number)
        return self.parameters[number].grad if found is None else found

    @torch.no_grad()
    def step(self, learning_rate: float, max_grad_norm: float = 0.0) -> Tensor:
        """Take a step with every parameter that has a gradient, and drop the gradients.

        Args:
            max_grad_norm: gradients of a larger norm are scaled down to it; 0 leaves them.

        Returns:
            The norm of all gradients before clipping, fp32.
        """
        norm, scale = gradient_norm(self.gradients()), self.loss_scale
        norm = norm / scale if self._scaled else norm
        if not self._scaled or self._adjust_scale(bool(norm.isfinite())):
            factor = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0) if max_grad_norm else None
            if self._scaled:
                factor = torch.full_like(norm, 1 / scale) if factor is None else factor / scale
            self._update(range(len(self.parameters)), learning_rate, factor)
        self._sums.clear()
        for parameter in self.parameters:
            parameter.grad = None
        return norm

    def _update(self, numbers: Iterable[int], learning_rate: float, factor: Tensor | None) -> None:
        """Take a step with those of these parameters that have a gradient, all of one kind together."""
        kinds: dict[tuple[torch.dtype, torch.dtype, bool], list[tuple[int, Tensor]]] = {}
        for number in numbers:
            if (gradient := self._gradient(number)) is not None:
                kind = self.parameters[number].dtype, gradient.dtype, self._state(number).eight_bit
                kinds.setdefault(kind, []).append((number, gradient))
        if self._pages is not None:
            self._pages.prefetch()
        for (_, _, eight_bit), chosen in kinds.items():
            states = [self._states[number] for number, _ in chosen]
            rates = [learning_rate * self._rates[number] for number, _ in chosen]
            gradients = [gradient for _, gradient in chosen]
            step_together(states, gradients, rates, self.weight_decay, self._codes if eight_bit else None, factor)

    def _state(self, number: int) -> ParameterState:
        if number not in self._states:
            parameter, paged = self.parameters[number], self.name.startswith("paged")
            if paged and parameter.is_cuda:
                paged = self._page()
            self._states[number] = ParameterState(parameter, self._codes is not None, paged, self._pages)
        return self._states[number]

    def _page(self) -> bool:
        """Whether there is managed memory for what is paged, asked for in one piece before the first state."""
        if self._pages is None and not self._states:
            large = [parameter for parameter in self.parameters if is_paged(parameter)]
            if large:
                self._pages = PagedMemory.of([parameter.numel() for parameter in large] * 2, large[0].device)
        return self._pages is not None

    def _adjust_scale(self, finite: bool) -> bool:
        """Whether the step may be taken; the scale for the next."""
        if not finite:
            self.loss_scale, self._good_steps = max(self.loss_scale / 2, LOSS_SCALE_FLOOR), 0
            return False
        self._good_steps += 1
        if self._good_steps == LOSS_SCALE_PATIENCE:
            self.loss_scale, self._good_steps = min(self.loss_scale * 2, LOSS_SCALE_CEILING), 0
        return True

    def gradients(self) -> Iterator[Tensor]:
        """The gradients, or the sums of them, that the next step takes."""
        found = (self._gradient(number) for number in range(len(self.parameters)))
        return (gradient for gradient in found if gradient is not None)

    def state_tensors(self) -> Iterator[Tensor]:
        """All that is remembered from step to step."""
        yield from self._codes or ()
        for state in self._states.values():
            yield from state.tensors.values()

    def paged_tensors(self) -> Iterator[Tensor]:
        """Those of the state tensors that on a CUDA device lie in managed memory, outside of PyTorch's allocator."""
        for state in self._states.values():
            yield from (state.tensors[name] for name in state.paged)

    def state_dict(self) -> dict[str, Any]:
        """All that an exact resume needs beside the parameters."""
        numbers = range(len(self.parameters))
        states = [self._states[number].state_dict() if number in self._states else None for number in numbers]
        return {"name": self.name, "parameters": states, "loss_scale": self.loss_scale, "good_steps": self._good_steps}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state that `state_dict` gave, here or in version 0.1.

        Raises:
            ValueError: it is of another optimizer, or of other weights.
        """
        state = _today(state, self.parameters)
        if state["name"] != self.name:
            raise ValueError(f"saved by {state['name']}, not by {self.name}")
        if len(state["parameters"]) != len(self.parameters):
            raise ValueError(f"saved for {len(state['parameters'])} tensors, not for {len(self.parameters)}")
        self._states.clear()
        for number, saved in enumerate(state["parameters"]):
            if saved is not None:
                self._state(number).load_state_dict(saved)
        self.loss_scale, self._good_steps = state["loss_scale"], state["good_steps"]


class OptimizerInBackward(Optimizer):
    """Each parameter takes its step as soon as its gradient is there, and the gradient is dropped: one of them lives at
    a time. No norm of all gradients is known before the first step is taken, so nothing can be clipped by it, and
    gradients cannot be summed over several backward passes.

    Source: LOMO (Lv et al. 2023, arXiv 2306.09782), with AdamW's step in the place of SGD's.

    Args: as `Optimizer`.

    Raises:
        UserError: a parameter is fp16: its gradients are scaled by what all of them are.
    """

    def __init__(
        self, name: str, parameters: Sequence[nn.Parameter] | Sequence[ParameterGroup], weight_decay: float = 0.0
    ):
        super().__init__(name, parameters, weight_decay)
        if self._scaled:
            raise UserError(FLOAT16_IN_BACKWARD)
        self._learning_rate = 0.0
        self._norms: list[Tensor] = []
        _on_gradients(self._step_one, self.parameters, range(len(self.parameters)))

    @torch.no_grad()
    def _step_one(self, number: int, gradient: Tensor) -> None:
        self._norms.append(gradient_norm([gradient]))
        self._update([number], self._learning_rate, None)
        self.parameters[number].grad = None

    def before_backward(self, learning_rate: float, accumulate: bool = False) -> None:
        """Told before the step's only backward pass.

        Raises:
            ValueError: there are to be several.
        """
        if accumulate:
            raise ValueError("steps that are taken in backward have one backward pass each")
        self._learning_rate = learning_rate
        self._norms.clear()

    def step(self, learning_rate: float, max_grad_norm: float = 0.0) -> Tensor:
        """All steps were taken already.

        Returns:
            The norm of all gradients, fp32.
        """
        return torch.linalg.vector_norm(torch.stack(self._norms)) if self._norms else torch.zeros(())


def _on_gradients(
    method: Callable[[int, Tensor], None], parameters: Sequence[nn.Parameter], numbers: Iterable[int]
) -> None:
    """Call an optimizer's method with a parameter's number and its gradient, whenever that is there.

    Parameters hold their hooks out of the garbage collector's sight, so the hooks must not hold the optimizer.
    """
    weakly = WeakMethod(method)

    def call(number: int, parameter: Tensor) -> None:
        if (found := weakly()) is not None and parameter.grad is not None:
            found(number, parameter.grad)

    for number in numbers:
        parameters[number].register_post_accumulate_grad_hook(partial(call, number))


def gradient_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The norm of all gradients together, fp32, summed in fp32 whatever they are in."""
    pieces = [piece for gradient in gradients for piece in slices_of(gradient)]
    if not pieces:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(pieces, dtype=torch.float32)))


def parameter_groups(adapters: AdapterSet) -> list[ParameterGroup]:
    """What is trained, by its learning rate."""
    return [ParameterGroup(parameters, rate) for rate, parameters in adapters.rates().items()]


def make_optimizer(
    training: TrainingConfig, parameters: Sequence[nn.Parameter] | Sequence[ParameterGroup]
) -> Optimizer:
    """The optimizer that the configuration names."""
    kind = OptimizerInBackward if training.optimizer_in_backward else Optimizer
    return kind(training.optim, parameters, training.weight_decay)


def _eight_bit_codes(parameters: Sequence[nn.Parameter]) -> tuple[Tensor, Tensor]:
    """bitsandbytes' values of 8 bits, of signed and of unsigned moments (Dettmers et al. 2021, arXiv 2110.02861)."""
    import bitsandbytes.functional as bnb

    device = parameters[0].device if parameters else None
    # Made from Python numbers: real tables in a prediction too, and made unseen, as where they are made differs there.
    with unset_fake_temporarily(), _disable_current_modes(), torch.device("cpu"):
        signed, unsigned = bnb.create_dynamic_map(signed=True), bnb.create_dynamic_map(signed=False)
    return signed.to(device), unsigned.to(device)


def _today(state: Mapping[str, Any], parameters: Sequence[nn.Parameter]) -> Mapping[str, Any]:
    """A state in today's form.

    Version 0.1 saved that of torch's or bitsandbytes' optimizer (`inner`) and, of adamw with weights of 16 bits, an
    fp32 master of every weight; and of an optimizer that steps in backward one such state a parameter (`single`).
    """
    if "single" in state:
        parts = zip(state["single"], [[parameter] for parameter in parameters], strict=True)
        today = [_today(*part)["parameters"][0] for part in parts]
        return {"name": state["name"], "parameters": today, "loss_scale": 1.0, "good_steps": 0}
    if "inner" not in state:
        return state
    halves = [parameter.dtype.itemsize == 2 for parameter in parameters]
    masters = state["masters"] or [None] * len(parameters)
    if state["name"] == "adamw" and (state["masters"] is None) == any(halves):
        raise ValueError("saved for weights of another precision")
    saved: list[dict[str, Any] | None] = [None] * len(parameters)
    for number, moments in state["inner"]["state"].items():
        if number >= len(parameters):
            raise ValueError(f"saved for more than the {len(parameters)} tensors")
        found = {**moments, **moments.get("__bnb_optimizer_quant_state__", {})}
        if "state1" in found and found["state1"].dtype == torch.float32:
            found |= {"exp_avg": found.pop("state1"), "exp_avg_sq": found.pop("state2")}
        names = ("exp_avg", "exp_avg_sq", "state1", "state2", "absmax1", "absmax2")
        saved[number] = {"steps": found["step"]} | {name: found[name] for name in names if name in found}
        if halves[number]:  # 8-bit steps were taken by the weight itself, which is exact then
            parameter, master = parameters[number], masters[number]
            saved[number]["master"] = parameter.detach().float() if master is None else master
    return {**{key: state[key] for key in ("name", "loss_scale", "good_steps")}, "parameters": saved}
