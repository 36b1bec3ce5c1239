"""Checkpoints: all that an exact resume needs, written whole or not at all."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qlora_tool.errors import UserError
from qlora_tool.files.atomic import replacing_folder, write_json
from qlora_tool.files.tensors import read_all, write_all
from qlora_tool.ops.speeds import ONEDNN, PYTORCH

if TYPE_CHECKING:
    from qlora_tool.adapters.attach import AdapterSet
    from qlora_tool.config import TrainingConfig
    from qlora_tool.run_folder import RunFolder
    from qlora_tool.training.optimizers import Optimizer
    from qlora_tool.world import World


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
        global_passes: micro-batches of a step, of all processes together; None where an earlier version wrote it.
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
    global_passes: int | None = None

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
    training: TrainingConfig,
    world: World,
) -> Path:
    """Write the checkpoint of `progress.step`, then remove the oldest ones beyond the limit, but never the best one
    where that is to be loaded. The first process writes, and all know when it has."""
    random = world.gather(_random_state())
    return world.on_main(lambda: _write(folder, progress, adapters, optimizer, training, random))


def _write(
    folder: RunFolder, progress: Progress, adapters: AdapterSet, optimizer: Optimizer, training: TrainingConfig,
    random: Sequence[dict[str, torch.Tensor]],
) -> Path:  # fmt: skip
    path = folder.checkpoint(progress.step)
    limit, keep_best = training.save_total_limit, training.load_best_model_at_end
    with replacing_folder(path) as temporary:
        write_all(temporary / "adapter.safetensors", adapters.tensors(), {"format": "pt"})
        # Given a path, torch.save tells a full disk by an error that does not say so.
        with (temporary / "optimizer.pt").open("wb") as stream:
            torch.save({"optimizer": optimizer.state_dict(), "random": random[0], "others": random[1:]}, stream)
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


@dataclass(frozen=True)
class Checkpoint:
    """One that a run goes on from.

    Attributes:
        path: of its folder, on the machine of the first process.
        progress: where it stopped.
        tensors: what it has of the adapters.
    """

    path: Path
    progress: Progress
    tensors: Mapping[str, torch.Tensor]

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """All but the optimizer's state.

        Raises:
            UserError: it is broken.
        """
        return cls(path, Progress.read(path), checkpoint_tensors(path))

    def load(self, adapters: AdapterSet, optimizer: Optimizer, world: World) -> Progress:
        """Take up where it stopped.

        Raises:
            UserError: it is broken, or of another model, adapter or optimizer.
        """
        state = world.on_main(lambda: _state(self.path))
        adapters.load(self.tensors, str(self.path))
        try:
            optimizer.load_state_dict(state["optimizer"])
        except (ValueError, KeyError) as error:
            raise UserError(
                f"{self.path}: its optimizer does not fit this run: {error}; start anew with --overwrite"
            ) from error
        random = [state["random"], *state.get("others", ())]
        if world.rank < len(random):  # else drawn anew: there were fewer processes
            _set_random_state(random[world.rank])
        return self.progress


def _state(path: Path) -> dict[str, Any]:
    """The optimizer's state and the random generators', on the CPU."""
    try:
        found: dict[str, Any] = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        return found
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError, TypeError) as error:
        raise _broken(path, error) from error


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
