"""A method that is plugged in: one that lacks a part of its life is refused when its file is imported."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from qlora_tool.methods import METHODS, lora
from qlora_tool.methods.method import Method

ATTRIBUTES = {"name": "twice", "peft_type": "TWICE", "keys": lora.LoraKeys, "peft_names": {"a": "a.weight"}}
FUNCTIONS = ("shapes", "start", "branch", "delta", "to_peft", "from_peft", "sizes")
PARTS = (*ATTRIBUTES, *FUNCTIONS)


def method_without(*missing: str) -> type[Method]:
    body = ATTRIBUTES | {name: lambda self, *arguments: None for name in FUNCTIONS}
    return type("Twice", (Method,), {name: part for name, part in body.items() if name not in missing})


def test_a_method_that_has_all_parts():
    assert method_without()().name == "twice"


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_missing_is_named(part: str):
    with pytest.raises(TypeError, match=rf"the adapter method Twice of \S+ has no {part};"):
        method_without(part)


def test_all_parts_that_are_missing_are_named():
    with pytest.raises(TypeError, match="has no peft_type, delta, to_peft; each method needs all of its life"):
        method_without("peft_type", "delta", "to_peft")


def test_it_is_refused_where_its_file_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "unfinished_method.py").write_text(
        "from qlora_tool.methods.lora import LoraKeys\n"
        "from qlora_tool.methods.method import Method\n"
        "class Unfinished(Method):\n"
        "    name, peft_type, keys, peft_names = 'unfinished', 'NEW', LoraKeys, {}\n"
        "    def shapes(self, out_features, in_features, r): return {}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TypeError, match="Unfinished of unfinished_method has no branch, delta, from_peft, si"):
        importlib.import_module("unfinished_method")
    assert "unfinished_method" not in sys.modules


def test_what_is_registered_is_named_as_the_configuration_has_it():
    assert {name: method.name for name, method in METHODS.items()} == {name: name for name in METHODS}
