"""The memory breakdown, as `memory.json` and `profile-memory --json` hold it.

All sizes are whole bytes, of one device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

SCHEMA = 1

CATEGORIES = (
    "base_weights",
    "quantization_state",
    "other_weights",
    "adapter_weights",
    "gradients",
    "optimizer_state",
    "activations",
    "temporaries",
    "framework",
)
"""What memory is taken for. Every byte at the peak belongs to one of these."""

ACTIVATIONS = ("boundaries", "saved", "recomputed")
"""The three kinds of activations: at the boundaries of checkpoints, saved for the backward pass, recomputed in it."""

PARTS = tuple(part for category in CATEGORIES for part in (ACTIVATIONS if category == "activations" else (category,)))
"""CATEGORIES with the activations split, in the order in which they are stacked and listed."""

ELSEWHERE = ("host_bytes", "disk_bytes")
"""Where weights lie that are streamed to the device: beside the sum."""

PHASES = ("load", "forward", "backward", "optimizer")


@dataclass(frozen=True)
class Breakdown:
    """The memory of a training step at the moment of its peak, and the peak of each phase.

    Attributes:
        peak_bytes: the most that was allocated at once, over all phases.
        reserved_bytes: the most that the caching allocator held, what it kept unused included; None on a CPU.
        context_bytes: the CUDA context, which no allocator counts; None on a CPU.
        at_peak: bytes by category (CATEGORIES) at that moment. They add up to `peak_bytes`.
        activations: `at_peak["activations"]` by kind (ACTIVATIONS).
        phase_peak_bytes: the most that was allocated at once in each of PHASES; the largest is `peak_bytes`.
        elsewhere: bytes of weights that are streamed to the device, by ELSEWHERE, which `peak_bytes` does not contain;
            empty where all are on it.

    Raises:
        ValueError: a category, kind or phase is missing or unknown, a size is not a whole number of bytes, or the parts
            do not add up to the whole; by how much is said.
    """

    peak_bytes: int
    reserved_bytes: int | None
    context_bytes: int | None
    at_peak: dict[str, int]
    activations: dict[str, int]
    phase_peak_bytes: dict[str, int]
    elsewhere: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_size("peak_bytes", self.peak_bytes)
        for name in ("reserved_bytes", "context_bytes"):
            if getattr(self, name) is not None:
                _check_size(name, getattr(self, name))
        for name, keys in _TABLES.items():
            _check_table(name, getattr(self, name), keys)
        if self.elsewhere:
            _check_table("elsewhere", self.elsewhere, ELSEWHERE)
        _check_sum("at_peak", self.at_peak, "peak_bytes", self.peak_bytes)
        _check_sum("activations", self.activations, "at_peak.activations", self.at_peak["activations"])
        highest = max(self.phase_peak_bytes.values())
        if highest != self.peak_bytes:
            raise ValueError(
                f"the largest of phase_peak_bytes is {highest} bytes, peak_bytes is {self.peak_bytes}: "
                f"a difference of {highest - self.peak_bytes:+d} bytes"
            )

    @property
    def parts(self) -> dict[str, int]:
        """Bytes at the peak by part (PARTS): the categories, the activations split in three."""
        everything = self.at_peak | self.activations
        return {part: everything[part] for part in PARTS}

    @property
    def peak_phase(self) -> str:
        """The phase in which the peak is; the first, where several reach it."""
        return max(PHASES, key=lambda phase: self.phase_peak_bytes[phase])

    @property
    def needed_bytes(self) -> int:
        """What the device has to give: what the allocator holds (on a CPU: the peak) and the CUDA context."""
        held = self.peak_bytes if self.reserved_bytes is None else self.reserved_bytes
        return held + (self.context_bytes or 0)

    def to_json(self) -> dict[str, Any]:
        """The mapping that `memory.json` holds, its keys in the order of the tables above."""
        return {
            "peak_bytes": self.peak_bytes,
            "reserved_bytes": self.reserved_bytes,
            "context_bytes": self.context_bytes,
            **{name: {key: getattr(self, name)[key] for key in keys} for name, keys in _TABLES.items()},
            **({"elsewhere": dict(self.elsewhere)} if self.elsewhere else {}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Breakdown:
        """The breakdown that `to_json` gave. Keys that are not known here are passed over.

        Raises:
            ValueError: as for the class, or a key is missing.
        """
        names = ("peak_bytes", "reserved_bytes", "context_bytes", *_TABLES)
        _require(value, names)
        tables = {name: dict(_mapping(name, value[name])) for name in _TABLES}
        elsewhere = dict(_mapping("elsewhere", value.get("elsewhere") or {}))
        return cls(value["peak_bytes"], value["reserved_bytes"], value["context_bytes"], **tables, elsewhere=elsewhere)


_TABLES = {"at_peak": CATEGORIES, "activations": ACTIVATIONS, "phase_peak_bytes": PHASES}


@dataclass(frozen=True)
class MemoryReport:
    """What `memory.json` holds.

    Attributes:
        device: `cuda` or `cpu`.
        config: the whole configuration, every default resolved.
        predicted: from a traced step, without weights; None where none was made.
        measured: from what happened on the device; None where nothing was run.
        estimated: `predicted` comes from smaller steps that were measured, as this one could not be traced.
        processes: that train together; all bytes are those of one of them.
    """

    device: str
    config: dict[str, Any]
    predicted: Breakdown | None = None
    measured: Breakdown | None = None
    estimated: bool = False
    processes: int = 1

    @property
    def breakdowns(self) -> dict[str, Breakdown]:
        """Those of `predicted` and `measured` that there are, by these names."""
        both = {"predicted": self.predicted, "measured": self.measured}
        return {name: breakdown for name, breakdown in both.items() if breakdown is not None}

    def to_json(self) -> dict[str, Any]:
        """The mapping to write as JSON."""
        both = {"predicted": self.predicted, "measured": self.measured}
        return {
            "schema": SCHEMA,
            "device": self.device,
            "config": self.config,
            **{name: breakdown and breakdown.to_json() for name, breakdown in both.items()},
            **({"estimated": True} if self.estimated else {}),
            **({"processes": self.processes} if self.processes > 1 else {}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> MemoryReport:
        """The report that `to_json` gave. `predicted` and `measured` may be null or missing.

        Raises:
            ValueError: another schema, a missing key, or a breakdown that does not add up; the fault is named.
        """
        _require(value, ("schema", "device", "config"))
        if value["schema"] != SCHEMA:
            raise ValueError(f"expected a memory breakdown of schema {SCHEMA}, found schema {value['schema']!r}")
        breakdowns = {}
        for name in ("predicted", "measured"):
            if value.get(name) is not None:
                part = _mapping(name, value[name])
                try:
                    breakdowns[name] = Breakdown.from_json(part)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
        config, estimated = dict(_mapping("config", value["config"])), bool(value.get("estimated", False))
        return cls(value["device"], config, **breakdowns, estimated=estimated, processes=value.get("processes", 1))


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}: expected a mapping, found {value!r}")
    return value


def _require(value: Mapping[str, Any], names: Iterable[str]) -> None:
    if missing := [name for name in names if name not in value]:
        raise ValueError(f"{', '.join(missing)}: missing")


def _check_size(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name}: expected a whole number of bytes, found {value!r}")


def _check_table(name: str, table: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    missing = [key for key in keys if key not in table]
    unknown = [key for key in table if key not in keys]
    if missing or unknown:
        faults = [("missing", missing), ("unknown", unknown)]
        raise ValueError(f"{name}: " + "; ".join(f"{', '.join(found)} {fault}" for fault, found in faults if found))
    for key in keys:
        _check_size(f"{name}.{key}", table[key])


def _check_sum(name: str, table: Mapping[str, int], whole: str, expected: int) -> None:
    total = sum(table.values())
    if total != expected:
        raise ValueError(
            f"{name} adds up to {total} bytes, {whole} is {expected}: a difference of {total - expected:+d} bytes"
        )
