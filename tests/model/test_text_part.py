"""Multimodal models: what counts as their text part, what takes an adapter, what is quantized."""

from __future__ import annotations

import pytest
import torch
from multimodal_models import MORE, MULTIMODAL, write_multimodal
from safetensors.torch import load_file
from tiny_models import logits, read_tiny, relative_error, tiny_config, tokens

from qlora_tool.adapters.targets import find_targets
from qlora_tool.config import AdapterConfig
from qlora_tool.model.checkpointing import decoder_layers
from qlora_tool.model.layer_stack import layer_stack
from qlora_tool.model.load import build_skeleton
from qlora_tool.model.source import read_model_config
from qlora_tool.model.text_part import outside_text, text_modules
from qlora_tool.weights.handles import WeightHandle

# Those whose towers are part of the model that transformers makes for text; the others' stay in the files.
WITH_TOWER = ["gemma3", "gemma4", "qwen3_vl"]


@pytest.fixture(scope="module", params=MULTIMODAL)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return write_multimodal(family, tmp_path_factory.mktemp(family))


def targets(model, **adapter) -> list[str]:
    return list(find_targets(model, AdapterConfig(**adapter)))


def test_all_linear_adapts_the_text_part_alone(family, folder):
    model = read_tiny(folder, "nf4")
    chosen = targets(model)
    assert chosen
    assert not [name for name in chosen if any(word in name for word in ("vision", "visual", "embed_vision"))]
    layers = {name.split(".layers.")[1].partition(".")[0] for name in chosen if ".layers." in name}
    assert layers == {"0", "1"}


def test_layers_are_counted_in_the_text_part(family, folder):
    config = read_model_config(folder)
    stack = layer_stack(config)
    skeleton = build_skeleton(config)
    assert stack.layers == 2
    assert len(decoder_layers(skeleton)) == 2
    assert not [part for part in outside_text(skeleton) if stack.path.startswith(part)]
    assert skeleton.get_submodule(stack.path) in text_modules(skeleton).values()


@pytest.mark.parametrize("family", WITH_TOWER)
def test_a_tower_takes_an_adapter_where_it_is_named(family, tmp_path):
    folder, tower = write_multimodal(family, tmp_path), MULTIMODAL[family][1]
    model = read_tiny(folder, "nf4")
    assert outside_text(model)[-1].startswith("model.")
    assert tower in outside_text(model)
    by_last_name = targets(model, target_modules=["q_proj"])
    assert by_last_name
    assert not [name for name in by_last_name if name.startswith(tower)]  # whose own q_proj is not meant
    inside = targets(model, target_modules=rf".*{tower.rpartition('.')[2]}.*(q_proj|qkv).*")
    assert inside
    assert all(name.startswith(tower) for name in inside)


@pytest.mark.parametrize("family", WITH_TOWER)
def test_a_tower_is_not_quantized(family, tmp_path):
    folder, tower = write_multimodal(family, tmp_path), MULTIMODAL[family][1]
    model, stored = read_tiny(folder, "nf4"), load_file(folder / "model.safetensors")
    kinds = {name: module for name, module in model.named_modules() if isinstance(module, WeightHandle)}
    inside = {name: handle for name, handle in kinds.items() if name.startswith(tower)}
    assert {handle.kind for handle in inside.values()} == {"none"}
    assert all(torch.equal(handle.stored(), stored[name]) for name, handle in inside.items() if name in stored)
    assert {handle.kind for name, handle in kinds.items() if ".layers." in name and name not in inside} == {"nf4"}


@pytest.mark.parametrize("family", MULTIMODAL | MORE)
def test_its_text_gives_the_logits_that_transformers_gives(family, tmp_path):
    from transformers import AutoModelForImageTextToText

    folder, tower = write_multimodal(family, tmp_path), (MULTIMODAL | MORE)[family][1]
    outside = outside_text(build_skeleton(read_model_config(folder)))
    assert outside == [] if family == "qwen3_5" else tower in outside
    theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokens() % 119  # none that stand for an image
    assert relative_error(logits(read_tiny(folder), ids), logits(theirs, ids)) < 1e-5


def test_a_text_model_has_nothing_outside():
    assert outside_text(build_skeleton(tiny_config("llama"))) == []
    assert outside_text(torch.nn.Linear(2, 2)) == []
