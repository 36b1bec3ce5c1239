"""From data sources to token ids and labels."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qlora_tool.config.sources import DataSource, sources_of, told
from qlora_tool.data.examples import Example, Examples, Selection, as_examples
from qlora_tool.data.mixture import Share, mixture
from qlora_tool.data.one_source import OneSource
from qlora_tool.data.report import LIMIT, DataReport
from qlora_tool.errors import UserError
from qlora_tool.sizes import counted, noun_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_tool.config import DataConfig

__all__ = ["DataReport", "Dataset", "Example", "build_dataset", "build_evaluation_sets", "evaluation_sources"]

@dataclass(frozen=True)
class Dataset:
    """The examples of a source or a mixture, and the report on how they came about."""

    examples: Sequence[Example]
    report: DataReport

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of every example, as `batches.plan_epoch` takes them."""
        return as_examples(self.examples).lengths

    @property
    def trained(self) -> Sequence[int]:
        """Labels of every example that count in the loss."""
        return as_examples(self.examples).trained

    @property
    def highest_token(self) -> int:
        """The highest token id in any example."""
        return as_examples(self.examples).highest


def build_dataset(
    source: str | Sequence[Any],
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    key: str = "data.train",
    first: int | None = None,
    seed: int = 0,
    limit: str = LIMIT,
) -> Dataset:
    """Read, format and tokenize a data source, or several as a mixture.

    Args:
        source: a file, a folder or a hub id; or a list as `data.train` has it.
        data: how rows are read, rendered and cut; its `train` and `eval` are not looked at.
        tokenizer: for conversations it leaves with the chat template that was used as its own (see
            `template.install_chat_template`), so that saving it keeps that too.
        key: what errors call the source. Text in `data.train` contradicts a `train_on: completion` that somebody set;
            an option's source (`--data`) need not have the columns of `data.columns`, which are its run's.
        first: read no more rows of a source than this; `DataReport.more_rows` says whether there are more. Nothing is
            kept then, and files are not hashed. Of what is kept already, there are all rows.
        seed: draws the rows of a mixture's sources of which not all are taken.
        limit: what errors call `data.max_length`.

    Raises:
        UserError: the source is missing or broken, rows do not have the format, the template refuses them, or nothing
            is left to learn from.
        MachineError: the hub cannot be reached.
    """
    sources = sources_of(source)
    strict = not key.startswith("--")
    read = [OneSource(each, data, tokenizer, first, strict=strict) for each in sources]
    built = [Dataset(one.examples(), one.report) for one in read]
    if key == "data.train" and all(dataset.report.format == "text" for dataset in built):
        refuse_answers_of_text(data, told(source))
    dataset = built[0] if len(built) == 1 and _is_whole(sources[0]) else _mixed(sources, built, seed)
    if not dataset.report.trained_tokens:
        raise UserError(
            f"{key}: nothing to learn from: {'; '.join(dataset.report.lines(limit))}; each row needs an answer that "
            f"begins within {limit}"
        )
    return dataset


def refuse_answers_of_text(data: DataConfig, source: str) -> None:
    """Refuse a `train_on: completion` that somebody set where the training data are text.

    Evaluation files may be text beside a training set of conversations, so only the training set can contradict.
    """
    if data.train_on == "completion" and "train_on" in data.model_fields_set:
        raise UserError(
            f"data.train_on: completion cannot go with data.train {source}, which is text and so has no answers: every "
            "token is trained; leave data.train_on out, or set it to all"
        )


def _is_whole(source: DataSource) -> bool:
    return source.weight is None and source.rows is None and source.repeat is None


def _mixed(sources: Sequence[DataSource], built: Sequence[Dataset], seed: int) -> Dataset:
    """Several data sets as one, in the shares that are asked for; one after the other where none are."""
    parts = [as_examples(dataset.examples) for dataset in built]
    if all(map(_is_whole, sources)):
        examples, counts = Selection(parts), [dataset.report.kept for dataset in built]
    else:
        shares = [Share(source.weight, source.rows, source.repeat) for source in sources]
        indices, counts = mixture([part.rows for part in parts], shares, seed)
        examples = Selection(parts, indices)
    report = _total(", ".join(map(str, sources)), [dataset.report for dataset in built], counts)
    _count_tokens(report, examples)
    return Dataset(examples, report)


