"""Moments of what layers are given, one layer in memory: against hooks on the whole merged model in fp64."""

from __future__ import annotations

import threading

import pytest
import torch
from tiny_adapters import artifact_of, write_adapter, write_chat_base
from tiny_ggufs import merged_of
from tiny_models import read_by_transformers

from qlora_tool.data.batches import collate
from qlora_tool.data.tokenize import Example
from qlora_tool.errors import UserError
from qlora_tool.export import moments
from qlora_tool.export.moments import LayerPass, Moments
from qlora_tool.export.options import ExportOptions
from qlora_tool.export.write import export_merged
from qlora_tool.model.experts import is_experts_module
from qlora_tool.model.slots import is_linear

FAMILIES = ["llama", "gpt2", "gemma3_text", "mixtral", "bloom"]
OTHERS = ["llama-tied", "gemma2", "phi3", "falcon", "opt", "gpt_neox", "qwen3_moe"]


def batches_of(count: int, rows: int = 2, length: int = 12) -> list:
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(count):
        blocks = [torch.randint(3, 120, (length,), generator=generator).tolist() for _ in range(rows)]
        found.append(collate([[Example(block, block, "row")] for block in blocks], pad_token_id=0, packing=False))
    return found


def padded(lengths: list[int]) -> list:
    """A batch of rows of other lengths, padded at their ends with a token that the model knows; and each row alone."""
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(3, 120, (length,), generator=generator).tolist() for length in lengths]
    batch = collate([[Example(row, row, "row")] for row in rows], pad_token_id=5, packing=False)
    return [batch, *(collate([[Example(row, row, "row")]], pad_token_id=5, packing=False) for row in rows)]


@torch.no_grad()
def by_hooks(folder, batches) -> dict[str, torch.Tensor]:
    """Of every linear module of a whole model, in fp64 where its experts' products have that."""
    model, found = read_by_transformers(folder), {}
    if not any(is_experts_module(module) for module in model.modules()):
        model = model.double()
    for name, module in model.named_modules():
        if is_linear(module):
            def note(_, inputs, name=name):
                x = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
                found[name] = found.get(name, 0) + x.T @ x
            module.register_forward_pre_hook(note)
    for batch in batches:
        model(input_ids=batch.input_ids, use_cache=False)
    return found


