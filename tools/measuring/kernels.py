"""Each operation that has a kernel for CUDA devices against its reference, at the shapes of a 7B.

Results are compared first. Then both are timed by the device's own clock: the median of seven rounds of twenty calls,
which wait for the device, not it for them. Calls take turns on inputs that are together several times as large as the
cache, and results are kept until their turn comes again. GB/s counts once what an operation must read or write; its
share is of what a plain copy reaches. Host time is what a call takes the processor.

Last, the products of q, k, v and of gate and up, forward and for the gradient of their input: one by one, each weight
dequantized before its product, against all weights of an input dequantized into one matrix and multiplied at once.

Asked for: a CUDA device, kernels that run, and results equal to the references' (to the bit where weights are
dequantized).
"""

from __future__ import annotations

import argparse
import functools
import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from measuring.command import add_outputs
from measuring.kernel_cases import BATCHES, JOINED, Case, cases, product_calls
from measuring.results import machine, passed_or_missed, say, show_table
from qlora_tool.errors import MachineError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ROTATED = 400e6  # bytes that calls take turns on: eight times the cache of the largest card
CALLS, ROUNDS = 20, 7
ROUND = 0.1  # seconds: of slow calls there are fewer in a round
AHEAD = 20_000_000  # cycles, some 10 ms, that the device waits while it is given the calls of a round
MODULES = ("quantization", "norm", "rotary", "gated", "adamw")  # of `qlora_tool.ops`, that declare such operations
EXACT = ("dequantize_4bit", "dequantize_int8")


@dataclass
class Timed:
    """Microseconds of a call, medians.

    Attributes:
        device: by the device's clock.
        host: until the call returned.
    """

    device: float
    host: float


@dataclass
class Figures:
    """What was found of a case; `error` where something went wrong."""

    operation: str
    what: str
    equal: bool | None = None
    difference: float | None = None  # of the norms, relative
    nbytes: int = 0  # that have to be read or written
    kernel: Timed | None = None
    reference: Timed | None = None
    error: str = ""
    shares: dict[str, float] = field(default_factory=dict)


# -------------------------------------------------------------------------------------------------- comparing, timing


