"""`qlora-tool doctor`: what this machine has, and what `auto` settings would make of it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from qlora_tool._version import __version__
from qlora_tool.cli import ToolCommand
from qlora_tool.errors import printable
from qlora_tool.extras import install_command
from qlora_tool.sizes import counted, memory_size

REQUIRED = ("torch", "transformers", "bitsandbytes", "accelerate", "safetensors")
OPTIONAL = ("peft", "triton", "gguf")
# What packages beyond those that every run needs are for: the ability, the package, the extra that brings it.
ABILITIES = (
    ("the model demo", "gguf", "demo"),
    ("GGUF files", "gguf", "gguf"),
    ("llama.cpp beside an export", "llama_cpp_python", "llama-cpp"),
    ("Triton kernels on a card", "triton", "triton"),
)


@click.command(
    cls=ToolCommand,
    examples="""
    qlora-tool doctor
    qlora-tool doctor > machine.txt   # to go with a question or a bug report
    qlora-tool doctor --measure       # after the machine was busy, or has changed
    """,
)
@click.option("--measure", is_flag=True, help="Measure products and bandwidths anew; let nothing else run meanwhile.")
@click.option("--clear-cache", is_flag=True,
              help="First delete what is cached: predictions, speeds, the demo model, quantized bases.")  # fmt: skip
def doctor(measure: bool, clear_cache: bool) -> None:
    """Show versions, devices, the compute dtype that `auto` chooses, bandwidths, kernels and disk.

    Nothing is downloaded and no network is needed. Exit code 1 where something that every run needs is missing.
    """
    from qlora_tool.errors import MachineError

    if clear_cache:
        from qlora_tool.files.cache import clear_cache as clear

        cleared = clear()
        click.echo(f"cache: {_megabytes(cleared.nbytes)} deleted{_left(cleared.left)}", err=True)
    versions = {name: _version(name) for name in (*REQUIRED, *OPTIONAL)}
    own = {"qlora-tool": __version__, "python": platform.python_version()}
    _show("Versions", [(name, version or "not installed") for name, version in (own | versions).items()])
    if missing := [name for name in REQUIRED if versions[name] is None]:
        raise MachineError(f"{name} is not installed; every run needs it: pip install {name}" for name in missing)
    _show("Devices", _devices())
    if measure:
        from qlora_tool.ops import bandwidths, speeds

        speeds.measure_anew()
        bandwidths.measure_anew()
    _show("Products", _products())
    _show("Bandwidths", _bandwidths())
    _show("Compute dtype that auto chooses", _compute_dtypes())
    kernels, fault = _kernels()
    _show("Kernels", kernels)
    _show("Abilities", _abilities(), width=30)
    _show("Disk", [("cache", _free_disk())])
    if fault:
        raise MachineError(fault)


def _show(title: str, rows: Any, width: int = 14) -> None:
    click.echo(title)
    for name, value in rows:
        click.echo(f"  {name:<{width}}{value}")


def _abilities() -> Iterator[tuple[str, str]]:
    """What can be done here of what takes a package of its own, or what to install for it."""
    for ability, package, extra in ABILITIES:
        version = _version(package)
        yield ability, f"yes ({package} {version})" if version else f"no: {install_command(extra)}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[tuple[str, str]]:
    import torch

    memory = ""
    if hasattr(os, "sysconf"):
        memory = f", {memory_size(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))} of memory"
    capability = torch.backends.cpu.get_cpu_capability()
    yield "cpu", f"{platform.machine()} {capability}, {_threads(torch.get_num_threads())}{memory}"
    if not torch.cuda.is_available():
        yield "cuda", "none" if torch.version.cuda else "none (this torch is built without CUDA)"
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        memory = f"{memory_size(total)} of memory, {memory_size(free)} free"
        yield f"cuda:{index}", f"{card.name}, compute capability {card.major}.{card.minor}, {memory}"


def _products() -> Iterator[tuple[str, str]]:
    from qlora_tool.ops.speeds import known_speeds

    found = known_speeds()
    yield "cpu", ", ".join(f"{name} {gflops:.1f}" for name, gflops in found.gflops.items()) + " GFLOP/s"
    against = f"oneDNN takes 1/{found.ratio:.2f} of PyTorch's time, ± {found.spread / 2:.0%}"
    yield "float32 by", f"{found.choice} ({against if found.ratio else 'this PyTorch has no oneDNN'})"
    share = f"{found.processor_share:.0%} of the processors' time was free"
    busy = f"; the machine was busy ({share}): doctor --measure measures again"
    yield "measured", f"{found.date[:16]} UTC, {_threads(found.threads)}{busy if found.doubtful else ''}"


def _threads(number: int) -> str:
    return counted(number, "thread")


def _bandwidths() -> Iterator[tuple[str, str]]:
    from qlora_tool.files.cache import cache_folder
    from qlora_tool.ops.bandwidths import known_bandwidths

    found = known_bandwidths()

    def row(name: str, figure: float, how: str) -> tuple[str, str]:
        reason = found.faults.get(name)
        return name, f"{figure / 1e9:.2f} GB/s ({how})" if reason is None else f"not measured ({reason})"

    reads = "direct reads" if found.direct else "reads by way of the page cache"
    yield row("disk", found.disk, f"{reads} in {cache_folder().absolute()}")
    yield row("host", found.host, f"copies in memory by {_threads(found.threads)}")
    for name, figure in found.cards.items():
        yield row(name, figure, "from pinned memory")
    yield "measured", f"{found.date[:16]} UTC"


def _compute_dtypes() -> Iterator[tuple[str, str]]:
    import torch

    from qlora_tool.ops.precision import choose_compute_dtype

    yield "cpu", _dtype_name(choose_compute_dtype(torch.device("cpu")))
    for index in range(torch.cuda.device_count()):
        yield f"cuda:{index}", _dtype_name(choose_compute_dtype(torch.device("cuda", index)))


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _kernels() -> tuple[list[tuple[str, str]], str | None]:
    """What there is of bitsandbytes' native library and Triton, and which operations of a step are Triton kernels on
    each card; and a fault, where bitsandbytes has no library here."""
    import torch
    from bitsandbytes.cextension import lib

    from qlora_tool.ops.kernels import lacking

    library = getattr(getattr(lib, "_lib", None), "_name", None)
    rows = [
        ("bitsandbytes", Path(library).name if library else "no native library was loaded"),
        ("triton", lacking() or "can compile kernels for CUDA devices"),
        *((f"cuda:{index}", _kernels_on(torch.device("cuda", index))) for index in range(torch.cuda.device_count())),
    ]
    fault = "bitsandbytes loaded no native library; install it for this machine: pip install -U bitsandbytes"
    return rows, None if library else fault


def _kernels_on(device: Any) -> str:
    from qlora_tool.ops.kernels import OPERATIONS, usable

    return f"Triton kernels for {', '.join(OPERATIONS)}" if usable(device) else "slower operations than Triton kernels"


def _free_disk() -> str:
    from qlora_tool.files.cache import cache_folder

    folder = existing = cache_folder().absolute()
    while not existing.exists():
        existing = existing.parent
    return f"{folder}, {_gigabytes(shutil.disk_usage(existing).free)} free"


def _left(files: Sequence[Path]) -> str:
    """Which files of others lie among what is cached, for a line; empty where none do."""
    if not files:
        return ""
    more = f" and {len(files) - 3:,} more" if len(files) > 3 else ""
    return f"; left what qlora-tool did not write: {', '.join(printable(str(file), 200) for file in files[:3])}{more}"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
