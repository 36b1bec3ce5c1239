"""Checkpoint names to module names and back, against the files that transformers writes."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, read_tiny, tiny_config, write_tiny

from qlora_tool.files.tensors import Checkpoint
from qlora_tool.model.load import build_skeleton
from qlora_tool.model.names import plan_load, plan_save
from qlora_tool.model.parameter_source import ParameterSource


def plan(family: str, folder, **changes):
    """A skeleton, its checkpoint and the plan that brings them together."""
    checkpoint = Checkpoint(write_tiny(family, folder, **changes))
    skeleton = build_skeleton(tiny_config(family, **changes))
    return skeleton, checkpoint, plan_load(skeleton, list(checkpoint))


@pytest.mark.parametrize("family", FAMILIES)
def test_module_tensors_go_back_to_the_checkpoints_names_and_bits(family, tmp_path):
    checkpoint = Checkpoint(write_tiny(family, tmp_path))
    skeleton = build_skeleton(tiny_config(family))
    source = ParameterSource(skeleton, checkpoint, "cpu")
    assert len(set(source.names)) == len(source.names)
    tensors = {name: source.read(name) for name in source.names}
    written = {}
    for group in plan_save(skeleton, source.names):
        made = group.convert(skeleton, tensors)
        assert not made.keys() & written.keys()
        written |= made
    assert written.keys() == set(checkpoint)
    for name, tensor in written.items():
        expected = checkpoint.read(name)
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_the_checkpoint_has_one_place(family, tmp_path):
    skeleton, checkpoint, found = plan(family, tmp_path)
    assert found.unexpected == []
    assert sorted(name for group in found.groups for _, name in group.sources) == sorted(checkpoint)
    targets = [target for group in found.groups for target in group.targets()]
    assert len(set(targets)) == len(targets)
    assert set(targets) <= skeleton.state_dict().keys()


def test_an_ordinary_family_is_read_tensor_by_tensor(tmp_path):
    skeleton, checkpoint, found = plan("llama", tmp_path)
    assert [group.target for group in found.groups] == sorted(checkpoint)
    assert all(group.converter is None and len(group.sources) == 1 for group in found.groups)
    assert [group.names for group in plan_save(skeleton, list(checkpoint))] == [[name] for name in sorted(checkpoint)]


def test_layers_come_in_their_own_order_not_the_alphabets(tmp_path):
    _, _, found = plan("llama", tmp_path, num_hidden_layers=11)
    layers = [int(group.target.split(".")[2]) for group in found.groups if ".layers." in group.target]
    assert layers == sorted(layers)
    assert layers[-1] == 10


def test_mixtrals_experts_are_one_group_a_layer_in_the_order_of_the_experts(tmp_path):
    count = 11  # expert 10 comes after expert 9, not after expert 1
    skeleton, checkpoint, found = plan("mixtral", tmp_path, num_local_experts=count, num_experts=count)
    assert "model.layers.0.block_sparse_moe.experts.10.w1.weight" in checkpoint
    fused = {group.target: group for group in found.groups if group.converter is not None}
    assert sorted(fused) == [f"model.layers.{layer}.mlp.experts.{part}" for layer in (0, 1)
                             for part in ("down_proj", "gate_up_proj")]  # fmt: skip
    group = fused["model.layers.1.mlp.experts.gate_up_proj"]
    assert len(group.sources) == 2 * count

    prefix = "model.layers.1.block_sparse_moe.experts"
    expected = torch.stack([
        torch.cat([checkpoint.read(f"{prefix}.{index}.w1.weight"), checkpoint.read(f"{prefix}.{index}.w3.weight")])
        for index in range(count)
    ])  # fmt: skip
    asked = []
    converted = group.convert(skeleton, lambda name: asked.append(name) or checkpoint.read(name))
    assert converted.keys() == {group.target}
    assert torch.equal(converted[group.target], expected)
    assert sorted(asked) == sorted(name for _, name in group.sources)  # each of its own, once


def test_a_checkpoint_with_other_names_for_the_same_modules_goes_back_to_its_own(tmp_path):
    """A body saved alone has no prefix; what is written for it has none either."""
    from tiny_models import tiny_model

    tiny_model("qwen2").base_model.save_pretrained(tmp_path)
    skeleton, checkpoint = build_skeleton(tiny_config("qwen2")), Checkpoint(tmp_path)
    assert "embed_tokens.weight" in checkpoint
    found = plan_load(skeleton, list(checkpoint))
    assert found.unexpected == []
    assert {group.target for group in found.groups} == {f"model.{name}" for name in checkpoint}


def test_what_fits_nowhere_is_listed(tmp_path):
    skeleton = build_skeleton(tiny_config("llama"))
    names = ["model.norm.weight", "model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq", "odd"]
    found = plan_load(skeleton, names)
    assert [group.target for group in found.groups] == ["model.norm.weight"]
    assert found.unexpected == ["odd"]


def test_planning_twice_on_one_skeleton_changes_nothing(tmp_path):
    skeleton, checkpoint, first = plan("qwen3_moe", tmp_path)
    again = plan_load(skeleton, list(checkpoint))
    assert [(g.target, g.sources) for g in again.groups] == [(g.target, g.sources) for g in first.groups]
    assert read_tiny(tmp_path) is not None
