"""Where the time of a step goes on a CUDA device: each kernel, launches, waits (a 7B: 1 minute).

    tools/measure step-profile llama-7b-4x1024 --json step.json --trace step.trace.json.gz
    tools/measure step-profile llama-7b-4x1024 --without norm adamw --no-profile

The configurations are those of `memory-cuda`, with random weights. Steps are timed without the profiler, by the host's
clock around a synchronized device; one more is profiled.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring.command import add_outputs, at_least
from measuring.memory_cuda import CONFIGURATIONS
from measuring.ours import KERNELS, leave_out_kernels
from measuring.results import machine, mb, save_results, say, show_table
from qlora_tool.errors import MachineError
from qlora_tool.files.atomic import replacing_file

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
LARGEST_TRACE = 15_000_000  # bytes, compressed


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("configuration", choices=CONFIGURATIONS, metavar="NAME", help=", ".join(CONFIGURATIONS))
    parser.add_argument("--steps", type=at_least(1), default=5, metavar="N", help="that are timed (default: 5)")
    parser.add_argument("--without", nargs="+", default=[], choices=KERNELS, metavar="KERNEL",
                        help=f"run by its reference: {', '.join(KERNELS)}")  # fmt: skip
    parser.add_argument("--keep-weights", action="store_true",
                        help="recompute all; what is dequantized then is kept for its gradients")  # fmt: skip
    parser.add_argument("--no-profile", action="store_true", help="only take the time")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="the profiler's trace, for perfetto (.json.gz)")
    add_outputs(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        raise MachineError("PyTorch sees no CUDA device here: start this on the machine that has one")
    leave_out_kernels(options.without)
    one = CONFIGURATIONS[options.configuration]
    say(f"{options.configuration}: loading")
    step = one.step().ready("cuda", options.keep_weights)
    for _ in range(2):
        step()
    seconds = [_timed(step) for _ in range(options.steps)]
    median = statistics.median(seconds)
    results = {
        "machine": machine(), "device": torch.cuda.get_device_name(), "configuration": options.configuration,
        "without": options.without, "keeps_weights": options.keep_weights, "seconds": seconds,
        "tokens_per_second": one.rows * one.length / median,
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
    }  # fmt: skip
    save_results(options.json, results)
    if not options.no_profile:
        results |= _profiled(step, options.trace)
        save_results(options.json, results)
    return results


def _timed(step: Callable[[], Any]) -> float:
    import torch

    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _profiled(step: Callable[[], Any], trace: Path | None) -> dict[str, Any]:
    """Kernels by their name, and what the host called, read off the profiler's own trace of a step."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        text = file.read_text(encoding="utf-8")
    if trace is not None:
        packed = gzip.compress(text.encode(), 6)
        if len(packed) <= LARGEST_TRACE:
            with replacing_file(trace) as temporary:
                temporary.write_bytes(packed)
        else:
            say(f"the trace has {len(packed):,} bytes, more than {LARGEST_TRACE:,}: it is not written")
    return figures_of_trace(json.loads(text)["traceEvents"])


def figures_of_trace(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What a trace in Chrome's form says of a step.

    Returns:
        `kernels`: {name: {count, milliseconds}}, longest first; `launches` and `waits` of the host; `device_ms`: all
        kernels, copies and fills together; `span_ms`: from the first of them to the end of the last.
    """
    kernels: dict[str, list[float]] = defaultdict(list)
    host: dict[str, int] = defaultdict(int)
    begin, end = float("inf"), 0.0
    for event in events:
        category = event.get("cat")
        if category in ("kernel", "gpu_memcpy", "gpu_memset"):
            kernels[event["name"]].append(event["dur"] / 1000)
            begin, end = min(begin, event["ts"]), max(end, event["ts"] + event["dur"])
        elif category in ("cuda_runtime", "cuda_driver"):
            host[event["name"]] += 1
    rows = {name: {"count": len(times), "milliseconds": round(sum(times), 3)} for name, times in kernels.items()}
    rows = dict(sorted(rows.items(), key=lambda row: -row[1]["milliseconds"]))
    return {
        "device_ms": round(sum(row["milliseconds"] for row in rows.values()), 3),
        "span_ms": round((end - begin) / 1000, 3) if rows else 0.0,
        "launches": sum(host[name] for name in LAUNCHES),
        "waits": {name: host[name] for name in WAITS if host[name]},
        "kernels": rows,
    }


def show(results: dict[str, Any]) -> None:
    milliseconds, peak = statistics.median(results["seconds"]) * 1000, results["peak_allocated_bytes"]
    print(f"{results['device']}, {results['configuration']}: {milliseconds:.1f} ms a step, "
          f"{results['tokens_per_second']:,.0f} tokens/s, {mb(peak)} MB at the peak")  # fmt: skip
    if "kernels" not in results:
        return
    print(f"profiled: {results['launches']:,} launches, waits {results['waits'] or 'none'}; the device works "
          f"{results['device_ms']:.1f} ms of {results['span_ms']:.1f}")
    rows = [(name[:100], figures["count"], f"{figures['milliseconds']:.2f}")
            for name, figures in list(results["kernels"].items())[:40]]  # fmt: skip
    show_table([("kernel", "count", "ms"), *rows])
