"""Checkpoint names are not module names: transformers renames, fuses and splits tensors on load. Both ways, streamed.

The rules are transformers' own (`conversion_mapping`); here they are cut into groups that can be converted one after
the other, so that neither reading nor writing ever holds more than one group.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class LoadGroup:
    """Checkpoint tensors that together become one module tensor, or several.

    Attributes:
        target: the first module tensor they become.
        sources: (pattern that matched, checkpoint name), in the order in which a fused tensor takes them.
        converter: transformers' rule; None where the tensor is only renamed.
    """

    target: str
    sources: list[tuple[str, str]] = field(default_factory=list)
    converter: WeightConverter | None = None

    def targets(self) -> list[str]:
        """All module tensors that the sources become."""
        if self.converter is None:
            return [self.target]
        first, *others = self.converter.target_patterns
        return [self.target, *(self.target.replace(first, other) for other in others)]

    def convert(self, model: PreTrainedModel, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Read the sources and give the module tensors by name."""
        if self.converter is None:
            return {self.target: read(self.sources[0][1])}
        converter = copy.deepcopy(self.converter)
        for pattern, name in self.sources:
            converter.add_tensor(self.target, name, pattern, read(name))
        converted = converter.convert(self.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


@dataclass(frozen=True)
class LoadPlan:
    """How a checkpoint becomes a model: the groups in their natural order, and what does not fit."""

    groups: list[LoadGroup]
    unexpected: list[str]


def plan_load(model: PreTrainedModel, names: Collection[str]) -> LoadPlan:
    """Match the names of a checkpoint to those of a model's tensors.

    Args:
        model: a skeleton (its tensors on meta). What was matched is noted on it, for `plan_save`.
        names: the checkpoint's.
    """
    wanted = dict(model.state_dict())
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix = model.base_model_prefix
    groups: dict[str, LoadGroup] = {}
    unexpected = []
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = name, None
        if target not in wanted:
            unexpected.append(name)
            continue
        group = groups.setdefault(target, LoadGroup(target, converter=by_pattern.get(pattern)))
        group.sources.append((pattern or name, name))
    model._weight_conversions = [rule for rule in rules if rule.was_used()]
    # Rotary frequencies were buffers of every layer once (Llama 2); they are computed.
    ignored = [r"rotary_emb\.inv_freq$", *(model._keys_to_ignore_on_load_unexpected or ())]
    return LoadPlan(
        list(groups.values()), [name for name in unexpected if not any(re.search(rule, name) for rule in ignored)]
    )


@dataclass(frozen=True)
class SaveGroup:
    """Module tensors that together become checkpoint tensors."""

    names: list[str]

    def convert(self, model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The checkpoint tensors, by name, that the module tensors `names` become."""
        return revert_weight_conversion(model, {name: tensors[name] for name in self.names})


def plan_save(model: PreTrainedModel, names: Collection[str]) -> list[SaveGroup]:
    """Cut module tensors into groups that are converted to checkpoint tensors together.

    Args:
        model: a skeleton on which `plan_load` has noted the rules that its checkpoint used.
        names: the module tensors to write.
    """
    reverse = [rule.reverse_transform() for rule in model._weight_conversions[::-1]]
    converters = [rule for rule in reverse if isinstance(rule, WeightConverter)]
    groups: dict[str, list[str]] = {}
    for name in sorted(names, key=dot_natural_key):
        key = name
        for converter in converters:
            renamed, pattern = converter.rename_source_key(name)
            if pattern is not None:
                key = f"{renamed} by a converter"  # its inputs share the first output's name
                break
        groups.setdefault(key, []).append(name)
    return [SaveGroup(names) for names in groups.values()]
