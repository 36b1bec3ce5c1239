"""How soon profile-memory answers for eleven models of 4B to 70B: 10 s, a plan 30 s (half an hour).

    tools/measure answers --json answers.json
    tools/measure answers --only Qwen3-8B --only gpt-oss-20b

Each answer is the command's own, from its start to its end, in a process and with a cache of its own; the models are
made of their config.json alone. The seconds to the first line stand beside. A command that gives no answer has not met
its limit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from making.recipe_models import MODELS

from measuring.processes import environment
from measuring.results import machine, passed_or_missed, say, show_table

LIMITS = {"answer": 10.0, "plan": 30.0}  # seconds
NAMES = (
    "meta-llama/Llama-2-7b-chat-hf", "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.3-70B-Instruct",
    "Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen3-8B", "Qwen/Qwen3-30B-A3B", "mistralai/Mistral-7B-Instruct-v0.3",
    "google/gemma-2-9b-it", "google/gemma-3-4b-it", "openai/gpt-oss-20b", "microsoft/Phi-4-mini-instruct",
)  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="a part of a model's name")
    parser.add_argument("--device-memory", default="24GB", help="of the card that the answer is for")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--json", type=Path, default=None, help="where to write the results")


def run(options: argparse.Namespace) -> dict[str, Any]:
    chosen = [name for name in NAMES if not options.only or any(part in name for part in options.only)]
    found = []
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            config = write_run(Path(folder), name, options.max_length)
            seconds = {}
            for what, more in (("answer", ()), ("plan", ("--plan",))):
                cache = Path(folder) / f"cache-{what}"
                seconds[what] = ask(config, cache, ("--device-memory", options.device_memory, *more))
                say(f"{name}: {what} in {seconds[what]['seconds']:.1f} s ({seconds[what]['said'] or 'no headline'})")
        found.append({"model": name, **seconds})
    return {"machine": machine(), "models": found, "passed": all(map(met, found))}


def met(one: dict[str, Any]) -> bool:
    """Whether a model's answers came, and in time."""
    return all(one[what]["said"] and one[what]["seconds"] <= limit for what, limit in LIMITS.items())


def write_run(folder: Path, name: str, max_length: int) -> Path:
    """A configuration of a model of which there is a config.json alone."""
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(MODELS[name]), encoding="utf-8")
    config = {"model": {"name_or_path": str(model), "quantization": "nf4", "double_quant": True},
              "adapter": {"r": 16, "lora_alpha": 32}, "data": {"train": "rows.jsonl", "max_length": max_length},
              "training": {"output_dir": "out"}}  # fmt: skip
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return file


def ask(config: Path, cache: Path, options: tuple[str, ...]) -> dict[str, Any]:
    """Ask for a prediction: how long it took, how long until the first line, and its headline."""
    command = [sys.executable, "-m", "qlora_tool", "profile-memory", str(config), *options]
    begin, first, lines = time.perf_counter(), None, []
    with subprocess.Popen(command, env=environment(QLORA_TOOL_CACHE=str(cache)), stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, cwd=os.fspath(config.parent)) as process:  # fmt: skip
        for line in process.stdout:
            first = first or time.perf_counter() - begin
            lines.append(line.rstrip())
    seconds = time.perf_counter() - begin
    # A run of which the weights alone do not fit is refused in a line, which is an answer, too.
    said = next((line for line in lines if line.startswith(("predicted: ", "error: --device-memory: "))), "")
    if process.returncode and not said:
        say("\n".join(lines[-5:]))
    return {"seconds": seconds, "first_line_seconds": first, "code": process.returncode, "said": said}


def show(results: dict[str, Any]) -> None:
    rows: list[tuple[str, ...]] = [("model", "answer, s", "first line, s", "plan, s", "first line, s", "")]
    for one in results["models"]:
        cells = [f"{one[what][key] or 0:.1f}" for what in LIMITS for key in ("seconds", "first_line_seconds")]
        rows.append((one["model"].partition("/")[2], *cells, passed_or_missed(met(one))))
    show_table(rows)
