"""From a data source to token ids and labels."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import TYPE_CHECKING

from qlora_tool.data.chat import ConversationRenderer, Rendered, RenderedRow, row_of
from qlora_tool.data.faults import RowFault, RowFaults
from qlora_tool.data.formats import find_format, read_conversations, read_documents
from qlora_tool.data.labels import IGNORED, label_answers, token_ids
from qlora_tool.data.messages import Conversation
from qlora_tool.data.readers.rows import Row
from qlora_tool.data.report import DataReport
from qlora_tool.data.sources import hashes, read_rows
from qlora_tool.data.template import install_chat_template
from qlora_tool.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_tool.config import DataConfig

__all__ = ["DataReport", "Dataset", "Example", "build_dataset", "build_evaluation_sets"]


@dataclass(frozen=True)
class Example:
    """One sequence to train on.

    Attributes:
        input_ids: at most max_length token ids.
        labels: as many; the id itself where the token is trained, else -100. Not shifted: the model does that, so the
            first label never counts.
        where: the row it comes from.
    """

    input_ids: list[int]
    labels: list[int]
    where: str

    @property
    def trained_tokens(self) -> int:
        """The labels that count in the loss."""
        return len(self.labels) - 1 - self.labels[1:].count(IGNORED)


@dataclass(frozen=True)
class Dataset:
    """The examples of one source, in its order, and the report on how they came about."""

    examples: list[Example]
    report: DataReport

    @property
    def lengths(self) -> list[int]:
        """Tokens of every example, as `batches.plan_epoch` takes them."""
        return [len(example.input_ids) for example in self.examples]


def build_dataset(
    source: str,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    key: str = "data.train",
    first: int | None = None,
) -> Dataset:
    """Read, format and tokenize a data source.

    Args:
        source: a file, a folder or a hub id.
        data: how rows are read, rendered and cut; its `train` and `eval` are not looked at.
        tokenizer: for conversations it leaves with the chat template that was used as its own (see
            `chat.install_chat_template`), so that saving it keeps that too.
        key: what errors call the source. Text in `data.train` contradicts a `train_on: completion` that somebody set.
        first: read no more rows than this; `DataReport.more_rows` says whether there are more. Files are not hashed.

    Raises:
        UserError: the source is missing or broken, rows do not have the format, the template refuses them, or nothing
            is left to learn from.
        MachineError: the hub cannot be reached.
    """
    rows, more_rows = _first_rows(source, first)
    form = find_format(rows, data.format)
    as_text = form == "text"
    if as_text and key == "data.train":
        refuse_answers_of_text(data, source)
    report = DataReport(
        source=source,
        format=form,
        template=None if as_text else install_chat_template(tokenizer, data.chat_template),
        train_on="all" if as_text else data.train_on,
        max_length=data.max_length,
        rows=len(rows),
        more_rows=more_rows,
        files=hashes(source) if first is None else {},
    )
    if as_text:
        examples = _text_examples(rows, tokenizer, report)
    else:
        renderer = ConversationRenderer.of(
            tokenizer,
            every_answer=data.train_on == "completion",
            multi_turn=data.multi_turn,
            kwargs=data.chat_template_kwargs,
        )
        examples = _conversation_examples(read_conversations(rows, form), renderer, report)
    _count_tokens(report, examples)
    if not report.trained_tokens:
        raise UserError(
            f"{key}: nothing to learn from: {'; '.join(report.lines())}; each row needs an answer that begins within "
            "data.max_length"
        )
    return Dataset(examples, report)


def refuse_answers_of_text(data: DataConfig, source: str) -> None:
    """Refuse a `train_on: completion` that somebody set where the training data are text.

    Evaluation files may be text beside a training set of conversations, so only the training set can contradict.
    """
    if data.train_on == "completion" and "train_on" in data.model_fields_set:
        raise UserError(
            f"data.train_on: completion cannot go with data.train {source}, which is text and so has no answers: every "
            "token is trained; leave data.train_on out, or set it to all"
        )


def _first_rows(source: str, count: int | None) -> tuple[list[Row], bool]:
    """The first `count` rows of a source, or all of them; and whether there are more.

    Raises:
        UserError: rows that cannot be read are among them.
    """
    faults = RowFaults()
    rows = iter(read_rows(source, faults))
    taken = list(islice(rows, count))
    more = next(rows, None) is not None
    faults.raise_any()
    return taken, more


def evaluation_sources(data: DataConfig) -> dict[str, str]:
    """The sources that `data.eval` names, by name; none where it is a fraction of the training data."""
    if isinstance(data.eval, str):
        return {"eval": data.eval}
    return dict(data.eval) if isinstance(data.eval, dict) else {}


def build_evaluation_sets(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, train: Dataset, *, first: int | None = None
) -> tuple[Dataset, dict[str, Dataset]]:
    """The evaluation sets that `data.eval` asks for, by name, and what is left to train on.

    A source by itself is named `eval`, as is a fraction split off the training set. Which examples a fraction takes
    depends on their tokens alone, not on their order or `data.shuffle`: equal examples never part, so none that is
    evaluated is trained on as well.

    Args:
        first: read no more rows of a source than this.

    Returns:
        The training set, smaller where a fraction was split off it, and the evaluation sets.
    """
    if data.eval is None:
        return train, {}
    if sources := evaluation_sources(data):
        named = isinstance(data.eval, dict)
        return train, {
            name: build_dataset(
                source, data, tokenizer, key=f"data.eval.{name}" if named else "data.eval", first=first
            )
            for name, source in sources.items()
        }
    rest, evaluation = _split(train, float(data.eval))
    return rest, {"eval": evaluation}


def _split(train: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    digests: list[bytes] = []
    row = None
    for example in train.examples:
        # Answers of one conversation stay together: the later ones have the earlier ones in their prompts.
        if row is None or row_of(example.where) != row:
            row = row_of(example.where)
            digests.append(hashlib.sha256(array("q", example.input_ids).tobytes()).digest())
        else:
            digests.append(digests[-1])
    wanted = max(1, round(fraction * len(digests)))
    last = sorted(digests)[wanted - 1]
    chosen = [example for example, digest in zip(train.examples, digests, strict=True) if digest <= last]
    rest = [example for example, digest in zip(train.examples, digests, strict=True) if digest > last]
    if not rest:
        raise UserError(
            f"data.eval: a fraction of {fraction} takes all of the {len(digests)} examples of {train.report.source}; "
            "give a smaller one, or a file"
        )
    source = f"{train.report.source} ({fraction:g} of it)"
    evaluation = replace(
        train.report,
        source=source,
        rows=len(chosen),
        kept=len(chosen),
        dropped_no_answer=0,
        dropped_context=0,
        dropped_unwritten=0,
        dropped_truncated=0,
        truncated=0,
        answers=sum(_answers(example) for example in chosen),
        context_answers=0,
        empty_answers=0,
        rewritten=0,
        rewritten_examples=0,
        notes=Counter(),
        ends_added=0,
    )
    remaining = replace(train.report, split_off=len(chosen), answers=train.report.answers - evaluation.answers)
    _count_tokens(evaluation, chosen)
    _count_tokens(remaining, rest)
    return Dataset(rest, remaining), Dataset(chosen, evaluation)


def _answers(example: Example) -> int:
    """The runs of trained tokens."""
    return sum(before == IGNORED != label for before, label in pairwise([IGNORED, *example.labels]))


def _count_tokens(report: DataReport, examples: list[Example]) -> None:
    report.examples = len(examples)
    report.tokens = sum(len(example.input_ids) for example in examples)
    report.trained_tokens = sum(example.trained_tokens for example in examples)
    report.longest = max((len(example.input_ids) for example in examples), default=0)


def _conversation_examples(
    conversations: Iterable[Conversation], renderer: ConversationRenderer, report: DataReport
) -> list[Example]:
    examples, faults = [], RowFaults()
    for conversation in conversations:
        if not conversation.has_answer:
            report.dropped_context += bool(conversation.context)
            report.dropped_no_answer += not conversation.context
            continue
        try:
            rendered = renderer.rows(conversation)
        except RowFault as fault:
            faults.add(conversation.where, fault)
            continue
        made = [example for row in rendered.rows if (example := _example(row, renderer, report))]
        _count_conversation(report, conversation, rendered, len(made))
        examples += made
    faults.raise_any()
    return examples


def _count_conversation(report: DataReport, conversation: Conversation, rendered: Rendered, made: int) -> None:
    report.notes.update(rendered.notes)
    if not made:
        report.dropped_truncated += bool(rendered.rows)
        report.dropped_unwritten += not rendered.rows
        return
    report.kept += 1
    report.answers += sum(len(row.answers) for row in rendered.rows)
    report.context_answers += len(conversation.context)
    report.empty_answers += len(conversation.empty_answers)
    if rendered.rewritten:
        report.rewritten += 1
        report.rewritten_examples += made


def _example(row: RenderedRow, renderer: ConversationRenderer, report: DataReport) -> Example | None:
    """The row's tokens, within max_length; None where nothing is left to train."""
    ids, labels = label_answers(renderer.tokenizer, row, renderer.special, report.max_length)
    if not renderer.every_answer:
        labels = list(ids)
    example = Example(ids[: report.max_length], labels[: report.max_length], row.where)
    if example.trained_tokens < 1:
        return None
    report.ends_added += row.ends_added
    report.truncated += len(ids) > report.max_length
    return example


