"""The page about a run: every section, the files' numbers, nothing from elsewhere, and no markup but its own."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tiny_runs import read_metrics, run_config, write_model, write_rows

from qlora_tool import TrainResult, UserError, export_merged, report, train
from qlora_tool.reporting.charts import ticks_between
from qlora_tool.reporting.curves import MOST_POINTS, thinned

WICKED = '</pre><script>alert(1)</script>"\'><img src=x onerror=y> &amp; \x1b[31m\u202e{title}'
SECTIONS = ["loss", "speed", "memory", "samples", "rows", "ranks", "exports", "configuration", "versions"]
VOID = {"meta", "br"}


class Page(HTMLParser):
    """What a browser makes of a page; fails where an element is closed that is not open."""

    def __init__(self, file: Path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text, self.marked, self.missing = "", "", []
        self.rows: list[list[str]] = []
        self._open: list[tuple[str, str]] = []
        self.feed(file.read_text(encoding="utf-8"))
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        found = {name: value or "" for name, value in attributes}
        self.elements.append((tag, found))
        if tag not in VOID:
            self._open.append((tag, found.get("class", "")))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if found.get("class") == "missing":
            self.missing.append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, {name: value or "" for name, value in attributes}))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        tags = [tag for tag, _ in self._open]
        if "style" in tags:
            return
        self.text += data
        if "mark" in tags:
            self.marked += data
        if {"td", "th"} & set(tags):
            self.rows[-1][-1] += data
        if ("p", "missing") in self._open:
            self.missing[-1] += data

    @property
    def sections(self) -> list[str]:
        return [found["id"] for tag, found in self.elements if tag == "section"]

    def refuse_foreign(self) -> None:
        """Nothing in it is loaded, run, or refers to anywhere."""
        for tag, attributes in self.elements:
            assert tag not in ("script", "link", "img", "iframe", "object", "a", "base", "form", "image", "use"), tag
            for name, value in attributes.items():
                assert name not in ("src", "href", "srcset", "action", "data", "xlink:href"), (tag, name)
                assert not name.startswith("on") and "url(" not in value and "://" not in value, (tag, name, value)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A run with hostile rows and two evaluations, as the command trains it."""
    folder = tmp_path_factory.mktemp("report")
    model, rows = write_model(folder / "model"), write_rows(folder / "rows.jsonl", 12)
    with rows.open("a", encoding="utf-8") as stream:
        for number in range(8):
            stream.write(json.dumps({"prompt": f"{number} {WICKED}", "completion": f"yes {WICKED}"}) + "\n")
    values = {"data.eval": str(write_rows(folder / "eval.jsonl", 4, 50)), "data.max_length": 256,
              "training.eval_steps": 3}  # fmt: skip
    return train(run_config(model, rows, folder / "run", values))


@pytest.fixture
def copied(trained: TrainResult, tmp_path: Path) -> Path:
    """The run, to change."""
    shutil.copytree(trained.folder, tmp_path / "run")
    return tmp_path / "run"


def test_train_writes_it_with_every_section_and_number(trained: TrainResult):
    assert trained.report == trained.folder / "report.html"
    page, records = Page(trained.report), read_metrics(trained.folder)
    assert page.sections == SECTIONS
    page.refuse_foreign()
    for record in records:
        assert [str(record["step"]), f"{record['loss']:.4f}"] in page.rows
    evaluated = {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record}
    state = json.loads((trained.folder / "checkpoints/step-000006/state.json").read_text())
    assert evaluated.keys() == {3, 6}
    for step, loss in {0: state["untuned"]["eval_loss"], **evaluated}.items():
        assert [str(step), f"{loss:.4f}"] in page.rows
    measured = json.loads((trained.folder / "memory.json").read_text())["measured"]
    (row,) = [row for row in page.rows if row[0] == "other weights"]
    assert row[2] == f"{measured['at_peak']['other_weights'] / 2**20:.1f}"
    (row,) = [row for row in page.rows if row[0] == "peak in load"]
    assert row[1] and row[2:] == ["", "", ""]  # a step was measured, and no loading
    assert "learning_rate: 0.01" in page.text and "torch" in page.text
    charts = [found for _, found in page.elements if found.get("role") == "img"]
    assert len(charts) == 4 and all(len(found["aria-label"]) > 40 for found in charts)
    assert [line.partition(";")[0].partition(":")[0] for line in page.missing] == [
        "no prompts were answered while it trained (training.eval_prompts)", "nothing was exported yet"]  # fmt: skip


def test_ranks_are_those_of_the_adapter(trained: TrainResult):
    from qlora_tool import inspect

    found, page = inspect(trained.folder), Page(trained.report)
    for row in found.rows:
        (shown,) = [cells for cells in page.rows if cells[0] == row.name]
        assert shown[1:5] == [str(row.count), "4", f"{row.effective[1]:.1f}", f"{row.needed[1]:.0f}"]


