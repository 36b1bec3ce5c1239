"""What files of few bits keep of a run, made with rows and without: KL, loss, answers (an hour).

Of one run, an export of every type, made with the rows that it was trained on and without, onto either base. Each is
loaded by plain transformers, which decodes GGUF by itself, and held against the live model (the quantized base with its
adapter, products in fp32) on the rows of --eval, and on those of --other, which the run was not trained on. Where
llama-cpp-python is installed, its own quantizer's file of our f16 stands beside ours.

    tools/measure few-bits runs/shell --eval EVAL.jsonl --other OTHER.jsonl --work FOLDER --json few_bits.json
    tools/measure few-bits runs/orders --eval EVAL.jsonl --answers FRESH.jsonl --types f16 nf4 q4_k_m --work FOLDER

Each export is a cell of its own in --work: what is stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measuring.command import add_outputs, at_least
from measuring.results import mb, say, show_table
from qlora_tool.files.atomic import write_json

TYPES = ("f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "iq4_nl", "q4_0", "nf4")
EXACT = ("f16", "q8_0")  # no codes of few bits: rows and bases are not tried
THEIRS = {"q4_0": 2, "q8_0": 7, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18, "iq4_nl": 25}  # llama.cpp's numbers of types


def cells_of(types: list[str], bases: list[str], theirs: bool) -> Iterator[tuple[str, str, str]]:
    """(type, base, rows) of each file; rows are `auto`, `none`, or `llama.cpp` for its own quantizer."""
    for kind in types:
        if kind in EXACT:
            yield kind, "auto", "none"
            continue
        if theirs and kind in THEIRS:
            yield kind, "dequantized", "llama.cpp"
        for rows in ("none", "auto"):
            for base in bases:
                yield kind, base, rows


class Live:
    """The model that was trained, and what it predicts for the rows.

    Args:
        run: a run's folder.
        files: of rows, by name.
        max_tokens: of each.
        answers: a file of conversations to answer, or None.
    """

    def __init__(self, run: Path, files: dict[str, Path], max_tokens: int, answers: Path | None, limit: int | None):
        from transformers import AutoTokenizer

        from qlora_tool.artifacts import BaseOptions, base_folder
        from qlora_tool.export.proof import open_live
        from qlora_tool.export.rows import find_rows
        from qlora_tool.export.verify import choose_rows, predict, trained_loss
        from qlora_tool.inference.named import find_named
        from qlora_tool.weights.modules import Adaptable

        self.artifact = find_named(run, BaseOptions(), adapter=(), weighted=True).summed()
        self.rows = {name: choose_rows(find_rows(self.artifact, str(file))[0], max_tokens)
                     for name, file in files.items()}  # fmt: skip
        model = open_live(self.artifact)
        self.predictions = {name: predict(model, rows) for name, rows in self.rows.items()}
        self.tokenizer = AutoTokenizer.from_pretrained(base_folder(self.artifact), padding_side="left")
        self.asked = answers and (answers, limit)
        self.answered = self._answers(model.module)
        for module in model.module.modules():
            if isinstance(module, Adaptable):
                module.set_adapters([])
        self.untuned = {name: trained_loss(predict(model, rows), rows) for name, rows in self.rows.items()}

    def compared(self, module: Any) -> dict[str, Any]:
        """How a model in fp32 compares."""
        from qlora_tool.export.verify import compare, predict
        from qlora_tool.model.causal_lm import CausalLM
        from qlora_tool.model.slots import Quantization

        model = CausalLM(module, Path(), Quantization("none", False), module.dtype)
        found = {}
        for name, rows in self.rows.items():
            agreement = compare(self.predictions[name], predict(model, rows), rows)
            agreement = dataclasses.replace(agreement, untuned_loss=self.untuned[name])
            found[name] = dataclasses.asdict(agreement) | {"gain_kept": agreement.gain_kept}
        return {"rows": found, "exact_match": self._answers(module)}

    def _answers(self, module: Any) -> float | None:
        if not self.asked:
            return None
        from measuring.exact_match import measure

        return measure(module, self.tokenizer, *self.asked)["exact_match"]


def made(run: Path, kind: str, base: str, rows: str, folder: Path) -> dict[str, Any]:
    """An export, unverified: what is measured of it comes from plain transformers alone."""
    from qlora_tool.api import export_merged

    if rows == "llama.cpp":
        return made_by_llama_cpp(run, kind, base, folder)
    form = {"format": kind} if kind in ("nf4", "fp4") else {"format": "gguf", "gguf_type": kind}
    started = time.perf_counter()
    result = export_merged(run, folder, base=base, calibration=rows, verify=False, overwrite=True, **form)
    encoding = result.facts.get("encoding") or {}
    return {"seconds": time.perf_counter() - started, "bytes": result.bytes, "base": result.base,
            "rows_tokens": (encoding.get("calibration") or {}).get("tokens")}  # fmt: skip


def made_by_llama_cpp(run: Path, kind: str, base: str, folder: Path) -> dict[str, Any]:
    """The same by llama.cpp's quantizer, from our f16 file."""
    import llama_cpp

    made(run, "f16", base, "none", folder)
    (exact,) = folder.glob("*.gguf")
    file = folder / "quantized"
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = THEIRS[kind], 2
    started = time.perf_counter()
    if llama_cpp.llama_model_quantize(bytes(exact), bytes(file), settings):
        raise OSError(1, "llama.cpp's quantizer failed", str(file))
    file.replace(exact)
    return {"seconds": time.perf_counter() - started, "bytes": exact.stat().st_size, "base": base, "rows_tokens": None}


