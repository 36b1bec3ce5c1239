"""What a step makes small: sums by batch and by example, and the model without its adapters as a reference."""

from __future__ import annotations

import pytest
import torch
from test_causal_lm import ROWS, example
from tiny_models import read_tiny, relative_error, write_tiny
from torch import Tensor, nn

from qlora_tool.adapters.attach import AdapterSet, attach
from qlora_tool.config import AdapterConfig
from qlora_tool.data.batches import Batch, collate
from qlora_tool.errors import UserError
from qlora_tool.model.causal_lm import CausalLM
from qlora_tool.model.slots import Quantization
from qlora_tool.training.objective import NextToken
from qlora_tool.training.optimizers import Optimizer
from qlora_tool.training.step import StepSettings, train_step

EXAMPLES = [one for row in ROWS for one in row]


def trained(folder, **config) -> tuple[CausalLM, AdapterSet]:
    write_tiny("llama", folder)
    module = read_tiny(folder, "nf4")
    adapters = attach(module, AdapterConfig(r=4, **config), torch.float32, seed=0)
    with torch.no_grad():
        for number, parameter in enumerate(adapters.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) / 10)
    return CausalLM(module, folder, Quantization("nf4"), torch.float32), adapters


def alone(model: CausalLM, one) -> Tensor:
    logits = model.module(input_ids=torch.tensor([one.input_ids]), use_cache=False).logits[0, :-1].float()
    return nn.functional.cross_entropy(logits, torch.tensor(one.labels[1:]), reduction="sum")


def batches() -> dict[str, Batch]:
    rows = [[one] for one in EXAMPLES]
    return {
        "packed": collate(ROWS, pad_token_id=0, packing=True),
        "padding free": collate(rows, pad_token_id=0, packing=False, padding_free=True),
        "padded": collate(rows, pad_token_id=0, packing=False),
    }


@pytest.mark.parametrize("projects_plainly", [True, False])
@pytest.mark.parametrize("layout", ["packed", "padding free", "padded"])
def test_each_example_has_the_loss_and_gradient_it_has_alone(layout, projects_plainly, tmp_path):
    model, adapters = trained(tmp_path)
    model.projects_plainly = projects_plainly
    found = NextToken().by_example(model, batches()[layout])
    expected = torch.stack([alone(model, one) for one in EXAMPLES])
    assert found.shape == (len(EXAMPLES),) and found.dtype == torch.float32
    assert relative_error(found.detach(), expected.detach()) < 1e-5
    weights = torch.arange(1.0, 1 + len(EXAMPLES))
    ours, theirs = (
        torch.autograd.grad((losses * weights).sum(), adapters.parameters()) for losses in (found, expected)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert relative_error(one, other) < 1e-4


def test_by_example_and_by_batch_are_the_same_sum(tmp_path):
    model, _ = trained(tmp_path)
    batch = batches()["packed"]
    objective = NextToken(label_smoothing=0.1)
    assert objective.weight(batch) == batch.trained_tokens
    total = objective.by_example(model, batch).sum()
    assert relative_error(total.detach(), objective.loss_sum(model, batch).detach()) < 1e-5


def test_adapters_switched_off_are_the_base(tmp_path):
    model, adapters = trained(tmp_path)
    base = CausalLM(read_tiny(tmp_path, "nf4"), tmp_path, Quantization("nf4"), torch.float32)
    batch = batches()["padded"]
    with torch.no_grad():
        tuned = model.logits(batch)
        with adapters.disabled(model.module):
            assert torch.equal(model.logits(batch), base.logits(batch))
        assert torch.equal(model.logits(batch), tuned)
    assert relative_error(tuned, base.logits(batch)) > 1e-2


def test_without_the_untrained_tensors_there_is_no_reference(tmp_path):
    model, adapters = trained(tmp_path, modules_to_save=["lm_head"])
    with pytest.raises(UserError, match="no untrained model"), adapters.disabled(model.module):
        pass


def test_a_step_takes_any_objective(tmp_path):
    """How far the tuned model's losses are above the base's, by example: the form of a preference objective."""

    class AboveBase:
        def __init__(self, adapters: AdapterSet):
            self.adapters = adapters

        def weight(self, batch: Batch) -> float:
            return 4.0

        def loss_sum(self, model: CausalLM, batch: Batch) -> Tensor:
            with torch.no_grad(), self.adapters.disabled(model.module):
                base = model.example_losses(batch)
            return nn.functional.softplus(model.example_losses(batch) - base).sum()

    model, adapters = trained(tmp_path)
    batch = collate([[example(9, 1)], [example(7, 2)]], pad_token_id=0, packing=False, padding_free=True)
    settings = StepSettings(0.0, AboveBase(adapters))
    expected = float(settings.objective.loss_sum(model, batch)) / 4.0
    optimizer = Optimizer("adamw", adapters.parameters())
    losses = [float(train_step(model, optimizer, [batch], settings, 1e-2).loss) for _ in range(4)]
    assert losses[0] == pytest.approx(expected, rel=1e-6)
    assert losses[-1] < losses[0] - 0.1
