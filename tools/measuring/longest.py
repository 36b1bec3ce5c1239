"""The longest sequence that trains on a card whose memory is capped (a 7B: 2 minutes).

One row, everything recomputed, 8-bit AdamW. The caps are GB (10^9 bytes) of what the allocator may hold
(`torch.cuda.set_per_process_memory_fraction`); the CUDA context comes on top. The JSON is written anew after each step
that was tried. `tools/measure cuda` runs this.

    tools/measure longest MODEL_FOLDER --json caps.json --side peft --caps 8 12
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from typing import Any

from measuring.benchmark.scenarios import set_by_hand
from measuring.command import add_model, add_outputs
from measuring.ours import random_row
from measuring.results import save_results, say
from measuring.sides import SIDES, Side
from qlora_tool.config import Config, with_values
from qlora_tool.errors import MachineError

STEP = 256  # lengths that are tried are multiples of it
CLOSE = 0.03  # of the longest length, between what trained and what did not


def longest(trains: Callable[[int], bool], guess: int, limit: int) -> tuple[int, int | None]:
    """Find the longest length that trains.

    Args:
        trains: tries one; every length below one that trains does too.
        guess: where to begin.
        limit: no longer one is tried.

    Returns:
        The longest that trained (0: none did), and the shortest that did not (None: none failed), no further apart
        than STEP or CLOSE.
    """
    good, bad = 0, None
    tried = max(STEP, min(guess, limit) // STEP * STEP)
    while True:
        if trains(tried):
            good = tried
        else:
            bad = tried
        if good >= limit // STEP * STEP or (bad is not None and bad - good <= max(STEP, CLOSE * bad)):
            return good, bad
        if bad is None:
            tried = min(max(good + STEP, int(good * 1.06) // STEP * STEP), limit // STEP * STEP)
        elif good == 0:
            tried = max(STEP, int(bad * 0.94) // STEP * STEP)
        else:
            tried = (good + bad) // 2 // STEP * STEP


class Trials:
    """Steps of one row on a side, some of which the device has no memory for."""

    def __init__(self, side: Side):
        self.side: Side = side
        self.tried: list[dict[str, Any]] = []

    def peak(self, length: int) -> int:
        """The most that the allocator held during a step, which must succeed."""
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        if not self.trains(length):
            raise MachineError(f"no memory for {length} tokens")
        return torch.cuda.max_memory_reserved()

    def trains(self, length: int) -> bool:
        import torch

        torch.cuda.empty_cache()
        batch = random_row(length, 32000).to(self.side.device)
        start = time.perf_counter()
        try:
            self.side.step(batch)
            torch.cuda.synchronize()
            done = True
        except torch.OutOfMemoryError:
            done = False
        if not done:  # outside of the clause, which holds on to the frames with the tensors in them
            for parameter in self.side.trained():
                parameter.grad = None
            gc.collect()
        self.tried.append({"length": length, "trained": done, "seconds": round(time.perf_counter() - start, 2)})
        say(str(self.tried[-1]))
        return done


def search(side: Side, caps: list[float], limit: int, save: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """The longest sequence under each cap, the smallest first, which is the quickest."""
    import torch

    trials = Trials(side)
    total = torch.cuda.get_device_properties(side.device).total_memory
    trials.peak(STEP)  # the optimizer's state
    short, long = (trials.peak(length) for length in (4 * STEP, 8 * STEP))
    a_token = (long - short) / (4 * STEP)
    found: dict[str, Any] = {"bytes_a_token": a_token, "tried": trials.tried, "caps": {}}
    save(found)
    for cap in sorted(caps):
        size = int(cap * 1e9)
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, size / total), torch.cuda.current_device())
        guess = int((size - short) / a_token) + 4 * STEP
        good, bad = longest(trials.trains, max(STEP, guess), limit)
        found["caps"][f"{cap:g} GB"] = {"longest": good, "too_long": bad}
        save(found)
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--side", choices=SIDES, default="ours")
    parser.add_argument("--caps", type=float, nargs="+", default=[8, 12, 16, 24], metavar="GB")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the configuration")
    add_outputs(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoConfig

    config = with_values(Config(), {
        "model.name_or_path": options.model, "model.device": "cuda", "model.compute_dtype": "bfloat16",
        "training.gradient_checkpointing": True, "training.optim": "adamw_8bit", "training.max_grad_norm": 1.0,
    } | set_by_hand(options.set))  # fmt: skip
    side = SIDES[options.side](config, random_row(STEP, 256))

    def results(found: dict[str, Any]) -> dict[str, Any]:
        return {"side": options.side, "config": config.model_dump(mode="json"), **found}

    limit = AutoConfig.from_pretrained(options.model).max_position_embeddings
    return results(search(side, options.caps, limit, lambda found: save_results(options.json, results(found))))


def show(results: dict[str, Any]) -> None:
    for cap, result in results["caps"].items():
        print(f"{cap}: {result['longest']} tokens train, {result['too_long']} do not")
