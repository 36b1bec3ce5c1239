"""Memory, time and kills of an export: 1.5 GB, 1.3 x its parts, the same bytes (a 7B: 3 minutes).

The export runs in a process of its own: its memory, its time beside that of its parts, and what a kill leaves.

    tools/make random-model /tmp/llama7b --shape llama-2-7b
    tools/measure export-stream /tmp/llama7b --work /tmp/stream --json stream.json
    tools/measure export-stream demo --work /tmp/stream --kills 20

The adapter has random values (LoRA r 16 on every linear module). Memory is the process's resident set (VmHWM) over what
it was after the imports. The parts are timed alone, after the export and in a process of their own: reading the base's
tensors, quantizing, dequantizing and writing them (flushed), and beside them a plain copy of the exported files. Where
the cache has the quantized base (`keep_quantized`; --keep-quantized makes it so first) the export quantizes nothing,
and neither do the parts: they read that. The limits: 1.5 GB, and 1.3 times the sum of the parts but the copy.

The ratio is judged from 1 GB of exported files on. For less (the demo model: 0.27 GB) what an export does once, however
large the model is, outweighs the rest: building the model's skeleton, first use of the libraries, tokenizer and card.

--layers N exports the first N layers alone, to see that memory does not grow with the model. --kills N kills the
command with SIGKILL at N random moments and runs it again each time: the result has to be that of an undisturbed
export, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from measuring.command import add_model, add_outputs
from measuring.processes import environment, in_fresh_process, require_proc, resident_bytes
from measuring.results import passed_or_missed, say, show_sizes, show_table
from qlora_tool.errors import MachineError

MEMORY_LIMIT = 1_500_000_000  # bytes over the interpreter's own
TIME_LIMIT = 1.3  # times the sum of the parts
JUDGED_BYTES = 1_000_000_000  # of the files, from which on time is judged


def write_random_adapter(folder: Path, base: Path, quantization: str, rank: int = 16) -> None:
    """An adapter on every linear module but the output layer, as training leaves one, with random values."""
    import torch

    from qlora_tool.files.atomic import replacing_folder, write_json
    from qlora_tool.files.tensors import TensorSpec, write_tensors
    from qlora_tool.model.load import build_skeleton
    from qlora_tool.model.slots import is_linear
    from qlora_tool.model.source import read_model_config

    model = build_skeleton(read_model_config(base))
    output = model.get_output_embeddings()
    tensors, generator = {}, torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        if is_linear(module) and module is not output:
            out, width = module.weight.shape if isinstance(module, torch.nn.Linear) else module.weight.shape[::-1]
            for part, shape in (("A", (rank, width)), ("B", (out, rank))):
                values = torch.randn(shape, generator=generator) * (width**-0.5 if part == "A" else 1e-3)
                tensors[f"base_model.model.{name}.lora_{part}.weight"] = values.bfloat16()
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": rank,
                "lora_alpha": 2 * rank, "lora_dropout": 0.0, "target_modules": "all-linear"}  # fmt: skip
    origin = {"base": {"name_or_path": str(base), "revision": None}, "quantization": quantization,
              "double_quant": True, "method": "lora"}  # fmt: skip
    with replacing_folder(folder) as temporary:
        write_tensors(temporary / "adapter_model.safetensors", specs, tensors.items(), {"format": "pt"})
        write_json(temporary / "adapter_config.json", settings)
        write_json(temporary / "qlora_tool.json", origin)


def first_layers(base: Path, folder: Path, layers: int) -> Path:
    """The model without its later layers: the same tensors, written again."""
    from qlora_tool.files.atomic import replacing_folder, write_json
    from qlora_tool.files.tensors import SINGLE_NAME, Checkpoint, TensorSpec, write_tensors

    def belongs(name: str) -> bool:
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        return not numbers or numbers[0] < layers

    checkpoint = Checkpoint(base)
    names = [name for name in checkpoint if belongs(name)]
    specs = [TensorSpec(name, checkpoint[name].dtype, checkpoint[name].shape) for name in names]
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    with replacing_folder(folder) as temporary:
        stream = ((name, checkpoint.read(name)) for name in names)
        write_tensors(temporary / SINGLE_NAME, specs, stream, {"format": "pt"})
        write_json(temporary / "config.json", config | {"num_hidden_layers": layers})
    return folder


def export_here(adapter: str, output: str, dtype: str) -> dict[str, Any]:
    """Export in this process, which has done nothing else.

    Returns:
        Seconds and bytes.
    """
    import accelerate  # noqa: F401 -- what an export imports counts as before it
    import torch
    from transformers import AutoModelForCausalLM  # noqa: F401

    from qlora_tool.artifacts import BaseOptions, find_artifact
    from qlora_tool.export.options import ExportOptions
    from qlora_tool.export.write import export_merged
    from qlora_tool.files.hashes import file_hashes
    from qlora_tool.model.load import build_skeleton  # noqa: F401

    artifact = find_artifact(adapter, BaseOptions())
    started = time.perf_counter()
    file_hashes(Path(artifact.model.name_or_path))  # training keeps them; here it is timed apart
    hashed = time.perf_counter()
    before = resident_bytes("VmRSS")
    result = export_merged(artifact, Path(output), ExportOptions(dtype=dtype))
    return {
        "hash_seconds": hashed - started,
        "seconds": time.perf_counter() - hashed,
        "threads": torch.get_num_threads(),
        "dtype": result.dtype,
        "bytes": result.bytes,
        "files": len(result.files),
        "rss_before_bytes": before,
        "rss_peak_bytes": resident_bytes("VmHWM"),
    }


def cache_here(base: str, quantization: str) -> dict[str, Any]:
    """Leave the quantized base in the cache, as a run with `keep_quantized` does."""
    from qlora_tool.build.open import open_model
    from qlora_tool.config import ModelConfig

    open_model(ModelConfig(name_or_path=base, quantization=quantization, device="cpu", keep_quantized=True))
    return {}


def parts_here(base: str, output: str, work: str, quantization: str) -> dict[str, float]:
    """The seconds that each part of an export takes alone, over all tensors, in this process; without `quantize` where
    the quantized base is in the cache."""
    import torch

    from qlora_tool.export.write import find_cached_base
    from qlora_tool.files.tensors import Checkpoint
    from qlora_tool.model.load import build_skeleton
    from qlora_tool.model.slots import Quantization, find_slots, quantize_parameter
    from qlora_tool.model.source import read_model_config
    from qlora_tool.weights.quantized import disk_group, from_disk

    how = Quantization(quantization)
    cached = find_cached_base(Path(base), how) or {}
    seconds = dict.fromkeys(("read", *(() if cached else ("quantize",)), "dequantize", "write", "copy"), 0.0)

    def timed(part: str, call: Any) -> Any:
        started = time.perf_counter()
        value = call()
        seconds[part] += time.perf_counter() - started
        return value

    slots = find_slots(build_skeleton(read_model_config(Path(base))))
    checkpoint, exported = Checkpoint(Path(base)), Checkpoint(Path(output))
    for name in checkpoint:
        if parts := disk_group(name, cached):
            stored = timed("read", lambda parts=parts: {part: cached.read(part) for part in parts})
            timed("dequantize", lambda name=name, stored=stored: from_disk(name, stored).dequantize(torch.float32))
            continue
        value = timed("read", lambda name=name: checkpoint.read(name))
        if name in slots:
            weight = timed("quantize", lambda name=name, value=value: quantize_parameter(name, value, slots[name], how))
            timed("dequantize", lambda weight=weight: weight.dequantize(torch.float32))
    scratch = Path(work) / "scratch"
    with scratch.open("wb") as stream:
        unsaved = 0
        for name in exported:
            tensor = exported.read(name)  # not part of writing
            data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
            timed("write", lambda data=data, stream=stream: stream.write(data))
            unsaved += len(data)
            if unsaved >= 256 << 20:
                timed("write", lambda stream=stream: (stream.flush(), os.fsync(stream.fileno())))
                unsaved = 0
        timed("write", lambda stream=stream: (stream.flush(), os.fsync(stream.fileno())))
    scratch.unlink()
    for file in exported.files:
        timed("copy", lambda file=file: _copy(file, scratch))
        scratch.unlink()
    return seconds


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    descriptor = os.open(target, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def measure(base: Path, adapter: Path, options: argparse.Namespace) -> dict[str, Any]:
    output, quantization = options.work / "exported", options.quantization
    shutil.rmtree(output, ignore_errors=True)
    if options.keep_quantized:
        in_fresh_process(cache_here, base=base, quantization=quantization)
    export = in_fresh_process(export_here, adapter=adapter, output=output, dtype=options.dtype)
    parts = in_fresh_process(parts_here, base=base, output=output, work=options.work, quantization=quantization)
    shutil.rmtree(output)
    return judge({**export, "parts_seconds": parts})


def judge(figures: dict[str, Any]) -> dict[str, Any]:
    """The memory over the interpreter's own, the ratio of times, and whether both are within the limits."""
    over = figures["rss_peak_bytes"] - figures["rss_before_bytes"]
    ratio = figures["seconds"] / sum(seconds for part, seconds in figures["parts_seconds"].items() if part != "copy")
    time_judged = figures["bytes"] >= JUDGED_BYTES
    passed = over <= MEMORY_LIMIT and (ratio <= TIME_LIMIT or not time_judged)
    return {
        **figures,
        "kept_base": "quantize" not in figures["parts_seconds"],
        "over_interpreter_bytes": over,
        "time_ratio": round(ratio, 3),
        "time_judged": time_judged,
        "passed": passed,
    }


