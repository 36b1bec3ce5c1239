"""The calibrated start against the closed form on inputs that plain transformers gives, layer by layer in memory."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from tiny_models import read_by_transformers, tokens, write_tiny
from torch import Tensor, nn

from qlora_tool.adapters import calibration
from qlora_tool.adapters.calibration import calibrated, calibration_batch
from qlora_tool.build.open import open_model
from qlora_tool.config import Config, with_values
from qlora_tool.data.examples import Example
from qlora_tool.model.load import read_unquantized
from qlora_tool.model.source import read_model_config
from qlora_tool.weights.handles import WeightHandle
from qlora_tool.weights.modules import FrozenLinear

R = 4


def config_of(folder: Path, **adapter) -> Config:
    return Config.model_validate({
        "model": {"name_or_path": str(folder), "device": "cpu", "compute_dtype": "float32"},
        "adapter": {"r": R, "lora_alpha": 12, "init_lora_weights": "calibrated", **adapter},
        "data": {"max_length": 24},
    })  # fmt: skip


def examples_of(rows: Tensor) -> list[Example]:
    return [Example(row, row, "row") for row in rows.tolist()]


def started(folder: Path, config: Config, rows: Tensor):
    model = open_model(config.model)
    read = read_unquantized(folder, read_model_config(folder), torch.device("cpu"))
    return model, *calibrated(model, config, examples_of(rows), read)


def inputs_of(folder: Path, rows: Tensor) -> dict[str, Tensor]:
    """What every linear module of plain transformers' model gets, (tokens, in)."""
    model, seen = read_by_transformers(folder), {}

    def note(name: str):
        return lambda _, inputs: seen.__setitem__(name, inputs[0].detach().reshape(-1, inputs[0].shape[-1]))

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            module.register_forward_pre_hook(note(name))
    with torch.no_grad():
        model(input_ids=rows, use_cache=False)
    return seen


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_every_module_gets_the_closed_form_of_its_own_inputs_in_16_bits(family, tmp_path):
    """Conv1D included; beside experts the attention alone."""
    folder, rows = write_tiny(family, tmp_path), tokens(rows=16, length=24, seed=3)
    model, found, left = started(folder, config_of(folder), rows)
    inputs, reference = inputs_of(folder, rows), read_by_transformers(folder)
    assert not left and len(found) >= 8
    for name, tensors in found.items():
        weight = reference.get_parameter(f"{name}.weight").detach()
        module = model.module.get_submodule(name)
        error = (weight.T if module.transposed else weight) - module.weight.dense(torch.float32)
        x = inputs[name].double().numpy()
        _, sizes, _ = numpy.linalg.svd(error.double().numpy() @ x.T, full_matrices=False)
        best = numpy.sqrt((sizes[R:] ** 2).sum())  # no B·A of rank R leaves less of error·x
        assert best > 0.01
        rest = error.double().numpy() - 3.0 * (tensors["lora_B"] @ tensors["lora_A"]).double().numpy()
        assert numpy.linalg.norm(rest @ x.T) == pytest.approx(best, rel=1e-4), name


def test_the_model_is_as_it_was_afterwards(tmp_path):
    folder, rows = write_tiny("llama", tmp_path), tokens(rows=4, length=24)
    model, _, _ = started(folder, config_of(folder), rows)
    plain = open_model(config_of(folder).model)
    with torch.no_grad():
        found, expected = (one.module(input_ids=rows, use_cache=False).logits for one in (model, plain))
    assert torch.equal(found, expected)
    modules = list(model.module.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in modules)
    assert not any(module._held is not None for module in modules if isinstance(module, WeightHandle))


def test_one_layer_at_a_time_is_in_16_bits(tmp_path, monkeypatch):
    folder, rows = write_tiny("llama", tmp_path), tokens(rows=4, length=24)
    lent: set[int] = set()
    most = 0

    def lend(self, value, lend=WeightHandle.lend):
        nonlocal most
        lent.add(id(self))
        most = max(most, len(lent))
        lend(self, value)

    def release(self, release=WeightHandle.release):
        lent.discard(id(self))
        release(self)

    monkeypatch.setattr(WeightHandle, "lend", lend)
    monkeypatch.setattr(WeightHandle, "release", release)
    started(folder, config_of(folder), rows)
    assert most == 7 and not lent  # q, k, v, o, gate, up, down


