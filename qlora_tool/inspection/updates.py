"""What an adapter does to each weight: norms, singular values, and what they say of its rank."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor

from qlora_tool.adapters.adapter import Adapter
from qlora_tool.adapters.resized import fitting_config
from qlora_tool.adapters.stored import StoredAdapter
from qlora_tool.artifacts import Artifact, changed_base
from qlora_tool.errors import ToolError, UserError
from qlora_tool.export.merge import MergedModel, adaptable_shapes
from qlora_tool.export.preflight import refuse_no_adapter
from qlora_tool.export.write import find_cached_base
from qlora_tool.files.tensors import Checkpoint
from qlora_tool.inspection.spectrum import Spectrum, spectrum
from qlora_tool.model.load import build_skeleton
from qlora_tool.model.slots import Quantization
from qlora_tool.model.source import read_model_config, resolve

logger = logging.getLogger(__name__)

SHARE = 0.9  # of an update, Frobenius norm squared, that the suggested ranks keep
USED, HALF = 0.8, 0.5  # of r: where 90 % need more, all of it is used; where they need no more, half of it is unused
# Steps before which the spectrum says more of the optimizer than of the task: Adam makes the first steps of all entries
# about equally large, which takes many directions; in a run of the demo the ranks came to rest between 20 and 30 steps.
SETTLED = 30


@dataclass(frozen=True)
class ModuleUpdate:
    """What the adapter does to one weight.

    Attributes:
        name: of the module; of experts that of their weight, and the number of the expert.
        kind: its name without the number of its layer: `self_attn.q_proj`.
        r: the adapter's rank there.
        update_norm: ‖Δ‖, Frobenius; None where it depends on W₀, which is not at hand.
        weight_norm: ‖W₀‖ of the base's weight as trained against; None where the base is not at hand.
        spectrum: the singular values of Δ; of a method that does more than add (DoRA), of s·BA.
    """

    name: str
    kind: str
    out_features: int
    in_features: int
    r: int
    update_norm: float | None
    weight_norm: float | None
    spectrum: Spectrum

    @property
    def ratio(self) -> float | None:
        """‖Δ‖/‖W₀‖."""
        return self.update_norm / self.weight_norm if self.weight_norm and self.update_norm is not None else None

    @property
    def needed(self) -> int:
        """The lowest rank that keeps 90 % of the update (Frobenius, squared)."""
        return self.spectrum.rank_for(SHARE)

    def as_json(self) -> dict[str, Any]:
        own = {key: value for key, value in asdict(self).items() if key not in ("name", "spectrum")}
        return own | {
            "ratio": self.ratio,
            "effective_rank": self.spectrum.effective_rank,
            "rank_90": self.needed,
            "singular_values": list(self.spectrum.values),
        }


@dataclass(frozen=True)
class Row:
    """One row of the table: a kind of module, or one module.

    Attributes:
        name: what it is.
        count: of its modules.
        ranks: the lowest and the highest r.
        ratios: ‖Δ‖/‖W₀‖, least, middle, most; None where the base is not at hand.
        effective: effective ranks, least, middle, most.
        needed: ranks that keep 90 %, least, middle, most.
        share: of the squared norm of the whole update.
        verdict: what that says of r.
    """

    name: str
    count: int
    ranks: tuple[int, int]
    ratios: tuple[float, float, float] | None
    effective: tuple[float, float, float]
    needed: tuple[float, float, float]
    share: float
    verdict: str


@dataclass(frozen=True)
class Inspection:
    """What `inspect` finds.

    Attributes:
        name: the adapter, as it was given.
        method: its name.
        base: the base's name.
        additive: whether the singular values are the whole update's.
        modules: each adapted module, in the model's order.
        no_base: why the base's norms are not known, or None.
        beside: tensors that are trained whole (`modules_to_save`, biases), which have no rank.
        rows: of the table: by kind of module, or each module.
        steps: after which the adapter was kept; None where that is not known, or it was trained before that run too.
    """

    name: str
    method: str
    base: str
    additive: bool
    modules: tuple[ModuleUpdate, ...]
    no_base: str | None
    beside: tuple[str, ...]
    rows: tuple[Row, ...]
    steps: int | None = None

    @property
    def early(self) -> bool:
        """Whether the run was too short for its ranks to say anything of r."""
        return too_early(self.steps)

    def kept(self, r: int) -> float:
        """Share of the squared norm of all updates together that the best rank r of each keeps."""
        total = math.fsum(module.spectrum.norm ** 2 for module in self.modules)
        kept = math.fsum(module.spectrum.kept(r) * module.spectrum.norm ** 2 for module in self.modules)
        return kept / total if total else 1.0

    @property
    def rank(self) -> int:
        """The highest rank that any module has."""
        return max(module.r for module in self.modules)

    @property
    def needed(self) -> int:
        """The lowest rank that, the same everywhere, keeps 90 % of all updates together; 0 where there is none."""
        if not any(module.spectrum.norm for module in self.modules):
            return 0
        highest = max(len(module.spectrum.values) for module in self.modules)
        return next((r for r in range(1, highest + 1) if self.kept(r) >= SHARE), highest)

    def as_json(self) -> dict[str, Any]:
        highest = max(len(module.spectrum.values) for module in self.modules)
        return {
            "schema": 1,
            "adapter": self.name,
            "method": self.method,
            "base": self.base,
            "base_not_at_hand": self.no_base,
            "singular_values_of": "the update" if self.additive else "s·BA, the update's low-rank part",
            "trained_whole": list(self.beside),
            "steps": self.steps,
            "r": self.rank,
            "rank_90": self.needed,
            "kept_by_rank": {str(r): self.kept(r) for r in range(1, highest + 1)},
            "modules": {module.name: module.as_json() for module in self.modules},
        }


def inspect_adapter(artifact: Artifact, every_module: bool = False, *, with_base: bool = True) -> Inspection:
    """Look at what an adapter learned.

    Args:
        artifact: a run or an adapter.
        every_module: a row for each module, not for each kind.
        with_base: read the base's weights for their norms, where they are here; without them the adapter alone is
            read, in a moment.

    Raises:
        UserError: no adapter, an adapter for another base, or one without an update of any weight.
    """
    stored = adapter_of(artifact)
    opened = open_adapter(artifact, with_base)
    with torch.no_grad():
        modules = tuple(_updates(stored, opened))
    steps = _steps_of(artifact)
    return Inspection(
        artifact.name, stored.method.name, artifact.model.name_or_path, stored.method.additive, modules,
        opened.no_base, tuple(sorted(stored.replaced_tensors())), _rows(modules, every_module, too_early(steps)), steps,
    )  # fmt: skip


def too_early(steps: int | None) -> bool:
    """Whether so many steps are too few for a spectrum to say anything of r."""
    return steps is not None and steps < SETTLED


def _steps_of(artifact: Artifact) -> int | None:
    """After how many steps an adapter was kept; None where it has others behind it that are not known."""
    if artifact.run is not None and artifact.run.adapter.init_from:
        return None
    provenance = (artifact.adapter and artifact.adapter.provenance) or {}
    steps = provenance.get("step")
    return steps if type(steps) is int else None


def adapter_of(artifact: Artifact) -> StoredAdapter:
    """Its adapter.

    Raises:
        UserError: it has none, or one without an update of a weight.
    """
    refuse_no_adapter(artifact)
    stored = cast(StoredAdapter, artifact.adapter)
    if not stored.method.has_delta:
        raise UserError(
            f"{artifact.name}: {stored.method.name} has no update beside the weights to look at; inspect an adapter "
            "of another method"
        )
    return stored


@dataclass(frozen=True)
class Opened:
    """An adapter and, where it is on this machine, the base that it was trained on.

    Attributes:
        layers: the adapters by the name of their module, in the model's order.
        shapes: of the adapted weights by the same names: (out, in), (vocabulary, dim), (experts, out, in).
        weights: what gives a base's weight (out, in), fp32, or None.
        no_base: why there are none, or None.
        model_type: transformers' name for the base's family; empty where the base is not here.
    """

    layers: Mapping[str, Adapter]
    shapes: Mapping[str, tuple[int, ...]]
    weights: Callable[[str], Tensor] | None
    no_base: str | None
    model_type: str = ""


def open_adapter(artifact: Artifact, with_base: bool = True) -> Opened:
    """The adapter of a run or a folder; nothing is fetched for it.

    Raises:
        UserError: no adapter, one for another base, or one whose sizes only its base knows, which is not here.
    """
    stored = adapter_of(artifact)
    merged, no_base = _base(artifact) if with_base else (None, "it is not looked at")
    layers = {name: found[0] for name, found in merged.layers.items()} if merged else stored.layers(torch.float32)
    sizes = {name: stored.sizes(name)[0] for name in layers}
    known = adaptable_shapes(merged.skeleton) if merged else sizes
    if not all(min(known[name]) for name in layers):
        raise UserError(
            f"{artifact.name}: the sizes of its {stored.method.name} updates are those of the base's weights, and the "
            f"base is not at hand ({no_base}); say with --model BASE where it is"
        )
    ordered = sorted(layers, key=_in_order)
    return Opened({name: layers[name] for name in ordered}, {name: known[name] for name in ordered},
                  merged.base_weight if merged else None, no_base,
                  cast(Any, merged.skeleton).config.get_text_config().model_type if merged else "")  # fmt: skip


def _base(artifact: Artifact) -> tuple[MergedModel | None, str | None]:
    """The base that was trained on, where it is on this machine; else why not."""
    model = artifact.model
    try:
        folder = resolve(model.name_or_path, model.revision, fetch=False)
        checkpoint = Checkpoint(folder)
        if (changed := changed_base(artifact, folder)) and not artifact.base_named:
            return None, changed
        trust = model.trust_remote_code
        skeleton = build_skeleton(fitting_config(read_model_config(folder, trust), artifact.adapter, trust), trust)
    except ToolError as error:
        return None, error.lines[0]
    quantization = Quantization.of(model)
    cached = find_cached_base(folder, quantization)
    return MergedModel(skeleton, checkpoint, quantization, artifact.adapter, cached=cached), None


def _updates(stored: StoredAdapter, opened: Opened) -> Iterable[ModuleUpdate]:
    if opened.weights is not None:
        logger.info("reading the base's adapted weights, %d of them, for their norms", len(opened.layers))
    for name, layer in opened.layers.items():
        weight, shape = None if opened.weights is None else opened.weights(name), opened.shapes[name]
        several = len(shape) > 2
        for index, factors in enumerate(update_factors(layer, shape)):
            one = f"{name}.{index}" if several else name
            own = weight[index] if weight is not None and several else weight
            found = spectrum(*factors)
            norm: float | None = found.norm
            if not layer.method.additive:  # what it does beside adding s·BA depends on the weight
                norm = None if own is None else _norm(layer.delta(own))
            yield ModuleUpdate(one, kind_of(one), shape[-2], shape[-1], layer.settings.r, norm,
                               None if own is None else _norm(own), found)  # fmt: skip


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))


def update_factors(layer: Adapter, shape: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """B (out, k) and A (k, in), fp64, whose product is the update, of each matrix of a weight of this shape: low-rank
    ones where the method has them, else the update itself and an identity."""
    found = []
    for factors in layer.factors(shape):
        if factors is None:
            # An update that is added does not depend on the weight.
            factors = layer.delta(torch.zeros(shape)).double(), torch.eye(shape[1], dtype=torch.float64)
        found.append(factors)
    return found


def _in_order(name: str) -> list[tuple[int, str]]:
    """Layer 10 comes after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def kind_of(name: str) -> str:
    """A module's name without the number of its layer and what stands before; further numbers are stars."""
    parts = ["*" if part.isdigit() else part for part in name.split(".")]
    return ".".join(parts[parts.index("*") + 1 :] if "*" in parts else parts)


