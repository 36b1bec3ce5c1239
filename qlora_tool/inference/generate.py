"""What `generate` does: prompts answered by a model and, where asked for, by its base before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from qlora_tool.artifacts import Artifact
from qlora_tool.config import DataConfig
from qlora_tool.data.prompts import Prompt, prompts_from_texts, read_prompts
from qlora_tool.errors import UserError
from qlora_tool.inference.answer import Answer, Answers, answer
from qlora_tool.inference.open import open_artifact
from qlora_tool.inference.options import BASE
from qlora_tool.inference.peak import PeakMemory
from qlora_tool.inference.sampling import Sampling
from qlora_tool.inference.several import Opened, Several

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_tool.config import ModelConfig


@dataclass(frozen=True)
class Questions:
    """What is asked.

    Attributes:
        texts: prompts.
        file: more of them; see `read_prompts`.
        system: a system turn before each.
    """

    texts: Sequence[str]
    file: str | None = None
    system: str | None = None

    def read(self, artifact: Artifact, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
        """The prompts as a tokenizer writes them: those given as texts, then those of the file."""
        own, kwargs = artifact.run.data if artifact.run else DataConfig(), artifact.chat_template_kwargs
        prompts = prompts_from_texts(self.texts, tokenizer, kwargs, self.system)
        if self.file is not None:
            prompts += read_prompts(self.file, "auto", tokenizer, kwargs, own.columns, self.system)
        return prompts


@dataclass(frozen=True)
class PromptAnswer:
    """A prompt and what was answered.

    Attributes:
        prompt: the question as a person would write it: the last turn before the answer.
        answer: with its number of tokens and why it ends.
        base: the base's, where that was asked for.
        each: each adapter's by its name, where there are several; `answer` is the first's.
    """

    prompt: str
    answer: Answer
    base: Answer | None = None
    each: Mapping[str, Answer] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The answer, special tokens left out."""
        return self.answer.text

    @property
    def base_text(self) -> str | None:
        """The base's, where that was asked for."""
        return self.base and self.base.text

    @property
    def by_adapter(self) -> dict[str, str]:
        """Each adapter's by its name, where there are several; `text` is the first's."""
        return {name: one.text for name, one in self.each.items()}

    def as_json(self) -> dict[str, Any]:
        found = {"prompt": self.prompt, **self.answer.as_json()}
        if self.base is not None:
            found["base"] = self.base.as_json()
        if self.each:
            found["by_adapter"] = {name: one.as_json() for name, one in self.each.items()}
        return found


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
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class GenerateResult:
    """The answers to all prompts.

    Attributes:
        answers: one a prompt, in their order: those given as texts, then those of the file.
        effort: what they took.
        base_effort: what the base's took, where it was asked too.
        by_adapter: what each adapter's took by its name, where there are several; `effort` is the first's.

    Example:
        >>> from qlora_tool import generate
        >>> result = generate("my-run", prompt=["First?", "Second?"], max_new_tokens=4)
        >>> [answer.prompt for answer in result.answers], result.effort.tokens <= 8
        (['First?', 'Second?'], True)
    """

    answers: tuple[PromptAnswer, ...]
    effort: Effort
    base_effort: Effort | None = None
    by_adapter: Mapping[str, Effort] = field(default_factory=dict)


def generate(
    artifact: Artifact | Several, questions: Questions, sampling: Sampling, compare_base: bool = False
) -> GenerateResult:
    """Answer prompts.

    Args:
        artifact: what answers; of several adapters each, on one base that is read once.
        compare_base: let the model that `artifact` was made from answer first.

    Raises:
        UserError: it is not known what the artifact was made from; and see `read_prompts`, `open_artifact`, `answer`.
    """
    if isinstance(artifact, Several):
        return _generate_several(artifact, questions, sampling, compare_base)
    if not compare_base:
        prompts, answers, peak = _answers(artifact, questions, sampling)
        pairs = zip(prompts, answers.each, strict=True)
        return GenerateResult(tuple(PromptAnswer(prompt.text, one) for prompt, one in pairs), effort_of(answers, peak))
    base = Artifact(_base_of(artifact).name_or_path, _base_of(artifact),
                    chat_template_kwargs=artifact.chat_template_kwargs)  # fmt: skip
    _, before, base_peak = _answers(base, questions, sampling)
    prompts, answers, peak = _answers(artifact, questions, sampling)
    triples = zip(prompts, answers.each, before.each, strict=True)
    return GenerateResult(
        tuple(PromptAnswer(prompt.text, one, of_base) for prompt, one, of_base in triples),
        effort_of(answers, peak), effort_of(before, base_peak),
    )  # fmt: skip


def _generate_several(
    several: Several, questions: Questions, sampling: Sampling, compare_base: bool
) -> GenerateResult:
    names = [*([BASE] if compare_base else []), *several.adapters]
    answers: dict[str, list[Answer]] = {}
    efforts: dict[str, Effort] = {}
    prompts: list[Prompt] = []
    with PeakMemory() as peak:
        opened = Opened(several)
        peak.watch(opened.model.device)
        asked = {name: questions.read(opened.artifact(name), opened.tokenizers[name]) for name in names}
        for name in names:
            model, tokenizer = opened.use(name)
            prompts = asked[name]
            found = answer(model, tokenizer, prompts, sampling, ends=opened.ends[name])
            answers[name], efforts[name] = found.each, effort_of(found, 0)
    efforts = {name: replace(effort, peak_bytes=peak.bytes) for name, effort in efforts.items()}
    base_effort, of_base = efforts.pop(BASE, None), answers.pop(BASE, None)
    first = next(iter(answers))
    return GenerateResult(
        tuple(
            PromptAnswer(prompt.text, answers[first][index], of_base[index] if of_base else None,
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
    artifact: Artifact, questions: Questions, sampling: Sampling
) -> tuple[list[Prompt], Answers, int]:
    """The prompts as this artifact's tokenizer writes them, its answers, and the peak of memory over its life."""
    with PeakMemory() as peak:
        model, tokenizer = open_artifact(artifact)
        peak.watch(model.device)
        prompts = questions.read(artifact, tokenizer)
        answers = answer(model, tokenizer, prompts, sampling)
    return prompts, answers, peak.bytes


def effort_of(answers: Answers, peak_bytes: int) -> Effort:
    """What answers took.

    Args:
        peak_bytes: of memory.
    """
    return Effort(answers.tokens, answers.seconds, peak_bytes)
