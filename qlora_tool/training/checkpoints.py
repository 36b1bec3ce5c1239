"""Checkpoints: all that an exact resume needs, written whole or not at all."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qlora_tool.errors import UserError
from qlora_tool.files import replacing_folder, write_json
from qlora_tool.model.tensor_files import TensorSpec, read_all, write_tensors

if TYPE_CHECKING:
    from qlora_tool.adapters.attach import AdapterSet
    from qlora_tool.training.optimizers import Optimizer
    from qlora_tool.run_folder import RunFolder


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: optimizer steps done.
        tokens: input tokens seen, padding not counted.
    """

    step: int = 0
    tokens: int = 0


def save_checkpoint(
    folder: RunFolder, progress: Progress, adapters: AdapterSet, optimizer: Optimizer, limit: int | None
) -> Path:
    """Write the checkpoint of `progress.step`, then remove the oldest ones beyond `limit`."""
    path = folder.checkpoint(progress.step)
    tensors = {name: tensor.detach() for name, tensor in adapters.tensors().items()}
    with replacing_folder(path) as temporary:
        specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
        write_tensors(temporary / "adapter.safetensors", specs, tensors.items(), {"format": "pt"})
        torch.save({"optimizer": optimizer.state_dict(), "random": _random_state()}, temporary / "optimizer.pt")
        write_json(temporary / "state.json", asdict(progress))
    for old in folder.checkpoint_folders()[: -limit if limit else 0]:
        shutil.rmtree(old)
    return path


def load_checkpoint(path: Path, adapters: AdapterSet, optimizer: Optimizer) -> Progress:
    """Take up where a checkpoint stopped.

    Raises:
        UserError: it is of another model, adapter or optimizer.
    """
    adapters.load(read_all(path / "adapter.safetensors"), str(path))
    state = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
    try:
        optimizer.load_state_dict(state["optimizer"])
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: its optimizer does not fit this run: {error}; start anew with --resume never") from error
    _set_random_state(state["random"])
    return Progress(**json.loads((path / "state.json").read_text(encoding="utf-8")))


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
