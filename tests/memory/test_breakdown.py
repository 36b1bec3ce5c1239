"""The memory breakdown as objects and as JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qlora_tool.memory.breakdown import ACTIVATIONS, CATEGORIES, PARTS, PHASES, Breakdown, MemoryReport

JSON = """
{"schema": 1, "device": "cuda", "config": {"model": {"quantization": "nf4"}},
 "predicted": {
   "peak_bytes": 1450, "reserved_bytes": 2000, "context_bytes": 300,
   "at_peak": {"base_weights": 1000, "quantization_state": 60, "other_weights": 200, "adapter_weights": 20,
               "gradients": 0, "optimizer_state": 40, "activations": 75, "temporaries": 50, "framework": 5},
   "activations": {"boundaries": 64, "saved": 8, "recomputed": 3},
   "phase_peak_bytes": {"load": 1320, "forward": 1400, "backward": 1450, "optimizer": 1380}},
 "measured": null}
"""


def breakdown(**changes) -> Breakdown:
    return replace(MemoryReport.from_json(json.loads(JSON)).predicted, **changes)


def test_the_json_of_the_contract_comes_back_as_it_was_written():
    report = MemoryReport.from_json(json.loads(JSON))
    assert report.to_json() == json.loads(JSON)
    assert json.dumps(report.to_json()) == json.dumps(json.loads(JSON))  # the order of the keys too
    assert list(report.breakdowns) == ["predicted"]
    measured = breakdown(reserved_bytes=None, context_bytes=None)
    both = replace(report, measured=measured)
    assert MemoryReport.from_json(json.loads(json.dumps(both.to_json()))) == both


def test_a_file_without_a_measurement_and_with_keys_of_later_versions_is_read():
    value = json.loads(JSON)
    del value["measured"]
    value["predicted"]["seconds"] = 7
    assert MemoryReport.from_json(value).predicted == breakdown()


def test_parts_are_the_categories_with_the_activations_split():
    parts = breakdown().parts
    assert list(parts) == list(PARTS)
    assert [parts[kind] for kind in ACTIVATIONS] == [64, 8, 3]
    assert sum(parts.values()) == 1450
    assert set(PARTS) == set(CATEGORIES) - {"activations"} | set(ACTIVATIONS)


def test_what_the_device_has_to_give():
    assert breakdown().needed_bytes == 2300  # reserved, and the context
    assert breakdown(reserved_bytes=None, context_bytes=None).needed_bytes == 1450
    assert breakdown().peak_phase == "backward"


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"peak_bytes": 1460}, "at_peak adds up to 1450 bytes, peak_bytes is 1460: a difference of -10 bytes"),
        (
            {"activations": {"boundaries": 64, "saved": 8, "recomputed": 10}},
            "activations adds up to 82 bytes, at_peak.activations is 75: a difference of +7 bytes",
        ),
        (
            {"phase_peak_bytes": dict.fromkeys(PHASES, 1500)},
            "the largest of phase_peak_bytes is 1500 bytes, peak_bytes is 1450: a difference of +50 bytes",
        ),
        ({"at_peak": {"base_weights": 1450}}, "at_peak: quantization_state, other_weights"),
        ({"activations": {"boundaries": 75, "saved": 0, "recomputed": 0, "x": 0}}, "activations: x unknown"),
        ({"peak_bytes": 1450.0}, "peak_bytes: expected a whole number of bytes, found 1450.0"),
        ({"reserved_bytes": -1}, "reserved_bytes: expected a whole number of bytes, found -1"),
        ({"context_bytes": True}, "context_bytes: expected a whole number of bytes, found True"),
    ],
)
def test_what_does_not_add_up_is_refused_with_the_difference(changes, fault):
    with pytest.raises(ValueError) as raised:
        breakdown(**changes)
    assert str(raised.value).startswith(fault)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda value: value.update(schema=2), "expected a memory breakdown of schema 1, found schema 2"),
        (lambda value: value.pop("device"), "device: missing"),
        (lambda value: value["predicted"].pop("at_peak"), "predicted: at_peak: missing"),
        (lambda value: value.update(predicted=[]), "predicted: expected a mapping, found []"),
        (lambda value: value["predicted"].update(peak_bytes=1451), "predicted: at_peak adds up to 1450 bytes"),
    ],
)
def test_a_broken_file_is_named_by_its_key(change, fault):
    value = json.loads(JSON)
    change(value)
    with pytest.raises(ValueError) as raised:
        MemoryReport.from_json(value)
    assert str(raised.value).startswith(fault)
