"""Weights that are kept from a layer's recomputation to its gradients: the same numbers, one layer's at a time."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from test_checkpointing import ATTENTION, BOTH, MLP, adapted, gradients
from tiny_models import tiny_config, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_tool.config import Config, with_values
from qlora_tool.memory.trace.classify import timeline
from qlora_tool.memory.trace.predict import BatchShape, predict
from qlora_tool.model.checkpointing import ALL_RECOMPUTED, Recomputation, decoder_layers
from qlora_tool.ops.declare import CPU, Target
from qlora_tool.weights.handles import WeightHandle

CARD = Target("cuda", (9, 0))
DEQUANTIZE = "qlora_tool::dequantize_4bit"
SIZES = {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
         "num_key_value_heads": 4, "head_dim": 64}  # fmt: skip


class Dequantized(TorchDispatchMode):
    """Counts the weights that are dequantized, by their number of elements."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._schema.name == DEQUANTIZE:
            self.calls[tuple(result.shape)] += 1
        return result


def kept(model) -> list[torch.Tensor]:
    """What handles keep beside the weight as it is stored: all tensors that are reached from them."""
    handles = [module for module in model.module.modules() if isinstance(module, WeightHandle)]
    return [value for handle in handles for value in vars(handle).values() if isinstance(value, torch.Tensor)]


def as_predicted(keeps: bool, layers: int = 4, target: Target = CARD, **values):
    config = with_values(Config(), {"training.gradient_checkpointing": True} | values)
    model_config = tiny_config("llama", **SIZES | {"num_hidden_layers": layers})
    recomputation = Recomputation.uniform(ALL_RECOMPUTED, layers, keeps_weights=keeps)
    return predict(config, model_config, BatchShape.full(2, 256), torch.bfloat16, recomputation, target)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "gpt2", "phi"])
def test_gradients_are_the_same_to_the_bit(family, dropout, tmp_path):
    model, adapters = adapted(family, tmp_path, dropout)
    counts, found = [], []
    for keeps in (False, True):
        model.checkpoint_layers(Recomputation.uniform(ALL_RECOMPUTED, 2, keeps_weights=keeps))
        with Dequantized() as dequantized:
            found.append(gradients(model, adapters))
        counts.append(dequantized.calls.total())
    assert all(gradient.abs().max() > 0 for gradient in found[0])
    assert all(map(torch.equal, *found))
    assert counts[1] < counts[0]
    assert kept(model) == []


@pytest.mark.parametrize("recomputed", [BOTH, ATTENTION, MLP])
def test_parts_of_layers(recomputed, tmp_path):
    """What is recomputed of a layer is dequantized twice, whatever it is, and what is not, as before."""
    model, adapters = adapted("llama", tmp_path)
    calls, found = [], []
    for keeps in (False, True):
        model.checkpoint_layers(Recomputation((recomputed, recomputed), keeps))
        with Dequantized() as dequantized:
            found.append(gradients(model, adapters))
        calls.append(dequantized.calls.total())
    assert all(map(torch.equal, *found)) and kept(model) == []
    again = {BOTH: 5, ATTENTION: 3, MLP: 2}[recomputed]
    unused = 3 if "self_attn" in recomputed else 0  # nothing below the first layer wants a gradient through q, k, v
    assert calls[0] - calls[1] == 2 * again - unused


def test_twice_and_no_more(tmp_path):
    """All seven of each layer, forward and once in backward, in whichever place."""
    model, adapters = adapted("llama", tmp_path)
    model.checkpoint_layers(Recomputation.uniform(ALL_RECOMPUTED, 2, keeps_weights=True))
    with Dequantized() as dequantized:
        gradients(model, adapters)
    inside = [handle for layer in decoder_layers(model.module).values() for handle in layer.modules()
              if isinstance(handle, WeightHandle)]  # fmt: skip
    assert dequantized.calls == Counter({shape: 2 * count for shape, count in
                                         Counter(tuple(handle.shape) for handle in inside).items()})  # fmt: skip


def test_twice_through_one_graph(tmp_path):
    """A second backward pass computes again, and finds nothing of the first."""
    model, adapters = adapted("llama", tmp_path)
    sums = []
    for keeps in (False, True):
        model.checkpoint_layers(Recomputation.uniform(ALL_RECOMPUTED, 2, keeps_weights=keeps))
        loss = model.module(input_ids=tokens(1, 6)).logits.square().mean()
        of_passes = [torch.autograd.grad(loss, adapters.parameters(), retain_graph=again) for again in (True, False)]
        assert all(map(torch.equal, *of_passes))
        sums.append(of_passes[0])
        assert kept(model) == []
    assert all(map(torch.equal, *sums))


