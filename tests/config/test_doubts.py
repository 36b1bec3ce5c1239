"""What is asked about values that are allowed and seldom meant."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from qlora_tool import preview, profile_memory, train
from qlora_tool.config import Config, load_config, with_values
from qlora_tool.config.doubts import doubts
from qlora_tool.config.recipes import recipe_names, recipes_folder
from qlora_tool.errors import ToolError
from qlora_tool.methods import METHODS


def said(method: str, rate: float) -> list[str]:
    full = {"model.quantization": "none"} if method == "full" else {}
    return list(doubts(with_values(Config(), {"adapter.method": method, "training.learning_rate": rate, **full})))


NOT_MEANT = "if it was not meant, set training.learning_rate to one of those"


@pytest.mark.parametrize(
    ("method", "rate", "line"),
    [
        ("lora", 5e4, "5e4 is far above what is usual with method lora, 1e-5 to 2.5e-3; if 5e-4 was meant, set "
                      "training.learning_rate: 5e-4"),
        ("dora", 2, f"2e0 is far above what is usual with method dora, 1e-5 to 2.5e-3; {NOT_MEANT}"),
        ("full", 2e5, "2e5 is far above what is usual with method full, 1e-6 to 1e-4; if 2e-5 was meant, set "
                      "training.learning_rate: 2e-5"),
        ("vera", 1e-320, f"1e-320 is far below what is usual with method vera, 1e-3 to 5e-2; {NOT_MEANT}"),
        ("lora", 1e30, f"1e30 is far above what is usual with method lora, 1e-5 to 2.5e-3; {NOT_MEANT}"),
    ],
)  # fmt: skip
def test_a_rate_that_is_likely_a_slip_gets_a_line(method: str, rate: float, line: str):
    assert said(method, rate) == [f"training.learning_rate: {line}"]


def test_rates_that_are_tried_get_none():
    """The default, powers of ten about the usual ones, and whatever the recipes have."""
    for method in METHODS:
        for rate in (1e-6, 2e-4, 1e-3, 1e-2):
            assert said(method, rate) == []
    assert said("lora", 0.1) == said("llama_adapter", 1.0) == []
    for name in recipe_names():
        assert list(doubts(load_config(str(recipes_folder() / f"{name}.yaml")))) == []


def test_the_commands_that_read_a_configuration_say_it_and_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """Each once; the fault that ends them here is another one."""
    monkeypatch.setattr(logging.getLogger("qlora_tool"), "propagate", True)
    values = {"model": {"name_or_path": str(tmp_path / "gone")}, "data": {"train": str(tmp_path / "gone.jsonl")},
              "training": {"learning_rate": 5e4, "output_dir": str(tmp_path / "run")}}  # fmt: skip
    for command in (train, preview, profile_memory):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "qlora_tool"), pytest.raises(ToolError):
            command(values)
        assert [record.getMessage() for record in caplog.records] == said("lora", 5e4)
