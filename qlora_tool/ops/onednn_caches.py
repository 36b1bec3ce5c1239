"""How many products oneDNN keeps compiled.

It compiles a product for every new number of rows and keeps 1024 of them with what each works in: half a megabyte of an
fp32 product, several of a bf16 one of many rows. Where rows have many lengths the process grows by gigabytes. PyTorch's
own cache in front of it keeps as many again. A step takes some thirty or forty kinds of products, each for every layer:
so many have to stay, not those of all steps before.
"""

from __future__ import annotations

import os

KEPT = 64
CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's, and PyTorch's before it


def bound_caches() -> None:
    """Let both caches keep `KEPT` products, where the environment does not say how many.

    They read it at their first product: of a process that has taken one already nothing changes.
    """
    for name in CAPACITIES:
        os.environ.setdefault(name, str(KEPT))
