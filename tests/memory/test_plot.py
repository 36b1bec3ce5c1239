"""The picture of the memory over time, by its pixels."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
from made_timelines import CONFIG, step_report, step_timeline

from qlora_tool.memory.breakdown import PARTS, MemoryReport
from qlora_tool.memory.show.legend import COLOURS
from qlora_tool.memory.show.plot import write_png
from qlora_tool.memory.trace.timeline import Timeline

GIB = 2**30
LIMIT_RED = (0xC5, 0x22, 0x1F)


def pixels(path) -> np.ndarray:
    """(height, width, 3) of 0 … 255."""
    from matplotlib.image import imread

    return (imread(path)[:, :, :3] * 255).round().astype(int)


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


def is_colour(image: np.ndarray, colour: tuple[int, ...]) -> np.ndarray:
    return (image == np.array(colour)).all(axis=-1)


def draw(tmp_path, timelines, report, **options) -> np.ndarray:
    write_png(tmp_path / "memory.png", timelines, report, **options)
    return pixels(tmp_path / "memory.png")


def flat(**gib: int) -> Timeline:
    """So many GiB of each part, allocated at once and kept for a long time."""
    events = [(part, size * GIB, "load") for part, size in gib.items()]
    return Timeline.from_events([*events, *[("framework", 0, "forward")] * 500])


def test_a_part_takes_the_height_of_its_bytes_in_stacking_order(tmp_path):
    timeline = flat(base_weights=4, adapter_weights=1, saved=2, temporaries=3)
    image = draw(tmp_path, {"predicted": timeline}, MemoryReport("cpu", CONFIG, timeline.breakdown()))
    column = image[:, image.shape[1] // 3]  # well inside the area
    rows = {part: np.flatnonzero(is_colour(column, rgb(COLOURS[part]))) for part in PARTS}
    heights = {part: len(found) for part, found in rows.items() if len(found)}
    assert list(heights) == ["base_weights", "adapter_weights", "saved", "temporaries"]
    per_gib = heights["base_weights"] / 4
    for part, expected in {"adapter_weights": 1, "saved": 2, "temporaries": 3}.items():
        assert heights[part] == pytest.approx(expected * per_gib, abs=2)
    assert rows["base_weights"].min() > rows["adapter_weights"].max()  # rows count downwards
    assert rows["adapter_weights"].min() > rows["saved"].max()
    assert rows["saved"].min() > rows["temporaries"].max()


def test_a_peak_of_a_single_event_is_seen(tmp_path):
    """One of 100 000 events is a hundredth of a pixel wide."""
    events = [("base_weights", GIB, "load"), *[("framework", 0, "forward")] * 50_000]
    events += [("temporaries", 4 * GIB, "backward"), ("temporaries", -4 * GIB, "backward")]
    timeline = Timeline.from_events([*events, *[("framework", 0, "backward")] * 50_000])
    image = draw(tmp_path, {"predicted": timeline}, MemoryReport("cpu", CONFIG, timeline.breakdown()))
    half = image.shape[1] * 3 // 4  # without the bar at the side
    close = np.abs(image[:, :half] - np.array(rgb(COLOURS["temporaries"]))).sum(axis=-1) < 120
    assert close.sum(axis=0).max() > image.shape[0] // 3


def test_the_limit_is_a_line_where_tensors_reach_it(tmp_path):
    """On a card of 8 GiB, 2 of them taken by the context, 4 GiB of weights reach two thirds of the line."""
    timeline = flat(base_weights=4)
    report = MemoryReport("cuda", CONFIG, timeline.breakdown(reserved_bytes=5 * GIB, context_bytes=2 * GIB))
    image = draw(tmp_path, {"predicted": timeline}, report, budget=8 * GIB, budget_name="some card")
    column = image[:, image.shape[1] // 3 * 2]
    base = np.flatnonzero(is_colour(column, rgb(COLOURS["base_weights"])))
    line = np.flatnonzero(is_colour(column, LIMIT_RED))
    foot = base.max() + 1
    assert (foot - line.mean()) / (foot - base.min()) == pytest.approx(6 / 4, abs=0.02)


def test_a_limit_far_above_does_not_press_the_picture_flat(tmp_path):
    timeline = flat(base_weights=4)
    report = MemoryReport("cuda", CONFIG, timeline.breakdown(reserved_bytes=5 * GIB, context_bytes=0))
    image = draw(tmp_path, {"predicted": timeline}, report, budget=80 * GIB)
    column = image[:, image.shape[1] // 3 * 2]
    assert is_colour(column, rgb(COLOURS["base_weights"])).sum() > image.shape[0] / 3
    assert is_colour(image, LIMIT_RED).any()  # its name, and no line
    assert is_colour(image, LIMIT_RED).sum(axis=1).max() < image.shape[1] / 4


def test_a_prediction_and_a_measurement_share_one_scale(tmp_path):
    small, large = flat(base_weights=2), flat(base_weights=4)
    report = MemoryReport("cpu", CONFIG, small.breakdown(), large.breakdown())
    image = draw(tmp_path, {"predicted": small, "measured": large}, report)
    column = is_colour(image[:, image.shape[1] // 3], rgb(COLOURS["base_weights"]))
    edges = np.flatnonzero(np.diff(column.astype(int)))
    (upper, lower) = np.diff(edges)[::2]
    assert lower == pytest.approx(2 * upper, abs=3)


def test_a_whole_step_and_one_of_nothing_are_drawn(tmp_path):
    image = draw(tmp_path, {"predicted": step_timeline(accumulation=3)}, step_report(), title="a title", budget=6 * GIB)
    assert all(is_colour(image, rgb(colour)).any() for colour in COLOURS.values())
    draw(tmp_path, {"predicted": Timeline.from_events([("saved", 0, "forward")])}, MemoryReport("cpu", CONFIG))
    draw(tmp_path, {"measured": Timeline.from_events([("saved", 3, "forward")])}, MemoryReport("cpu", CONFIG))
    assert [path.name for path in tmp_path.iterdir()] == ["memory.png"]


def test_matplotlib_is_imported_only_when_something_is_drawn():
    code = "import sys, qlora_tool.memory.show.plot, qlora_tool.memory.show.table; print('matplotlib' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


# How red, green and blue look (linear RGB) to those who lack the cones for red, green or blue: Machado, Oliveira and
# Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency", 2009, severity 1.
SIGHTS = {
    "usual": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def lab(colour: str, sight) -> np.ndarray:
    """CIE L*a*b* (D65) of an sRGB colour as it looks to a kind of sight."""
    srgb = np.array(rgb(colour)) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(sight) @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ seen
    scaled = xyz / np.array([0.9505, 1, 1.089])
    x, y, z = np.where(scaled > 0.008856, np.cbrt(scaled), 7.787 * scaled + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("sight", SIGHTS)
def test_parts_can_be_told_apart_by_every_kind_of_sight(sight):
    """About 2 can just be told apart side by side; a legend needs far more."""
    seen = {part: lab(COLOURS[part], SIGHTS[sight]) for part in PARTS}
    for first, second in itertools.combinations(PARTS, 2):
        neighbours = PARTS.index(second) - PARTS.index(first) == 1
        assert np.linalg.norm(seen[first] - seen[second]) > (28 if neighbours else 10), (first, second)
