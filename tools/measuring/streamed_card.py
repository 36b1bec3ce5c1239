"""Training on a card with the base in host memory, beside all of it there (a 70B: 6 minutes, 80 GB).

Processes take turns, each of which trains the same model on the same batches from the same start: one with the base's
layers on the card, which must have the room, and one for each cap with them in host memory, or on the disk, where the
allocator may hold no more than the cap (`torch.cuda.set_per_process_memory_fraction`). All read the quantized base that
the cache has.

    export QLORA_TOOL_CACHE=/dev/shm/cache
    tools/make kept-base /tmp/llama70b --shape llama-2-70b --compute-dtype bfloat16 --device cuda
    tools/measure streamed-card /tmp/llama70b --json streamed-card.json

A step can be no faster than its products and its copies are: the first bound is the step with all layers on the card,
the second what was copied over the rate of copies alone, both of this run. Asked for: at least 0.8 of the smaller one
of the tokens/s that both allow, at most 10 % slower than with all on the card where that is the bound, and the first
loss and its gradients equal to the bit. They are compared by PyTorch's deterministic kernels: the backward pass of
flash attention adds in the order in which its blocks finish, and gives other bits each time, wherever weights lie
("repeats": two passes in a row agreed). No step that is timed uses them, and none changes a weight (its rate is 0).
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from measuring.benchmark.scenarios import set_by_hand
from measuring.command import add_model, add_outputs, at_least
from measuring.ours import OurSide, batch_of_tokens, random_tokens, require_device, vocabulary_size
from measuring.processes import in_fresh_process
from measuring.results import passed_or_missed, say, show_table
from qlora_tool.config import Config, parse_size, with_values

SHARE_LIMIT, SLOWER_LIMIT = 0.8, 1.1


def train(config: dict[str, Any], rows: int, lengths: list[int], steps: int, cap: int | None) -> dict[str, Any]:
    """Train on the card, in a process that has done nothing else.

    Returns:
        By length the first loss, a digest of the first gradients, the seconds of each step after, the bytes of weights
        that one copied, and the most that was allocated; the seconds of loading, and bytes a second of copies alone.
    """
    import torch

    from qlora_tool.files.cache import cache_folder
    from qlora_tool.ops.bandwidths import card_rate, read_rate
    from qlora_tool.ops.determinism import full_determinism

    asked = Config.model_validate(config)
    if cap is not None:
        torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.get_device_properties(0).total_memory)
    vocabulary = vocabulary_size(asked)
    batches = {length: batch_of_tokens(random_tokens(rows, length, vocabulary, length)) for length in lengths}
    start = time.perf_counter()
    side = OurSide(asked, batches[max(lengths)])
    from_disk = config["model"]["weights"] == "disk"
    rate = read_rate(cache_folder())[0] if from_disk else card_rate(side.device)
    figures: dict[str, Any] = {"load_seconds": time.perf_counter() - start, "copy_rate": rate}
    say(f"{config['model']['weights']}, capped at {cap}: loaded in {figures['load_seconds']:.0f} s")
    figures["lengths"] = {}
    with full_determinism(True):
        side.step(batches[min(lengths)].to(side.device))  # B is zero before it, and so is the gradient of A
    for length, batch in batches.items():
        batch = batch.to(side.device)
        repeats = len({side.step_with_digest(batch, 0.0) for _ in range(2)}) == 1
        with full_determinism(True):
            loss, digest = side.step_with_digest(batch, 0.0)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        seconds, copied = [], side.streamed_bytes()
        for _ in range(steps):
            torch.cuda.synchronize()
            start = time.perf_counter()
            side.step(batch, 0.0)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        figures["lengths"][str(length)] = one = {
            "loss": loss, "gradients": digest, "repeats": repeats, "seconds": seconds,
            "copied_bytes": (side.streamed_bytes() - copied) // steps,
            "allocated_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved(),
        }  # fmt: skip
        taken = ", ".join(f"{second:.2f}" for second in seconds)
        say(f"{rows} x {length}: loss {loss:.4f}, {taken} s, {one['allocated_bytes'] / 1e9:.2f} GB allocated")
    return figures


def judge(resident: dict[str, Any], streamed: dict[str, dict[str, Any]], rows: int) -> dict[str, Any]:
    """Each length under each cap beside the bounds, and whether the limits were met."""
    found = []
    for cap, turn in streamed.items():
        for length, one in turn["lengths"].items():
            other = resident["lengths"][length]
            tokens = rows * int(length)
            computing, taken = statistics.median(other["seconds"]), statistics.median(one["seconds"])
            copying = one["copied_bytes"] / turn["copy_rate"]
            share, slower = max(computing, copying) / taken, taken / computing
            same = (one["loss"], one["gradients"]) == (other["loss"], other["gradients"])
            met = same and share >= SHARE_LIMIT and (copying > computing or slower <= SLOWER_LIMIT)
            found.append({
                "cap": cap, "repeats": other["repeats"] and one["repeats"], "length": int(length), "seconds": taken,
                "tokens_per_second": tokens / taken,
                "computing_seconds": computing, "copying_seconds": copying, "share_of_bound": share, "slower": slower,
                "same_bits": same, "allocated_bytes": one["allocated_bytes"], "reserved_bytes": one["reserved_bytes"],
                "passed": met,
            })  # fmt: skip
    return {"found": found, "passed": all(one["passed"] for one in found)}


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--rows", type=at_least(1), default=2, help="rows of the batch (default: 2)")
    parser.add_argument("--lengths", type=at_least(2), nargs="+", default=[2048, 256], metavar="N",
                        help="tokens of a row, one after the other (default: 2048 256)")  # fmt: skip
    parser.add_argument("--weights", choices=("host", "disk"), default="host", help="where they lie (default: host)")
    parser.add_argument("--steps", type=at_least(1), default=3, help="timed at each length (default: 3)")
    parser.add_argument("--caps", nargs="+", default=["24GB", "16GB"], metavar="SIZE",
                        help="of what the allocator may hold (default: 24GB 16GB)")  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the configuration")
    add_outputs(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    require_device("cuda")
    config = with_values(Config(), {
        "model.name_or_path": options.model, "model.device": "cuda", "model.compute_dtype": "bfloat16",
        "model.keep_quantized": True, "data.max_length": max(options.lengths),
        "training.per_device_train_batch_size": options.rows, "training.gradient_checkpointing": True,
        "training.optim": "adamw_8bit",
    } | set_by_hand(options.set))  # fmt: skip
    turns: dict[str, dict[str, Any]] = {}
    streamed = [(cap, options.weights, parse_size(cap)) for cap in options.caps]
    for name, place, cap in [("resident", "resident", None), *streamed]:
        turns[name] = in_fresh_process(
            train, config=with_values(config, {"model.weights": place}).model_dump(mode="json"), rows=options.rows,
            lengths=options.lengths, steps=options.steps, cap=cap,
        )  # fmt: skip
    found = judge(turns["resident"], {cap: turns[cap] for cap in options.caps}, options.rows)
    return {"rows": options.rows, "weights": options.weights, "turns": turns, **found}


def show(results: dict[str, Any]) -> None:
    rows = [(one["cap"], f"{results['rows']} x {one['length']}", f"{one['tokens_per_second']:.0f}",
             f"{one['seconds']:.2f}", f"{one['computing_seconds']:.2f}", f"{one['copying_seconds']:.2f}",
             f"{one['share_of_bound']:.2f}", f"{one['slower']:.2f}", str(one["same_bits"]), str(one["repeats"]),
             f"{one['allocated_bytes'] / 1e9:.2f}", f"{one['reserved_bytes'] / 1e9:.2f}")
            for one in results["found"]]  # fmt: skip
    show_table([("cap", "rows", "tokens/s", "s a step", "all on the card", "copies", "of the bound", "slower",
                 "same bits", "repeats", "GB allocated", "reserved"), *rows])  # fmt: skip
    print(f"limits: {SHARE_LIMIT} of the bound; {SLOWER_LIMIT} x all on the card where copies take less than that")
    print(passed_or_missed(results["passed"]))
