"""`qlora-tool inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from qlora_tool.cli import ToolCommand
from qlora_tool.cli.options import NewFile, base_options

if TYPE_CHECKING:
    from qlora_tool.inspection.inspect import InspectResult


@click.command(
    cls=ToolCommand,
    examples="""
    qlora-tool inspect runs/my-model
    qlora-tool inspect runs/my-model --all --plot ranks.png --json ranks.json
    qlora-tool inspect runs/my-model --truncate 8 --output-dir runs/my-model-r8 --data held_out.jsonl
    """,
    groups={
        "A lower rank": ("truncate", "output_dir", "data", "overwrite"),
        "An adapter made elsewhere": ("model", "quantization", "double_quant"),
    },
)
@click.argument("run_or_adapter")
@click.option("--truncate", type=click.IntRange(min=1), metavar="R", help="Also write the adapter cut to this rank.")
@click.option("--output-dir", metavar="DIR", help="Where that goes; must not exist.")
@click.option("--data", metavar="FILE",
              help="Rows for the loss before and after; by default the run's evaluation rows.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace an existing folder.")
@click.option("--all", is_flag=True, help="A row for each module, not for each kind of module.")
@click.option("--json", type=NewFile(), metavar="FILE",
              help="Write all of it as JSON, singular values too.")  # fmt: skip
@click.option("--plot", type=NewFile(), metavar="FILE", help="Draw it into a .png file.")
@base_options
def inspect(run_or_adapter: str, **options: Any) -> None:
    """What an adapter learned: each update against its weight, its singular values, and what they say of its rank.

    RUN_OR_ADAPTER is a run's folder, or an adapter's, ours or PEFT's. Where the base is not on this machine, its norms
    are left out.
    """
    from qlora_tool import api
    from qlora_tool.cli.logs import log_to_stderr

    log_to_stderr()
    result = api.inspect(run_or_adapter, **options)
    from qlora_tool.inspection.table import lines_of

    click.echo("\n".join(lines_of(result.inspection)))
    click.echo("\n".join(_end(run_or_adapter, result)))


def _end(name: str, result: InspectResult) -> list[str]:
    """What was written, and what comes next."""
    if result.truncation is not None:
        folder = result.truncation.folder
        return ["", *result.truncation.lines(), f"next: qlora-tool export-merged {folder} --output-dir {folder}-merged"]
    found = result.inspection
    if found.early or not found.additive or not 0 < 2 * found.needed <= found.rank:
        return []
    return ["", f"next: qlora-tool inspect {name} --truncate {found.needed} --output-dir {name}-r{found.needed}"]
