"""Embeddings and output projection in int8, against transformers' own models with the dequantized values put in."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import logits, read_by_transformers, relative_error, tokens, write_tiny
from torch import nn

from qlora_tool.adapters.attach import attach
from qlora_tool.config import AdapterConfig
from qlora_tool.data.batches import Batch
from qlora_tool.errors import UserError
from qlora_tool.model import load as load_module
from qlora_tool.model import slots as slots_module
from qlora_tool.model.cached_base import cached_base, write_cached_base
from qlora_tool.model.causal_lm import CausalLM
from qlora_tool.model.load import load_base
from qlora_tool.model.slots import Quantization, find_embedding_slots
from qlora_tool.model.source import read_model_config
from qlora_tool.weights.modules import FrozenEmbedding

CPU = torch.device("cpu")
INT8 = Quantization("none", True, "int8")
# Tied and not, scaled in a subclass, by an adapter of another width, with a bias, the projection read by the family.
FAMILIES = ("llama", "llama-tied", "llama-odd", "gemma", "gemma2", "gpt2", "opt-projected", "phi", "granite", "mamba")


def read(folder: Path, quantization: Quantization = INT8, dtype: torch.dtype = torch.float32, **options):
    return load_base(folder, read_model_config(folder), quantization, CPU, dtype, **options)


def through_int8(matrix: torch.Tensor) -> torch.Tensor:
    """(rows, width) → what bitsandbytes leaves of it at 127 steps a row."""
    codes, scales, _ = bnb.int8_vectorwise_quant(matrix.half())
    result = codes * scales.unsqueeze(1) / 127
    # Half a step; and fp16, in which it divides by the scale, is off by 2^-11 of up to 127 steps, twice.
    assert bool(((result - matrix).abs() <= (0.5 + 2 * 127 * 2**-11) * scales.unsqueeze(1) / 127).all())
    return result


@torch.no_grad()
def expected_model(folder: Path):
    """transformers' model, in fp32, with rounded embeddings and head."""
    model = read_by_transformers(folder)
    for weight in {module.weight for module in (model.get_input_embeddings(), model.get_output_embeddings())}:
        weight.copy_(through_int8(weight))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_dequantized_values(family, tmp_path):
    folder = write_tiny(family, tmp_path, dtype=torch.bfloat16)
    model, expected = read(folder), expected_model(folder)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.weight.kind == head.weight.kind == "int8"
    tied = expected.get_input_embeddings().weight is expected.get_output_embeddings().weight
    assert (embedding.weight is head.weight) == tied
    for found, kept in ((embedding, expected.get_input_embeddings()), (head, expected.get_output_embeddings())):
        torch.testing.assert_close(found.weight.dense(torch.float32), kept.weight, rtol=1e-6, atol=0)
    assert relative_error(logits(model, tokens()), logits(expected, tokens())) <= 2e-5
    assert relative_error(logits(model, tokens()), logits(read_by_transformers(folder), tokens())) > 1e-3


def test_rows_of_zeros_and_of_padding_stay_zero(tmp_path):
    folder = write_tiny("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][[0, 7]] = 0.0  # 0 is the padding token
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    embedding = read(folder).get_input_embeddings()
    assert embedding.padding_idx == 0
    found = embedding(torch.tensor([[0, 7, 8]]))
    assert torch.equal(found[0, :2], torch.zeros(2, 64)) and found[0, 2].abs().sum() > 0


def test_what_a_subclass_adds_is_added_in_the_dtype_of_products(tmp_path):
    """Gemma's √64 = 8, on rows that bf16 rounds once."""
    folder = write_tiny("gemma", tmp_path, dtype=torch.bfloat16)
    embedding = read(folder, dtype=torch.bfloat16).get_input_embeddings()
    rows = through_int8(read_by_transformers(folder).get_input_embeddings().weight.detach())[tokens()]
    found = embedding(tokens())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, (rows.to(torch.bfloat16) * 8), rtol=2**-7, atol=0)


@pytest.mark.parametrize("held", ["the embeddings", "the head", "both"])
def test_tied_ones_share_one_handle_whichever_the_file_holds(held, tmp_path):
    folder = write_tiny("llama-tied", tmp_path)
    expected = logits(expected_model(folder), tokens())
    tensors = load_file(folder / "model.safetensors")
    if held != "the embeddings":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if held == "the head":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = read(folder)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert relative_error(logits(model, tokens()), expected) <= 2e-5


