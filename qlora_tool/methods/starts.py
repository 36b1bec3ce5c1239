"""How LoRA's A and B start, by the names that `init_lora_weights` has.

W is the unquantized weight (out, in), Q quantizes it, s is the scale. A start leaves up to four tensors: A and B, which
are trained, and A₀ and B₀, which are not, where W − s·B₀A₀ takes the place of W: within the product (`symmetric`), or
before the weight is quantized (`pissa`, `loftq` from its second step on). The frozen ones are kept with the adapter, in
the adapter's dtype, so that the base is made again from them to the same bits; see `ops.low_rank.less_product`.

    default      B = 0, A Kaiming-uniform(√5): uniform within ±1/√in (Hu et al. 2021)
    gaussian     B = 0, A normal of deviation 1/r, as in PEFT
    symmetric    B = B₀, A = A₀, each Kaiming-uniform(√5) by its long side: ±1/√out and ±1/√in, so that neither is told
                 from the other (Su Jianlin 2023, "LoRA from the gradient's viewpoint")
    pissa        s·BA = s·B₀A₀ = the r largest singular parts of W (Meng et al. 2024, arXiv 2404.02948), as in PEFT;
                 pissa_niter_N by a randomized decomposition of N iterations
    loftq        s·BA = the best fit of W − Q(W − s·B₀A₀), s·B₀A₀ being the fit of the step before (Li et al. 2023,
                 arXiv 2310.08659, algorithm 1); of one step, PEFT's default, A₀ and B₀ are none and the base is Q(W)
    calibrated   s·BA = the fit of W − Q(W) that is best on inputs as the layer gets them; the base is Q(W)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Named = Literal["default", "gaussian", "symmetric", "pissa", "loftq", "calibrated"]
NITER = "pissa_niter_"
OF_ERRORS = ("loftq", "calibrated")  # what they fit is the quantization's error


def is_pissa(start: str) -> bool:
    """Whether the principal part is taken out of the base."""
    return start == "pissa" or start.startswith(NITER)


def needs_weights(start: str) -> bool:
    """Whether A and B are made of the unquantized weight alone, as it is read."""
    return is_pissa(start) or start == "loftq"


def keeps_frozen(start: str, loftq_iter: int) -> bool:
    """Whether A₀ and B₀ are kept."""
    return start == "symmetric" or takes_out(start, loftq_iter)


def takes_out(start: str, loftq_iter: int) -> bool:
    """Whether s·B₀A₀ is taken out of the weight before it is quantized."""
    return is_pissa(start) or (start == "loftq" and loftq_iter > 1)


def drawn(start: str, out_features: int, in_features: int, r: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A and B where no weight has a part in them, fp32; the other starts draw as `default` until they know better."""
    import math

    import torch

    lora_A, lora_B = torch.empty(r, in_features), torch.zeros(out_features, r)
    if start == "gaussian":
        torch.nn.init.normal_(lora_A, std=1 / r, generator=generator)
    else:
        torch.nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5), generator=generator)
    if start == "symmetric":
        torch.nn.init.kaiming_uniform_(lora_B.T, a=math.sqrt(5), generator=generator)
    return {"lora_A": lora_A, "lora_B": lora_B}


def of_weight(
    start: str, weight: Tensor, r: int, scaling: float, dtype: torch.dtype, generator: torch.Generator,
    quantized: Callable[[Tensor], Tensor], loftq_iter: int,
) -> dict[str, Tensor]:  # fmt: skip
    """A, B, and A₀ and B₀ where there are such, of `pissa` and `loftq`.

    Args:
        weight: (out, in), unquantized.
        scaling: s.
        dtype: that the adapter is kept in, to which all are rounded.
        quantized: gives what products will see of a weight, fp32.
    """
    from qlora_tool.ops.low_rank import best_fit, less_product

    if is_pissa(start):
        iterations = int(start.removeprefix(NITER)) if start.startswith(NITER) else None
        lora_B, lora_A = (part.to(dtype) for part in best_fit(weight.float() / scaling, r, iterations, generator))
        return {"lora_A": lora_A, "lora_B": lora_B, "start_A": lora_A.clone(), "start_B": lora_B.clone()}
    frozen: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    for _ in range(loftq_iter):
        frozen = {f"start_{name[-1]}": tensor for name, tensor in found.items()}
        rest = less_product(weight, frozen["start_B"], frozen["start_A"], scaling) if frozen else weight
        lora_B, lora_A = best_fit((weight.float() - quantized(rest)) / scaling, r)
        found = {"lora_A": lora_A.to(dtype), "lora_B": lora_B.to(dtype)}
    return found | frozen
