"""Weights onto the grid of a file, so that what training changed is still there.

A weight that lies on a value of the grid already stays on it unless the update carries it half a step: added to the
dequantized base, most of an update can be rounded away. Two things help. The update may be added to the original 16-bit
weights instead, which lie between the values: then it moves as many of them over as it should on average. And with the
moments of what a layer is given on some rows, the codes go on from there towards the weights that were trained, one
column after the other (`grids.descent`).
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from qlora_tool.export.grids.coded import Coded
from qlora_tool.export.grids.descent import descend, descend_keeping, fit_scales
from qlora_tool.export.merge import MergedModel
from qlora_tool.export.moments import LayerPass, Moments
from qlora_tool.export.rows import CalibrationRows
from qlora_tool.ops.precision import choose_compute_dtype

logger = logging.getLogger(__name__)

SWEEPS = 3  # over a weight's columns
DECIDING = 14  # adapted weights after which one base is taken for all others
MOST_NOISE = 0.2  # as much as 0.45 of the update that are missing
TELL_EVERY = 20.0  # seconds between two lines of progress

Form = TypeVar("Form")
Code = Callable[[Tensor, "Tensor | None"], Coded[Form]]  # a weight and its columns' importance → it on a grid


class Calibration:
    """The moments of a model's weights, asked for in the order of its layers.

    Args:
        merged: the model; see `LayerPass`.
        rows: that go through it.

    Attributes:
        rows: as given.
    """

    def __init__(self, merged: MergedModel, rows: CalibrationRows, trust_remote_code: bool = False):
        self.rows = rows
        self._pass = LayerPass(merged, rows.batches, trust_remote_code)
        self._stream: Iterator[tuple[str, Moments]] = iter(self._pass)
        self._layer, self._moments, self._done = "", Moments(), 0
        self._started = self._told = time.perf_counter()

    def of(self, names: Sequence[str]) -> Tensor | None:
        """The damped moments of what the modules of these weights are given: (in, in) fp32, None where it is not one
        for all of them, or not seen."""
        layer = next((name for name in self._pass.layers if names[0].startswith(f"{name}.")), None)
        if layer is None:
            return None
        while layer != self._layer:
            self._advance()
        return self._moments.shared([name.removesuffix(".weight") for name in names])

    def _advance(self) -> None:
        started = time.perf_counter()
        if self._done and started - self._told > TELL_EVERY:
            layers = len(self._pass.layers)
            left = int((started - self._started) / self._done * (layers - self._done))
            logger.info("calibrated %d of %d layers, %d:%02d left", self._done, layers, left // 60, left % 60)
            self._told = started
        self._moments = Moments()  # let go of before the next ones are made
        self._layer, self._moments = next(self._stream)
        self._moments.damp()
        self._done += 1

    def close(self) -> None:
        self._stream.close()  # type: ignore[attr-defined]  # a generator


@functools.cache  # a process makes its choice once, whatever is measured later
def slopes_dtype() -> torch.dtype:
    """Of the descent's larger products: bf16 where the processor multiplies faster in it."""
    return choose_compute_dtype(torch.device("cpu"))


