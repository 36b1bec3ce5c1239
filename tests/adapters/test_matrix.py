"""Every method on every kind of base and family: it trains, resumes, is read, merged and predicted.

Each run of the fast tests has one cell for every method; `tools/test --all` has all cells.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_adapters import IDS, artifact_of, live_logits, plain_logits
from tiny_models import relative_error, write_tiny
from tiny_runs import adapter_bytes, read_metrics, run_config, write_rows
from tokenizers_for_tests import CHATML, byte_level

from qlora_tool.config import Config
from qlora_tool.export.options import ExportOptions
from qlora_tool.export.write import export_merged
from qlora_tool.memory.trace.classify import timeline
from qlora_tool.memory.trace.measure import measure_peak
from qlora_tool.memory.trace.predict import BatchShape, predict
from qlora_tool.methods import METHODS
from qlora_tool.methods.starts import OF_ERRORS
from qlora_tool.model.source import read_model_config
from qlora_tool.training.loop import train

KINDS = ("nf4", "int8", "none")
FAMILIES = (
    "llama", "gpt2", "falcon", "llama-odd", "phi3", "qwen3_moe", "gpt_neox", "bloom", "gemma2", "opt", "mistral",
    "deepseek_v3",
)  # fmt: skip
PLACES: tuple[dict[str, Any], ...] = ({}, {"target_modules": r".*\.0\..*"}, {"exclude_modules": r".*\.1\..*"})
# Of each the rank, and a rate at which a tiny model learns four examples in a few steps.
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"adapter.r": 4},
    "dora": {"adapter.r": 4},
    "loha": {"adapter.r": 3, "training.learning_rate": 2e-2},
    "lokr": {"adapter.r": 2, "adapter.decompose_both": True, "training.learning_rate": 2e-2},
    "vera": {"adapter.r": 48, "training.learning_rate": 5e-2},
    "additive": {"adapter.r": 5},
    "llama_adapter": {"adapter.r": 16, "training.learning_rate": 5e-2},
    "full": {"adapter.r": 16, "training.learning_rate": 3e-3},
}
# How LoRA starts otherwise. With the wide range of a start that is no update of 0, a lower rate.
STARTS: dict[str, dict[str, Any]] = {
    "symmetric": {}, "pissa": {}, "pissa_niter_2": {}, "loftq": {}, "loftq-3": {"adapter.loftq_iter": 3},
    "calibrated": {},
}  # fmt: skip
# The two sides take the same products in fp32 in another order: see tests/export/test_merge.py.
ROUNDING = 1.5e-5


def allowed(method: str, kind: str, family: str) -> bool:
    """Whether there is such a cell: prompts are for PEFT's families, full fine-tuning is of all that is not quantized
    and has no experts yet, and neither has places."""
    if method == "llama_adapter":
        return family in ("llama", "llama-odd", "mistral", "gpt2")
    return method != "full" or (kind == "none" and family not in ("qwen3_moe", "deepseek_v3"))


Cell = tuple[str, str, str, dict[str, Any]]
CELLS: list[Cell] = [
    (method, kind, family, place)
    for row, family in enumerate(FAMILIES)
    for kind, (column, method) in itertools.product(KINDS, enumerate(METHODS))
    for place in [PLACES[(column + row) % len(PLACES)] if METHODS[method].has_delta else {}]
    if allowed(method, kind, family)
]
START_CELLS: list[Cell] = [
    (start, kind, family, PLACES[(place + row) % len(PLACES)])
    for row, family in enumerate(FAMILIES)
    for place, (kind, start) in enumerate(itertools.product(KINDS, STARTS))
    if kind != "none" or start.partition("-")[0] not in OF_ERRORS
]


def name_of(cell: Cell) -> str:
    return "-".join([*cell[:3], *cell[3]])


SAMPLE = [
    min((cell for cell in CELLS if cell[0] == method),
        key=lambda cell: (cell[1] != KINDS[number % 3], (FAMILIES.index(cell[2]) - number) % 12))
    for number, method in enumerate(METHODS)
]
START_SAMPLE = [
    next(cell for cell in START_CELLS if cell[:3] == (start, KINDS[number % 2], FAMILIES[1 + 2 * number]))
    for number, start in enumerate(STARTS)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's tiny model in fp32 with a tokenizer, written once."""
    folder = tmp_path_factory.mktemp("bases")

    def write(family: str) -> Path:
        if not (folder / family).exists():
            tokenizer = byte_level(CHATML)
            sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 256, "n_positions": 256}
            write_tiny(family, folder / family, **sizes)
            tokenizer.save_pretrained(folder / family)
        return folder / family

    return write


