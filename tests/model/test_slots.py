"""Where weights may be quantized, and what they take there."""

from __future__ import annotations

import pytest
import torch
from tiny_models import write_tiny

from qlora_tool.model.load import build_skeleton, load_base
from qlora_tool.model.slots import Quantization, find_embedding_slots, find_slots
from qlora_tool.model.source import read_model_config
from qlora_tool.weights.handles import model_tensors


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("family", ["llama-odd", "gpt2", "mixtral", "gpt_oss"])
def test_the_bytes_of_a_slot_are_those_of_the_loaded_weight(family, kind, tmp_path):
    folder = write_tiny(family, tmp_path)
    quantization = Quantization(kind, True, "int8")
    model = load_base(folder, read_model_config(folder), quantization, torch.device("cpu"), torch.float32)
    found: dict[str, int] = {}
    for name, tensor, _ in model_tensors(model):
        found[name] = found.get(name, 0) + tensor.nbytes
    skeleton = build_skeleton(read_model_config(folder))
    shapes = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
    slots = find_slots(skeleton) | find_embedding_slots(skeleton, quantization)
    held = {name: slots[name].quantized_bytes(shapes[name], quantization) for name in slots.keys() & found.keys()}
    assert len(held) >= len(slots) - 1  # of two tied weights one is there
    assert held == {name: found[name] for name in held}
    unquantized = {slot.quantized_bytes((8, 8), Quantization("none")) for slot in find_slots(skeleton).values()}
    assert unquantized == {None}
