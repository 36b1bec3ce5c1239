"""Predicted CUDA memory of ten steps against a card: 2 % allocated, 5 % reserved (3 minutes).

    tools/measure memory-cuda results/
    tools/measure memory-cuda results/ --only tiny smollm2-135m
    tools/measure memory-cuda results/ --expandable-segments

Models have random weights and are made on the device, from a tiny one to a 7B: no files, no data, no network. Every
prediction and every measurement runs in a process of its own. FOLDER gets memory_cuda.json and memory_cuda.txt, written
anew after each configuration, and the allocator's history of some small ones (NAME.pickle), which replays through the
allocator's model.

Without a CUDA device only the predictions are made; nothing is measured, and the exit code is 0.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from making.random_model import SHAPES

from measuring.ours import StepMemory, look_at_cuda
from measuring.processes import in_fresh_process
from measuring.results import machine, say, show_table
from qlora_tool.config import Config, with_values
from qlora_tool.errors import MachineError, ToolError, UserError
from qlora_tool.files.atomic import write_json, write_text

ALLOCATED_WITHIN, RESERVED_WITHIN = 0.02, 0.05
SNAPSHOTS = 4  # configurations, the first ones, whose history is kept
LARGEST_SNAPSHOT = 12_000_000  # bytes of a history that is kept
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

# Name: model, rows, length, settings beside the defaults (nf4, double quantization, r = 16 on all linears, fp32 AdamW),
# lengths of packed examples.
CONFIGURATIONS: dict[str, tuple[dict[str, Any], int, int, dict[str, Any], tuple[int, ...] | None]] = {
    "tiny": (_TINY, 2, 256, {}, None),
    "smollm2-135m": (_SMOLLM2, 4, 512, {}, None),
    "smollm2-135m-kept": (_SMOLLM2, 2, 512, {"training.gradient_checkpointing": False}, None),
    "smollm2-135m-int8": (_SMOLLM2, 4, 512, {"model.quantization": "int8"}, None),
    "smollm2-135m-bf16": (_SMOLLM2, 4, 512, {"model.quantization": "none", "training.optim": "adamw_8bit"}, None),
    "llama-1b": (_LLAMA_1B, 2, 2048, {}, None),
    "qwen2-1.5b-packed": (_QWEN, 1, 2048, {}, (700, 500, 848)),
    "llama-1b-r64": (_LLAMA_1B, 1, 4096, {"adapter.r": 64, "training.optim": "paged_adamw_8bit"}, None),
    "llama-7b": (_LLAMA_7B, 1, 2048, {}, None),
    "llama-7b-batch": (_LLAMA_7B, 4, 1024, {"training.optim": "adamw_8bit"}, None),
}


def step_of(name: str) -> StepMemory:
    """What the prediction and the measurement of a configuration both start from."""
    import torch
    from transformers import AutoConfig

    sizes, rows, length, settings, examples = CONFIGURATIONS[name]
    sizes = dict(sizes)
    model = AutoConfig.for_model(sizes.pop("model_type"), dtype=torch.bfloat16, **sizes)
    config = with_values(Config(), {"training.gradient_checkpointing": True} | settings)
    trained = None if examples is None else rows * (length - len(examples))
    return StepMemory(config, model, rows, length, torch.bfloat16, trained, examples=examples)


def predict_here(name: str, device: dict[str, Any], expandable: bool) -> dict[str, Any]:
    start = time.perf_counter()
    found = step_of(name).predicted_on_cuda(device, expandable)
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "requested_bytes": found.requested_peak,
        "workspace_bytes": found.workspace_bytes,
        "estimated": list(found.estimated),
        **found.breakdown().to_json(),
    }


def measure_here(name: str, snapshot: str | None) -> dict[str, Any]:
    from qlora_tool.memory.allocator.replay import compare_with_snapshot
    from qlora_tool.memory.trace.measure_cuda import save_snapshot

    start = time.perf_counter()
    found = step_of(name).measured_on_cuda()
    result = {"seconds": round(time.perf_counter() - start, 1), **found.breakdown.to_json()}
    with contextlib.suppress(Exception):  # the measurement stands without it
        replayed = compare_with_snapshot(found.snapshot)
        result["allocator_model"] = {"events": replayed.events, "mismatches": replayed.mismatches,
                                     "first_mismatches": replayed.first_mismatches,
                                     "predicted_reserved_peak": replayed.predicted_reserved_peak,
                                     "recorded_reserved_peak": replayed.recorded_reserved_peak}  # fmt: skip
    if snapshot is not None:
        save_snapshot(found.snapshot, Path(snapshot))
        if Path(snapshot).stat().st_size > LARGEST_SNAPSHOT:
            Path(snapshot).unlink()
    return result


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
    predicted, measured = row["predicted"], row.get("measured")
    if not measured or "error" in measured or "error" in predicted:
        return {}
    return {key: predicted[f"{key}_bytes"] / measured[f"{key}_bytes"] - 1 for key in ("peak", "reserved")}


def passed(row: dict[str, Any]) -> bool:
    errors = errors_of(row)
    return bool(errors) and abs(errors["peak"]) <= ALLOCATED_WITHIN and abs(errors["reserved"]) <= RESERVED_WITHIN


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
    parser.add_argument("--expandable-segments", action="store_true", help="with PyTorch's expandable segments")
    parser.add_argument("--capability", default="8.9", metavar="M.N", help="to predict for without a device (8.9)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    if unknown := [name for name in options.only if name not in CONFIGURATIONS]:
        raise UserError(f"--only {' '.join(unknown)}: expected names among {', '.join(CONFIGURATIONS)}")
    import torch

    has_cuda = torch.cuda.is_available()
    device = {"name": None, "capability": [int(part) for part in options.capability.split(".")]}
    if has_cuda:
        device = on_its_own(look_at_cuda, cuda=True)
        if "error" in device:
            raise MachineError(f"the CUDA device cannot be used: {device['error']}")
    expandable = options.expandable_segments
    results: dict[str, Any] = {"machine": machine(), "device": device, "expandable_segments": expandable,
                               "measured": has_cuda, "configurations": {}}  # fmt: skip
    save(options.folder, results)
    print(title(device), flush=True)
    for number, name in enumerate(options.only):
        row = results["configurations"][name] = {
            "predicted": on_its_own(predict_here, cuda=False, name=name, device=device, expandable=expandable)
        }
        save(options.folder, results)
        if has_cuda:
            snapshot = (options.folder / f"{name}.pickle").absolute() if number < SNAPSHOTS else None
            row["measured"] = on_its_own(measure_here, cuda=True, expandable_segments=expandable, name=name,
                                         snapshot=snapshot)  # fmt: skip
            row["errors"], row["passed"] = errors_of(row), passed(row)
            save(options.folder, results)
        for side, figures in row.items():
            if isinstance(figures, dict) and "error" in figures:
                say(f"{name}, {side}: {figures['error']}")
        print(" ".join(table({"configurations": {name: row}})[1]), flush=True)
    rows = results["configurations"].values()
    return results | {"passed": all(row["passed"] if has_cuda else "error" not in row["predicted"] for row in rows)}


def show(results: dict[str, Any]) -> None:
    print()
    show_table(table(results))
    if not results["measured"]:
        print("\nno CUDA device here: these are predictions, nothing was measured")
