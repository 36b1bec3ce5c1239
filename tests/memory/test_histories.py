"""What PyTorch's allocator did on a real card, event by event, through the model of it.

`histories/NAME.json.gz` are two training steps of a configuration of `tools/measure memory-cuda` on an NVIDIA H200
(torch 2.11, CUDA 13.0), recorded by `torch.cuda.memory._record_memory_history`. Addresses are differences from the
event before, in steps of 512 bytes.
"""

from __future__ import annotations

import gzip
import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from qlora_tool.memory.allocator.replay import compare_with_snapshot

FOLDER = Path(__file__).parent / "histories"
ACTIONS = ("alloc", "free_requested", "free_completed", "segment_alloc", "segment_free", "segment_map", "segment_unmap",
           "snapshot", "oom")  # fmt: skip
# As `torch.cuda.max_memory_reserved` had it, MiB.
RESERVED = {"tiny": 96, "smollm2-135m-int8": 442, "llama-7b-packed": 5204, "llama-7b-offloaded": 4676,
            "llama-7b-expandable": 5072}  # fmt: skip


def snapshot(name: str) -> dict[str, Any]:
    """In the form of `torch.cuda.memory._snapshot()`."""
    kept = json.loads(gzip.decompress((FOLDER / f"{name}.json.gz").read_bytes()))
    addresses = accumulate(step * 512 for _, step, *_ in kept["events"])
    events = [{"action": ACTIONS[action], "addr": address, "size": size, "stream": stream}
              for (action, _, size, stream), address in zip(kept["events"], addresses, strict=True)]  # fmt: skip
    return {"segments": kept["segments"], "device_traces": [events]}


@pytest.mark.parametrize("name", RESERVED)
def test_every_block_lies_where_the_card_had_it(name):
    found = compare_with_snapshot(snapshot(name))
    assert found.events > 5000 and not found.mismatches, found.first_mismatches
    assert found.predicted_reserved_peak == found.recorded_reserved_peak == RESERVED[name] * 2**20


def test_a_block_elsewhere_is_noticed():
    """The test above can fail."""
    altered = snapshot("tiny")
    place = next(i for i, event in enumerate(altered["device_traces"][0]) if event["action"] == "alloc")
    altered["device_traces"][0][place]["size"] += 4 * 2**20
    assert compare_with_snapshot(altered).mismatches
