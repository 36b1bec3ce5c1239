"""The rank to cut an adapter to, held against its configuration alone, before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_tool.errors import OptionError, UserError
from qlora_tool.files.reading import read_object
from qlora_tool.run_folder import PROVENANCE, RunFolder


def refuse_rank(name: str, r: int) -> None:
    """Refuse a rank that is no lower than that of every update, as far as the adapter's configuration tells.

    Raises:
        UserError: naming the highest one.
    """
    if r < 1:
        raise OptionError(f"--truncate {r}: expected a rank of at least 1")
    path = Path(name).expanduser()
    run = RunFolder(path)
    highest = _highest(run.adapter if run.holds_run() else path)
    if highest is not None and r >= highest:
        raise UserError(too_high(name, r, highest))


def too_high(name: str, r: int, highest: int) -> str:
    """The line on a rank to which nothing would be cut."""
    lower = f"give a rank below {highest}" if highest > 1 else "there is nothing to cut"
    return f"--truncate {r}: {name} has updates of rank {highest} at most; {lower}"


def _highest(folder: Path) -> int | None:
    """The rank that no update of an adapter exceeds; None where its tensors have to be looked at."""
    try:
        config, provenance = read_object(folder / "adapter_config.json", ""), _read(folder / PROVENANCE)
    except UserError:
        return None  # told by those who open it
    # One that is stored as a difference from its start has another rank than it says; one by other methods has none.
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("target_parameters"):
        return None
    if provenance.get("start") or not isinstance(config.get("init_lora_weights", True), bool):
        return None
    pattern = config.get("rank_pattern") or {}
    ranks = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else [None])]
    return max(ranks) if all(type(rank) is int and rank > 0 for rank in ranks) else None


def _read(file: Path) -> dict[str, Any]:
    return read_object(file, "") if file.exists() else {}
