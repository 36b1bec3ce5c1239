"""Each export, and PEFT's merge, against the live model: KL, loss (a base: some 15 minutes).

An adapter is trained, and what is written of it held against the live model:

    tools/measure export demo --train rows.jsonl --eval held_out.jsonl --work /tmp/check

For each quantization the run is trained once and stays in the work folder. The files of each export, rounded to their
dtype, are loaded by plain transformers, multiplied in fp32, and compared token by token with the quantized base and the
adapter on it; so are PEFT's own `merge_and_unload` and the untuned base. Asked for: mean KL and the share of equal
likeliest tokens within the limits of the file's dtype.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measuring.command import add_model, add_outputs
from measuring.ours import model_folder, padded_batch, read_rows
from measuring.results import say, show_table
from measuring.sides import PeftSide, quantized_by_transformers, quiet_transformers
from qlora_tool.config import Config, with_values
from qlora_tool.run_folder import RunFolder

if TYPE_CHECKING:
    from qlora_tool.artifacts import Artifact
    from qlora_tool.export.verify import Predictions, Rows

METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True, "rank_pattern": {"q_proj": 8, "down_proj": 32}, "alpha_pattern": {"v_proj": 64}},
    "dora": {"method": "dora"},
}
# Mean KL at most and argmax agreement at least, for files merged onto what was trained against.
LIMITS = {"bfloat16": (5e-4, 0.975), "float16": (5e-6, 0.999), "float32": (1e-6, 0.999)}


def check(options: argparse.Namespace, quantization: str) -> list[dict[str, Any]]:
    """Every export of one run against its live model."""
    import torch

    from qlora_tool.artifacts import BaseOptions, find_artifact
    from qlora_tool.build.open import open_model
    from qlora_tool.export.proof import exported_model, give_back, measure_update, open_live
    from qlora_tool.export.verify import choose_rows, compare, predict

    config = configuration(options, quantization)
    folder = model_folder(config)
    named = BaseOptions(str(folder), quantization, quantization != "int8", "cpu", "float32")
    artifact = find_artifact(str(trained(options, config)), named)
    rows = choose_rows(read_rows(options.eval, folder, "--eval").examples, options.tokens)
    exports = options.work / quantization / "exports"
    written = dict(write_exports(artifact, exports))
    with timed(f"{quantization}: live model"):
        model = open_live(artifact)
        updates = {name: measure_update(model, output) for name, (output, _) in written.items()}
        live = predict(model, rows)
        del model
        give_back()
    results = []

    def report(name: str, found: Predictions, **more: Any) -> None:
        results.append({"quantization": quantization, "export": name, **asdict(compare(live, found, rows)), **more})
        say(f"# {results[-1]}")

    for name, (output, dtype) in written.items():
        with timed(f"{quantization}: {name}"), exported_model(output, torch.device("cpu")) as exported:
            report(name, predict(exported, rows), dtype=dtype, update=asdict(updates[name]))
            found, (kl, argmax) = results[-1], LIMITS[dtype]
            exact = found["mean_kl"] <= kl and found["argmax_agreement"] >= argmax
            found["passed"] = None if "original" in name else exact
        give_back()
    shutil.rmtree(exports)
    with timed(f"{quantization}: PEFT's merge and the untuned base"):
        report("PEFT merge_and_unload", merged_by_peft(config, artifact, rows), passed=None)
        give_back()
        report("(untuned base)", predict(open_model(artifact.model), rows), passed=None)
    give_back()
    return results


def write_exports(artifact: Artifact, folder: Path) -> Iterator[tuple[str, tuple[Path, str]]]:
    """Each export by name: its folder and dtype. What `auto` takes is not written a second time."""
    auto = export(artifact, folder / "auto", "dequantized", "auto")
    yield f"{auto} (auto)", (folder / "auto", auto)
    for dtype in ("bfloat16", "float16", "float32"):
        if dtype != auto:
            yield dtype, (folder / dtype, export(artifact, folder / dtype, "dequantized", dtype))
    original = folder / "original"
    yield "float32 on the original base", (original, export(artifact, original, "original", "float32"))


def export(artifact: Artifact, output: Path, base: str, dtype: str) -> str:
    from qlora_tool.export.options import ExportOptions
    from qlora_tool.export.write import export_merged

    return export_merged(artifact, output, ExportOptions(base=base, dtype=dtype, overwrite=True)).dtype


def configuration(options: argparse.Namespace, quantization: str) -> Config:
    """The run's; the base is read in fp32 and, apart from training here, multiplied in it."""
    adapter = {f"adapter.{key}": value for key, value in METHODS[options.method].items()}
    return with_values(Config(), {
        "model.name_or_path": options.model, "model.quantization": quantization, "model.device": "cpu",
        "adapter.r": 16, **adapter, "data.train": options.train, "data.eval": options.eval, "data.max_length": 512,
        "data.packing": False, "data.shuffle": False, "training.max_steps": options.steps, "training.warmup_steps": 0,
        "training.learning_rate": 5e-4, "training.per_device_train_batch_size": options.batch,
        "training.lr_scheduler_type": "constant", "training.weight_decay": 0.01, "training.max_grad_norm": 0.0,
        "training.gradient_checkpointing": False, "training.logging_steps": 5,
    })  # fmt: skip