def tensors_of(values: Any) -> list[Tensor]:
    import torch
    from torch.utils._pytree import tree_leaves

    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def results_of(call: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Tensor]:
    """What a call on copies of the arguments gives; where it writes into them, those."""
    import torch
    from torch.utils._pytree import tree_map_only

    copies = tree_map_only(torch.Tensor, torch.Tensor.clone, arguments)
    result = call(*copies)
    return tensors_of(copies if result is None else result)


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The norm of what differs, of the norm of what is expected; infinity for results of another form."""
    if [(one.shape, one.dtype) for one in found] != [(one.shape, one.dtype) for one in expected]:
        return float("inf")
    apart = [float((one.float() - other.float()).norm() / other.float().norm().clamp(min=1e-30))
             for one, other in zip(found, expected, strict=True)]  # fmt: skip
    return max(apart, default=0.0)


class DeviceClock:
    """Times calls on a CUDA device.

    Args:
        until: when to stop, by `time.monotonic`; a round that has begun is finished.
    """

    def __init__(self, device: torch.device, until: float = float("inf")):
        self.device, self.until = device, until

    def time(self, call: Callable[..., Any], inputs: Sequence[tuple[Any, ...]]) -> Timed:
        """Time `call(*inputs[0])`, `call(*inputs[1])`, ... in turn."""
        import torch

        kept: list[Any] = [call(*arguments) for arguments in inputs]  # compiles, and fills the allocator's cache
        torch.cuda.synchronize(self.device)
        begin = time.perf_counter()
        kept[0] = call(*inputs[0])
        torch.cuda.synchronize(self.device)
        calls = max(1, min(CALLS, round(ROUND / (time.perf_counter() - begin))))
        on_device, on_host = [], []
        for _ in range(ROUNDS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(self.device)
            with suppress(AttributeError):
                torch.cuda._sleep(AHEAD)
            start.record()
            for number in range(calls):
                turn = number % len(inputs)
                begin = time.perf_counter()
                kept[turn] = call(*inputs[turn])
                on_host.append(time.perf_counter() - begin)
            end.record()
            torch.cuda.synchronize(self.device)
            on_device.append(start.elapsed_time(end) / calls)
            if time.monotonic() > self.until:
                break
        return Timed(1e3 * statistics.median(on_device), 1e6 * statistics.median(on_host))

    def copy_bandwidth(self) -> float:
        """Bytes a second that a plain copy reads and writes."""
        import torch

        source = torch.empty(512 << 20, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / (1e-6 * self.time(target.copy_, [(source,)]).device)


@functools.cache
def declared() -> dict[str, Any]:
    """All operations of the package, by name."""
    from qlora_tool.ops.declare import OPERATIONS

    for module in MODULES:
        with suppress(ImportError):
            importlib.import_module(f"qlora_tool.ops.{module}")
    return OPERATIONS


def compare(case: Case, clock: DeviceClock) -> Figures:
    """Compare and time one case; whatever goes wrong is noted and nothing else."""
    figures = Figures(case.operation, case.what)
    operation = declared().get(f"qlora_tool::{case.operation}")
    if operation is None or "cuda" not in operation.versions:
        figures.error = "this version has no such kernel"
        return figures
    try:
        arguments = case.arguments(clock.device, 0)
        found, expected = results_of(operation, arguments), results_of(operation.reference, arguments)
        figures.difference = difference(found[: case.compared], expected[: case.compared])
        figures.equal = figures.difference == 0.0
        figures.nbytes = sum(tensor.nbytes for tensor in [*tensors_of(arguments), *found])
        del found, expected
        turns = min(16, max(2, round(ROTATED / figures.nbytes)))
        inputs = [arguments, *(case.arguments(clock.device, seed) for seed in range(1, turns))]
        figures.kernel = clock.time(operation, inputs)
        figures.reference = clock.time(operation.reference, inputs)
    except Exception as error:  # the others are still worth their time
        figures.error = in_a_line(error)
    return figures


def in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


# ------------------------------------------------------------------------------------------------- products at once


def joined_products(what: str, sizes: Sequence[int], tokens: int, clock: DeviceClock) -> dict[str, Any]:
    """Microseconds of the products of one input with several weights, forward and for its gradient, dequantization
    included: one by one, and with all weights in one matrix."""
    try:
        calls = product_calls(sizes, tokens, clock.device)
        us = {name: clock.time(call, [()]).device for name, call in calls.items()}
    except Exception as error:
        return {"what": what, "tokens": tokens, "error": in_a_line(error)}
    return {"what": what, "tokens": tokens, "us": us}


# -------------------------------------------------------------------------------------------------------- the subject


def add_options(parser: argparse.ArgumentParser) -> None:
    add_outputs(parser)
    parser.add_argument("--only", nargs="+", metavar="OPERATION", help="some of them, by name; products for the last")
    parser.add_argument("--seconds", type=float, default=55.0, help="after these nothing is begun (default: 55)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        raise MachineError("PyTorch sees no CUDA device here: nothing was timed; run this on the machine that has one")
    until = time.monotonic() + options.seconds
    from qlora_tool.ops.kernels import lacking, usable

    device = torch.device("cuda", torch.cuda.current_device())
    clock, runs = DeviceClock(device, until), usable(device)
    bandwidth = clock.copy_bandwidth()
    found, products = [], []
    for case in (case for case in cases() if not options.only or case.operation in options.only):
        say(f"{case.operation} {case.what}")
        found.append(compare(case, clock) if time.monotonic() < until else
                     Figures(case.operation, case.what, error="no time was left"))  # fmt: skip
        found[-1].shares = shares(found[-1], bandwidth)
        torch.cuda.empty_cache()
    for what, sizes in JOINED.items() if not options.only or "products" in options.only else ():
        for rows, length in BATCHES:
            if time.monotonic() < until:
                products.append(joined_products(what, sizes, rows * length, clock))
    return {
        "machine": machine(), "device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda,
        "kernels_run": runs, "lacking": lacking(), "copy_gb_per_s": bandwidth / 1e9,
        "operations": [asdict(one) for one in found], "products": products,
        "passed": runs and all(passes(one) for one in found),
    }  # fmt: skip


def shares(figures: Figures, bandwidth: float) -> dict[str, float]:
    """GB/s of both, the kernel's share of a copy's, and how many times as fast as the reference it is."""
    if figures.kernel is None or figures.reference is None:
        return {}
    rates = {name: figures.nbytes / (1e-6 * timed.device) for name, timed in
             (("kernel", figures.kernel), ("reference", figures.reference))}  # fmt: skip
    return {
        "kernel_gb_per_s": rates["kernel"] / 1e9, "reference_gb_per_s": rates["reference"] / 1e9,
        "share_of_copy": rates["kernel"] / bandwidth, "times_as_fast": rates["kernel"] / rates["reference"],
    }  # fmt: skip


def passes(figures: Figures) -> bool:
    """Whether a case ran and is right; bf16 may be rounded elsewhere. One that this version lacks, or that had no time,
    is not held against it."""
    if figures.difference is None:
        return figures.error.startswith(("this version", "no time"))
    return not figures.error and figures.difference <= (0.0 if figures.operation in EXACT else 2.0**-7)


def show(results: dict[str, Any]) -> None:
    rows = [("operation", "shape", "us", "reference", "host us", "GB/s", "of a copy", "times", "difference")]
    for one in results["operations"]:
        if not one["shares"]:
            rows.append((one["operation"], one["what"], one["error"][:60], *[""] * 6))
            continue
        kernel, reference, reached = one["kernel"], one["reference"], one["shares"]
        rows.append((
            one["operation"], one["what"], f"{kernel['device']:,.1f}", f"{reference['device']:,.1f}",
            f"{kernel['host']:,.0f} / {reference['host']:,.0f}", f"{reached['kernel_gb_per_s']:,.0f}",
            f"{reached['share_of_copy']:.0%}", f"{reached['times_as_fast']:.2f}",
            "none" if one["equal"] else f"{one['difference']:.1e}",
        ))  # fmt: skip
    show_table(rows)
    if timed := [one for one in results["products"] if "us" in one]:
        names = list(timed[0]["us"])
        show_table([("products, us", "tokens", *names),
                    *((one["what"], one["tokens"], *(f"{one['us'][name]:,.0f}" for name in names)) for one in timed)])
    for one in results["products"]:
        if "error" in one:
            print(f"products: {one['error']}")
    print(f"a copy: {results['copy_gb_per_s']:,.0f} GB/s on {results['device']}")
    if not results["kernels_run"]:
        print(f"no kernels run here: {results['lacking'] or 'a first one failed, as the warning says'}")
    print(passed_or_missed(results["passed"]))
