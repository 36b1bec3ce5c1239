"""LoHa: the formula in fp64, PEFT's own layer and files, a training run to a merged model, and what is never made."""

from __future__ import annotations

import peft
import pytest
import torch
from one_layer import Live
from tiny_models import read_by_transformers, read_tiny, write_tiny
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_tool.adapters.adapter import Adapter, generator_for
from qlora_tool.adapters.attach import attach
from qlora_tool.adapters.attach_stored import attach_stored
from qlora_tool.adapters.peft_files import save_adapter
from qlora_tool.adapters.peft_reading import read_adapter
from qlora_tool.build.setup import Setup
from qlora_tool.config import AdapterConfig, load_config
from qlora_tool.errors import UserError
from qlora_tool.methods import METHODS, loha
from qlora_tool.methods.method import Settings
from qlora_tool.weights.handles import WeightHandle
from qlora_tool.weights.modules import FrozenLinear
from qlora_tool.weights.quantized import quantize

IN, OUT, R = 64, 96, 6
# A product of two sums of R products, in a sum of at most IN + OUT.
FP32 = (2 * R + IN + OUT) * 2**-24
NAMES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def frozen_linear(*, quantization: str = "none") -> FrozenLinear:
    linear = FrozenLinear(IN, OUT, nn.Parameter(noise(OUT, seed=2), requires_grad=False))
    weight = noise(OUT, IN, seed=1) / IN**0.5
    linear.weight = WeightHandle(weight if quantization == "none" else quantize(weight, quantization))
    return linear


def adapter(alpha: float = 9.0) -> Adapter:
    shapes = METHODS["loha"].shapes(OUT, IN, R)
    return Adapter(METHODS["loha"], {name: noise(*shapes[name], seed=i) for i, name in enumerate(NAMES)},
                   Settings(R, alpha))  # fmt: skip


def output_and_gradients(forward, x: Tensor, trained: list[Tensor], grad: Tensor) -> list[Tensor]:
    y = forward(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *trained], grad)]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize("chunk", [loha.CHUNK, 7 * IN])  # the second cuts 96 rows into 14 pieces
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_output_and_gradients_follow_the_formula(quantization, chunk, monkeypatch):
    monkeypatch.setattr(loha, "CHUNK", chunk)
    linear, layer = frozen_linear(quantization=quantization), adapter()
    x, grad = noise(2, 5, IN, seed=6).requires_grad_(), noise(2, 5, OUT, seed=7)
    trained = [layer.tensors[name] for name in NAMES]
    found = output_and_gradients(lambda x: layer(x, linear), x, trained, grad)
    weight = linear.weight.dense(torch.float32).double()
    exact = [tensor.detach().double().requires_grad_() for tensor in trained]

    def formula(x: Tensor) -> Tensor:
        delta = 1.5 * (exact[0] @ exact[1]) * (exact[2] @ exact[3])
        return x @ (weight + delta).T + linear.bias.double()

    expected = output_and_gradients(formula, x.detach().double().requires_grad_(), exact, grad.double())
    for value, wanted in zip(found, expected, strict=True):
        assert value.shape == wanted.shape
        assert relative_error(value, wanted) < FP32


def test_a_layer_computes_and_starts_as_pefts_does():
    ours, linear = adapter(), frozen_linear()
    plain = nn.Linear(IN, OUT)
    with torch.no_grad():
        plain.weight.copy_(linear.weight.dense(torch.float32))
        plain.bias.copy_(linear.bias)
    model = peft.get_peft_model(nn.Sequential(plain), peft.LoHaConfig(r=R, alpha=9, target_modules=["0"]))
    theirs = model.base_model.model[0]
    tensors = [getattr(theirs, name)["default"] for name in NAMES]
    start = Adapter.start(METHODS["loha"], linear, Settings(R, 9.0), torch.float32, generator_for(0, "a"))
    for name, tensor in zip(NAMES, tensors, strict=True):
        own = start.tensors[name].detach()
        assert own.shape == tensor.shape
        # Uniform within ±1/√(its columns), or zero: n draws come within 5/n of the end, but for one case in e⁵.
        bound = 0.0 if name == "hada_w2_b" else own.shape[1] ** -0.5
        for drawn in (own, tensor.detach()):
            assert bound * (1 - 5 / own.numel()) <= float(drawn.abs().max()) <= bound
    x = noise(3, 5, IN, seed=6).requires_grad_()
    assert torch.equal(start(x, linear), linear(x))
    with torch.no_grad():
        for tensor, name in zip(tensors, NAMES, strict=True):
            tensor.copy_(ours.tensors[name])
    grad = noise(3, 5, OUT, seed=7)
    found = output_and_gradients(lambda x: ours(x, linear), x, [ours.tensors[name] for name in NAMES], grad)
    expected = output_and_gradients(theirs, x, tensors, grad)
    for value, other in zip(found, expected, strict=True):
        assert relative_error(value, other) < 2 * FP32


