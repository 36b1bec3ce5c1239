"""What `evaluate` measures of data sets: the loss, how many answers are right to the letter, and how like they are."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qlora_tool.config import DataConfig
from qlora_tool.data.prompts import Prompt, read_prompts
from qlora_tool.data.report import LIMIT
from qlora_tool.data.tokenize import Dataset, build_dataset
from qlora_tool.errors import UserError
from qlora_tool.inference.answer import Answer, Answers, answer
from qlora_tool.inference.evaluation import evaluate_loss
from qlora_tool.inference.likeness import token_f1
from qlora_tool.inference.open import open_artifact
from qlora_tool.inference.options import BASE
from qlora_tool.inference.sampling import Sampling
from qlora_tool.inference.several import Opened, Several
from qlora_tool.model.open import check_length, positions_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_tool.artifacts import Artifact
    from qlora_tool.model.causal_lm import CausalLM

logger = logging.getLogger(__name__)

SHOWN = 3  # answers beside the expected ones


@dataclass(frozen=True)
class ScoredAnswer:
    """An answer beside the expected one.

    Attributes:
        where: the row.
        prompt: the question as a person would write it: the last turn before the answer.
        expected: what the row says, without outer white space.
        answer: what was generated.
        exact_match: whether that is the expected one, outer white space aside.
        token_f1: how like they are; see `likeness`.
    """

    where: str
    prompt: str
    expected: str
    answer: Answer
    exact_match: bool
    token_f1: float

    @classmethod
    def of(cls, prompt: Prompt, answer: Answer) -> ScoredAnswer:
        expected = prompt.expected or ""
        return cls(prompt.where, prompt.text, expected.strip(), answer, exact_match(answer.text, expected),
                   token_f1(answer.text, expected))  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        return {"where": self.where, "prompt": self.prompt, "expected": self.expected, **self.answer.as_json(),
                "exact_match": self.exact_match, "token_f1": self.token_f1}  # fmt: skip


@dataclass(frozen=True)
class Score:
    """The scores of one data set.

    Attributes:
        loss, perplexity, tokens: over its trained tokens.
        exact_match: share of answers that are right, None without generating.
        answers: what was generated, None without generating.
        token_f1: how like the answers are to the expected ones, their mean; None without generating.
        scored: every answer beside the expected one, in the order of the rows.
    """

    loss: float
    perplexity: float
    tokens: int
    exact_match: float | None = None
    answers: Answers | None = None
    token_f1: float | None = None
    scored: tuple[ScoredAnswer, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The scores, and where answers were generated all of them."""
        found = {key: getattr(self, key) for key in ("loss", "perplexity", "tokens", "exact_match", "token_f1")}
        return found if self.answers is None else found | {"answers": [one.as_json() for one in self.scored]}


@dataclass(frozen=True)
class EvaluateResult:
    """The scores of every data set, by name.

    Attributes:
        scores: of what was evaluated; of several adapters, the first's.
        by_adapter: those of each adapter by its name, where there are several, and of the `base` where that was asked
            for.
        show: how many answers of a data set `shown` gives.

    Example:
        >>> from qlora_tool import evaluate
        >>> result = evaluate("my-run", {"mine": "rows.jsonl"}, compare_base=True)
        >>> list(result.scores), len(result.by_adapter)
        (['mine'], 2)
    """

    scores: dict[str, Score]
    by_adapter: dict[str, dict[str, Score]] = field(default_factory=dict)
    show: int = SHOWN

    def shown(self, source: str) -> list[dict[str, ScoredAnswer]]:
        """Some answers of a data set, those first that are not exact: of each row, all that answered by name."""
        rows = sorted(range(len(self.scores[source].scored)),
                      key=lambda row: self.scores[source].scored[row].exact_match)  # fmt: skip
        models = self.by_adapter or {"answer": self.scores}
        return [{name: scores[source].scored[row] for name, scores in models.items()} for row in rows[: self.show]]

    def as_json(self) -> dict[str, Any]:
        """The scores; by name where there are several sets, and by adapter where there are several of these."""
        if self.by_adapter:
            return {name: _as_json(scores) for name, scores in self.by_adapter.items()}
        return _as_json(self.scores)


def _as_json(scores: Mapping[str, Score]) -> dict[str, Any]:
    found = {name: score.as_json() for name, score in scores.items()}
    return found if len(found) > 1 else next(iter(found.values()))


def evaluate(
    artifact: Artifact | Several,
    sources: Mapping[str, str],
    data: DataConfig,
    *,
    max_length: int | None = None,
    sampling: Sampling | None = None,
    batch_size: int = 16,
    compare_base: bool = False,
) -> EvaluateResult:
    """Score a model on data sets.

    Args:
        artifact: what is scored; of several adapters each, on one base that is read once.
        sources: what to score, by name.
        data: its `format` is how rows are read; what is trained and how long rows may be is as the artifact's run says.
        max_length: tokens of a row at most, in the place of the run's.
        sampling: generate answers too and count the exact matches; None leaves that out.
        batch_size: rows of a forward pass.
        compare_base: of several, score the base alone, too, first and as `base`.

    Raises:
        UserError: see `open_artifact`, `Opened`, `check_length`, `score`.
    """
    if isinstance(artifact, Several):
        return _evaluate_several(artifact, sources, data, max_length, sampling, batch_size, compare_base)
    model, tokenizer = open_artifact(artifact)
    data = _data_for(artifact, model, data, max_length)
    return EvaluateResult({
        name: score(model, tokenizer, source, data, sampling=sampling, batch_size=batch_size, limit=_limit(max_length))
        for name, source in sources.items()
    })  # fmt: skip


