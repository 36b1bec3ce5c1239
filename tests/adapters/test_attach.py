"""What is trained on a model: adapters, whole modules, biases; and that nothing else is."""

from __future__ import annotations

import pytest
import torch
from tiny_models import read_by_transformers, read_tiny, tokens, write_tiny
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_tool.adapters.attach import AdapterSet, attach
from qlora_tool.config import AdapterConfig
from qlora_tool.errors import UserError
from qlora_tool.weights.modules import FrozenLinear

# Gradients here are sums of at most 24 tokens times 131 words; rounding errors of 2⁻²⁴ each make this of the largest.
FP32 = 24 * 131 * 2**-24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """A family's model folder, written once."""
    parent = tmp_path_factory.mktemp("models")
    return lambda family: parent / family if (parent / family).exists() else write_tiny(family, parent / family)


def attached(folder, family: str, quantization: str = "none", seed: int = 0, **config) -> tuple[nn.Module, AdapterSet]:
    model = read_tiny(folder(family), quantization)
    return model, attach(model, AdapterConfig(**({"r": 4} | config)), torch.float32, seed)


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def test_a_start_is_the_same_whatever_else_is_adapted(folder):
    _, few = attached(folder, "llama", target_modules=["v_proj", "q_proj"], seed=5)
    _, many = attached(folder, "llama", target_modules="all-linear", seed=5)
    _, other = attached(folder, "llama", target_modules=["q_proj"], seed=6)
    assert len(few.layers) == 4
    for name, layer in few.layers.items():
        assert torch.equal(layer.lora_A, many.layers[name].lora_A)
    starts = [layer.lora_A.detach() for layer in many.layers.values() if layer.lora_A.shape == (4, 64)]
    assert len(starts) == 12
    assert not any(torch.equal(one, two) for i, one in enumerate(starts) for two in starts[:i])
    name = "model.layers.0.self_attn.q_proj"
    assert not torch.equal(other.layers[name].lora_A, many.layers[name].lora_A)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_only_what_is_trained_gets_a_gradient(folder, method):
    model, adapters = attached(folder, "llama-biased", "nf4", method=method)
    trained = {id(parameter) for parameter in adapters.parameters()}
    assert len(trained) == len(adapters.parameters()) == 14 * (2 if method == "lora" else 3)
    loss(model, tokens()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in trained), name
        assert (parameter.grad is not None) == (id(parameter) in trained), name
    assert any(float(parameter.grad.abs().max()) > 0 for parameter in adapters.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_no_gradient_of_a_weights_shape_is_ever_made(folder, quantization, checkpointing):
    class Made(TorchDispatchMode):
        """Notes operators that allocate a matrix of the shape of a linear weight, or of its transpose."""

        def __init__(self, shapes: set[tuple[int, ...]]):
            super().__init__()
            self.shapes, self.operators = shapes, set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            given = {tensor.untyped_storage().data_ptr() for tensor in tensors_in((args, kwargs))}
            for tensor in tensors_in(result):
                new = tensor.untyped_storage().data_ptr() not in given
                if new and tensor.is_floating_point() and tensor.squeeze().shape in self.shapes:
                    self.operators.add(function.overloadpacket.__name__)
            return result

    def tensors_in(tree) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]

    model, _ = attached(folder, "llama", quantization, r=3)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    shapes = {tuple(module.weight.shape) for module in model.modules() if isinstance(module, FrozenLinear)}
    assert shapes == {(64, 64), (32, 64), (128, 64), (64, 128), (131, 64)}
    result = loss(model, tokens(2, 9))  # no activation has such a shape: 18 tokens
    made = Made(shapes | {shape[::-1] for shape in shapes})
    with made:
        result.backward()
    # The weight itself, dequantized; a weight that is not quantized is not even copied.
    dequantized = {"nf4": {"dequantize_4bit"}, "int8": {"dequantize_int8"}, "none": set()}[quantization]
    assert made.operators <= dequantized
    assert "mm" not in made.operators
    if quantization != "none":
        assert made.operators


@pytest.mark.parametrize(
    ("family", "wanted", "parameters"),
    [
        ("llama", ["lm_head"], ["lm_head.weight"]),
        ("llama-tied", ["lm_head"], ["model.embed_tokens.weight"]),  # used twice: both gradients in one
        ("llama-tied", ["embed_tokens"], ["model.embed_tokens.weight"]),
        ("llama-tied", ["embed_tokens", "lm_head"], ["model.embed_tokens.weight"]),
        ("llama", ["model.norm"], ["model.norm.weight"]),
        ("llama-biased", ["layers.1.mlp"], [f"model.layers.1.mlp.{part}_proj.{kind}" for part in ("gate", "up", "down")
                                            for kind in ("weight", "bias")]),
        ("gpt2", ["h.0.attn"], [f"transformer.h.0.attn.{part}.{kind}" for part in ("c_attn", "c_proj")
                                                for kind in ("weight", "bias")]),
    ],
)  # fmt: skip
def test_a_whole_module_is_trained_with_the_gradients_that_transformers_has(folder, family, wanted, parameters):
    adapted = {"gpt2": ["c_fc"]}.get(family, ["q_proj"])
    model, adapters = attached(folder, family, target_modules=adapted, modules_to_save=wanted)
    reference = read_by_transformers(folder(family))
    ids = tokens()
    loss(model, ids).backward()
    loss(reference, ids).backward()
    distinct = {id(parameter): name for name, parameter in adapters.saved.items()}
    assert len(distinct) == len(parameters)
    for name in parameters:
        expected = reference.get_parameter(name).grad
        found = adapters.saved[name].grad
        found = found.T if name in adapters.transposed else found
        assert float((found - expected).abs().max() / expected.abs().max()) < FP32
        file = adapters.tensors()[name]
        assert torch.equal(file, reference.get_parameter(name))  # in the orientation of the checkpoint


