"""The memory breakdown in a terminal."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from made_timelines import CONFIG, step_report, step_timeline
from rich.console import Console

from qlora_tool.memory.breakdown import ACTIVATIONS, CATEGORIES, PHASES, Breakdown, MemoryReport
from qlora_tool.memory.show.legend import Unit, difference, group_modules, part_names, report_rows
from qlora_tool.memory.show.table import bar_cells, render_report
from qlora_tool.sizes import memory_size

GIB = 2**30


def made(**sizes: int) -> Breakdown:
    """A breakdown on a CPU with these bytes, the peak in the backward pass."""
    activations = {kind: sizes.get(kind, 0) for kind in ACTIVATIONS}
    at_peak = {category: sizes.get(category, 0) for category in CATEGORIES}
    at_peak["activations"] = sum(activations.values())
    peak = sum(at_peak.values())
    phases = dict.fromkeys(PHASES, 0) | {"backward": peak}
    return Breakdown(peak, None, None, at_peak, activations, phases)


def printed(report: MemoryReport, *, width: int = 80, encoding: str = "utf-8", **options) -> str:
    """What goes into a file or a pipe."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    render_report(report, console=Console(file=stream, width=width, no_color=True), **options)
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


def row(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.strip().startswith(name)]
    return line.strip().removeprefix(name).split()


def test_sizes_of_memory():
    # 3 340 800 000 / 1 073 741 824 = 3.1114 GiB; 80 400 000 / 1 048 576 = 76.68 MiB
    assert memory_size(3_340_800_000) == "3.11 GiB"
    assert memory_size(80_400_000) == "76.7 MiB" and memory_size(-80_400_000) == "-76.7 MiB"
    assert memory_size(0) == "0 MiB"


def test_a_prediction_beside_a_measurement():
    predicted = made(base_weights=3_340_800_000, boundaries=500_000_000, saved=100_000_000, temporaries=300_000_000)
    measured = made(base_weights=3_340_800_000, boundaries=500_000_000, saved=80_000_000, temporaries=310_000_000)
    text = printed(MemoryReport("cpu", CONFIG, predicted, measured))
    assert row(text, "base weights (4-bit codes)") == ["3.11", "3.11", "0"]
    assert row(text, "activations") == ["0.56", "0.54", "+0.02", "+3.45"]  # 20 / 580
    assert row(text, "saved for backward") == ["0.09", "0.07", "+0.02", "+25.00"]
    assert row(text, "temporaries") == ["0.28", "0.29", "-0.01", "-3.23"]
    assert row(text, "gradients") == ["0", "0", "0"]
    assert row(text, "peak, allocated at once") == ["3.95", "3.94", "+0.01", "+0.24"]
    assert row(text, "peak in backward")[:1] == ["3.95"]
    unheld, first, second = text.splitlines()[:3]
    assert unheld == ("predicted: 3.95 GiB needed, and no size was given to hold it against: for a yes or no add "
                      "--device-memory 16GiB")  # fmt: skip
    assert first == "           3.95 GiB at the peak, in backward"
    assert second.startswith("measured:  3.94 GiB")
    assert "reserved" not in text and "CUDA" not in text  # a CPU has neither


def test_only_the_same_moments_are_compared():
    """A start that is made while loading, and a step of the run, which is all that was measured."""
    step = made(base_weights=300, saved=100)
    start = replace(made(base_weights=300, temporaries=700), phase_peak_bytes=step.phase_peak_bytes | {"load": 1000})

    def compared(predicted: Breakdown, measured: Breakdown, *, step_alone: bool) -> set[str]:
        report = MemoryReport("cuda", CONFIG, *(replace(one, reserved_bytes=one.peak_bytes, context_bytes=5)
                                                for one in (predicted, measured)))  # fmt: skip
        rows = [row for section in report_rows(report, step_alone=step_alone) for row in section]
        return {row.name for row in rows if difference(row, Unit("B", 1, 0))[0]}

    phases, whole = {f"peak in {phase}" for phase in PHASES}, {"peak, allocated at once", "needed in all"}
    device = {"reserved by the allocator", "CUDA context"}
    assert compared(start, step, step_alone=True) == phases - {"peak in load"} | {"CUDA context"}
    assert compared(start, step, step_alone=False) == phases | whole | device
    assert compared(step, step, step_alone=False) > phases | whole | device | {"gradients", "temporaries"}
    assert compared(step, step, step_alone=True) == compared(step, step, step_alone=False) - {"peak in load"}