def loaded(folder: Path) -> Any:
    """The files as plain transformers reads them, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    from qlora_tool.export.proof import exported_model

    if file := next(folder.glob("*.gguf"), None):
        return AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32).eval()
    with exported_model(folder, torch.device("cpu")) as model:
        return model.module


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--eval", type=Path, required=True, metavar="FILE", help="rows of its task, held out")
    parser.add_argument("--other", type=Path, metavar="FILE", help="rows of another task")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="messages whose last answer is to be met exactly")
    parser.add_argument("--limit", type=at_least(1), help="of --answers, only the first rows")
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="where cells are kept")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=TYPES, metavar="TYPE",
                        help=f"default: {' '.join(TYPES)}")  # fmt: skip
    parser.add_argument("--bases", nargs="+", default=("dequantized", "original"), metavar="BASE",
                        choices=("dequantized", "original", "auto"), help="default: dequantized original")  # fmt: skip
    parser.add_argument("--max-tokens", type=at_least(1), default=5000, help="of each file of rows (default: 5000)")
    add_outputs(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    options.work.mkdir(parents=True, exist_ok=True)
    files = {"own": options.eval} | ({"other": options.other} if options.other else {})
    live = Live(options.run, files, options.max_tokens, options.answers, options.limit)
    cells, theirs = [], importlib.util.find_spec("llama_cpp") is not None
    for kind, base, rows in cells_of(options.types, options.bases, theirs):
        file, folder = options.work / f"{kind}-{base}-{rows}.json", options.work / "export"
        if not file.exists():
            found = made(options.run, kind, base, rows, folder)
            with torch.inference_mode():
                write_json(file, found | live.compared(loaded(folder)))
            shutil.rmtree(folder)
        cells.append({"type": kind, "asked": base, "made_with": rows} | json.loads(file.read_text(encoding="utf-8")))
        say(f"{kind} {base} {rows}: {cells[-1]['rows']['own']['mean_kl']:.3g}")
    own = next(iter(cells))["rows"]["own"]
    return {"run": options.run.name, "untuned": live.untuned, "live_loss": own["live_loss"],
            "live_exact_match": live.answered, "tokens": {name: rows.tokens for name, rows in live.rows.items()},
            "cells": cells}  # fmt: skip


def show(results: dict[str, Any]) -> None:
    print(f"loss {results['untuned']['own']:.3f} untuned, {results['live_loss']:.3f} trained; tokens: "
          + ", ".join(f"{count:,} {name}" for name, count in results["tokens"].items()))  # fmt: skip
    if results["live_exact_match"] is not None:
        print(f"exact match of the live model: {results['live_exact_match']:.1%}")
    rows: list[list[object]] = [["file", "MB", "base", "made with", "KL", "same token", "loss", "kept", "exact",
                                 "KL, other", "loss, other", "(live)", "s"]]  # fmt: skip
    for cell in results["cells"]:
        own, other = cell["rows"]["own"], cell["rows"].get("other")
        made_with = f"{cell['rows_tokens']:,} tokens" if cell["rows_tokens"] else re.sub("none", "-", cell["made_with"])
        rows.append([
            cell["type"], mb(cell["bytes"]), cell["base"], made_with, f"{own['mean_kl']:.3g}",
            f"{own['argmax_agreement']:.1%}", f"{own['exported_loss']:.3f}",
            "-" if own["gain_kept"] is None else f"{own['gain_kept']:.1%}",
            "-" if cell["exact_match"] is None else f"{cell['exact_match']:.1%}",
            *((f"{other['mean_kl']:.3g}", f"{other['exported_loss']:.3f}", f"{other['live_loss']:.3f}")
              if other else "---"),
            f"{cell['seconds']:.0f}",
        ])  # fmt: skip
    show_table(rows)
