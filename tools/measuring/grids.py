"""GGUF's block types beside llama.cpp's own quantizer: error and time of each (20 seconds).

Every type's blocks of some of a model's matrices, made by the export and by `ggml_quantize_chunk` of the library that
llama-cpp-python brings (`pip install llama-cpp-python` compiles it), on the same float16 values and as many threads, in
turns. The squared error of none may be above llama.cpp's, and no k-type may take more than twice its processor time,
which other programs disturb less than the time on the wall.

    tools/measure grids demo
    tools/measure grids runs/merged --layer 0 --repeat 5 --json grids.json

Rows that are no multiple of 256 are filled up with zeros, which count in no error.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring.command import add_model, add_outputs
from qlora_tool.errors import UserError

SLOWEST = 2.0  # times llama.cpp's processor time, of a k-type


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--layer", type=int, default=7, help="whose matrices are taken (default: 7)")
    parser.add_argument("--repeat", type=int, default=3, help="turns, the fastest of which counts (default: 3)")
    add_outputs(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from qlora_tool.export.grids.block_types import BLOCK_TYPES
    from qlora_tool.files.tensors import Checkpoint, read_tensor
    from qlora_tool.model.source import resolve

    if missing := [name for name in ("gguf", "llama_cpp") if importlib.util.find_spec(name) is None]:
        raise UserError(f"missing: {', '.join(missing)}; run pip install gguf llama-cpp-python")
    entries = Checkpoint(resolve(options.model, None)).items()
    found = [read_tensor(entry).half().float() for name, entry in entries
             if f".{options.layer}." in name and len(entry.shape) == 2]  # fmt: skip
    if not found:
        raise UserError(f"{options.model}: no matrix in layer {options.layer}; choose another one by --layer")
    types = {name: _compared(name, found, options.repeat) for name in BLOCK_TYPES}
    passed = all(one["error"] <= 1 and ("_K" not in name or one["time"] <= SLOWEST) for name, one in types.items())
    return {"model": options.model, "layer": options.layer, "threads": torch.get_num_threads(), "types": types,
            "passed": passed}  # fmt: skip


def _compared(name: str, matrices: list[Any], repeat: int) -> dict[str, float]:
    """One type: our squared error and processor time as shares of llama.cpp's."""
    import gguf
    import torch

    from qlora_tool.export.gguf.write import block_bytes
    from qlora_tool.export.grids.block_types import BLOCK_TYPES

    kind, own = BLOCK_TYPES[name], gguf.GGMLQuantizationType[name]
    errors, seconds = [0.0, 0.0], [0.0, 0.0]
    for matrix in matrices:
        filled = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % kind.weights))
        ways = (lambda x=filled: block_bytes(x, kind), lambda x=filled: _by_ggml(x, own))
        spent: list[list[float]] = [[], []]
        for turn in range(repeat):
            for way, make in enumerate(ways):
                made, took = _timed(make)
                spent[way].append(took)
                if turn == 0:
                    values = torch.from_numpy(gguf.dequantize(made, own).copy())[:, : matrix.shape[1]]
                    errors[way] += float((values - matrix).double().square().sum())
        seconds = [total + min(times) for total, times in zip(seconds, spent, strict=True)]
    weights = sum(matrix.numel() for matrix in matrices)
    return {"error": errors[0] / errors[1], "time": seconds[0] / seconds[1], "weights_per_second": weights / seconds[0]}


def _timed(make: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    made = make()
    return made, time.process_time() - start


def _by_ggml(rows: Any, kind: Any) -> Any:
    """What llama.cpp's library makes of rows, a part on each thread."""
    import gguf
    import llama_cpp
    import numpy as np
    import torch

    library = ctypes.CDLL(str(next(Path(llama_cpp.llama_cpp._base_path).glob("*ggml-base*"))))
    made = np.empty(gguf.quants.quant_shape_to_byte_shape(tuple(rows.shape), kind), np.uint8)
    step = -(-len(rows) // torch.get_num_threads())

    def quantize(start: int) -> None:
        part, into = rows[start : start + step], made[start : start + step]
        counts = (ctypes.c_int64(number) for number in (0, *part.shape))
        library.ggml_quantize_chunk(int(kind), ctypes.c_void_p(part.data_ptr()), into.ctypes, *counts, None)

    threads = [threading.Thread(target=quantize, args=(start,)) for start in range(0, len(rows), step)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return made


def show(results: dict[str, Any]) -> None:
    print(f"{results['model']}, layer {results['layer']}, {results['threads']} threads; llama.cpp's own is 1")
    for name, one in results["types"].items():
        print(f"  {name:8}error {one['error']:6.3f}   processor time {one['time']:6.2f}   "
              f"{one['weights_per_second'] / 1e6:6.1f} million weights a second of it")  # fmt: skip
    print("passed" if results["passed"] else "MISSED")