def _total(source: str, reports: Sequence[DataReport], counts: Sequence[int]) -> DataReport:
    """The report on a mixture."""
    formats = " + ".join(dict.fromkeys(report.format for report in reports))
    template = next((report.template for report in reports if report.template is not None), None)
    train_on = "all" if all(report.format == "text" for report in reports) else reports[-1].train_on
    for report in reports:
        if report.format != "text":
            train_on = report.train_on
    total = DataReport(source, formats, template, train_on, reports[0].max_length)
    for report in reports:
        total.add(replace(report, remarks=[], faulty_lines=[], skipped_files=[], columns={}, unused_columns={}))
    total.kept = sum(counts)
    total.parts = list(zip(reports, counts, strict=True))
    return total


def evaluation_sources(data: DataConfig) -> dict[str, str | list[Any]]:
    """The sources that `data.eval` names, by name; none where it is a fraction of the training data."""
    if isinstance(data.eval, str | list):
        return {"eval": data.eval}
    return dict(data.eval) if isinstance(data.eval, dict) else {}


def build_evaluation_sets(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset | None,
    *,
    first: int | None = None,
    seed: int = 0,
) -> tuple[Dataset | None, dict[str, Dataset]]:
    """The evaluation sets that `data.eval` asks for, by name, and what is left to train on.

    A source by itself is named `eval`, as is a fraction split off the training set. Which examples a fraction takes
    depends on their tokens alone, not on their order or `data.shuffle`: equal examples never part, so none that is
    evaluated is trained on as well.

    Args:
        train: the training set; None where nothing is split off it, and nothing held against it.
        first, seed: see `build_dataset`.

    Returns:
        The training set, smaller where a fraction was split off it, and the evaluation sets.
    """
    if data.eval is None:
        return train, {}
    if sources := evaluation_sources(data):
        prefix = "data.eval." if isinstance(data.eval, dict) else "data."
        built = {
            name: build_dataset(source, data, tokenizer, key=f"{prefix}{name}", first=first, seed=seed)
            for name, source in sources.items()
        }
        for evaluation in built.values() if train is not None else ():
            _say_what_is_trained_too(evaluation, train)
        return train, built
    rest, evaluation = _split(train, float(data.eval))
    return rest, {"eval": evaluation}


def _say_what_is_trained_too(evaluation: Dataset, train: Dataset) -> None:
    import numpy

    own = as_examples(evaluation.examples).digests
    both = int(numpy.isin(own, as_examples(train.examples).digests).sum())
    if both:
        evaluation.report.remarks.append(
            f"{both} of these {counted(len(own), 'example')} {noun_of(both, 'is', 'are')} in data.train as well: "
            "what is learnt by heart looks good on them"
        )


def _split(train: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    import numpy

    examples = as_examples(train.examples)
    digests = examples.digests
    different = numpy.arange(len(digests))
    if isinstance(examples, Selection):  # what a mixture has several times is evaluated once
        different = numpy.unique(numpy.asarray(examples.indices), return_index=True)[1]
    wanted = max(1, round(fraction * len(different)))
    last = numpy.sort(digests[different])[wanted - 1]
    chosen = numpy.sort(different[digests[different] <= last])
    rest = numpy.flatnonzero(digests > last)
    if not len(rest):
        every = noun_of(len(digests), "the one example", f"all of the {len(digests)} examples")
        raise UserError(
            f"data.eval: a fraction of {fraction} takes {every} of {train.report.source}"
            f"{'' if wanted > 1 else ', for it takes one at least'}; "
            f"{'give a smaller one, or a file' if wanted > 1 else 'give a file, or data.eval=null to do without'}"
        )
    report = train.report
    evaluation = DataReport(
        f"{report.source} ({_percent(fraction)} of it)", report.format, report.template, report.train_on,
        report.max_length, rows=len(chosen), kept=len(chosen), more_rows=report.more_rows, files=report.files,
        columns=report.columns,
    )  # fmt: skip
    remaining = replace(report, split_off=len(chosen))
    parts = [Selection([examples], array("i", indices.astype("int32").tobytes())) for indices in (rest, chosen)]
    for each, selection in zip((remaining, evaluation), parts, strict=True):
        _count_tokens(each, selection)
        each.answers = 0 if report.format == "text" else int(sum(selection.answers))
    return Dataset(parts[0], remaining), Dataset(parts[1], evaluation)


def _percent(fraction: float) -> str:
    """A share as it is told: `5%`, `0.5%`."""
    return f"{100 * fraction:.4g}%"


def _count_tokens(report: DataReport, examples: Examples) -> None:
    report.examples = len(examples)
    report.tokens = sum(examples.lengths)
    report.trained_tokens = sum(examples.trained)
    report.longest = max(examples.lengths, default=0)