def test_what_is_not_quantized_or_not_in_a_layer_is_left_and_named(tmp_path):
    folder, rows = write_tiny("llama", tmp_path), tokens(rows=4, length=24)
    config = config_of(folder, target_modules=["q_proj", "lm_head"])
    config = with_values(config, {"model.skip_modules": ["model.layers.0.self_attn"]})
    _, found, left = started(folder, config, rows)
    assert set(left) == {"lm_head", "model.layers.0.self_attn.q_proj"}
    assert set(found) == {"model.layers.1.self_attn.q_proj"}


def test_rows_are_cut_into_blocks_without_padding(monkeypatch):
    examples = [Example(list(range(begin, begin + 7)), [], "row") for begin in range(0, 70, 7)]
    batch = calibration_batch(examples, rows=5, length=8)
    assert batch.attention_mask is None and batch.input_ids.tolist() == [list(range(i, i + 8)) for i in (0, 8, 16, 24)]
    monkeypatch.setattr(calibration, "MOST_TOKENS", 20)
    assert calibration_batch(examples, rows=10, length=8).input_ids.shape == (2, 8)
    assert calibration_batch(examples[:1], rows=10, length=100).input_ids.shape == (1, 7)


def test_it_leaves_less_of_the_outputs_than_loftq_and_nf4_alone_on_rows_it_has_not_seen(tmp_path):
    folder = write_tiny("llama", tmp_path)
    rows, others = tokens(rows=40, length=24, seed=3), tokens(rows=40, length=24, seed=4)
    model, found, _ = started(folder, config_of(folder), rows)
    inputs, reference = inputs_of(folder, others), read_by_transformers(folder)
    better = 0
    for name, tensors in found.items():
        module = model.module.get_submodule(name)
        assert isinstance(module, FrozenLinear)
        error = reference.get_parameter(f"{name}.weight").detach() - module.weight.dense(torch.float32)
        left, sizes, right = torch.linalg.svd(error, full_matrices=False)
        plain, loftq = error, error - left[:, :R] * sizes[:R] @ right[:R]
        ours = error - 3.0 * tensors["lora_B"] @ tensors["lora_A"]
        sizes_of = [float((rest @ inputs[name].T).norm()) for rest in (plain, loftq, ours)]
        assert sizes_of[2] < sizes_of[0]
        better += sizes_of[2] < sizes_of[1]
    assert better >= len(found) - 2  # of random weights and tokens, whose inputs are nearly alike in all directions


def test_a_start_is_kept_with_the_base_for_the_same_model_data_and_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(tmp_path / "cache"))
    folder, rows = write_tiny("llama", tmp_path / "base"), tokens(rows=3, length=24)
    keep = {"model.keep_quantized": True}
    model, first, left = started(folder, with_values(config_of(folder), keep), rows)

    def again(changes: dict, rows: Tensor):
        def no_weight(name: str) -> Tensor:
            raise AssertionError(name)

        return calibrated(model, with_values(config_of(folder), keep | changes), examples_of(rows), no_weight)

    second, still_left = again({}, rows)
    assert still_left == left and second.keys() == first.keys()
    for name, tensors in first.items():
        assert all(torch.equal(second[name][key], tensor) for key, tensor in tensors.items())
    for changes, others in (({}, rows.flip(0)), ({"adapter.r": 2}, rows), ({"adapter.lora_alpha": 4}, rows),
                            ({"adapter.target_modules": ["q_proj"]}, rows)):  # fmt: skip
        with pytest.raises(AssertionError):
            again(changes, others)


@pytest.mark.parametrize("where", ["header", "values", "manifest", "cut", "no manifest"])
def test_a_kept_start_that_is_not_as_it_was_written_is_made_again(tmp_path, monkeypatch, caplog, where):
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(tmp_path / "cache"))
    folder, rows = write_tiny("llama", tmp_path / "base"), tokens(rows=3, length=24)
    config = with_values(config_of(folder), {"model.keep_quantized": True})
    _, first, left = started(folder, config, rows)
    [kept] = (tmp_path / "cache/bases").glob("calibrated-*")
    file = kept / ("manifest.json" if "manifest" in where else "model.safetensors")
    content = bytearray(file.read_bytes())
    if where == "no manifest":
        file.unlink()
    elif where == "cut":
        file.write_bytes(content[:-8])
    else:
        content[{"header": 12, "values": len(content) - 5, "manifest": 30}[where]] ^= 1
        file.write_bytes(content)
    _, second, still_left = started(folder, config, rows)
    assert "is not as it was written" in caplog.text and "it is made again" in caplog.text
    assert still_left == left and second.keys() == first.keys()
    for name, tensors in first.items():
        assert all(torch.equal(second[name][key], tensor) for key, tensor in tensors.items())
    assert kept.exists()