def test_tied_modules_are_one_tensor_in_the_model_and_two_in_the_file(folder):
    model, adapters = attached(folder, "llama-tied", modules_to_save=["lm_head"])
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight.stored()
    assert set(adapters.saved) == {"lm_head.weight", "model.embed_tokens.weight"}
    whole = [parameter for parameter in adapters.parameters() if parameter.shape == (131, 64)]
    assert len(whole) == 1  # the optimizer steps it once


@pytest.mark.parametrize(
    ("family", "bias", "count"),
    [
        ("llama-biased", "none", 0),
        ("llama-biased", "lora_only", 2),
        ("llama-biased", "all", 14),
        ("gpt2", "lora_only", 2),
        ("gpt2", "all", 13),  # four linear modules and two norms a layer, and the last norm
        ("llama", "all", 0),
    ],
)
def test_biases(folder, family, bias, count):
    adapted = ["c_attn"] if family == "gpt2" else ["q_proj"]
    model, adapters = attached(folder, family, target_modules=adapted, bias=bias)
    assert len(adapters.biases) == count
    loss(model, tokens()).backward()
    for name, parameter in adapters.biases.items():
        assert model.get_parameter(name) is parameter
        assert parameter.grad is not None
    if bias == "lora_only":
        assert {name.removesuffix(".bias") for name in adapters.biases} == set(adapters.layers)


def test_a_bias_that_belongs_to_a_whole_module_is_trained_once(folder):
    model, adapters = attached(
        folder, "llama-biased", target_modules=["q_proj"], modules_to_save=["up_proj"], bias="all"
    )
    assert len(adapters.biases) == 12
    assert not adapters.biases.keys() & adapters.saved.keys()
    live = {id(parameter) for parameter in model.parameters()}
    assert all(id(parameter) in live for parameter in adapters.parameters())


@pytest.mark.parametrize(
    ("family", "wanted", "line"),
    [
        ("llama", "lm_haed", "adapter.modules_to_save: no module 'lm_haed'; did you mean 'lm_head'?"),
        ("llama", "act_fn", "adapter.modules_to_save: 'act_fn' has no weights; leave it out"),
        ("mixtral", "experts", "adapter.modules_to_save: model.layers.0.mlp.experts holds experts, which cannot be "
                               "fully trained; leave it out"),
    ],
)  # fmt: skip
def test_modules_that_cannot_be_fully_trained(folder, family, wanted, line):
    with pytest.raises(UserError) as error:
        attached(folder, family, target_modules=["q_proj"], modules_to_save=[wanted])
    assert error.value.lines == [line]


def test_values_are_loaded_by_name_and_every_fault_is_named_at_once(folder):
    _, source = attached(folder, "llama", target_modules=["q_proj"], seed=1)
    _, target = attached(folder, "llama", target_modules=["q_proj"], seed=2)
    tensors = {name: tensor.detach() for name, tensor in source.tensors().items()}
    target.load(tensors, "here")
    for name, tensor in target.tensors().items():
        assert torch.equal(tensor, tensors[name])
    first, second, *_ = tensors
    tensors["other.lora_A.weight"] = tensors.pop(first)
    tensors[second] = tensors[second][:1]
    with pytest.raises(UserError) as error:
        target.load(tensors, "here")
    assert error.value.lines == [
        f"here: tensor {first} is missing",
        "here: tensor other.lora_A.weight fits nothing in the adapter",
        f"here: tensor {second} has shape (1, 4), expected (64, 4)",
    ]


@pytest.mark.parametrize("family", ["falcon", "phi", "bloom", "opt-projected", "gemma2", "qwen3_moe"])
def test_all_linear_modules_of_a_family_learn(folder, family):
    model, adapters = attached(folder, family, "nf4", target_modules="all-linear")
    linears = {name for name, module in model.named_modules() if isinstance(module, FrozenLinear)}
    assert linears - adapters.layers.keys() == {"lm_head"}
    loss(model.train(), tokens(4, 16)).backward()
    assert not [name for name, layer in adapters.layers.items() if not layer.lora_B.grad.any()]
