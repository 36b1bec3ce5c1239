"""A base whose layers stay on the disk: the same bits as one in memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny_models import FAMILIES, tokens, write_tiny

from qlora_tool.build.tensors import Random
from qlora_tool.files.tensors import Checkpoint
from qlora_tool.model.load import Loading, load_base
from qlora_tool.model.slots import Quantization
from qlora_tool.model.source import read_model_config
from qlora_tool.model.streamed_base import streamed_handles, write_layer_by_layer
from qlora_tool.weights.streamed import PAGE, StreamedHandle

CPU = torch.device("cpu")


def loss_and_gradient(model) -> tuple[torch.Tensor, torch.Tensor]:
    embeddings = model.get_input_embeddings()(tokens()).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, use_cache=False).logits
    logits.float().logsumexp(-1).sum().backward()
    return logits.detach(), embeddings.grad


# bf16 differs from fp32 in the handles' dtypes alone.
IN_BF16 = [("llama", "nf4"), ("qwen3_moe", "nf4"), ("gpt2", "none")]
# The other kinds: of weights that lie the other way round, of odd shapes, of experts, of fused ones, tied.
OTHERS = ["gpt2", "llama-odd", "gpt_oss", "mixtral", "phi3", "gemma2"]
CASES = [*itertools.product(sorted(FAMILIES), ["nf4"], [torch.float32]),
         *itertools.product(OTHERS, ["int8", "none"], [torch.float32]),
         *((*case, torch.bfloat16) for case in IN_BF16)]  # fmt: skip


@pytest.mark.parametrize(("family", "kind", "dtype"), CASES, ids=str)
def test_a_streamed_model_computes_the_same_bits(family, kind, dtype, tmp_path):
    folder = write_tiny(family, tmp_path / "base")
    config, quantization = read_model_config(folder), Quantization(kind, True)
    resident = load_base(folder, config, quantization, CPU, dtype)
    (tmp_path / "kept").mkdir()
    write_layer_by_layer(Loading.begin(folder, config, quantization, CPU, dtype), tmp_path / "kept/model.safetensors")
    kept = Checkpoint(tmp_path / "kept")
    streamed = load_base(folder, config, quantization, CPU, dtype, checkpoint=kept,
                         streams=lambda loading: streamed_handles(loading, kept))  # fmt: skip
    handles = [module for module in streamed.modules() if isinstance(module, StreamedHandle)]
    assert handles
    for found, expected in zip(loss_and_gradient(streamed), loss_and_gradient(resident), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["none", "int8", "nf4"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_buffers_are_as_large_as_predicted(kind, stored, dtype, tmp_path):
    """Whatever the weights are stored in, and whatever products run in."""
    folder = write_tiny("llama", tmp_path / "base", dtype=stored)
    quantization = Quantization(kind, True)
    (tmp_path / "kept").mkdir()
    loading = Loading.begin(folder, read_model_config(folder), quantization, CPU, dtype)
    write_layer_by_layer(loading, tmp_path / "kept/model.safetensors")
    kept = Checkpoint(tmp_path / "kept")
    streamed = load_base(folder, read_model_config(folder), quantization, CPU, dtype, checkpoint=kept,
                         streams=lambda loading: streamed_handles(loading, kept))  # fmt: skip
    predicted = Random(streams=True).base(read_model_config(folder), quantization, CPU, dtype)
    sizes = [model.weight_stream.one.nbytes for model in (predicted, streamed)]
    assert abs(sizes[0] - sizes[1]) <= PAGE and sizes[1] > 8 * PAGE