def show(results: dict[str, Any]) -> None:
    if "kills" in results:
        print(f"{results['kills']} kills, {results['while_growing']} of them while files were growing: "
              f"{results['differing']} results differ")  # fmt: skip
        return
    show_sizes(f"{results['model']}, {results['bytes'] / 1e9:.2f} GB of {results['dtype']}", {
        "RSS after the imports": results["rss_before_bytes"], "peak RSS": results["rss_peak_bytes"],
        "over the interpreter's own": results["over_interpreter_bytes"], "limit": MEMORY_LIMIT,
    })  # fmt: skip
    parts = " + ".join(part for part in results["parts_seconds"] if part != "copy")
    show_table([("seconds", ""), *((part, f"{took:.2f}") for part, took in results["parts_seconds"].items()),
                ("export", f"{results['seconds']:.2f}"), ("(hashing the base, once)", f"{results['hash_seconds']:.2f}"),
                (f"export / ({parts})", f"{results['time_ratio']:.2f}"),
                ("limit", f"{TIME_LIMIT}" if results["time_judged"] else "none")])  # fmt: skip
    if results["kept_base"]:
        print("the quantized base was in the cache: nothing to quantize, in the export or beside it")
    if not results["time_judged"]:
        print(f"below {JUDGED_BYTES / 1e9:.0f} GB the fixed start-up outweighs the parts: the ratio is not judged")
    print(passed_or_missed(results["passed"]), flush=True)


