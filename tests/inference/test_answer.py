"""Answers, against transformers' own `generate` one prompt at a time; where they end; what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_adapters import FP32, artifact_of, write_adapter, write_chat_base
from tokenizers_for_tests import CHATML, LLAMA_2, STRIPPING, WITHOUT_END, byte_level, metaspace

from qlora_tool.config import ModelConfig
from qlora_tool.data.prompts import Prompt, prompts_from_texts
from qlora_tool.errors import UserError
from qlora_tool.export.options import ExportOptions
from qlora_tool.export.write import export_merged
from qlora_tool.inference import answer as module
from qlora_tool.inference.answer import answer, dense_weights, end_tokens
from qlora_tool.inference.ends import template_ends
from qlora_tool.inference.open import open_artifact, open_for_inference
from qlora_tool.inference.sampling import Sampling
from qlora_tool.weights.handles import WeightHandle

QUESTIONS = ["List all files", "a", "What is the capital of France? " * 3, "Who?", "how many boats are there", "b", "?"]
NEVER = 409  # an end that does not come
GREEDY = Sampling(max_new_tokens=12, batch_size=3)


def eager_to_end(folder: Path) -> Path:
    """Let a model say its end token early, at a time that depends on the prompt: that token's logits are larger."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight[AutoTokenizer.from_pretrained(folder).eos_token_id] *= 3
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("bases")
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = write_chat_base(family, folder / family)
        return made[family]

    return make


@pytest.fixture
def opened(bases):
    return open_for_inference(ModelConfig(name_or_path=str(bases("llama")), quantization="none", **FP32))