def test_what_is_needed_of_the_card_and_what_is_left():
    whole = printed(step_report(), budget=24 * GIB, budget_name="RTX 4090")
    text = whole.partition("\n\n")[2]
    assert row(text, "reserved by the allocator")[:2] == ["6.04", "5.85"]  # 6188 and 5991 MiB
    assert row(text, "needed in all")[0] == "6.43"  # and 420.0 MB of context
    assert row(text, "usable") == ["24.00", "24.00"]
    assert row(text, "left") == ["17.57", "17.76"]
    assert "yes, it fits: 6.43 GiB needed, 24.00 GiB usable (RTX 4090), 17.57 GiB left" in " ".join(whole.split())


def test_a_plan_that_does_not_fit_says_by_how_much():
    text = printed(step_report(), budget=4 * GIB)
    assert "no, it does not fit: 6.43 GiB needed, the limit is 4.00 GiB, 2.43 GiB too much" in " ".join(text.split())
    assert row(text, "left")[0] == "-2.43"
    bars = text[text.index("\npredicted  B") :].splitlines()
    # the bar is 69 cells for 6.43 GiB: 4 GiB end in cell 43, below which the caret stands
    assert bars[3].index("^") == 11 + 43 - 1


def test_what_is_needed_stands_in_one_line_where_there_is_no_terminal():
    """On a terminal it wraps beside its name."""
    options = {"budget": 10 * GIB, "budget_name": "95% of what a card with a very long name and more than that has"}
    text = printed(step_report(), **options)
    assert re.search(r"(?m)^predicted: yes, it fits: .* \(95% of what .* more than that has\), \S+ GiB left$", text)
    assert re.search(r"(?m)^           \S+ GiB at the peak, in \w+$", text)
    stream = io.StringIO()
    console = Console(file=stream, width=60, no_color=True, force_terminal=True, color_system=None)
    render_report(step_report(), console=console, **options)
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines[: lines.index("")])) <= 60 and lines[0].startswith("predicted: yes, it fits: ")
    assert all(line.startswith((" " * 11, "predicted: ", "measured:  ")) for line in lines[: lines.index("")])


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_eighty_columns_without_colour_are_enough(encoding):
    whole = {f"base_model.model.model.layers.{i}.block_sparse_moe.experts.{i}.gate_up_proj": 10**8 for i in range(40)}
    report = step_report()
    scale = 30  # a card of the largest kind: sizes of six digits
    large = Breakdown(
        *(size * scale for size in (report.predicted.peak_bytes, report.predicted.reserved_bytes, 10**8)),
        *(
            {key: size * scale for key, size in table.items()}
            for table in (report.predicted.at_peak, report.predicted.activations, report.predicted.phase_peak_bytes)
        ),
    )
    for shown in (report, replace(report, predicted=large, measured=large)):
        text = printed(shown, encoding=encoding, budget=10 * GIB, budget_name="some card", unquantized=whole)
        assert "\x1b" not in text and "…" not in text and "?" not in text
        lines = text.splitlines()
        assert max(map(len, lines[lines.index("") :])) <= 80  # what stands before the table is told in sentences
        assert f"{shown.predicted.peak_bytes / GIB:.2f}" in text


