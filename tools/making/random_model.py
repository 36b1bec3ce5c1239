"""A checkpoint of any causal language model, with random weights, whatever its size.

The names and shapes are those of a real checkpoint of the architecture, sharded, with an index and a config.json, so it
loads wherever a real one does. The weights are random: normal(0, 0.02), norms one, biases zero. Memory holds one tensor
at a time. Each is drawn with the seed and its own name: the same options write the same bytes.

    tools/make random-model /tmp/llama7b --shape llama-2-7b
    tools/make random-model /tmp/wide --shape mixtral-8x7b --layers 2 --max-shard-size 5GB
    tools/make random-model /tmp/qwen --config Qwen2.5-7B/config.json --dtype float16
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measuring.command import add_outputs, at_least
from measuring.results import mb, say, show_table

from qlora_tool.config import parse_size
from qlora_tool.errors import UserError
from qlora_tool.files.atomic import replacing_folder

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qlora_tool.files.tensors import TensorSpec

STD = 0.02  # of most models' first weights
CHUNK = 1 << 20  # values drawn at a time: the fp32 ones stay in the cache
DTYPES = ("bfloat16", "float16", "float32")


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


# The public configurations' own figures; what is not named is the architecture's default.
_LLAMA = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": _LLAMA
    | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-2-13b": _LLAMA
    | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "llama-2-70b": _LLAMA
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
       "num_key_value_heads": 8},
    "llama-3-8b": _LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
       "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "bos_token_id": 128000,
       "eos_token_id": 128001, "rope_parameters": _rope(500000.0)},
    "mistral-7b": {"model_type": "mistral", "vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336,
                   "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": None,
                   "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_parameters": _rope(1000000.0)},
    "mixtral-8x7b": {"model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
                     "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                     "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 32768,
                     "rms_norm_eps": 1e-5, "rope_parameters": _rope(1000000.0)},
    "smollm2-135m": _LLAMA
    | {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
       "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True,
       "rope_parameters": _rope(100000.0)},
    "tiny-llama": _LLAMA
    | {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
       "num_key_value_heads": 2, "max_position_embeddings": 512},
    "tiny-mixtral": {"model_type": "mixtral", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128,
                     "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4,
                     "num_experts_per_tok": 2, "max_position_embeddings": 512},
}  # fmt: skip


def model_config(raw: dict[str, Any], layers: int | None = None, where: str = "configuration"):
    """A transformers configuration from the content of a config.json, with another number of layers if asked for.

    What the configuration lists layer by layer (`layer_types`, say) is cut, or repeated, to fit.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    raw = dict(raw)
    kind = raw.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        raise UserError(f"{where}: model_type {kind!r} is not one that transformers knows; give a model's config.json")
    if layers is not None:
        key = CONFIG_MAPPING[kind].attribute_map.get("num_hidden_layers", "num_hidden_layers")
        if key not in raw:
            raise UserError(f"{where}: no {key} in it, so --layers has nothing to change")
        before = raw[key]
        for name, value in raw.items():
            if isinstance(value, list) and len(value) == before:
                raw[name] = [value[layer % before] for layer in range(layers)]
        raw[key] = layers
    return AutoConfig.for_model(kind, **raw)


