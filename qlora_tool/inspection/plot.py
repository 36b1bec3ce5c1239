"""What `inspect` found as a picture: how much of the update each rank keeps, and where in the model rank is needed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_tool.files.atomic import replacing_file
from qlora_tool.files.results import MARKS
from qlora_tool.inspection.updates import SHARE, Inspection, ModuleUpdate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _FAINT = "#202124", "#dadce0"
_STYLE: dict[Any, Any] = {"font.family": "DejaVu Sans", "font.size": 9.5, "text.color": _INK, "axes.edgecolor": _FAINT,
          "axes.spines.top": False, "axes.spines.right": False}  # fmt: skip
_MANY = 40  # layers above which not each one has its number


def write_png(path: Path, found: Inspection) -> None:
    """Draw two panels: the share of |Δ|² that each rank keeps, by kind of module; and by kind and layer the rank that
    keeps 90 %, over the module's r.

    Args:
        path: the file to write.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups: dict[str, list[ModuleUpdate]] = {}
    for module in found.modules:
        groups.setdefault(module.kind, []).append(module)
    with rc_context(_STYLE):
        figure = Figure(figsize=(13, 1.6 + max(3.4, 0.42 * len(groups))), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, width_ratios=(4, 5))
        _draw_kept(left, groups)
        _draw_layers(right, groups)
        figure.suptitle(f"{found.name}: {found.method} on {found.base}", x=0.012, ha="left", fontsize=12)
        with replacing_file(path) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": MARKS["inspect"]})


def _draw_kept(axes: Axes, groups: dict[str, list[ModuleUpdate]]) -> None:
    """The middle module of each kind."""
    for kind, group in groups.items():
        longest = max(len(module.spectrum.values) for module in group)
        ranks = range(longest + 1)
        kept = [float(np.median([module.spectrum.kept(r) for module in group])) for r in ranks]
        axes.plot(ranks, kept, marker="o", markersize=2.5, linewidth=1.4, label=kind)
    axes.axhline(SHARE, color=_FAINT, linewidth=1, zorder=0)
    axes.set(xlabel="rank", ylabel="share of |Δ|² kept, middle of the layers", ylim=(0, 1.02))
    axes.set_xlim(left=0)
    axes.legend(frameon=False, loc="lower right")


def _draw_layers(axes: Axes, groups: dict[str, list[ModuleUpdate]]) -> None:
    """One row a kind, one column a layer; a kind without layers, or with several modules in one, has the highest."""
    layers = sorted({_layer(module) for group in groups.values() for module in group})
    needed = np.full((len(groups), len(layers)), np.nan)
    for row, group in enumerate(groups.values()):
        for module in group:
            column = layers.index(_layer(module))
            needed[row, column] = np.nanmax([needed[row, column], module.needed / module.r])
    image = axes.imshow(needed, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    axes.set_yticks(range(len(groups)), list(groups))
    step = 1 if len(layers) <= _MANY else 10
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]], fontsize=7)
    axes.set_xlabel("layer")
    axes.set_title(f"rank that keeps {SHARE:.0%}, over r", loc="left", fontsize=10)
    axes.figure.colorbar(image, ax=axes, shrink=0.8)


def _layer(module: ModuleUpdate) -> int:
    found = re.search(r"\.(\d+)(\.|$)", module.name)
    return int(found[1]) if found else 0
