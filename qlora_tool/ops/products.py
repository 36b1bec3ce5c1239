"""Matrix products by the faster of the two libraries that a CPU has for them.

PyTorch's own fp32 products run through the BLAS it was built with, which on some processors leaves half of the speed
unused; oneDNN, which PyTorch carries too, compiles its products for the processor it finds. Which of the two is taken
is measured (`ops/speeds.py`). Everywhere else products are PyTorch's.

The last digits of a product depend on the library. So a process makes its choice once, whatever is measured later; and
as a resumed run has to go on with the numbers of the run it continues, `products_choice` gives the choice in a word, to
be written down with the run, and `use_products` takes it up again.

Nothing here is differentiable: the operations that use it write their own backward.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from qlora_tool.errors import MachineError
from qlora_tool.ops import speeds
from qlora_tool.ops.declare import CPU, declare, target_of
from qlora_tool.ops.speeds import ONEDNN, PYTORCH, onednn_matmul

_choice: str | None = None


def products_choice() -> str:
    """The library of this process's fp32 products on the CPU: `PyTorch` or `oneDNN`."""
    global _choice
    if _choice is None:
        with _disable_current_modes():  # whoever watches a step must not see the measurement
            _choice = speeds.known_speeds().choice
    return _choice


def use_products(choice: str | None) -> None:
    """Take a library from here on, as a run that is resumed took it.

    Args:
        choice: `PyTorch` or `oneDNN`; None: the one that was measured to be faster. oneDNN counts as PyTorch where this
            PyTorch has none.

    Raises:
        ValueError: another name.
    """
    global _choice
    if choice not in (None, PYTORCH, ONEDNN):
        raise ValueError(f"products by {choice!r}: expected {PYTORCH} or {ONEDNN}")
    _choice = PYTORCH if choice == ONEDNN and not speeds.has_onednn() else choice


def _takes_onednn(left: Tensor) -> bool:
    # Without elements oneDNN has no product.
    return left.dtype == torch.float32 and left.numel() > 0 and (_choice or products_choice()) == ONEDNN


def _cpu_matmul(left: Tensor, right: Tensor) -> Tensor:
    product = onednn_matmul if _takes_onednn(left) else torch.mm
    return product(left, right) if speed_check is None else speed_check.timed(product, left, right)


def _cpu_workspace(left: Tensor, right: Tensor) -> int:
    return _onednn_workspace(left, right) if _takes_onednn(left) else 0


def _onednn_workspace(left: Tensor, right: Tensor) -> int:
    """Bytes that oneDNN takes for the time of a product: each thread packs panels of 64 columns, 1024 deep, of a right
    side whose columns lie apart (as its version 3.12 was seen to do with AVX-512); PyTorch copies a left side that is
    not contiguous. Version 3.10, of torch 2.11, takes less for small ones."""
    depth, columns = right.shape
    packs = right.stride(0) == 1 or (columns >= 512 and columns.bit_count() == 1)
    panel = 256 * min(-(-depth // 16) * 16, 1024) if packs else 0
    copied = 0 if left.is_contiguous() else left.numel() * left.element_size()
    return 256 + (640 + panel) * torch.get_num_threads() + (128 if packs else 0) + copied


_matmul = declare(
    "matmul(Tensor left, Tensor right) -> Tensor",
    reference=torch.mm,
    shapes=lambda left, right: left.new_empty(left.shape[0], right.shape[1]),
    versions={"cpu": _cpu_matmul},
    workspace={"cpu": _cpu_workspace},
)

_matmul_add = declare(  # oneDNN's alone: PyTorch's works in place
    "matmul_add(Tensor to, Tensor left, Tensor right) -> Tensor",
    reference=torch.addmm,
    shapes=lambda to, left, right: torch.empty_like(to),
    versions={"cpu": lambda to, left, right: torch.ops.mkldnn._linear_pointwise.binary(left, to, right.T, None, "add")},
    workspace={"cpu": lambda to, left, right: _onednn_workspace(left, right)},
)


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """(n, k) · (k, m) → (n, m), all in one dtype; either may be a transposed view."""
    return _matmul(left, right)


def matmul_add(left: Tensor, right: Tensor, to: Tensor) -> Tensor:
    """to (n, m) + (n, k) · (k, m); `to` may be overwritten."""
    if target_of(left) == CPU and _takes_onednn(left):
        return _matmul_add(to, left, right)
    return to.addmm_(left, right)


def scaled_matmul(left: Tensor, right: Tensor, scale: float, to: Tensor | None = None) -> Tensor:
    """scale · (n, k) · (k, m), into `to` (n, m) where that is given. On a CUDA device the product itself scales it,
    before it is rounded."""
    if target_of(left).type == "cuda":
        to = left.new_empty(left.shape[0], right.shape[1]) if to is None else to
        return to.addmm_(left, right, beta=0, alpha=scale)
    product = matmul(left, right).mul_(scale)
    return product if to is None else to.copy_(product)


class SpeedCheck:
    """Times some of a process's first large fp32 products, and has them measured again where they are far slower than
    what was measured before. This process keeps its choice: the numbers of a run do not change in the middle of it.

    Args:
        passed_over: large products that are not timed at first: caches fill, and oneDNN compiles.
        timed: that are timed then.
    """

    LARGE = 4e8  # operations; below, the time of a call counts
    NARROWEST = 256  # no dimension is less: LoRA's own products are of another kind

    def __init__(self, passed_over: int = 200, timed: int = 100) -> None:
        self._waiting, self._wanted = passed_over, timed
        self._achieved: list[float] = []  # GFLOP/s

    def timed(self, product: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor) -> Tensor:
        """The product."""
        n, k, m = *left.shape, right.shape[1]
        if 2 * n * k * m < self.LARGE or min(n, k, m) < self.NARROWEST or left.dtype != torch.float32:
            return product(left, right)
        self._waiting -= 1
        if self._waiting >= 0:
            return product(left, right)
        start = time.perf_counter()
        result = product(left, right)
        self._achieved.append(2e-9 * n * k * m / (time.perf_counter() - start))
        if len(self._achieved) == self._wanted:
            self._finish()
        return result

    def _finish(self) -> None:
        global speed_check
        speed_check = None
        with suppress(OSError, MachineError):  # the cache cannot be written: no reason to stop a run
            speeds.compare_with_training(products_choice(), statistics.median(self._achieved))


speed_check: SpeedCheck | None = SpeedCheck()
"""That of this process; None once it is done."""