def checkpoint_tensors(config, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of the architecture's checkpoint by name, in order: those that are drawn on meta, the others as they
    will be written.

    Tensors are named and cut as in files on the hub (transformers' own conversion, backwards): every expert has
    matrices of its own where the architecture's files do it that way. Tied ones are left out.
    """
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    from qlora_tool.model.load import build_skeleton, tied_names

    skeleton = build_skeleton(config)
    tied = tied_names(skeleton)
    tensors = {}
    for name, tensor in skeleton.state_dict().items():
        if name in tied:
            continue
        stored = dtype if tensor.is_floating_point() else tensor.dtype
        if tensor.dim() > 1 or not tensor.is_meta:  # drawn later, or a computed buffer
            tensors[name] = tensor.to(stored)
        else:
            tensors[name] = torch.full(tensor.shape, 0.0 if "bias" in name.rpartition(".")[2] else 1.0, dtype=stored)
    config.architectures, config.dtype = [type(skeleton).__name__], dtype
    return revert_weight_conversion(skeleton, tensors)


def generator_of(name: str, seed: int) -> torch.Generator:
    """What a tensor is drawn with."""
    import torch

    digest = hashlib.sha256(f"{seed}, {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def draw(spec: TensorSpec, seed: int) -> Tensor:
    """A tensor of normal(0, 0.02), from a generator of its own."""
    import torch

    generator = generator_of(spec.name, seed)
    tensor, values = torch.empty(spec.shape, dtype=spec.dtype), torch.empty(CHUNK)
    for chunk in tensor.view(-1).split(CHUNK):
        chunk.copy_(values[: chunk.numel()].normal_(0.0, STD, generator=generator))
    return tensor


def _stream(shard: Iterable[TensorSpec], tensors: dict[str, Tensor], seed: int) -> Iterator[tuple[str, Tensor]]:
    for spec in shard:
        tensor = tensors[spec.name]
        yield spec.name, draw(spec, seed) if tensor.is_meta else tensor


def write_random_model(folder: Path, config, dtype: torch.dtype, max_shard_size: int, seed: int) -> dict[str, int]:
    """Write the folder; it appears when it is complete.

    Returns:
        How many parameters, tensors, bytes and shards it has.
    """
    from qlora_tool.files.tensors import INDEX_NAME, TensorSpec, shard_name, shards, write_tensors

    tensors = checkpoint_tensors(config, dtype)
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    parts = shards(specs, max_shard_size)
    size = sum(spec.nbytes for spec in specs)
    with replacing_folder(folder) as unfinished:
        config.save_pretrained(unfinished)
        places = {}
        for index, part in enumerate(parts):
            name = shard_name(index, len(parts))
            say(f"{name}: {len(part)} tensors, {mb(sum(spec.nbytes for spec in part))} MB")
            write_tensors(unfinished / name, part, _stream(part, tensors, seed), {"format": "pt"})
            places |= {spec.name: name for spec in part}
        if len(parts) > 1:
            index_text = json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=2) + "\n"
            (unfinished / INDEX_NAME).write_text(index_text, encoding="utf-8")
    return {
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "tensors": len(specs),
        "bytes": size,
        "shards": len(parts),
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="OUT", help="the model folder to write")
    shape = parser.add_mutually_exclusive_group(required=True)
    shape.add_argument("--shape", choices=SHAPES, help="one of the shapes that are known here")
    shape.add_argument("--config", type=Path, metavar="FILE", help="the config.json of any causal language model")
    parser.add_argument("--layers", type=at_least(1), metavar="N", help="another number of layers")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of all weights (default: bfloat16)")
    parser.add_argument("--max-shard-size", default="2GB", metavar="SIZE", help="bytes in a file (default: 2GB)")
    parser.add_argument("--seed", type=int, default=0, help="what the weights are drawn with (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT where it exists")
    add_outputs(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    if options.folder.exists() and not options.overwrite:
        raise UserError(f"{options.folder}: exists already; name another folder, or give --overwrite to replace it")
    try:
        max_shard_size = parse_size(options.max_shard_size)
    except UserError as error:
        raise UserError(f"--max-shard-size: {error}") from error

    import torch

    raw = SHAPES[options.shape] if options.shape else read_config(options.config)
    config = model_config(raw, options.layers, options.shape or str(options.config))
    start = time.perf_counter()
    figures = write_random_model(options.folder, config, getattr(torch, options.dtype), max_shard_size, options.seed)
    return {"folder": str(options.folder), **figures, "seconds": round(time.perf_counter() - start, 1)}


def show(results: dict[str, Any]) -> None:
    folder, *figures = results.items()
    show_table([(folder[1], ""), *figures])


def read_config(file: Path) -> dict[str, Any]:
    """The content of a config.json."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a readable config.json ({error}); give a model's config.json") from error
    if not isinstance(raw, dict):
        raise UserError(f"{file}: expected a JSON object, the config.json of a model")
    return raw
