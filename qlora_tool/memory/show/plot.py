"""The memory of a step over time as a picture: a stacked area by part, the phases, the peak and the device's limit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qlora_tool.files.atomic import replacing_file
from qlora_tool.files.results import MARKS
from qlora_tool.memory.breakdown import PARTS, MemoryReport
from qlora_tool.memory.show.legend import COLOURS, part_names
from qlora_tool.memory.trace.timeline import Timeline
from qlora_tool.sizes import GIB, MIB, memory_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
_POINTS = 2400  # more than there are pixels across
_INK, _MUTED, _FAINT, _RED = "#202124", "#5f6368", "#dadce0", "#c5221f"
_SPANS_MARKED = 24
_FAR = 2.5  # a limit above so many peaks is told, not drawn: it would press the picture flat
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": _INK,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
}


@dataclass(frozen=True)
class _Panel:
    """One timeline, and the lines drawn with it (bytes; None where there is none)."""

    name: str
    timeline: Timeline
    reserved: int | None
    limit: int | None
    limit_label: str

    @property
    def top(self) -> float:
        """Bytes at the upper edge: room for the label of the peak, and for the lines that are not far above it."""
        reserved, limit = (line if self.is_near(line) else 0 for line in (self.reserved, self.limit))
        return max(1.24 * self.timeline.peak_bytes, 1.24 * reserved, 1.1 * limit, 1)

    def is_near(self, line: int | None) -> bool:
        return line is not None and line <= _FAR * self.timeline.peak_bytes


def write_png(
    path: Path,
    timelines: Mapping[str, Timeline],
    report: MemoryReport,
    *,
    budget: int | None = None,
    budget_name: str = "",
    title: str = "",
) -> None:
    """Draw one panel for each timeline, all on one scale, into a PNG file.

    Args:
        path: the file to write.
        timelines: by `predicted` and `measured`, one of them or both.
        report: its breakdowns of the same names say what the allocator reserves, and the CUDA context.
        budget: bytes that the device can give to one process. The line is drawn where tensors reach it: the CUDA
            context is taken off.
        budget_name: what to call it, e.g. the name of the card.
        title: above the picture, e.g. the name of the model.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [_panel(name, timeline, report, budget, budget_name) for name, timeline in timelines.items()]
    top = max(panel.top for panel in panels)
    with rc_context(_STYLE):
        figure = Figure(figsize=(12, 0.9 + 4.6 * len(panels)), dpi=150, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        grid = figure.subplots(len(panels), 2, squeeze=False, width_ratios=(28, 1), sharey=True)
        for (axes, beside), panel in zip(grid, panels, strict=True):
            _set_scale(axes, top)
            _draw_parts(axes, panel.timeline)
            _mark_phases(axes, panel.timeline)
            _mark_lines(axes, panel)
            _mark_peak(axes, panel)
            _draw_peak(beside, panel.timeline, part_names(report.config))
            if len(panels) > 1:
                axes.set_title(panel.name, loc="left", fontsize=10.5, color=_MUTED)
        axes.set_xlabel("allocations and frees, in the order in which they happen")
        figure.suptitle(title or f"Memory of a training step on {report.device}", x=0.012, ha="left", fontsize=13)
        with replacing_file(Path(path)) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": MARKS["profile-memory"]})


def _panel(name: str, timeline: Timeline, report: MemoryReport, budget: int | None, budget_name: str) -> _Panel:
    breakdown = report.breakdowns.get(name)
    reserved = breakdown.reserved_bytes if breakdown else None
    context = (breakdown.context_bytes or 0) if breakdown else 0
    if budget is None:
        return _Panel(name, timeline, reserved, None, "")
    taken_off = f" ({memory_size(budget)} less {memory_size(context)} of CUDA context)" if context else ""
    limit = budget - context
    return _Panel(name, timeline, reserved, limit, f"{budget_name or 'limit'}: {memory_size(limit)}{taken_off}")


def _set_scale(axes: Axes, top: float) -> None:
    """Bytes upwards, with about six ticks at round numbers of GiB, or of MiB where that is little."""
    unit, name = (GIB, "GiB (2³⁰ bytes)") if top >= GIB else (MIB, "MiB (2²⁰ bytes)")
    rough = top / unit / 6
    power = 10 ** np.floor(np.log10(rough))
    step = unit * power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    axes.set_ylim(0, top)
    axes.set_yticks(np.arange(0, top, step))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value / unit:g}")
    axes.set_ylabel(name)
    axes.grid(axis="y", color=_FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def _draw_parts(axes: Axes, timeline: Timeline) -> None:
    """The stacked area; each level holds until the next event."""
    thin = timeline.thin(_POINTS)
    positions = np.append(thin.positions, thin.positions[-1] + 1)
    edges = np.cumsum(thin.part_bytes, axis=1)  # (N, P) bytes: the upper edge of each part
    edges = np.concatenate([edges, edges[-1:]])
    below = np.zeros(len(edges), np.int64)
    for number, part in enumerate(PARTS):
        above = edges[:, number]
        axes.fill_between(positions, below, above, step="post", color=COLOURS[part], linewidth=0)
        below = above
    axes.set_xlim(0, positions[-1])
    for span in timeline.phase_spans():  # a peak of a few events is too thin for the area to show
        edges = np.concatenate([[0], np.cumsum(timeline.part_bytes[span.peak_index])])
        axes.vlines(
            [span.peak_index + 0.5] * len(PARTS),
            edges[:-1],
            edges[1:],
            list(COLOURS.values()),
            linewidth=1.2,
            capstyle="butt",
        )


def _mark_phases(axes: Axes, timeline: Timeline) -> None:
    """A hairline where a phase begins (unless there are very many), and its name below where there is room for it."""
    middles, names = [], []
    spans = timeline.phase_spans()
    for span in spans:
        if span.start and len(spans) <= _SPANS_MARKED:
            axes.axvline(span.start, color=_INK, linewidth=0.6, alpha=0.6)
        if (span.stop - span.start) / len(timeline) > 0.009 * len(span.phase):
            middles.append((span.start + span.stop) / 2)
            names.append(span.phase)
    axes.set_xticks(middles, names)
    axes.tick_params(axis="x", length=0, labelcolor=_INK)


def _mark_lines(axes: Axes, panel: _Panel) -> None:
    """What the allocator reserves, and the limit, as lines that name themselves; past a limit the ground is reddish."""
    right = panel.timeline.peak_index < 0.4 * len(panel.timeline)  # away from the label of the peak
    if panel.is_near(panel.reserved):
        axes.axhline(panel.reserved, color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
        _name_line(axes, panel.reserved, f"reserved by the allocator: {memory_size(panel.reserved)}", _MUTED, right)
    if panel.is_near(panel.limit):
        axes.axhline(panel.limit, color=_RED, linewidth=1.6)
        axes.axhspan(panel.limit, axes.get_ylim()[1], color=_RED, alpha=0.06, linewidth=0)
        _name_line(axes, panel.limit, panel.limit_label, _RED, right)
    elif panel.limit is not None:
        edge, side = (0.994, "right") if right else (0.006, "left")
        text = f"↑ {panel.limit_label}"
        axes.text(edge, 0.985, text, transform=axes.transAxes, ha=side, va="top", color=_RED, path_effects=_halo())


def _name_line(axes: Axes, height: float, text: str, colour: str, right: bool) -> None:
    axes.annotate(
        text,
        (0.994 if right else 0.006, height),
        (0, 3),
        ("axes fraction", "data"),
        "offset points",
        ha="right" if right else "left",
        va="bottom",
        color=colour,
        path_effects=_halo(),
    )


def _halo() -> list:
    """White around letters, so that no line runs through them."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=3, foreground="white")]


def _mark_peak(axes: Axes, panel: _Panel) -> None:
    """A point at the peak, with its size and where it is, above the line of what is reserved if that is close."""
    timeline, peak = panel.timeline, panel.timeline.peak_index
    height, top = timeline.peak_bytes, axes.get_ylim()[1]
    foot = height + 0.03 * top
    for line in (panel.reserved, panel.limit):
        if line is not None and foot - 0.02 * top < line < foot + 0.1 * top:
            foot = line + 0.02 * top
    share = peak / len(timeline)
    side, corner = ("left", 0) if share < 0.3 else ("right", 1) if share > 0.7 else ("center", 0.5)
    axes.plot(peak + 0.5, height, "o", color=_INK, markersize=5, zorder=5, clip_on=False)
    axes.annotate(
        f"peak {memory_size(timeline.peak_bytes)}\n{_place(timeline, peak)}",
        (peak + 0.5, height),
        (peak + 0.5, foot),
        ha=side,
        va="bottom",
        linespacing=1.4,
        path_effects=_halo(),
        arrowprops={"arrowstyle": "-", "color": _INK, "linewidth": 0.7, "relpos": (corner, 0), "shrinkA": 0},
    )


def _place(timeline: Timeline, index: int) -> str:
    """Phase, module and operator, the last only where it is short enough for one line."""
    where = [part for part in (timeline.phase(index), timeline.module(index)) if part]
    operator = timeline.operator(index)
    if operator and len(operator) + sum(map(len, where)) < 64:
        where.append(operator)
    return " · ".join(where)


def _draw_peak(axes: Axes, timeline: Timeline, names: Mapping[str, str]) -> None:
    """What the memory is full of at the peak, as a bar on the same scale, and beside it what the colours mean."""
    from matplotlib.patches import Patch

    at_peak = dict(zip(PARTS, timeline.part_bytes[timeline.peak_index].tolist(), strict=True))
    below = 0
    for part, part_bytes in at_peak.items():
        axes.bar(0, part_bytes, bottom=below, width=1, color=COLOURS[part], linewidth=0)
        below += part_bytes
    axes.set_xlim(-0.5, 0.5)
    axes.set_xticks([0], ["peak"])
    axes.tick_params(length=0, labelcolor=_INK, left=False, labelleft=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    shown = [part for number, part in enumerate(PARTS) if timeline.part_bytes[:, number].any()]
    labels = {part: f"{names[part]}\n{memory_size(at_peak[part])}" for part in reversed(shown)}
    axes.legend(
        handles=[Patch(color=COLOURS[part], label=label) for part, label in labels.items()],
        loc="lower left",
        bbox_to_anchor=(1.2, -0.02),
        frameon=False,
        handlelength=1,
        handleheight=1,
        labelspacing=0.65,
        fontsize=8.5,
    )
