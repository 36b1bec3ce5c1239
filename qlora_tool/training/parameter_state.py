"""What AdamW remembers of a trained weight: its moments, and what makes an exact fp32 weight, its master, of one of 16
bits (`ops/adamw.py` tells how)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora_tool.ops.adamw import BLOCK, adamw, memory_order, split_master
from qlora_tool.training.paged_memory import PagedMemory

SMALLEST_IN_8_BITS = 4096
"""Elements; as in bitsandbytes, smaller tensors have moments in fp32."""
SMALLEST_PAGED = 100_000
"""Elements; as in bitsandbytes, the moments of smaller tensors are not paged."""


class ParameterState:
    """What AdamW (Kingma & Ba 2015, decoupled decay: Loshchilov & Hutter 2019, arXiv 1711.05101) remembers of a weight.

    Args:
        parameter: of any dense layout; fp32, bf16 or fp16.
        eight_bit: whether moments are in 8 bits; those of small tensors are in fp32 all the same.
        paged: on CUDA, large 8-bit moments lie in managed memory, which the driver pages out where there is no room.
        pages: that memory; None where there is none, as on a CPU.

    Attributes:
        steps: how many were taken.
        eight_bit: whether these moments are in 8 bits.
        tensors: by name, each of one dimension, in the order of the parameter in memory: `low_bits` or `master`;
            `exp_avg` and `exp_avg_sq`, or `state1`, `state2` and their `absmax1`, `absmax2`.
        paged: the names of those that are paged on CUDA.
    """

    def __init__(
        self, parameter: nn.Parameter, eight_bit: bool, paged: bool = False, pages: PagedMemory | None = None
    ):
        self.parameter, self.steps = parameter, 0
        self.eight_bit = eight_bit and parameter.numel() >= SMALLEST_IN_8_BITS
        self.paged = ("state1", "state2") if paged and eight_bit and is_paged(parameter) else ()
        self._pages = pages
        self.tensors = self._exact_weight() | self._moments()

    def _exact_weight(self) -> dict[str, Tensor]:
        weight = self._flat_weight()
        if weight.dtype == torch.float32:
            return {}
        if weight.dtype == torch.float16:
            return {"master": weight.float()}
        return {"low_bits": torch.zeros_like(weight, dtype=torch.int16)}

    def _moments(self) -> dict[str, Tensor]:
        count, device = self.parameter.numel(), self.parameter.device
        if not self.eight_bit:
            return {name: torch.zeros(count, device=device) for name in ("exp_avg", "exp_avg_sq")}
        found = {name: self._eight_bit_zeros() for name in ("state1", "state2")}
        blocks = -(-count // BLOCK)
        return found | {name: torch.zeros(blocks, device=device) for name in ("absmax1", "absmax2")}

    def _eight_bit_zeros(self) -> Tensor:
        count, device = self.parameter.numel(), self.parameter.device
        if self.paged and self._pages is not None:
            return self._pages.take(count)
        return torch.zeros(count, dtype=torch.uint8, device=device)

    def _flat_weight(self) -> Tensor:
        """The parameter as one dimension, in its order in memory."""
        return self.parameter.detach().permute(memory_order(self.parameter)).view(-1)

    def state_dict(self) -> dict[str, Any]:
        """The count of steps and the tensors, by name."""
        return {"steps": self.steps} | {
            name: tensor.cpu() if name in self.paged else tensor for name, tensor in self.tensors.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state that `state_dict` gave, or one with a `master`, which a bf16 weight is then rounded from.

        Raises:
            ValueError: it is of a weight of another size or dtype.
        """
        found = {name: self._in_order(tensor) for name, tensor in state.items() if name != "steps"}
        if "low_bits" in self.tensors and (master := found.pop("master", None)) is not None:
            weight = self._flat_weight()
            found["low_bits"] = torch.empty_like(self.tensors["low_bits"])
            split_master(master.to(weight.device, copy=True), weight, found["low_bits"])
        if found.keys() != self.tensors.keys():
            raise ValueError("saved for weights of another precision")
        for name, tensor in self.tensors.items():
            if found[name].numel() != tensor.numel():
                raise ValueError(f"saved for weights of another size, not {tuple(self.parameter.shape)}")
            if found[name].dtype != tensor.dtype:
                raise ValueError(f"its {name} is saved in {found[name].dtype}, not in {tensor.dtype}")
            tensor.copy_(found[name])
        self.steps = int(state["steps"])

    def _in_order(self, tensor: Tensor) -> Tensor:
        """One dimension, in the parameter's order in memory, of a tensor that may have the parameter's shape."""
        if tensor.shape != self.parameter.shape:
            return tensor
        return tensor.permute(memory_order(self.parameter)).reshape(-1)


def is_paged(parameter: nn.Parameter) -> bool:
    """Whether its 8-bit moments are large enough to be paged."""
    return parameter.numel() >= SMALLEST_PAGED


def step_together(
    states: Sequence[ParameterState],
    gradients: Sequence[Tensor],
    rates: Sequence[float],
    weight_decay: float,
    codes: Sequence[Tensor] | None,
    factor: Tensor | None,
) -> None:
    """Take a step with each of several weights.

    Args:
        states: of weights of one dtype, all with moments in 8 bits or all in fp32.
        gradients: of the weights' shapes, all in their dtype or all in fp32; in fp32 they may be written to.
        rates: the learning rate of each.
        weight_decay: of a step, times its learning rate.
        codes: the values of signed and of unsigned 8-bit moments, on the weights' device, where they are in 8 bits.
        factor: what gradients are multiplied by, in fp32, if anything.
    """

    def column(*names: str) -> list[Tensor]:
        return [state.tensors[name] for state in states for name in names if name in state.tensors]

    for state in states:
        state.steps += 1
    adamw(
        [state.parameter for state in states], gradients, column("low_bits", "master"), column("exp_avg", "state1"),
        column("exp_avg_sq", "state2"), column("absmax1"), column("absmax2"), codes or (), factor,
        [state.steps for state in states], rates, weight_decay,
    )  # fmt: skip
