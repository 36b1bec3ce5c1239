"""VeRA: the formula in fp64, PEFT's layer, seeds and files, and matrices that the whole model has once."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from one_layer import disagreement, fill, frozen_linear, noise, relative_error, started, trained
from safetensors.torch import load_file, save_file
from tiny_models import logits, read_by_transformers, read_tiny, tokens, write_tiny
from torch import nn

from qlora_tool.adapters.attach import AdapterSet, attach
from qlora_tool.adapters.attach_stored import attach_stored
from qlora_tool.adapters.initial import initial_settings
from qlora_tool.adapters.peft_files import save_adapter
from qlora_tool.adapters.peft_reading import read_adapter
from qlora_tool.config import AdapterConfig, load_config
from qlora_tool.errors import UserError
from qlora_tool.methods import METHODS
from qlora_tool.methods.method import Settings
from qlora_tool.methods.vera import VeraKeys
from qlora_tool.weights.handles import model_tensors

OUT, IN, R = 96, 64, 6
FP32 = 4 * (IN + R) * 2**-24  # sums of in and of r products
A, B = "base_model.vera_A", "base_model.vera_B"


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_output_and_gradients_follow_the_formula(quantization):
    linear = frozen_linear(OUT, IN, quantization)
    adapter = trained("vera", linear, Settings(R, 32.0))
    assert sorted(dict(adapter.named_parameters())) == ["vera_lambda_b", "vera_lambda_d"]
    assert disagreement(adapter, linear, lambda t: (
        torch.diag(t["vera_lambda_b"]) @ t["vera_B"] @ torch.diag(t["vera_lambda_d"]) @ t["vera_A"]
    )) < FP32  # fmt: skip
    x, weight = noise(8, IN, seed=6), linear.weight.dense(torch.float32)
    merged = nn.functional.linear(x, adapter.merge(weight.clone()), linear.bias)
    assert relative_error(adapter(x, linear).detach(), merged.detach()) < FP32


def test_it_starts_as_the_base_with_d_as_set():
    linear, x = frozen_linear(OUT, IN), noise(3, IN, seed=6)
    for d_initial in (0.1, 0.5):
        adapter = started("vera", linear, Settings(R, 32.0, keys=VeraKeys(d_initial=d_initial)))
        assert torch.equal(adapter(x, linear), linear(x))
        assert set(adapter.tensors["vera_lambda_d"].tolist()) == {torch.tensor(d_initial).item()}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny("llama", tmp_path_factory.mktemp("base"))


def with_adapters(base, config: AdapterConfig):
    model = read_tiny(base)
    adapters = attach(model, config, torch.float32, seed=0)
    fill(adapters.parameters())
    return model, adapters


def projections(adapters: AdapterSet, name: str) -> list[torch.Tensor]:
    return [layer.tensors[name] for layer in adapters.layers.values()]


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "k_proj"], ["down_proj", "v_proj"]])
def test_the_matrices_are_those_that_peft_draws_and_there_once(base, targets):
    config = AdapterConfig(method="vera", r=5, projection_prng_key=11, target_modules=targets)
    model, adapters = with_adapters(base, config)
    theirs = peft.get_peft_model(
        read_by_transformers(base), peft.VeraConfig(r=5, projection_prng_key=11, target_modules=targets)
    ).base_model
    for name in ("vera_A", "vera_B"):
        expected = getattr(theirs, name)["default"]
        assert all(torch.equal(tensor, expected) for tensor in projections(adapters, name))
        assert len({tensor.data_ptr() for tensor in projections(adapters, name)}) == 1
        assert sum(found.tensor.shape == expected.shape and torch.equal(found.tensor, expected)
                   for found in model_tensors(model)) == 1  # fmt: skip
    assert not any(name.endswith(("vera_A", "vera_B")) for name in adapters.tensors())


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_pefts_reading_of_our_file_gives_our_logits(family, saved, tmp_path):
    base = write_tiny(family, tmp_path / "base")
    config = AdapterConfig(method="vera", r=5, save_projection=saved, projection_prng_key=3, lora_dropout=0.1)
    model, adapters = with_adapters(base, config)
    save_adapter(tmp_path, adapters, config, model, str(base), None)
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert ({A, B} <= names) is saved
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["vera_dropout"] == 0.1
    assert written["fan_in_fan_out"] is (family == "gpt2")
    assert not {"rank_pattern", "alpha_pattern", "lora_alpha"} & written.keys()
    theirs = peft.PeftModel.from_pretrained(read_by_transformers(base), tmp_path).eval()
    found = logits(model.eval(), tokens())
    assert relative_error(found, logits(theirs, tokens())) < 1e-5
    again = read_tiny(base)
    attach_stored(again, read_adapter(tmp_path))
    assert torch.equal(logits(again.eval(), tokens()), found)


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_our_reading_of_pefts_file_gives_pefts_logits(family, saved, tmp_path):
    base = write_tiny(family, tmp_path / "base")
    targets = ["q_proj", "down_proj"] if family == "llama" else ["c_attn", "c_proj"]
    config = peft.VeraConfig(r=4, target_modules=targets, projection_prng_key=9, save_projection=saved)
    theirs = peft.get_peft_model(read_by_transformers(base), config).eval()
    fill([parameter for parameter in theirs.parameters() if parameter.requires_grad])
    theirs.save_pretrained(tmp_path)
    model = read_tiny(base)
    attach_stored(model, read_adapter(tmp_path))
    assert relative_error(logits(model.eval(), tokens()), logits(theirs, tokens())) < 1e-5


def test_stored_matrices_go_before_the_seed(base, tmp_path):
    """They may come from another generator; PEFT takes them as well."""
    config = AdapterConfig(method="vera", r=5)
    model, adapters = with_adapters(base, config)
    save_adapter(tmp_path, adapters, config, model, str(base), None)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {A: -tensors[A]}, file)
    again = read_tiny(base)
    attached = attach_stored(again, read_adapter(tmp_path))
    assert torch.equal(projections(attached, "vera_A")[0], -tensors[A])
    theirs = peft.PeftModel.from_pretrained(read_by_transformers(base), tmp_path).eval()
    assert relative_error(logits(again.eval(), tokens()), logits(theirs, tokens())) < 1e-5


def test_in_bf16_they_are_made_again_as_they_were_trained_with(base, tmp_path):
    config = AdapterConfig(method="vera", r=5, save_projection=False)
    model = read_tiny(base)
    adapters = attach(model, config, torch.bfloat16, seed=0)
    save_adapter(tmp_path, adapters, config, model, str(base), None)
    for dtype in (torch.bfloat16, torch.float32):  # to go on, and to merge
        attached = attach_stored(read_tiny(base), read_adapter(tmp_path), dtype)
        for name in ("vera_A", "vera_B"):
            found, before = projections(attached, name)[0], projections(adapters, name)[0]
            assert before.dtype == torch.bfloat16
            assert torch.equal(found, before.to(dtype))


@pytest.mark.parametrize("ours", [True, False])
def test_trained_biases_go_both_ways(ours, tmp_path):
    base = write_tiny("llama-biased", tmp_path / "base")
    if ours:
        config = AdapterConfig(method="vera", r=3, bias="lora_only", target_modules=["q_proj"])
        model, adapters = with_adapters(base, config)
        save_adapter(tmp_path, adapters, config, model, str(base), None)
        theirs = peft.PeftModel.from_pretrained(read_by_transformers(base), tmp_path).eval()
    else:
        config = peft.VeraConfig(r=3, bias="vera_only", target_modules=["q_proj"])
        theirs = peft.get_peft_model(read_by_transformers(base), config).eval()
        fill([parameter for parameter in theirs.parameters() if parameter.requires_grad])
        theirs.save_pretrained(tmp_path)
        model = read_tiny(base)
        attach_stored(model, read_adapter(tmp_path))
    stored = read_adapter(tmp_path)
    assert stored.peft["bias"] == "vera_only"
    assert initial_settings(stored, AdapterConfig())["adapter.bias"] == "lora_only"
    assert "adapter.lora_alpha" not in initial_settings(stored, AdapterConfig())
    assert any(name.endswith("base_layer.bias") for name in stored.tensors)
    assert relative_error(logits(model.eval(), tokens()), logits(theirs, tokens())) < 1e-5


def saved_by_peft(base, folder, **options):
    config = peft.VeraConfig(r=4, target_modules=["q_proj", "down_proj"], **options)
    peft.get_peft_model(read_by_transformers(base), config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({A: None}, r"base_model.vera_A is missing, as save_projection"),
        ({B: torch.zeros(96, 4)}, r"vera_B.*shape \(96, 4\).*\(64, 4\)"),
        ({A: torch.zeros(4, 64)}, r"vera_A.*shape \(4, 64\).*\(4, 128\)"),
    ],
)
def test_matrices_that_do_not_fit_are_refused(base, tmp_path, change, said):
    file = saved_by_peft(base, tmp_path) / "adapter_model.safetensors"
    tensors = load_file(file) | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)
    with pytest.raises(UserError, match=said) as refused:
        attach_stored(read_tiny(base), read_adapter(tmp_path))
    assert len(refused.value.lines) == 1


def test_matrices_that_the_configuration_says_are_not_there(base, tmp_path):
    """PEFT draws them anew and does not look at the stored ones: which of the two is meant cannot be known."""
    file = saved_by_peft(base, tmp_path) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"save_projection": False}))
    with pytest.raises(UserError, match=r"base_model\.vera_A is there.*save_projection.*False"):
        read_adapter(tmp_path)


def test_an_adapter_for_another_width_is_refused(base, tmp_path):
    """The vectors tell the outputs of a module; the matrices tell the widest input."""
    saved_by_peft(base, tmp_path)
    other = write_tiny("llama", tmp_path / "other", intermediate_size=192)
    with pytest.raises(UserError, match=r"vera_A.*\(4, 128\).*\(4, 192\).*name that as its base"):
        attach_stored(read_tiny(other), read_adapter(tmp_path))


@pytest.mark.parametrize("setting", ["lora_alpha: 16", "rank_pattern: {q_proj: 4}", "use_rslora: true",
                                     "decompose_both: true", "d_initial: 0", "projection_prng_key: 1.5"])  # fmt: skip
def test_keys_that_vera_does_not_take_are_refused(setting, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"adapter: {{method: vera, {setting}}}")
    with pytest.raises(UserError, match=rf"adapter\.{setting.partition(':')[0]}"):
        load_config(str(file))


@pytest.mark.parametrize(
    ("option", "value"),
    [("rank_pattern", {"q_proj": 2}), ("projection_prng_key", "one"), ("r", "4"), ("vera_dropout", 1.5)],
)
def test_options_that_are_not_read_are_refused_by_name(base, tmp_path, option, value):
    file = saved_by_peft(base, tmp_path) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {option: value}))
    with pytest.raises(UserError, match=f": {option} "):
        read_adapter(tmp_path)


def test_the_method_says_what_all_modules_share():
    shapes = {(64, 128), (96, 32)}
    settings = Settings(5, 32.0)
    found = METHODS["vera"].shared(shapes, settings)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {"vera_A": (5, 128), "vera_B": (96, 5)}
    assert METHODS["vera"].shared_shapes(shapes, settings) == {"vera_A": (5, 128), "vera_B": (96, 5)}
