"""`qlora-tool export-merged`."""

from __future__ import annotations

import click

from qlora_tool.cli import ToolCommand
from qlora_tool.cli.options import base_options, base_options_of


@click.command(
    cls=ToolCommand,
    examples="""
    qlora-tool export-merged runs/my-model --output-dir merged/my-model
    qlora-tool export-merged peft-adapter --quantization nf4 --output-dir merged/other
    """,
    groups={"An adapter made elsewhere": ("model", "quantization", "double_quant")},
)
@click.argument("run_or_adapter")
@click.option("--output-dir", required=True, metavar="DIR", help="Where the model goes; must not exist.")
@click.option("--base", type=click.Choice(["dequantized", "original"]), default="dequantized", show_default=True,
              help="Merge onto what was trained against, or onto the original 16-bit weights.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["auto", "bfloat16", "float16", "float32"]), default="auto",
              show_default=True, help="Of the files; auto is the base's own.")  # fmt: skip
@click.option("--max-shard-size", default="5GB", show_default=True, metavar="SIZE", help="Bytes of one file at most.")
@click.option("--overwrite", is_flag=True, help="Replace an existing folder.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False), metavar="FILE",
              help="Write what was done as JSON.")  # fmt: skip
@base_options
def export_merged(run_or_adapter: str, output_dir: str, base: str, dtype: str, max_shard_size: str, overwrite: bool,
                  json_file: str | None, **options):  # fmt: skip
    """Merge an adapter into its base: W = dequantize(W₄) + Δ, a model that plain transformers loads.

    RUN_OR_ADAPTER is a run's folder, or an adapter's, ours or PEFT's.
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
    from qlora_tool.artifacts import find_artifact
    from qlora_tool.export.write import ExportOptions
    from qlora_tool.export.write import export_merged as export
    from qlora_tool.files import write_json

    artifact = find_artifact(run_or_adapter, base_options_of(options))
    result = export(artifact, Path(output_dir), ExportOptions(base, dtype, size, overwrite))
    if json_file:
        write_json(Path(json_file), result)
    click.echo(f"{result['output_dir']}: {result['bytes'] / 1e9:.2f} GB of {result['dtype']} in {len(result['files'])} "
               f"file(s), {result['seconds']:.0f} s")  # fmt: skip
    click.echo(f"next: qlora-tool generate {result['output_dir']} --prompt '...'")
