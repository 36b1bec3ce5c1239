"""Checkpoints: all that an exact resume needs, written whole or not at all."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qlora_tool.errors import UserError
from qlora_tool.files.atomic import replacing_folder, write_json
from qlora_tool.files.tensors import read_all, write_all
from qlora_tool.ops.speeds import ONEDNN, PYTORCH

if TYPE_CHECKING:
    from qlora_tool.adapters.attach import AdapterSet
    from qlora_tool.run_folder import RunFolder
    from qlora_tool.training.optimizers import Optimizer


@dataclass(frozen=True)
class Best:
    """The best evaluation so far.

    Attributes:
        step: after which it was made.
        metric: the name that the number has in `metrics.jsonl`; the lower, the better.
        value: the number.
        losses: all that was evaluated then, by such names.
    """

    step: int
    metric: str
    value: float
    losses: Mapping[str, float]


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: optimizer steps done.
        tokens: input tokens seen, padding not counted.
        unlogged_loss, unlogged_tokens: the loss summed over the trained tokens of the steps that no record holds yet,
            and their number.
        products: the library of its fp32 products on a CPU, on which their last digits depend; None on CUDA, and where
            an earlier version wrote the checkpoint.
        warmup_from_zero: whether the i-th of w steps of warmup has the rate (i - 1)/w, as in version 0.1.0, whose
            checkpoints do not say so; else i/w.
        untuned: losses before the first step: `loss` on training rows, and those of evaluations by their names in
            `metrics.jsonl`; None where an earlier version began the run.
        best: the best evaluation so far.
        evaluations_since_best: that were no better.
    """

    step: int = 0
    tokens: int = 0
    unlogged_loss: float = 0.0
    unlogged_tokens: int = 0
    products: str | None = None
    warmup_from_zero: bool = False
    untuned: dict[str, float] | None = None
    best: Best | None = None
    evaluations_since_best: int = 0

    @classmethod
    def read(cls, checkpoint: Path) -> Progress:
        """What a checkpoint says of its run.

        Raises:
            UserError: it is broken.
        """
        try:
            found = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
            progress = cls(**{"warmup_from_zero": True, **found})
            if progress.best is not None:
                progress.best = Best(**found["best"])
        except (OSError, ValueError, TypeError) as error:
            raise _broken(checkpoint, error) from error
        if progress.products not in (None, PYTORCH, ONEDNN):
            raise _broken(checkpoint, f"state.json: products by {progress.products!r}")
        return progress

    def step_done(self, tokens: int) -> None:
        """Count a step."""
        self.step += 1
        self.tokens += tokens

    def loss_known(self, trained_tokens: int, loss: float) -> None:
        """Add a step's loss, the mean over its trained tokens."""
        self.unlogged_loss += loss * trained_tokens
        self.unlogged_tokens += trained_tokens

    def take_loss(self) -> float:
        """The mean loss over all trained tokens since the last call."""
        loss = self.unlogged_loss / self.unlogged_tokens
        self.unlogged_loss, self.unlogged_tokens = 0.0, 0
        return loss


def save_checkpoint(
    folder: RunFolder,
    progress: Progress,
    adapters: AdapterSet,
    optimizer: Optimizer,
    limit: int | None,
    keep_best: bool = False,
) -> Path:
    """Write the checkpoint of `progress.step`, then remove the oldest ones beyond `limit`, but never the best one."""
    path = folder.checkpoint(progress.step)
    with replacing_folder(path) as temporary:
        write_all(temporary / "adapter.safetensors", adapters.tensors(), {"format": "pt"})
        # Given a path, torch.save tells a full disk by an error that does not say so.
        with (temporary / "optimizer.pt").open("wb") as stream:
            torch.save({"optimizer": optimizer.state_dict(), "random": _random_state()}, stream)
        write_json(temporary / "state.json", asdict(progress))
    best = None if progress.best is None or not keep_best else folder.checkpoint(progress.best.step)
    for old in folder.checkpoint_folders()[: -limit if limit else 0]:
        if old != best:
            shutil.rmtree(old)
    return path


def checkpoint_tensors(path: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint has of the adapters.

    Raises:
        UserError: it is broken.
    """
    try:
        return read_all(path / "adapter.safetensors")
    except (UserError, OSError, RuntimeError, ValueError) as error:
        raise _broken(path, error) from error


def load_checkpoint(path: Path, adapters: AdapterSet, optimizer: Optimizer) -> Progress:
    """Take up where a checkpoint stopped.

    Raises:
        UserError: it is broken, or of another model, adapter or optimizer.
    """
    progress = Progress.read(path)
    try:
        tensors = read_all(path / "adapter.safetensors")
        state = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
    except (UserError, OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError, TypeError) as error:
        raise _broken(path, error) from error
    adapters.load(tensors, str(path))
    try:
        optimizer.load_state_dict(state["optimizer"])
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: its optimizer does not fit this run: {error}; start anew with --overwrite") from error
    _set_random_state(state["random"])
    return progress


def _broken(checkpoint: Path, why: Exception | str) -> UserError:
    reason = " ".join(str(why).split()) or type(why).__name__
    return UserError(f"{checkpoint}: this checkpoint is broken ({reason[:200]}); give an earlier one with --resume")


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
