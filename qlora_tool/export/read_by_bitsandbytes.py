"""Which shapes of 4-bit weights bitsandbytes reads as they were written.

Its weights are flat blocks that share a scale, wherever rows begin. On CPUs with AVX-512, bitsandbytes 0.50 counts the
blocks of each row anew: where a row is no whole number of them, its weights get the scales of others (16 divides the
row), or the product fails. Nothing but whole blocks is read alike everywhere, whatever reads them here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from importlib.metadata import version

import torch

from qlora_tool.weights.quantized import BLOCK_SIZE, QuantizedTensor, quantize, to_disk

TRIED_ROWS = 64  # of a larger weight: rows of a width are all read by the same rule


def is_read_everywhere(shape: tuple[int, int], kind: str, double_quant: bool) -> bool:
    """Whether a weight (out, in) may be written in 4 bits: its rows are whole blocks, and the bitsandbytes that is
    installed gives back what a weight of that width was written as."""
    return shape[1] % BLOCK_SIZE == 0 and is_read_here(shape, kind, double_quant)


def is_read_here(shape: tuple[int, int], kind: str, double_quant: bool) -> bool:
    """Whether the bitsandbytes that is installed reads a weight (out, in) rightly on this CPU, as measured. For an odd
    `in` it compiles first, for seconds."""
    return _is_read(min(shape[0], TRIED_ROWS), shape[1], kind, double_quant)


@functools.cache
def _is_read(rows: int, width: int, kind: str, double_quant: bool) -> bool:
    sizes = torch.exp2(torch.arange(rows * width) // BLOCK_SIZE % 5.0)  # so that another block's scale shows
    weight = torch.randn(rows * width, generator=torch.Generator().manual_seed(0)) * sizes
    written = quantize(weight.view(rows, width), kind, double_quant)
    expected = written.dequantize()
    found = read(written)
    return found.shape == expected.shape and bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


def why_left(shapes: Iterable[tuple[int, int]], kind: str, double_quant: bool) -> str:
    """Why weights of these shapes are not written in 4 bits, in words: `rows of 96 and 160 are misread by …`."""
    shapes = set(shapes)
    widths = [str(width) for width in sorted({width for _, width in shapes})]
    rows = f"rows of {' and '.join([', '.join(widths[:-1]), widths[-1]] if widths[1:] else widths)}"
    here = any(width % 2 == 0 and not is_read_here((out, width), kind, double_quant) for out, width in shapes)
    if here:
        return f"{rows} are misread by bitsandbytes {version('bitsandbytes')} on this CPU, as measured"
    return f"{rows} are no whole blocks of {BLOCK_SIZE} weights, which bitsandbytes misreads on some CPUs"


def read(written: QuantizedTensor) -> torch.Tensor:
    """What bitsandbytes makes of the tensors that a file has, (out, in) fp32, on the CPU."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    tensors = to_disk("weight", written)
    codes = tensors.pop("weight")
    state = QuantState.from_dict(tensors, torch.device("cpu"))
    return dequantize_4bit(codes, state).float()
