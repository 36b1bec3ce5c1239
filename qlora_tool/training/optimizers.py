"""AdamW in fp32 with a master copy where A and B are kept in 16 bits, and bitsandbytes' 8-bit AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from qlora_tool.errors import UserError
from qlora_tool.training.step import clip_gradients

if TYPE_CHECKING:
    from qlora_tool.config import TrainingConfig

LOSS_SCALE_FLOOR, LOSS_SCALE_CEILING, LOSS_SCALE_PATIENCE = 1.0, 2.0**24, 1000


class Optimizer:
    """A torch optimizer over the trained parameters, or over fp32 copies of them.

    A step of 1e-4 is lost in a bf16 weight near 1, whose neighbours are 8e-3 apart; so weights of 16 bits have a master
    copy in fp32 that takes the step, and are rounded from it.

    Args:
        name: adamw, adamw_8bit or paged_adamw_8bit.
        parameters: what is trained.
        weight_decay: decoupled (Loshchilov & Hutter 2019, arXiv 1711.05101).

    Attributes:
        loss_scale: what the loss is multiplied by before backward. Only fp16 gradients need one: it halves when they
            overflow (the step is left out) and doubles after a thousand steps that did not.
    """

    def __init__(self, name: str, parameters: Sequence[nn.Parameter], weight_decay: float = 0.0):
        self.name, self.parameters = name, list(parameters)
        eight_bit = name != "adamw"
        has_master = not eight_bit and any(parameter.dtype.itemsize == 2 for parameter in self.parameters)
        self.masters = [p.detach().float().requires_grad_() for p in self.parameters] if has_master else None
        stepped = self.masters or self.parameters
        if eight_bit:
            import bitsandbytes as bnb

            paged = name == "paged_adamw_8bit" and stepped[0].is_cuda  # on a CPU there is nothing to page out of
            kind = bnb.optim.PagedAdamW8bit if paged else bnb.optim.AdamW8bit
            with unset_fake_temporarily():  # its tables are made from Python numbers: real ones in a prediction too
                self.inner = kind(stepped, lr=0.0, betas=(0.9, 0.999), weight_decay=weight_decay)
        else:
            self.inner = torch.optim.AdamW(
                stepped, lr=0.0, betas=(0.9, 0.999), weight_decay=weight_decay, foreach=False
            )
        self.loss_scale = 2.0**16 if any(p.dtype == torch.float16 for p in self.parameters) else 1.0
        self._scaled = self.loss_scale != 1.0
        self._good_steps = 0

    def before_backward(self, learning_rate: float) -> None:
        """Told before the step's last backward pass."""

    def step(self, learning_rate: float, max_grad_norm: float = 0.0) -> Tensor:
        """Clip, step, and drop the gradients.

        Returns:
            The norm of all gradients before clipping, fp32.
        """
        pairs = zip(self.parameters, self.masters or self.parameters, strict=True)
        used = [(parameter, master) for parameter, master in pairs if parameter.grad is not None]
        for parameter, master in used:
            if master is not parameter:
                master.grad, parameter.grad = parameter.grad.float(), None
            if self._scaled:
                master.grad.div_(self.loss_scale)
        norm = clip_gradients([master.grad for _, master in used], max_grad_norm)
        if not self._scaled or self._adjust_scale(bool(norm.isfinite())):
            for group in self.inner.param_groups:
                group["lr"] = learning_rate
            self.inner.step()
            self._round_masters()
        self.inner.zero_grad(set_to_none=True)
        return norm

    def _adjust_scale(self, finite: bool) -> bool:
        """Whether the step may be taken; the scale for the next."""
        if not finite:
            self.loss_scale, self._good_steps = max(self.loss_scale / 2, LOSS_SCALE_FLOOR), 0
            return False
        self._good_steps += 1
        if self._good_steps == LOSS_SCALE_PATIENCE:
            self.loss_scale, self._good_steps = min(self.loss_scale * 2, LOSS_SCALE_CEILING), 0
        return True

    @torch.no_grad()
    def _round_masters(self) -> None:
        if self.masters is not None:
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                parameter.copy_(master)

    def state_dict(self) -> dict[str, Any]:
        """All that an exact resume needs beside the parameters."""
        return {
            "name": self.name,
            "inner": self.inner.state_dict(),
            "masters": None if self.masters is None else [master.detach() for master in self.masters],
            "loss_scale": self.loss_scale,
            "good_steps": self._good_steps,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state that `state_dict` gave.

        Raises:
            ValueError: it is of another optimizer.
        """
        if "single" in state:
            raise ValueError("saved by an optimizer that steps in backward")
        if state["name"] != self.name:
            raise ValueError(f"saved by {state['name']}, not by {self.name}")
        if (state["masters"] is None) != (self.masters is None):
            raise ValueError("saved for weights of another precision")
        self.inner.load_state_dict(state["inner"])
        if self.masters is not None:
            for master, kept in zip(self.masters, state["masters"], strict=True):
                master.copy_(kept)
        self.loss_scale, self._good_steps = state["loss_scale"], state["good_steps"]


class OptimizerInBackward:
    """Each parameter takes its step as soon as its gradient is there, and the gradient is dropped: one of them lives at
    a time. No norm of all gradients is known before the first step is taken, so nothing can be clipped by it, and
    gradients cannot be summed over several backward passes.

    Source: LOMO (Lv et al. 2023, arXiv 2306.09782), with AdamW's step in the place of SGD's.

    Args: as `Optimizer`.

    Attributes:
        loss_scale: 1.
    """

    loss_scale = 1.0

    def __init__(self, name: str, parameters: Sequence[nn.Parameter], weight_decay: float = 0.0):
        self.name, self.parameters = name, list(parameters)
        if any(parameter.dtype == torch.float16 for parameter in self.parameters):
            raise UserError(
                "training.optimizer_in_backward: true, but float16 gradients are scaled by what all of them are; leave "
                "it out, or set model.compute_dtype: bfloat16"
            )
        self.single = [Optimizer(name, [parameter], weight_decay) for parameter in self.parameters]
        self._learning_rate = 0.0
        self._norms: list[Tensor] = []
        for parameter, optimizer in zip(self.parameters, self.single, strict=True):
            parameter.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: self._step_one(optimizer))

    def _step_one(self, optimizer: Optimizer) -> None:
        self._norms.append(optimizer.step(self._learning_rate))

    def before_backward(self, learning_rate: float) -> None:
        """Told before the step's only backward pass."""
        self._learning_rate = learning_rate
        self._norms.clear()

    def step(self, learning_rate: float, max_grad_norm: float = 0.0) -> Tensor:
        """All steps were taken already.

        Returns:
            The norm of all gradients, fp32.
        """
        return torch.linalg.vector_norm(torch.stack(self._norms)) if self._norms else torch.zeros(())

    def state_dict(self) -> dict[str, Any]:
        """All that an exact resume needs beside the parameters."""
        return {"name": self.name, "single": [optimizer.state_dict() for optimizer in self.single]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state that `state_dict` gave.

        Raises:
            ValueError: it is of another optimizer.
        """
        if "single" not in state:
            raise ValueError("saved by an optimizer that steps after backward")
        for optimizer, kept in zip(self.single, state["single"], strict=True):
            optimizer.load_state_dict(kept)


def make_optimizer(training: TrainingConfig, parameters: Sequence[nn.Parameter]) -> Optimizer | OptimizerInBackward:
    """The optimizer that the configuration names."""
    kind = OptimizerInBackward if training.optimizer_in_backward else Optimizer
    return kind(training.optim, parameters, training.weight_decay)
