"""A configuration with a resized vocabulary: the model that it makes, and the config.json that says it."""

from __future__ import annotations

import json

import pytest
import torch
from multimodal_models import MULTIMODAL
from tiny_models import tiny_config
from transformers import AutoConfig

from qlora_tool.model.load import build_skeleton
from qlora_tool.model.resized import fitted, resized_config, rows_in_files, with_vocabulary

ROWS = 139


def config_of(family: str):
    return AutoConfig.for_model(family, **MULTIMODAL[family][0]) if family in MULTIMODAL else tiny_config(family)


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "bloom", "mpt", "opt", "gptj", *MULTIMODAL])
def test_the_model_and_the_file_have_the_new_vocabulary(family, tmp_path):
    """The file as transformers reads it again, whatever part of it says the size."""
    config = config_of(family)
    resized = resized_config(config, ROWS)
    assert rows_in_files(resized) == config.get_text_config().vocab_size == 131 and rows_in_files(config) is None
    model = build_skeleton(resized)
    assert model.get_input_embeddings().weight.shape[0] == model.get_output_embeddings().weight.shape[0] == ROWS
    config.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(with_vocabulary(raw, resized)))
    assert AutoConfig.from_pretrained(tmp_path).get_text_config().vocab_size == ROWS
    assert with_vocabulary(raw, config) == raw


@pytest.mark.parametrize("rows", [5, 2])
def test_rows_that_both_have_stay(rows):
    config = resized_config(tiny_config("llama", vocab_size=3), rows)
    value = torch.arange(6.0).view(3, 2) + 1
    found = fitted(value, (rows, 2), config)
    assert found.shape == (rows, 2) and torch.equal(found[:2], value[:2])
    assert torch.equal(found[2:], torch.cat([value[2:], torch.zeros(2, 2)])[: max(0, rows - 2)])
    assert fitted(torch.ones(4, 2), (rows, 2), config).shape == (4, 2)  # none of the files' vocabulary
