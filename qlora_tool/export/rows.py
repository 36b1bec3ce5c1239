"""The rows that an export looks at: those that its files are verified on, and those that codes are made with."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_tool.artifacts import Artifact, base_folder
from qlora_tool.config import DataConfig
from qlora_tool.config.sources import told
from qlora_tool.data.batches import Batch, collate
from qlora_tool.data.examples import Selection, as_examples
from qlora_tool.data.tokenize import Example, build_dataset, build_evaluation_sets, evaluation_sources
from qlora_tool.errors import ToolError, UserError
from qlora_tool.inference.open import tokenizer_folder
from qlora_tool.model.open import open_tokenizer, positions_of
from qlora_tool.model.source import read_model_config
from qlora_tool.once import log_once
from qlora_tool.sizes import noun_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MOST_TOKENS = 1 << 14  # of the calibration rows
FEWEST_TOKENS = 1024  # that tell anything of a layer's inputs
BATCH_TOKENS = 2048  # that go through a layer together, and of a row at most


@dataclass(frozen=True)
class CalibrationRows:
    """What codes are made with.

    Attributes:
        batches: rows of like length together; padding is at their ends, where it changes nothing before it.
        tokens: all of them, padding left out.
        source: what to call them.
    """

    batches: list[Batch]
    tokens: int
    source: str

    def digest(self) -> str:
        """Of all tokens."""
        ids = [(batch.input_ids.tolist(), None if batch.attention_mask is None else batch.attention_mask.tolist())
               for batch in self.batches]  # fmt: skip
        return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def find_rows(
    artifact: Artifact, data: str | None, key: str = "--verify-data"
) -> tuple[Sequence[Example], str]:
    """The rows to compare on, and what to call them: of `data`; else of the run's evaluation sets; else, where it has
    none, the rows it trained on, which tell as well whether two models agree.

    Args:
        key: the option that `data` is given by.

    Returns:
        No rows, and why, where there are none to be had.

    Raises:
        UserError: `data` cannot be read.
    """
    settings, tokenizer = _settings(artifact)
    if data is not None:
        return build_dataset(data, settings, tokenizer, key=key).examples, data
    if artifact.run is None:
        return [], f"the adapter comes without its run, and so without rows; give some with {key} FILE"
    try:
        return _rows_of_run(artifact, settings, tokenizer, artifact.run.training.seed)
    except ToolError as error:
        return [], f"the run's data cannot be read ({error}); give rows with {key} FILE"


def calibration_rows(artifact: Artifact, asked: str) -> CalibrationRows | str:
    """The rows to make codes with.

    Args:
        asked: `auto`, for the rows that the run trained on; `none`; or a file.

    Returns:
        Why there are none, where there are none.

    Raises:
        UserError: the file cannot be read, or holds too little.
    """
    if asked == "none":
        return "not asked for"
    if asked == "auto" and artifact.run is None:
        return "the adapter comes without its run, and so without rows; give some with --calibration FILE"
    settings, tokenizer = _settings(artifact)
    config = read_model_config(base_folder(artifact), artifact.model.trust_remote_code)
    length = min(BATCH_TOKENS, positions_of(config) or BATCH_TOKENS)
    if asked != "auto":
        found = _as_trained(build_dataset(asked, settings, tokenizer, key="--calibration").examples, length, asked)
        if found.tokens < FEWEST_TOKENS:
            held = f"{found.tokens:,} {noun_of(found.tokens, 'token')} in rows of at most {settings.max_length}"
            raise UserError(f"--calibration {asked}: holds {held}, too few to tell what layers are given; expected "
                            f"{FEWEST_TOKENS:,} at least, or --calibration none")  # fmt: skip
        return found
    assert artifact.run is not None
    try:
        examples, source = _trained_rows(artifact, settings, tokenizer, artifact.run.training.seed)
    except ToolError as error:
        return f"the run's data cannot be read ({error}); give rows with --calibration FILE"
    found = _as_trained(examples, length, source)
    if found.tokens < FEWEST_TOKENS:
        held = f"{found.tokens:,} {noun_of(found.tokens, 'token')}"
        return (f"the run's rows hold {held}, too few to tell what layers are given ({FEWEST_TOKENS:,} at least); give "
                "rows with --calibration FILE")  # fmt: skip
    return found


def _settings(artifact: Artifact) -> tuple[DataConfig, PreTrainedTokenizerBase]:
    """How rows are read, and the tokenizer."""
    model = base_folder(artifact)
    tokenizer = open_tokenizer(tokenizer_folder(model, artifact.adapter), artifact.model.trust_remote_code)
    if artifact.run is not None:
        return artifact.run.data, tokenizer  # as it is: which rows a fraction takes depends on max_length, too
    settings = DataConfig()
    limit = positions_of(read_model_config(model, artifact.model.trust_remote_code)) or settings.max_length
    return settings.model_copy(update={"max_length": min(settings.max_length, limit)}), tokenizer


def _rows_of_run(
    artifact: Artifact, settings: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[Sequence[Example], str]:
    if settings.eval is None:
        train = build_dataset(settings.train, settings, tokenizer, seed=seed)
        return train.examples, _called(told(settings.train), "trained on", _changed(artifact, train.report.files, None),
                                       "the run has no evaluation rows")  # fmt: skip
    splits_off = not evaluation_sources(settings)
    train = build_dataset(settings.train, settings, tokenizer, seed=seed) if splits_off else None
    _, sets = build_evaluation_sets(settings, tokenizer, train, seed=seed)
    found = Selection([as_examples(dataset.examples) for dataset in sets.values()])
    return found, ", ".join(
        _called(dataset.report.source, "evaluation", _changed(artifact, dataset.report.files, name))
        for name, dataset in sets.items()
    )


def _trained_rows(
    artifact: Artifact, settings: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[Sequence[Example], str]:
    """Without those that are split off for evaluation; and what to call them."""
    train = build_dataset(settings.train, settings, tokenizer, seed=seed)
    source = _called(told(settings.train), "trained on", _changed(artifact, train.report.files, None))
    if settings.eval is not None and not evaluation_sources(settings):
        train, _ = build_evaluation_sets(settings, tokenizer, train, seed=seed)
    return train.examples, source


def _changed(artifact: Artifact, files: Mapping[str, str], evaluation: str | None) -> bool:
    """Whether files of a run are others than those that the adapter's provenance names, which is said once.

    Args:
        files: SHA-256 by file, as they are now.
        evaluation: the evaluation set that they are; None: the training files.
    """
    assert artifact.adapter is not None
    known = (artifact.adapter.provenance or {}).get("data") or {}
    known = known.get("train") if evaluation is None else (known.get("eval") or {}).get(evaluation)
    if not known or sorted(known.values()) == sorted(files.values()):
        return False
    other = [name for name, digest in files.items() if digest not in known.values()]
    here = {Path(name).name for name in files}
    gone = [name for name in known if Path(name).name not in here]
    said = [f"{', '.join(names[:3])}{' …' if names[3:] else ''} {how}" for names, how in (
        (other, f"not as when {artifact.name} was trained (SHA-256 differs)"),
        (gone, "no longer among the files"),
    ) if names] or ["files are no longer read as often as then"]  # fmt: skip
    use = "the trained rows" if evaluation is None else "the evaluation rows of the run"
    log_once(logger, logging.WARNING, f"{'; '.join(said)}: what is read now are not {use}")
    return True


def _called(source: str, what: str, changed: bool, why: str = "") -> str:
    """`d.jsonl (trained on)`; `d.jsonl (changed since training)`."""
    if changed:
        what = f"{'evaluation, ' if what == 'evaluation' else ''}changed since training"
    return f"{source} ({what}{f': {why}' if why else ''})"


def by_length(examples: Sequence[Example], most: int) -> list[Batch]:
    """Batches of rows, an example each, those of like length together.

    Args:
        most: tokens of a batch, padding at the ends of shorter rows with them.
    """
    batches: list[list[Example]] = []
    for example in sorted(examples, key=lambda example: len(example.input_ids)):  # the longest of a batch comes last
        if not batches or (len(batches[-1]) + 1) * len(example.input_ids) > most:
            batches.append([])
        batches[-1].append(example)
    return [collate([[example] for example in batch], pad_token_id=0, packing=False) for batch in batches]


def _as_trained(examples: Sequence[Example], most: int, source: str) -> CalibrationRows:
    """The first rows, each by itself as in training, so that layers are given what they are given then: tokens one
    after the other in blocks made codes of twice the KL (docs/export.md).

    Args:
        most: tokens of a row; what goes beyond them is left out.
    """
    chosen: list[Example] = []
    tokens = 0
    for index in range(len(examples)):
        row = examples[index].input_ids[:most]
        if tokens and tokens + len(row) > MOST_TOKENS:
            break
        chosen.append(Example(row, row, "calibration"))
        tokens += len(row)
    return CalibrationRows(by_length(chosen, BATCH_TOKENS), tokens, source)
