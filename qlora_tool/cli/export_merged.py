"""`qlora-tool export-merged`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

import click

from qlora_tool.choices import ComputeDtype, ExportBase, ExportFormat, GgufType
from qlora_tool.cli import ToolCommand
from qlora_tool.cli.options import NewFile, adapter_option, base_options
from qlora_tool.sizes import counted, file_size

if TYPE_CHECKING:
    from qlora_tool.export.write import ExportResult


@click.command(
    cls=ToolCommand,
    second="--output-dir",
    examples="""
    qlora-tool export-merged runs/my-model --output-dir merged/my-model
    qlora-tool export-merged runs/my-model --output-dir my-gguf --format gguf --gguf-type q4_k_m
    qlora-tool export-merged runs/my-model --output-dir my-lora --format gguf-adapter --with-base
    qlora-tool export-merged demo --adapter sums=runs/sums:0.7 --adapter poems=runs/poems:0.3 --output-dir merged/both
    qlora-tool export-merged peft-adapter --quantization nf4 --output-dir merged/other
    """,
    groups={
        "What the files hold": ("base", "dtype", "format", "gguf_type", "min_kept", "calibration", "with_base",
                                "max_shard_size"),
        "Verification": ("verify", "verify_data"),
        "An adapter made elsewhere": ("model", "quantization", "double_quant"),
    },
)
@click.argument("run_or_adapter")
@click.option("--output-dir", required=True, metavar="DIR", help="Where the model goes; must not exist.")
@adapter_option("Another adapter to add, times WEIGHT (1 where it is left out); repeatable.", "NAME=FOLDER[:WEIGHT]")
@click.option("--base", type=click.Choice(get_args(ExportBase)), default="auto", show_default=True,
              help="Merge onto what was trained against (dequantized), or onto the original 16-bit weights; auto: onto "
              "what was trained against, and for codes of few bits onto whichever of the two keeps more.")  # fmt: skip
@click.option("--dtype", type=click.Choice(get_args(ComputeDtype)), default="auto",
              show_default=True, help="Of the files; auto takes what keeps more: float16 where every value fits and "
              "the model's family can be multiplied in it.")  # fmt: skip
@click.option("--format", type=click.Choice(get_args(ExportFormat)), default="safetensors", show_default=True,
              help="A model folder, a file for llama.cpp and Ollama, the adapter alone (for them, plain or portable), "
              "or quantized by bitsandbytes again.")  # fmt: skip
@click.option("--gguf-type", type=click.Choice(get_args(GgufType)), default="f16", show_default=True,
              help="Of the weights in a GGUF file; auto: the smallest that keeps --min-kept.")  # fmt: skip
@click.option("--min-kept", type=float, metavar="SHARE",
              help="Of what training gained: take the smallest GGUF type that keeps so much, from --gguf-type on where "
              "that is given; 0.95 for auto.")  # fmt: skip
@click.option("--calibration", default="auto", show_default=True, metavar="auto|none|FILE",
              help="Rows that codes of few bits are made with: the run's own training rows, none, or a file's.")
@click.option("--with-base", is_flag=True,
              help="Beside a GGUF adapter, write the base that it was trained on as a GGUF file.")  # fmt: skip
@click.option("--max-shard-size", default="5GB", show_default=True, metavar="SIZE", help="Bytes of one file at most.")
@click.option("--verify/--no-verify", default=True, show_default=True,
              help="Hold the files against the model that was trained, token by token, before they get their name.")
@click.option("--verify-data", metavar="FILE", help="Rows for that; by default the run's evaluation rows.")
@click.option("--overwrite", is_flag=True, help="Replace an existing folder.")
@click.option("--json", type=NewFile(), metavar="FILE",
              help="Write what was done as JSON.")  # fmt: skip
@click.option("--push-to-hub", metavar="REPO", help="Upload the folder, too, as OWNER/NAME.")
@base_options
def export_merged(run_or_adapter: str, output_dir: str, **options: Any) -> None:
    """Merge an adapter into its base: W = dequantize(W₄) + Δ, a model that plain transformers loads.

    RUN_OR_ADAPTER is a run's folder, or an adapter's, ours or PEFT's. With --adapter a weighted sum is
    merged: RUN_OR_ADAPTER is part of it, of weight 1, or the base of all. The files grow in a hidden folder beside DIR
    and are named when they are whole and verified; interrupted, the same command goes on where it stopped.
    """
    from qlora_tool import api
    from qlora_tool.cli.logs import log_to_stderr

    log_to_stderr()
    result = api.export_merged(
        run_or_adapter, output_dir, **options, on_written=lambda written: click.echo("\n".join(_report(written)))
    )
    if result.uploaded:
        click.echo(f"uploaded: {result.uploaded}")
    click.echo(f"next: {_next(result)}")


def _report(result: ExportResult) -> list[str]:
    """What was written and how it was proven, for the terminal."""
    kinds = {"nf4": f"nf4 and {result.dtype}", "fp4": f"fp4 and {result.dtype}", "adapter": "an adapter",
             "adapter-portable": "an adapter",
             "gguf-adapter": f"an adapter{f' and its base in {result.dtype}' if result.dtype else ''}"}  # fmt: skip
    kind = kinds.get(result.format, result.dtype)
    files = counted(len(result.files), "file")
    lines = [f"{result.folder}: {file_size(result.bytes)} of {kind} in {files}, "
             f"{result.seconds:.0f} s"]  # fmt: skip
    if result.format == "safetensors":
        lines.append(f"dtype {result.dtype}: {result.dtype_reason}")
    if result.format == "gguf-adapter":
        lines += _of_gguf_adapter(result)
    for tried in result.facts.get("candidates", ()):
        lines.append(f"{tried['gguf_type']:>8}  {file_size(tried['bytes'])}  keeps {tried['gain_kept']:.1%}  KL "
                     f"{tried['mean_kl']:.2g}")  # fmt: skip
    if found := result.facts.get("encoding"):
        lines.append(_encoding(found))
    for reader, why in (result.facts.get("readers") or {}).items():
        lines.append(f"read by {reader}" if why is None else f"not read rightly by {reader}: {why}")
    if result.proof is None:
        return [*lines, f"not verified: {result.not_verified}"]
    return lines + result.proof.lines() + [f"warning: {line}" for line in result.proof.warnings()]


def _of_gguf_adapter(result: ExportResult) -> list[str]:
    """What the adapter's file holds, and which base it is for."""
    facts = result.facts["gguf_adapter"]
    ranks = " to ".join(str(r) for r in dict.fromkeys(facts["r"]))
    scaled = f"; scales of {facts['scaled']} of them worked into B, in fp32" if facts["scaled"] else ""
    held = (f"{facts['file']}: LoRA on {counted(facts['tensors'], 'tensor')} of a {facts['architecture']}, r {ranks}, "
            f"alpha {facts['alpha']:g}{scaled}")  # fmt: skip
    left = [f"warning: not in an adapter's file: {what}" for what in facts.get("left_to_base") or ()]
    return [held, f"its base: {facts['base']}", *left]


def _encoding(found: dict[str, Any]) -> str:
    """How codes of few bits were made."""
    made = "the nearest ones"
    if rows := found["calibration"]:
        plain = f", {found['plain_weights']} without" if found["plain_weights"] else ""
        weights = counted(found["calibrated_weights"], "weight")
        made = f"made with {rows['tokens']:,} tokens of {rows['rows']} ({weights}{plain})"
    others = {base: count for base, count in (found["tried_weights"] or {}).items() if base != found["started_from"]}
    but = "".join(f" ({count} of the first weights from the {base} one)" for base, count in others.items() if count)
    return f"codes start from the {found['started_from']} base with the update added{but}; {made}"


def _next(result: ExportResult) -> str:
    name = result.folder.name.lower()
    if result.format == "gguf":
        return f"ollama create {result.files[0].removesuffix('.gguf').lower()} -f {result.folder}/Modelfile"
    if result.format == "gguf-adapter" and len(result.files) > 1:
        return f"ollama create {name} -f {result.folder}/Modelfile"
    if result.format == "gguf-adapter":
        return f"llama-cli -m BASE.gguf --lora {result.folder}/{result.files[0]} -p '...'"
    return f"qlora-tool generate {result.folder} --prompt '...'"
