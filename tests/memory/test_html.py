"""The page to explore the memory of a step."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import accumulate

import pytest
from made_timelines import step_report, step_timeline

from qlora_tool.memory.breakdown import PARTS, MemoryReport
from qlora_tool.memory.show.html import write_html
from qlora_tool.memory.trace.timeline import Timeline

GIB = 2**30
WICKED = '</script><script>alert("1")</script><!--&amp;'


class Page(HTMLParser):
    """What a browser makes of a file: its elements with their attributes, scripts and texts."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self._open = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._open = tag
        if tag == "script":
            self.scripts.append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self._open = ""

    def handle_data(self, data):
        if self._open == "script":
            self.scripts[-1] += data
        elif self._open in ("td", "th"):
            self.rows[-1][-1] += data
        elif self._open != "style":
            self.text += data

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])


def page(tmp_path, timelines, report, **options) -> Page:
    path = tmp_path / "memory.html"
    write_html(path, timelines, report, **options)
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_holds_every_byte_of_the_timeline(tmp_path):
    timeline = step_timeline(layers=8)
    data = page(tmp_path, {"predicted": timeline}, step_report(), budget=8 * GIB, budget_name="some card").data
    (held,) = data["timelines"]
    assert [part["name"] for part in data["parts"]][:2] == ["base weights (4-bit codes)", "quantization scales"]
    assert list(accumulate(held["positions"])) == list(range(len(timeline)))
    for number in range(len(PARTS)):
        assert list(accumulate(held["parts"][number])) == timeline.part_bytes[:, number].tolist()
    assert held["peak"] == timeline.peak_index
    for index in (0, timeline.peak_index, len(timeline) - 1):
        assert held["names"][held["modules"][index]] == timeline.module(index)
        assert held["names"][held["operators"][index]] == timeline.operator(index)
    assert [span["phase"] for span in held["spans"]] == ["load", "forward", "backward", "optimizer"]
    assert held["spans"][2]["start"] <= timeline.peak_index < held["spans"][2]["stop"]
    assert (data["budget"], held["reserved"], held["context"]) == (8 * GIB, 6188 * 2**20, 420_000_000)


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    made = page(tmp_path, {"predicted": step_timeline(layers=2)}, step_report())
    for tag, attributes in made.elements:
        assert not {"src", "href", "srcset", "action"} & set(attributes), tag
        assert tag not in ("link", "img", "iframe", "object")
    assert [tag for tag, _ in made.elements].count("script") == 2
    (policy,) = [a["content"] for _, a in made.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")


def test_no_name_breaks_out_of_its_place(tmp_path):
    timeline = Timeline.from_events([("saved", 5, "forward", WICKED, "{{script}}"), ("saved", 0, "backward", "{{x}}")])
    report = MemoryReport("cpu", {"model": {"name_or_path": WICKED}}, timeline.breakdown())
    names = {"title": WICKED, "budget_name": WICKED, "unquantized": {WICKED: 10**6}, "budget": GIB}
    made = page(tmp_path, {"predicted": timeline}, report, **names)
    assert len(made.scripts) == 2
    assert made.data["timelines"][0]["names"][:2] == [WICKED, "{{x}}"]
    assert made.data["timelines"][0]["names"][2] == "{{script}}"
    assert made.data["budget_name"] == WICKED
    assert made.text.count(WICKED) == 4  # the title, the heading, what fits where, and the configuration
    assert [WICKED, "1.0 MiB"] in made.rows
    assert "<!--" not in made.scripts[0] and "<!--" not in made.scripts[1]


def test_the_table_says_what_the_terminal_does(tmp_path):
    report = step_report()
    made = page(tmp_path, {"predicted": step_timeline()}, report, budget=4 * GIB, unquantized={"lm_head": 262_144_000})
    temporaries = report.predicted.at_peak["temporaries"]
    (row,) = [row for row in made.rows if row[0] == "temporaries"]
    assert row[1] == f"{temporaries / GIB:.2f}"
    assert row[3:] == ["-0.01", f"{-1250e6 / (temporaries + 12.5e6):.2f}"]
    assert ["lm_head", "0.24 GiB"] in made.rows
    assert ["limit", "4.00", "4.00", "", ""] in made.rows
    assert "2.43 GiB too much" in made.text
    assert "quantization: nf4" in made.text


def test_a_long_step_stays_a_small_file(tmp_path):
    timeline = step_timeline(layers=80, accumulation=16)
    assert len(timeline) > 30_000
    made = page(tmp_path, {"predicted": timeline}, step_report())
    assert (tmp_path / "memory.html").stat().st_size < 300_000
    (held,) = made.data["timelines"]
    assert 1000 < len(held["positions"]) <= 2000
    shown = list(accumulate(held["positions"]))
    assert shown[held["peak"]] == timeline.peak_index
    assert held["events"] == len(timeline)
    at_peak = [list(accumulate(part))[held["peak"]] for part in held["parts"]]
    assert at_peak == timeline.part_bytes[timeline.peak_index].tolist()
    assert {span["peak"] for span in held["spans"]} <= set(shown)


def test_both_timelines_are_in_one_page(tmp_path):
    two = {"predicted": step_timeline(layers=2), "measured": step_timeline(layers=3)}
    made = page(tmp_path, two, step_report())
    assert [timeline["name"] for timeline in made.data["timelines"]] == ["predicted", "measured"]


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node to parse the script")
def test_the_script_is_javascript(tmp_path):
    made = page(tmp_path, {"predicted": step_timeline(layers=2)}, step_report())
    (tmp_path / "page.js").write_text(made.scripts[1], encoding="utf-8")
    run = subprocess.run(["node", "--check", tmp_path / "page.js"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
