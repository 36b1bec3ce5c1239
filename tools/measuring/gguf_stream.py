"""A large model to GGUF: memory and time, with rows and without (a 7B: 5 minutes, an hour with rows).

    tools/make random-model /tmp/llama7b --shape llama-2-7b
    tools/measure gguf-stream /tmp/llama7b --work /tmp/stream --rows some-text.txt --json stream.json

The adapter has random values (LoRA r 16 on every linear module), a byte-level tokenizer is written where the folder has
none. The file is made from the nearest codes, and from `--rows` with those. Memory is the process's resident set
(VmHWM) over what it was after the imports. Where llama-cpp-python is installed, its quantizer makes the same type from
our f16 file, with as many threads: the limit is twice its time. With rows it is twice the bare products, which one
layer shows after the export, in a process of their own: those of a forward pass of the rows and the moments of what
each weight is given, times the number of layers.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import time
from pathlib import Path
from typing import Any

from measuring.command import add_model, add_outputs
from measuring.export_stream import first_layers, write_random_adapter
from measuring.few_bits import THEIRS
from measuring.processes import in_fresh_process, require_proc, resident_bytes
from measuring.results import save_results, say, show_table

MEMORY_LIMITS = {"none": 1_500_000_000, "rows": 3_000_000_000}  # bytes over the interpreter's own
TIME_LIMIT = 2.0  # times llama.cpp's quantizer, or the bare products


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges: every byte is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    ).save_pretrained(folder)


def export_here(adapter: str, output: str, kind: str, rows: str) -> dict[str, Any]:
    """Export in this process, which has done nothing else; seconds and bytes."""
    import accelerate  # noqa: F401 -- what an export imports counts as before it
    import torch
    from transformers import AutoModelForCausalLM  # noqa: F401

    from qlora_tool.artifacts import BaseOptions, find_artifact
    from qlora_tool.export.options import ExportOptions
    from qlora_tool.export.write import export_merged
    from qlora_tool.files.hashes import file_hashes
    from qlora_tool.model.load import build_skeleton  # noqa: F401

    artifact = find_artifact(adapter, BaseOptions())
    file_hashes(Path(artifact.model.name_or_path))  # training keeps them
    before, started = resident_bytes("VmRSS"), time.perf_counter()
    options = ExportOptions(format="gguf", gguf_type=kind, base="dequantized", calibration=rows, overwrite=True)
    result = export_merged(artifact, Path(output), options)
    encoding = result.facts.get("encoding") or {}
    return {
        "seconds": time.perf_counter() - started, "threads": torch.get_num_threads(), "bytes": result.bytes,
        "tokens": (encoding.get("calibration") or {}).get("tokens"), "rss_before_bytes": before,
        "over_interpreter_bytes": (resident_bytes("VmHWM") or 0) - (before or 0),
    }  # fmt: skip


def llama_cpp_here(exact: str, kind: str, threads: int) -> dict[str, Any]:
    """llama.cpp's quantizer on a file of ours, in this process."""
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = THEIRS[kind], threads
    file, started = Path(exact).with_suffix(".theirs"), time.perf_counter()
    if llama_cpp.llama_model_quantize(bytes(Path(exact)), bytes(file), settings):
        raise OSError(1, "llama.cpp's quantizer failed", str(file))
    found = {"seconds": time.perf_counter() - started, "bytes": file.stat().st_size}
    file.unlink()
    return found


def products_here(base: str, tokens: int) -> dict[str, float]:
    """Seconds of one layer's bare products in fp32, and of the moments of what its weights are given."""
    import torch

    from qlora_tool.model.checkpointing import decoder_layers
    from qlora_tool.model.load import build_skeleton
    from qlora_tool.model.slots import is_linear
    from qlora_tool.model.source import read_model_config

    layers = decoder_layers(build_skeleton(read_model_config(Path(base))))
    shapes = [tuple(module.weight.shape) for module in next(iter(layers.values())).modules() if is_linear(module)]
    seconds = {"layers": float(len(layers)), "products": 0.0, "moments": 0.0}
    for out, width in shapes:
        weight, x = torch.randn(out, width), torch.randn(tokens, width)
        seconds["products"] += _timed(lambda weight=weight, x=x: x @ weight.T)
    given = {"q": shapes[0][1], "o": shapes[0][1], "up": shapes[0][1], "down": max(width for _, width in shapes)}
    for width in given.values():  # q, k and v are given the same, and so are gate and up
        x, total = torch.randn(tokens, width), torch.zeros(width, width)
        seconds["moments"] += _timed(lambda x=x, total=total: total.addmm_(x.T, x))
    return seconds


def _timed(call: Any) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="for the adapter and the files")
    parser.add_argument("--gguf-type", choices=THEIRS, default="q4_k_m", metavar="TYPE", help=", ".join(THEIRS))
    parser.add_argument("--rows", type=Path, metavar="FILE", help="rows to make the codes with, in a second export")
    parser.add_argument("--only-rows", action="store_true", help="leave out the export without them")
    parser.add_argument("--layers", type=int, help="export the first layers alone")
    add_outputs(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    require_proc()
    from qlora_tool.model.source import resolve

    base, work = resolve(options.model).resolve(), options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if options.layers:
        base = first_layers(base, work / f"{base.name}-{options.layers}", options.layers)
    if not (base / "tokenizer.json").exists():
        write_tokenizer(base)
    adapter, output, kind = work / "adapter", work / "exported", options.gguf_type
    write_random_adapter(adapter, base, "nf4")
    results: dict[str, Any] = {"model": options.model, "layers": options.layers, "type": kind, "exports": {}}
    made = results["exports"]
    for rows in [*([] if options.only_rows else ["none"]), *([str(options.rows.resolve())] if options.rows else [])]:
        name = "none" if rows == "none" else "rows"
        say(f"{kind}, {'the nearest codes' if rows == 'none' else 'made with rows'}")
        made[name] = in_fresh_process(export_here, adapter=adapter, output=output, kind=kind, rows=rows)
        save_results(options.json, results)
    if "rows" in made:
        results["products"] = in_fresh_process(products_here, base=base, tokens=made["rows"]["tokens"])
    if "none" in made and importlib.util.find_spec("llama_cpp") is not None:
        say("f16, for llama.cpp's quantizer")
        in_fresh_process(export_here, adapter=adapter, output=output, kind="f16", rows="none")
        (exact,) = output.glob("*.gguf")
        results["llama_cpp"] = in_fresh_process(llama_cpp_here, exact=exact, kind=kind,
                                                threads=made["none"]["threads"])  # fmt: skip
    shutil.rmtree(output, ignore_errors=True)
    return results


def show(results: dict[str, Any]) -> None:
    theirs, products = results.get("llama_cpp"), results.get("products")
    rows = [("", "seconds", "against", "GB over the interpreter's", "limits")]
    for name, one in results["exports"].items():
        bare = None
        if name == "none" and theirs:
            bare = theirs["seconds"]
        elif name == "rows" and products:
            bare = products["layers"] * (products["products"] + products["moments"])
        rows.append((name, f"{one['seconds']:.1f}", f"{bare:.1f} ({one['seconds'] / bare:.2f} x)" if bare else "",
                     f"{one['over_interpreter_bytes'] / 1e9:.2f}", f"{TIME_LIMIT} x, {MEMORY_LIMITS[name] / 1e9} GB"))
    show_table(rows)
