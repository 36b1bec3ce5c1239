"""Tests that need a card. Where there is none, REHEARSE_ON_CPU=1 runs them on the CPU, to see that they can run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from rehearsal import REHEARSAL
from tiny_runs import write_model, write_rows


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The card."""
    return torch.device("cpu" if REHEARSAL else "cuda")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of a tiny model, wide enough for every kernel, and a file of rows."""
    folder = tmp_path_factory.mktemp("inputs")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
             "head_dim": 64}  # fmt: skip
    return write_model(folder / "model", **sizes), write_rows(folder / "rows.jsonl")


@pytest.fixture
def no_waiting(device: torch.device):
    """A context in which whatever waits for the device raises."""

    @contextmanager
    def watch() -> Iterator[None]:
        if REHEARSAL:
            yield
            return
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return watch
