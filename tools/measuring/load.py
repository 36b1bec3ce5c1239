"""Process memory while a model loads: finished + 2 x largest tensor + 600 MB (a 7B: a minute).

The model is loaded in a process of its own, and the most memory that it ever used is held against what it must keep:
the finished model (quantized weights, scales, and what stays unquantized), twice the largest tensor of the checkpoint,
and 600 MB for the interpreter, the libraries and the allocator.

    tools/make random-model /tmp/llama7b --shape llama-2-7b
    tools/measure load /tmp/llama7b --json load.json --plot load.png

Memory is the process's resident set as Linux counts it (VmHWM in /proc/PID/status is the most so far).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from measuring.command import add_model, add_outputs
from measuring.processes import in_fresh_process, require_proc, resident_bytes
from measuring.results import mb, new_figure, show_sizes
from qlora_tool.config import ModelConfig

ALLOWANCE = 600_000_000  # bytes, beside the finished model and twice the largest tensor
KINDS = ("nf4", "fp4", "int8", "none")


def load_and_measure(**config: Any) -> dict[str, Any]:
    """Load the model here, in a process that has done nothing else.

    Args:
        config: the keys of its `model` section.

    Returns:
        Seconds and bytes; `largest_tensor_bytes` is as stored in the checkpoint.
    """
    import accelerate  # noqa: F401 -- what loading would import counts as before it
    import torch
    from transformers import AutoModelForCausalLM  # noqa: F401

    from qlora_tool.build.open import open_model
    from qlora_tool.files.tensors import Checkpoint
    from qlora_tool.model.source import resolve

    settings = ModelConfig(**config)
    entries = Checkpoint(resolve(settings.name_or_path)).values()
    before = resident_bytes("VmRSS")
    start = time.perf_counter()
    model = open_model(settings)
    seconds = time.perf_counter() - start
    return {
        "seconds": round(seconds, 1),
        "compute_dtype": str(model.compute_dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "checkpoint_bytes": sum(entry.nbytes for entry in entries),
        "largest_tensor_bytes": max(entry.nbytes for entry in entries),
        "quantized_bytes": model.quantized_bytes(),
        "unquantized_bytes": sum(model.unquantized_bytes().values()),
        "rss_before_bytes": before,
        "rss_after_bytes": resident_bytes("VmRSS"),
        "rss_peak_bytes": resident_bytes("VmHWM"),
    }


def judge(figures: dict[str, Any]) -> dict[str, Any]:
    """The finished model, the limit, and whether the peak stayed within it."""
    finished = figures["quantized_bytes"] + figures["unquantized_bytes"]
    limit = finished + 2 * figures["largest_tensor_bytes"] + ALLOWANCE
    return {"finished_bytes": finished, "limit_bytes": limit, "passed": figures["rss_peak_bytes"] <= limit}


def show(results: dict[str, Any]) -> None:
    model = results["model"]
    kind = model["quantization"]
    if kind in ("nf4", "fp4") and model["double_quant"]:
        kind += ", double quantization"
    show_sizes(f"{model['name_or_path']} ({kind})", {
        "checkpoint": results["checkpoint_bytes"],
        "largest tensor of it": results["largest_tensor_bytes"],
        "quantized weights and scales": results["quantized_bytes"],
        "unquantized": results["unquantized_bytes"],
        "finished model": results["finished_bytes"],
        "RSS before loading (interpreter, imports)": results["rss_before_bytes"],
        "RSS after loading": results["rss_after_bytes"],
        "peak RSS": results["rss_peak_bytes"],
        "limit: finished + 2 x largest + 600 MB": results["limit_bytes"],
    })  # fmt: skip
    print(f"loaded in {results['seconds']} s, {results['threads']} threads; products in {results['compute_dtype']}")
    room = results["limit_bytes"] - results["rss_peak_bytes"]
    print(f"passed, with {mb(room)} MB to spare" if results["passed"] else f"MISSED by {mb(-room)} MB")


def plot(results: dict[str, Any]) -> Any:
    """The resident set over time, between the finished model and the limit."""
    figure, axes = new_figure(figsize=(8, 4.5))
    seconds, sizes = zip(*results["samples"], strict=True)
    axes.plot(seconds, [size / 1e9 for size in sizes], label="resident set")
    axes.axhline(results["limit_bytes"] / 1e9, color="tab:red", linestyle="--", label="limit")
    axes.axhline(results["finished_bytes"] / 1e9, color="tab:green", linestyle=":", label="finished model")
    axes.set(xlabel="seconds since the process began", ylabel="GB", ylim=(0, None))
    model = results["model"]
    axes.set_title(f"Loading {Path(model['name_or_path']).name} as {model['quantization']} on the CPU")
    axes.legend(loc="best")
    return figure


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--quantization", choices=KINDS, default="nf4", help="of the linear weights (default: nf4)")
    parser.add_argument("--no-double-quant", action="store_true", help="leave the 4-bit scales unquantized")
    add_outputs(parser, plot="the resident set over time")


def run(options: argparse.Namespace) -> dict[str, Any]:
    require_proc()
    config = ModelConfig(name_or_path=options.model, quantization=options.quantization,
                         double_quant=not options.no_double_quant, device="cpu")  # fmt: skip
    figures = in_fresh_process(load_and_measure, sampled=True, **config.model_dump(mode="json"))
    return {"model": config.model_dump(), **figures, **judge(figures)}