def trained(options: argparse.Namespace, config: Config) -> Path:
    """The run of this quantization, or PEFT's adapter, from the work folder where it is already there."""
    quantization = config.model.quantization
    run = options.work / quantization / ("run" if options.method == "lora" else f"run-{options.method}")
    if options.trained_by == "peft":
        return trained_with_peft(config, run.with_name(f"peft-{options.method}"))
    if not RunFolder(run).is_finished():
        from qlora_tool.training.loop import train

        with timed(f"{quantization}: {options.steps} steps"):
            train(with_values(config, {"training.output_dir": str(run)}), overwrite=run.exists())
    steps = RunFolder(run).config().training.max_steps
    if steps != options.steps:
        say(f"# {run}: there from before, of {steps} steps")
    return run


def trained_with_peft(config: Config, adapter: Path) -> Path:
    if (adapter / "adapter_config.json").exists():
        return adapter
    config = in_fp32(config)
    side = PeftSide(config)
    examples = read_rows(config.data.train, model_folder(config)).examples
    size = config.training.per_device_train_batch_size
    for step in range(config.training.max_steps):
        side.step(padded_batch(examples[step * size : (step + 1) * size]))
    side.save(adapter)
    return adapter


def in_fp32(config: Config) -> Config:
    return with_values(config, {"model.compute_dtype": "float32"})


def merged_by_peft(config: Config, artifact: Artifact, rows: Rows) -> Predictions:
    """What PEFT's `merge_and_unload`, which quantizes the merged weights again, predicts."""
    import torch
    from peft import PeftModel

    from qlora_tool.export.verify import predict
    from qlora_tool.model.causal_lm import CausalLM
    from qlora_tool.model.slots import Quantization

    base = quantized_by_transformers(in_fp32(config))
    merged = PeftModel.from_pretrained(base, artifact.adapter.folder).merge_and_unload()
    merged.train()  # in eval bitsandbytes may take products in bf16; there is no dropout in it
    quantization = Quantization(artifact.model.quantization, True)
    return predict(CausalLM(merged, model_folder(config), quantization, torch.float32), rows)


HEAD = ("base", "export", "mean KL", "worst KL", "same token", "loss", "live loss", "update kept", "its error", "")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    update = row.get("update") or {"kept": None, "error": None}
    mark = {None: "", True: "ok", False: "MISSED"}[row["passed"]]
    return (
        row["quantization"], row["export"], f"{row['mean_kl']:.2e}", f"{row['worst_kl']:.1e}",
        f"{row['argmax_agreement']:.2%}", f"{row['exported_loss']:.4f}", f"{row['live_loss']:.4f}",
        "" if update["kept"] is None else f"{update['kept']:.2%}",
        "" if update["error"] is None else f"{update['error']:.2g}", mark,
    )  # fmt: skip


@contextmanager
def timed(what: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    say(f"# {what}: {time.perf_counter() - started:.0f} s")


def show(results: dict[str, Any]) -> None:
    show_table([HEAD, *(cells(row) for row in results["results"])])


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--train", required=True, metavar="FILE", help="rows to train on")
    parser.add_argument("--eval", required=True, metavar="FILE", help="rows to compare on")
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="for runs, which stay, and exports")
    parser.add_argument("--quantization", nargs="*", default=["nf4", "int8"], choices=["nf4", "fp4", "int8"])
    parser.add_argument("--method", default="lora", choices=list(METHODS))
    parser.add_argument("--trained-by", default="qlora-tool", choices=["qlora-tool", "peft"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=5000, help="of the evaluation rows")
    add_outputs(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    quiet_transformers()
    results = [row for quantization in options.quantization for row in check(options, quantization)]
    return {"tokens": options.tokens, "method": options.method, "results": results,
            "passed": not any(row["passed"] is False for row in results)}  # fmt: skip