def _text_examples(rows: list[Row], tokenizer: PreTrainedTokenizerBase, report: DataReport) -> list[Example]:
    """Every document whole, an end-of-text token after it, cut into examples of max_length: nothing is thrown away."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{report.source}: text needs an end-of-text token after each document, and the tokenizer has none "
            "(eos_token); set one in the model's tokenizer_config.json"
        )
    examples = []
    for row, text in zip(rows, read_documents(rows), strict=True):
        if not text.strip():
            report.dropped_no_answer += 1
            continue
        ids = _document_ids(tokenizer, text)
        for begin, end in _cuts(len(ids), report.max_length):
            where = row.where if end - begin == len(ids) else f"{row.where}, tokens {begin + 1}-{end}"
            examples.append(Example(ids[begin:end], ids[begin:end], where))
        report.kept += 1
    return examples


def _document_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The document's ids: with the beginning-of-text token where the tokenizer puts one, once, and one end-of-text."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = token_ids(tokenizer, text, add_special_tokens=True)
    if bos is not None and ids[:2] == [bos, bos]:  # the text has its own
        ids = ids[1:]
    if ids[-1:] != [eos]:  # some tokenizers write it by themselves
        ids = [*ids, eos]
    return ids


def _cuts(length: int, max_length: int) -> list[tuple[int, int]]:
    """Begin and end of the pieces of a document. A lone last token, which by itself would train nothing, takes the one
    before it along."""
    ends = [*range(max_length, length, max_length), length]
    if len(ends) > 1 and length - ends[-2] == 1 and max_length > 2:
        ends[-2] -= 1
    return list(zip([0, *ends], ends, strict=False))
