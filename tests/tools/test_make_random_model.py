"""Checkpoints of random weights: they load in transformers as real ones do, are as announced, repeat byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from making.random_model import SHAPES, checkpoint_tensors, model_config
from measuring.command import main


def make(folder: Path, *options: object) -> int:
    return main("making", ["random-model", str(folder), *map(str, options)])


def load(folder: Path):
    """The model, by transformers alone, and what its loader complains of."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    return model, {kind: names for kind, names in info.items() if names}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder by name, read by the safetensors library."""
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-mixtral"])
def test_loads_in_transformers(tmp_path: Path, shape: str):
    folder = tmp_path / shape
    assert make(folder, "--shape", shape, "--max-shard-size", "100KB") == 0
    model, complaints = load(folder)
    assert complaints == {}
    assert model.dtype == torch.bfloat16
    assert model(torch.arange(8).unsqueeze(0)).logits.isfinite().all()

    tensors = stored(folder)
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(p.numel() for p in model.parameters())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert len(set(index["weight_map"].values())) == len(list(folder.glob("*.safetensors"))) > 1
    largest = max(tensor.nbytes for tensor in tensors.values())
    assert all(file.stat().st_size < max(100_000, largest) + 10_000 for file in folder.glob("*.safetensors"))


def test_experts_have_matrices_of_their_own(tmp_path: Path):
    make(tmp_path / "m", "--shape", "tiny-mixtral", "--layers", "1")
    names = stored(tmp_path / "m").keys()
    # As in the files of mistralai/Mixtral-8x7B-v0.1.
    experts = {f"model.layers.0.block_sparse_moe.experts.{e}.{w}.weight" for e in range(4) for w in ("w1", "w2", "w3")}
    assert experts <= names
    assert "model.layers.0.block_sparse_moe.gate.weight" in names
    assert not any(name.startswith("model.layers.1.") for name in names)


def test_weights_are_as_announced(tmp_path: Path):
    config = {"model_type": "qwen2", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128,
              "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
              "layer_types": ["full_attention"] * 3 + ["sliding_attention"], "sliding_window": 8,
              "use_sliding_window": True}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ["--config", str(tmp_path / "config.json"), "--layers", "6", "--dtype", "float32", "--json"]
    make(tmp_path / "q", *arguments, tmp_path / "figures.json")
    tensors = stored(tmp_path / "q")
    assert "lm_head.weight" not in tensors  # tied: files on the hub do not have it either
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    for name, tensor in tensors.items():
        if tensor.dim() > 1:
            assert float(tensor.mean().abs()) < 0.002 and float(tensor.std()) == pytest.approx(0.02, rel=0.05)
        else:
            assert (tensor == (0.0 if name.endswith("bias") else 1.0)).all()
    values = [tensor.flatten()[:8] for tensor in tensors.values() if tensor.dim() > 1]
    assert len({tuple(value.tolist()) for value in values}) == len(values)  # no two drawn alike
    model, complaints = load(tmp_path / "q")
    assert complaints == {} and model.config.num_hidden_layers == 6
    assert model.config.layer_types == ["full_attention"] * 3 + ["sliding_attention"] + ["full_attention"] * 2
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["parameters"] == sum(p.numel() for p in model.parameters())
    assert figures["bytes"] == 4 * figures["parameters"]


def test_same_seed_same_bytes(tmp_path: Path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make(tmp_path / name, "--shape", "tiny-llama", "--seed", seed, "--max-shard-size", "200KB")
    files = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in "abc"]
    assert files[0] == files[1]
    assert files[0].keys() == files[2].keys()
    first, other = stored(tmp_path / "a"), stored(tmp_path / "c")
    assert not any(torch.equal(first[name], other[name]) for name in first if first[name].dim() > 1)


@pytest.mark.parametrize(("shape", "count", "parameters"), [  # as on the hub
    ("llama-2-7b", 291, 6_738_415_616), ("llama-2-70b", 723, 68_976_648_192),
])  # fmt: skip
def test_llama_2_has_its_shapes(shape: str, count: int, parameters: int):
    tensors = checkpoint_tensors(model_config(SHAPES[shape]), torch.bfloat16)
    assert len(tensors) == count and sum(tensor.numel() for tensor in tensors.values()) == parameters
    assert all(tensor.is_meta for tensor in tensors.values() if tensor.dim() > 1)  # nothing large is held


def test_what_exists_is_left_alone(tmp_path: Path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "kept").write_text("mine")
    assert make(folder, "--shape", "tiny-llama") == 2
    assert capsys.readouterr().err.startswith(f"error: {folder}: exists already")
    assert (folder / "kept").read_text() == "mine"
    assert make(folder, "--shape", "tiny-llama", "--overwrite") == 0
    assert not (folder / "kept").exists() and (folder / "config.json").exists()


def test_a_configuration_of_nothing_known(tmp_path: Path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "lama"}')
    assert make(tmp_path / "m", "--config", tmp_path / "config.json") == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'config.json'}: model_type 'lama'")
    assert not (tmp_path / "m").exists()
