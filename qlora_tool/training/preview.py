"""What `preview` shows: the first rows that training takes, and counts, from the tokenizer and the data alone."""

from __future__ import annotations

import logging
from bisect import bisect_left
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_tool.config import Config, with_values
from qlora_tool.data.examples import as_examples
from qlora_tool.data.preview import PreviewCounts, PreviewRow, preview_rows
from qlora_tool.model.source import read_model_config
from qlora_tool.model.source import resolve as resolve_model
from qlora_tool.training.known_packing import packs_as_known
from qlora_tool.training.plan import epoch_batches
from qlora_tool.training.run_data import read_run_data

if TYPE_CHECKING:
    from qlora_tool.config import AdapterConfig, ModelConfig

logger = logging.getLogger(__name__)

FIRST_ROWS = 2000  # of a file; what they show is there in seconds, whatever its size
PACKED = 100_000  # examples; of more the first rows' alone are packed


@dataclass(frozen=True)
class PreviewResult:
    """Rows as the model will see them.

    Attributes:
        rows: the first that training takes, in its order, where all rows of the data were packed; those of one epoch at
            most.
        rows_per_epoch: how many rows the examples make that were packed.
        packed_first: how many rows of the data these are, the first ones; None: all.
        max_length: tokens of a row at most.
        packing: whether a row may hold several examples.
        counts: what became of the training data.
        evaluations: of each evaluation set, by name.

    Example:
        >>> from qlora_tool import preview
        >>> found = preview("my-run.yaml", rows=2)
        >>> [len(row.input_ids) <= found.max_length for row in found.rows]
        [True, True]
        >>> sum(label != -100 for label in found.rows[0].labels) < len(found.rows[0].labels)  # the answers alone
        True
    """

    rows: tuple[PreviewRow, ...]
    rows_per_epoch: int
    packed_first: int | None
    max_length: int
    packing: bool
    counts: PreviewCounts
    evaluations: dict[str, PreviewCounts]

    def as_json(self) -> dict[str, Any]:
        """What `--json` writes."""
        evaluations = {name: counts.as_json() for name, counts in self.evaluations.items()}
        packed = {"rows_per_epoch": self.rows_per_epoch, "packed_first": self.packed_first}
        counts = {**self.counts.as_json(), **packed}
        return {"rows": [row.as_json() for row in self.rows], "counts": counts, "eval": evaluations}


def preview(config: Config, rows: int = 5, *, every_row: bool = False) -> PreviewResult:
    """Read data as training does, and show what it would see.

    Args:
        rows: how many rows to show; no more than an epoch has.
        every_row: count and pack all rows; else the first 2,000 of each file, and count all of one that is kept
            tokenized.

    Raises:
        UserError: the configuration, the data or the tokenizer is at fault.
        MachineError: the hub is out of reach.
    """
    folder, model_config = _model(config.model, config.adapter)
    if model_config is not None:
        config = with_values(config, {"data.packing": packs_as_known(config, model_config)})
    data = read_run_data(config, folder, model_config, first=None if every_row else FIRST_ROWS)
    lengths, report = data.train.lengths, data.train.report
    packed_first = report.rows if report.more_rows else None
    if not every_row and len(lengths) > PACKED:
        packed_first = FIRST_ROWS
        lengths = lengths[: bisect_left(as_examples(data.train.examples).rows, FIRST_ROWS)]
    batches = epoch_batches(config, lengths, 0)
    shown = islice((row for batch in batches for row in batch), rows)
    return PreviewResult(
        rows=tuple(preview_rows(data.train, list(shown), data.tokenizer)),
        rows_per_epoch=batches.rows,
        packed_first=packed_first,
        max_length=config.data.max_length,
        packing=config.data.packing,
        counts=PreviewCounts.of(data.train),
        evaluations={name: PreviewCounts.of(dataset) for name, dataset in data.evaluations.items()},
    )


def _model(config: ModelConfig, adapter: AdapterConfig) -> tuple[Path, Any]:
    """The model's folder and its configuration. A folder that has nothing but a tokenizer does: there is no
    configuration then, and nothing is checked against it."""
    path = Path(config.name_or_path).expanduser()
    if path.is_dir() and not (path / "config.json").exists() and (path / "tokenizer_config.json").exists():
        logger.warning("%s: no config.json in it: rows are packed as the configuration says, and no length is checked "
                       "against the model", path)  # fmt: skip
        return path, None
    folder = resolve_model(config.name_or_path, config.revision, weights=False, by_key=True)
    model_config = read_model_config(folder, config.trust_remote_code)
    if adapter.init_from:
        from qlora_tool.adapters.initial import started_from
        from qlora_tool.adapters.resized import fitting_config

        model_config = fitting_config(model_config, started_from(adapter), config.trust_remote_code)
    return folder, model_config
