"""`qlora-tool report`."""

from __future__ import annotations

import click

from qlora_tool.cli import ToolCommand
from qlora_tool.cli.options import NewFile


@click.command(
    cls=ToolCommand,
    examples="""
    qlora-tool report runs/my-model
    qlora-tool report runs/my-model --output my-model.html
    """,
)
@click.argument("run")
@click.option("--output", type=NewFile(), metavar="FILE", help="The file to write; by default RUN/report.html.")
def report(run: str, output: str | None) -> None:
    """Write the page about a run: losses, speed, memory, samples, rows, ranks, exports, configuration.

    RUN is a run's folder, finished or not. `train` writes the page at its end; make it again after an export. It is one
    file, which opens without a network and prints.
    """
    from qlora_tool import api
    from qlora_tool.cli.logs import log_to_stderr

    log_to_stderr()
    result = api.report(run, output=output)
    click.echo(f"report: {result.file}")
    for line in result.missing:
        click.echo(f"not in it: {line}", err=True)
