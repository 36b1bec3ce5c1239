"""A made-up checkpoint whose linear weights are NF4 already, as bitsandbytes writes them: a 7B in 3.9 GB and seconds.

Both `qlora-tool` and transformers read it as any checkpoint that was quantized before. The weights are drawn and
quantized on a device, so that a GPU does it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from scripts import load_script

from qlora_tool.files.atomic import replacing_folder


def write_made_up_nf4(folder: Path, raw: dict[str, Any], device: str, seed: int = 0) -> int:
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

    from qlora_tool.model.load import build_skeleton, find_slots
    from qlora_tool.weights.quantized import quantize, to_disk

    maker = load_script("make_random_model")
    config = maker.model_config(raw)
    slots = find_slots(build_skeleton(config))
    generator = torch.Generator(device).manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, value in maker.checkpoint_tensors(config, torch.bfloat16).items():
        if value.is_meta:
            value = torch.empty(value.shape, dtype=torch.bfloat16, device=device)
            value.normal_(0.0, maker.STD, generator=generator)
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


if __name__ == "__main__":  # FOLDER SHAPE DEVICE POSITIONS
    shape = load_script("make_random_model").SHAPES[sys.argv[2]]
    raw = shape | {"max_position_embeddings": int(sys.argv[4])}
    print(f"{write_made_up_nf4(Path(sys.argv[1]), raw, sys.argv[3]) / 1e6:,.1f} MB in {sys.argv[1]}")