def test_marked_are_the_trained_tokens(trained: TrainResult):
    page = Page(trained.report)
    rows = json.loads((trained.folder / "report" / "rows.json").read_text())["rows"]
    spans = [span for examples in rows for example in examples for span in example["spans"]]
    expected = "".join(text for text, is_trained in spans if is_trained)
    shown = page.marked.removeprefix("marked")  # the word that explains it
    assert re.sub(r"[\s↵·]", "", shown) == re.sub(r"\s", "", _without_signs(expected))


def _without_signs(text: str) -> str:
    return text.replace("\x1b", "<U+001B>").replace("\u202e", "<U+202E>")


def test_nobody_breaks_out_of_his_place(copied: Path):
    with (copied / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"step": 0, "samples": [{"prompt": WICKED, "answer": WICKED}]}) + "\n")
        stream.write(json.dumps({"step": 6, "samples": [{"prompt": WICKED, "answer": f"now {WICKED}"}]}) + "\n")
        stream.write('{"step": 7, "loss": 1')  # what a power failure leaves
    rows = json.loads((copied / "report" / "rows.json").read_text())
    rows["rows"][0][0]["where"] = WICKED
    rows["counts"] = {WICKED: [[WICKED, WICKED]]}
    (copied / "report" / "rows.json").write_text(json.dumps(rows))
    hashes = report_hashes(copied)
    noted = {WICKED: {"adapter": hashes, "format": WICKED, "verification": {"tokens": 3, "rows": WICKED,
                                                                           "warnings": [WICKED]}}}  # fmt: skip
    (copied / "report" / "exports.json").write_text(json.dumps(noted))
    made = Page(report(copied).file)
    made.refuse_foreign()
    assert made.sections == SECTIONS and "\x1b" not in made.text and "\u202e" not in made.text
    assert made.text.count("<script>alert(1)</script>") >= 9
    assert "before" in made.text and "now </pre>" in made.text and made.missing == []


def report_hashes(run: Path) -> dict[str, str]:
    import hashlib

    files = sorted((run / "adapter").glob("adapter_*"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_an_export_is_shown_while_its_adapter_is_there(copied: Path, tmp_path: Path):
    exported = export_merged(copied, tmp_path / "merged", dtype="float32")
    page = Page(report(copied).file)
    found = exported.facts["verification"]
    assert f"{found['mean_kl']:.4g} nats" in page.text and f"{found['exported_loss']:.4g}" in page.text
    assert str(tmp_path / "merged") in page.text and not any("exported" in line for line in page.missing)
    why = "those of the base with the adapter as it started (init_lora_weights: calibrated), which is another model."
    assert f"{found['untuned_loss']:.4g}" in page.text and "Untuned is the base without" not in page.text
    file = copied / "config.yaml"
    file.write_text(file.read_text().replace("init_lora_weights: default", "init_lora_weights: calibrated"))
    assert why in Page(report(copied).file).text  # both kinds of an untuned loss are on the page
    config = copied / "adapter" / "adapter_config.json"
    config.write_text(config.read_text() + "\n")
    said = "\n".join(report(copied).missing)
    assert "nothing was exported yet: qlora-tool export-merged" in said and "1 made of an earlier adapter" in said


def test_a_bare_and_a_broken_folder(copied: Path, tmp_path: Path):
    for name in ("metrics.jsonl", "memory.json"):
        (copied / name).write_text("{")
    (copied / "report" / "step_memory.json").write_text('{"positions": [1], "events": 1, "parts": {}}')
    shutil.rmtree(copied / "adapter")
    result = report(copied, output=tmp_path / "other.html")
    page = Page(result.file)
    assert result.file == tmp_path / "other.html" and page.sections == SECTIONS
    said = "\n".join(result.missing)
    for part in ("not finished: qlora-tool train", "no step is logged", "memory.json is not there", "cannot be read"):
        assert part in said
    with pytest.raises(UserError, match="nothing: no such folder; expected a run's folder"):
        report(tmp_path / "nothing")
    with pytest.raises(UserError, match="there is no folder"):
        report(copied, output=tmp_path / "no" / "page.html")


def test_many_points_are_thinned_and_keep_their_ends_and_peaks():
    points = [(step, float(step % 97)) for step in range(10_000)] + [(10_000, 500.0), (10_001, -3.0), (10_002, 1.0)]
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS and kept == sorted(kept)
    assert {points[0], points[-1], (10_000, 500.0), (10_001, -3.0)} <= set(kept)


@pytest.mark.parametrize(("low", "high"), [(0, 0), (2, 2), (0.98, 3.7), (-1, 1), (0, 5e-4), (1e9, 3e9)])
def test_ticks_hold_all_between_them(low: float, high: float):
    ticks = ticks_between(low, high)
    assert ticks[0] <= low + 1e-9 * abs(low) and ticks[-1] >= high - 1e-9 * abs(high) and 2 <= len(ticks) <= 8
