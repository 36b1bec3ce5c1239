"""What LoRA's starts are worth: error of quantized products, first losses (a run: two minutes).

For each start and seed a run of `--steps` steps at a constant rate, whose evaluation loss is taken before, and after
each third of them; and, before the first step, the error of every adapted module's output on evaluation rows, with the
inputs that the 16-bit model gives it: ‖y − y₁₆‖ / ‖y₁₆‖, the mean over the modules.

    tools/measure starts demo --train TRAIN.jsonl --eval EVAL.jsonl --work FOLDER --seeds 0 1 2 --json starts.json

A start is written as `adapter.init_lora_weights` has it; loftq:5 is loftq of five steps. Runs that are there already in
`--work` are not made again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from measuring.command import add_model, add_outputs, at_least
from measuring.results import say, show_table
from qlora_tool.config import Config, with_values
from qlora_tool.files.atomic import write_json

STARTS = ("default", "symmetric", "pissa", "loftq", "loftq:5", "calibrated")
ROWS = 32  # by which products are measured


def config_of(options: argparse.Namespace, start: str, seed: int, folder: Path) -> Config:
    """The run of one start."""
    name, _, steps = start.partition(":")
    return with_values(Config(), {
        "model.name_or_path": options.model, "model.quantization": options.quantization, "model.device": "auto",
        "adapter.r": options.r, "adapter.lora_alpha": 2 * options.r, "adapter.init_lora_weights": name,
        "adapter.loftq_iter": int(steps or 1),
        "data.train": str(options.train), "data.eval": str(options.eval), "data.max_length": 512,
        "data.packing": False, "training.output_dir": str(folder), "training.max_steps": options.steps,
        "training.per_device_train_batch_size": 8, "training.learning_rate": options.learning_rate,
        "training.lr_scheduler_type": "constant", "training.warmup_steps": 0, "training.seed": seed,
        "training.eval_steps": max(1, options.steps // 3), "training.save_steps": options.steps,
    })  # fmt: skip


def measured(config: Config, products: bool) -> dict[str, Any]:
    """The losses of a run by step; and the error of products, if that is asked for."""
    from measuring.ours import error_of_products, train_alone

    found: dict[str, Any] = {"error": error_of_products(config, ROWS) if products else None}
    train_alone(config.model_dump())
    folder = Path(config.training.output_dir)
    state = next((folder / "checkpoints").glob("step-*/state.json"))
    before = json.loads(state.read_text(encoding="utf-8"))["untuned"]["eval_loss"]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return found | {"losses": {0: before} | {r["step"]: r["eval_loss"] for r in records if "eval_loss" in r}}


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--train", type=Path, required=True, metavar="FILE", help="rows to train on")
    parser.add_argument("--eval", type=Path, required=True, metavar="FILE", help="rows that are held out")
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="where runs are kept")
    parser.add_argument("--starts", nargs="+", default=STARTS, metavar="START", help=f"default: {' '.join(STARTS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED", help="default: 0")
    parser.add_argument("--steps", type=at_least(3), default=60, help="of a run (default: 60)")
    parser.add_argument("--r", type=at_least(1), default=16, help="the rank; lora_alpha is twice that (default: 16)")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="default: 5e-4")
    parser.add_argument("--quantization", default="nf4", help="of the base (default: nf4)")
    add_outputs(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    options.work.mkdir(parents=True, exist_ok=True)
    cells: list[dict[str, Any]] = []
    for seed in options.seeds:
        for start in options.starts:
            rate = f"{options.learning_rate:g}"
            name = f"{start.replace(':', '-')}-{options.quantization}-r{options.r}-{rate}-{options.steps}-{seed}"
            file = options.work / f"{name}.json"
            if not file.exists():
                config = config_of(options, start, seed, options.work / name)
                write_json(file, measured(config, products=seed == options.seeds[0]))
            cells.append({"start": start, "seed": seed, **json.loads(file.read_text(encoding="utf-8"))})
            say(f"{start}, seed {seed}: {cells[-1]}")
    return {"cells": cells, "r": options.r, "learning_rate": options.learning_rate}


def show(results: dict[str, Any]) -> None:
    cells = results["cells"]
    steps = list(cells[0]["losses"])
    rows: list[list[object]] = [["start", "error of products", *(f"loss at {step}" for step in steps), "spread"]]
    for start in dict.fromkeys(cell["start"] for cell in cells):
        own = [cell for cell in cells if cell["start"] == start]
        errors = [cell["error"] for cell in own if cell["error"] is not None]
        losses = [[cell["losses"][step] for cell in own] for step in steps]
        means = [f"{sum(values) / len(values):.4f}" for values in losses]
        spread = f"{max(losses[-1]) - min(losses[-1]):.4f}" if len(own) > 1 else "-"
        rows.append([start, f"{errors[0]:.2%}" if errors else "-", *means, spread])
    show_table(rows)
