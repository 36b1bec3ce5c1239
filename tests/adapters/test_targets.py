"""Which modules take an adapter and with what settings: as PEFT decides it on the same model."""

from __future__ import annotations

import peft
import pytest
from tiny_models import read_tiny, tiny_model, write_tiny

from qlora_tool.adapters.targets import find_targets, settings_for
from qlora_tool.config import AdapterConfig
from qlora_tool.errors import UserError
from qlora_tool.methods import METHODS


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory):
    """The frozen models, by family."""
    folder = tmp_path_factory.mktemp("models")
    return {family: read_tiny(write_tiny(family, folder / family)) for family in ("llama", "llama-tied", "gpt2")}


def peft_layers(family: str, **settings) -> dict[str, peft.tuners.lora.LoraLayer]:
    """PEFT's LoRA layers on the same model, by the name of their module."""
    model = peft.get_peft_model(tiny_model(family), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    return {
        name: module
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
CASES = [
    ("llama", {"target_modules": "all-linear"}, 14),
    ("llama-tied", {"target_modules": "all-linear"}, 14),  # the output layer is none of them, tied or not
    ("gpt2", {"target_modules": "all-linear"}, 8),
    ("gpt2", {"target_modules": ["c_proj"]}, 4),
    ("llama", {"target_modules": ["q_proj", "v_proj"]}, 4),
    ("llama", {"target_modules": ["lm_head", "q_proj"]}, 3),
    ("llama", {"target_modules": ["self_attn.q_proj", "model.layers.1.mlp.up_proj"]}, 3),
    ("llama", {"target_modules": r".*\.1\.(self_attn\.[qv]_proj|mlp\.up_proj)"}, 3),
    ("llama", {"target_modules": r".*_proj", "exclude_modules": r".*\.1\..*|.*mlp.*"}, 4),
    ("llama", {"target_modules": "all-linear", "exclude_modules": ["o_proj", "model.layers.0.mlp.up_proj"]}, 11),
    ("llama", {"target_modules": "all-linear", "modules_to_save": ["o_proj"]}, 12),
    ("llama", {"target_modules": "all-linear", "modules_to_save": ["mlp"]}, 8),
]


@pytest.mark.parametrize(("family", "settings", "count"), CASES)
def test_the_modules_are_those_that_peft_adapts(models, family, settings, count):
    found = find_targets(models[family], AdapterConfig(**settings))
    assert set(found) == set(peft_layers(family, **settings))
    assert len(found) == count
    assert list(found) == [name for name in dict(models[family].named_modules()) if name in found]


def test_an_expression_may_match_other_modules_too(models):
    found = find_targets(models["llama"], AdapterConfig(target_modules=r".*layers\.0\.self_attn.*"))  # PEFT refuses it
    assert {name.rpartition(".")[2] for name in found} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert len(found) == 4


def test_an_expression_matches_the_whole_name(models):
    with pytest.raises(UserError, match="matches no linear module"):
        find_targets(models["llama"], AdapterConfig(target_modules="q_proj"))


@pytest.mark.parametrize(
    "patterns",
    [
        {"rank_pattern": {"q_proj": 2, "layers.0.self_attn.v_proj": 3}},
        {"rank_pattern": {r"layers\.[1-9]+\..*": 5, "q_proj": 2}},  # the first that matches wins
        {"alpha_pattern": {"up_proj": 3, r".*layers\.0\.self_attn\.q_proj": 24}},
        {"rank_pattern": {"model.layers.0.mlp.down_proj": 16}, "alpha_pattern": {"down_proj": 4}, "use_rslora": True},
        {"rank_pattern": {"proj": 2, "rs.0.mlp.up_proj": 3}},  # neither begins where a part of a name does
    ],
)
def test_ranks_and_scales_are_those_that_peft_gives(models, patterns):
    patterns = {"r": 8, "lora_alpha": 12, "lora_dropout": 0.25, **patterns}
    config = AdapterConfig(**patterns)
    theirs = peft_layers("llama", target_modules="all-linear", **patterns)
    found = {name: settings_for(name, config) for name in find_targets(models["llama"], config)}
    assert {name: s.r for name, s in found.items()} == {name: layer.r["default"] for name, layer in theirs.items()}
    scaling = METHODS["lora"].scaling
    for name, settings in found.items():
        assert scaling(settings) == pytest.approx(theirs[name].scaling["default"], rel=1e-12)
        assert settings.dropout == 0.25
    if "proj" not in patterns.get("rank_pattern", {}):
        assert len({(s.r, scaling(s)) for s in found.values()}) > 1


def test_every_name_that_matches_nothing_is_reported_with_the_closest_one(models):
    config = AdapterConfig(target_modules=["q_prj", "v_proj", "gates_proj"])
    with pytest.raises(UserError) as error:
        find_targets(models["llama"], config)
    first, second = error.value.lines
    assert first.startswith("adapter.target_modules: 'q_prj' matches no linear module")
    assert "did you mean 'q_proj'?" in first
    assert "'gates_proj'" in second
    assert "did you mean 'gate_proj'?" in second
    for line in error.value.lines:
        assert all(name in line for name in LLAMA)


def test_an_exclusion_that_matches_nothing_is_an_error(models):
    with pytest.raises(UserError, match=r"adapter\.exclude_modules: 'dow_proj' .* did you mean 'down_proj'\?"):
        find_targets(models["llama"], AdapterConfig(exclude_modules=["dow_proj"]))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "adapter.exclude_modules"),
        ({"target_modules": ["up_proj"], "modules_to_save": ["mlp"]}, "adapter.modules_to_save"),
    ],
)
def test_it_is_an_error_that_nothing_is_left_to_adapt(models, settings, key):
    with pytest.raises(UserError) as error:
        find_targets(models["llama"], AdapterConfig(**settings))
    assert error.value.lines == [f"{key}: no module of adapter.target_modules is left to adapt"]
