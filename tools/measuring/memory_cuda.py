"""Predicted CUDA memory of steps against a card: 2 % allocated, 5 % reserved (5 minutes).

    tools/measure memory-cuda results/
    tools/measure memory-cuda results/ --only tiny smollm2-135m
    tools/measure memory-cuda results/ --no-predictions      on the card, whose time it saves, and then
    tools/measure memory-cuda results/ --measured            anywhere: predicts, and compares with what was measured

Models have random weights and are made on the device, from a tiny one to a 7B: no files, no data, no network. Every
prediction and every measurement runs in a process of its own. FOLDER gets memory_cuda.json and memory_cuda.txt, written
anew after each configuration, and the allocator's history of each (NAME.pickle), which replays through the allocator's
model.

Without a CUDA device only the predictions are made; nothing is measured, and the exit code is 0.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from making.random_model import SHAPES

from measuring.command import at_least
from measuring.ours import StepMemory, look_at_cuda
from measuring.processes import in_fresh_process
from measuring.results import machine, say, show_table
from qlora_tool.config import Config, with_values
from qlora_tool.errors import MachineError, ToolError, UserError
from qlora_tool.files.atomic import write_json, write_text

ALLOCATED_WITHIN, RESERVED_WITHIN = 0.02, 0.05
MIB = 2**20

_LLAMA_1B = SHAPES["llama-3-8b"] | {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
    "tie_word_embeddings": True, "max_position_embeddings": 4096,
}  # fmt: skip
_QWEN = {
    "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960,
    "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}  # fmt: skip
_TINY = SHAPES["tiny-llama"] | {
    "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
}  # fmt: skip
_SMOLLM2, _LLAMA_7B = SHAPES["smollm2-135m"], SHAPES["llama-2-7b"]


@dataclass(frozen=True)
class Configuration:
    """A step: settings beside the defaults (nf4, double quantization, r = 16 on all linears, fp32 AdamW, everything
    recomputed).

    Attributes:
        model: sizes of its configuration.
        rows, length: of the batch.
        values: settings by dotted key.
        examples: lengths of the examples of a packed row, or None.
        expandable: with PyTorch's expandable segments.
    """

    model: dict[str, Any]
    rows: int
    length: int
    values: dict[str, Any] = field(default_factory=dict)
    examples: tuple[int, ...] | None = None
    expandable: bool = False

    def step(self) -> StepMemory:
        """What the prediction and the measurement both start from."""
        import torch
        from transformers import AutoConfig

        sizes = dict(self.model)
        model = AutoConfig.for_model(sizes.pop("model_type"), dtype=torch.bfloat16, **sizes)
        config = with_values(Config(), {"training.gradient_checkpointing": True} | self.values)
        trained = None if self.examples is None else self.rows * (self.length - len(self.examples))
        return StepMemory(config, model, self.rows, self.length, torch.bfloat16, trained, examples=self.examples)


_EIGHT_BIT = {"training.optim": "adamw_8bit"}
_SMALLEST = {"training.offload_boundaries": True, "training.tiled_mlp": True, "model.embeddings": "int8"}
_MANY = (300, 17, 600, 83, 1000, 48)  # 2048 tokens
CONFIGURATIONS: dict[str, Configuration] = {
    "tiny": Configuration(_TINY, 2, 256),
    "smollm2-135m": Configuration(_SMOLLM2, 4, 512),
    "smollm2-135m-kept": Configuration(_SMOLLM2, 2, 512, {"training.gradient_checkpointing": False}),
    "smollm2-135m-int8": Configuration(_SMOLLM2, 4, 512, {"model.quantization": "int8"}),
    "smollm2-135m-bf16": Configuration(_SMOLLM2, 4, 512, {"model.quantization": "none"} | _EIGHT_BIT),
    "smollm2-135m-packed": Configuration(_SMOLLM2, 2, 2048, _EIGHT_BIT, _MANY),
    "smollm2-135m-expandable": Configuration(_SMOLLM2, 4, 512, expandable=True),
    "llama-7b": Configuration(_LLAMA_7B, 1, 2048, _EIGHT_BIT),
    "llama-7b-4x1024": Configuration(_LLAMA_7B, 4, 1024, _EIGHT_BIT),
    "llama-7b-packed": Configuration(_LLAMA_7B, 1, 2048, _EIGHT_BIT, _MANY),
    "llama-7b-offloaded": Configuration(_LLAMA_7B, 1, 2048, {"training.offload_boundaries": True} | _EIGHT_BIT),
    "llama-7b-smallest": Configuration(_LLAMA_7B, 1, 2048, _SMALLEST | _EIGHT_BIT),
    "llama-7b-deterministic": Configuration(_LLAMA_7B, 1, 2048, {"training.full_determinism": True} | _EIGHT_BIT),
    "llama-7b-deterministic-packed": Configuration(
        _LLAMA_7B, 1, 2048, {"training.full_determinism": True} | _EIGHT_BIT, _MANY
    ),
    "llama-7b-expandable": Configuration(_LLAMA_7B, 1, 2048, _EIGHT_BIT, expandable=True),
    "llama-1b": Configuration(_LLAMA_1B, 2, 2048),
    "qwen2-1.5b-packed": Configuration(_QWEN, 1, 2048, {}, (700, 500, 848)),
    "llama-1b-r64": Configuration(_LLAMA_1B, 1, 4096, {"adapter.r": 64, "training.optim": "paged_adamw_8bit"}),
}


def predict_here(name: str, device: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    one = CONFIGURATIONS[name]
    found = one.step().predicted_on_cuda(device, one.expandable)
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "requested_bytes": found.requested_peak,
        "workspace_bytes": found.workspace_bytes,
        "estimated": list(found.estimated),
        **found.breakdown().to_json(),
    }


def measure_here(name: str, snapshot: str | None) -> dict[str, Any]:
    from qlora_tool.memory.trace.measure_cuda import save_snapshot

    start = time.perf_counter()
    found = CONFIGURATIONS[name].step().measured_on_cuda()
    result = {"seconds": round(time.perf_counter() - start, 1), **found.breakdown.to_json()}
    if snapshot is not None:
        save_snapshot(found.snapshot, Path(snapshot))
    return result


def replay_here(snapshot: str) -> dict[str, Any]:
    """What the model of the allocator says to a card's own history."""
    import pickle

    from qlora_tool.memory.allocator.replay import compare_with_snapshot

    with Path(snapshot).open("rb") as stream:
        replayed = compare_with_snapshot(pickle.load(stream))
    return {"events": replayed.events, "mismatches": replayed.mismatches,
            "first_mismatches": replayed.first_mismatches,
            "predicted_reserved_peak": replayed.predicted_reserved_peak,
            "recorded_reserved_peak": replayed.recorded_reserved_peak}  # fmt: skip


