"""Which dtype products run in: what the device can do, measured once where it cannot be asked.

A processor without bf16 instructions emulates bf16 products, hundreds of times slower than fp32 ones; one that has
them is several times faster than in fp32. The measurement takes a fraction of a second and is kept per machine.
"""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path

import torch

from qlora_tool.files import cache_folder, write_json

COMPUTE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MEASURED = ("float32", "bfloat16")  # on a CPU; fp16 is never faster there


def choose_compute_dtype(device: torch.device) -> torch.dtype:
    """The dtype that `compute_dtype: auto` stands for on this device.

    CUDA: bf16 where the card has it, else fp16. CPU: bf16 where its products are measured faster than fp32's.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    speeds = kept_measurement()
    return torch.bfloat16 if speeds["bfloat16"] > speeds["float32"] else torch.float32


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
    """GFLOP/s of a (128, 512) × (512, 512) product on this CPU in fp32 and bf16: the best of twenty."""
    return {name: _measure(COMPUTE_DTYPES[name]) for name in MEASURED}


def _measure(dtype: torch.dtype) -> float:
    left, right = torch.ones(128, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    seconds = float("inf")
    for attempt in range(21):  # the best of many: another process may take the cores for a while
        start = time.perf_counter()
        torch.mm(left, right)
        if attempt:  # the first prepares
            seconds = min(seconds, time.perf_counter() - start)
        if attempt >= 4 and seconds > 0.1:  # emulated
            break
    return 2 * 128 * 512 * 512 / seconds / 1e9
