"""All adapter methods at equal trained values: loss, answers, forgetting, time, memory (hours).

Every method trains on every task from the same rows. Its learning rate is the one of a grid whose loss on a validation
part (the last rows of the training file, which are not trained on) is lowest: from the middle of the grid it goes on to
the neighbour for as long as that is better, with the first seed. The other seeds are then run at that rate. What is
told comes from the evaluation file, which takes no part in that choice. Forgotten is what the other task's evaluation
loss rises by. Rows have padding and no packing, and nothing is recomputed, so that times and memory compare.

    tools/measure methods demo --task shell=TRAIN.jsonl:EVAL.jsonl --task math=TRAIN.jsonl:EVAL.jsonl --answers shell \\
        --work FOLDER --json methods.json

Each run is a cell of its own in --work: what is stopped goes on where it was, and cells that are there are not made
again. `vera-...` are VeRA on fewer modules and with fewer values, on the base in 16 bits as `full` has it: how many
trained values reach 90 % of what full fine-tuning gains is the intrinsic dimension of the task.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from measuring.command import add_model, add_outputs, at_least, rows_of
from measuring.results import mb, say, show_table
from qlora_tool.config import Config, with_values
from qlora_tool.errors import MachineError
from qlora_tool.files.atomic import write_json, write_text

RATES = (2e-5, 1e-4, 5e-4, 2.5e-3, 1.25e-2)
UNQUANTIZED = {"model.quantization": "none"}
ANSWER_TOKENS = 64
REACHED = 0.9  # of what full fine-tuning gains

# For r, the rank that LoRA has: what each method sets so that it trains as many values, as near as its form allows.
METHODS: dict[str, Callable[[int], dict[str, Any]]] = {
    "lora": lambda r: {},
    "lora, rslora": lambda r: {"adapter.use_rslora": True},
    "lora+": lambda r: {"adapter.loraplus_lr_ratio": 16},
    "lora, symmetric": lambda r: {"adapter.init_lora_weights": "symmetric"},
    "lora, pissa": lambda r: {"adapter.init_lora_weights": "pissa"},
    "lora, loftq": lambda r: {"adapter.init_lora_weights": "loftq"},
    "lora, calibrated": lambda r: {"adapter.init_lora_weights": "calibrated"},
    "dora": lambda r: {"adapter.method": "dora"},
    "loha": lambda r: {"adapter.method": "loha", "adapter.r": max(1, r // 2)},
    "lokr": lambda r: {"adapter.method": "lokr", "adapter.decompose_factor": 4, "adapter.r": 4 * r},
    "additive": lambda r: {"adapter.method": "additive", "adapter.lora_alpha": None},
    "vera": lambda r: _vera(16 * r),
    "llama_adapter": lambda r: {"adapter.method": "llama_adapter", "adapter.adapter_len": 16 * r},
    "full": lambda r: {"adapter.method": "full", **UNQUANTIZED},
    "vera-all": lambda r: _vera(16 * r) | UNQUANTIZED,
    "vera-qv": lambda r: _vera(4 * r) | UNQUANTIZED | {"adapter.target_modules": ["q_proj", "v_proj"]},
    "vera-v": lambda r: _vera(r) | UNQUANTIZED | {"adapter.target_modules": ["v_proj"]},
}


def _vera(r: int) -> dict[str, Any]:
    return {"adapter.method": "vera", "adapter.r": r, "adapter.save_projection": False, "adapter.lora_alpha": None}


def config_of(options: argparse.Namespace, method: str, task: str, rate: float, seed: int, folder: Path) -> Config:
    """The run of a cell. Values that a method does not read are left at their own."""
    files = options.work / "data"
    other = next((name for name in options.task if name != task), None)
    values = {
        "model.name_or_path": options.model, "model.quantization": "nf4", "model.device": "auto",
        "model.keep_quantized": True, "adapter.r": options.r, "adapter.lora_alpha": 2 * options.r,
        "data.train": str(files / f"{task}-train.jsonl"),
        "data.eval": {"validation": str(files / f"{task}-validation.jsonl"), "own": str(files / f"{task}-eval.jsonl")}
        | ({"other": str(files / f"{other}-other.jsonl")} if other else {}),
        "data.max_length": options.max_length, "data.packing": False, "training.output_dir": str(folder),
        "training.max_steps": options.steps, "training.per_device_train_batch_size": options.batch,
        "training.gradient_checkpointing": False, "training.learning_rate": rate, "training.seed": seed,
        "training.eval_steps": options.steps, "training.save_steps": options.steps,
        "training.warmup_steps": max(1, options.steps // 20),
    } | METHODS[method](options.r)  # fmt: skip
    if values.get("adapter.method") in ("full", "llama_adapter"):
        del values["adapter.r"], values["adapter.lora_alpha"]
    return with_values(Config(), {key: value for key, value in values.items() if value is not None})


def write_data(options: argparse.Namespace) -> None:
    """What each task is trained on, validated on and evaluated on, as files."""
    folder = options.work / "data"
    folder.mkdir(parents=True, exist_ok=True)
    for task, (train, evaluation) in options.task.items():
        lines, held_out = rows_of(train), rows_of(evaluation)
        parts = {"train": lines[: -options.validation_rows], "validation": lines[-options.validation_rows :],
                 "eval": held_out[: options.eval_rows], "other": held_out[: options.other_rows]}  # fmt: skip
        for part, rows in parts.items():
            write_text(folder / f"{task}-{part}.jsonl", "\n".join(rows) + "\n")  # at once: others may read it


def cell(options: argparse.Namespace, method: str, task: str, rate: float, seed: int) -> dict[str, Any]:
    """What a run came to; it is made where it is not there already."""
    name = f"{task}-{method.replace(', ', '-')}-{rate:g}-{seed}"
    file, folder = options.work / f"{name}.json", options.work / name
    if not file.exists():
        say(f"{task}, {method}: learning rate {rate:g}, seed {seed}")
        write_json(file, trained(config_of(options, method, task, rate, seed, folder)))
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found | {"method": method, "task": task, "rate": rate, "seed": seed, "folder": str(folder)}


def trained(config: Config) -> dict[str, Any]:
    """Train; the losses before and after, the values trained, seconds a step, predicted peak bytes."""
    from qlora_tool.api import train

    folder = Path(config.training.output_dir)
    try:
        train(config, overwrite=True, resume="never")
    except MachineError as error:  # a rate at which the loss is not a number any more
        if "learning_rate" not in " ".join(error.lines):
            raise
        return {"diverged": True, "losses": dict.fromkeys(("validation", "own", "other"), math.inf)}
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    (checkpoint,) = (folder / "checkpoints").iterdir()
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    values = values_in(checkpoint, config.adapter.method)
    losses = {name: losses_in(found) for name, found in (("losses", records[-1]), ("untuned", state["untuned"]))}
    speeds = [record["tokens_per_second"] for record in records if record["tokens_per_second"]]
    memory = json.loads((folder / "memory.json").read_text(encoding="utf-8"))
    shutil.rmtree(checkpoint)
    return losses | {
        "values": values, "quantization": config.model.quantization,
        "tokens_per_second": sorted(speeds)[len(speeds) // 2], "peak_bytes": memory["predicted"]["peak_bytes"],
    }  # fmt: skip


def losses_in(record: Mapping[str, float]) -> dict[str, float]:
    """The evaluation losses of a record of metrics, by the set's name."""
    return {key[len("eval_") : -len("_loss")]: value for key, value in record.items()
            if key.startswith("eval_") and key.endswith("_loss") and key != "eval_loss"}  # fmt: skip


