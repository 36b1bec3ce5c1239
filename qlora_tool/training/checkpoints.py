"""Checkpoints: all that an exact resume needs, written whole or not at all."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qlora_tool.errors import UserError
from qlora_tool.files.atomic import replacing_folder, write_json
from qlora_tool.files.reading import json_value, why_no_file
from qlora_tool.files.sealed import first_change, listing, read_sealed, write_sealed
from qlora_tool.files.tensors import read_all, write_all
from qlora_tool.ops.speeds import ONEDNN, PYTORCH
from qlora_tool.run_folder import MANIFEST, STATE, remove_own
from qlora_tool.training.optimizer_files import read_optimizer, write_optimizer
from qlora_tool.training.progress import folder_gone

if TYPE_CHECKING:
    from qlora_tool.adapters.attach import AdapterSet
    from qlora_tool.config import TrainingConfig
    from qlora_tool.run_folder import RunFolder
    from qlora_tool.training.optimizers import Optimizer
    from qlora_tool.world import World

FORMAT = 1  # of a checkpoint's files; raise it when they change their meaning
ADAPTER, OPTIMIZER = "adapter.safetensors", "optimizer.safetensors"
EARLIER = "optimizer.pt"  # of version 0.1, which had no manifest


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
        if reason := why_no_file(checkpoint / STATE):
            raise broken(checkpoint, reason)
        try:
            found = json_value((checkpoint / STATE).read_text(encoding="utf-8"))
            found.pop("optimizer", None)
            if (checkpoint / MANIFEST).exists() and (missing := {one.name for one in fields(cls)} - found.keys()):
                raise ValueError(f"{STATE}: no {', '.join(sorted(missing))}")
            progress = cls(**{"warmup_from_zero": True, **found})
            if progress.best is not None:
                progress.best = Best(**found["best"])
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            raise broken(checkpoint, error) from error
        if fault := progress.fault():
            raise broken(checkpoint, f"{STATE}: {fault}")
        return progress

    def fault(self) -> str | None:
        """The first value that no run can have, in words; None where there is none."""
        counts = {"step": self.step, "tokens": self.tokens, "unlogged_tokens": self.unlogged_tokens,
                  "evaluations_since_best": self.evaluations_since_best}  # fmt: skip
        if self.global_passes is not None:
            counts["global_passes"] = self.global_passes - 1 if _is_count(self.global_passes) else self.global_passes
        if self.best is not None:
            counts["best.step"] = self.best.step
        for name, value in counts.items():
            if not _is_count(value) or value < 0:
                return f"{name} is {getattr(self, name, value)!r}; expected a count"
        if not _is_number(self.unlogged_loss) or not math.isfinite(self.unlogged_loss):
            return f"unlogged_loss is {self.unlogged_loss!r}; expected a number"
        if self.products not in (None, PYTORCH, ONEDNN):
            return f"products by {self.products!r}"
        if not isinstance(self.warmup_from_zero, bool):
            return f"warmup_from_zero is {self.warmup_from_zero!r}"
        losses = {"untuned": self.untuned or {}}
        if self.best is not None:
            losses["best.losses"] = {**self.best.losses, "value": self.best.value}
            if not isinstance(self.best.metric, str) or self.best.step > self.step:
                return f"best is of {self.best.metric!r} after step {self.best.step}"
        for name, values in losses.items():
            if not isinstance(values, dict) or not all(map(_is_number, values.values())):
                return f"{name} is {values!r}; expected losses by their names"
        return None

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


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def save_checkpoint(
    folder: RunFolder,
    progress: Progress,
    adapters: AdapterSet,
    optimizer: Optimizer,
    training: TrainingConfig,
    world: World,
    facts: Callable[[], Mapping[str, Any]] = dict,
) -> Path:
    """Write the checkpoint of `progress.step`, then remove the oldest ones beyond the limit, but never the best one
    where that is to be loaded. The first process writes, and all know when it has.

    Args:
        facts: what the manifest says besides: who made it, and what it belongs to. Asked for by the first process.
    """
    random = world.gather(_random_state())
    return world.on_main(lambda: _write(folder, progress, adapters, optimizer, training, random, facts()))


def _write(
    folder: RunFolder, progress: Progress, adapters: AdapterSet, optimizer: Optimizer, training: TrainingConfig,
    random: Sequence[dict[str, torch.Tensor]], facts: Mapping[str, Any],
) -> Path:  # fmt: skip
    if not folder.holds_run():  # another folder may be in its place
        raise folder_gone(folder.path)
    path = folder.checkpoint(progress.step)
    limit, keep_best = training.save_total_limit, training.load_best_model_at_end
    with replacing_folder(path) as temporary:
        write_all(temporary / ADAPTER, adapters.tensors(), {"format": "pt"})
        numbers = write_optimizer(temporary / OPTIMIZER, optimizer.state_dict(), random)
        write_json(temporary / STATE, asdict(progress) | {"optimizer": numbers})
        write_sealed(temporary / MANIFEST, {"format": FORMAT, "step": progress.step, **facts,
                                            "files": listing(temporary)})  # fmt: skip
    best = None if progress.best is None or not keep_best else folder.checkpoint(progress.best.step)
    for old in folder.checkpoint_folders()[: -limit if limit else 0]:
        if old != best:
            remove_own(old)
    return path


@dataclass(frozen=True)
class Checkpoint:
    """One that a run goes on from.

    Attributes:
        path: of its folder, on the machine of the first process.
        progress: where it stopped.
        tensors: what it has of the adapters.
        manifest: what it belongs to, and who made it; empty where an earlier version wrote it.
    """

    path: Path
    progress: Progress
    tensors: Mapping[str, torch.Tensor]
    manifest: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """All but the optimizer's state, whose file is held against its hash like all others.

        Raises:
            UserError: it is broken.
        """
        manifest = read_manifest(path)
        progress = Progress.read(path)
        if manifest and manifest["step"] != progress.step:
            raise broken(path, f"{MANIFEST} is of step {manifest['step']!r}, and {STATE} of step {progress.step}")
        if not manifest:
            read_pickled(path)
        elif path.name.startswith("step-") and path.name != f"step-{progress.step:06d}":
            raise broken(path, f"it is of step {progress.step}")
        return cls(path, progress, checkpoint_tensors(path), manifest)

    def load(self, adapters: AdapterSet, optimizer: Optimizer, world: World) -> Progress:
        """Take up where it stopped.

        Raises:
            UserError: it is broken, or of another model, adapter or optimizer.
        """
        state = world.on_main(lambda: _state(self.path, bool(self.manifest)))
        adapters.load(self.tensors, str(self.path))
        try:
            optimizer.load_state_dict(state["optimizer"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.path}: its optimizer does not fit this run: {error}; start anew with --overwrite"
            ) from error
        random = [state["random"], *state.get("others", ())]
        if world.rank < len(random):  # else drawn anew: there were fewer processes
            _set_random_state(random[world.rank], self.path)
        return self.progress


def read_manifest(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, every file of it held against its hash; empty where version 0.1 wrote it.

    Raises:
        UserError: it is broken.
    """
    if not (path / MANIFEST).exists() and (path / EARLIER).exists():
        return {}
    try:
        manifest = read_sealed(path / MANIFEST)
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            raise ValueError(f"{MANIFEST} has format {manifest['format']!r}, and this version reads {FORMAT}")
        if missing := {ADAPTER, OPTIMIZER, STATE} - files.keys():
            raise ValueError(f"{MANIFEST} lists no {', '.join(sorted(missing))}")
        changed = first_change(path, files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise broken(path, error) from error
    if changed:
        raise broken(path, changed)
    return manifest


def checkpoint_tensors(path: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint has of the adapters.

    Raises:
        UserError: it is broken.
    """
    if reason := why_no_file(path / ADAPTER):
        raise broken(path, reason)
    try:
        tensors = read_all(path / ADAPTER)
    except (UserError, OSError, RuntimeError, ValueError) as error:
        raise broken(path, error) from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise broken(path, f"{ADAPTER}: {name} has values that are not finite")
    return tensors


def _state(path: Path, has_manifest: bool) -> dict[str, Any]:
    """The optimizer's state and the random generators', on the CPU."""
    if not has_manifest:
        return read_pickled(path)
    try:
        numbers = json_value((path / STATE).read_text(encoding="utf-8"))["optimizer"]
        return read_optimizer(path / OPTIMIZER, numbers)
    except (UserError, OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise broken(path, error) from error


def read_pickled(path: Path) -> dict[str, Any]:
    """The same of version 0.1, which pickled it; nothing but tensors and numbers is unpickled.

    Raises:
        UserError: it is broken.
    """
    if reason := why_no_file(path / EARLIER):
        raise broken(path, reason)
    try:
        found: dict[str, Any] = torch.load(path / EARLIER, map_location="cpu", weights_only=True)
        return found
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError, TypeError) as error:
        raise broken(path, error) from error


def broken(checkpoint: Path, why: Exception | str) -> UserError:
    """The line of a checkpoint that cannot be gone on from."""
    reason = " ".join(str(why).split()) or type(why).__name__
    return UserError(f"{checkpoint}: this checkpoint is broken ({reason[:200]}); give an earlier one with --resume")


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor], path: Path) -> None:
    try:
        torch.set_rng_state(state["cpu"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
    except (RuntimeError, KeyError, TypeError) as error:
        raise broken(path, f"state of the random numbers: {error}") from error