def test_every_method_has_a_cell_of_every_kind_and_family():
    assert SETTINGS.keys() == METHODS.keys()
    assert {cell[0] for cell in SAMPLE} == METHODS.keys()
    assert {cell[1] for cell in SAMPLE} == set(KINDS)
    with_places = {name for name, method in METHODS.items() if method.has_delta}
    assert all({cell[0] for cell in CELLS if cell[3] == place} >= with_places for place in PLACES)


@pytest.mark.parametrize("cell", SAMPLE, ids=name_of)
def test_a_sample(base: Callable[[str], Path], tmp_path: Path, cell: Cell):
    assert_complete(cell, base(cell[2]), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell not in SAMPLE], ids=name_of)
def test_all_others(base: Callable[[str], Path], tmp_path: Path, cell: Cell):
    assert_complete(cell, base(cell[2]), tmp_path)


@pytest.mark.parametrize("cell", START_SAMPLE, ids=name_of)
def test_a_sample_of_starts(base: Callable[[str], Path], tmp_path: Path, cell: Cell):
    assert_complete(cell, base(cell[2]), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("cell", [cell for cell in START_CELLS if cell not in START_SAMPLE], ids=name_of)
def test_all_other_starts(base: Callable[[str], Path], tmp_path: Path, cell: Cell):
    assert_complete(cell, base(cell[2]), tmp_path)


def settings_of(name: str) -> tuple[str, dict[str, Any]]:
    """The method of a cell, and its settings."""
    if name in SETTINGS:
        return name, SETTINGS[name]
    return "lora", SETTINGS["lora"] | {"adapter.init_lora_weights": name.partition("-")[0]} | STARTS[name]


def assert_complete(cell: Cell, base: Path, folder: Path) -> None:
    (method, settings), (_, kind, _, place) = settings_of(cell[0]), cell
    config = run_config(base, write_rows(folder / "rows.jsonl", 4), folder / "run", {
        "adapter.method": method, "adapter.lora_dropout": 0.0, "model.quantization": kind,
        "training.max_steps": 4, "training.save_steps": 2, "training.warmup_steps": 0,
        **settings, **{f"adapter.{key}": value for key, value in place.items()},
    })  # fmt: skip
    run = train(config)
    losses = [record["loss"] for record in read_metrics(folder / "run")]
    assert losses[-1] < losses[0]  # the same four examples in every step
    with torch.no_grad():
        live = run.model.module.eval()(input_ids=IDS, use_cache=False).logits
    assert_resumes(config, folder)
    artifact = artifact_of(folder / "run")
    read = live_logits(artifact)
    if artifact.adapter.method is METHODS[method]:
        assert torch.equal(read, live)
    assert relative_error(read, live) < ROUNDING  # what is saved as the LoRA that equals it
    assert_predicted(config, base)
    if method == "llama_adapter":  # changes no weight
        return
    export_merged(artifact, folder / "merged", ExportOptions(dtype="float32", verify=False))
    assert relative_error(plain_logits(folder / "merged"), live) < ROUNDING


def assert_resumes(config: Config, folder: Path) -> None:
    """The second half of a run, from the checkpoint in its middle, ends in the same bytes."""
    before = adapter_bytes(folder / "run")
    shutil.rmtree(folder / "run" / "adapter")
    shutil.rmtree(folder / "run" / "checkpoints" / "step-000004")
    train(config)
    assert adapter_bytes(folder / "run") == before


def assert_predicted(config: Config, base: Path) -> None:
    arguments = config, read_model_config(base), BatchShape.full(2, 32), torch.float32
    predicted = timeline(predict(*arguments)).peak_bytes
    # The gradient of a LayerNorm's weight takes 5 KB inside the operator, of a model of any size.
    unseen = 5200 if config.adapter.method == "full" else 0
    assert predicted * 0.999 <= measure_peak(*arguments) <= predicted * 1.001 + unseen
