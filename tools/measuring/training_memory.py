"""Process memory of two training steps: under 7 GB, predicted within 3 % (a 7B: 5 to 10 minutes).

A model is trained in a process of its own. Asked for: the process's peak resident set, loading included, stays under
the limit, and the predicted peak of a step is within 3 % of the tensors that were counted in one.

    tools/make random-model /tmp/llama7b --shape llama-2-7b
    tools/measure training-memory /tmp/llama7b --json train7b.json

With a 7B this takes 7 GB of memory, and the 13.5 GB of the folder. The resident set is as Linux counts it (VmHWM);
tensors are counted in a third step, after it was read. Of each step the time is told by part, and what the process read
from the disk. With `--weights disk` the layers stay there, and a 70B trains in 8 GB:

    export QLORA_TOOL_CACHE=/tmp/cache
    tools/make kept-base /tmp/llama70b --shape llama-2-70b --compute-dtype bfloat16
    tools/measure training-memory /tmp/llama70b --weights disk --optim adamw_8bit --compute-dtype bfloat16 --limit 8GB
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

from measuring.command import add_model, add_outputs, at_least
from measuring.ours import OurSide, batch_of_tokens, largest_of_a_step, predicted_phases, random_tokens, vocabulary_size
from measuring.processes import in_fresh_process, require_proc, resident_bytes
from measuring.results import passed_or_missed, say, show_sizes, show_table
from measuring.sides import peak_tensor_bytes
from qlora_tool.config import Config, parse_size, with_values

PREDICTED_WITHIN = 0.03


def train_and_measure(config: dict[str, Any], rows: int, length: int, steps: int) -> dict[str, Any]:
    """Train here, in a process that has done nothing else.

    Returns:
        What each step took (see `measured`), and bytes: resident at the peak after loading and after the steps, and of
        tensors in a step.
    """
    from measuring.step_parts import measured

    asked = Config.model_validate(config)
    batch = batch_of_tokens(random_tokens(rows, length, vocabulary_size(asked), asked.training.seed))
    start = time.perf_counter()
    side = OurSide(asked, batch)
    figures: dict[str, Any] = {"load_seconds": time.perf_counter() - start, "load_rss_bytes": resident_bytes("VmHWM")}
    batch = batch.to(side.device)
    figures["steps"] = []
    for _ in range(steps):
        before = side.streamed_bytes()
        found = measured(lambda: side.step(batch), by_part=True)
        figures["steps"].append(found | {"streamed_bytes": side.streamed_bytes() - before})
        say(f"loss {found['loss']:.4f}, {found['seconds']:.1f} s, {found['disk_bytes'] / 1e9:.2f} GB read")
    figures["rss_bytes"] = resident_bytes("VmHWM")
    figures["tracked_bytes"] = peak_tensor_bytes(lambda: side.step(batch), side.device)["peak_bytes"]
    figures["trained_weights"] = sum(parameter.numel() for parameter in side.trained())
    figures["config"] = side.config.model_dump(mode="json")
    return figures


def judge(figures: dict[str, Any], limit: int) -> dict[str, Any]:
    """Whether both limits were met."""
    predicted = largest_of_a_step(figures["predicted_phase_bytes"])
    error = predicted / figures["tracked_bytes"] - 1
    fits = figures["rss_bytes"] <= limit
    return {"predicted_bytes": predicted, "error": error, "limit_bytes": limit, "fits": fits,
            "passed": fits and abs(error) <= PREDICTED_WITHIN}  # fmt: skip


def show(results: dict[str, Any]) -> None:
    show_sizes(results["config"]["model"]["name_or_path"], {
        "peak RSS after loading": results["load_rss_bytes"], "peak RSS after the steps": results["rss_bytes"],
        "limit": results["limit_bytes"], "tensors at the peak of a step, counted": results["tracked_bytes"],
        "the same, predicted": results["predicted_bytes"],
    })  # fmt: skip
    print(f"loaded in {results['load_seconds']:.1f} s; products in {results['config']['model']['compute_dtype']}")
    show_steps(results["steps"])
    print(f"prediction off by {results['error']:+.3%} (limit {PREDICTED_WITHIN:.0%})")
    print(passed_or_missed(results["passed"]))


def show_steps(steps: Sequence[dict[str, Any]], names: Sequence[str] = ()) -> None:
    """A table of what steps took, a column each."""
    names = names or [f"step {number}" for number in range(1, len(steps) + 1)]
    rows = {
        "loss": [f"{step['loss']:.4f}" for step in steps],
        "seconds": [f"{step['seconds']:.1f}" for step in steps],
        "the same, of the processor": [f"{step['processor_seconds']:.1f}" for step in steps],
        "GB read from the disk": [f"{step['disk_bytes'] / 1e9:.2f}" for step in steps],
        "GB of weights streamed": [f"{step['streamed_bytes'] / 1e9:.2f}" for step in steps],
    }
    parts = dict.fromkeys(part for step in steps for part in step["parts"])
    rows |= {f"s {part}": [f"{step['parts'].get(part, 0):.1f}" for step in steps] for part in parts}
    show_table([("", *names), *((label, *cells) for label, cells in rows.items())])


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--rows", type=at_least(1), default=1, help="rows of the batch (default: 1)")
    parser.add_argument("--length", type=at_least(2), default=128, help="tokens of a row (default: 128)")
    parser.add_argument("--steps", type=at_least(1), default=2, help="before the resident set is read (default: 2)")
    parser.add_argument("--limit", default="7GB", metavar="SIZE", help="of the resident set (default: 7GB)")
    parser.add_argument("--compute-dtype", default="float32", help="of the products (default: float32)")
    parser.add_argument("--optim", default="adamw", help="the optimizer (default: adamw)")
    parser.add_argument("--weights", choices=("resident", "disk"), default="resident",
                        help="where the base's layers lie (default: resident)")  # fmt: skip
    add_outputs(parser)


def checkpointed(options: argparse.Namespace) -> Config:
    """A run on the CPU that recomputes everything."""
    return with_values(Config(), {
        "model.name_or_path": options.model, "model.device": "cpu", "model.compute_dtype": options.compute_dtype,
        "data.max_length": options.length, "training.per_device_train_batch_size": options.rows,
        "training.gradient_checkpointing": True, "training.optim": options.optim,
    })  # fmt: skip


def run(options: argparse.Namespace) -> dict[str, Any]:
    require_proc()
    limit = parse_size(options.limit)
    config = with_values(checkpointed(options), {"model.weights": options.weights})
    figures = in_fresh_process(train_and_measure, config=config.model_dump(mode="json"), rows=options.rows,
                               length=options.length, steps=options.steps)  # fmt: skip
    resolved = Config.model_validate(figures["config"])
    figures["predicted_phase_bytes"] = predicted_phases(resolved, options.rows, options.length)
    return figures | judge(figures, limit)
