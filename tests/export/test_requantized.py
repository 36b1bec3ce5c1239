"""Merged weights quantized again: transformers with bitsandbytes loads them, and what is lost is said."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from tiny_adapters import IDS, artifact_of, write_adapter, write_chat_base
from tiny_ggufs import merged_of
from tiny_models import FAMILIES, read_tiny, relative_error, tiny_config
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from qlora_tool.errors import UserError
from qlora_tool.export import read_by_bitsandbytes
from qlora_tool.export.encoding import Encoder
from qlora_tool.export.read_by_bitsandbytes import is_read_everywhere, is_read_here, why_left
from qlora_tool.export.requantized import UpdateLoss, _becomes_4bit, write_requantized
from qlora_tool.model.slots import is_linear
from qlora_tool.ops.quantization import code_values
from qlora_tool.weights.quantized import quantize


def plain(merged) -> Encoder:
    """Codes as near as they come, without rows."""
    return Encoder(merged, [merged.base])


def requantized(folder, family="llama", *, kind="nf4", max_shard_size=5 * 10**9, adapter=None, **changes):
    """Export a tiny model and its adapter in four bits; the folder, what the export says, the artifact and its base."""
    base = write_chat_base(family, folder / "base", **changes)
    artifact = artifact_of(write_adapter(folder / "adapter", base, **(adapter or {})))
    (folder / "nf4").mkdir()
    said = write_requantized(artifact, plain(merged_of(artifact, base)), folder / "nf4", kind, max_shard_size)
    return folder / "nf4", said, artifact, base


@torch.no_grad()
def logits_by_bitsandbytes(folder) -> torch.Tensor:
    # In training mode, which changes nothing without dropout: for inference bitsandbytes 0.50 multiplies in bf16 on
    # CPUs that have it, whatever dtype it is asked for.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("family", [*FAMILIES, "mamba", "falcon", "llama4_text"])
def test_four_bits_go_where_transformers_has_modules_for_them(family):
    """Neither to falcon's own class of linear modules, nor to a weight that mamba multiplies with by itself."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(family))
    linear = [name for name, module in model.named_modules() if is_linear(module)]
    ours = {name for name in linear if _becomes_4bit(model, name)}
    settings = BitsAndBytesConfig(load_in_4bit=True)
    replace_with_bnb_linear(model, [], settings, pre_quantized=True)
    theirs = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert theirs - ours == {name for name in linear if name.endswith("mixer.dt_proj")} and ours <= theirs


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "kind", "changes"),
    [("llama", "nf4", {}), ("llama", "fp4", {}), ("llama-tied", "nf4", {}), ("phi3", "nf4", {}),
     ("qwen3_moe", "nf4", {}), ("mamba", "nf4", {}),
     ("gpt2", "nf4", {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0})],
)  # fmt: skip
def test_transformers_and_bitsandbytes_load_it(family, kind, changes, tmp_path):
    folder, said, _, _ = requantized(tmp_path, family, kind=kind, **changes)
    found = logits_by_bitsandbytes(folder)
    left = {"qwen3_moe": 4, "mamba": 2}.get(family)
    if left:  # experts, and weights that the family multiplies with, stay as they are; the loader would quantize them
        assert said["unquantized_weights"] == left and found.isfinite().all()
        return
    ours = read_tiny(folder, kind, True)
    assert relative_error(found, ours(input_ids=IDS, use_cache=False).logits) < 1e-5
    assert said["unquantized_weights"] == 0


@torch.no_grad()
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_rows_that_are_no_whole_blocks_stay_as_they_are(kind, tmp_path):
    """What plain transformers reads is what was written: bitsandbytes 0.50 misreads rows of 160 on some CPUs."""
    folder, said, _, _ = requantized(tmp_path, kind=kind, intermediate_size=160)
    assert said["unquantized_weights"] == 2 and said["quantized_weights"] == 12
    assert said["left_unquantized"].startswith("2 of 14 weights: rows of 160 are ")
    config = json.loads((folder / "config.json").read_text())
    skipped = config["quantization_config"]["llm_int8_skip_modules"]
    assert [name for name in skipped if name != "lm_head"] == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    ours = read_tiny(folder, kind, True)
    assert relative_error(logits_by_bitsandbytes(folder), ours(input_ids=IDS, use_cache=False).logits) < 1e-5


def test_no_row_of_whole_blocks_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^--format nf4: no weight .* rows of 36 and 45 are .* choose --format safe"):
        requantized(tmp_path, "llama-odd")


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_what_bitsandbytes_misreads_shows_as_measured(kind, monkeypatch):
    """With a reader that counts the blocks of each row anew, as 0.50 does on CPUs with AVX-512, whatever the CPU."""
    def by_rows(written):
        out, width = written.shape
        dense, scales = written.dequantize(), dequantized_scales(written)
        row, column = torch.meshgrid(torch.arange(out), torch.arange(width), indexing="ij")
        right, wrong = (row * width + column) // 64, row * (width // 64) + column // 64
        return dense / scales[right] * scales[wrong]

    monkeypatch.setattr(read_by_bitsandbytes, "read", by_rows)
    read_by_bitsandbytes._is_read.cache_clear()
    for double_quant in (False, True):
        found = [width for width in (48, 64, 96, 128, 160, 192) if is_read_here((96, width), kind, double_quant)]
        assert found == [64, 128, 192]
    assert "rows of 96 and 160 are misread by bitsandbytes 0" in why_left([(64, 160), (96, 96)], kind, True)
    monkeypatch.setattr(read_by_bitsandbytes, "read", lambda written: written.dequantize() + 1)
    read_by_bitsandbytes._is_read.cache_clear()
    assert not is_read_everywhere((64, 64), kind, True)  # whole blocks, and misread all the same
    monkeypatch.setattr(read_by_bitsandbytes, "read", lambda written: written.dequantize())
    read_by_bitsandbytes._is_read.cache_clear()
    assert "rows of 96 are no whole blocks of 64 weights" in why_left([(96, 96)], kind, True)
    assert not is_read_everywhere((96, 96), kind, True)  # not on other CPUs
    read_by_bitsandbytes._is_read.cache_clear()