def test_an_error_in_backward_leaves_right_weights(tmp_path):
    model, adapters = adapted("llama", tmp_path)
    expected = gradients(model, adapters)
    model.checkpoint_layers(Recomputation.uniform(ALL_RECOMPUTED, 2, keeps_weights=True))
    _, second = decoder_layers(model.module).values()
    failing = True

    def fail(gradient: torch.Tensor) -> None:
        if failing:
            raise RuntimeError("stopped")

    hook = second.self_attn.register_forward_hook(lambda module, args, output: output[0].register_hook(fail) and None)
    with pytest.raises(RuntimeError, match="stopped"):
        gradients(model, adapters)
    assert len(kept(model)) == 4  # q, k, v and o
    failing = False
    assert all(map(torch.equal, gradients(model, adapters), expected))
    hook.remove()
    assert kept(model) == []


@pytest.mark.parametrize("target", [CARD, CPU], ids=["card", "cpu"])
def test_the_peak_grows_by_a_layer_at_most(target):
    """The prediction sees them live: of one layer at a time, whatever the depth, and to the end of its backward."""
    hidden, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    layer = 2 * (4 * hidden**2 + 3 * hidden * inner)  # bytes in bf16
    for depth in (3, 5):
        plain, keeping = (as_predicted(keeps, depth, target) for keeps in (False, True))
        grown = timeline(keeping).peak_bytes - timeline(plain).peak_bytes
        assert 0 <= grown <= layer
        if target == CARD:  # where the operation takes nothing beside its result
            assert most_recomputed(keeping) == layer - 2 * hidden * inner  # all but down
            assert most_recomputed(plain) == 2 * hidden * inner


def most_recomputed(trace) -> int:
    """Bytes at once of weights that were dequantized in a recomputation; all of them have to go in backward."""
    alive = most = 0
    for storage, sign in trace.events:
        if storage.operator == DEQUANTIZE and storage.recomputed:
            assert storage.died_in == "backward"
            alive += sign * storage.nbytes
            most = max(most, alive)
    return most


def test_passes_a_weight():
    """At most 2.0; what a step without kept weights takes is 2.8 in such a model, less what its first layer saves."""
    hidden, inner, layers = SIZES["hidden_size"], SIZES["intermediate_size"], 4
    weights = layers * (4 * hidden**2 + 3 * hidden * inner)

    def passes(trace) -> float:
        second = next(event for event, phase, step in trace.marks if (phase, step) == ("forward", 2))
        born = (storage for storage in trace.storages if storage.operator == DEQUANTIZE and storage.birth >= second)
        return sum(storage.nbytes for storage in born) / 2 / weights

    assert passes(as_predicted(True)) == pytest.approx(2.0)
    assert passes(as_predicted(False)) == pytest.approx(
        2 + (layers * (4 * hidden**2 + 2 * hidden * inner) - 3 * hidden**2) / weights
    )


def test_said():
    said = str(Recomputation.uniform(ALL_RECOMPUTED, 2, keeps_weights=True))
    assert said == "everything recomputed, with their weights kept for backward"


@pytest.mark.cuda
def test_on_a_card(tmp_path):
    """Backward runs in a thread of its own there: the same bits, and memory as it was."""
    model, adapters = adapted("llama", tmp_path)
    model.module.cuda()
    ids = torch.arange(24, device="cuda").view(2, 12)
    found, calls, left = [], [], []
    for keeps in (False, True):
        model.checkpoint_layers(Recomputation.uniform(ALL_RECOMPUTED, 2, keeps_weights=keeps))
        for parameter in adapters.parameters():
            parameter.grad = None
        with Dequantized() as dequantized:
            model.module(input_ids=ids, use_cache=False).logits.float().square().mean().backward()
        torch.cuda.synchronize()
        left.append(torch.cuda.memory_allocated())
        found.append([parameter.grad.clone() for parameter in adapters.parameters()])
        calls.append(dequantized.calls.total())
    assert all(map(torch.equal, *found)) and calls[1] < calls[0]
    assert kept(model) == [] and left[0] > 0
