"""A GGUF file read back: its tensors decoded by the gguf package, under the checkpoint's names and in its layout."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qlora_tool.errors import MachineError
from qlora_tool.export.beside import write_config
from qlora_tool.export.gguf.families import TensorNames, find_family
from qlora_tool.export.merge import MergedModel
from qlora_tool.export.shards import write_at_once
from qlora_tool.files.tensors import TensorSpec

_SHARD = 5 * 10**9


def read_back(merged: MergedModel, file: Path, folder: Path) -> None:
    """Write what a GGUF file holds as a model folder in fp32, which plain transformers loads.

    Args:
        merged: the model that the file was written from: of it names, shapes and configuration are taken, no values.
        file: the GGUF file.
        folder: an empty one.

    Raises:
        MachineError: there is no space for it.
    """
    merged = dataclasses.replace(merged, dtype=torch.float32, keeps_wider=False, refuse_coarse=False)
    groups = [[dataclasses.replace(spec, dtype=torch.float32) for spec in group] for group in merged.specs()]
    specs = [spec for group in groups for spec in group]
    needed, free = sum(spec.nbytes for spec in specs), shutil.disk_usage(folder).free
    if needed > free:
        raise MachineError(
            f"to read the file back takes {needed / 1e9:.2f} GB beside it for a while, and {free / 1e9:.2f} GB are free"
        )
    write_at_once(specs, _tensors(merged, file, groups), folder, _SHARD)
    write_config(merged, folder)


def _tensors(merged: MergedModel, file: Path, groups: list[list[TensorSpec]]) -> Iterator[tuple[str, Tensor]]:
    import gguf

    config = merged.skeleton.config
    names = TensorNames(find_family(config), config, merged.skeleton.base_model_prefix)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}

    @lru_cache(maxsize=1)  # experts of one layer are one tensor of the file
    def decoded(name: str) -> Tensor:
        name = "token_embd.weight" if name == "output.weight" and name not in stored else name  # tied
        values = gguf.dequantize(stored[name].data, stored[name].tensor_type)
        return torch.from_numpy(np.require(values, np.float32, ["C", "W"]))  # a copy of what the file has in fp32

    for group in groups:
        for spec in group:
            yield spec.name, names.restored(spec.name, decoded).reshape(spec.shape).contiguous()