def test_tied_ones_that_differ_stay_apart(tmp_path):
    folder = write_tiny("llama-tied", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] * 2}, folder / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    model = read(folder)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    torch.testing.assert_close(head.dense(torch.float32), 2 * embedding.dense(torch.float32))
    assert load_module.tied_names(model) == {}


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma2", "gpt2"])
def test_loss_and_gradients_are_those_of_the_dequantized_values(family, tmp_path):
    """The same adapter on the int8 model, its loss in chunks, and on one that holds the dequantized values plain, its
    loss by autograd from full logits."""
    folder = write_tiny(family, tmp_path / "base")
    expected_model(folder).save_pretrained(tmp_path / "dequantized")
    ids = tokens()
    targets = ids[:, 1:].flatten()
    rows = (torch.arange(ids.numel()).view_as(ids)[:, :-1]).flatten()
    batch = Batch(input_ids=ids, labels=ids, attention_mask=None, position_ids=None, predicting=rows, targets=targets,
                  tokens=ids.numel(), trained_tokens=targets.numel(), where=[])  # fmt: skip
    results = []
    for source, quantization in ((folder, INT8), (tmp_path / "dequantized", Quantization("none"))):
        module = read(source, quantization)
        adapters = attach(module, AdapterConfig(r=4), torch.float32, seed=0)
        with torch.no_grad():
            for index, parameter in enumerate(adapters.parameters()):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
        model = CausalLM(module, source, quantization, torch.float32)
        if quantization is INT8:
            assert model.chunked_loss
        else:
            model.projects_plainly = False
        loss = model.loss_sum(batch)
        loss.backward()
        results.append((loss.detach(), [parameter.grad for parameter in adapters.parameters()]))
    (loss, gradients), (expected_loss, expected) = results
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    for found, wanted in zip(gradients, expected, strict=True):
        assert relative_error(found, wanted) <= 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_are_one_a_weight_and_four_a_row(tied, tmp_path):
    folder = write_tiny("llama-tied" if tied else "llama", tmp_path, dtype=torch.bfloat16)
    int8, stored = (CausalLM(read(folder, quantization), folder, quantization, torch.float32)
                    for quantization in (Quantization("nf4", True, "int8"), Quantization("nf4")))  # fmt: skip
    copies = 1 if tied else 2
    assert int8.quantized_bytes() - stored.quantized_bytes() == copies * (131 * 64 + 131 * 4)
    left, before = int8.unquantized_bytes(), stored.unquantized_bytes()
    assert sum(before.values()) - sum(left.values()) == copies * 131 * 64 * 2
    assert not any("embed_tokens" in name or "lm_head" in name for name in left)


@pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head"])
def test_they_are_not_fully_trained(name, tmp_path):
    """Tied, as the one cannot be without the other; the configuration refuses the common names before."""
    model = read(write_tiny("llama-tied", tmp_path))
    with pytest.raises(UserError, match=r"adapter\.modules_to_save.*model\.embeddings: int8"):
        attach(model, AdapterConfig(modules_to_save=[name]), torch.float32, seed=0)


# --------------------------------------------------------------------------------------------- kept, or left as stored


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma", "gpt2"])
def test_the_cached_base_is_the_same_bit_for_bit_and_found_for_int8_alone(family, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(tmp_path / "cache"))
    quantization = Quantization("nf4", True, "int8")
    folder = write_tiny(family, tmp_path / "model", dtype=torch.bfloat16)
    first = read(folder, quantization)
    write_cached_base(first, folder, quantization, torch.float32)
    assert cached_base(folder, Quantization("nf4"), torch.float32) is None
    monkeypatch.setattr(slots_module, "quantize", None)
    second = read(folder, quantization, checkpoint=cached_base(folder, quantization, torch.float32))
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert torch.equal(logits(first, tokens()), logits(second, tokens()))


class Decoupled(nn.Embedding):
    """Looks rows up by itself."""

    def forward(self, input):
        return torch.nn.functional.embedding(input, self.weight)


@pytest.mark.parametrize("tied", [True, False])
def test_what_cannot_be_quantized_stays_as_stored_with_a_line(tied, tmp_path, monkeypatch, caplog):
    folder = write_tiny("llama-tied" if tied else "llama", tmp_path)
    build = load_module.build_skeleton

    def with_decoupled_embeddings(*arguments):
        model = build(*arguments)
        model.get_input_embeddings().__class__ = Decoupled
        return model

    monkeypatch.setattr(load_module, "build_skeleton", with_decoupled_embeddings)
    with caplog.at_level(logging.WARNING):
        model = read(folder)
        read(folder)
    assert caplog.text.count("model.embeddings: int8, but in llama the input embeddings (Decoupled)") == 1
    assert isinstance(model.get_input_embeddings().weight, nn.Parameter)
    assert (model.get_output_embeddings().weight.kind == "none") == tied
    expected = read_by_transformers(folder)
    if not tied:
        expected.lm_head.weight.data = through_int8(expected.lm_head.weight.data)
    assert relative_error(logits(model, tokens()), logits(expected, tokens())) <= 2e-5


def test_a_missing_head_is_told(tmp_path, caplog):
    model = load_module.build_skeleton(read_model_config(write_tiny("llama", tmp_path)))
    model.get_output_embeddings = lambda: None
    with caplog.at_level(logging.WARNING):
        assert find_embedding_slots(model, INT8).keys() == {"model.embed_tokens.weight"}
    assert "the output projection (none) cannot be quantized" in caplog.text


@pytest.mark.parametrize("embeddings", ["as_stored", "int8"])
def test_a_family_that_asks_its_parameters_for_its_dtype_gets_that_of_products(embeddings, tmp_path):
    """openai-gpt makes its mask in the dtype of its first parameter, and of the first that is no integer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("openai-gpt", vocab_size=131, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = read(tmp_path, Quantization("nf4", True, embeddings), dtype=torch.bfloat16)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, 9:] = 0
    assert model.dtype == logits(model, tokens(), attention_mask=mask).dtype == torch.bfloat16


def test_embeddings_that_renormalize_are_not_taken_over():
    assert not FrozenEmbedding.can_take_over(nn.Embedding(3, 4, max_norm=1.0))
    assert not FrozenEmbedding.can_take_over(SimpleNamespace(max_norm=None))
    assert FrozenEmbedding.can_take_over(nn.Embedding(3, 4))