class Encoder:
    """What each weight of a file is made from: the weights as they were trained, and what to start from.

    Args:
        merged: the model; whatever its base and dtype, `trained` is what was trained, in fp32.
        bases: that Δ may be added to for the codes to start from; of several the one that keeps more is taken, as it
            shows on the first weights.
        calibration: gives the moments of what layers are given; None: codes are the nearest ones.

    Attributes:
        calibrated, plain: how many weights were made with moments, and how many without.
    """

    def __init__(self, merged: MergedModel, bases: Sequence[str], calibration: Calibration | None = None):
        self.merged, self.bases, self.calibration = merged, bases, calibration
        self.calibrated = self.plain = 0
        self._kept, self._weights = {base: Kept() for base in bases}, max(1, len(merged.layers))
        self._tried = dict.fromkeys(bases, 0)  # the first weights, by the base that each of them took
        self._models: dict[str, MergedModel] = {}
        self._slopes = torch.float32 if calibration is None else slopes_dtype()

    @property
    def base(self) -> str:
        """Of those that were tried the one that keeps most."""
        return best(self._kept, self._weights)

    @property
    def trained(self) -> MergedModel:
        """What was trained."""
        return self.model("dequantized")

    @property
    def untuned(self) -> MergedModel:
        """What it was trained against."""
        if "" not in self._models:
            self._models[""] = replace(self.trained, adapter=None, stack=())
        return self._models[""]

    def model(self, base: str) -> MergedModel:
        """The merged model onto a base, in fp32."""
        if base not in self._models:
            exact = {"base": base, "dtype": torch.float32, "keeps_wider": False, "refuse_coarse": False}
            same = all(getattr(self.merged, key) == value for key, value in exact.items())
            self._models[base] = self.merged if same else replace(self.merged, **exact)
        return self._models[base]

    def candidates(self, adapted: bool) -> Sequence[str]:
        """The bases that the next weight is made from."""
        undecided = adapted and self._kept[self.bases[0]].weights < DECIDING
        return self.bases if undecided else [self.base]

    def moments(self, names: Sequence[str]) -> Tensor | None:
        """Of what the modules of these weights are given; see `Calibration.of`."""
        return None if self.calibration is None else self.calibration.of(names)

    def encode(
        self, code: Code[Form], trained: Tensor, starts: dict[str, Tensor], update: Tensor | None,
        moments: Tensor | None,
    ) -> Form:
        """One weight as a file holds it.

        Args:
            code: puts a weight on the file's grid.
            trained: (out, in) fp32.
            starts: by base, of the same shape; each is let go of as soon as it is on the grid.
            update: `trained` less what was trained against; None where nothing was, nor is there a base to choose.
            moments: damped; see `Calibration.of`.
        """
        self.calibrated += moments is not None
        self.plain += moments is None
        made: dict[str, Coded[Form]] = {}
        kept = {base: Kept() for base in starts}
        for base in kept:
            made[base] = code(starts.pop(base), None if moments is None else moments.diagonal())
            self._move(made[base], trained, update, moments, kept[base] if len(kept) > 1 else None)
            self._kept[base].join(kept[base])
        taken = best(kept, self._weights)
        if len(kept) > 1:
            self._tried[taken] += 1
        chosen = made.pop(taken)
        made.clear()
        return chosen.finished()

    def _move(
        self, coded: Coded[Form], trained: Tensor, update: Tensor | None, moments: Tensor | None, kept: Kept | None
    ) -> None:
        """Bring a weight on the grid to where it stays; `kept`, if given, counts what its values keep of the update."""
        if moments is not None:
            fit_scales(trained, moments, coded.grid, coded.values, self._slopes)
        if update is not None and kept is not None:
            # By what is missing before it is made up for, which the other rows of a task miss in part all the same.
            judged = coded
            if moments is not None:
                judged = coded.copy()
                descend(trained, moments, judged.grid, judged.values, SWEEPS, self._slopes)
            kept.add(judged.values, trained.reshape_as(judged.values), update.reshape_as(judged.values), moments)
            del judged
        if moments is not None and update is not None:
            descend_keeping(trained, update, moments, coded.grid, coded.values, SWEEPS, self._slopes)
        elif moments is not None:
            descend(trained, moments, coded.grid, coded.values, SWEEPS, self._slopes)

    def close(self) -> None:
        if self.calibration is not None:
            self.calibration.close()

    def facts(self) -> dict[str, Any]:
        """For `export.json`."""
        rows = self.calibration.rows if self.calibration else None
        return {
            "started_from": self.base, "calibration": rows and {"rows": rows.source, "tokens": rows.tokens},
            "calibrated_weights": self.calibrated, "plain_weights": self.plain,
            "tried_weights": self._tried if len(self.bases) > 1 else None,
        }  # fmt: skip


@dataclass
class Kept:
    """What codes keep of the update of some weights, each counted alike.

    Attributes:
        share: Σ⟨(Q − W₀)·H, Δ⟩ / ⟨Δ·H, Δ⟩, H being the moments, or 1 without them.
        error: Σ‖Q − W‖² / ‖Δ‖², weighted in the same way.
        weights: of them.
    """

    share: float = 0.0
    error: float = 0.0
    weights: int = 0

    def add(self, values: Tensor, trained: Tensor, update: Tensor, moments: Tensor | None) -> None:
        """Count one weight."""
        away = values - trained
        weighted, lost = (update, away) if moments is None else (update @ moments, away @ moments)
        if size := _dot(weighted, update):
            self.share += 1 + _dot(weighted, away) / size
            self.error += _dot(lost, away) / size
            self.weights += 1

    def join(self, other: Kept) -> None:
        """Count what another counted."""
        self.share, self.error = self.share + other.share, self.error + other.error
        self.weights += other.weights

    @property
    def missing(self) -> float:
        """How far the mean share is from 1."""
        return abs(1 - self.share / self.weights) if self.weights else 0.0

    @property
    def noise(self) -> float:
        """The mean error."""
        return self.error / self.weights if self.weights else 0.0


def best(kept: Mapping[str, Kept], weights: int) -> str:
    """Whose codes come nearest to the trained model, judged from some of its weights.

    What is missing everywhere adds up over a model's weights as the update itself does; noise, each weight's own, adds
    up in squares only. The more of it there is the less counts what comes on top, up to `MOST_NOISE`: the original
    weights are a sound model, however small the update is beside what they differ by. That share was set by what was
    measured on SmolLM2 (docs/export.md), where NF4, IQ4_NL and Q4_0 keep more from the original base, and the others
    from the dequantized one.

    Args:
        kept: by base.
        weights: how many adapted ones the model has.
    """
    def lost(base: str) -> float:
        noise = kept[base].noise / (2 * weights)
        return kept[base].missing ** 2 + MOST_NOISE * noise / (MOST_NOISE + noise)

    return min(kept, key=lost)


def _dot(one: Tensor, other: Tensor) -> float:
    return float(torch.linalg.vecdot(one, other).sum(dtype=torch.float64))
