"""What the quickstart counts with, and what it concludes."""

from __future__ import annotations

import importlib.util
import json
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from measuring import exact_match
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def quickstart(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, which has no .py at its end, as a module."""
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    loader = SourceFileLoader("quickstart_script", str(TOOLS / "quickstart"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and an end of turn that is the padding too, as in the demo model."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({letter: index + 1 for index, letter in enumerate(letters)} | {"<end>": 0}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<end>", pad_token="<end>", padding_side="left")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def greedy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """One prompt alone, without padding or cache, up to the end of turn or 256 tokens."""
    ids = tokenizer(prompt).input_ids
    written: list[int] = []
    while len(written) < 256:
        with torch.inference_mode():
            token = int(model(torch.tensor([ids + written]), use_cache=False).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        written.append(token)
    return tokenizer.decode(written).strip()


def test_answers_in_batches_are_those_of_each_prompt_alone(model, tokenizer, monkeypatch):
    monkeypatch.setattr(exact_match, "BATCH", 2)
    prompts = ["a longer prompt", "short", "one more"]
    alone = [greedy(model, tokenizer, prompt) for prompt in prompts]
    assert len(set(alone)) == 3
    assert exact_match.answers(model, tokenizer, prompts) == alone


def test_only_outer_white_space_is_forgiven(tokenizer, tmp_path: Path, monkeypatch):
    expected = [' {"a": 1}\n', '{"a": 1}', '{"a": 1}', '{"a": 1}']
    monkeypatch.setattr(exact_match, "answers", lambda *_: ['{"a": 1}', '{"a":1}', '{"a": 1}', '{"a": 1}'])
    conversations = [
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}]}
        for answer in expected
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(conversation) + "\n" for conversation in conversations))
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    result = exact_match.measure(None, tokenizer, file, None)
    assert (result["rows"], result["exact_match"]) == (4, 0.75)


@pytest.mark.parametrize("path", ["/plain/train.jsonl", "/with space/a.jsonl", "C:\\data\\a #1.jsonl"])
def test_a_path_survives_the_override(quickstart, path: str):
    assert yaml.safe_load(quickstart.as_yaml(Path(path))) == str(Path(path))


@pytest.mark.parametrize(
    ("after", "fresh", "rows", "status"), [(0.95, 0.91, None, 0), (0.95, 0.88, None, 1), (0.1, 0.1, 16, 0)]
)
def test_the_summary_is_written_and_too_little_is_a_fault(
    quickstart, tmp_path: Path, capsys, after: float, fresh: float, rows: int | None, status: int
):
    result = {
        "before": 0.0,
        "after": after,
        "rows": 120,
        "fresh": {"seed": 5, "rows": 100, "after": fresh},
        "train_rows": rows or quickstart.ROWS,
        "seconds": {"train": 200.0, "total": 300.0},
        "export": str(tmp_path / "merged"),
    }
    assert quickstart.conclude(result, tmp_path, ["qlora-tool"]) == status
    assert json.loads((tmp_path / "demo_result.json").read_text()) == result
    printed = capsys.readouterr()
    assert f"{after:.1%}" in printed.out and str(tmp_path / "merged") in printed.out
    assert printed.err.startswith("error: exact match 88.0%") == bool(status)