def kill_and_go_on(adapter: Path, work: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill the command at random moments, run it again, and compare with an undisturbed export.

    Returns:
        How many kills there were, how many came while files were growing, and how many results differed.
    """
    output, expected_folder = work / "model", work / "undisturbed" / "model"
    shutil.rmtree(expected_folder, ignore_errors=True)
    command = [sys.executable, "-m", "qlora_tool", "export-merged", str(adapter), "--output-dir", output.name,
               "--no-verify", "--max-shard-size", "20MB"]  # fmt: skip

    def start(folder: Path) -> subprocess.Popen:
        folder.mkdir(parents=True, exist_ok=True)
        return subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.DEVNULL)

    def finish(process: subprocess.Popen) -> None:
        if process.wait() != 0:
            raise MachineError(f"export: ended with exit code {process.returncode}; the reason stands above")

    started = time.perf_counter()
    finish(start(expected_folder.parent))
    undisturbed = time.perf_counter() - started
    expected = contents(expected_folder)
    moments = random.Random(seed)
    killed = growing = differing = 0
    while killed < kills:
        shutil.rmtree(output, ignore_errors=True)
        process = start(work)
        time.sleep(moments.uniform(0, undisturbed))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if output.exists():  # it was faster this time; its last breath was taken
            differing += contents(output) != expected
            continue
        killed += 1
        growing += (work / f".{output.name}.partial").exists()
        finish(start(work))
        differing += contents(output) != expected or (work / f".{output.name}.partial").exists()
        say(f"kill {killed}: {'the same' if not differing else 'DIFFERS'}")
    return {"kills": killed, "while_growing": growing, "differing": differing, "passed": not differing}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="for adapters and exports")
    parser.add_argument("--quantization", choices=("nf4", "fp4", "int8"), default="nf4")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto")
    parser.add_argument("--keep-quantized", action="store_true", help="leave the quantized base in the cache first")
    parser.add_argument("--layers", type=int, help="export the first layers alone")
    parser.add_argument("--kills", type=int, default=0, help="kill it at so many random moments instead of measuring")
    parser.add_argument("--seed", type=int, default=0, help="of those moments")
    add_outputs(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    require_proc()
    from qlora_tool.model.source import resolve

    base = resolve(options.model).resolve()
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.layers:
        base = first_layers(base, options.work / f"{base.name}-{options.layers}", options.layers)
    adapter = options.work / "adapter"
    write_random_adapter(adapter, base, options.quantization)
    if options.kills:
        figures = kill_and_go_on(adapter, options.work, options.kills, options.seed)
    else:
        figures = measure(base, adapter, options)
    return {"model": options.model, "layers": options.layers, **figures}
