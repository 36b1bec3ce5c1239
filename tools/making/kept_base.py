"""A model folder without weights, and its quantized base in the cache: a 70B in 36 GB and minutes.

What `model.weights: disk` or `model.keep_quantized` reads in the place of the folder's weights, in NF4 with double
quantization, is made here without weights that were ever in 16 bits: random codes, and scales that give the weights a
standard deviation of 0.02. Embeddings and norms are those of `random-model`. Memory holds one weight at a time. Each is
drawn with the seed and its own name: the same options write the same bytes. A card draws a 70B's codes in seconds.

    QLORA_TOOL_CACHE=/tmp/cache tools/make kept-base /tmp/llama70b --shape llama-2-70b
    QLORA_TOOL_CACHE=/tmp/cache tools/measure training-memory /tmp/llama70b --weights disk

The base is found by a run with the same cache folder, the same quantization and the same compute dtype.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measuring.command import at_least
from measuring.results import show_table

from making.random_model import SHAPES, STD, draw, generator_of, model_config, read_config
from qlora_tool.config import Config
from qlora_tool.errors import MachineError, UserError
from qlora_tool.files.atomic import replacing_folder

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from qlora_tool.model.slots import Slot
    from qlora_tool.weights.quantized import QuantizedTensor

LARGEST = 2.4  # of 64 normal numbers, in standard deviations, on average: what a block's scale stands for
SPREAD = 0.2  # of scales around their mean, relative to it, at most
CHUNK = 16 << 20  # bytes of codes drawn at a time


class MadeUp:
    """The tensors of a skeleton: weights that are quantized as random codes, others as `random-model` draws them.

    Args:
        model: a skeleton.
        slots: of the weights that may be quantized.
        seed: what all is drawn with.
        device: that draws the codes.
    """

    has_values = True

    def __init__(self, model: PreTrainedModel, slots: dict[str, Slot], seed: int, device: torch.device):
        import torch

        tied = set(model.all_tied_weights_keys or {})
        self._tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.names, self._slots, self._seed, self._device = list(self.shapes), slots, seed, device
        self._dtype = torch.bfloat16  # of files; the skeleton has the products'
        self._bytes, self._nested_scale, self._offset = _balanced()

    def stored_dtype(self, name: str) -> torch.dtype:
        """What `read` gives a tensor in that is not quantized."""
        tensor = self._tensors[name]
        return self._dtype if tensor.is_meta else tensor.dtype

    def read(self, name: str) -> Tensor | QuantizedTensor:
        """One of them."""
        import torch

        from qlora_tool.files.tensors import TensorSpec

        tensor, slot = self._tensors[name], self._slots.get(name)
        if slot is not None and slot.kind is None:
            return self._quantized(name, slot)
        if not tensor.is_meta:  # a computed buffer
            return tensor
        if tensor.dim() > 1:
            return draw(TensorSpec(name, self._dtype, tuple(tensor.shape)), self._seed)
        return torch.full(tensor.shape, 0.0 if "bias" in name.rpartition(".")[2] else 1.0, dtype=self._dtype)

    def _quantized(self, name: str, slot: Slot) -> QuantizedTensor:
        import torch

        from qlora_tool.weights.quantized import quantize

        shape = self.shapes[name]
        shape = (*shape[:-2], *shape[-2:][::-1]) if slot.transposed else shape
        form = quantize(torch.empty(shape, dtype=self._dtype, device="meta"), "nf4", True)
        generator = generator_of(name, self._seed)
        if self._device.type != "cpu":
            generator = torch.Generator(self._device).manual_seed(generator.initial_seed())
        codes = _random_bytes(form.codes.numel(), generator, self._bytes)
        scales = _random_bytes(form.scales.numel(), generator)
        made = {
            form.codes: codes, form.scales: scales,
            form.nested_scales: torch.full(form.nested_scales.shape, self._nested_scale),
            form.nested_offset: torch.full(form.nested_offset.shape, self._offset),
        }  # fmt: skip
        return form.map(lambda field: made[field].view(field.shape))


def _balanced() -> tuple[bytes, float, float]:
    """What gives weights of mean 0 and standard deviation 0.02.

    Returns:
        Two codes for each value of a random byte, those that 16 equally likely numbers of a normal distribution get;
        the scale of scales; and their mean.
    """
    import torch

    from qlora_tool.ops.quantization import code_values

    values, nested = code_values("nf4", torch.device("cpu")).double(), code_values("nested", torch.device("cpu"))
    normal = torch.special.ndtri((torch.arange(16, dtype=torch.float64) + 0.5) / 16) / LARGEST
    codes = (normal.unsqueeze(1) - values).abs().argmin(1)
    pairs = bytes(int(high) << 4 | int(low) for high in codes for low in codes)
    spread = (1 + SPREAD * nested.double()).square().mean().sqrt()  # of scales, whose 256 codes are equally likely
    offset = STD / float(values[codes].std(correction=0) * spread)
    return pairs, SPREAD * offset, offset


def _random_bytes(count: int, generator: torch.Generator, pairs: bytes | None = None) -> Tensor:
    """uint8 (count,), each value as likely as any other, or what `pairs` has in its place."""
    import torch

    result = torch.empty(count, dtype=torch.uint8)
    drawn = torch.empty(CHUNK // 8, dtype=torch.int64, device=generator.device)
    for chunk in result.split(CHUNK):
        # Eight at a time: five times as fast as one by one.
        found = drawn[: -(-len(chunk) // 8)].random_(-(2**63), None, generator=generator).view(torch.uint8)
        if pairs is not None and found.is_cuda:
            found = torch.tensor(list(pairs), dtype=torch.uint8, device=found.device)[found.int()]
        elif pairs is not None:
            found = torch.frombuffer(bytearray(found.numpy().tobytes().translate(pairs)), dtype=torch.uint8)
        chunk.copy_(found[: len(chunk)])
    return result


def write_kept_base(
    folder: Path, config: Any, compute_dtype: torch.dtype, seed: int, device: str = "cpu"
) -> dict[str, Any]:
    """Write a model folder without weights, and its base into the cache; each appears when it is complete.

    Returns:
        Where the base lies, its bytes, and how many parameters it has.

    Raises:
        MachineError: there is too little room.
    """
    import torch

    from qlora_tool.files.cache import cache_folder
    from qlora_tool.files.tensors import SINGLE_NAME
    from qlora_tool.model.cached_base import kept_folder
    from qlora_tool.model.load import Loading, build_skeleton
    from qlora_tool.model.slots import Quantization, find_slots
    from qlora_tool.model.source import read_model_config
    from qlora_tool.model.streamed_base import stored_bytes, write_layer_by_layer

    config.dtype = torch.bfloat16
    config.architectures = [type(build_skeleton(config)).__name__]
    with replacing_folder(folder) as unfinished:
        config.save_pretrained(unfinished)
    quantization = Quantization("nf4", True)
    loading = Loading.begin(
        folder, read_model_config(folder), quantization, torch.device("cpu"), compute_dtype,
        open_source=lambda model, _: MadeUp(model, find_slots(model, quantization), seed, torch.device(device)),
    )  # fmt: skip
    kept = kept_folder(folder, quantization, compute_dtype)
    cache_folder().mkdir(parents=True, exist_ok=True)
    needed, free = stored_bytes(loading), shutil.disk_usage(cache_folder()).free
    if needed > free:
        raise MachineError(f"{cache_folder()}: {free / 1e9:.1f} GB are free there, and the base takes "
                           f"{needed / 1e9:.1f} GB; free some, or set QLORA_TOOL_CACHE to another disk's folder")
    with replacing_folder(kept) as unfinished:
        write_layer_by_layer(loading, unfinished / SINGLE_NAME)
    parameters = sum(torch.Size(shape).numel() for shape in loading.source.shapes.values())
    return {"kept": str(kept), "bytes": (kept / SINGLE_NAME).stat().st_size, "parameters": parameters}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="OUT", help="the model folder to write")
    shape = parser.add_mutually_exclusive_group(required=True)
    shape.add_argument("--shape", choices=SHAPES, help="one of the shapes that are known here")
    shape.add_argument("--config", type=Path, metavar="FILE", help="the config.json of any causal language model")
    parser.add_argument("--layers", type=at_least(1), metavar="N", help="another number of layers")
    parser.add_argument("--compute-dtype", default="auto", metavar="DTYPE",
                        help="what products of the run that reads it run in (default: auto)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="what the weights are drawn with (default: 0)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu",
                        help="what draws the codes, each of them others (default: cpu)")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace OUT where it exists")


def run(options: argparse.Namespace) -> dict[str, Any]:
    from measuring.ours import device_and_dtype, require_device

    if options.folder.exists() and not options.overwrite:
        raise UserError(f"{options.folder}: exists already; name another folder, or give --overwrite to replace it")
    require_device(options.device)
    raw = SHAPES[options.shape] if options.shape else read_config(options.config)
    config = model_config(raw, options.layers, options.shape or str(options.config))
    asked = Config.model_validate({"model": {"device": "cpu", "compute_dtype": options.compute_dtype}})
    dtype = device_and_dtype(asked)[1]
    start = time.perf_counter()
    figures = write_kept_base(options.folder, config, dtype, options.seed, options.device)
    return {"folder": str(options.folder), **figures, "compute_dtype": str(dtype).removeprefix("torch."),
            "seconds": round(time.perf_counter() - start, 1)}  # fmt: skip


def show(results: dict[str, Any]) -> None:
    folder, *figures = results.items()
    show_table([(folder[1], ""), *figures])
