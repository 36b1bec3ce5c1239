"""Training from the disk beside in memory: 1.15 x the time, 2.5 GB, the same bits (a 7B: 20 minutes).

Processes take turns, each of which trains the same model on the same batch from the same start: with the base's layers
in memory (`model.weights: resident`), and with the layers on the disk. Both read the quantized base that the cache has.
The limits: the time of a step, the process's peak resident set from the disk, and that the loss and every gradient of
the first step are equal to the bit.

    export QLORA_TOOL_CACHE=/tmp/cache
    tools/make kept-base /tmp/llama7b --shape llama-2-7b --compute-dtype bfloat16
    tools/measure streamed /tmp/llama7b --json streamed.json

The first step is compared and not timed. What the process has had read from the disk shows that the page cache had no
part in it. One more step of the last pair is told by part.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from measuring.command import add_model, add_outputs, at_least
from measuring.ours import OurSide, batch_of_tokens, random_tokens, vocabulary_size
from measuring.processes import in_fresh_process, require_proc, resident_bytes
from measuring.results import passed_or_missed, say, show_sizes
from measuring.training_memory import checkpointed, show_steps
from qlora_tool.config import Config, parse_size, with_values

RATIO_LIMIT = 1.15
PLACES = ("resident", "disk")


def train(config: dict[str, Any], rows: int, length: int, steps: int, by_part: bool) -> dict[str, Any]:
    """Train here, in a process that has done nothing else.

    Returns:
        The first loss, a digest of the first gradients, what each step after took (see `measured`), and the peak
        resident set in bytes.
    """
    from measuring.step_parts import measured

    asked = Config.model_validate(config)
    batch = batch_of_tokens(random_tokens(rows, length, vocabulary_size(asked), asked.training.seed))
    side = OurSide(asked, batch)
    batch = batch.to(side.device)
    loss, digest = side.step_with_digest(batch)
    figures: dict[str, Any] = {"loss": loss, "gradients": digest, "steps": []}
    for number in range(steps + by_part):
        before = side.streamed_bytes()
        found = measured(lambda: side.step(batch), by_part=number == steps)
        figures["steps"].append(found | {"streamed_bytes": side.streamed_bytes() - before})
    return figures | {"rss_bytes": resident_bytes("VmHWM")}


def judge(turns: dict[str, list[dict[str, Any]]], limit: int) -> dict[str, Any]:
    """Whether the limits were met."""
    times = {place: [statistics.median(step["seconds"] for step in turn["steps"] if not step["parts"])
                     for turn in turns[place]] for place in PLACES}  # fmt: skip
    ratios = [disk / resident for resident, disk in zip(times["resident"], times["disk"], strict=True)]
    every = [turn for place in PLACES for turn in turns[place]]
    rss = {place: max(turn["rss_bytes"] for turn in turns[place]) for place in PLACES}
    found = {
        "ratios": ratios, "ratio": statistics.median(ratios), "rss_bytes": rss, "limit_bytes": limit,
        "same_loss": len({turn["loss"] for turn in every}) == 1,
        "same_gradients": len({turn["gradients"] for turn in every}) == 1,
    }  # fmt: skip
    passed = found["ratio"] <= RATIO_LIMIT and rss["disk"] <= limit
    return found | {"passed": passed and found["same_loss"] and found["same_gradients"]}


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--rows", type=at_least(1), default=1, help="rows of the batch (default: 1)")
    parser.add_argument("--length", type=at_least(2), default=512, help="tokens of a row (default: 512)")
    parser.add_argument("--pairs", type=at_least(1), default=2, help="of processes (default: 2)")
    parser.add_argument("--steps", type=at_least(1), default=2, help="timed in each process (default: 2)")
    parser.add_argument("--limit", default="2.5GB", metavar="SIZE", help="of the resident set (default: 2.5GB)")
    parser.add_argument("--compute-dtype", default="bfloat16", help="of the products (default: bfloat16)")
    parser.add_argument("--optim", default="adamw_8bit", help="the optimizer (default: adamw_8bit)")
    add_outputs(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    require_proc()
    limit = parse_size(options.limit)
    turns: dict[str, list[dict[str, Any]]] = {place: [] for place in PLACES}
    for pair in range(options.pairs):
        for place in PLACES:
            config = with_values(checkpointed(options), {"model.weights": place, "model.keep_quantized": True})
            found = in_fresh_process(
                train, config=config.model_dump(mode="json"), rows=options.rows, length=options.length,
                steps=options.steps, by_part=pair == options.pairs - 1,
            )  # fmt: skip
            seconds = ", ".join(f"{step['seconds']:.1f}" for step in found["steps"])
            say(f"{place}: loss {found['loss']:.4f}, gradients {found['gradients'][:12]}, steps of {seconds} s")
            turns[place].append(found)
    return {"turns": turns, **judge(turns, limit)}


def show(results: dict[str, Any]) -> None:
    named = [(f"{place} {number}", step) for place in PLACES
             for number, turn in enumerate(results["turns"][place], 1) for step in turn["steps"]]  # fmt: skip
    show_steps([step for _, step in named], [name for name, _ in named])
    show_sizes("peak RSS", {**results["rss_bytes"], "limit, from the disk": results["limit_bytes"]})
    ratios = ", ".join(f"{ratio:.3f}" for ratio in results["ratios"])
    print(f"from the disk over in memory: {results['ratio']:.3f} ({ratios}; limit {RATIO_LIMIT})")
    print(f"first loss equal to the bit: {results['same_loss']}; every first gradient: {results['same_gradients']}")
    print(passed_or_missed(results["passed"]))
