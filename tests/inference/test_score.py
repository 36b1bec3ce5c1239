"""The loss against a sum by hand in plain transformers; exact matches of answers that are known beforehand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_adapters import FP32, write_chat_base
from tokenizers_for_tests import CHATML, byte_level

from qlora_tool.config import DataConfig, ModelConfig
from qlora_tool.data.prompts import read_prompts
from qlora_tool.errors import UserError
from qlora_tool.inference import score as module
from qlora_tool.inference.answer import answer
from qlora_tool.inference.likeness import token_f1
from qlora_tool.inference.open import open_for_inference
from qlora_tool.inference.sampling import Sampling
from qlora_tool.inference.score import EvaluateResult, Score, exact_match, score

DATA = DataConfig(max_length=128)
ROWS = [
    {"prompt": "What is the capital of France?", "completion": "Paris."},
    {"prompt": "Who?", "completion": "The capital of France, the path to a folder, and twelve boats."},
    {"prompt": "how many boats are there", "completion": "12"},
    {"prompt": "no answer", "completion": ""},
    {"prompt": "yes?", "completion": "no"},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_base("llama", tmp_path_factory.mktemp("bases") / "llama")


@pytest.fixture(scope="module")
def opened(base: Path):
    return open_for_inference(ModelConfig(name_or_path=str(base), quantization="none", **FP32))


def write_rows(file: Path, rows: list[dict]) -> str:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(file)


@torch.no_grad()
def loss_by_hand(base: Path, rows: list[dict]) -> tuple[float, int]:
    """The mean of −log p over all tokens of the answers, their end included, and how many there are."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tokenizer = byte_level(CHATML)
    losses = []
    for row in rows:
        start = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        prompt = f"{start}<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        before = tokenizer(prompt)["input_ids"]
        ids = tokenizer(f"{prompt}{row['completion']}<|im_end|>\n")["input_ids"]
        log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        losses += [-float(log_p[place - 1, ids[place]]) for place in range(len(before), len(ids))]
    return sum(losses) / len(losses), len(losses)


def test_loss_is_the_mean_over_all_tokens_of_a_file(base: Path, opened, tmp_path: Path):
    """Rows without an answer count for nothing, and how many rows share a pass makes no difference."""
    for name, rows in [("one", ROWS), ("two", ROWS[:2] * 3)]:
        source = write_rows(tmp_path / f"{name}.jsonl", rows)
        loss, tokens = loss_by_hand(base, [row for row in rows if row["completion"]])
        for batch_size in (1, 3, 8):
            found = score(*opened, source, DATA, batch_size=batch_size)
            assert found.tokens == tokens
            assert found.loss == pytest.approx(loss, rel=1e-5)  # fp32 sums of some thirty terms
            assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
            assert (found.exact_match, found.answers) == (None, None)
        means = [loss_by_hand(base, [row])[0] for row in rows if row["completion"]]
        assert abs(sum(means) / len(means) - loss) > 1e-3  # a mean of means is something else


def test_text_is_scored_whole(base: Path, opened, tmp_path: Path):
    (tmp_path / "text.txt").write_text("The capital of France is Paris.", encoding="utf-8")
    tokenizer = byte_level(CHATML)
    ids = [*tokenizer("The capital of France is Paris.")["input_ids"], tokenizer.eos_token_id]
    assert score(*opened, str(tmp_path / "text.txt"), DATA).tokens == len(ids) - 1


@pytest.mark.parametrize(
    ("text", "expected", "equal"),
    [
        ("Paris", "Paris", True),
        (" \nParis\t", "Paris ", True),
        ("Paris\n", "\n Paris", True),
        ("paris", "Paris", False),
        ("Pa ris", "Paris", False),
        ("two  words", "two words", False),
        ("Paris.", "Paris", False),
        ("", "Paris", False),
    ],
)
def test_exact_match_strips_the_outside_alone(text, expected, equal):
    assert exact_match(text, expected) is equal


def test_exact_matches_of_answers_that_are_known(opened, tmp_path: Path):
    model, tokenizer = opened
    greedy = Sampling(max_new_tokens=6, batch_size=2)
    questions = ["Who?", "yes?", "What is the capital of France?", "how many boats"]
    asked = write_rows(tmp_path / "asked.jsonl", [{"prompt": question} for question in questions])
    texts = answer(model, tokenizer, read_prompts(asked, "auto", tokenizer), greedy).texts
    assert all(text.strip() for text in texts)
    rows = [
        {"prompt": questions[0], "completion": f"\n {texts[0]}  "},
        {"prompt": questions[1], "completion": texts[1] + "!"},
        {"prompt": questions[2], "completion": texts[2]},
        {"prompt": questions[3], "completion": texts[2]},
        {"prompt": questions[0], "completion": ""},
        {"prompt": questions[0], "completion": " "},
    ]
    found = score(model, tokenizer, write_rows(tmp_path / "rows.jsonl", rows), DATA, sampling=greedy)
    assert found.exact_match == 2 / 4
    assert found.answers.texts == texts
    assert [one.exact_match for one in found.scored] == [True, False, True, False]
    assert [one.where for one in found.scored] == [f"{tmp_path}/rows.jsonl, line {line}" for line in range(1, 5)]
    likes = [token_f1(text, row["completion"]) for text, row in zip(texts, rows, strict=False)]
    assert found.token_f1 == pytest.approx(sum(likes) / 4) and likes[:3] == [1, 1, 1] and likes[3] < 1
    shown = EvaluateResult({"rows": found}, show=3).shown("rows")
    assert [one["answer"].where[-1] for one in shown] == ["2", "4", "1"]  # those that are not exact first
    assert found.loss == score(model, tokenizer, str(tmp_path / "rows.jsonl"), DATA).loss


def test_json_has_five_keys_without_answers():
    values = {"loss": 1.0, "perplexity": 2.0, "tokens": 3}
    assert json.dumps(Score(**values).as_json()) == json.dumps(values | {"exact_match": None, "token_f1": None})
    assert Score(**values, exact_match=0.5).as_json() == values | {"exact_match": 0.5, "token_f1": None}


def test_without_answers_generating_is_refused_before_the_model_runs(opened, tmp_path: Path, monkeypatch):
    (tmp_path / "text.txt").write_text("The capital of France is Paris.", encoding="utf-8")
    monkeypatch.setattr(module, "evaluate_loss", lambda *args: pytest.fail("the model ran"))
    with pytest.raises(UserError, match=rf"{tmp_path}/text\.txt: --generate compares answers, and no row has one"):
        score(*opened, str(tmp_path / "text.txt"), DATA, sampling=Sampling())


def test_what_is_dropped_or_cut_is_told(opened, tmp_path: Path, caplog):
    source = write_rows(tmp_path / "rows.jsonl", ROWS)
    with caplog.at_level("INFO", "qlora_tool"):
        score(*opened, source, DataConfig(max_length=40))
    assert f"{source}: 5 rows (prompt_completion), 4 kept" in caplog.text
    assert "1 row dropped: without an answer" in caplog.text
    assert "1 row cut at data.max_length 40" in caplog.text