def _evaluate_several(
    several: Several, sources: Mapping[str, str], data: DataConfig, max_length: int | None, sampling: Sampling | None,
    batch_size: int, compare_base: bool,
) -> EvaluateResult:  # fmt: skip
    opened = Opened(several)
    asked: dict[str, dict[str, Asked]] = {}
    told: dict[str, set[str]] = {key: set() for key in sources}
    for name in [*([BASE] if compare_base else []), *several.adapters]:
        own = _data_for(opened.artifact(name), opened.model, data, max_length)
        asked[name] = {key: read_asked(source, own, opened.tokenizers[name], sampling is not None, told[key],
                                       _limit(max_length))
                       for key, source in sources.items()}  # fmt: skip
    found: dict[str, dict[str, Score]] = {}
    for name, sets in asked.items():
        model, tokenizer = opened.use(name)
        found[name] = {key: score_asked(model, tokenizer, one, sampling, batch_size, ends=opened.ends[name])
                       for key, one in sets.items()}  # fmt: skip
    return EvaluateResult(found[next(iter(several.adapters))], found)


def _limit(max_length: int | None) -> str:
    """What the limit of a row's tokens is called: by the option where that was given."""
    return "--max-length" if max_length else LIMIT


def _data_for(artifact: Artifact, model: CausalLM, data: DataConfig, max_length: int | None) -> DataConfig:
    """How rows are read for an artifact: as its run read them."""
    own = artifact.run.data if artifact.run else DataConfig()
    if max_length:
        check_length(model.config, max_length, "--max-length")
    else:
        max_length = min(own.max_length, positions_of(model.config) or own.max_length)
    return DataConfig(
        format=data.format, max_length=max_length, train_on=own.train_on, multi_turn=own.multi_turn,
        chat_template_kwargs=dict(artifact.chat_template_kwargs), columns=own.columns, on_error=own.on_error,
    )  # fmt: skip


def score(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    data: DataConfig,
    *,
    sampling: Sampling | None = None,
    batch_size: int = 8,
    done: Callable[[int], None] = lambda count: None,
    limit: str = LIMIT,
) -> Score:
    """Score a model on a data source.

    Args:
        data: how the source is read; its `train` and `eval` are not looked at.
        sampling: generate answers too and count the exact matches; None leaves that out.
        batch_size: rows of a forward pass.
        done: told how many answers are generated.
        limit: what `data.max_length` is called.

    Raises:
        UserError: see `build_dataset`; and with `sampling`, no row has an answer.
    """
    asked = read_asked(source, data, tokenizer, sampling is not None, limit=limit)
    return score_asked(model, tokenizer, asked, sampling, batch_size, done)


@dataclass(frozen=True)
class Asked:
    """A data source as a model is asked it: its rows, and the prompts of those that say what the answer should be."""

    dataset: Dataset
    prompts: Sequence[Prompt]


def read_asked(
    source: str, data: DataConfig, tokenizer: PreTrainedTokenizerBase, answers: bool, told: set[str] | None = None,
    limit: str = LIMIT,
) -> Asked:  # fmt: skip
    """Read a data source; see `score`.

    Args:
        answers: whether answers will be generated.
        told: lines that were shown already, of the same data for another model; those of this one are added.
        limit: what `data.max_length` is called.
    """
    dataset = build_dataset(source, data, tokenizer, key="--data", limit=limit)
    told = set() if told is None else told
    lines = [line for line in dataset.report.lines(limit) if line not in told]
    for line in lines:
        logger.info(line)
    told.update(lines)
    return Asked(dataset, _with_answers(source, data, tokenizer) if answers else [])


def score_asked(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    asked: Asked,
    sampling: Sampling | None,
    batch_size: int,
    done: Callable[[int], None] = lambda count: None,
    ends: list[int] | None = None,
) -> Score:
    """Score a model on what was read; see `score`, and `answer` for `ends`."""
    pad = next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
    result = evaluate_loss(model, asked.dataset, batch_size, pad)
    if sampling is None:
        return Score(result.loss, result.perplexity, result.tokens)
    prompts = asked.prompts
    answers = answer(model, tokenizer, prompts, sampling, done, ends)
    scored = tuple(ScoredAnswer.of(prompt, one) for prompt, one in zip(prompts, answers.each, strict=True))
    right, like = (sum(getattr(one, key) for one in scored) / len(scored) for key in ("exact_match", "token_f1"))
    return Score(result.loss, result.perplexity, result.tokens, right, answers, like, scored)


def _with_answers(source: str, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The prompts of the rows that say what the answer should be."""
    prompts = [
        prompt
        for prompt in read_prompts(source, data.format, tokenizer, data.chat_template_kwargs, data.columns)
        if (prompt.expected or "").strip()
    ]
    if not prompts:
        raise UserError(f"{source}: --generate compares answers, and no row has one; leave it out to get the loss")
    return prompts


def exact_match(text: str, answer: str) -> bool:
    """Whether a generated answer is the expected one, outer white space aside."""
    return text.strip() == answer.strip()
