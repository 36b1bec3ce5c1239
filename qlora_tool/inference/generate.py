"""What `generate` does: prompts answered by a model and, where asked for, by its base before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from qlora_tool.artifacts import Artifact
from qlora_tool.config import DataConfig
from qlora_tool.data.prompts import Prompt, prompts_from_texts, read_prompts
from qlora_tool.errors import UserError
from qlora_tool.inference.answer import Answers, answer
from qlora_tool.inference.open import open_artifact
from qlora_tool.inference.peak import PeakMemory
from qlora_tool.inference.sampling import Sampling
from qlora_tool.inference.several import BASE, Opened, Several

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_tool.config import ModelConfig


@dataclass(frozen=True)
class PromptAnswer:
    """A prompt and what was answered.

    Attributes:
        prompt: the question as a person would write it: the last turn before the answer.
        text: the answer, special tokens left out.
        base_text: the base's, where that was asked for.
        by_adapter: each adapter's by its name, where there are several; `text` is the first's.
    """

    prompt: str
    text: str
    base_text: str | None = None
    by_adapter: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Effort:
    """What the answers took.

    Attributes:
        tokens: generated.
        seconds: for all answers, opening the model not counted.
        peak_bytes: of memory, the model's opening included: on CUDA the allocator's peak, on a CPU the process's.
    """

    tokens: int
    seconds: float
    peak_bytes: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class GenerateResult:
    """The answers to all prompts.

    Attributes:
        answers: one a prompt, in their order: those given as texts, then those of the file.
        effort: what they took.
        base_effort: what the base's took, where it was asked too.
        by_adapter: what each adapter's took by its name, where there are several; `effort` is the first's.
    """

    answers: tuple[PromptAnswer, ...]
    effort: Effort
    base_effort: Effort | None = None
    by_adapter: Mapping[str, Effort] = field(default_factory=dict)


def generate(
    artifact: Artifact | Several, texts: Sequence[str], file: str | None, sampling: Sampling, compare_base: bool = False
) -> GenerateResult:
    """Answer prompts.

    Args:
        artifact: what answers; of several adapters each, on one base that is read once.
        texts: prompts.
        file: more of them; see `read_prompts`.
        compare_base: let the model that `artifact` was made from answer first.

    Raises:
        UserError: it is not known what the artifact was made from; and see `read_prompts`, `open_artifact`, `answer`.
    """
    if isinstance(artifact, Several):
        return _generate_several(artifact, texts, file, sampling, compare_base)
    if not compare_base:
        prompts, answers, peak = _answers(artifact, texts, file, sampling)
        pairs = zip(prompts, answers.texts, strict=True)
        return GenerateResult(tuple(PromptAnswer(prompt.text, text) for prompt, text in pairs), _effort(answers, peak))
    base = Artifact(_base_of(artifact).name_or_path, _base_of(artifact),
                    chat_template_kwargs=artifact.chat_template_kwargs)  # fmt: skip
    _, before, base_peak = _answers(base, texts, file, sampling)
    prompts, answers, peak = _answers(artifact, texts, file, sampling)
    triples = zip(prompts, answers.texts, before.texts, strict=True)
    return GenerateResult(
        tuple(PromptAnswer(prompt.text, text, base_text) for prompt, text, base_text in triples),
        _effort(answers, peak), _effort(before, base_peak),
    )  # fmt: skip


def _generate_several(
    several: Several, texts: Sequence[str], file: str | None, sampling: Sampling, compare_base: bool
) -> GenerateResult:
    names = [*([BASE] if compare_base else []), *several.adapters]
    answers: dict[str, list[str]] = {}
    efforts: dict[str, Effort] = {}
    prompts: list[Prompt] = []
    with PeakMemory() as peak:
        opened = Opened(several)
        peak.watch(opened.model.device)
        asked = {name: _prompts(opened.artifact(name), opened.tokenizers[name], texts, file) for name in names}
        for name in names:
            model, tokenizer = opened.use(name)
            prompts = asked[name]
            found = answer(model, tokenizer, prompts, sampling, ends=opened.ends[name])
            answers[name], efforts[name] = found.texts, _effort(found, 0)
    efforts = {name: replace(effort, peak_bytes=peak.bytes) for name, effort in efforts.items()}
    base_effort, base_texts = efforts.pop(BASE, None), answers.pop(BASE, None)
    first = next(iter(answers))
    return GenerateResult(
        tuple(
            PromptAnswer(prompt.text, answers[first][index], base_texts[index] if base_texts else None,
                         {name: found[index] for name, found in answers.items()})
            for index, prompt in enumerate(prompts)
        ),
        efforts[first], base_effort, efforts,
    )  # fmt: skip


def _base_of(artifact: Artifact) -> ModelConfig:
    if artifact.base is None:
        raise UserError(f"--compare-base: {artifact.name} does not say what it was made from; give a run or an adapter")
    return artifact.base


def _answers(
    artifact: Artifact, texts: Sequence[str], file: str | None, sampling: Sampling
) -> tuple[list[Prompt], Answers, int]:
    """The prompts as this artifact's tokenizer writes them, its answers, and the peak of memory over its life."""
    with PeakMemory() as peak:
        model, tokenizer = open_artifact(artifact)
        peak.watch(model.device)
        prompts = _prompts(artifact, tokenizer, texts, file)
        answers = answer(model, tokenizer, prompts, sampling)
    return prompts, answers, peak.bytes


def _prompts(
    artifact: Artifact, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], file: str | None
) -> list[Prompt]:
    own, kwargs = artifact.run.data if artifact.run else DataConfig(), artifact.chat_template_kwargs
    prompts = prompts_from_texts(texts, tokenizer, kwargs)
    if file is not None:
        prompts += read_prompts(file, "auto", tokenizer, kwargs, own.columns)
    return prompts


def _effort(answers: Answers, peak_bytes: int) -> Effort:
    return Effort(answers.tokens, answers.seconds, peak_bytes)
