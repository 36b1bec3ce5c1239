"""One that is NF4 already, as bitsandbytes writes it: a 7B in 3.9 GB and seconds on a GPU.

Both `qlora-tool` and transformers read it as any checkpoint that was quantized before. The weights are drawn and
quantized on a device, so that a GPU does it.

    tools/make nf4-model /tmp/nf4 --shape llama-2-7b --device cuda
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from measuring.results import mb

from making.random_model import SHAPES, STD, checkpoint_tensors, model_config
from qlora_tool.files.atomic import replacing_folder


def write_nf4_model(folder: Path, raw: dict[str, Any], device: str, seed: int = 0) -> int:
    """Write the folder; it appears when it is complete.

    Args:
        raw: the content of a config.json; the architecture's checkpoint names must be those of its modules (llama's
            are).
        device: where weights are drawn and quantized.

    Returns:
        Bytes of the weights.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import BitsAndBytesConfig

    from qlora_tool.model.load import build_skeleton
    from qlora_tool.model.slots import find_slots
    from qlora_tool.weights.quantized import quantize, to_disk

    config = model_config(raw)
    slots = find_slots(build_skeleton(config))
    generator = torch.Generator(device).manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, value in checkpoint_tensors(config, torch.bfloat16).items():
        if value.is_meta:
            value = torch.empty(value.shape, dtype=torch.bfloat16, device=device)
            value.normal_(0.0, STD, generator=generator)
        if name in slots:
            parts = to_disk(name, quantize(value, "nf4", True))
            tensors |= {part: tensor.cpu().contiguous() for part, tensor in parts.items()}
        else:
            tensors[name] = value.cpu()
    with replacing_folder(folder) as unfinished:
        config.save_pretrained(unfinished)
        file = unfinished / "config.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        content["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ).to_dict()  # fmt: skip
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, unfinished / "model.safetensors", {"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values())


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="OUT", help="the model folder to write")
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b", help="of the model (default: llama-2-7b)")
    parser.add_argument("--device", default="cpu", help="where weights are drawn and quantized (default: cpu)")
    parser.add_argument("--positions", type=int, default=131072, help="longest sequence (default: 131072)")


def run(options: argparse.Namespace) -> None:
    raw = SHAPES[options.shape] | {"max_position_embeddings": options.positions}
    print(f"{mb(write_nf4_model(options.folder, raw, options.device))} MB in {options.folder}")
