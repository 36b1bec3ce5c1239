"""The tiny run that several tests of training change in one thing or another."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import run_config, write_model, write_rows

from qlora_tool.config import Config
from qlora_tool.training import loop


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of a model and a file of rows."""
    folder = tmp_path_factory.mktemp("inputs")
    return write_model(folder / "model"), write_rows(folder / "rows.jsonl")


@pytest.fixture
def config(inputs: tuple[Path, Path], tmp_path: Path) -> Callable[..., Config]:
    """The tiny run into `run`; `values` by dotted key, with `__` for the dot."""
    return lambda name="run", **values: run_config(
        *inputs, tmp_path / name, {key.replace("__", "."): value for key, value in values.items()}
    )


@pytest.fixture
def stop_in_step(monkeypatch: pytest.MonkeyPatch):
    """Let a signal arrive while step `number` of the next run is computed."""

    def stop_in(number: int) -> None:
        def step(*arguments, train_step=loop.train_step):
            nonlocal number
            number -= 1
            if number == 0:
                monkeypatch.setattr(loop, "train_step", train_step)
                signal.raise_signal(signal.SIGINT)
            return train_step(*arguments)

        monkeypatch.setattr(loop, "train_step", step)

    return stop_in
