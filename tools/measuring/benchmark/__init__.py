"""Speed and memory of a step beside transformers + PEFT, in turn (a scenario: 2 to 15 minutes).

Each side (Unsloth's too, where it is installed on CUDA) lives in a process of its own, on the same model, data, seed
and machine, from the same adapter, and they take steps in turn: A B A B. What slows the machine down meanwhile slows
both, so the ratio of each pair is told, its median, least and most. Warm-up rounds are left out; tokens are the useful
ones, without padding.

    tools/measure benchmark checkpointed demo --json checkpointed.json --plot checkpointed.png
    tools/measure benchmark auto demo --max-memory 1.2GB
    tools/measure benchmark packing demo --train shell_commands_train.jsonl
    tools/measure benchmark curves demo --train shell_commands_train.jsonl --plot curves.png

Memory is counted in steps of their own after the timed ones: the tensors there before a step, and the allocator's
count of it on top (CPU), or max_memory_allocated (CUDA); the same count for every side. Asked for is what the scenario
must show.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measuring.benchmark.figures import figures_of, plot, show
from measuring.benchmark.scenarios import SCENARIOS, Comparison, configuration
from measuring.benchmark.worker import Worker
from measuring.command import add_model, add_outputs, at_least
from measuring.results import mb, save_results, say
from qlora_tool.config import Config, with_values
from qlora_tool.errors import MachineError, UserError

__all__ = ["add_options", "plot", "run", "show"]


class Benchmark:
    """A comparison being run; `raw` holds what was found so far."""

    def __init__(self, scenario: str, config: Config, options: argparse.Namespace, comparison: Comparison):
        self.config, self.options, self.comparison = config, options, comparison
        self.workers: dict[str, Worker] = {}
        lanes = {
            name: {**asdict(lane), "seconds": [], "tokens": [], "losses": []} for name, lane in comparison.lanes.items()
        }
        self.raw: dict[str, Any] = {
            "scenario": scenario, "about": SCENARIOS[scenario].about.rpartition(" (")[0],
            "config": config.model_dump(mode="json"), "warmup": options.warmup, "finished": False,
            "sides": dict.fromkeys(comparison.sides), "lanes": lanes, "ratios": comparison.ratios,
            "facts": comparison.facts, "demands": [asdict(demand) for demand in comparison.demands],
        }  # fmt: skip

    def run(self) -> dict[str, Any]:
        """Build the sides, time them in turn, count their memory.

        Returns:
            The results, as `--json` has them.
        """
        with ExitStack() as stack:
            self._start(stack)
            for number in range(self.options.warmup + self.options.steps):
                self._round(number)
                self.save()
            if self.comparison.peak_memory:
                self._count_memory()
        self.raw["finished"] = True
        return self.save()

    def _start(self, stack: ExitStack) -> None:
        import torch

        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        torch.save(self.comparison.batches, folder / "batches.pt")
        start = None
        for name, side in self.comparison.sides.items():
            values = dict(side.values)
            if side.kind == "ours" and start is not None:
                values["adapter.init_from"] = str(start)
            config = with_values(self.config, values)
            say(f"{name}: loading")
            self.raw["sides"][name] = {"kind": side.kind, **side.values}
            try:
                worker = Worker(name, side.kind, config, folder / "batches.pt")
            except MachineError as error:
                for lane in self._lanes_of(name):
                    self._give_up(lane, str(error))
                continue
            self.workers[name] = stack.enter_context(worker)
            self.raw["sides"][name] |= worker.facts
            if side.kind == "peft" and start is None:  # our sides begin where it does
                start = folder / "start"
                worker.ask(do="save", folder=str(start))
            if worker.facts["device"] != "cpu":  # the next side must see what this one needs, not what it has so far
                for lane in self._lanes_of(name):
                    batches = self.comparison.lanes[lane].batches
                    self._ask(lane, do="step", batch=[batches, self._largest(batches)])
        if not self.workers:
            raise MachineError([lane["error"] for lane in self.raw["lanes"].values()])
        trained = {facts["trained_weights"] for facts in self.raw["sides"].values() if "trained_weights" in facts}
        if len(trained) > 1:
            raise UserError(f"{self.options.model}: the sides train {sorted(trained)} weights: not the same adapters")

    def _round(self, number: int) -> None:
        """Every lane takes one step, in turn."""
        told = []
        for name, lane in self.raw["lanes"].items():
            found = self._ask(name, do="step", batch=[lane["batches"], number])
            if found is None:
                continue
            told.append(f"{name} {found['tokens'] / found['seconds']:,.1f}")
            if number >= self.options.warmup:
                lane["seconds"].append(found["seconds"])
                lane["tokens"].append(found["tokens"])
                lane["losses"].append(found["loss"])
        kind = "warm-up" if number < self.options.warmup else "round"
        say(f"{kind} {number + 1}: tokens/s {', '.join(told)}")

    def _count_memory(self) -> None:
        for name, lane in self.raw["lanes"].items():
            batch = [lane["batches"], self._largest(lane["batches"])]
            lane["memory"] = self._ask(name, do="memory", batch=batch)
            if lane["memory"] is None:
                continue
            if self.comparison.sides[lane["side"]].kind == "ours":
                lane["categories"] = (self._ask(name, do="categories", batch=batch) or {}).get("categories")
            say(f"{name}: {mb(lane['memory']['peak_bytes'])} MB at the peak")
            self.save()

    def _largest(self, name: str) -> int:
        batches = self.comparison.batches[name]
        return max(range(len(batches)), key=lambda number: batches[number].input_ids.numel())

    def _lanes_of(self, side: str) -> list[str]:
        return [name for name, lane in self.comparison.lanes.items() if lane.side == side]

    def _ask(self, name: str, **command: Any) -> dict[str, Any] | None:
        """What a lane's side answers; None where it failed, now or before. The others go on without it."""
        lane = self.raw["lanes"][name]
        if "error" in lane:
            return None
        found = self.workers[lane["side"]].try_to(**command)
        if "error" in found:
            self._give_up(name, found["error"])
            return None
        return found

    def _give_up(self, name: str, error: str) -> None:
        self.raw["lanes"][name]["error"] = error
        say(f"{name}: {error}")

    def save(self) -> dict[str, Any]:
        """Write what was found so far: a run that is cut short leaves it behind."""
        figures = figures_of(self.raw)
        lanes = {name: {**lane, **figures["lanes"][name]} for name, lane in self.raw["lanes"].items()}
        found = {**self.raw, **figures, "lanes": lanes}
        save_results(self.options.json, found)
        return found


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "scenarios (times on two cores with SmolLM2-135M, which need 3 GB of memory):\n" + "\n".join(
        f"  {name:14}{scenario.about}" for name, scenario in SCENARIOS.items()
    )
    parser.add_argument("scenario", choices=SCENARIOS, metavar="SCENARIO", help="one of those below")
    add_model(parser)
    parser.add_argument("--train", metavar="FILE", help="take tokens from FILE instead of random ones")
    parser.add_argument("--steps", type=at_least(1), metavar="N", help="rounds that are timed (the scenario's)")
    parser.add_argument("--warmup", type=at_least(0), metavar="N", help="rounds before them (the scenario's)")
    parser.add_argument("--rows", type=at_least(1), metavar="N", help="rows of a batch (default: 4, padded: 8)")
    parser.add_argument("--length", type=at_least(2), metavar="N", help="tokens of a row where all are full (256)")
    parser.add_argument("--max-memory", default="1.2GB", metavar="SIZE", help="for scenario auto (default: 1.2GB)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key, for all sides")
    parser.add_argument("--r", type=at_least(1), default=16, help="rank (default: 16)")
    parser.add_argument("--lr", type=float, default=2e-4, help="constant learning rate (default: 2e-4)")
    parser.add_argument("--seed", type=int, default=0, help="of the adapter's start and of random tokens (default: 0)")
    add_outputs(parser, plot="speed, memory and losses")


def run(options: argparse.Namespace) -> dict[str, Any]:
    scenario = SCENARIOS[options.scenario]
    options.steps = scenario.steps if options.steps is None else options.steps
    options.warmup = scenario.warmup if options.warmup is None else options.warmup
    config = configuration(scenario, options)
    return Benchmark(options.scenario, config, options, scenario.make(config, options)).run()
