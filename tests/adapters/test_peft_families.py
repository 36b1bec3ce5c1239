"""Every method against PEFT on twelve families, in fp32: what it reads of our files and we read of its."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from one_layer import fill, relative_error
from tiny_models import logits, read_by_transformers, read_tiny, tokens, write_tiny

from qlora_tool.adapters.attach import attach
from qlora_tool.adapters.attach_stored import attach_stored
from qlora_tool.adapters.lacking import lacking
from qlora_tool.adapters.peft_files import save_adapter
from qlora_tool.adapters.peft_reading import read_adapter
from qlora_tool.config import AdapterConfig
from qlora_tool.methods import METHODS

FAMILIES = (
    "llama", "llama-odd", "mistral", "gemma2", "phi3", "gpt_neox", "gpt2", "falcon", "bloom", "opt", "qwen3_moe",
    "deepseek_v3",
)  # fmt: skip
OURS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 6},
    "loha": {"r": 2, "lora_alpha": 3},
    "lokr": {"r": 2, "lora_alpha": 3, "decompose_both": True},
    "vera": {"r": 8},
    "additive": {"r": 5},
}
THEIRS: dict[str, Callable[..., peft.PeftConfig]] = {
    "lora": lambda **places: peft.LoraConfig(r=4, lora_alpha=6, **places),
    "dora": lambda **places: peft.LoraConfig(r=4, use_dora=True, **places),
    "loha": lambda **places: peft.LoHaConfig(r=2, alpha=3, **places),
    "lokr": lambda **places: peft.LoKrConfig(r=2, alpha=3, **places),
    "vera": lambda **places: peft.VeraConfig(r=8, **places),
}
# PEFT's LoRA takes the names of a dense MLP for those of experts too, in families that have both: where it is on those
# has tests of its own.
ATTENTION = {"qwen3_moe": ["q_proj", "k_proj", "v_proj", "o_proj"],
             "deepseek_v3": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]}  # fmt: skip


def places(method: str, family: str) -> str | list[str]:
    return ATTENTION.get(family, "all-linear") if METHODS[method].peft_type == "LORA" else "all-linear"


def cells(methods: list[str]) -> list[Any]:
    return [pytest.param(method, family, id=f"{method}-{family}") for family in FAMILIES for method in methods
            if family != "gpt2" or METHODS[method].peft_takes_conv1d]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's tiny model in fp32, written once."""
    folder = tmp_path_factory.mktemp("bases")
    return lambda family: folder / family if (folder / family).exists() else write_tiny(family, folder / family)


def test_every_method_is_here():
    in_peft = {name: method for name, method in METHODS.items() if method.has_delta}
    assert OURS.keys() == in_peft.keys()
    assert {THEIRS[name]().peft_type.value for name in THEIRS} == {method.peft_type for method in in_peft.values()}


@pytest.mark.parametrize(("method", "family"), cells(list(OURS)))
def test_peft_computes_from_our_file_what_we_do(base, tmp_path, method, family):
    config = AdapterConfig(method=method, target_modules=places(method, family), **OURS[method])
    model = read_tiny(base(family))
    adapters = attach(model, config, torch.float32, seed=0)
    untrained = logits(model.eval(), tokens())
    fill(adapters.parameters(), 0.2)
    save_adapter(tmp_path, adapters, config, model, str(base(family)), None)
    found = logits(model, tokens())
    assert relative_error(found, untrained) > 0.01
    theirs = peft.PeftModel.from_pretrained(read_by_transformers(base(family)), tmp_path).eval()
    assert relative_error(logits(theirs, tokens()), found) < 1e-5
    assert lacking(model, read_adapter(tmp_path)) == []


@pytest.mark.parametrize(("method", "family"), cells(list(THEIRS)))
def test_we_compute_from_pefts_file_what_it_does(base, tmp_path, method, family):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fan_in_fan_out, which PEFT sets itself
        config = THEIRS[method](target_modules=places(method, family), task_type="CAUSAL_LM")
        theirs = peft.get_peft_model(read_by_transformers(base(family)), config).eval()
    untrained = logits(theirs, tokens())
    fill([parameter for parameter in theirs.parameters() if parameter.requires_grad], 0.2)
    theirs.save_pretrained(tmp_path)
    expected = logits(theirs, tokens())
    assert relative_error(expected, untrained) > 0.01
    model = read_tiny(base(family))
    assert lacking(model, read_adapter(tmp_path)) == []
    attach_stored(model, read_adapter(tmp_path))
    assert relative_error(logits(model.eval(), tokens()), expected) < 1e-5