def test_a_terminal_with_colours_gets_coloured_blocks_and_one_without_letters():
    def bar(**options) -> str:
        console = Console(file=io.StringIO(), width=80, **options)
        render_report(MemoryReport("cpu", CONFIG, made(base_weights=100)), console=console)
        return console.file.getvalue()

    assert "\x1b[38;2;11;81;163m" + "█" * 69 in bar(force_terminal=True, color_system="truecolor")
    for options in ({"force_terminal": True, "color_system": "standard"}, {"force_terminal": False}):
        assert "predicted  " + "B" * 69 in bar(**options)


def test_cells_of_the_bar_by_hand():
    # cumulative, of 1000 bytes in 20 cells (50 each): 500 → 10, 520 → 10.4, 620 → 12.4, 720 → 14.4, 820 → 16.4
    breakdown = replace(
        made(base_weights=500, quantization_state=20, boundaries=100), reserved_bytes=720, context_bytes=100
    )
    assert bar_cells(breakdown, 1000, 20) == {"base_weights": 10, "boundaries": 2, "unused": 2, "context": 2, "free": 4}
    assert bar_cells(made(), 0, 20) == {"free": 20}
    cells = bar_cells(step_report().predicted, 7 * GIB, 69)
    assert sum(cells.values()) == 69


def test_modules_that_are_not_quantized_are_named_with_their_bytes():
    norms = {f"model.layers.{i}.input_layernorm": 8192 for i in range(32)}
    text = printed(step_report(), unquantized={"lm_head": 262_144_000, "odd[red]name": 1_000_000, **norms})
    assert row(text, "lm_head") == ["0.24", "GiB"]
    assert row(text, "model.layers.*.input_layernorm (32)") == ["0.2", "MiB"]  # 32 × 8192 = 262 144, a quarter of one
    assert row(text, "odd[red]name") == ["1.0", "MiB"]
    assert group_modules({"h.0": 1, "h.1": 2}) == [("h.* (2)", 3)]
    many = group_modules({f"part{i}x": 100 + i for i in range(20)})
    assert many[0] == ("part19x", 119) and len(many) == 9
    assert many[-1] == ("and 12 more", sum(range(100, 112)))
    large = {f"part{i}x": 2**20 * (1 + i) for i in range(9)}
    assert len(group_modules(large)) == 9
    norm, frequencies = {"norm.weight": 8192}, {"inv_freq": 256, "original_inv_freq": 256}
    assert group_modules({"head": 2**20, **norm, **frequencies}) == [("head", 2**20), ("and 3 more", 8704)]
    assert group_modules({**large, **frequencies})[-2:] == [("part1x", 2**21), ("and 3 more", 2**20 + 512)]


def test_the_base_weights_are_called_after_how_they_are_stored():
    assert part_names({"model": {"quantization": "int8"}})["base_weights"] == "base weights (int8 codes)"
    int8 = {"quantization": "int8", "embeddings": "int8"}
    assert part_names({"model": int8})["base_weights"] == "base weights (int8 codes)"
    nf4 = part_names({"model": int8 | {"quantization": "nf4"}})
    assert nf4["base_weights"] == "base weights (4-bit codes, int8 embeddings)"
    assert part_names({"model": {"quantization": "none"}})["base_weights"] == "base weights"
    assert part_names({})["base_weights"] == "base weights"


def test_a_report_of_nothing_says_so():
    assert printed(MemoryReport("cpu", CONFIG)) == "no memory was predicted or measured\n"


def test_every_part_that_the_bar_shows_is_in_its_legend():
    text = printed(MemoryReport("cpu", CONFIG, step_timeline().breakdown()))
    bar = re.search(r"^predicted  (\S+)$", text, re.MULTILINE)[1]
    legend = text[text.index("the whole bar") :]
    assert set(bar) == set(re.findall(r"(?:^|  )(\S) (?=\w)", legend, re.MULTILINE))
    assert len(set(bar)) >= 7
