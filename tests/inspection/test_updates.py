"""What `inspect` says of an adapter, against numpy on the merged weights and values by hand."""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_adapters import artifact_of, write_adapter, write_peft_adapter
from tiny_models import write_tiny

from qlora_tool import inspect
from qlora_tool.errors import UserError
from qlora_tool.inspection.spectrum import Spectrum
from qlora_tool.inspection.table import lines_of
from qlora_tool.inspection.updates import (
    SETTLED,
    ModuleUpdate,
    inspect_adapter,
    kind_of,
    open_adapter,
    update_factors,
    verdict,
)
from qlora_tool.methods import METHODS

Q_PROJ = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("bases") / "llama")


def numpys(delta: np.ndarray, count: int) -> np.ndarray:
    return np.linalg.svd(delta, compute_uv=False)[:count]


def stored(adapter: Path, module: str, *suffixes: str) -> list[np.ndarray]:
    tensors = load_file(adapter / "adapter_model.safetensors")
    return [tensors[f"base_model.model.{module}.{suffix}"].double().numpy() for suffix in suffixes]


@pytest.mark.parametrize(
    ("settings", "scale"),
    [({}, 2.0), ({"use_rslora": True, "alpha_pattern": {"q_proj": 3}}, 3 / 2)],
)
def test_lora_is_numpys_svd_of_sBA_and_norms_are_of_what_was_trained_against(base, tmp_path, settings, scale):
    adapter = write_adapter(tmp_path / "a", base, double_quant=False, **settings)  # r 4, alpha 8
    found = {module.name: module for module in inspect_adapter(artifact_of(adapter)).modules}
    A, B = stored(adapter, Q_PROJ, "lora_A.weight", "lora_B.weight")
    expected = numpys(scale * B @ A, 4)
    np.testing.assert_allclose(found[Q_PROJ].spectrum.values, expected, rtol=1e-12)
    weight = load_file(base / "model.safetensors")[f"{Q_PROJ}.weight"]
    dense = bnb.dequantize_4bit(*bnb.quantize_4bit(weight, quant_type="nf4"))
    assert found[Q_PROJ].weight_norm == pytest.approx(float(dense.double().norm()), rel=1e-6)
    assert found[Q_PROJ].ratio == pytest.approx(float(np.linalg.norm(expected) / dense.double().norm()), rel=1e-6)
    assert len(found) == 14 and all(module.r == 4 for module in found.values())


