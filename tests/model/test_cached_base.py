"""A quantized base cached on disk: the same bits, read without quantizing, and found only for what it was made from."""

from __future__ import annotations

import itertools
import json
import os
import time

import pytest
import torch
from multimodal_models import MULTIMODAL, write_multimodal
from stored_models import write_fp8, write_mxfp4
from tiny_models import FAMILIES, logits, read_tiny, tokens, write_tiny

from qlora_tool.build.open import open_model
from qlora_tool.config import ModelConfig
from qlora_tool.files.hashes import file_hashes
from qlora_tool.model import slots as slots_module
from qlora_tool.model.cached_base import base_identity, cached_base, write_cached_base
from qlora_tool.model.slots import Quantization

NF4 = Quantization("nf4")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def keep(folder, quantization=NF4):
    model = read_tiny(folder, quantization.kind, quantization.double_quant)
    return model, write_cached_base(model, folder, quantization, torch.float32)


# Other kinds where a form of its own is cached: turned weights, experts, tied ones.
@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *((family, "nf4") for family in FAMILIES),
        *itertools.product(("llama-tied", "gpt2", "gpt_oss", "mixtral"), ("fp4", "int8", "none")),
    ],
)
def test_the_cached_base_is_the_same_bit_for_bit_and_quantizes_nothing(family, kind, tmp_path, monkeypatch):
    quantization = Quantization(kind)
    folder = write_tiny(family, tmp_path / "model", dtype=torch.bfloat16)
    first, _ = keep(folder, quantization)
    monkeypatch.setattr(slots_module, "quantize", None)
    second = read_tiny(folder, kind, checkpoint=cached_base(folder, quantization, torch.float32))
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
    # Tied parameters are counted once in both.
    assert {name for name, _ in first.named_parameters()} == {name for name, _ in second.named_parameters()}
    assert torch.equal(logits(first, tokens()), logits(second, tokens()))


def test_it_is_smaller_and_holds_tied_weights_once(tmp_path):
    folder = write_tiny("llama-tied", tmp_path / "model", dtype=torch.bfloat16, hidden_size=256, intermediate_size=512)
    model, cached = keep(folder)
    stored = cached_base(folder, NF4, torch.float32)
    assert "lm_head.weight" not in stored
    assert "model.embed_tokens.weight" in stored
    linear = sum(parameter.numel() for name, parameter in read_tiny(folder).named_parameters() if "_proj" in name)
    before, after = (sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in (folder, cached))
    # 2 bytes a weight became 0.5 and a share of the scales; beside them, tables of values and headers of each weight.
    assert before - after > linear * (2 - 0.52) - 14 * 3000
    assert model is not None


def test_nothing_is_found_where_nothing_was_cached(tmp_path):
    assert cached_base(write_tiny("llama", tmp_path), NF4, torch.float32) is None


def test_it_is_found_only_for_the_same_quantization_and_products(tmp_path):
    folder = write_tiny("llama", tmp_path / "model")
    _, path = keep(folder)
    assert cached_base(folder, NF4, torch.float32).folder == path
    for other in (Quantization("nf4", False), Quantization("fp4"), Quantization("int8"), Quantization("none")):
        assert cached_base(folder, other, torch.float32) is None
    # Small tensors and wide embeddings have the dtype of matrix products: another one would read rounded values.
    assert cached_base(folder, NF4, torch.bfloat16) is None


@pytest.mark.parametrize("published", ["fp8", "mxfp4", "gemma3", "qwen3_vl"])
def test_a_published_base_is_cached_as_it_was_read(published, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    if published in MULTIMODAL:
        write_multimodal(published, folder)
    else:
        write_fp8("llama", folder) if published == "fp8" else write_mxfp4(folder)
    first, _ = keep(folder)
    monkeypatch.setattr(slots_module, "quantize", None)
    second = read_tiny(folder, "nf4", checkpoint=cached_base(folder, NF4, torch.float32))
    assert torch.equal(logits(first, tokens() % 119), logits(second, tokens() % 119))


def test_what_is_not_quantized_tells_bases_apart(tmp_path):
    folder = write_tiny("llama", tmp_path / "model")
    keep(folder)
    for names in (("o_proj",), ("model.layers.0",), "as-peft"):
        assert cached_base(folder, Quantization(skip_modules=names), torch.float32) is None


def test_int8_has_no_double_quantization_to_tell_apart(tmp_path):
    folder = write_tiny("llama", tmp_path / "model")
    keep(folder, Quantization("int8", True))
    assert cached_base(folder, Quantization("int8", False), torch.float32) is not None


def touch(path) -> None:
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def other_bytes_of_the_same_time(path) -> None:
    """As an archive with fixed times leaves them, or `cp -p`."""
    stat = path.stat()
    time.sleep(0.02)  # some file systems count by ticks
    path.write_bytes(path.read_bytes()[:-4] + b"1234")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: touch(folder / "model.safetensors"),
        lambda folder: touch(folder / "config.json"),
        lambda folder: other_bytes_of_the_same_time(folder / "model.safetensors"),
        lambda folder: (folder / "added.safetensors").write_bytes(b"12345678"),
        lambda folder: (folder / "generation_config.json").unlink(),
    ],
)
def test_a_folder_whose_files_changed_is_another_base(tmp_path, change):
    folder = write_tiny("llama", tmp_path / "model")
    keep(folder)
    identity = base_identity(folder)
    change(folder)
    assert base_identity(folder) != identity
    assert cached_base(folder, NF4, torch.float32) is None


def test_a_file_that_is_no_part_of_the_model_changes_nothing(tmp_path):
    folder = write_tiny("llama", tmp_path / "model")
    keep(folder)
    (folder / "README.md").write_text("new")
    assert cached_base(folder, NF4, torch.float32) is not None


def test_opening_a_model_keeps_it_and_finds_it_again(tmp_path, monkeypatch):
    folder = write_tiny("llama", tmp_path / "model")
    config = ModelConfig(
        name_or_path=str(folder), quantization="nf4", compute_dtype="float32", device="cpu", keep_quantized=True
    )
    first = open_model(config)
    assert cached_base(folder, NF4, torch.float32) is not None
    monkeypatch.setattr(slots_module, "quantize", None)
    second = open_model(config)
    assert torch.equal(logits(first.module, tokens()), logits(second.module, tokens()))


def test_without_being_asked_nothing_is_cached(tmp_path, cache):
    folder = write_tiny("llama", tmp_path / "model")
    config = ModelConfig(
        name_or_path=str(folder), quantization="nf4", compute_dtype="float32", device="cpu", keep_quantized=False
    )
    open_model(config)
    assert not (cache / "bases").exists()


def test_hashes_are_of_the_bytes_and_computed_once(tmp_path, monkeypatch, cache):
    import hashlib

    from qlora_tool.files import hashes as hashes_module

    folder = write_tiny("llama", tmp_path / "model")
    expected = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in
                ("config.json", "model.safetensors")}  # fmt: skip
    assert file_hashes(folder) == expected
    monkeypatch.setattr(hashes_module, "sha256", None)
    assert file_hashes(folder) == expected
    monkeypatch.undo()
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(cache))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    assert file_hashes(folder)["config.json"] == hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()


@pytest.mark.parametrize("content", ["", "[]", '"x"', "{"])
def test_a_broken_file_of_hashes_is_made_anew(tmp_path, cache, content):
    folder = write_tiny("llama", tmp_path / "model")
    expected = file_hashes(folder)
    (cache / "hashes.json").write_text(content)
    assert file_hashes(folder) == expected
