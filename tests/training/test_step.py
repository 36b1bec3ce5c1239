"""One optimizer step: the same loss and gradients however the rows are cut, padded or packed, and as elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from tiny_models import read_by_transformers, write_tiny
from torch import Tensor, nn

from qlora_tool.adapters.attach import AdapterSet, attach
from qlora_tool.config import AdapterConfig
from qlora_tool.data.batches import Batch, collate
from qlora_tool.data.tokenize import Example
from qlora_tool.model.causal_lm import CausalLM
from qlora_tool.model.load import load_base
from qlora_tool.model.slots import Quantization
from qlora_tool.model.source import read_model_config
from qlora_tool.training.objective import NextToken
from qlora_tool.training.optimizers import Optimizer
from qlora_tool.training.step import StepSettings, train_step
from qlora_tool.weights.handles import WeightHandle

# Rounding errors of 2⁻²⁴ each in sums of up to 128 products, through two layers there and back.
FP32 = 4 * 128 * 2**-24
LENGTHS = (12, 5, 9, 3)
PLAIN = StepSettings(max_grad_norm=0.0)


class KeepsGradients:
    """Stands in for the optimizer: keeps the gradients and changes nothing."""

    def __init__(self, adapters: AdapterSet, loss_scale: float = 1.0):
        self.adapters, self.loss_scale = adapters, loss_scale
        self.gradients: dict[str, Tensor] = {}

    def before_backward(self, learning_rate: float, accumulate: bool = False) -> None:
        pass

    def step(self, learning_rate: float, max_grad_norm: float) -> Tensor:
        for name, tensor in self.adapters.tensors().items():
            self.gradients[name], tensor.grad = tensor.grad, None
        return torch.zeros(())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """A family's model folder, written once; without the dropout that GPT-2 has of its own, active in training."""
    parent = tmp_path_factory.mktemp("models")
    own_dropout = {"gpt2": dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)}

    def write(family: str) -> Path:
        made = parent / family
        return made if made.exists() else write_tiny(family, made, **own_dropout.get(family, {}))

    return write


def trained(
    folder, family: str = "llama", quantization: str = "none", dtype: torch.dtype = torch.float32, **config
) -> tuple[CausalLM, AdapterSet]:
    """A model with adapters whose B is not zero, in training mode."""
    path, kind = folder(family), Quantization(quantization)
    module = load_base(path, read_model_config(path), kind, torch.device("cpu"), dtype)
    adapters = attach(module, AdapterConfig(**({"r": 4} | config)), dtype, seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in adapters.layers.values():
            layer.lora_B.copy_(0.1 * torch.randn(layer.lora_B.shape, generator=generator))
    model = CausalLM(module, path, kind, dtype)
    module.train()
    return model, adapters


def examples(lengths: Sequence[int] = LENGTHS) -> list[Example]:
    """Rows of different lengths, the first two tokens of each without a label."""
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randint(3, 131, (length,), generator=generator).tolist() for length in lengths]
    return [Example(ids, [-100, -100, *ids[2:]], f"file, line {n}") for n, ids in enumerate(rows, 1)]


def padded(rows: list[Example]) -> Batch:
    return collate([[row] for row in rows], pad_token_id=0, packing=False)


def loss_and_gradients(
    model: CausalLM, adapters: AdapterSet, batches: list[Batch], settings: StepSettings = PLAIN
) -> tuple[float, dict[str, Tensor]]:
    kept = KeepsGradients(adapters)
    result = train_step(model, kept, batches, settings, learning_rate=1.0)
    assert result.loss.dtype == torch.float32
    return float(result.loss), kept.gradients


