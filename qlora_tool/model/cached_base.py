"""A quantized base cached on disk, so that the next run reads a quarter of the bytes and quantizes nothing.

One safetensors file under the cache folder, in bitsandbytes' form and with module names; its name is a digest of what
it was made from, so a base that changed is simply not found.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qlora_tool.files.atomic import replacing_folder
from qlora_tool.files.cache import cache_folder
from qlora_tool.files.reading import json_value
from qlora_tool.files.tensors import SINGLE_NAME, TensorSpec, read_all, write_all, write_tensors
from qlora_tool.model.kept_hashes import DamagedBase, KeptBase, hashed, write_hashes
from qlora_tool.model.parameter_source import tied_names
from qlora_tool.weights.handles import WeightHandle
from qlora_tool.weights.modules import FrozenLinear
from qlora_tool.weights.quantized import QuantizedTensor, of_known_size, to_disk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qlora_tool.model.slots import Quantization

logger = logging.getLogger(__name__)

FORMAT = 2  # of the cached files; raise it when the bytes change their meaning
PLAIN_FORMAT = 1  # of bases that are neither stored quantized nor part of a larger model: theirs have not changed
START_NAME = "adapter_start.bin"  # safetensors, by a name that no checkpoint's files have
_OTHERS = {"quantization_config", "text_config", "vision_config", "audio_config"}


def base_identity(folder: Path) -> str:
    """A digest of a model folder's files by name, size and times of change: cheap, and new when any of them changes."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json"))
    # The second time is the file system's own, which no copying sets back (see `files.hashes`).
    seen = [(path.name, (stat := path.resolve().stat()).st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path in files]
    return hashlib.sha256(json.dumps([str(folder.resolve()), seen]).encode()).hexdigest()


def kept_folder(folder: Path, quantization: Quantization, compute_dtype: torch.dtype, start: str = "") -> Path:
    """Where the cached base of a model folder lies, or would; see `cached_base`."""
    double = "-double" if quantization.double_quant and quantization.kind in ("nf4", "fp4") else ""
    embeddings = "-int8_embeddings" if quantization.embeddings == "int8" else ""
    dtype = str(compute_dtype).removeprefix("torch.")  # small unquantized tensors have it
    skipped = quantization.skip_modules
    named = json.dumps(skipped if isinstance(skipped, str) else sorted(skipped))
    skips = f"-without_{hashlib.sha256(named.encode()).hexdigest()[:12]}" if skipped else ""
    changed = f"-start_{hashlib.sha256(start.encode()).hexdigest()[:16]}" if start else ""
    kind = f"{quantization.kind}{double}{embeddings}{skips}{changed}"
    config = json_value((folder / "config.json").read_text(encoding="utf-8"))
    version = FORMAT if _OTHERS & config.keys() or skipped else PLAIN_FORMAT
    return cache_folder() / "bases" / f"{base_identity(folder)[:24]}-{kind}-{dtype}-{version}"


def cached_base(
    folder: Path, quantization: Quantization, compute_dtype: torch.dtype, start: str = ""
) -> KeptBase | None:
    """The cached base of a model folder for this quantization and dtype of matrix products, or None.

    Args:
        start: what the adapters' start that was made of its weights depends on besides; empty where none was.
    """
    path = kept_folder(folder, quantization, compute_dtype, start)
    if not os.path.lexists(path):
        return None
    try:
        return KeptBase(path)
    except DamagedBase as error:
        logger.warning(str(error).replace("the same command makes it anew", "it is made anew"))
        return None


def write_cached_base(
    model: PreTrainedModel, folder: Path, quantization: Quantization, compute_dtype: torch.dtype, start: str = "",
    made: Mapping[str, Tensor] | None = None,
) -> Path:  # fmt: skip
    """Write the quantized form of `model`, read from `folder`, and return where.

    Args:
        start: see `cached_base`.
        made: the tensors of the adapters' start, which `cached_start` gives again.
    """
    path = kept_folder(folder, quantization, compute_dtype, start)
    tensors = list(module_tensors(model))
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors]
    with replacing_folder(path) as temporary:
        hashes: dict[str, str] = {}
        write_tensors(temporary / SINGLE_NAME, specs, hashed(tensors, hashes), {"format": "pt"})
        write_hashes(temporary, hashes, write_start(temporary, made))
    return path


def write_start(folder: Path, made: Mapping[str, Tensor] | None) -> Sequence[str]:
    """Write the tensors of the adapters' start, where there are any, beside a base; gives the names of the files."""
    if made is None:
        return []
    write_all(folder / START_NAME, dict(made), {"format": "pt"})
    return [START_NAME]


def cached_start(cached: KeptBase) -> dict[str, Tensor]:
    """The tensors of the adapters' start that were made while a cached base was.

    Raises:
        DamagedBase: they are not as they were written.
    """
    cached.check_file(START_NAME)
    return read_all(cached.folder / START_NAME)


def module_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model by its module name, tied ones once; quantized ones in bitsandbytes' form."""
    modules = model.named_modules(remove_duplicate=False)  # tied embeddings share one handle, under two names
    handles = {name: module for name, module in modules if isinstance(module, WeightHandle)}
    tied = tied_names(model)
    for name, handle in handles.items():
        if name not in tied:
            yield from disk_tensors(name, handle, model.get_submodule(name.rpartition(".")[0]))
    persistent = model.state_dict(keep_vars=True)
    for name, tensor in persistent.items():
        in_handle = name in tied or name.rpartition(".")[0] in handles
        if not in_handle and isinstance(tensor, Tensor) and tensor.numel():
            yield name, tensor.detach()


def disk_tensors(name: str, handle: WeightHandle, owner: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What stands for a weight of `owner` in a file, a quantized one in bitsandbytes' form."""
    value = handle.stored()
    if isinstance(value, QuantizedTensor):
        yield from of_known_size(to_disk(name, value)).items()
    else:
        transposed = owner.transposed if isinstance(owner, FrozenLinear) else owner.is_transposed
        yield name, value.transpose(-1, -2).contiguous() if transposed else value
