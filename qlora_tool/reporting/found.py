"""What lies in a run's folder and belongs into its report; what is missing or broken is left out, and why is known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_tool.artifacts import BaseOptions, find_artifact
from qlora_tool.config import Config
from qlora_tool.errors import ToolError, UserError
from qlora_tool.files.digest import sha256
from qlora_tool.files.reading import is_regular, json_value
from qlora_tool.inspection.updates import Inspection, inspect_adapter
from qlora_tool.memory.breakdown import MemoryReport
from qlora_tool.run_folder import EXPORTS, MANIFEST, ROWS, STATE, STEP_MEMORY, RunFolder


@dataclass(frozen=True)
class Found:
    """A run as its folder tells it.

    Attributes:
        folder: the run's.
        config: its whole configuration.
        records: the lines of `metrics.jsonl`, in order.
        untuned: losses before the first step, by their names in `metrics.jsonl`; empty where that is not known.
        memory: the breakdown, predicted and measured.
        step_memory: the same over one step; see `Timeline.to_json`.
        rows: as they are trained, and counts of the data; see `training/rows_note.py`.
        ranks: the adapter's updates.
        no_ranks: why these are not known.
        exports: of this adapter: what `export.json` says of each, by the folder it went to.
        earlier_exports: how many were made of another adapter that was here.
        versions: by name, of what computed the run.
    """

    folder: RunFolder
    config: Config
    records: list[dict[str, Any]]
    untuned: dict[str, float] = field(default_factory=dict)
    memory: MemoryReport | None = None
    step_memory: dict[str, Any] | None = None
    rows: dict[str, Any] | None = None
    ranks: Inspection | None = None
    no_ranks: str = ""
    exports: dict[str, dict[str, Any]] = field(default_factory=dict)
    earlier_exports: int = 0
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The folder, as a person calls it."""
        return self.folder.path.resolve().name

    def series(self, key: str) -> list[tuple[float, float]]:
        """What was logged under a name, as (step, value); what is no number is left out."""
        return [(record["step"], record[key]) for record in self.records
                if _is_number(record.get("step")) and _is_number(record.get(key))]  # fmt: skip

    @property
    def evaluations(self) -> list[str]:
        """The names in `metrics.jsonl` of the losses on evaluation sets. Of several each has its own, and `eval_loss`
        is the first one's again."""
        names = dict.fromkeys(key for record in self.records for key in record
                              if key.startswith("eval_") and key.endswith("loss") and self.series(key))  # fmt: skip
        return [name for name in names if len(names) == 1 or name != "eval_loss"]

    @property
    def samples(self) -> list[tuple[int, list[dict[str, Any]]]]:
        """Answers to fixed prompts, by the step after which they were given."""
        return [(record["step"], record["samples"]) for record in self.records
                if isinstance(record.get("samples"), list) and _is_number(record.get("step"))]  # fmt: skip


def find(path: Path) -> Found:
    """Read a run's folder.

    Raises:
        UserError: it holds no run, or a configuration that cannot be read.
    """
    folder = RunFolder(path)
    if not folder.holds_run():
        raise UserError(f"{path}: no run lies there, as it has no config.yaml; expected a folder that `qlora-tool "
                        "train` wrote")  # fmt: skip
    records = folder.records()
    state, made_by = _last_checkpoint(folder)
    ranks, no_ranks = _ranks(folder)
    exports, earlier = _exports(folder)
    return Found(
        folder, folder.config(), records, _numbers(state.get("untuned")), _memory(path / "memory.json"),
        _json(folder.notes / STEP_MEMORY), _json(folder.notes / ROWS), ranks, no_ranks, exports, earlier,
        {str(name): str(value) for name, value in made_by.items()},
    )  # fmt: skip


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(value: Any) -> dict[str, float]:
    return {key: found for key, found in value.items() if _is_number(found)} if isinstance(value, Mapping) else {}


def _json(file: Path) -> dict[str, Any] | None:
    if not is_regular(file):
        return None
    try:
        found = json_value(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None



def _memory(file: Path) -> MemoryReport | None:
    value = _json(file)
    try:
        return None if value is None else MemoryReport.from_json(value)
    except (ValueError, KeyError, TypeError):
        return None


def _last_checkpoint(folder: RunFolder) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the last checkpoint says of the run, and of who made it."""
    for checkpoint in reversed(folder.checkpoint_folders()):
        state, manifest = _json(checkpoint / STATE), _json(checkpoint / MANIFEST)
        if state is not None:
            made_by = (manifest or {}).get("made_by")
            return state, made_by if isinstance(made_by, dict) else {}
    return {}, {}


def _ranks(folder: RunFolder) -> tuple[Inspection | None, str]:
    if not folder.is_finished():
        return None, "the run is not finished"
    try:
        artifact = find_artifact(str(folder.path), BaseOptions(quantization_else="none"))
        return inspect_adapter(artifact, with_base=False), ""
    except ToolError as error:
        return None, error.lines[0]


def _exports(folder: RunFolder) -> tuple[dict[str, dict[str, Any]], int]:
    """Those of the adapter that lies there, and how many there were of others."""
    own, exports = adapter_hashes(folder), notes_of_exports(folder)
    current = {name: facts for name, facts in exports.items() if facts.get("adapter") == own}
    return current, len(exports) - len(current)


def notes_of_exports(folder: RunFolder) -> dict[str, dict[str, Any]]:
    """What was noted of every export, by the folder it went to."""
    noted = _json(folder.notes / EXPORTS) or {}
    return {name: facts for name, facts in noted.items() if isinstance(facts, dict)}


def adapter_hashes(folder: RunFolder) -> dict[str, str]:
    """By which an adapter is known again."""
    return {file.name: sha256(file) for file in sorted(folder.adapter.glob("adapter_*")) if file.is_file()}
