"""AdamW of one trained weight: its moments, and what makes an exact fp32 weight, its master, of one of 16 bits.

A step of 1e-4 is lost in a bf16 weight near 1, whose neighbours are 8e-3 apart, so steps are taken in fp32. A bf16
weight is the upper half of an fp32 number: it and 16 more bits are its master, joined before a step and split after it.
An fp16 weight has a master of its own, an fp32 weight is its own master.

Large tensors take their step slice by slice, so that what is joined and converted never takes more than a constant.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

SLICE = 2**20
"""Elements that take their step at once; a multiple of `BLOCK`."""
BLOCK = 256
"""Elements with one scale in bitsandbytes' 8-bit states."""
SMALLEST_IN_8_BITS = 4096
"""Elements; as in bitsandbytes, smaller tensors have moments in fp32."""
SMALLEST_PAGED = 100_000
"""Elements; as in bitsandbytes, the moments of smaller tensors are not paged."""

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


def split_master(master: Tensor, weight: Tensor, low_bits: Tensor) -> None:
    """Round fp32 numbers to bf16, ties away from zero, and keep what rounding drops.

    As integers, master = weight · 2¹⁶ + low_bits, and the `low_bits` of numbers that are exact in bf16 are 0. Rounding
    ties to even, as elsewhere, would need a 17th bit: the half could lie on either side. `join_master` gives every
    master back to the bit, a NaN as some NaN.

    Args:
        master: fp32, contiguous, one dimension; used up.
        weight: bf16, of the same length; written.
        low_bits: int16, of the same length; written.
    """
    # A NaN whose bits are all ones, as CUDA makes them, would round to zero.
    bits = master.nan_to_num_(nan=math.nan, posinf=math.inf, neginf=-math.inf).view(torch.int32)
    low_bits.copy_(bits)  # modulo 2¹⁶
    weight.view(torch.int16).copy_(bits.add_(0x8000).bitwise_right_shift_(16))


def join_master(weight: Tensor, low_bits: Tensor) -> Tensor:
    """The fp32 numbers that `split_master` split."""
    high_bits = weight.view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
    return high_bits.add_(low_bits.to(torch.int32)).view(torch.float32)


