"""How far two models agree: on distributions whose divergence is known, and on rows whose loss is known."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_adapters import FP32, write_chat_base

from qlora_tool.build.open import open_model
from qlora_tool.config import ModelConfig
from qlora_tool.data.tokenize import Dataset, Example
from qlora_tool.export import verify
from qlora_tool.export.verify import Predictions, choose_rows, compare, predict
from qlora_tool.inference.evaluation import evaluate_loss

LIVE = [[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]
EXPORTED = [[0.25, 0.5, 0.25], [0.1, 0.2, 0.7]]


def example(ids: list[int], trained: int = 0) -> Example:
    """The last `trained` tokens are trained."""
    return Example(ids, [-100] * (len(ids) - trained) + ids[len(ids) - trained :], "here")


def table(rows: verify.Rows, probabilities: list[list[float]]) -> Predictions:
    """A model whose next-token distribution depends on the token alone; its logits are off by a constant."""
    logits = torch.tensor(probabilities).log() + 3.0
    ids = torch.cat([batch.input_ids[verify._there(batch)] for batch in rows.batches])
    return Predictions(torch.nn.functional.one_hot(ids, len(probabilities)).float(), lambda hidden: hidden @ logits)


@pytest.fixture
def rows() -> verify.Rows:
    return choose_rows([example([0, 1, 0], trained=1), example([1, 1])], max_tokens=100)


def test_a_model_agrees_with_itself(rows):
    found = compare(table(rows, LIVE), table(rows, LIVE), rows)
    assert (found.tokens, found.argmax_agreement) == (5, 1.0)
    assert found.mean_kl == found.worst_kl == pytest.approx(0, abs=1e-12)
    assert (found.live_loss, found.live_loss_all) == (found.exported_loss, found.exported_loss_all)


@pytest.mark.parametrize("chunk", [1, 6, 1 << 20])
def test_divergence_is_from_the_live_model_and_by_token(rows, monkeypatch, chunk):
    monkeypatch.setattr(verify, "_CHUNK", chunk)  # logits at a time: a token, two, all
    kl = 0.5 * math.log(2) + 0.25 * math.log(0.5)  # Σ p·log(p/q) after token 0, which is there twice; 0 after token 1
    found = compare(table(rows, LIVE), table(rows, EXPORTED), rows)
    assert found.mean_kl == pytest.approx(2 * kl / 5, rel=1e-5)
    assert found.worst_kl == pytest.approx(kl, rel=1e-5)
    assert found.argmax_agreement == 3 / 5


def test_losses_are_of_the_tokens_that_follow(rows):
    found = compare(table(rows, LIVE), table(rows, EXPORTED), rows)
    assert found.trained_tokens == 1
    assert found.live_loss == pytest.approx(-math.log(0.1))  # 0 after 1
    assert found.live_loss_all == pytest.approx(-(math.log(0.25) + math.log(0.1) + math.log(0.2)) / 3)  # 1|0, 0|1, 1|1
    assert found.exported_loss_all == pytest.approx(-(math.log(0.5) + math.log(0.1) + math.log(0.2)) / 3)


def test_nothing_trained_and_nothing_that_follows():
    rows = choose_rows([example([1])], max_tokens=100)
    found = compare(table(rows, LIVE), table(rows, LIVE), rows)
    assert (found.tokens, found.trained_tokens) == (1, 0)
    assert found.live_loss is found.exported_loss_all is None


def test_no_more_tokens_than_asked_for():
    rows = choose_rows([example([0, 1, 2]), example([3, 4], trained=1), example([5])], max_tokens=4)
    assert rows.tokens == 4
    assert sorted(rows.targets.tolist()) == [-100, -100, 1, 2]  # the 4 that follows 3 is cut off
    assert not rows.trained.any()


def test_batches_stay_small(monkeypatch):
    monkeypatch.setattr(verify, "BATCH_TOKENS", 8)
    rows = choose_rows([example(list(range(length))) for length in (3, 12, 4, 3, 2)], max_tokens=100)
    assert [tuple(batch.input_ids.shape) for batch in rows.batches] == [(2, 3), (2, 4), (1, 12)]
    assert rows.tokens == 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    folder: Path = write_chat_base("llama", tmp_path_factory.mktemp("bases") / "llama")
    return open_model(ModelConfig(name_or_path=str(folder), quantization="nf4", **FP32))


def test_the_loss_is_evaluations_own(model):
    generator = torch.Generator().manual_seed(0)
    examples = [example(torch.randint(200, (length,), generator=generator).tolist(), trained=length // 2)
                for length in (9, 4, 17, 9)]  # fmt: skip
    rows = choose_rows(examples, 100)
    found = predict(model, rows)
    expected = evaluate_loss(model, Dataset(examples, SimpleNamespace()), 2, 0)
    agreement = compare(found, found, rows)
    assert agreement.trained_tokens == expected.tokens
    assert agreement.live_loss == pytest.approx(expected.loss, rel=1e-6)


@torch.no_grad()
def test_full_logits_and_hidden_states_tell_the_same(model, monkeypatch):
    rows = choose_rows([example([5, 17, 99, 3]), example([8, 77])], 100)
    hidden = predict(model, rows)
    monkeypatch.setattr(model, "projects_plainly", False)
    whole = predict(model, rows)
    assert (hidden.full_logits, whole.full_logits) == (False, True)
    assert hidden.features.shape == (6, model.config.hidden_size)
    assert compare(hidden, whole, rows).worst_kl < 1e-9
    alone = model.module(input_ids=torch.tensor([[5, 17, 99, 3]]), use_cache=False).logits[0]  # the longer comes last
    torch.testing.assert_close(whole.features[2:], alone)