def assert_same(found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=FP32)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in found[1].items():
        largest = float(expected[1][name].abs().max())
        assert largest > 0
        assert float((gradient - expected[1][name]).abs().max()) < FP32 * largest, name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_how_a_batch_is_cut_into_micro_batches_changes_nothing(folder, family, method):
    model, adapters = trained(folder, family, "nf4", method=method)
    rows = examples()
    whole = loss_and_gradients(model, adapters, [padded(rows)])
    singles = loss_and_gradients(model, adapters, [padded([row]) for row in rows])
    uneven = loss_and_gradients(model, adapters, [padded(rows[:3]), padded(rows[3:])])
    assert_same(singles, whole)
    assert_same(uneven, whole)
    # A mean of the micro-batches' means would be another: the last row has one trained token, the first ten.
    means = [loss_and_gradients(model, adapters, [padded([row])])[0] for row in rows]
    assert abs(sum(means) / 4 - whole[0]) > 100 * FP32


def test_padding_changes_nothing(folder):
    model, adapters = trained(folder)
    batch = padded(examples())
    rows, length = batch.input_ids.shape
    expected = loss_and_gradients(model, adapters, [batch])
    for pad_token_id in (
        0,
        130,
    ):  # what it is filled up with does not matter, a token that is trained elsewhere neither
        wide = {"input_ids": pad_token_id, "labels": -100, "attention_mask": 0}
        filled = {
            name: torch.cat([getattr(batch, name), torch.full((rows, 7), value)], dim=1) for name, value in wide.items()
        }
        assert filled["input_ids"].shape == (rows, length + 7)
        assert_same(loss_and_gradients(model, adapters, [rebuilt(batch, filled)]), expected)


def rebuilt(batch: Batch, tensors: dict[str, Tensor]) -> Batch:
    """The batch with other tensors; where its labels stand is found anew."""
    made = replace(batch, **tensors)
    labels = made.labels[:, 1:]
    flat = torch.arange(made.labels.numel()).view(made.labels.shape)[:, :-1]
    return replace(made, predicting=flat[labels != -100], targets=labels[labels != -100])


def test_packed_rows_have_the_loss_and_gradients_of_padded_ones(folder):
    model, adapters = trained(folder)
    rows = examples()
    packed = collate([[rows[0], rows[3]], [rows[2], rows[1]]], pad_token_id=0, packing=True)
    assert packed.attention_mask is None
    expected = loss_and_gradients(model, adapters, [padded(rows)])
    assert_same(loss_and_gradients(model, adapters, [packed]), expected)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "gemma2", "cohere"])
def test_the_loss_is_that_of_transformers(folder, family):
    model, _ = trained(folder, family)
    for module in model.module.modules():
        if getattr(module, "adapter", None) is not None:
            module.set_adapters([])
    reference = read_by_transformers(folder(family))
    batch = padded(examples())
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        expected = reference(**inputs, labels=batch.labels).loss
        found = model.loss_sum(batch) / batch.trained_tokens
        assert float(found) == pytest.approx(float(expected), rel=FP32)
        # Label smoothing is F.cross_entropy's, on shifted logits and labels.
        logits = reference(**inputs).logits[:, :-1].flatten(0, 1).float()
        smoothed = nn.functional.cross_entropy(logits, batch.labels[:, 1:].flatten(), label_smoothing=0.1)
        found = model.loss_sum(batch, 0.1) / batch.trained_tokens
        assert float(found) == pytest.approx(float(smoothed), rel=FP32)
        assert abs(float(smoothed) - float(expected)) > 10 * FP32


def test_chunked_and_full_logits_give_the_same(folder):
    model, adapters = trained(folder)
    assert model.chunked_loss
    batches = [padded(examples())]
    settings = StepSettings(0.0, NextToken(label_smoothing=0.2))
    chunked = loss_and_gradients(model, adapters, batches, settings)
    model.projects_plainly = False
    assert_same(loss_and_gradients(model, adapters, batches, settings), chunked)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_checkpointing_changes_no_gradient(folder, method, quantization):
    model, adapters = trained(folder, quantization=quantization, method=method, lora_dropout=0.3)
    batches = [padded(examples())]
    model.checkpoint_layers(False)
    torch.manual_seed(0)
    kept = loss_and_gradients(model, adapters, batches)
    model.checkpoint_layers(True)
    torch.manual_seed(0)
    recomputed = loss_and_gradients(model, adapters, batches)
    assert recomputed[0] == kept[0]
    for name, gradient in recomputed[1].items():
        assert torch.equal(gradient, kept[1][name])
    torch.manual_seed(1)
    assert loss_and_gradients(model, adapters, batches)[0] != kept[0]  # dropout was on