def test_the_merged_weight_computes_as_the_layer_does():
    linear, layer = frozen_linear(quantization="nf4"), adapter()
    x, weight = noise(8, IN, seed=6), linear.weight.dense(torch.float32)
    merged = nn.functional.linear(x, layer.merge(weight.clone()), linear.bias)
    assert relative_error(layer(x, linear).detach(), merged.detach()) < FP32
    assert relative_error(layer(x, linear).detach(), linear(x)) > 0.1


def test_nothing_of_the_weights_size_is_made_but_the_weight(monkeypatch):
    monkeypatch.setattr(loha, "CHUNK", OUT * IN // 4)

    class Largest(TorchDispatchMode):
        """The most numbers of any tensor that an operator makes, the weight's own dequantization left out."""

        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if "dequantize" not in str(function):
                given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
                made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)
                        and leaf.untyped_storage().data_ptr() not in given]  # fmt: skip
                self.count = max([self.count, *(leaf.numel() for leaf in made if leaf.is_floating_point())])
            return result

    linear, layer = frozen_linear(quantization="nf4"), adapter()
    with Largest() as largest:
        layer(noise(3, IN, seed=6).requires_grad_(), linear).sum().backward()
    assert OUT * IN // 8 < largest.count <= OUT * IN // 4


def test_backward_never_holds_as_much_as_the_weight(monkeypatch):
    """Of each piece of Δ: its two factors, Δ, and a gradient of each; so six pieces of a sixteenth at most."""
    out_features = in_features = 512
    monkeypatch.setattr(loha, "CHUNK", out_features * in_features // 16)
    shapes = METHODS["loha"].shapes(out_features, in_features, 2)
    layer = Adapter(METHODS["loha"], {name: noise(*shapes[name], seed=i) for i, name in enumerate(NAMES)},
                    Settings(2, 4.0))  # fmt: skip
    x = noise(3, in_features, seed=6).requires_grad_()
    with Live() as live:
        METHODS["loha"].branch(layer, x).sum().backward()
    weight = out_features * in_features * 4
    assert weight / 16 < live.peak < 7 / 16 * weight
    with Live() as live:
        (x @ layer.delta(torch.empty(0)).T).sum().backward()
    assert live.peak > weight  # as it is where Δ is made


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny("llama", tmp_path_factory.mktemp("base"))


def trained(base, config: AdapterConfig):
    """A model with an adapter whose tensors are all different from their start."""
    model = read_tiny(base)
    adapters = attach(model, config, torch.float32, seed=0)
    with torch.no_grad():
        for number, parameter in enumerate(adapters.parameters()):
            parameter.copy_(noise(*parameter.shape, seed=number) / 2)
    return model, adapters


def test_pefts_reading_of_our_file_gives_our_logits(base, tmp_path):
    config = AdapterConfig(method="loha", r=3, lora_alpha=5, rank_pattern={"k_proj": 2}, alpha_pattern={"up_proj": 7})
    model, adapters = trained(base, config)
    save_adapter(tmp_path, adapters, config, model, str(base), None)
    theirs = peft.PeftModel.from_pretrained(read_by_transformers(base), tmp_path).eval()
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected, found = theirs(ids).logits, model.eval()(ids).logits
    assert relative_error(found, expected) < 1e-5
    again = read_tiny(base)
    attach_stored(again, read_adapter(tmp_path))
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, found)


def test_our_reading_of_pefts_file_gives_pefts_logits(base, tmp_path):
    config = peft.LoHaConfig(
        r=4, alpha=6, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2}, init_weights=False
    )
    theirs = peft.get_peft_model(read_by_transformers(base), config).eval()
    theirs.save_pretrained(tmp_path)
    model = read_tiny(base)
    attach_stored(model, read_adapter(tmp_path))
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert relative_error(model.eval()(ids).logits, theirs(ids).logits) < 1e-5


@pytest.mark.parametrize(("option", "value"), [("rank_dropout", 0.1), ("module_dropout", 0.2)])
def test_what_peft_adds_is_refused_by_name(base, tmp_path, option, value):
    config = peft.LoHaConfig(r=4, alpha=6, target_modules=["q_proj"], **{option: value})
    peft.get_peft_model(read_by_transformers(base), config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=option):
        read_adapter(tmp_path)


@pytest.mark.parametrize("setting", ["lora_dropout: 0.1", "bias: all", "use_rslora: true"])
def test_keys_that_loha_does_not_read_are_refused(setting, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"adapter: {{method: loha, {setting}}}")
    with pytest.raises(UserError, match=rf"adapter\.{setting.partition(':')[0]}.*loha"):
        load_config(str(file))


def test_an_adapter_that_peft_cannot_load_onto_the_model_is_said(tmp_path):
    """PEFT's LoHa has no form for transformers' Conv1D."""
    for family, said in (("gpt2", 1), ("llama", 0)):
        setup = Setup.of(load_config({
            "model": {"name_or_path": write_tiny(family, tmp_path / family), "compute_dtype": "float32"},
            "adapter": {"method": "loha"},
        }))  # fmt: skip
        assert sum("onto transformers' Conv1D" in remark for remark in setup.build().remarks) == said
