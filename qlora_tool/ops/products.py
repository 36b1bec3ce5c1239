"""Matrix products by the fastest library that this machine has for them.

On a CPU PyTorch's own fp32 products run through the BLAS it was built with, which on some processors leaves half of
the speed unused; oneDNN, which PyTorch carries too, compiles its products for the processor it finds. Which of the two
is taken is measured once per machine, in a fraction of a second, and kept. Everywhere else products are PyTorch's.

Nothing here is differentiable: the operations that use it write their own backward.
"""

from __future__ import annotations

import functools
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from qlora_tool.files.atomic import write_json
from qlora_tool.files.cache import cache_folder

ONEDNN = "float32 oneDNN"
MEASURED = ("float32", ONEDNN, "bfloat16")  # on a CPU; fp16 is never faster there
FASTER_BY = 1.25  # below this, the measurement's own noise could change the choice, and with it the last digits


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """(n, k) · (k, m) → (n, m), all in one dtype; either may be a transposed view."""
    return onednn_matmul(left, right) if _takes_onednn(left) else torch.mm(left, right)


def matmul_add(left: Tensor, right: Tensor, to: Tensor) -> Tensor:
    """to (n, m) + (n, k) · (k, m); `to` may be overwritten."""
    if _takes_onednn(left):
        _know_shapes()
        return torch.ops.mkldnn._linear_pointwise.binary(left, to, right.T, None, "add")
    return to.addmm_(left, right)


def onednn_matmul(left: Tensor, right: Tensor) -> Tensor:
    """(n, k) · (k, m) → (n, m) by oneDNN, fp32 on a CPU."""
    return torch.ops.mkldnn._linear_pointwise(left, right.T, None, "none", [], "")


@functools.cache
def _know_shapes() -> torch.library.Library:
    """PyTorch has no shape-only version of the operator that adds."""
    library = torch.library.Library("mkldnn", "IMPL", "Meta")
    library.impl("_linear_pointwise.binary", lambda left, to, *_: torch.empty_like(to))
    return library


def has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _takes_onednn(left: Tensor) -> bool:
    # Without elements oneDNN has no product.
    return left.dtype == torch.float32 and left.device.type == "cpu" and left.numel() > 0 and onednn_is_faster()


def onednn_workspace(weight: Tensor) -> int:
    """Bytes that oneDNN takes for the time of x·Wᵀ, W (m, k): each thread packs panels of 64 columns, 1024 deep, of a
    matrix whose columns lie apart (as its version 3.12 was seen to do with AVX-512)."""
    columns, depth = weight.shape
    packs = weight.stride(1) == 1 or (columns >= 512 and columns.bit_count() == 1)
    panel = 256 * min(-(-depth // 16) * 16, 1024) if packs else 0
    return 256 + (640 + panel) * torch.get_num_threads() + (128 if packs else 0)


@functools.cache
def onednn_is_faster() -> bool:
    """Whether fp32 products take oneDNN on this machine."""
    with unset_fake_temporarily():
        speeds = kept_measurement()
    return speeds[ONEDNN] > FASTER_BY * speeds["float32"]


def kept_measurement() -> dict[str, float]:
    """`measure_products`, measured once per processor and torch version and kept in the cache folder."""
    path = cache_folder() / "products.json"
    processor = [platform.machine(), torch.backends.cpu.get_cpu_capability(), *_bf16_instructions()]
    machine = f"{' '.join(processor)} torch {torch.__version__}"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["machine"] == machine:
            return {name: float(kept["gflops"][name]) for name in MEASURED}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nothing kept yet, or unreadable: measure
    gflops = measure_products()
    write_json(path, {"machine": machine, "gflops": gflops})
    return gflops


def _bf16_instructions() -> list[str]:
    """Those that Linux lists; PyTorch's own name, such as AVX512, is the same with and without them, and a home folder
    may be shared by machines of both kinds."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return []
    return sorted(words & {"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16", "svebf16"})


def measure_products() -> dict[str, float]:
    """GFLOP/s of a (128, 512) × (512, 512) product on this CPU: in fp32 by PyTorch's BLAS and by oneDNN (0 where it is
    not there), and in bf16; the best of twenty."""
    return {
        "float32": _measure(torch.mm, torch.float32),
        ONEDNN: _measure(onednn_matmul, torch.float32) if has_onednn() else 0.0,
        "bfloat16": _measure(torch.mm, torch.bfloat16),
    }


def _measure(product: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> float:
    left, right = torch.ones(128, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    seconds = float("inf")
    for attempt in range(21):  # the best of many: another process may take the cores for a while
        start = time.perf_counter()
        product(left, right)
        if attempt:  # the first prepares
            seconds = min(seconds, time.perf_counter() - start)
        if attempt >= 4 and seconds > 0.1:  # emulated
            break
    return 2 * 128 * 512 * 512 / seconds / 1e9