def _rows(modules: Iterable[ModuleUpdate], every_module: bool, early: bool) -> tuple[Row, ...]:
    groups: dict[str, list[ModuleUpdate]] = {}
    for module in modules:
        groups.setdefault(module.name if every_module else module.kind, []).append(module)
    short = _short_names(list(groups)) if not every_module else {}
    total = math.fsum(module.spectrum.norm ** 2 for group in groups.values() for module in group)
    return tuple(_row(short.get(name, name), group, total, early) for name, group in groups.items())


def _short_names(names: list[str]) -> Mapping[str, str]:
    """The last part of each name where it tells it from the others."""
    last = [re.sub(r".*\.", "", name) for name in names]
    return {name: part if last.count(part) == 1 else name for name, part in zip(names, last, strict=True)}


def _row(name: str, group: list[ModuleUpdate], total: float, early: bool) -> Row:
    ratios = [module.ratio for module in group if module.ratio is not None]
    own = math.fsum(module.spectrum.norm ** 2 for module in group)
    return Row(
        name, len(group), (min(module.r for module in group), max(module.r for module in group)),
        _spread(ratios) if ratios else None,
        _spread([module.spectrum.effective_rank for module in group]),
        _spread([module.needed for module in group]),
        own / total if total else 0.0, verdict(group, early),
    )  # fmt: skip


def _spread(values: list[float] | list[int]) -> tuple[float, float, float]:
    return min(values), median(values), max(values)


def verdict(group: Iterable[ModuleUpdate], early: bool = False) -> str:
    """What the updates of a group say of their rank, in a few words; nothing where r is not the rank that they can have
    (LoHa's is r²), or it is too early to tell."""
    group = [module for module in group if module.spectrum.norm]
    if not group:
        return "no update"
    if early or any(len(module.spectrum.values) > module.r for module in group):
        return ""
    small = sum(module.needed > USED * module.r for module in group)
    if small:
        return f"too small? ({small} of {len(group)})" if small < len(group) else "may be too small"
    if all(module.needed <= HALF * module.r for module in group):
        return f"half unused: {max(module.needed for module in group)} would do"
    return "fits"
