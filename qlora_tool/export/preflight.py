"""What is refused before the first byte of an export is written."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_tool.adapters.peft_reading import is_adapter
from qlora_tool.artifacts import Artifact, changed_base
from qlora_tool.errors import MachineError, UserError, did_you_mean_path
from qlora_tool.files.atomic import existing_parent
from qlora_tool.model.config_file import read_config_file
from qlora_tool.run_folder import RunFolder
from qlora_tool.sizes import file_size

logger = logging.getLogger(__name__)


def refuse_no_adapter(artifact: Artifact) -> None:
    """Refuse an artifact that has no adapter, with what to name instead.

    Raises:
        UserError: it has none.
    """
    if artifact.adapter is not None:
        return
    path = Path(artifact.name)
    if path.exists():
        found = "a model without an adapter"
    else:
        siblings = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
        found = f"no such folder{did_you_mean_path(path, siblings)}"
    raise UserError(f"{artifact.name}: {found}; expected a run's folder or an adapter's")


def refuse_unmergeable(artifact: Artifact, form: str) -> None:
    """Refuse to merge an adapter that is no update of any weight.

    Raises:
        UserError: it is one, and the format is not the adapter as it is.
    """
    method = artifact.adapter.method
    if form != "adapter" and not method.has_delta and not method.keys.trains_base:
        raise UserError(
            f"--format {form}: {method.name} changes no weight, so there is nothing to merge: its export is the "
            "adapter, which PEFT reads; set --format adapter"
        )


def refuse_unmeasurable(artifact: Artifact, asked: str, rows: tuple[Sequence[Any], str] | None) -> None:
    """Refuse to choose a type by what it keeps of what training gained, where that cannot be told.

    Args:
        asked: the option that asks for the choice.
        rows: to verify on, or why there are none.

    Raises:
        UserError: there are no rows, or no base without the adapter to hold them against.
    """
    stored, gone = artifact.adapter, None
    if artifact.stack:
        gone = "is not told of a sum of adapters"
    elif stored.replaced_tensors() or stored.token_rows() or stored.quantized_without is not None:
        gone = "is told against the base without the adapter, and this adapter replaces parts of it"
    elif not (rows and rows[0]):
        gone = f"is measured on rows, and there are none: {rows[1] if rows else 'not verified'}"
    if gone:
        raise UserError(f"{asked}: what a type keeps {gone}; name a type, without --min-kept")


def refuse_inputs(output: Path, inputs: Mapping[str, Path]) -> None:
    """Refuse an output that holds what the export reads, or lies in it.

    Raises:
        UserError: naming it.
    """
    for what, path in inputs.items():
        place = path.resolve()
        if output.resolve() in (place, *place.parents) and output.exists():
            raise UserError(f"{output}: holds {what}, which the merge reads; give another --output-dir")
        if is_adapter(place) and (outer := inside(output, place)):
            raise UserError(f"{output}: lies in {outer}, which is {what}, or the run of it; give an --output-dir "
                            "outside of that")  # fmt: skip


def inside(output: Path, adapter: Path) -> Path | None:
    """The adapter's folder, or its run's, where an output lies in that; None where it lies in neither."""
    run = RunFolder(adapter.parent)
    place = run.path if run.holds_run() and run.adapter == adapter else adapter
    return place if place in output.resolve().parents else None


def refuse_changed_base(artifact: Artifact, folder: Path) -> str | None:
    """Refuse a base whose weights are others than those that the adapter was trained on; where the command line names
    the base, return what to warn of."""
    if (found := changed_base(artifact, folder)) is None:
        return None
    if not artifact.base_named:
        raise UserError(f"{found}; bring the old files back, or name a base with --model to merge onto it all the same")
    return f"{found}; merging onto it all the same, as --model names it"


def finer_base(artifact: Artifact, folder: Path) -> bool:
    """Whether the base's files hold finer weights than the 4-bit values that were trained against."""
    config = read_config_file(folder)
    stored = config.get("quantization_config") or {}
    as_bitsandbytes = bool(stored) and str(stored.get("quant_method", "bitsandbytes")).startswith("bitsandbytes")
    return artifact.model.quantization in ("nf4", "fp4") and not as_bitsandbytes


def warn_of_rounding_away(artifact: Artifact, folder: Path, form: str, bases: Sequence[str]) -> None:
    """Say before the work starts what four bits do to weights that lie on 4-bit values already."""
    if form == artifact.model.quantization and list(bases) == ["dequantized"]:
        original = "--base original or " if finer_base(artifact, folder) else ""
        logger.warning(
            "--format %s --base dequantized --calibration none: rounds to 4 bits again what lies on 4-bit values "
            "already, and a small update away with it (SmolLM2-135M: 3.5 %% of what training gained remains); %s"
            "--calibration auto keeps a small one", form, original,
        )  # fmt: skip


def refuse_full_disk(output: Path, needed: int, there: int) -> None:
    """Refuse a result of `needed` bytes where they are not free, `there` of them being written already."""
    free = shutil.disk_usage(existing_parent(output)).free
    if needed - there > free:
        rest = f", {file_size(there)} of it written" if there else ""
        raise MachineError(
            f"{output}: the model takes {file_size(needed)}{rest}, and {file_size(free)} are free there; free "
            "some, or choose another --output-dir"
        )
