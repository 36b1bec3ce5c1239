"""What a plan says: what was asked for, what fits, what to change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import yaml

from qlora_tool.memory.allocator.available import usable
from qlora_tool.memory.allocator.target import device_of
from qlora_tool.memory.plan.changes import LENGTH
from qlora_tool.memory.plan.streaming import Streaming

if TYPE_CHECKING:
    from qlora_tool.memory.allocator.target import CudaTarget


@dataclass(frozen=True)
class Option:
    """One way to run.

    Attributes:
        group: which of its keys is looked at: `length` (the longest that fits), a key of the configuration, `savings`
            (what takes less at a price), or `asked`.
        settings: keys of the configuration that differ from what was asked for, or would, and their values.
        rows, length: of the batch; a length of 0 says that not even `SHORTEST` tokens fit.
        peak_bytes: what the device has to give: the peak on a CPU, what is reserved and the context on CUDA.
        fits: whether that is within what may be used.
        speed: in tokens per second, relative to the asked configuration; see `relative_speed`.
        asked: it is what was asked for.
        streaming: what it costs that weights are streamed; None where they are not.
    """

    group: str
    settings: dict[str, Any]
    rows: int
    length: int
    peak_bytes: int
    fits: bool
    speed: float
    asked: bool = False
    streaming: Streaming | None = None


@dataclass(frozen=True)
class Change:
    """What to change in the asked configuration.

    Attributes:
        settings: keys and their new values.
        peak_bytes: what the device then has to give.
        confirmed: whether that was seen in a full trace, not only estimated.
        streaming: see `Option`.
    """

    settings: dict[str, Any]
    peak_bytes: int
    confirmed: bool
    streaming: Streaming | None = None

    @property
    def line(self) -> str:
        """To copy: `--set data.max_length=1024`."""
        return set_line(self.settings)


@dataclass(frozen=True)
class Plan:
    """What fits.

    Attributes:
        target: the card that it is for; None: a CPU.
        budget_bytes: what the device has.
        margin: the share of it that is kept free.
        budget_name: what it is, in words; see `limit.Limit`.
        recomputation: what `gradient_checkpointing: auto` recomputes of the asked configuration, in words; then what
            else there is is told with everything recomputed.
        asked: the asked configuration.
        options: what else there is, group by group.
        longest: the asked configuration with the longest rows that fit, where it fits itself and there are longer ones.
        faster: the asked configuration without checkpointing, where that fits too.
        change: what makes the asked configuration fit, where it does not.
        smallest_bytes: what the least of all configurations takes, where there is no such change.
        weights_bytes: what the weights take alone, adapters and their masters included: of what was asked for where it
            fits, of `change`, or of the least.
        positions: how many the model has (`max_position_embeddings`), which no row is longer than; None: no limit.
    """

    target: CudaTarget | None
    budget_bytes: int
    margin: float
    asked: Option
    options: tuple[Option, ...]
    longest: Change | None = None
    faster: Change | None = None
    change: Change | None = None
    smallest_bytes: int = 0
    weights_bytes: int = 0
    budget_name: str = ""
    recomputation: str = ""
    positions: int | None = None

    @property
    def device(self) -> str:
        """cpu or cuda."""
        return device_of(self.target).type

    @property
    def usable_bytes(self) -> int:
        return usable(self.budget_bytes, self.margin)

    @property
    def fits(self) -> bool:
        return self.asked.fits

    @property
    def line(self) -> str:
        """The `--set` that makes the asked configuration fit or, where it does, that makes the most of the device;
        empty where nothing is to be changed or nothing helps."""
        answer = self.change or self.longest
        return answer.line if answer else ""

    @property
    def at_the_models_limit(self) -> bool:
        """Whether rows as long as the model allows fit, so that not memory bounds them."""
        longest = self.longest.settings.get(LENGTH) if self.longest else self.asked.length
        return self.fits and self.positions is not None and longest >= self.positions

    @property
    def misses_by(self) -> int:
        """Bytes that even the smallest configuration takes too much; 0 where something fits."""
        return 0 if self.fits or self.change else self.smallest_bytes - self.usable_bytes

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values: what may be used, what was asked for, the table, and what to change."""
        changes = {name: getattr(self, name) for name in ("change", "longest", "faster")}
        return {
            "device": self.device,
            "target": str(self.target) if self.target else None,
            "usable_bytes": self.usable_bytes,
            "usable": self.budget_name or None,
            "fits": self.fits,
            "recomputation": self.recomputation or None,
            "asked": asdict(self.asked),
            "options": [asdict(option) for option in self.options],
            **{name: found and {**asdict(found), "line": found.line} for name, found in changes.items()},
            "line": self.line,
            "smallest_bytes": self.smallest_bytes or None,
            "weights_bytes": self.weights_bytes,
        }


def set_line(settings: Mapping[str, Any]) -> str:
    """Keys and values as options of the command line."""
    def written(value: Any) -> str:
        return yaml.safe_dump(value, default_flow_style=True, width=math.inf).splitlines()[0]

    return " ".join(f"--set {key}={written(value)}" for key, value in settings.items())
