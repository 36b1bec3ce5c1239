"""Loss after training here and by PEFT: ours at most 1.02 times theirs (half an hour).

One adapter trained twice, on the same batches. Both sides: the base as NF4 with double quantization, products in fp32,
LoRA on all linear modules, AdamW at a constant rate with weight decay 0.01 and no clipping, rows padded and not packed,
the first rows of the file in order. Each side draws its own adapter for each seed. What counts is the loss on the
evaluation file, the mean over all its trained tokens, its mean over the seeds.

    tools/measure peft demo --train shell_train.jsonl --eval shell_eval.jsonl --json shell.json --plot shell.png

Seconds a step are told as well, but nothing here measures speed: both models share one process.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from measuring.command import add_model, add_outputs, at_least
from measuring.ours import OurSide, padded_batch, read_data
from measuring.results import new_figure, passed_or_missed, say, show_table
from measuring.sides import PeftSide, Side, quiet_transformers
from qlora_tool.config import Config, with_values
from qlora_tool.errors import MachineError

if TYPE_CHECKING:
    from torch import nn

    from qlora_tool.data.batches import Batch
    from qlora_tool.training.run_data import RunData

LIMIT = 1.02  # our mean evaluation loss over PEFT's
WEIGHT_DECAY = 0.01
SIDES = ("ours", "peft")


def evaluate(side: Side, batches: Sequence[Batch]) -> float:
    """The mean over all trained tokens of the evaluation batches, for either side the same."""
    import torch

    with torch.no_grad():
        total = sum(float(side.loss_sum(batch)) for batch in batches)
    return total / sum(batch.trained_tokens for batch in batches)


def make_batches(data: RunData, config: Config, rows: int) -> tuple[list[Batch], list[Batch]]:
    """Training batches in the file's order, of its first rows; evaluation batches, rows of like length together."""
    size = config.training.per_device_train_batch_size

    def cut(examples) -> list[Batch]:
        starts = range(0, len(examples), size)
        return [padded_batch(examples[start : start + size], data.pad_token_id) for start in starts]

    evaluation = sorted(data.evaluations["eval"].examples, key=lambda example: len(example.input_ids))
    return cut(data.train.examples[:rows]), cut(evaluation)


def compare(config: Config, batches: Sequence[Batch], evaluation: Sequence[Batch], every: int) -> dict[str, Any]:
    """Train both sides with one seed, step by step in turn.

    Returns:
        For each side the training loss of every step, the evaluation loss by step and the mean seconds of a step
        after the first.
    """
    peft = PeftSide(config)
    _refuse_dropout(peft.model)
    sides: dict[str, Side] = {"ours": OurSide(config, batches[0]), "peft": peft}
    ours, theirs = (sum(parameter.numel() for parameter in side.trained()) for side in sides.values())
    if ours != theirs:
        raise MachineError(f"{ours} weights are trained here and {theirs} by PEFT: these are not the same adapters")
    steps, seed = config.training.max_steps, config.training.seed
    results = {name: {"losses": [], "seconds": [], "eval_losses": {}} for name in SIDES}
    for step in range(steps + 1):
        if step:
            for name, side in sides.items():
                start = time.perf_counter()
                results[name]["losses"].append(side.step(batches[(step - 1) % len(batches)]))
                results[name]["seconds"].append(time.perf_counter() - start)
        if step in (0, steps) or (every and step % every == 0):
            found = {name: evaluate(side, evaluation) for name, side in sides.items()}
            for name, loss in found.items():
                results[name]["eval_losses"][step] = loss
            told = ", ".join(f"{name} {loss:.4f}" for name, loss in found.items())
            say(f"seed {seed}, step {step}: evaluation loss {told}")
    for result in results.values():
        rest = result["seconds"][1:] or result["seconds"]
        result["seconds"] = sum(rest) / len(rest)
    return {"seed": seed, "trained_weights": ours, **results}


def _refuse_dropout(model: nn.Module) -> None:
    from torch import nn

    active = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.p]
    if active or getattr(model.config, "attention_dropout", 0.0):
        raise MachineError("the model has dropout of its own, and its two evaluations would not be comparable")


