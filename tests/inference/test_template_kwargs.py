"""What a run gives its chat template, `generate` and `evaluate` give it too."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from tiny_adapters import FP32, write_chat_base, write_run
from tokenizers_for_tests import REWRITING, byte_level

from qlora_tool import export_merged
from qlora_tool.api import generate
from qlora_tool.artifacts import Artifact
from qlora_tool.cli import main
from qlora_tool.config import Config, DataConfig
from qlora_tool.inference import generate as generating
from qlora_tool.inference import score as scoring
from qlora_tool.inference.answer import Answer, Answers
from qlora_tool.inference.sampling import Sampling

# As Qwen3's: the switch closes the thought in the prompt.
SWITCHED = REWRITING.replace(
    "assistant\\n' }}{% endif %}",
    "assistant\\n' }}{% if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}",
)
CLOSED = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = write_chat_base("llama", tmp_path_factory.mktemp("bases") / "llama")
    tokenizer = byte_level(SWITCHED)
    tokenizer.save_pretrained(folder)
    return folder


def run_of(base, **data):
    config = Config.model_validate({"model": {"name_or_path": str(base), "quantization": "none", **FP32}, "data": data})
    return Artifact(str(base), config.model, run=config, chat_template_kwargs=config.data.chat_template_kwargs)


@pytest.fixture
def asked(monkeypatch):
    """The prompts that a model was asked; it answers each with what was expected."""
    seen = []

    def answer(model, tokenizer, prompts, *rest):
        seen.extend(tokenizer.decode(prompt.input_ids) for prompt in prompts)
        return Answers([Answer(prompt.expected or "", 1, "stop") for prompt in prompts], 1.0)

    monkeypatch.setattr(generating, "answer", answer)
    monkeypatch.setattr(scoring, "answer", answer)
    return seen


@pytest.mark.parametrize(("kwargs", "end"), [({}, "assistant\n"), ({"enable_thinking": False}, f"assistant\n{CLOSED}")])
def test_generate(base, asked, tmp_path, kwargs, end):
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"prompt": "And you?"}) + "\n")
    artifact = run_of(base, chat_template_kwargs=kwargs)
    generating.generate(artifact, generating.Questions(["hello"], str(questions)), Sampling())
    assert len(asked) == 2
    assert all(prompt.endswith(f"<|im_start|>{end}") for prompt in asked)


@pytest.mark.parametrize(("kwargs", "trained"), [({}, f"{CLOSED}Paris.<|im_end|>\n"),
                                                 ({"enable_thinking": False}, "Paris.<|im_end|>\n")])  # fmt: skip
def test_evaluate(base, asked, tmp_path, kwargs, trained):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "The capital of France?", "completion": "Paris."}) + "\n")
    artifact = run_of(base, chat_template_kwargs=kwargs)
    found = scoring.evaluate(artifact, {"rows": str(rows)}, DataConfig(), sampling=Sampling()).scores["rows"]
    assert found.tokens == len(byte_level()(trained)["input_ids"])
    # What counts as right is what is trained: the empty thought is a part of the answer where the prompt has none.
    assert found.exact_match == 1
    assert found.answers.texts[0].strip() == trained.replace("<|im_end|>", "").strip()


def test_whatever_a_run_becomes_keeps_them(base, asked, tmp_path):
    run = write_run(tmp_path / "run", base, data={"chat_template_kwargs": {"enable_thinking": False}})
    merged = export_merged(run, tmp_path / "merged", verify=False).folder
    for made in (run, run / "adapter", merged):
        generate(made, prompt="hello")
        assert asked.pop().endswith(f"<|im_start|>assistant\n{CLOSED}")
        generate(made, prompt="hello", chat_template_kwargs={})
        assert asked.pop().endswith("<|im_start|>assistant\n")
    generate(base, prompt="hello", chat_template_kwargs={"enable_thinking": False})
    assert asked.pop().endswith(f"<|im_start|>assistant\n{CLOSED}")


@pytest.mark.parametrize("text", ["{", "[1]", "enable_thinking=false"])
def test_the_option_is_a_mapping(base, text):
    result = CliRunner().invoke(main, ["generate", str(base), "--prompt", "x", "--chat-template-kwargs", text])
    assert result.exit_code == 2
    assert "no JSON mapping" in result.stderr
