"""The comparison with PEFT: the verdict is on the mean losses, and both sides give the same loss before any step."""

from __future__ import annotations

import importlib.util
import json
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


def script(name: str) -> ModuleType:
    """A script of tools/ as a module."""
    loader = SourceFileLoader(name, str(TOOLS / name))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        patch.setattr("sys.dont_write_bytecode", True)
        yield script("compare_with_peft")


def run(ours: float, peft: float) -> dict:
    return {"ours": {"eval_losses": {0: 4.0, 2: ours}}, "peft": {"eval_losses": {0: 4.0, 2: peft}}}


def test_the_verdict_is_on_the_means(tool: ModuleType):
    verdict = tool.judge([run(1.0, 2.0), run(3.0, 2.0)])
    assert verdict["mean_eval_loss"] == {"ours": 2.0, "peft": 2.0} and verdict["ratio"] == 1.0 and verdict["passed"]
    assert tool.judge([run(1.0, 1.0), run(1.0, 4.0)])["ratio"] == pytest.approx(0.4)  # not 0.625
    assert tool.judge([run(1.019, 1.0)])["passed"] and not tool.judge([run(1.021, 1.0)])["passed"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny Llama, with a tokenizer that knows a character a token and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "model"
    script("make_random_model").main([str(folder), "--shape", "tiny-llama"])
    words = {chr(code): code for code in range(32, 127)} | {"<end>": 0, "<unknown>": 1}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="<unknown>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}<end>{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


def test_both_sides_begin_alike_and_learn(tool: ModuleType, model: Path, tmp_path: Path, monkeypatch, capsys):
    rows = [{"prompt": f"say {n}", "completion": "abc " * (n % 3 + 1)} for n in range(12)]
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["--train", str(tmp_path / "train.jsonl"), "--eval", str(tmp_path / "eval.jsonl")]
    outputs = ["--json", str(tmp_path / "c.json"), "--plot", str(tmp_path / "c.png")]
    sizes = ["--rows", "8", "--batch", "4", "--steps", "5", "--seeds", "1", "--eval-every", "2", "--r", "4"]
    monkeypatch.setattr("sys.argv", ["compare_with_peft", str(model), *files, *outputs, *sizes])
    code = tool.run_tool(tool.main)
    results = json.loads((tmp_path / "c.json").read_text())
    assert code == (0 if results["passed"] else 1), capsys.readouterr().err
    (only,) = results["runs"]
    ours, peft = only["ours"], only["peft"]
    assert list(ours["eval_losses"]) == list(peft["eval_losses"]) == ["0", "2", "4", "5"]
    assert ours["eval_losses"]["0"] == pytest.approx(peft["eval_losses"]["0"], rel=1e-5)
    assert ours["losses"][0] == pytest.approx(peft["losses"][0], rel=1e-5)
    for side in (ours, peft):
        assert len(side["losses"]) == 5 and side["eval_losses"]["5"] < side["eval_losses"]["0"]
    # q, k, v, o, gate, up, down of two layers: r * (in + out)
    assert only["trained_weights"] == 2 * 4 * (128 + 96 + 96 + 128 + 192 + 192 + 192)
    assert (tmp_path / "c.png").stat().st_size > 1000
