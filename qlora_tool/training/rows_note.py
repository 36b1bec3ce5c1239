"""A few rows as they are trained, kept in the run's folder for its report."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

from qlora_tool.data.preview import PreviewCounts, preview_rows
from qlora_tool.files.atomic import write_json
from qlora_tool.run_folder import ROWS

if TYPE_CHECKING:
    from qlora_tool.data.preview import PreviewExample
    from qlora_tool.data.spans import Span
    from qlora_tool.training.run import Run

KEPT_ROWS, KEPT_EXAMPLES = 3, 3
LONGEST = 3000
"""Characters of an example that are kept; of a longer one the middle of each stretch is left out."""


def note_rows(run: Run) -> None:
    """Write the first rows of the run, what of them is trained, and what became of the data."""
    data = run.data
    first = islice((row for micro_batch in next(run.plan.steps(0)) for row in micro_batch), KEPT_ROWS)
    rows = preview_rows(data.train, [row[:KEPT_EXAMPLES] for row in first], data.tokenizer)
    counted = {"train": data.train, **{f"evaluation, {name}": one for name, one in data.evaluations.items()}}
    write_json(run.folder.notes / ROWS, {
        "rows": [[_as_json(example) for example in row.examples] for row in rows],
        "counts": {name: PreviewCounts.of(dataset).lines() for name, dataset in counted.items()},
    })  # fmt: skip


def _as_json(example: PreviewExample) -> dict[str, Any]:
    spans = example.spans
    room = max(200, LONGEST // len(spans)) if sum(len(span.text) for span in spans) > LONGEST else LONGEST
    return {"where": example.where, "tokens": len(example.input_ids), "trained_tokens": example.trained_tokens,
            "spans": [[_cut(span, room), span.trained] for span in spans[:100]]}  # fmt: skip


def _cut(span: Span, room: int) -> str:
    text = span.text
    if len(text) <= room:
        return text
    return f"{text[: room // 2]} … {len(text) - room:,} characters … {text[-(room // 2) :]}"
