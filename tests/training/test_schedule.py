"""The learning rate, step by step, against transformers' schedulers."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainingArguments, get_scheduler

from qlora_tool.training.schedule import learning_rate, warmup_length

NAMES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 7), (3, 20), (10, 20), (20, 20), (30, 20)])
def test_every_step_has_a_rate_and_after_the_warmup_that_of_transformers(kind, warmup, total):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = get_scheduler(NAMES[kind], optimizer, num_warmup_steps=warmup, num_training_steps=total)
    expected = []
    for _ in range(total):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    found = [learning_rate(step, 3e-4, kind, warmup, total) for step in range(total)]
    assert found[warmup:] == pytest.approx(expected[warmup:], rel=1e-12, abs=1e-18)
    # While it warms up, transformers is a step behind: its first one has a rate of 0.
    rising = [3e-4 * step / warmup for step in range(1, min(warmup, total) + 1)]
    assert found[:warmup] == pytest.approx(rising, rel=1e-12)
    assert min(found) > 0
    as_before = [learning_rate(step, 3e-4, kind, warmup, total, from_zero=True) for step in range(total)]
    assert as_before == pytest.approx(expected, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize(
    ("warmup_steps", "total"), [(0, 40), (0.03, 40), (0.03, 1), (0.5, 7), (0.999, 10), (1, 40), (7.0, 5)]
)
def test_the_length_of_the_warmup_is_that_of_transformers(warmup_steps, total, tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), warmup_steps=warmup_steps, report_to=[])
    assert warmup_length(warmup_steps, total) == arguments.get_warmup_steps(total)