def on_its_own(function: Callable[..., dict[str, Any]], *, cuda: bool, expandable_segments: bool = False,
               **arguments: Any) -> dict[str, Any]:  # fmt: skip
    """What a function finds in a fresh process, as a CUDA context of another would count as the measured one's.

    Returns:
        Its result, or `error` with the reason.
    """
    variables = {} if cuda else {"CUDA_VISIBLE_DEVICES": ""}
    if expandable_segments:
        variables["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    try:
        return in_fresh_process(function, quiet=True, variables=variables, **arguments)
    except ToolError as error:
        return {"error": error.lines[-1]}


def errors_of(row: dict[str, Any]) -> dict[str, float]:
    """The prediction over the measurement, less one, for allocated and reserved; empty where one is missing."""
    predicted, measured = row.get("predicted"), row.get("measured")
    if not measured or not predicted or "error" in measured or "error" in predicted:
        return {}
    return {key: predicted[f"{key}_bytes"] / measured[f"{key}_bytes"] - 1 for key in ("peak", "reserved")}


def passed(row: dict[str, Any]) -> bool:
    """Whether nothing failed, and what can be compared lies within the limits."""
    if any("error" in row.get(side, {}) for side in ("predicted", "measured", "allocator_model")):
        return False
    if row.get("allocator_model", {}).get("mismatches"):
        return False
    errors = errors_of(row)
    return not errors or (abs(errors["peak"]) <= ALLOCATED_WITHIN and abs(errors["reserved"]) <= RESERVED_WITHIN)


def table(results: dict[str, Any]) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [
        ("configuration", "allocated: predicted", "measured", "error", "reserved: predicted", "measured", "error")
    ]
    for name, row in results["configurations"].items():
        errors, cells = errors_of(row), [name]
        for key in ("peak", "reserved"):
            for side in ("predicted", "measured"):
                figures = row.get(side) or {}
                known = figures.get(f"{key}_bytes")
                cells.append(f"{known / MIB:,.1f}" if known is not None else "failed" if "error" in figures else "-")
            cells.append(f"{errors[key]:+.2%}" if errors else "-")
        rows.append(cells)
    return rows


def save(folder: Path, results: dict[str, Any]) -> None:
    write_json(folder / "memory_cuda.json", results)
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        print(title(results["device"]))
        show_table(table(results))
    write_text(folder / "memory_cuda.txt", text.getvalue())


def title(device: dict[str, Any]) -> str:
    capability = ".".join(map(str, device["capability"]))
    if device["name"] is None:
        return f"MiB, for a device of compute capability {capability}. No CUDA device here: nothing was measured."
    return f"MiB on {device['name']} (compute capability {capability})"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the results go")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=list(CONFIGURATIONS), help="some configurations")
    when = parser.add_mutually_exclusive_group()
    when.add_argument("--no-predictions", action="store_true", help="measure only")
    when.add_argument("--measured", action="store_true", help="predict what memory_cuda.json in FOLDER has measured")
    parser.add_argument("--together", type=at_least(1), default=1, metavar="N",
                        help="at a time, where the card and the host have memory for several (1)")  # fmt: skip
    parser.add_argument("--capability", default="8.9", metavar="M.N", help="to predict for without a device (8.9)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    if unknown := [name for name in options.only if name not in CONFIGURATIONS]:
        raise UserError(f"--only {' '.join(unknown)}: expected names among {', '.join(CONFIGURATIONS)}")
    results = _measured_before(options) if options.measured else _new_results(options)
    device, on_card = results["device"], results["measured"] and not options.measured
    print(title(device), flush=True)
    rows = results["configurations"]

    def work_on(name: str) -> None:
        row = rows[name]
        if not options.no_predictions:
            row["predicted"] = on_its_own(predict_here, cuda=False, name=name, device=device)
        snapshot = str((options.folder / f"{name}.pickle").absolute())
        if on_card:
            row["measured"] = on_its_own(measure_here, cuda=True, name=name, snapshot=snapshot,
                                         expandable_segments=CONFIGURATIONS[name].expandable)  # fmt: skip
            if options.together > 1:
                row["measured"].pop("context_bytes", None)  # those of all count together
        if not options.no_predictions and Path(snapshot).exists():
            row["allocator_model"] = on_its_own(replay_here, cuda=False, snapshot=snapshot)
        row["errors"], row["passed"] = errors_of(row), passed(row)

    for name in options.only:
        rows.setdefault(name, {})
    with ThreadPoolExecutor(options.together) as pool:
        for name, _ in zip(options.only, pool.map(work_on, options.only), strict=True):
            save(options.folder, results)
            for side in ("predicted", "measured", "allocator_model"):
                if "error" in rows[name].get(side, {}):
                    say(f"{name}, {side}: {rows[name][side]['error']}")
            print(" ".join(table({"configurations": {name: rows[name]}})[1]), flush=True)
    return results | {"passed": all(rows[name].get("passed") for name in options.only)}


def _measured_before(options: argparse.Namespace) -> dict[str, Any]:
    """What a card left in the folder; of the configurations, those that it tried."""
    file = options.folder / "memory_cuda.json"
    if not file.exists():
        raise UserError(f"--measured: {file} is not there; run memory-cuda on the card first")
    results = json.loads(file.read_text(encoding="utf-8"))
    options.only = [name for name in options.only if name in results["configurations"]]
    return results


def _new_results(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    has_cuda = torch.cuda.is_available()
    device = {"name": None, "capability": [int(part) for part in options.capability.split(".")]}
    if has_cuda:
        device = on_its_own(look_at_cuda, cuda=True)
        if "error" in device:
            raise MachineError(f"the CUDA device cannot be used: {device['error']}")
    elif options.no_predictions:
        raise MachineError("--no-predictions: there is no CUDA device here, and so nothing to do")
    return {"machine": machine(), "device": device, "measured": has_cuda, "configurations": {}}


def show(results: dict[str, Any]) -> None:
    print()
    show_table(table(results))
    if not results["measured"]:
        print("\nno CUDA device here: these are predictions, nothing was measured")
