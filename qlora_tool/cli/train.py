"""`qlora-tool train`."""

from __future__ import annotations

import sys

import click

from qlora_tool.cli import ToolCommand


@click.command(
    cls=ToolCommand,
    examples="""
    qlora-tool train demo
    qlora-tool train my-run.yaml --set training.max_steps=20 --output-dir runs/try
    """,
)
@click.argument("config")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE",
              help="Override one key; repeatable. The value is YAML.")  # fmt: skip
@click.option("--output-dir", metavar="DIR", help="The run's folder (training.output_dir).")
@click.option("--resume", default="auto", show_default=True, metavar="auto|never|PATH",
              help="auto: go on with this folder's unfinished run; a PATH: a checkpoint, or a run.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace a run that the folder holds.")
@click.option("--dry-run", is_flag=True, help="Check everything, read data and model, and stop before the first step.")
def train(config: str, overrides: tuple[str, ...], output_dir: str | None, resume: str, overwrite: bool, dry_run: bool):
    """Train an adapter on a quantized base.

    CONFIG is a YAML file, or the name of a shipped recipe (see `qlora-tool recipes`).
    """
    from qlora_tool.cli.logs import log_to_stderr
    from qlora_tool.config import load_config

    if output_dir:
        overrides = (*overrides, f"training.output_dir={output_dir}")
    configuration = load_config(config, overrides)
    log_to_stderr()
    from qlora_tool.memory.run_report import RunMemory
    from qlora_tool.training.interrupt import Interrupted
    from qlora_tool.training.loop import train as run_training

    try:
        run = run_training(configuration, resume=resume, overwrite=overwrite, dry_run=dry_run, watcher=RunMemory())
    except Interrupted as interrupted:
        for line in interrupted.lines:
            click.echo(line, err=True)
        sys.exit(interrupted.exit_code)
    if dry_run:
        click.echo("dry run: everything is in order; nothing was written")
    else:
        click.echo(f"adapter: {run.folder.adapter}")
        click.echo(f"next: qlora-tool export-merged {run.folder.path} --output-dir {run.folder.path}-merged")
