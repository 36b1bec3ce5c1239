"""Adapters of a base whose vocabulary was resized before training: the base is resized as transformers would, where the
adapter brings every row, and refused with the cure where it does not."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_adapters import FP32, IDS, artifact_of, plain_logits, write_chat_base, write_run
from tiny_models import logits, read_by_transformers, write_tiny
from tokenizers_for_tests import CHATML, byte_level
from torch import Tensor

from qlora_tool import UserError
from qlora_tool.adapters.peft_reading import read_adapter
from qlora_tool.adapters.switch import Switch
from qlora_tool.artifacts import BaseOptions
from qlora_tool.build.open import open_model
from qlora_tool.build.setup import Setup
from qlora_tool.config import Config, ModelConfig, with_values
from qlora_tool.export.options import ExportOptions
from qlora_tool.export.write import export_merged
from qlora_tool.inference.several import find_several
from qlora_tool.model.open import open_tokenizer

EXACT = 1e-5  # fp32's rounding of two layers


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("bases")
    return lambda family: folder / family if (folder / family).exists() else write_tiny(family, folder / family)


def resized(base: Path, rows: int) -> torch.nn.Module:
    model = read_by_transformers(base)
    torch.manual_seed(0)
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def trained_by_peft(base: Path, folder: Path, rows: int, **keys) -> Tensor:
    """Write an adapter of the resized base, embeddings included; the logits that PEFT itself gives with it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=3, task_type="CAUSAL_LM", **keys)
        model = peft.get_peft_model(resized(base, rows), config, autocast_adapter_dtype=False)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder)
        again = peft.PeftModel.from_pretrained(resized(base, rows), folder).eval()
    return logits(again, ids(rows))


def ids(rows: int) -> Tensor:
    """Tokens of all of the vocabulary, the last one too."""
    return torch.cat([IDS % rows, torch.tensor([[rows - 1]])], dim=1)


def options(base: Path) -> ModelConfig:
    return ModelConfig(name_or_path=str(base), quantization="none", **FP32)


ATTENTION = {"llama": ["q_proj"], "llama-tied": ["q_proj"], "gpt2": ["c_attn"], "gptj": ["q_proj"],
             "bloom": ["query_key_value"], "phi": ["q_proj"]}  # fmt: skip
CASES = [
    *((family, {"target_modules": names}) for family, names in ATTENTION.items()),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    ("llama-tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    ("gpt2", {"target_modules": ["c_attn", "wte"]}),
    ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 119]}),
    ("llama-tied", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 119]}),
]


@pytest.mark.parametrize("rows", [139, 120])
@pytest.mark.parametrize("family, keys", CASES, ids=str)
def test_a_resized_base_is_resized_again(base, tmp_path, family, keys, rows):
    """To answer, to train on and to merge: PEFT's logits on the base that transformers resized."""
    folder, adapter = base(family), tmp_path / "adapter"
    expected = trained_by_peft(folder, adapter, rows, **keys)
    assert expected.shape[-1] == rows
    live = open_model(options(folder), read_adapter(adapter)).module
    assert live.config.get_text_config().vocab_size == rows
    torch.testing.assert_close(logits(live.eval(), ids(rows)), expected, rtol=0, atol=EXACT)

    run = with_values(Config(), {"model.name_or_path": str(folder), "adapter.init_from": str(adapter),
                                 "model.quantization": "none", "model.compute_dtype": "float32",
                                 "model.device": "cpu"})  # fmt: skip
    built = Setup.of(run).build()
    torch.testing.assert_close(logits(built.model.module.eval(), ids(rows)), expected, rtol=0, atol=EXACT)

    merged = tmp_path / "merged"
    export_merged(artifact_of(adapter, quantization="none"), merged, ExportOptions(dtype="float32"))
    assert json.loads((merged / "config.json").read_text())["vocab_size"] == rows
    torch.testing.assert_close(plain_logits(merged, ids(rows)), expected, rtol=0, atol=EXACT)


def test_a_base_of_another_vocabulary_is_refused_where_rows_are_missing(base, tmp_path):
    """Of an output projection apart, new rows would be anyone's guess."""
    folder, adapter = base("llama"), tmp_path / "adapter"
    trained_by_peft(folder, adapter, 139, target_modules=["q_proj"])
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "lm_head" not in name}, file)
    with pytest.raises(UserError, match=r"embed_tokens\.weight as \(139, 64\), but it is \(131, 64\).*call "
                                        r"resize_token_embeddings\(139\)"):  # fmt: skip
        open_model(options(folder), read_adapter(adapter))


def test_adapters_of_two_vocabularies_are_on_no_one_base(base, tmp_path):
    """Beside one another and as a sum."""
    folder = base("llama")
    for name, rows in (("one", 139), ("other", 120)):
        trained_by_peft(folder, tmp_path / name, rows, target_modules=["q_proj"])
    switch = Switch(open_model(options(folder)).module)
    with pytest.raises(UserError, match=r"resize_token_embeddings\(139\)"):
        switch.add("one", read_adapter(tmp_path / "one"))
    given = [f"{name}={tmp_path / name}:0.5" for name in ("one", "other")]
    stack = find_several(str(folder), given, BaseOptions(quantization="none", **FP32), weighted=True).summed()
    with pytest.raises(UserError, match=r"resize_token_embeddings\(139\)"):
        export_merged(stack, tmp_path / "merged", ExportOptions(dtype="float32"))


def test_a_run_takes_the_tokenizer_that_came_with_the_rows(tmp_path):
    """It reads its data with the added token, and leaves an adapter that brings all of it again."""
    folder, start = write_chat_base("llama", tmp_path / "model"), tmp_path / "start"
    tokenizer = byte_level(CHATML)
    tokenizer.add_tokens(["<sum>"])
    trained_by_peft(folder, start, len(tokenizer), target_modules=["q_proj"])
    tokenizer.save_pretrained(start)
    write_run(tmp_path / "run", folder, adapter={"init_from": str(start), "r": 3}, model={"quantization": "none"},
              max_steps=1)  # fmt: skip
    adapter = tmp_path / "run" / "adapter"
    assert "<sum>" in open_tokenizer(adapter).get_vocab()
    live = open_model(options(folder), read_adapter(adapter)).module
    assert live.config.vocab_size == len(tokenizer) == live.get_output_embeddings().weight.shape[0]
    for form, file in (("nf4", "model.safetensors"), ("gguf", "gguf.gguf")):
        result = export_merged(artifact_of(tmp_path / "run"), tmp_path / form, ExportOptions(format=form))
        assert (result.folder / file).exists()
    assert plain_logits(tmp_path / "nf4").shape[-1] == len(tokenizer) == 1 + len(open_tokenizer(folder))