@pytest.mark.parametrize("r", [2, 12])  # r² below the matrix, and above it
def test_loha_has_the_singular_values_of_its_whole_update(base, tmp_path, r):
    adapter = write_adapter(tmp_path / "a", base, method="loha", r=r, lora_alpha=3)
    found = {module.name: module for module in inspect_adapter(artifact_of(adapter)).modules}
    a1, b1, a2, b2 = stored(adapter, Q_PROJ, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    expected = numpys(3 / r * (a1 @ b1) * (a2 @ b2), r * r)
    np.testing.assert_allclose(found[Q_PROJ].spectrum.values, expected, rtol=1e-5, atol=1e-6 * expected[0])
    assert inspect_adapter(artifact_of(adapter)).rows[0].verdict == ""  # r is not the rank that it can have


def test_embeddings_and_every_expert_are_looked_at(base, tmp_path):
    """Against numpy's decomposition of what merging adds to each matrix."""
    folder = write_tiny("qwen3_moe", tmp_path / "base")
    settings = {"target_modules": ["embed_tokens", "q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    artifact = artifact_of(write_adapter(tmp_path / "a", folder, quantization="none", **settings))
    found = {module.name: module for module in inspect_adapter(artifact).modules}
    opened = open_adapter(artifact)
    counted = 0
    for name, layer in opened.layers.items():
        weight = opened.weights(name)
        deltas = layer.delta(weight.clone()).detach().double()
        for index, delta in enumerate(deltas if deltas.dim() == 3 else [deltas]):
            module = found[f"{name}.{index}" if deltas.dim() == 3 else name]
            own = weight[index] if deltas.dim() == 3 else weight
            np.testing.assert_allclose(module.spectrum.values, numpys(delta.numpy(), 4), rtol=2e-5)
            assert module.weight_norm == pytest.approx(float(own.double().norm()), rel=1e-6)
            assert (module.out_features, module.in_features) == tuple(delta.shape)
            counted += 1
    assert counted == len(found) > len(opened.layers)
    assert "mlp.experts.down_proj.*" in {module.kind for module in found.values()}


def test_dora_has_ranks_of_its_low_rank_part_and_the_norm_of_all_of_it(base, tmp_path):
    adapter = write_adapter(tmp_path / "a", base, method="dora", quantization="none")
    inspection = inspect_adapter(artifact_of(adapter))
    found = next(module for module in inspection.modules if module.name == Q_PROJ)
    A, B, m = stored(adapter, Q_PROJ, "lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    weight = load_file(base / "model.safetensors")[f"{Q_PROJ}.weight"].double().numpy()
    direction = weight + 2 * B @ A
    whole = m[:, None] / np.linalg.norm(direction, axis=1, keepdims=True) * direction - weight
    np.testing.assert_allclose(found.spectrum.values, numpys(2 * B @ A, 4), rtol=1e-12)
    assert found.update_norm == pytest.approx(np.linalg.norm(whole), rel=1e-5)
    assert not inspection.additive and "of s·BA, its low-rank part" in "\n".join(lines_of(inspection))


def test_factors_of_every_method_multiply_to_its_delta(base, tmp_path):
    """None is wider than the update itself."""
    for name, method in ((name, method) for name, method in METHODS.items() if method.has_delta):
        adapter = write_adapter(tmp_path / name, base, method=name, r=2)
        opened = open_adapter(artifact_of(adapter))
        for module, layer in opened.layers.items() if method.additive else ():
            ((factor_B, factor_A),) = update_factors(layer, opened.shapes[module])
            expected = layer.delta(torch.zeros(opened.shapes[module]))
            torch.testing.assert_close((factor_B @ factor_A).float(), expected, rtol=1e-5, atol=1e-5)
            assert factor_B.shape[1] <= min(opened.shapes[module])


# ------------------------------------------------------------------------------------------------------ what is said


def update(values: tuple[float, ...], r: int) -> ModuleUpdate:
    return ModuleUpdate("layers.0.q", "q", 8, 8, r, None, None, Spectrum(values))


@pytest.mark.parametrize(
    ("spectra", "said"),
    [
        ([(1.0,) * 8], "may be too small"),  # 8 of 8 for 90 %
        ([(1.0,) * 8, (1.0, *[0.0] * 7)], "too small? (1 of 2)"),
        ([(9.0, *[0.1] * 7), (1.0, 1.0, *[0.0] * 6)], "half unused: 2 would do"),
        ([(1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0)], "fits"),  # 5 of 8
        ([(0.0,) * 8], "no update"),
    ],
)
def test_what_the_ranks_say(spectra, said):
    assert verdict([update(values, 8) for values in spectra]) == said


@pytest.mark.parametrize(
    ("step", "early"), [(1, "1 step"), (SETTLED - 1, f"{SETTLED - 1} steps"), (SETTLED, ""), (None, "")]
)
def test_of_a_run_too_short_nothing_is_said_of_its_rank(base, tmp_path, step, early):
    """But that it is too early; nor is a lower rank to be cut to named."""
    adapter = write_adapter(tmp_path / "a", base)
    facts = json.loads((adapter / "qlora_tool.json").read_text())
    (adapter / "qlora_tool.json").write_text(json.dumps(facts | ({} if step is None else {"step": step})))
    found = inspect_adapter(artifact_of(adapter))
    lines = lines_of(found)
    said = [line for line in lines if "too early to tell" in line]
    line = f"whether r fits: too early to tell after {early}; train for {SETTLED} or more"
    assert said == ([line] if early else []) and found.early is bool(early)
    assert any("what that says of r" in line for line in lines) is not bool(early)
    assert all(row.verdict for row in found.rows) is not bool(early)
    assert found.as_json()["steps"] == step


def test_kinds_are_names_without_their_layer():
    names = {"model.layers.11.mlp.up_proj": "mlp.up_proj", "transformer.h.0.attn.c_attn": "attn.c_attn",
             "lm_head": "lm_head", "layers.3.experts.7.w1": "experts.*.w1"}  # fmt: skip
    assert {name: kind_of(name) for name in names} == names


def test_one_screen_by_kind_and_a_line_each_where_asked(base, tmp_path):
    adapter = write_adapter(tmp_path / "a", base, modules_to_save=["lm_head"], rank_pattern={"q_proj": 2})
    inspection = inspect_adapter(artifact_of(adapter))
    assert [(row.name, row.count, row.ranks) for row in inspection.rows if "q_proj" in row.name] == [
        ("q_proj", 2, (2, 2))
    ]
    assert sum(row.share for row in inspection.rows) == pytest.approx(1)
    lines = lines_of(inspection)
    assert len(lines) < 24 and max(map(len, lines[2:])) <= 100
    assert lines[-1] == "trained whole, without a rank: 1 tensor (lm_head.weight)"
    assert len(inspect_adapter(artifact_of(adapter), every_module=True).rows) == 14


def test_what_one_rank_keeps_of_all(base, tmp_path):
    found = inspect_adapter(artifact_of(write_adapter(tmp_path / "a", base)))
    squares = [[value * value for value in module.spectrum.values] for module in found.modules]
    total = sum(map(sum, squares))
    expected = [sum(sum(one[:r]) for one in squares) / total for r in range(1, 5)]
    assert [found.kept(r) for r in range(1, 5)] == pytest.approx(expected)
    assert found.needed == 1 + sum(kept < 0.9 for kept in expected)


def test_without_the_base_or_with_another_norms_are_left_out_and_it_is_said(base, tmp_path):
    adapter = write_adapter(tmp_path / "a", base)
    facts = json.loads((adapter / "qlora_tool.json").read_text())
    for place, changed in (("gone", facts["base"] | {"name_or_path": str(tmp_path / "gone")}),
                           ("SHA-256 differs", facts["base"] | {"files": {"model.safetensors": "0"}})):  # fmt: skip
        (adapter / "qlora_tool.json").write_text(json.dumps(facts | {"base": changed}))
        found = inspect_adapter(artifact_of(adapter))
        assert place in (found.no_base or "") and all(module.weight_norm is None for module in found.modules)
        assert all(module.update_norm for module in found.modules)
        assert lines_of(found)[1].startswith("|W0| is left out: ")


def test_pefts_own_adapter_needs_no_word_of_the_quantization(base, tmp_path):
    adapter = write_peft_adapter(tmp_path / "a", base, base_model_name_or_path=str(base))
    assert inspect(adapter).inspection.modules[0].ratio is not None
    with pytest.raises(UserError, match="how the base was quantized"):
        inspect(adapter, truncate=1, output_dir=tmp_path / "cut")


@pytest.mark.parametrize("method", ["full", "llama_adapter"])
def test_what_has_no_update_beside_the_weights_is_refused(base, tmp_path, method):
    adapter = write_adapter(tmp_path / "a", base, method=method, quantization="none")
    with pytest.raises(UserError) as caught:
        inspect(adapter)
    assert len(caught.value.lines) == 1 and method in caught.value.lines[0]


def test_an_update_that_is_no_number_is_refused(base, tmp_path):
    adapter = write_adapter(tmp_path / "a", base)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[f"base_model.model.{Q_PROJ}.lora_B.weight"][0, 0] = float("nan")
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1 of its 28 tensors .*q_proj.lora_B.weight"):
        artifact_of(adapter)
