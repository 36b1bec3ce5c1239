"""A base whose layers stay on the disk: the same bits as one in memory."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from in_order_queues import InOrder
from tiny_models import FAMILIES, tokens, write_tiny

from qlora_tool.build.tensors import Random
from qlora_tool.config import ModelConfig
from qlora_tool.errors import MachineError
from qlora_tool.files.direct_reads import PAGE
from qlora_tool.files.tensors import Checkpoint
from qlora_tool.model import host_base
from qlora_tool.model.host_base import HostLayers
from qlora_tool.model.load import Loading, load_base
from qlora_tool.model.random_source import RandomSource
from qlora_tool.model.slots import Quantization
from qlora_tool.model.source import read_model_config
from qlora_tool.model.streamed_base import streamed_handles, unread_handles, write_layer_by_layer
from qlora_tool.weights.streamed import StreamedHandle

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
    """From the disk; from host memory and from the disk by way of it, on queues that do everything at once."""
    folder = write_tiny(family, tmp_path / "base")
    config, quantization = read_model_config(folder), Quantization(kind, True)
    expected = loss_and_gradient(load_base(folder, config, quantization, CPU, dtype))
    (tmp_path / "kept").mkdir()
    write_layer_by_layer(Loading.begin(folder, config, quantization, CPU, dtype), tmp_path / "kept/model.safetensors")
    kept = Checkpoint(tmp_path / "kept")
    ways = [(kept, partial(streamed_handles, cached=kept)), (None, partial(HostLayers, resident=0, queues=InOrder)),
            (kept, partial(streamed_handles, cached=kept, queues=InOrder))]  # fmt: skip
    for checkpoint, streams in ways:
        streamed = load_base(folder, config, quantization, CPU, dtype, checkpoint=checkpoint, streams=streams)
        assert any(isinstance(module, StreamedHandle) for module in streamed.modules())
        for found, wanted in zip(loss_and_gradient(streamed), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["nf4", "int8", "none"])
@pytest.mark.parametrize("where", ["host", "disk"])
def test_first_layers_stay_and_the_rest_is_counted(kind, where, tmp_path):
    """What is not on the device is all of the streamed layers, and a prediction says the same of it."""
    folder = write_tiny("llama", tmp_path / "base", num_hidden_layers=4)
    config, quantization = read_model_config(folder), Quantization(kind, True)
    resident = load_base(folder, config, quantization, CPU, torch.float32)
    (tmp_path / "kept").mkdir()
    write_layer_by_layer(Loading.begin(folder, config, quantization, CPU, torch.float32),
                         tmp_path / "kept/model.safetensors")  # fmt: skip
    kept = Checkpoint(tmp_path / "kept")
    for stay in (0, 3, 4, 9):
        if where == "host":
            checkpoint, streams = None, partial(HostLayers, resident=stay, queues=InOrder)
        else:
            checkpoint, streams = kept, partial(streamed_handles, cached=kept, resident=stay)
        model = load_base(folder, config, quantization, CPU, torch.float32, checkpoint=checkpoint, streams=streams)
        for found, wanted in zip(loss_and_gradient(model), loss_and_gradient(resident), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        streamed = {name for name, module in model.named_modules() if isinstance(module, StreamedHandle)}
        assert {int(name.split(".")[2]) for name in streamed} == set(range(stay, 4))
        unread = load_base(folder, config, quantization, CPU, torch.float32, open_source=RandomSource.of(config),
                           streams=partial(unread_handles, where=where, resident=stay))  # fmt: skip
        if stay >= 4:
            assert not hasattr(model, "weights_elsewhere") and not hasattr(unread, "weights_elsewhere")
            continue
        assert unread.weights_elsewhere == model.weights_elsewhere
        assert unread.weight_stream.one.nbytes == model.weight_stream.one.nbytes
        held = sum(tensor.nbytes for name in streamed for field, tensor in
                   resident.get_submodule(name).tensors().items() if field != "nested_offset")  # fmt: skip
        # A weight's tables and description in a file; in memory the start of three tensors on 64 bytes.
        described = 4 * (16 + 256) + 256 if where == "disk" and kind == "nf4" else 3 * 64
        assert held <= sum(model.weights_elsewhere.values()) <= held + 7 * 4 * described


def test_a_host_without_the_memory_is_told(tmp_path, monkeypatch):
    folder = write_tiny("llama", tmp_path / "base")
    monkeypatch.setattr(host_base, "free_bytes", lambda _: 5000)
    said = r"host: the layers take [\d.]+ MiB of host memory, and 0\.0 MiB are free; set"
    with pytest.raises(MachineError, match=said):
        load_base(folder, read_model_config(folder), Quantization("nf4", True), CPU, torch.float32,
                  streams=partial(HostLayers, resident=0, queues=InOrder))  # fmt: skip


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
    on_disk = ModelConfig(weights="disk", device="cpu")
    predicted = Random(weights=on_disk).base(read_model_config(folder), quantization, CPU, dtype)
    sizes = [model.weight_stream.one.nbytes for model in (predicted, streamed)]
    assert abs(sizes[0] - sizes[1]) <= PAGE and sizes[1] > 8 * PAGE
