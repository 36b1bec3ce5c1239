"""`qlora-tool export-merged`."""

from __future__ import annotations

from typing import Any

import click

from qlora_tool.cli import ToolCommand
from qlora_tool.cli.options import base_options, base_options_of

_FORMATS = ("safetensors", "gguf", "adapter", "adapter-portable", "nf4")


@click.command(
    cls=ToolCommand,
    examples="""
    qlora-tool export-merged runs/my-model --output-dir merged/my-model
    qlora-tool export-merged runs/my-model --output-dir my-gguf --format gguf --gguf-type q8_0
    qlora-tool export-merged peft-adapter --quantization nf4 --output-dir merged/other
    """,
    groups={
        "What the files hold": ("base", "dtype", "file_format", "gguf_type", "max_shard_size"),
        "Verification": ("verify", "verify_data"),
        "An adapter made elsewhere": ("model", "quantization", "double_quant"),
    },
)
@click.argument("run_or_adapter")
@click.option("--output-dir", required=True, metavar="DIR", help="Where the model goes; must not exist.")
@click.option("--base", type=click.Choice(["dequantized", "original"]), default="dequantized", show_default=True,
              help="Merge onto what was trained against, or onto the original 16-bit weights.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["auto", "bfloat16", "float16", "float32"]), default="auto",
              show_default=True, help="Of the files; auto takes what keeps more: float16 where every value fits and "
              "the model's family can be multiplied in it.")  # fmt: skip
@click.option("--format", "file_format", type=click.Choice(_FORMATS), default="safetensors", show_default=True,
              help="A model folder, a file for llama.cpp and Ollama, the adapter alone (plain or portable), or "
              "quantized by bitsandbytes again.")  # fmt: skip
@click.option("--gguf-type", type=click.Choice(["f16", "bf16", "q8_0"]), default="f16", show_default=True,
              help="Of the weights in a GGUF file.")  # fmt: skip
@click.option("--max-shard-size", default="5GB", show_default=True, metavar="SIZE", help="Bytes of one file at most.")
@click.option("--verify/--no-verify", default=True, show_default=True,
              help="Hold the files against the model that was trained, token by token, before they get their name.")
@click.option("--verify-data", metavar="FILE", help="Rows for that; by default the run's evaluation rows.")
@click.option("--overwrite", is_flag=True, help="Replace an existing folder.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False), metavar="FILE",
              help="Write what was done as JSON.")  # fmt: skip
@click.option("--push-to-hub", "repo", metavar="REPO", help="Upload the folder, too, as OWNER/NAME.")
@base_options
def export_merged(run_or_adapter: str, output_dir: str, base: str, dtype: str, file_format: str, gguf_type: str,
                  max_shard_size: str, verify: bool, verify_data: str | None, overwrite: bool, json_file: str | None,
                  repo: str | None, **options: Any) -> None:  # fmt: skip
    """Merge an adapter into its base: W = dequantize(W₄) + Δ, a model that plain transformers loads.

    RUN_OR_ADAPTER is a run's folder, or an adapter's, ours or PEFT's. The files grow in a hidden folder beside DIR and
    are named when they are whole and verified; interrupted, the same command goes on where it stopped.
    """
    from pathlib import Path

    from qlora_tool.cli.logs import log_to_stderr
    from qlora_tool.config import parse_size
    from qlora_tool.errors import UserError

    log_to_stderr()
    try:
        size = parse_size(max_shard_size)
    except UserError as error:
        raise UserError(f"--max-shard-size: {error}") from error
    if repo:
        from qlora_tool.export.upload import refuse_bad_name

        refuse_bad_name(repo)
    from qlora_tool.artifacts import find_artifact
    from qlora_tool.export.write import ExportOptions
    from qlora_tool.export.write import export_merged as export
    from qlora_tool.files.atomic import write_json

    artifact = find_artifact(run_or_adapter, base_options_of(options))
    how = ExportOptions(base, dtype, size, overwrite, file_format, gguf_type, verify, verify_data)
    result = export(artifact, Path(output_dir), how)
    proof = result.pop("proof")
    if json_file:
        write_json(Path(json_file), result)
    click.echo("\n".join(_report(result, proof)))
    if repo:
        from qlora_tool.export.upload import push_to_hub

        click.echo(f"uploaded: {push_to_hub(Path(output_dir), repo)}")
    click.echo(f"next: {_next(result)}")


def _report(result: dict[str, Any], proof: Any) -> list[str]:
    """What was written and how it was proven, for the terminal."""
    dtype, form = result["dtype"], result["format"]
    kind = {"nf4": f"nf4 and {dtype}", "adapter": "an adapter", "adapter-portable": "an adapter"}.get(form, dtype)
    lines = [f"{result['output_dir']}: {result['bytes'] / 1e9:.2f} GB of {kind} in {len(result['files'])} file(s), "
             f"{result['seconds']:.0f} s"]  # fmt: skip
    if form == "safetensors":
        lines.append(f"dtype {dtype}: {result['dtype_reason']}")
    if proof is None:
        return [*lines, f"not verified: {result['verification']['left_out']}"]
    return lines + proof.lines() + [f"warning: {line}" for line in proof.warnings()]


def _next(result: dict[str, Any]) -> str:
    folder = result["output_dir"]
    if result["format"] == "gguf":
        return f"ollama create {result['files'][0].removesuffix('.gguf').lower()} -f {folder}/Modelfile"
    return f"qlora-tool generate {folder} --prompt '...'"