@pytest.mark.parametrize("family", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
@pytest.mark.parametrize("strip", [moments._STRIP, 24])
def test_they_are_those_of_the_whole_merged_model(family, strip, tmp_path, monkeypatch):
    monkeypatch.setattr(moments, "_STRIP", strip)
    base = write_chat_base(family, tmp_path / "base")
    artifact = artifact_of(write_adapter(tmp_path / "adapter", base))
    export_merged(artifact, tmp_path / "merged", ExportOptions(dtype="float32"))
    batches = batches_of(3)
    expected = by_hooks(tmp_path / "merged", batches)
    walk, seen = LayerPass(merged_of(artifact, base), batches), set()
    for layer, gathered in walk:
        for name in (name for name in expected if name.startswith(f"{layer}.")):
            found = gathered.shared([name])
            size = float(expected[name].norm())
            # Activations and sums in fp32: 2⁻²⁴ a rounding, some dozens of them on the way through a tiny model.
            assert float((found.double() - expected[name]).norm()) < 2e-5 * size, name
            seen.add(name)
    assert seen == {name for name in expected if any(name.startswith(f"{layer}.") for layer in walk.layers)}


@pytest.mark.parametrize("family", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_padding_does_not_count(family, tmp_path):
    """As of each row by itself, unpadded, in the whole model."""
    base = write_chat_base(family, tmp_path / "base")
    artifact = artifact_of(write_adapter(tmp_path / "adapter", base))
    export_merged(artifact, tmp_path / "merged", ExportOptions(dtype="float32"))
    batch, *alone = padded([9, 4, 12, 12, 1])
    assert batch.attention_mask is not None
    expected, seen = by_hooks(tmp_path / "merged", alone), 0
    for layer, gathered in LayerPass(merged_of(artifact, base), [batch]):
        for name in (name for name in expected if name.startswith(f"{layer}.")):
            found, size = gathered.shared([name]), float(expected[name].norm())
            assert float((found.double() - expected[name]).norm()) < 2e-5 * size, name
            seen += 1
    assert seen > 6


def test_what_is_not_given_all_of_a_padded_batch_has_no_moments():
    """Neither from this batch nor from others, so that no half of them is taken for all."""
    real, x = torch.tensor([[True, True, False], [True, True, True]]), torch.randn(2, 3, 4)
    exact = x.flatten(0, 1)[real.flatten()]
    gathered = Moments()
    for whole in (x, x.flatten(0, 1)):
        gathered.add("whole", whole, {}, real)
        gathered.add("part", whole, {}, real)
    for part in (x.transpose(0, 1), x.flatten(0, 1)[:4]):
        gathered.add("part", part, {}, real)
        gathered.add("part", x, {}, real)
    gathered.complete()
    assert torch.allclose(gathered.shared(["whole"]), 2 * exact.T @ exact, atol=1e-5)
    assert gathered.shared(["part"]) is None


def test_modules_of_one_input_share_it_and_others_do_not(tmp_path):
    base = write_chat_base("llama", tmp_path / "base")
    merged = merged_of(artifact_of(write_adapter(tmp_path / "adapter", base)), base)
    layer, gathered = next(iter(LayerPass(merged, batches_of(2))))
    qkv = [f"{layer}.self_attn.{part}_proj" for part in "qkv"]
    assert gathered.shared(qkv) is gathered.shared(qkv[:1])
    assert gathered.shared([*qkv, f"{layer}.mlp.down_proj"]) is None
    assert gathered.shared([f"{layer}.input_layernorm"]) is None


def test_only_one_layer_has_weights(tmp_path):
    base = write_chat_base("llama", tmp_path / "base", num_hidden_layers=3)
    merged = merged_of(artifact_of(write_adapter(tmp_path / "adapter", base)), base)
    walk = LayerPass(merged, batches_of(2))
    loaded, load = [], walk._load

    def noted(owner: str, recurse: bool = True) -> None:
        load(owner, recurse)
        there = [name for name, tensor in walk._model.named_parameters() if tensor.device.type != "meta"]
        loaded.append({name.split(".")[2] for name in there if name.startswith("model.layers.")})

    walk._load = noted
    assert [layer for layer, _ in walk] == [f"model.layers.{index}" for index in range(3)]
    assert max(len(layers) for layers in loaded) == 1
    assert all(tensor.device.type == "meta" for tensor in walk._model.parameters())


def test_what_breaks_in_the_model_is_told_and_nothing_waits_for_ever(tmp_path):
    base = write_chat_base("llama", tmp_path / "base")
    merged = merged_of(artifact_of(write_adapter(tmp_path / "adapter", base)), base)
    walk = LayerPass(merged, batches_of(3))
    walk._model.get_submodule("model.layers.1.mlp").forward = lambda *_: 1 / 0
    with pytest.raises(UserError, match=r"failed on the rows \(ZeroDivisionError.*; choose --calibration none"):
        list(walk)
    early = iter(LayerPass(merged, batches_of(3)))
    next(early)
    early.close()
    assert not [thread for thread in threading.enumerate() if thread.name.isdigit()]


def test_experts_have_no_moments_of_their_own(tmp_path):
    base = write_chat_base("mixtral", tmp_path / "base")
    merged = merged_of(artifact_of(write_adapter(tmp_path / "adapter", base)), base)
    layer, gathered = next(iter(LayerPass(merged, batches_of(2))))
    assert gathered.shared([f"{layer}.mlp.experts.gate_up_proj"]) is None
