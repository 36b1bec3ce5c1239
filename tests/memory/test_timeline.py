"""Memory over time: adding up events, the phases, thinning."""

from __future__ import annotations

import numpy as np
import pytest
from made_timelines import step_timeline

from qlora_tool.memory.breakdown import PARTS
from qlora_tool.memory.trace.timeline import Event, Timeline

#              part, delta, phase                     total after it
SMALL = [
    ("base_weights", 100, "load"),  #                   100
    ("temporaries", 50, "load", "layers.0"),  #         150
    ("temporaries", -50, "load", "layers.0"),  #        100
    ("saved", 30, "forward", "layers.0", "aten::mm"),  # 130
    ("boundaries", 40, "forward", "layers.1"),  #       170
    ("saved", -30, "backward", "layers.0"),  #          140
    ("gradients", 10, "backward", "layers.0"),  #       150
    ("gradients", -10, "optimizer"),  #                 140
    ("boundaries", -40, "optimizer"),  #                100
]


def test_events_add_up_to_bytes_by_part_after_each():
    timeline = Timeline.from_events(SMALL)
    assert timeline.totals.tolist() == [100, 150, 100, 130, 170, 140, 150, 140, 100]
    assert timeline.part_bytes[:, PARTS.index("saved")].tolist() == [0, 0, 0, 30, 30, 0, 0, 0, 0]
    assert (timeline.peak_index, timeline.peak_bytes) == (4, 170)
    assert [timeline.phase(4), timeline.module(4), timeline.operator(4)] == ["forward", "layers.1", ""]
    assert timeline.operator(3) == "aten::mm"


def test_a_phase_begins_with_what_the_one_before_left():
    spans = Timeline.from_events(SMALL).phase_spans()
    assert [(span.phase, span.start, span.stop, span.peak_index) for span in spans] == [
        ("load", 0, 3, 1),
        ("forward", 3, 5, 4),
        ("backward", 5, 7, 6),
        ("optimizer", 7, 9, 7),
    ]
    # backward only ever has 150 after its own events, and begins with the 170 of the forward; so does the optimizer
    assert [span.peak_bytes for span in spans] == [150, 170, 170, 150]


def test_a_phase_that_comes_again_has_several_spans():
    phases = [span.phase for span in step_timeline(layers=2, accumulation=3).phase_spans()]
    assert phases == ["load", *["forward", "backward"] * 3, "optimizer"]


def test_the_breakdown_is_what_stands_at_the_peak():
    breakdown = Timeline.from_events(SMALL).breakdown(reserved_bytes=200, context_bytes=7)
    assert breakdown.peak_bytes == 170
    assert {name: size for name, size in breakdown.at_peak.items() if size} == {"base_weights": 100, "activations": 70}
    assert breakdown.activations == {"boundaries": 40, "saved": 30, "recomputed": 0}
    assert breakdown.phase_peak_bytes == {"load": 150, "forward": 170, "backward": 170, "optimizer": 150}
    assert (breakdown.reserved_bytes, breakdown.context_bytes) == (200, 7)
    assert Timeline.from_events(SMALL[:3]).breakdown().phase_peak_bytes["forward"] == 0


@pytest.mark.parametrize(
    ("events", "fault"),
    [
        ([], "at least one event"),
        ([*SMALL, ("activations", 5, "forward")], "event 9: expected one of base_weights, .*found 'activations'"),
        ([("saved", 5, "eval")], "event 0: expected one of load, forward, .*in 'eval'"),
        ([("saved", 5, "forward"), ("saved", -8, "backward")], "event 1: 3 bytes more of saved are freed"),
    ],
)
def test_a_stream_that_cannot_be_is_refused(events, fault):
    with pytest.raises(ValueError, match=fault):
        Timeline.from_events(events)


def random_timeline(events: int, seed: int) -> Timeline:
    """Allocations and frees of random size, in eight phases, with one peak far above the rest."""
    random = np.random.default_rng(seed)
    deltas = random.integers(-1000, 1001, events)
    deltas[0] = 1_000_000
    deltas[events // 3 : events // 3 + 2] = 500_000, -500_000
    phases = ["load", "forward", "backward", "optimizer"] * 2
    return Timeline.from_events(
        Event("temporaries", int(delta), phases[number * 8 // events], f"layers.{number}")
        for number, delta in enumerate(deltas)
    )


@pytest.mark.parametrize("n", [30, 300, 2000])
def test_thinning_keeps_the_peaks_exactly_in_at_most_n_points(n):
    whole = random_timeline(20_000, seed=n)
    thin = whole.thin(n)
    assert n // 2 < len(thin) <= n
    assert (np.diff(thin.positions) > 0).all()
    assert np.array_equal(thin.part_bytes, whole.part_bytes[thin.positions])
    assert thin.positions[thin.peak_index] == whole.peak_index
    assert thin.module(thin.peak_index) == f"layers.{whole.peak_index}"
    assert [thin.positions[0], thin.positions[-1]] == [0, 19_999]
    for span, kept in zip(whole.phase_spans(), thin.phase_spans(), strict=True):
        assert (kept.phase, kept.peak_bytes) == (span.phase, span.peak_bytes)
        assert whole.totals[thin.positions[kept.peak_index]] == whole.totals[span.peak_index]


def test_every_turning_point_is_kept_where_there_is_room():
    """10 000 events that rise and fall slowly: twenty hills, found by comparing each level with its neighbours."""
    totals = (1e6 * (2 + np.sin(np.arange(10_000) * (20 * 2 * np.pi / 10_000)))).astype(int)
    deltas = np.diff(totals, prepend=0)
    whole = Timeline.from_events(("saved", int(delta), "forward") for delta in deltas)
    levels = whole.totals
    strict = [
        i
        for i in range(1, len(levels) - 1)
        if (levels[i] > levels[i - 1] and levels[i] > levels[i + 1])
        or (levels[i] < levels[i - 1] and levels[i] < levels[i + 1])
    ]
    assert len(strict) > 10
    assert set(strict) <= set(whole.thin(200).positions.tolist())


def test_the_most_important_points_come_first_where_n_is_tiny():
    whole = random_timeline(5000, seed=1)
    assert whole.thin(1).positions.tolist() == [whole.peak_index]
    assert whole.peak_index in whole.thin(3).positions
    with pytest.raises(ValueError, match="at least 1 event"):
        whole.thin(0)


def test_a_short_timeline_is_left_as_it_is():
    timeline = Timeline.from_events(SMALL)
    assert timeline.thin(9) is timeline
