"""What the memory of a step looks like over time: the bytes of every part after each allocation and each free."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from qlora_tool.memory.breakdown import ACTIVATIONS, CATEGORIES, PARTS, PHASES, Breakdown


class Event(NamedTuple):
    """One allocation or free.

    Attributes:
        part: what the memory is for (PARTS).
        delta: bytes that come (positive) or go (negative).
        phase: when (PHASES).
        module: whose forward, or whose part of the backward, it is, e.g. `model.layers.3.mlp`; empty if unknown.
        operator: what allocated or freed, e.g. `aten::mm`; empty if unknown.
    """

    part: str
    delta: int
    phase: str
    module: str = ""
    operator: str = ""


@dataclass(frozen=True)
class PhaseSpan:
    """A run of events of one phase: those from `start` to `stop`, the last not included.

    Attributes:
        peak_index: the event after which the most is allocated within the span.
        peak_bytes: the most that is allocated within the span, what it begins with included.
    """

    phase: str
    start: int
    stop: int
    peak_index: int
    peak_bytes: int


@dataclass(frozen=True, eq=False)
class Timeline:
    """The bytes of every part after each event, in order. N events, P = len(PARTS).

    Attributes:
        part_bytes: (N, P) int64, the bytes of each of PARTS after the event.
        phases: (N,) int8, index into PHASES.
        modules: (N,) int32, index into `module_names`. `operators` the same, into `operator_names`.
        positions: (N,) int64, the event's number in the whole stream: 0 … N-1, with gaps once thinned.
    """

    part_bytes: np.ndarray
    phases: np.ndarray
    modules: np.ndarray
    operators: np.ndarray
    positions: np.ndarray
    module_names: tuple[str, ...]
    operator_names: tuple[str, ...]

    @classmethod
    def from_events(cls, events: Iterable[Event | tuple]) -> Timeline:
        """Add up a stream of events, which starts with nothing allocated.

        Args:
            events: `Event`s, or tuples of their first three to five fields.

        Raises:
            ValueError: there are none, a part or phase is unknown, or more of a part is freed than was allocated.
        """
        parts, deltas, phases = [], [], []
        modules, operators = _Numbers(), _Numbers()
        for number, event in enumerate(events):
            part, delta, phase, module, operator = Event(*event)
            if part not in _PART_NUMBER or phase not in _PHASE_NUMBER:
                known = "one of " + ", ".join(PARTS if part not in _PART_NUMBER else PHASES)
                raise ValueError(f"event {number}: expected {known}; found {part!r} in {phase!r}")
            parts.append(_PART_NUMBER[part])
            deltas.append(delta)
            phases.append(_PHASE_NUMBER[phase])
            modules.add(module)
            operators.add(operator)
        if not parts:
            raise ValueError("a timeline needs at least one event, found none")
        part_bytes = np.zeros((len(parts), len(PARTS)), np.int64)
        part_bytes[np.arange(len(parts)), parts] = deltas
        np.cumsum(part_bytes, axis=0, out=part_bytes)
        if (part_bytes < 0).any():
            number, part = np.argwhere(part_bytes < 0)[0]
            raise ValueError(
                f"event {number}: {-part_bytes[number, part]} bytes more of {PARTS[part]} are freed than were allocated"
            )
        return cls(
            part_bytes,
            np.array(phases, np.int8),
            np.array(modules.numbers, np.int32),
            np.array(operators.numbers, np.int32),
            np.arange(len(parts)),
            tuple(modules.names),
            tuple(operators.names),
        )

    def __len__(self) -> int:
        return len(self.part_bytes)

    @cached_property
    def totals(self) -> np.ndarray:
        """(N,) int64: all that is allocated after each event."""
        return self.part_bytes.sum(axis=1)

    @cached_property
    def peak_index(self) -> int:
        """The first event after which the most is allocated."""
        return int(self.totals.argmax())

    @property
    def peak_bytes(self) -> int:
        return int(self.totals[self.peak_index])

    def phase(self, index: int) -> str:
        return PHASES[self.phases[index]]

    def module(self, index: int) -> str:
        return self.module_names[self.modules[index]]

    def operator(self, index: int) -> str:
        return self.operator_names[self.operators[index]]

    def phase_spans(self) -> list[PhaseSpan]:
        """The phases in order. One that comes again, as with gradient accumulation, has several spans."""
        starts = [0, *(np.flatnonzero(np.diff(self.phases)) + 1).tolist()]
        spans = []
        for start, stop in zip(starts, [*starts[1:], len(self)], strict=True):
            peak = start + int(self.totals[start:stop].argmax())
            at_entry = int(self.totals[start - 1]) if start else 0
            spans.append(PhaseSpan(self.phase(start), start, stop, peak, max(at_entry, int(self.totals[peak]))))
        return spans

    def breakdown(self, *, reserved_bytes: int | None = None, context_bytes: int | None = None) -> Breakdown:
        """This timeline as `memory.json` has it. A phase without events has a peak of 0."""
        parts = dict(zip(PARTS, self.part_bytes[self.peak_index].tolist(), strict=True))
        activations = {kind: parts[kind] for kind in ACTIVATIONS}
        parts["activations"] = sum(activations.values())
        peaks = dict.fromkeys(PHASES, 0)
        for span in self.phase_spans():
            peaks[span.phase] = max(peaks[span.phase], span.peak_bytes)
        at_peak = {category: parts[category] for category in CATEGORIES}
        return Breakdown(self.peak_bytes, reserved_bytes, context_bytes, at_peak, activations, peaks)

    def thin(self, n: int) -> Timeline:
        """At most `n` of the events, for drawing.

        The peak, the peak of each phase, both ends, and of each span the peak, the first and the last event are kept,
        in this order of importance where `n` is too small for all. Then come the turning points of the total: each of
        them where they fit, else the highest and the lowest of every stretch. The rest is spread evenly.

        Raises:
            ValueError: `n` is less than 1.
        """
        if n < 1:
            raise ValueError(f"expected to keep at least 1 event, found n = {n}")
        if len(self) <= n:
            return self
        kept = self._landmarks()[:n]
        turning = _turning_points(self.totals)
        room = (n - len(kept)) * 2 // 3
        kept += turning.tolist() if len(turning) <= room else _extremes(self.totals, turning, room // 2)
        kept = list(dict.fromkeys(kept))
        even = np.linspace(0, len(self) - 1, n - len(kept)).round().astype(np.int64)
        return self._only(np.union1d(np.array(kept, np.int64), even))

    def to_json(self, n: int) -> dict[str, Any]:
        """At most `n` of the events, and the phases, by the numbers of events, for JSON."""
        thin = self.thin(n)
        return {
            "events": len(self),
            "positions": thin.positions.tolist(),
            "parts": {part: thin.part_bytes[:, number].tolist() for number, part in enumerate(PARTS)},
            "spans": [{"phase": span.phase, "start": span.start, "stop": span.stop} for span in self.phase_spans()],
        }

    def _landmarks(self) -> list[int]:
        """The events that thinning keeps first, the most important first."""
        by_size = sorted(self.phase_spans(), key=lambda span: -self.totals[span.peak_index])
        of_phases: dict[str, int] = {}
        for span in by_size:
            of_phases.setdefault(span.phase, span.peak_index)
        order = [self.peak_index, *of_phases.values(), 0, len(self) - 1]
        order += [span.peak_index for span in by_size]
        order += [edge for span in by_size for edge in (span.start, span.stop - 1)]
        return list(dict.fromkeys(order))

    def _only(self, kept: np.ndarray) -> Timeline:
        return Timeline(
            self.part_bytes[kept], self.phases[kept], self.modules[kept], self.operators[kept], self.positions[kept],
            self.module_names, self.operator_names,
        )  # fmt: skip


_PART_NUMBER = {part: number for number, part in enumerate(PARTS)}
_PHASE_NUMBER = {phase: number for number, phase in enumerate(PHASES)}


class _Numbers:
    """Texts as numbers, each text kept once."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self._number_of: dict[str, int] = {}

    def add(self, text: str) -> None:
        self.numbers.append(self._number_of.setdefault(text, len(self._number_of)))

    @property
    def names(self) -> Sequence[str]:
        return list(self._number_of)


def _turning_points(totals: np.ndarray) -> np.ndarray:
    """Where a total stops rising or stops falling; of a level stretch, its first event."""
    moves = np.flatnonzero(np.diff(totals))  # the total changes between moves[i] and moves[i] + 1
    directions = np.sign(np.diff(totals)[moves])
    return moves[:-1][directions[1:] != directions[:-1]] + 1


def _extremes(totals: np.ndarray, candidates: np.ndarray, stretches: int) -> list[int]:
    """The highest and the lowest of the candidates in each of so many stretches of the same length."""
    kept = []
    for stretch in np.array_split(candidates, stretches) if stretches else []:
        kept += [int(stretch[totals[stretch].argmax()]), int(stretch[totals[stretch].argmin()])]
    return kept
