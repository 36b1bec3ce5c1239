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
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from measuring.command import add_outputs
from measuring.results import machine, passed_or_missed, say, show_table
from qlora_tool.errors import MachineError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MATRICES = ((4096, 4096), (11008, 4096), (4096, 11008))
BATCHES = ((1, 2048), (4, 1024))
JOINED = {"q, k, v": (4096, 4096, 4096), "gate, up": (11008, 11008)}
HIDDEN, INTERMEDIATE, HEADS, HEAD_DIM = 4096, 11008, 32, 128
ROTATED = 400e6  # bytes that calls take turns on: eight times the cache of the largest card
CALLS, ROUNDS = 20, 7
AHEAD = 20_000_000  # cycles, some 10 ms, that the device waits while it is given the calls of a round
MODULES = ("quantization", "norm", "rotary", "gated")  # of `qlora_tool.ops`, that declare such operations
EXACT = ("dequantize_4bit", "dequantize_int8")


@dataclass(frozen=True)
class Case:
    """One operation at one shape.

    Attributes:
        operation: its name without the namespace.
        what: the shape and kind in words.
        arguments: makes them on a device; another seed, other numbers.
    """

    operation: str
    what: str
    arguments: Callable[[torch.device, int], tuple[Any, ...]]


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


# ------------------------------------------------------------------------------------------------------------- inputs


def weight(device: torch.device, seed: int, shape: tuple[int, int], kind: str, double: bool) -> Any:
    """A quantized matrix of random numbers."""
    from qlora_tool.weights.quantized import quantize

    return quantize(random_arguments(device, seed, sizes=(shape,), rest=())[0], kind, double)


def dense_arguments(
    device: torch.device, seed: int, *, shape: tuple[int, int], kind: str, double: bool, dtype: str
) -> tuple[Any, ...]:
    import torch

    of = weight(device, seed, shape, kind, double)
    rest = () if kind == "int8" else (of.nested_scales, of.nested_offset, kind, of.block_size, 0, shape)
    return of.codes, of.scales, *rest, getattr(torch, dtype)


def random_arguments(
    device: torch.device, seed: int, *, sizes: Sequence[tuple[int, ...]], rest: tuple[Any, ...]
) -> tuple[Any, ...]:
    """bf16 tensors of these sizes, and what comes after them."""
    import torch

    draw = torch.Generator(device).manual_seed(seed)
    made = [torch.randn(size, generator=draw, device=device, dtype=torch.bfloat16) for size in sizes]
    return (*made, *rest)


def norm_backward_arguments(device: torch.device, seed: int, *, size: tuple[int, ...]) -> tuple[Any, ...]:
    import torch

    grad, x, scaling = random_arguments(device, seed, sizes=(size, size, size[-1:]), rest=())
    return grad, x, scaling, torch.rsqrt(x.float().square().mean(-1) + 1e-5), 0.0


def cases() -> list[Case]:
    """All that are known, those of operations that this version does not have too."""
    found = []

    def dense(shape: tuple[int, int], kind: str, double: bool = False, dtype: str = "bfloat16") -> None:
        what = f"{shape[0]} x {shape[1]} {kind}{' double' if double else ''} {dtype}"
        make = functools.partial(dense_arguments, shape=shape, kind=kind, double=double, dtype=dtype)
        found.append(Case("dequantize_int8" if kind == "int8" else "dequantize_4bit", what, make))

    for shape in MATRICES:
        dense(shape, "nf4", True)
        dense(shape, "int8")
    dense(MATRICES[0], "nf4")
    dense(MATRICES[0], "fp4", True)
    dense(MATRICES[0], "nf4", True, "float16")
    dense(MATRICES[0], "nf4", True, "float32")
    for rows, length in BATCHES:
        hidden, inner = (rows, length, HIDDEN), (rows * length, INTERMEDIATE)
        heads, angles = (rows, length, HEADS, HEAD_DIM), (1, length, HEAD_DIM)

        def add(operation: str, make: Callable[..., tuple[Any, ...]], what: str = f"{rows} x {length}", **of: Any):
            found.append(Case(operation, what, functools.partial(make, **of)))

        add("rms_norm", random_arguments, sizes=(hidden, hidden[-1:]), rest=(1e-5, 0.0, True))
        add("rms_norm_backward", norm_backward_arguments, size=hidden)
        add("rotary", random_arguments, sizes=(heads, heads, angles, angles), rest=(False,))
        add("gated_product", random_arguments, sizes=(inner, inner), rest=("silu",))
        add("gated_gradients_", random_arguments, sizes=(inner,) * 3, rest=("silu",))
    return found


# -------------------------------------------------------------------------------------------------- comparing, timing


def tensors_of(values: Iterable[Any]) -> list[Tensor]:
    import torch

    return [value for value in values if isinstance(value, torch.Tensor)]


def results_of(call: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Tensor]:
    """What a call on copies of the arguments gives; where it writes into them, those."""
    import torch

    copies = tuple(value.clone() if isinstance(value, torch.Tensor) else value for value in arguments)
    result = call(*copies)
    if result is None:
        return tensors_of(copies)
    return tensors_of(result if isinstance(result, tuple | list) else (result,))


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

        kept: list[Any] = [None] * len(inputs)
        for number, arguments in enumerate(inputs):  # compiles, and fills the allocator's cache
            kept[number] = call(*arguments)
        on_device, on_host = [], []
        for _ in range(ROUNDS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(self.device)
            with suppress(AttributeError):
                torch.cuda._sleep(AHEAD)
            start.record()
            for number in range(CALLS):
                turn = number % len(inputs)
                begin = time.perf_counter()
                kept[turn] = call(*inputs[turn])
                on_host.append(time.perf_counter() - begin)
            end.record()
            torch.cuda.synchronize(self.device)
            on_device.append(start.elapsed_time(end) / CALLS)
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
        figures.difference = difference(found, expected)
        figures.equal = figures.difference == 0.0
        written = sum(tensor.nbytes for tensor in found)
        figures.nbytes = sum(tensor.nbytes for tensor in tensors_of(arguments)) + written
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


def product_calls(sizes: Sequence[int], tokens: int, device: torch.device) -> dict[str, Callable[[], Any]]:
    import torch

    from qlora_tool.ops.kernels.dequantize import dequantize_4bit
    from qlora_tool.ops.quantization import NESTED_BLOCK_SIZE, code_values

    weights = [weight(device, seed, (size, HIDDEN), "nf4", True) for seed, size in enumerate(sizes)]
    x, *grads = random_arguments(device, 0, sizes=((tokens, HIDDEN), *((tokens, size) for size in sizes)), rest=())
    codes, nested = code_values("nf4", device), code_values("nested", device)

    def together() -> Tensor:
        dense = x.new_empty(sum(sizes), HIDDEN)
        for one, part in zip(weights, dense.split(list(sizes)), strict=True):
            dequantize_4bit(one.codes, codes, one.scales, nested, one.nested_scales, one.nested_offset,
                            one.block_size, NESTED_BLOCK_SIZE, 0, part)  # fmt: skip
        return dense

    def gradient_apart() -> Tensor:
        dx = None
        for grad, one in zip(grads, weights, strict=True):
            dense = one.dequantize(torch.bfloat16)
            dx = torch.mm(grad, dense) if dx is None else dx.addmm_(grad, dense)
        return dx

    return {
        "forward apart": lambda: [torch.mm(x, one.dequantize(torch.bfloat16).T) for one in weights],
        "forward joined": lambda: torch.mm(x, together().T),
        "gradient apart": gradient_apart,
        "gradient joined": lambda: torch.mm(torch.cat(grads, 1), together()),
    }


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
