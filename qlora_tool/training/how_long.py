"""How long a run will take, from the speed that runs like it had on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qlora_tool.files.cache import cache_folder
from qlora_tool.ops.measured import check_date, expired, read_measured, today, write_measured
from qlora_tool.ops.speeds import processor_kind
from qlora_tool.sizes import counted, noun_of

if TYPE_CHECKING:
    from qlora_tool.config import Config
    from qlora_tool.training.plan import StepPlan
    from qlora_tool.training.progress import Speed

LEAST_STEPS = 3
"""Steps whose speed counts; of `training.max_steps: 5` they are left, as the first one warms up and one is traced."""
MANY_STEPS = 20
"""So many are as good as more."""

# Of a configuration, what a step's speed does not depend on, or what is known by other keys.
_MODEL_ANYWAY = ("keep_quantized", "trust_remote_code")
_ADAPTER_ANYWAY = ("lora_alpha", "init_lora_weights", "init_from", "use_rslora", "loraplus_lr_ratio")
_DATA = ("max_length", "packing", "padding_free", "train_on")
_TRAINING = ("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "max_memory",
             "optim", "optimizer_in_backward", "tiled_mlp", "sharding", "full_determinism")  # fmt: skip


@dataclass(frozen=True)
class MeasuredSpeed:
    """What a run had.

    Attributes:
        date: when, ISO 8601 in UTC.
        tokens_per_second: over all steps that count, those of all processes together.
        steps: how many these were.
    """

    date: str
    tokens_per_second: float
    steps: int

    @classmethod
    def from_json(cls, data: Any) -> MeasuredSpeed:
        """
        Raises:
            ValueError, KeyError, TypeError: it is none.
        """
        found = cls(**data)
        check_date(found.date)
        if not (found.tokens_per_second > 0 and found.steps > 0):
            raise ValueError("no speed")
        return found


def measured_speed(config: Config, device: torch.device, processes: int = 1) -> MeasuredSpeed | None:
    """What a run like this had on this machine: of this model, method, length, batch and device."""
    return read_measured(_file(), MeasuredSpeed.from_json).get(_key(config, device, processes))


def note_speed(config: Config, device: torch.device, processes: int, speed: Speed) -> None:
    """Keep what a run had, for the next one like it; unless a longer one was measured lately."""
    if speed.steps < LEAST_STEPS or not speed.seconds:
        return
    known, key = read_measured(_file(), MeasuredSpeed.from_json), _key(config, device, processes)
    earlier = known.get(key)
    if earlier and speed.steps < min(MANY_STEPS, earlier.steps) and not expired(earlier.date, doubtful=False):
        return
    found = MeasuredSpeed(today(), round(speed.tokens / speed.seconds, 1), speed.steps)
    write_measured(_file(), known | {key: found})


def describe_length(
    plan: StepPlan, done: int, speed: MeasuredSpeed | None, evaluates: bool, dry_run: bool = False
) -> str:
    """Tokens and hours of what is left of a run, in a line.

    Args:
        done: steps that lie behind.
        speed: of a run like it; None: not measured.
        evaluates: whether there are evaluations, which are not counted.
        dry_run: whether this one takes no step, and so measures nothing.
    """
    left = plan.total_steps - done
    tokens = sum(plan.lengths) * left / plan.steps_per_epoch
    counted = f"{left:,} {noun_of(left, 'step')}, about {tokens:,.0f} {noun_of(round(tokens), 'token')}"
    if speed is None:
        how = "with --set training.max_steps=5 --output-dir FOLDER" * (left > 5)
        how = " and ".join(filter(None, (how, "without --dry-run" * dry_run)))
        by = f"the same command {how}" if how else "this run"
        return f"{counted}; hours not measured, as no such run was made here: {by} measures it"
    without = ", evaluations not counted" if evaluates else ""
    return (f"{counted}; {in_hours(tokens / speed.tokens_per_second)} at {speed.tokens_per_second:,.0f} tokens/s, from "
            f"{speed.steps:,} {noun_of(speed.steps, 'step')} measured here on {speed.date[:10]}{without}")  # fmt: skip


def in_hours(seconds: float) -> str:
    """`2.3 hours`; less as `12 minutes`, and less than two as `45 seconds`."""
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} hours"
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else counted(max(1, round(seconds)), "second")


def _file() -> Path:
    return cache_folder() / "training_speeds.json"


def _processor() -> str:
    """This machine's: a home folder may be shared by several."""
    name = processor_kind()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{name}, {torch.get_num_threads()} threads"


def _key(config: Config, device: torch.device, processes: int) -> str:
    """By what a step's speed depends on."""
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    whole = config.model_dump(mode="json")
    decides = {
        "machine": machine, "processes": processes,
        "model": {key: value for key, value in whole["model"].items() if key not in _MODEL_ANYWAY},
        "adapter": {key: value for key, value in whole["adapter"].items() if key not in _ADAPTER_ANYWAY},
        "data": {key: whole["data"][key] for key in _DATA},
        "training": {key: whole["training"][key] for key in _TRAINING},
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
    return f"{config.model.name_or_path}, {config.adapter.method}, {machine}: {digest}"
