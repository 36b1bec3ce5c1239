"""The attacks, made by a seed: every kind of file that commands read, each with what no such file should hold."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from attack import Attack
from attacks_on_data import on_caches, on_data, on_templates
from attacks_on_models import on_model_configs, on_tokenizers
from attacks_on_settings import on_configurations, on_yaml
from attacks_on_weights import on_adapter_configs, on_adapter_tensors, on_headers, on_indexes, on_weights

KINDS: tuple[Callable[[random.Random], Iterator[Attack]], ...] = (
    on_configurations, on_yaml, on_model_configs, on_tokenizers, on_templates, on_headers, on_weights, on_indexes,
    on_adapter_configs, on_adapter_tensors, on_data, on_caches,
)  # fmt: skip


def corpus(seed: int = 0) -> list[Attack]:
    """All of them, in the order of their kinds."""
    found = [attack for kind in KINDS for attack in kind(random.Random(seed))]
    names = [attack.name for attack in found]
    assert len(set(names)) == len(names), [name for name in names if names.count(name) > 1][:3]
    return found


def part(attacks: list[Attack], every: int, seed: int = 0) -> list[Attack]:
    """Some of each kind."""
    kinds: dict[str, list[Any]] = {}
    for attack in attacks:
        kinds.setdefault(attack.kind, []).append(attack)
    chosen = random.Random(seed)
    return [attack for kind in kinds.values() for attack in chosen.sample(kind, max(2, len(kind) // every))]