class ParameterState:
    """What AdamW (Kingma & Ba 2015, decoupled decay: Loshchilov & Hutter 2019, arXiv 1711.05101) remembers of a weight.

    Args:
        parameter: of any dense layout; fp32, bf16 or fp16.
        weight_decay: of a step, times its learning rate.
        codes: bitsandbytes' tables of the values of signed and of unsigned 8-bit moments, on the parameter's device;
            None for moments in fp32.
        paged: on CUDA, large 8-bit moments lie in managed memory, which the driver pages out where there is no room.

    Attributes:
        steps: how many were taken.
        tensors: by name, each of one dimension, in the order of the parameter in memory: `low_bits` or `master`;
            `exp_avg` and `exp_avg_sq`, or `state1`, `state2` and their `absmax1`, `absmax2`.
        paged: the names of those that are paged on CUDA.
    """

    def __init__(self, parameter: nn.Parameter, weight_decay: float, codes: tuple[Tensor, Tensor] | None, paged: bool):
        self.parameter, self.weight_decay, self.steps = parameter, weight_decay, 0
        self._order = sorted(range(parameter.dim()), key=parameter.stride, reverse=True)
        self._codes = codes if parameter.numel() >= SMALLEST_IN_8_BITS else None
        pages = paged and self._codes is not None and parameter.numel() >= SMALLEST_PAGED
        self.paged = ("state1", "state2") if pages else ()
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
        if self._codes is None:
            return {name: torch.zeros(count, device=device) for name in ("exp_avg", "exp_avg_sq")}
        found = {name: self._eight_bit_zeros() for name in ("state1", "state2")}
        blocks = -(-count // BLOCK)
        return found | {name: torch.zeros(blocks, device=device) for name in ("absmax1", "absmax2")}

    def _eight_bit_zeros(self) -> Tensor:
        count, device = self.parameter.numel(), self.parameter.device
        if not (self.paged and device.type == "cuda"):  # a CPU has nothing to page out of
            return torch.zeros(count, dtype=torch.uint8, device=device)
        import bitsandbytes.functional as bnb

        found = bnb.get_paged(count, dtype=torch.uint8, device=device)
        bnb.fill(found, 0)
        return found

    def _flat_weight(self) -> Tensor:
        """The parameter as one dimension, in its order in memory."""
        return self.parameter.detach().permute(self._order).view(-1)

    def update(self, gradient: Tensor, learning_rate: float, factor: Tensor | None) -> None:
        """Take a step.

        Args:
            gradient: of the parameter's shape, in its dtype or fp32; in fp32 it may be written to.
            factor: what the gradient is multiplied by, in fp32, if anything.
        """
        self.steps += 1
        weight, gradient = self._flat_weight(), gradient.permute(self._order).reshape(-1)
        self._prefetch()
        for start in range(0, weight.numel(), SLICE):
            piece = slice(start, start + SLICE)
            self._update_slice(weight[piece], gradient[piece], piece, learning_rate, factor)

    def _update_slice(self, weight: Tensor, gradient: Tensor, piece: slice, rate: float, factor: Tensor | None) -> None:
        gradient = gradient.float()
        if factor is not None:
            gradient.mul_(factor)
        if "low_bits" in self.tensors:
            low_bits = self.tensors["low_bits"][piece]
            master = join_master(weight, low_bits)
            self._adamw(master, gradient, piece, rate)
            split_master(master, weight, low_bits)
        elif "master" in self.tensors:
            master = self.tensors["master"][piece]
            self._adamw(master, gradient, piece, rate)
            weight.copy_(master)
        else:
            self._adamw(weight, gradient, piece, rate)

    def _adamw(self, weight: Tensor, gradient: Tensor, piece: slice, rate: float) -> None:
        if self._codes is None:
            count = torch.full((), float(self.steps), device=weight.device)
            torch._fused_adamw_(
                [weight], [gradient], [self.tensors["exp_avg"][piece]], [self.tensors["exp_avg_sq"][piece]], [],
                [count], lr=rate, beta1=BETA1, beta2=BETA2, weight_decay=self.weight_decay, eps=EPSILON,
                amsgrad=False, maximize=False,
            )  # fmt: skip
            return
        import bitsandbytes.functional as bnb

        blocks = slice(piece.start // BLOCK, piece.stop // BLOCK)
        bnb.optimizer_update_8bit_blockwise(
            "adam", gradient, weight, self._moment("state1", piece), self._moment("state2", piece), BETA1, BETA2, 0.0,
            0.0, EPSILON, self.steps, rate, *self._codes, self.tensors["absmax1"][blocks],
            self.tensors["absmax2"][blocks], self.weight_decay,
        )  # fmt: skip

    def _prefetch(self) -> None:
        """Ask for paged moments ahead of the step, in one piece instead of page by page."""
        for name in self.paged if self.parameter.is_cuda else ():
            import bitsandbytes.functional as bnb

            bnb.prefetch_tensor(self.tensors[name])

    def _moment(self, name: str, piece: slice) -> Tensor:
        """A slice of 8-bit moments; where they are paged, marked as bitsandbytes asks for."""
        moments = self.tensors[name]
        found = moments[piece]
        if getattr(moments, "is_paged", False):
            vars(found).update(is_paged=True, page_deviceid=vars(moments)["page_deviceid"])
        return found

    def state_dict(self) -> dict[str, Any]:
        """The count of steps and the tensors, by name."""
        return {"steps": self.steps, **self.tensors}

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
            tensor.copy_(found[name])
        self.steps = int(state["steps"])

    def _in_order(self, tensor: Tensor) -> Tensor:
        """One dimension, in the parameter's order in memory, of a tensor that may have the parameter's shape."""
        return tensor if tensor.shape != self.parameter.shape else tensor.permute(self._order).reshape(-1)


def slices_of(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor's elements, in pieces of at most `SLICE`."""
    return iter([tensor] if tensor.numel() <= SLICE else tensor.reshape(-1).split(SLICE))
