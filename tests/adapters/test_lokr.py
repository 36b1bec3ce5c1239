"""LoKr: the formula in fp64, PEFT's factorization, its layer and its files, and what is never made."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from one_layer import (
    Live,
    disagreement,
    fill,
    frozen_linear,
    noise,
    output_and_gradients,
    relative_error,
    started,
    trained,
)
from peft.tuners.lokr.layer import factorization
from safetensors.torch import load_file, save_file
from tiny_models import logits, read_by_transformers, read_tiny, tokens, write_tiny
from torch import nn

from qlora_tool.adapters.attach import attach
from qlora_tool.adapters.attach_stored import attach_stored
from qlora_tool.adapters.peft_files import save_adapter
from qlora_tool.adapters.peft_reading import read_adapter
from qlora_tool.build.setup import Setup
from qlora_tool.config import AdapterConfig, load_config
from qlora_tool.errors import UserError
from qlora_tool.methods import METHODS
from qlora_tool.methods.lokr import LokrKeys, factors
from qlora_tool.methods.method import Settings

# Out, in, r, decompose_both, decompose_factor. First both matrices whole and C first; then D first; D of two parts;
# both of two; a factor of PEFT's choice that is not a divisor, one that is, above the square root; and a prime number.
CASES = [
    (96, 64, 6, False, -1), (64, 96, 7, False, -1), (96, 64, 2, False, -1), (96, 64, 3, True, -1),
    (96, 64, 2, True, 7), (96, 64, 5, True, 32), (61, 40, 3, False, -1),
]  # fmt: skip
# Each value is a sum of products of two matrices that are such sums themselves.
FP32 = 4 * (96 + 64) * 2**-24


def settings(r: int, both: bool = False, factor: int = -1, alpha: float = 9.0) -> Settings:
    return Settings(r, alpha, keys=LokrKeys(decompose_both=both, decompose_factor=factor))


def kronecker(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    left, right = (tensors[name] if name in tensors else tensors[f"{name}_a"] @ tensors[f"{name}_b"]
                   for name in ("lokr_w1", "lokr_w2"))  # fmt: skip
    return torch.kron(left, right)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(("out_features", "in_features", "r", "both", "factor"), CASES)
def test_output_and_gradients_follow_the_formula(out_features, in_features, r, both, factor, quantization):
    linear = frozen_linear(out_features, in_features, quantization)
    adapter = trained("lokr", linear, settings(r, both, factor))
    assert disagreement(adapter, linear, lambda tensors: 9 / r * kronecker(tensors)) < FP32


def test_the_sides_are_those_that_peft_chooses():
    for size in range(1, 1200):
        for factor in (-1, 1, 2, 3, 4, 5, 7, 8, 12, 16, 31, 64, 100, size):
            assert factors(size, factor) == factorization(size, factor), (size, factor)


@pytest.mark.parametrize("start", ["default", "lycoris"])
@pytest.mark.parametrize(("out_features", "in_features", "r", "both", "factor"), CASES)
def test_a_layer_computes_and_starts_as_pefts_does(out_features, in_features, r, both, factor, start):
    linear, plain = frozen_linear(out_features, in_features), nn.Linear(in_features, out_features)
    with torch.no_grad():
        plain.weight.copy_(linear.weight.dense(torch.float32))
        plain.bias.copy_(linear.bias)
    config = peft.LoKrConfig(r=r, alpha=9, target_modules=["0"], decompose_both=both, decompose_factor=factor,
                             init_weights="lycoris" if start == "lycoris" else True)  # fmt: skip
    theirs = peft.get_peft_model(nn.Sequential(plain), config).base_model.model[0]
    keys = LokrKeys(decompose_both=both, decompose_factor=factor, init_weights=start)
    ours = started("lokr", linear, Settings(r, 9.0, keys=keys))
    names = [name for name in METHODS["lokr"].peft_names if "default" in getattr(theirs, name)]
    assert list(ours.tensors) == names
    for name in names:
        tensor, own = getattr(theirs, name)["default"].detach(), ours.tensors[name].detach()
        assert own.shape == tensor.shape
        assert bool(own.any()) == bool(tensor.any())
        if own.any():  # uniform within ±1/√(its columns): n draws come within 5/n of the end, but for one case in e⁵
            bound = own.shape[1] ** -0.5
            assert bound * (1 - 5 / own.numel()) <= float(own.abs().max()) <= bound
    x, grad = noise(3, 5, in_features, seed=6).requires_grad_(), noise(3, 5, out_features, seed=7)
    assert torch.equal(ours(x, linear), linear(x))
    fill([ours.tensors[name] for name in names])
    fill([getattr(theirs, name)["default"] for name in names])
    found = output_and_gradients(lambda x: ours(x, linear), x, [ours.tensors[name] for name in names], grad)
    expected = output_and_gradients(theirs, x, [getattr(theirs, name)["default"] for name in names], grad)
    for value, other in zip(found, expected, strict=True):
        assert relative_error(value, other) < 2 * FP32


def test_the_merged_weight_computes_as_the_layer_does():
    linear = frozen_linear(96, 64, "nf4")
    adapter = trained("lokr", linear, settings(2))
    x, weight = noise(8, 64, seed=6), linear.weight.dense(torch.float32)
    merged = nn.functional.linear(x, adapter.merge(weight.clone()), linear.bias)
    assert relative_error(adapter(x, linear).detach(), merged.detach()) < FP32
    assert relative_error(adapter(x, linear).detach(), linear(x)) > 0.1


@pytest.mark.parametrize(("r", "both"), [(2, False), (2, True), (400, True)])
def test_a_token_takes_no_more_than_some_vectors(r, both):
    """Of one token: the few vectors between the products, however the matrices are made up."""
    linear = frozen_linear(512, 512)
    adapter = trained("lokr", linear, settings(r, both))
    x = noise(64, 512, seed=6)
    with Live() as live, torch.no_grad():
        METHODS["lokr"].branch(adapter, x)
    assert live.peak <= 6 * 64 * 512 * 4


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny("llama", tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(("both", "factor"), [(False, -1), (True, 4)])
def test_pefts_reading_of_our_file_gives_our_logits(base, tmp_path, both, factor):
    config = AdapterConfig(method="lokr", r=3, lora_alpha=5, rank_pattern={"k_proj": 2, "down_proj": 40},
                           alpha_pattern={"up_proj": 7}, decompose_both=both, decompose_factor=factor)  # fmt: skip
    model = read_tiny(base)
    adapters = attach(model, config, torch.float32, seed=0)
    fill(adapters.parameters())
    save_adapter(tmp_path, adapters, config, model, str(base), None)
    theirs = peft.PeftModel.from_pretrained(read_by_transformers(base), tmp_path).eval()
    found = logits(model.eval(), tokens())
    assert relative_error(found, logits(theirs, tokens())) < 1e-5
    again = read_tiny(base)
    attached = attach_stored(again, read_adapter(tmp_path))
    assert torch.equal(logits(again.eval(), tokens()), found)
    assert {name: layer.settings.r for name, layer in attached.layers.items()} == {
        name: layer.settings.r for name, layer in adapters.layers.items()}  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"decompose_both": True, "decompose_factor": 8}, {"init_weights": "lycoris"}])
def test_our_reading_of_pefts_file_gives_pefts_logits(base, tmp_path, options):
    config = peft.LoKrConfig(
        r=2, alpha=6, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 30}, **options
    )
    theirs = peft.get_peft_model(read_by_transformers(base), config).eval()
    fill([parameter for parameter in theirs.parameters() if parameter.requires_grad])
    theirs.save_pretrained(tmp_path)
    model = read_tiny(base)
    attach_stored(model, read_adapter(tmp_path))
    assert relative_error(logits(model.eval(), tokens()), logits(theirs, tokens())) < 1e-5


@pytest.fixture
def saved(base, tmp_path):
    """A folder with PEFT's files of LoKr."""
    config = peft.LoKrConfig(r=2, alpha=6, target_modules=["q_proj"])
    peft.get_peft_model(read_by_transformers(base), config).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("option", "value"),
    [("rank_dropout", 0.1), ("module_dropout", 0.2), ("decompose_factor", 0), ("decompose_both", "yes"), ("r", None),
     ("r", 0), ("r", 2.5), ("alpha", None), ("alpha", "6"), ("alpha", True)],
)
def test_options_that_are_not_read_are_refused_by_name(saved, option, value):
    file = saved / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {option: value}))
    with pytest.raises(UserError, match=f": {option} ") as refused:
        read_adapter(saved)
    assert len(refused.value.lines) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lokr_t2": torch.zeros(2, 2, 3, 3)}, "LoKr of convolutions"),
        ({"lokr_w2_b": None}, r"q_proj\.lokr_w2_b is missing"),
        ({"lokr_w1": None}, r"q_proj\.lokr_w1 is missing"),
        ({"lokr_w2_b": torch.zeros(2, 7)}, "do not fit together"),
        ({"lokr_w1": torch.zeros(4, 16)}, "do not fit together"),  # PEFT would make (8, 8) of 64 × 64
    ],
)
def test_tensors_that_are_not_pefts_are_refused(saved, change, said):
    file, place = saved / "adapter_model.safetensors", "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = load_file(file) | {f"{place}.{name}": tensor for name, tensor in change.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)
    with pytest.raises(UserError, match=said):
        read_adapter(saved)


@pytest.mark.parametrize("setting", ["lora_dropout: 0.1", "bias: all", "d_initial: 0.2", "decompose_factor: 0"])
def test_keys_that_lokr_does_not_take_are_refused(setting, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"adapter: {{method: lokr, {setting}}}")
    with pytest.raises(UserError, match=rf"adapter\.{setting.partition(':')[0]}"):
        load_config(str(file))


def test_an_adapter_that_peft_cannot_load_onto_the_model_is_said(tmp_path):
    """PEFT's LoKr has no form for transformers' Conv1D."""
    for family, said in (("gpt2", 1), ("llama", 0)):
        setup = Setup.of(load_config({
            "model": {"name_or_path": write_tiny(family, tmp_path / family), "compute_dtype": "float32"},
            "adapter": {"method": "lokr"},
        }))  # fmt: skip
        assert sum("onto transformers' Conv1D" in remark for remark in setup.build().remarks) == said