def values_in(checkpoint: Path, method: str) -> int:
    """How many trained values a checkpoint holds."""
    from safetensors import safe_open

    from qlora_tool.methods import METHODS as ALL

    count = 0
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, "pt") as stream:
            trained = [name for name in stream.keys() if ALL[method].frozen.isdisjoint(name.split("."))]  # noqa: SIM118
            count += sum(math.prod(stream.get_slice(name).get_shape()) for name in trained)
    return count


def best_rate(options: argparse.Namespace, method: str, task: str) -> float:
    """The rate of the grid with the lowest validation loss, from the middle outwards."""

    def loss(place: int) -> float:
        if not 0 <= place < len(RATES):
            return math.inf
        return float(cell(options, method, task, RATES[place], options.seeds[0])["losses"]["validation"])

    place = len(RATES) // 2
    side = 1 if loss(place + 1) < loss(place) else -1
    while loss(place + side) < loss(place):
        place += side
    return RATES[place]


def exact_matches(options: argparse.Namespace, found: dict[str, Any] | None, task: str, quantization: str) -> float:
    """The share of the first evaluation rows that are answered to the letter, by a run or, without one, the base."""
    from qlora_tool.api import evaluate

    name = Path(found["folder"]).name if found else f"{task}-untuned-{quantization}"
    file = options.work / f"{name}-answers.json"
    if not file.exists():
        rows = rows_of(options.work / "data" / f"{task}-eval.jsonl")
        chosen = options.work / "data" / f"{task}-answers.jsonl"
        write_text(chosen, "\n".join(rows[: options.answer_rows]) + "\n")
        source = found["folder"] if found else options.model
        base = {} if found else {"quantization": quantization}
        result = evaluate(source, chosen, generate=True, max_new_tokens=ANSWER_TOKENS, **base)
        write_json(file, result.as_json())
    return float(json.loads(file.read_text(encoding="utf-8"))["exact_match"])


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--task", type=_task, action="append", required=True, metavar="NAME=TRAIN:EVAL",
                        help="rows to train on and rows that are held out; once or twice")  # fmt: skip
    parser.add_argument("--answers", action="append", default=[], metavar="NAME", help="a task whose answers are "
                        "generated and compared to the letter; repeatable")  # fmt: skip
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="where cells are kept")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD",
                        help=f"default: {'; '.join(METHODS)}")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED", help="default: 0 1 2")
    parser.add_argument("--steps", type=at_least(2), default=40, help="of a run (default: 40)")
    parser.add_argument("--batch", type=at_least(1), default=4, help="rows of a step (default: 4)")
    parser.add_argument("--r", type=at_least(2), default=16, help="LoRA's rank (default: 16)")
    parser.add_argument("--max-length", type=at_least(1), default=512, help="tokens of a row (default: 512)")
    parser.add_argument("--validation-rows", type=at_least(1), default=48, help="default: 48")
    parser.add_argument("--eval-rows", type=at_least(1), default=64, help="default: 64")
    parser.add_argument("--other-rows", type=at_least(1), default=24, help="of the other task's (default: 24)")
    parser.add_argument("--answer-rows", type=at_least(1), default=40, help="default: 40")
    add_outputs(parser)