def judge(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean final losses and their ratio, against the limit."""
    finals = {name: [list(run[name]["eval_losses"].values())[-1] for run in runs] for name in SIDES}
    means = {name: sum(losses) / len(losses) for name, losses in finals.items()}
    ratio = means["ours"] / means["peft"]
    return {"mean_eval_loss": means, "ratio": ratio, "limit": LIMIT, "passed": ratio <= LIMIT}


def show(results: dict[str, Any]) -> None:
    runs = results["runs"]
    rows = [("", "untuned", "untuned PEFT", "loss", "loss PEFT", "ratio", "s/step", "s/step PEFT")]
    for run in runs:
        curves = [list(run[name]["eval_losses"].values()) for name in SIDES]
        losses = [f"{curve[at]:.4f}" for at in (0, -1) for curve in curves]
        seconds = [f"{run[name]['seconds']:.2f}" for name in SIDES]
        rows.append((f"seed {run['seed']}", *losses, f"{curves[0][-1] / curves[1][-1]:.4f}", *seconds))
    means, ratio = results["mean_eval_loss"], results["ratio"]
    rows.append(("mean", "", "", f"{means['ours']:.4f}", f"{means['peft']:.4f}", f"{ratio:.4f}", "", ""))
    show_table(rows)
    print("\nEvaluation loss by step, mean over the seeds")
    ours, theirs = (_mean_curve(runs, name) for name in SIDES)
    head = ("step", "ours", "PEFT", "ratio")
    cells = ((str(at), f"{loss:.4f}", f"{theirs[at]:.4f}", f"{loss / theirs[at]:.4f}") for at, loss in ours.items())
    show_table([head, *cells])
    print(f"\n{passed_or_missed(results['passed'])}: {ratio:.4f} x PEFT's mean loss; at most {LIMIT} is asked for")


def _mean_curve(runs: Sequence[dict[str, Any]], name: str) -> dict[int, float]:
    return {
        step: sum(run[name]["eval_losses"][step] for run in runs) / len(runs) for step in runs[0][name]["eval_losses"]
    }


def plot(results: dict[str, Any]) -> Any:
    """Evaluation loss by step: the mean of each side, and its seeds in a fainter line."""
    runs = results["runs"]
    figure, axes = new_figure(figsize=(7, 4.5))
    styles = {"ours": ("tab:blue", "-", "qlora-tool"), "peft": ("tab:orange", "--", "transformers + PEFT")}
    for name, (color, line, label) in styles.items():
        for run in runs:
            curve = run[name]["eval_losses"]
            axes.plot(list(curve), list(curve.values()), color=color, linestyle=line, linewidth=0.8, alpha=0.35)
        mean = _mean_curve(runs, name)
        axes.plot(list(mean), list(mean.values()), color=color, linestyle=line, linewidth=2, label=label)
    seeds = "1 seed" if len(runs) == 1 else f"mean of {len(runs)} seeds"
    axes.set(xlabel="optimizer step", ylabel="evaluation loss (mean over tokens)", title=f"NF4 + LoRA, {seeds}")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def make_config(options: argparse.Namespace) -> Config:
    values = {
        "model.name_or_path": options.model,
        "model.quantization": "nf4",
        "model.double_quant": True,
        "model.compute_dtype": "float32",
        "model.device": "cpu",
        "adapter.r": options.r,
        "adapter.lora_alpha": options.alpha,
        "data.train": options.train,
        "data.eval": options.eval,
        "data.max_length": options.max_length,
        "data.packing": False,
        "data.shuffle": False,
        "training.max_steps": options.steps,
        "training.per_device_train_batch_size": options.batch,
        "training.learning_rate": options.lr,
        "training.lr_scheduler_type": "constant",
        "training.warmup_steps": 0,
        "training.weight_decay": WEIGHT_DECAY,
        "training.max_grad_norm": 0.0,
        "training.gradient_checkpointing": False,
    }
    return with_values(Config(), values)


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--train", required=True, metavar="FILE", help="rows to train on")
    parser.add_argument("--eval", required=True, metavar="FILE", help="rows to evaluate on")
    parser.add_argument("--rows", type=at_least(1), default=480, help="rows of the training file (default: 480)")
    parser.add_argument("--steps", type=at_least(1), default=60, help="optimizer steps a seed (default: 60)")
    parser.add_argument("--batch", type=at_least(1), default=8, help="rows a step (default: 8)")
    parser.add_argument("--seeds", type=at_least(1), default=3, help="seeds, from 0 (default: 3)")
    parser.add_argument("--lr", type=float, default=5e-4, help="constant learning rate (default: 5e-4)")
    parser.add_argument("--r", type=int, default=16, help="rank (default: 16)")
    parser.add_argument("--alpha", type=int, default=32, help="lora_alpha (default: 32)")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a row, at most (default: 512)")
    parser.add_argument("--eval-every", type=int, default=10, help="steps between evaluations; 0: first and last alone")
    add_outputs(parser, plot="the evaluation losses")


def run(options: argparse.Namespace) -> dict[str, Any]:
    quiet_transformers()
    config = make_config(options)
    batches, evaluation = make_batches(read_data(config), config, options.rows)
    runs = [
        compare(with_values(config, {"training.seed": seed}), batches, evaluation, options.eval_every)
        for seed in range(options.seeds)
    ]
    return {"config": config.model_dump(), "rows": options.rows, **judge(runs), "runs": runs}
