"""`qlora-tool train`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click

from qlora_tool.cli import ToolCommand
from qlora_tool.cli.completion import CONFIGURATION, SETTING
from qlora_tool.world import World


@click.command(
    cls=ToolCommand,
    examples="""
    qlora-tool train demo
    qlora-tool train my-run.yaml --set training.max_steps=20 --output-dir runs/try
    torchrun --nproc_per_node 2 -m qlora_tool train my-run.yaml   # a process a card
    """,
)
@click.argument("config", type=CONFIGURATION)
@click.option("--set", multiple=True, type=SETTING, metavar="KEY=VALUE",
              help="Override one key; repeatable. The value is YAML.")  # fmt: skip
@click.option("--output-dir", metavar="DIR", help="The run's folder (training.output_dir).")
@click.option("--resume", default="auto", show_default=True, metavar="auto|never|PATH",
              help="auto: go on with this folder's unfinished run; a PATH: a checkpoint, or a run.")  # fmt: skip
@click.option("--extend", is_flag=True,
              help="Train the folder's run for longer: more training.max_steps or num_train_epochs.")  # fmt: skip
@click.option("--allow-changes", is_flag=True,
              help="Go on though data, base, template, version or keys that change numbers are others.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace a run that the folder holds.")
@click.option("--dry-run", is_flag=True, help="Check everything, read data and model, and stop before the first step.")
def train(config: str, **options: Any) -> None:
    """Train an adapter on a quantized base.

    CONFIG is a YAML file, or the name of a shipped recipe (see `qlora-tool recipes`).
    """
    from qlora_tool import api
    from qlora_tool.cli.logs import log_to_stderr

    is_main = World.launched().is_main
    log_to_stderr(logging.INFO if is_main else logging.ERROR)
    result = api.train(config, **options)
    if not is_main:
        return
    if not result.finished:
        click.echo("dry run: everything is in order; nothing of the run was written")
    elif not result.learned:
        click.echo(f"adapter: {result.adapter}, which learned nothing: see the warning")
        _show_report(result.report)
    else:
        best = ""
        if result.config.training.load_best_model_at_end:
            best = f" (the best: step {result.adapter_step} of {result.steps})"
        click.echo(f"adapter: {result.adapter}{best}")
        _show_report(result.report)
        click.echo(f"next: qlora-tool export-merged {result.folder} --output-dir {result.folder}-merged")


def _show_report(file: Path | None) -> None:
    if file is not None:
        click.echo(f"report: {file}")