@torch.no_grad()
def one_at_a_time(folder: Path, prompts: list[Prompt], ends: list[int], **settings) -> list[list[int]]:
    """What transformers generates after each prompt by itself, up to its end token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt.input_ids])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=ends, pad_token_id=0,
                                do_sample=False, **({"max_new_tokens": 12} | settings))  # fmt: skip
        found.append(output[0, len(prompt.input_ids) :].tolist())
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "mistral"])
def test_greedy_answers_are_those_of_transformers_one_by_one(bases, tmp_path: Path, family: str):
    """Batches, padding on the left and the order of lengths leave no trace, nor does quantization behind handles."""
    adapter = write_adapter(tmp_path / "adapter", bases(family))
    artifact = artifact_of(adapter)
    export_merged(artifact, tmp_path / "merged", ExportOptions(dtype="float32"))
    model, tokenizer = open_artifact(artifact)
    prompts = prompts_from_texts(QUESTIONS, tokenizer)
    free = one_at_a_time(tmp_path / "merged", prompts, [NEVER])
    model.config.eos_token_id = [free[0][4], free[3][1], free[5][7]]  # so that some end early, each at its own time
    expected = one_at_a_time(tmp_path / "merged", prompts, end_tokens(model, tokenizer))
    told = []
    found = answer(model, tokenizer, prompts, GREEDY, told.append)
    assert found.texts == [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
    assert len(set(found.texts)) > 2
    assert len({len(ids) for ids in expected}) > 2
    assert found.tokens == sum(map(len, expected))
    assert told == [3, 6, 7]
    assert answer(model, tokenizer, prompts, Sampling(max_new_tokens=12, batch_size=16)).texts == found.texts


def test_answers_stop_at_the_end_of_a_turn_that_only_the_template_names(bases, tmp_path: Path):
    folder = write_chat_base("llama", tmp_path / "base", tie_word_embeddings=False)
    eager_to_end(folder)
    tokenizer = byte_level(CHATML)
    end_of_turn = tokenizer.eos_token_id
    tokenizer.eos_token = "<|endoftext|>"  # as base models have it, whose chats end otherwise
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    model, tokenizer = open_for_inference(ModelConfig(name_or_path=str(folder), quantization="none", **FP32))
    ends = end_tokens(model, tokenizer)
    assert ends == [7, 2, tokenizer.eos_token_id, end_of_turn]  # settings, config.json, tokenizer, template
    prompts = prompts_from_texts(QUESTIONS, tokenizer)
    found = answer(model, tokenizer, prompts, GREEDY)
    alone = one_at_a_time(folder, prompts, [end_of_turn])
    assert sum(ids[-1] == end_of_turn for ids in alone) > 3
    assert found.texts == [tokenizer.decode(ids, skip_special_tokens=True) for ids in alone]


@pytest.mark.parametrize(
    ("tokenizer", "end"),
    [
        (byte_level(CHATML), "<|im_end|>"),
        (byte_level(STRIPPING), "<|im_end|>"),
        (metaspace(LLAMA_2), "</s>"),
        (byte_level(CHATML.replace("<|im_end|>\\n", "</s><|endoftext|>")), "</s>"),  # the first of two
        (byte_level(WITHOUT_END), None),
        (byte_level("{{ messages[0]['content'] }}"), None),
        (byte_level("{{ raise_exception('no') }}"), None),
        (byte_level(), None),
    ],
)
def test_the_end_of_a_turn_is_read_off_the_template(tokenizer, end):
    assert template_ends(tokenizer) == ([] if end is None else [tokenizer.convert_tokens_to_ids(end)])


def test_a_model_without_any_end_token_is_refused(opened, tmp_path: Path):
    model, _ = opened
    model.config.eos_token_id = None
    model.folder = tmp_path
    tokenizer = byte_level()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=f"{tmp_path}: neither generation_config.json nor the tokenizer names a token"):
        end_tokens(model, tokenizer)


def test_prompts_beyond_the_positions_are_refused_all_together(opened):
    model, tokenizer = opened
    prompts = [Prompt([5] * length, None, f"p.txt, line {length}", "") for length in (3, 128, 127, 200)]
    with pytest.raises(UserError) as failure:
        answer(model, tokenizer, prompts, GREEDY)
    assert failure.value.lines == [
        f"p.txt, line {length}: {length} tokens, but the model has 128 positions; shorten it" for length in (128, 200)
    ]


def test_answers_end_where_the_positions_do_and_cut_no_others(bases):
    """gpt2 has an embedding for each of its 128 positions and none beyond."""
    folder = bases("gpt2")
    model, tokenizer = open_for_inference(ModelConfig(name_or_path=str(folder), quantization="none", **FP32))
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randint(20, 400, (length,), generator=generator) for length in (126, 60, 125)]
    prompts = [Prompt(ids.tolist(), None, "", "") for ids in drawn]
    model.config.eos_token_id, tokenizer.eos_token_id, tokenizer.chat_template = NEVER, NEVER, None
    model.folder = folder.parent
    assert end_tokens(model, tokenizer) == [NEVER]
    alone = [one_at_a_time(folder, [prompt], [NEVER], max_new_tokens=room)[0]
             for prompt, room in zip(prompts, (2, 12, 3), strict=True)]  # fmt: skip
    found = answer(model, tokenizer, prompts, GREEDY)
    assert found.texts == [tokenizer.decode(ids, skip_special_tokens=True) for ids in alone]
    assert found.tokens == 2 + 12 + 3


def test_sampling_depends_on_the_seed_alone(opened):
    model, tokenizer = opened
    prompts = prompts_from_texts(QUESTIONS, tokenizer)

    def texts(**settings) -> list[str]:
        return answer(model, tokenizer, prompts, Sampling(max_new_tokens=12, batch_size=4, **settings)).texts

    first = texts(temperature=1.0, seed=1)
    torch.rand(7)  # what was drawn before makes no difference
    assert texts(temperature=1.0, seed=1) == first
    assert texts(temperature=1.0, seed=2) != first
    greedy = texts()
    assert first != greedy
    assert texts(temperature=5.0, top_k=1) == greedy == texts(temperature=5.0, top_p=1e-6)


def test_weights_are_held_dense_meanwhile_where_memory_allows(bases, monkeypatch):
    model, tokenizer = open_for_inference(ModelConfig(name_or_path=str(bases("llama")), **FP32))
    handles = [part for part in model.module.modules() if isinstance(part, WeightHandle)]
    prompts = prompts_from_texts(QUESTIONS, tokenizer)
    needed = sum(handle.shape.numel() for handle in handles) * 4
    monkeypatch.setattr(module, "free_bytes", lambda device: 2 * needed - 1)
    with dense_weights(model):
        assert not any(handle._held is not None for handle in handles)
    scarce = answer(model, tokenizer, prompts, GREEDY).texts
    monkeypatch.setattr(module, "free_bytes", lambda device: 2 * needed)
    assert answer(model, tokenizer, prompts, GREEDY).texts == scarce
    with pytest.raises(RuntimeError), dense_weights(model):
        assert all(handle._held is not None for handle in handles)
        raise RuntimeError
    assert not any(handle._held is not None for handle in handles)
