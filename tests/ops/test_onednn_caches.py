"""Memory does not grow with every new number of rows, in a process of its own: what is kept is kept for good."""

from __future__ import annotations

import subprocess
import sys

import pytest
from child_process import child_environment

from qlora_tool.ops.onednn_caches import CAPACITIES
from qlora_tool.ops.speeds import has_onednn

PRODUCTS = """
import os, sys, psutil, torch
torch.set_num_threads(1)
from qlora_tool.ops.products import matmul, use_products
use_products("oneDNN")
weights = [torch.ones(out, 256) for out in (192, 512, 768)]
process, seen = psutil.Process(), []
for rows in range(1, 301):
    for weight in weights:
        matmul(matmul(torch.ones(rows, 256), weight.T), weight)
    if rows in (30, 300):
        seen.append(process.memory_info().rss)
print(*seen)
"""


def run(code: str, **environment: object) -> list[str]:
    values = {name: value for name, value in child_environment(**environment).items()
              if name not in CAPACITIES or name in environment}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], env=values, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.slow  # a process that imports torch and compiles a few thousand products
@pytest.mark.skipif(not has_onednn(), reason="this PyTorch has no oneDNN")
def test_a_process_does_not_grow_with_new_numbers_of_rows():
    after_30, after_300 = map(int, run(PRODUCTS))
    assert after_300 <= 1.2 * after_30
    unbounded = map(int, run(PRODUCTS, **dict.fromkeys(CAPACITIES, 1024)))
    first, last = unbounded
    assert last > 1.2 * first  # else this test would show nothing


def test_a_number_in_the_environment_is_kept():
    code = f"import os, qlora_tool.ops; print(*(os.environ[name] for name in {CAPACITIES}))"
    assert run(code) == ["64", "64"]
    assert run(code, LRU_CACHE_CAPACITY=7) == ["64", "7"]