def dequantized_scales(written) -> torch.Tensor:
    if written.nested_scales is None:
        return written.scales
    values = code_values("nested", torch.device("cpu"))[written.scales.long()]
    return values * written.nested_scales.repeat_interleave(256)[: values.numel()] + written.nested_offset


@torch.no_grad()
def test_files_hold_the_quantized_sum_and_its_loss_is_counted(tmp_path):
    """By the definition: every weight anew from the merged one, and the update as far as it is left."""
    folder, said, artifact, base = requantized(tmp_path)
    read, original = read_tiny(folder, "nf4", True), read_tiny(base, "nf4", True)
    layers = artifact.adapter.layers(torch.float32)
    error = kept = update = 0.0
    for name, layer in layers.items():
        before = original.get_submodule(name).weight.dense(torch.float32)
        delta = layer.delta(before)
        after = quantize(before + delta, "nf4", True).dequantize()
        torch.testing.assert_close(read.get_submodule(name).weight.dense(torch.float32), after, rtol=0, atol=0)
        error += float((after - before - delta).square().sum())
        kept += float(((after - before) * delta).sum())
        update += float(delta.square().sum())
    assert said["adapted_weights"] == len(layers) == said["quantized_weights"]
    assert said["relative_error"] == pytest.approx((error / update) ** 0.5, rel=1e-4)
    assert said["update_kept"] == pytest.approx(kept / update, rel=1e-4)


def test_onto_the_original_weights_a_small_update_survives_on_average(tmp_path):
    """Onto the dequantized ones, which lie on the values that there are, nearly nothing does."""
    base = write_chat_base("llama", tmp_path / "base")
    folder = write_adapter(tmp_path / "adapter", base, lora_alpha=0.02)
    artifact = artifact_of(folder)
    said = {}
    for onto in ("dequantized", "original"):
        (tmp_path / onto).mkdir()
        merged = dataclasses.replace(merged_of(artifact, base), base=onto)
        said[onto] = write_requantized(artifact, plain(merged), tmp_path / onto)
    assert abs(said["dequantized"]["update_kept"]) < 0.1
    assert 0.7 < said["original"]["update_kept"] < 1.3


def test_a_small_update_is_rounded_away_and_a_lossless_one_is_not():
    loss, exact = UpdateLoss(), UpdateLoss()
    grid = quantize(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), "nf4", False).dequantize()
    small = torch.full_like(grid, 1e-4)
    loss.add(quantize(grid + small, "nf4", False).dequantize(), grid + small, small)
    exact.add(grid + small, grid + small, small)
    assert loss.figures()["update_kept"] < 0.2 and loss.figures()["relative_error"] > 0.9
    assert exact.figures() == {"relative_error": 0.0, "update_kept": 1.0, "adapted_weights": 1}
    assert UpdateLoss().figures()["update_kept"] is None


def test_weights_that_were_fully_trained_stay_whole(tmp_path):
    folder, said, artifact, _ = requantized(
        tmp_path, adapter={"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "o_proj"]}
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    whole = artifact.adapter.replaced_tensors()
    for name in ("lm_head", "model.layers.1.self_attn.o_proj"):
        assert type(model.get_submodule(name)) is torch.nn.Linear
        torch.testing.assert_close(model.get_submodule(name).weight, whole[f"{name}.weight"], rtol=0, atol=0)
    assert (said["adapted_weights"], said["quantized_weights"], said["unquantized_weights"]) == (2, 12, 2)
    assert logits_by_bitsandbytes(folder).isfinite().all()


def test_shards_and_repetition(tmp_path):
    folder, said, _, _ = requantized(tmp_path / "a", max_shard_size=60_000)
    assert len(said["files"]) > 1 and said["bytes"] <= sum((folder / name).stat().st_size for name in said["files"])
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert set(index["weight_map"].values()) == set(said["files"])
    again, _, _, _ = requantized(tmp_path / "b", max_shard_size=60_000)
    assert [(folder / name).read_bytes() for name in said["files"]] == [
        (again / name).read_bytes() for name in said["files"]
    ]
    logits_by_bitsandbytes(folder)


def test_a_model_without_linear_modules_is_refused(tmp_path):
    base = write_chat_base("llama", tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    artifact = artifact_of(adapter)
    merged = merged_of(artifact, base)
    merged.slots = {}
    (tmp_path / "nf4").mkdir()
    with pytest.raises(UserError, match="transformers quantizes no weight of a llama model"):
        write_requantized(artifact, plain(merged), tmp_path / "nf4")