def test_the_loss_scale_multiplies_the_gradients_and_not_the_loss(folder):
    model, adapters = trained(folder)
    batches = [padded(examples())]
    loss, gradients = loss_and_gradients(model, adapters, batches)
    scaled = KeepsGradients(adapters, loss_scale=2.0**10)
    assert float(train_step(model, scaled, batches, PLAIN, 1.0).loss) == loss
    for name, gradient in scaled.gradients.items():
        torch.testing.assert_close(gradient, gradients[name] * 2.0**10, rtol=FP32, atol=0)


def test_gradients_of_16_micro_batches_in_bf16_are_summed_in_fp32(folder):
    """Beside the sum in fp64 of each one's gradients, all of bf16: off by 15 · 2⁻²⁴ of the sum of their sizes at most
    (a sum in bf16 is off by 2⁻⁹ of it)."""
    model, adapters = trained(folder, dtype=torch.bfloat16)
    batches = [padded(examples((6, 4 + index % 7))) for index in range(16)]
    total = sum(batch.trained_tokens for batch in batches)
    exact = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in adapters.tensors().items()}
    sizes = {name: tensor.clone() for name, tensor in exact.items()}
    for batch in batches:
        (model.loss_sum(batch, 0.0) / total).backward()
        for name, tensor in adapters.tensors().items():
            assert tensor.grad.dtype == torch.bfloat16
            exact[name] += tensor.grad.double()
            sizes[name] += tensor.grad.double().abs()
            tensor.grad = None
    optimizer, found = Optimizer("adamw", list(adapters.tensors().values())), []

    @contextmanager
    def during(phase: str):
        if phase == "optimizer":
            found.extend(gradient.clone() for gradient in optimizer.gradients())
        yield

    train_step(model, optimizer, batches, PLAIN, 1e-3, during)
    for name, gradient in zip(exact, found, strict=True):
        assert ((gradient - exact[name]).abs() <= 15 * 2**-24 * sizes[name]).all()


def test_five_steps_are_those_of_peft_and_torch(folder):
    """The whole path once more, written down independently: PEFT's layers, transformers' loss, torch's optimizer."""
    model, adapters = trained(folder, target_modules="all-linear", lora_alpha=16)
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(read_by_transformers(folder("llama")), config).train()
    own = {f"base_model.model.{name}": tensor for name, tensor in adapters.tensors().items()}
    peft.set_peft_model_state_dict(theirs, {name: tensor.detach().clone() for name, tensor in own.items()})
    before = {name: buffer.clone() for name, buffer in frozen_tensors(model)}

    optimizer = Optimizer("adamw", adapters.parameters(), weight_decay=0.01)
    reference = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], weight_decay=0.01)
    rows = examples()
    losses = []
    for step in range(5):
        rate = 3e-3 * (step + 1)
        batches = [padded(rows[:3]), padded(rows[3:])]
        result = train_step(model, optimizer, batches, StepSettings(0.5), rate)
        total = sum(batch.trained_tokens for batch in batches)
        expected = 0.0
        for batch in batches:
            loss = theirs(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels,
                          num_items_in_batch=total).loss  # fmt: skip
            loss.backward()
            expected += float(loss.detach())
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        reference.param_groups[0]["lr"] = rate
        reference.step()
        reference.zero_grad()
        losses.append(float(result.loss))
        assert losses[-1] == pytest.approx(expected, rel=1e-5)
        assert float(result.grad_norm) == pytest.approx(float(norm), rel=1e-4)
    assert losses[-1] < losses[0] - 0.1
    assert float(norm) > 0.5  # clipping was at work
    for name, buffer in frozen_tensors(model):
        assert torch.equal(buffer, before[name])


def frozen_tensors(model: CausalLM):
    for name, module in model.module.named_modules():
        if isinstance(module, WeightHandle):
            yield from ((f"{name}.{key}", tensor) for key, tensor in module.state_dict().items())