def _task(text: str) -> tuple[str, Path, Path]:
    name, _, files = text.partition("=")
    train, _, evaluation = files.rpartition(":")
    if not (name and train and evaluation):
        raise argparse.ArgumentTypeError(f"{text!r}; expected NAME=TRAIN:EVAL")
    return name, Path(train), Path(evaluation)


def run(options: argparse.Namespace) -> dict[str, Any]:
    options.task = {name: (train, evaluation) for name, train, evaluation in options.task}
    write_data(options)
    cells = list(_cells(options))
    untuned = {task: {} for task in options.task}  # type: dict[str, dict[str, Any]]
    for found in cells:
        row = {"losses": found["untuned"], "exact_match": None}
        if found["task"] in options.answers:
            row["exact_match"] = exact_matches(options, None, found["task"], found["quantization"])
        untuned[found["task"]].setdefault(found["quantization"], row)
    return {"cells": cells, "untuned": untuned, "steps": options.steps, "batch": options.batch, "r": options.r}


def _cells(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Those of the chosen rates, task by task, the first seed of every method before the second of any."""
    for task in options.task:
        rates = {method: best_rate(options, method, task) for method in options.methods}
        for seed in options.seeds:
            for method, rate in rates.items():
                found = cell(options, method, task, rate, seed)
                if task in options.answers:
                    found["exact_match"] = exact_matches(options, found, task, "")
                yield found


def show(results: dict[str, Any]) -> None:
    for task, untuned in results["untuned"].items():
        cells = [found for found in results["cells"] if found["task"] == task]
        print(f"\n{task}: {results['steps']} steps of {results['batch']} rows")
        head = ["method", "values", "rate", "loss", "spread", "gain", "exact", "other task", "tokens/s", "peak MB"]
        rows: list[list[object]] = [head]
        for name, label in (("none", "untuned, 16 bits"), ("nf4", "untuned, nf4")):
            if name in untuned:
                loss, exact = untuned[name]["losses"], untuned[name]["exact_match"]
                other = f"{loss['other']:.3f}" if "other" in loss else "-"
                rows.append([label, "-", "-", f"{loss['own']:.4f}", "-", "-", _percent(exact), other, "-", "-"])
        for method in dict.fromkeys(found["method"] for found in cells):
            rows.append(_row(method, cells, untuned))
        show_table(rows)
        if (reached := intrinsic_dimension(cells, untuned)) is not None:
            print(f"the fewest values that reach {REACHED:.0%} of full's gain on its base: {reached}")


def _row(method: str, cells: list[dict[str, Any]], untuned: dict[str, Any]) -> list[object]:
    own = [found for found in cells if found["method"] == method]
    losses = [found["losses"]["own"] for found in own]
    exact = [found["exact_match"] for found in own if "exact_match" in found]
    others = [found["losses"]["other"] for found in own if "other" in found["losses"]]
    # Against the base as it is, not against what a start leaves of it when its adapter is switched off.
    before = untuned[own[0]["quantization"]]["losses"].get("other", 0.0)
    rise = f"{mean(others):.3f} ({mean(others) - before:+.3f})" if others else "-"
    share = gain(method, cells, untuned)
    return [
        method, own[0]["values"], f"{own[0]['rate']:g}", f"{mean(losses):.4f}",
        f"{max(losses) - min(losses):.4f}" if len(own) > 1 else "-", "-" if share is None else f"{share:.0%}",
        _percent(mean(exact) if exact else None), rise,
        f"{mean(found['tokens_per_second'] for found in own):.0f}", mb(own[0]["peak_bytes"]),
    ]  # fmt: skip


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def gain(method: str, cells: list[dict[str, Any]], untuned: dict[str, Any]) -> float | None:
    """How far a method comes from the untuned 16-bit base to full fine-tuning; None without these two."""
    losses = {name: [found["losses"]["own"] for found in cells if found["method"] == name] for name in ("full", method)}
    if not losses["full"] or "none" not in untuned:
        return None
    base = untuned["none"]["losses"]["own"]
    return (base - mean(losses[method])) / (base - mean(losses["full"]))


def intrinsic_dimension(cells: list[dict[str, Any]], untuned: dict[str, Any]) -> str | None:
    """The smallest VeRA on the 16-bit base that reaches the share; None where full or all of these are missing."""
    sizes = {found["method"]: found["values"] for found in cells if found["method"].startswith("vera-")}
    shares = {method: gain(method, cells, untuned) for method in sizes}
    if not sizes or None in shares.values():
        return None
    enough = [method for method, share in shares.items() if share is not None and share >= REACHED]
    if not enough:
        return f"more than the {max(sizes.values()):,} tried"
    method = min(enough, key=lambda name: sizes[name])
    return f"{sizes[method]:,} ({method})"
