"""Several adapters added up on one base: W₀ + Σ wᵢ·Δᵢ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from qlora_tool.adapters.attach_stored import (
    refuse_misfit,
    refuse_misfit_replaced,
    refuse_misfit_rows,
    shapes_of,
)
from qlora_tool.adapters.lacking import lacking
from qlora_tool.adapters.peft_reading import for_model
from qlora_tool.adapters.places import adaptable
from qlora_tool.adapters.stored import StoredAdapter
from qlora_tool.adapters.token_rows import ChangedRows, follows, refuse_rows
from qlora_tool.adapters.trained_base import tie, train_parameter, transposed_names
from qlora_tool.errors import UserError
from qlora_tool.model.parameter_source import tied_names
from qlora_tool.weights.modules import FrozenEmbedding, FrozenLinear

Parts = Sequence[tuple[float, Tensor]]  # weights, and tensors that replace one of the base's


@dataclass(frozen=True)
class Weighted:
    """One adapter of a sum.

    Attributes:
        name: what it is called.
        stored: the adapter.
        weight: w, what its update is multiplied by.
    """

    name: str
    stored: StoredAdapter
    weight: float

    def scaled(self) -> StoredAdapter:
        """The adapter whose updates are w times this one's, what is multiplied in fp32; what it replaces is left as it
        is."""
        stored = self.stored
        if self.weight == 1:
            return stored
        tensors = {}
        for key, tensor in stored.tensors.items():
            owner = stored.owner(key)
            scales = owner is not None and owner[1] in stored.method.scales
            tensors[key] = tensor.float() * self.weight if scales else tensor
        return replace(stored, tensors=tensors)


def refuse_unaddable(stack: Sequence[Weighted]) -> None:
    """Refuse adapters whose updates cannot be added to others', a line each.

    Raises:
        UserError: DoRA's, which scales the whole weight; one whose base was quantized without what it took over.
    """
    faults = []
    for one in stack:
        method = one.stored.method
        if not method.has_delta and not method.keys.trains_base:
            faults.append(
                f"{one.name} ({one.stored.folder}): {method} has no update of a weight that others could be added to; "
                "use it alone"
            )
        elif method.has_delta and not method.additive:
            faults.append(
                f"{one.name} ({one.stored.folder}): {method} scales the whole weight, so its update is not "
                "one that others can be added to; export it merged alone, and train the others on that model"
            )
        elif method.has_delta and one.weight != 1 and not method.scales:
            faults.append(f"{one.name} ({one.stored.folder}): {method} does not say how its update is multiplied; give "
                          "it weight 1")  # fmt: skip
        elif refusal := base_of_its_own(one.name, one.stored):
            faults.append(refusal)
    if faults:
        raise UserError(faults)


def base_of_its_own(name: str, stored: StoredAdapter) -> str | None:
    """Why an adapter shares its base with no other, and not with the plain model; None where it does."""
    if stored.quantized_without is None:
        return None
    return (
        f"{name} ({stored.folder}): its base was quantized without what it took over at its start "
        f"({stored.start.get('init_lora_weights')}), so it is on a base of its own; use it alone, or export it merged"
    )


def replacement(parts: Parts, base: Callable[[], Tensor]) -> Tensor:
    """W₀ + Σ wᵢ·(Rᵢ − W₀), where adapters replace a tensor of the base by Rᵢ; R itself where there is one of weight 1.

    Args:
        base: gives W₀, in the orientation of the parts.
    """
    if len(parts) == 1 and parts[0][0] == 1:
        return parts[0][1]
    total = sum(weight for weight, _ in parts)
    mixed = base().float() * (1 - total)
    for weight, tensor in parts:
        mixed = mixed.add_(tensor.float(), alpha=weight)
    return mixed


def replaced_by(stack: Sequence[Weighted]) -> dict[str, list[tuple[float, Tensor]]]:
    """What the adapters replace, by parameter name."""
    found: dict[str, list[tuple[float, Tensor]]] = {}
    for one in stack:
        for name, tensor in one.stored.replaced_tensors().items():
            found.setdefault(name, []).append((one.weight, tensor))
    return found


@dataclass(frozen=True)
class Rows:
    """What one adapter of a sum puts in the place of single rows of a weight (vocabulary, dim).

    Attributes:
        weight: w.
        tokens: which.
        values: R, (tokens, dim).
        whole: the whole weight, where the adapter replaces that as well.
    """

    weight: float
    tokens: list[int]
    values: Tensor
    whole: Tensor | None

    def change(self, base: Callable[[], Tensor]) -> Tensor:
        """w·(R − W₀), fp32, beside what the adapter does to the whole weight.

        Args:
            base: gives W₀.
        """
        start = (base() if self.whole is None else self.whole)[self.tokens].float()
        return self.weight * (self.values.to(start.device).float() - start)


def rows_by(stack: Sequence[Weighted], follows: Mapping[str, str]) -> dict[str, list[Rows]]:
    """What the adapters put in the place of single rows, by the name of the module; an output projection that is tied
    has what its input embeddings have, unless the adapter has rows of its own for it.

    Args:
        follows: see `token_rows.follows`.
    """
    found: dict[str, list[Rows]] = {}
    for one in stack:
        rows, whole = one.stored.token_rows(), one.stored.replaced_tensors()
        rows |= {other: rows[name] for name, other in follows.items() if name in rows and other not in rows}
        for name, (tokens, values) in rows.items():
            found.setdefault(name, []).append(Rows(one.weight, tokens, values, whole.get(f"{name}.weight")))
    return found


def same_rows(one: Sequence[Rows], other: Sequence[Rows]) -> bool:
    """Whether two weights change in the same rows alike."""
    return len(one) == len(other) and all(
        (first.weight, first.tokens) == (second.weight, second.tokens) and first.values is second.values
        for first, second in zip(one, other, strict=True)
    )


@torch.no_grad()
def attach_stack(model: nn.Module, stack: Sequence[Weighted]) -> None:
    """Let a model compute with the sum of adapters, in fp32.

    Raises:
        UserError: one does not fit this model, or cannot be added to others.
    """
    refuse_unaddable(stack)
    stack = [replace(one, stored=for_model(one.stored, model)) for one in stack]
    replaced = replaced_by(stack)
    transposed = transposed_names(model, replaced)
    names: dict[str, list[str]] = {}
    for number, one in enumerate(stack):
        stored = one.scaled()
        left = lacking(model, stored)
        shapes = shapes_of(model, [*stored.by_module, *left])
        refuse_misfit(stored, stored.by_module, shapes, model)
        refuse_misfit_replaced(model, stored, stored.replaced_tensors())
        refuse_misfit_rows(model, stored, stored.token_rows())
        layers = stored.layers(torch.float32, next(model.parameters()).device, 0.0, shapes, left)
        refuse_rows(model, stored.token_rows(), layers, f"{stored.folder}: trainable_token_indices",
                    "merge this adapter with PEFT instead")  # fmt: skip
        for place, layer in layers.items():
            adaptable(model, place).add_adapter(str(number), layer.train(model.training))
            names.setdefault(place, []).append(str(number))
    for place, changes in rows_by(stack, follows(model)).items():
        module = adaptable(model, place)
        dense = cast(FrozenLinear | FrozenEmbedding, module).weight.dense(torch.float32)
        for number, rows in enumerate(changes):
            name = f"rows {number}"
            module.add_adapter(name, ChangedRows(rows.tokens, rows.change(dense.detach), len(dense)))
            names.setdefault(place, []).append(name)
    for place, active in names.items():
        adaptable(model, place).set_adapters(active)
    _replace(model, replaced, transposed)


def _replace(
    model: nn.Module, replaced: Mapping[str, list[tuple[float, Tensor]]], transposed: frozenset[str]
) -> None:
    trained = {name: train_parameter(model, name, torch.float32) for name in replaced}
    for name, parts in replaced.items():
        own = trained[name]
        base = own.T if name in transposed else own
        mixed = replacement(parts, lambda base=base: base.detach().clone())  # type: ignore[misc]
        own.copy_(mixed.T if name in transposed else mixed)
        own.requires_grad_(False)
    for target, source in tied_names(model).items():  # tied ones stay so, unless they were trained apart
        if target in trained and source in trained and same(replaced[target], replaced[source]):
            tie(model, target, trained[source])


def same(one: Parts, other: Parts) -> bool:
    """Whether two tensors are replaced alike."""
    return len(one) == len(other) and all(
        weight == twin and torch.equal(tensor, copy)
        for (weight, tensor), (twin, copy) in zip(one, other, strict=True)
    )
