"""The sweep over families: what it finds of those that go different ways, and how it judges."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from measuring.families import Family, causal_families, judge, table, try_family
from measuring.sides import quiet_transformers

EQUAL = {"step 1": 5.0, "after": 4.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows"),
    [("llama", "packed"), ("gemma2", "masks"), ("gpt_oss", "padded"), ("mixtral", "packed"), ("phimoe", "packed"),
     ("jetmoe", "packed"), ("lfm2", "packed"), ("qwen3_next", "packed"), ("mamba2", "packed"), ("bloom", "padded"),
     ("ctrl", "packed"), ("gpt2", "packed"), ("deepseek_v3", "packed")],
)  # fmt: skip
def test_a_family_gives_what_transformers_and_peft_give(name: str, rows: str, tmp_path: Path):
    quiet_transformers()
    family = try_family(name, tmp_path, memory=name in ("jetmoe", "mamba2"))
    assert (family.left_out, family.refused) == ("", "")
    assert family.equal, (family.losses, family.expected)
    assert family.rows == rows


def test_all_families_of_transformers_are_tried():
    assert {"llama", "gpt_oss", "lfm2", "mamba"} <= set(causal_families()) and len(causal_families()) > 100


@pytest.mark.parametrize(
    ("families", "passed"),
    [
        ([Family("a", losses=EQUAL, expected=EQUAL)], True),
        ([Family("a", losses=EQUAL, expected={"step 1": 5.0, "after": 4.001})], False),
        ([Family("a", losses=EQUAL, expected={"step 1": 5.0})], False),
        ([Family("a", refused="why")], False),
        ([Family(str(n), losses=EQUAL, expected=EQUAL) for n in range(9)] + [Family("a", refused="why")], True),
        ([Family("a", left_out="none of text"), Family("b", losses=EQUAL, expected=EQUAL)], True),
    ],
)
def test_verdicts(families: list[Family], passed: bool):
    assert judge(families)["passed"] is passed


def test_the_table_has_a_row_for_each_that_was_tried():
    families = [Family("a", "packed", EQUAL, EQUAL), Family("b", refused="x | y"), Family("c", left_out="images")]
    assert table(families).splitlines()[2:] == ["| a | packed | 0e+00 |  |", "| b |  |  | not trained: x / y |"]
