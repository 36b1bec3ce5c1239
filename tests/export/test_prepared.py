"""A step before quantizing changes the same weights to the same bits where a model is read and where it is merged."""

from __future__ import annotations

import zlib

import bitsandbytes.functional as bnb
import pytest
import torch
from tiny_models import read_by_transformers, read_tiny, write_tiny

from qlora_tool.errors import UserError
from qlora_tool.export import merge
from qlora_tool.export.merge import MergedModel
from qlora_tool.files.tensors import Checkpoint
from qlora_tool.model.cached_base import cached_base, write_cached_base
from qlora_tool.model.load import build_skeleton
from qlora_tool.model.slots import Quantization
from qlora_tool.model.source import read_model_config
from qlora_tool.weights.handles import WeightHandle
from qlora_tool.weights.quantized import QuantizedTensor


def less_a_low_rank_part(name: str, weight: torch.Tensor) -> torch.Tensor:
    """W - B·A of rank 2 in fp32, other values for each name, as an adapter's start would take out of it."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    out_features, in_features = weight.shape[-2:]
    B, A = torch.randn(out_features, 2, generator=generator), torch.randn(2, in_features, generator=generator)
    return weight.float() - 0.1 * B @ A


def merged_values(folder, quantization: Quantization, **options) -> dict[str, torch.Tensor]:
    skeleton = build_skeleton(read_model_config(folder))
    model = MergedModel(skeleton, Checkpoint(folder), quantization, None, dtype=torch.float32, **options)
    return {name: tensor for group in model.groups for name, tensor in model.tensors(group).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["nf4", "int8", "none"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss", "mixtral"])
def test_the_loader_and_the_merge_quantize_the_same_bits(family, kind, dtype, tmp_path, monkeypatch):
    """Linears as they are and turned (gpt2), experts as they are and turned (gpt_oss)."""
    folder = write_tiny(family, tmp_path, dtype=dtype)
    quantization = Quantization(kind)
    model = read_tiny(folder, kind, prepare=less_a_low_rank_part)
    found, quantize_parameter = {}, merge.quantize_parameter
    monkeypatch.setattr(
        merge, "quantize_parameter", lambda name, *rest: found.setdefault(name, quantize_parameter(name, *rest))
    )
    merged_values(folder, quantization, prepare=less_a_low_rank_part)
    plain, changed = read_tiny(folder, kind), 0
    for name, handle in ((name, part) for name, part in model.named_modules() if isinstance(part, WeightHandle)):
        if name not in found:
            continue
        ours, theirs = handle.stored(), found[name]
        if isinstance(ours, QuantizedTensor):
            assert (ours.kind, ours.shape, ours.dtype) == (theirs.kind, theirs.shape, theirs.dtype)
            assert all(torch.equal(tensor, theirs.tensors()[part]) for part, tensor in ours.tensors().items())
        else:
            assert torch.equal(ours, theirs)
        changed += not torch.equal(handle.dense(torch.float32), plain.get_submodule(name).dense(torch.float32))
    assert changed == len(found) >= 8


def test_what_is_quantized_is_what_the_step_returned_for_the_weight(tmp_path):
    """(out, in), also where the checkpoint keeps (in, out)."""
    folder = write_tiny("gpt2", tmp_path)
    model, reference = read_tiny(folder, "nf4", prepare=less_a_low_rank_part), read_by_transformers(folder)
    name = "transformer.h.1.mlp.c_fc.weight"
    prepared = less_a_low_rank_part(name, reference.get_parameter(name).detach().t())
    codes, state = bnb.quantize_4bit(prepared.contiguous(), quant_type="nf4", compress_statistics=True)
    found = model.get_submodule(name).stored()
    assert torch.equal(found.codes, codes.flatten()) and torch.equal(found.scales, state.absmax)


def test_what_is_never_quantized_is_never_prepared(tmp_path):
    folder = write_tiny("llama", tmp_path)
    names = []
    read_tiny(folder, "nf4", prepare=lambda name, weight: names.append(name) or weight)
    assert len(names) == 14 and not [name for name in names if "_proj" not in name]


def test_the_original_base_is_prepared_too(tmp_path):
    """What the adapter took out of the weights has to go before it is added back."""
    folder = write_tiny("gpt2", tmp_path)
    found = merged_values(folder, Quantization("nf4"), base="original", prepare=less_a_low_rank_part)
    name = "transformer.h.0.attn.c_proj.weight"
    weight = read_by_transformers(folder).get_parameter(name).detach()
    assert torch.equal(found[name], less_a_low_rank_part(name, weight.t()).t())


def test_a_checkpoint_that_is_quantized_already_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(tmp_path / "cache"))
    folder, quantization = write_tiny("llama", tmp_path / "model"), Quantization("nf4")
    write_cached_base(read_tiny(folder, "nf4"), folder, quantization, torch.float32)
    cached = cached_base(folder, quantization, torch.float32)
    with pytest.raises(UserError) as raised:
        read_tiny(folder, "nf4", checkpoint=cached, prepare=less_a_low_rank_part)
    (line,) = raised.value.lines
    assert "\n" not in line and "_proj.weight: the checkpoint is already quantized as nf4" in line
    assert "16-bit" in line
    # The merge reads the checkpoint itself in its place.
    expected = merged_values(folder, quantization, prepare=less_a_low_rank_part)
    found = merged_values(folder, quantization, prepare=less_a_low_rank_part, cached=cached)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
