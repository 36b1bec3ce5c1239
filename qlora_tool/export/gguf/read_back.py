"""A GGUF file read back: its tensors decoded by the gguf package, under the checkpoint's names and in its layout."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
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
from qlora_tool.model.names import SaveGroup
from qlora_tool.sizes import memory_size

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
    decoded = decoder(file)
    write_as_model(merged, lambda group: decoded, folder)


def write_as_model(
    merged: MergedModel, of_group: Callable[[SaveGroup], Callable[[str], Tensor]], folder: Path
) -> None:
    """Write tensors in llama.cpp's layout as a model folder in fp32.

    Args:
        merged: of it names, shapes and configuration are taken, no values.
        of_group: for a group of `merged`, the tensors by llama.cpp's names.
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
            f"to read the file back takes {memory_size(needed)} beside it for a while, and {memory_size(free)} are free"
        )
    write_at_once(specs, _tensors(merged, of_group, groups), folder, _SHARD)
    write_config(merged, folder)


def decoder(file: Path) -> Callable[[str], Tensor]:
    """The tensors of a GGUF file by llama.cpp's names, in fp32, decoded by the gguf package as they are asked for."""
    import gguf

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}

    @lru_cache(maxsize=1)  # experts of one layer are one tensor of the file
    def decoded(name: str) -> Tensor:
        name = "token_embd.weight" if name == "output.weight" and name not in stored else name  # tied
        values = gguf.dequantize(stored[name].data, stored[name].tensor_type)
        return torch.from_numpy(np.require(values, np.float32, ["C", "W"]))  # a copy of what the file has in fp32

    return decoded


def _tensors(
    merged: MergedModel, of_group: Callable[[SaveGroup], Callable[[str], Tensor]], groups: list[list[TensorSpec]]
) -> Iterator[tuple[str, Tensor]]:
    config = merged.skeleton.config
    names = TensorNames(find_family(config), config, merged.skeleton.base_model_prefix)
    for group, specs in zip(merged.groups, groups, strict=True):
        stored = of_group(group)
        for spec in specs:
            yield spec.name, names.restored(spec.name, stored).reshape(spec.shape).contiguous()
