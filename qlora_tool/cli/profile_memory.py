"""`qlora-tool profile-memory`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, get_args

import click

from qlora_tool.choices import Device
from qlora_tool.cli import ToolCommand
from qlora_tool.cli.completion import CONFIGURATION, SETTING
from qlora_tool.cli.options import NewFile
from qlora_tool.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from qlora_tool.memory.profile_run import MemoryProfile


@click.command(
    cls=ToolCommand,
    examples="""
    qlora-tool profile-memory llama-2-7b-24gb --device-memory rtx-4090
    qlora-tool profile-memory my-run.yaml --device cpu --measure --plot memory.html
    qlora-tool profile-memory my-run.yaml --device-memory 12GB --plan
    qlora-tool profile-memory my-run.yaml --device-memory rtx-4090 --processes 4 --set training.sharding=fsdp
    """,
)
@click.argument("config", type=CONFIGURATION)
@click.option("--set", multiple=True, type=SETTING, metavar="KEY=VALUE", help="Override one key; repeatable.")
@click.option("--device", type=click.Choice([device for device in get_args(Device) if device != "auto"]),
              help="What to predict for; by default cuda, unless the configuration says cpu.")  # fmt: skip
@click.option("--device-memory", metavar="24GB|CARD",
              help="What must suffice: a size, or a card such as rtx-4090; for --plan else what is free.")  # fmt: skip
@click.option("--processes", type=int, default=1, show_default=True, metavar="N",
              help="How many train together; what one of them takes is shown.")  # fmt: skip
@click.option("--measure", is_flag=True, help="Also run real steps, with random weights, and compare.")
@click.option("--plan", is_flag=True, help="Show what fits: lengths, batches, checkpointing, quantization.")
@click.option("--calibrate", is_flag=True, help="Measure this card's context and workspaces, and keep them.")
@click.option("--json", type=NewFile(), metavar="FILE", help="Write the breakdown, and the plan, as JSON.")
@click.option("--plot", type=NewFile(), metavar="FILE.png|FILE.html", help="Draw the step's memory over time.")
def profile_memory(config: str, **options: Any) -> None:
    """Predict where every byte of a run goes, without weights, data or a GPU.

    CONFIG is a YAML file or the name of a recipe. Full batches of `data.max_length` tokens are assumed.
    """
    from rich.console import Console

    from qlora_tool import api
    from qlora_tool.cli.logs import log_to_stderr

    log_to_stderr()
    console = Console(highlight=False)
    try:
        profiled = api.profile_memory(
            config, **options, on_profile=lambda found: _show(found, options["plan"], console)
        )
    except UserError as error:
        _show_plan(getattr(error, "profile", None), console)
        raise
    _show_plan(profiled, console)


def _show(profiled: MemoryProfile, with_plan: bool, console: Console) -> None:
    from qlora_tool.memory.show.say import say
    from qlora_tool.memory.show.table import render_report
    from qlora_tool.sizes import memory_size

    render_report(profiled.report, budget=profiled.budget_bytes, budget_name=profiled.budget_name,
                  unquantized=profiled.unquantized, console=console)  # fmt: skip
    for line in _said(profiled):
        say(console, line)
    if profiled.change and not with_plan:
        console.print(f"what to change: {profiled.change}", soft_wrap=True, markup=False, emoji=False)
    if profiled.allocator_peak is not None:
        compared = "" if profiled.report.predicted is None else \
            f"; predicted {profiled.predicted.peak_bytes / profiled.allocator_peak - 1:+.2%}"  # fmt: skip
        say(console, "the allocator itself, without a tracer: "
            f"{memory_size(profiled.allocator_peak)} at the peak{compared}")  # fmt: skip


def _said(profiled: MemoryProfile) -> Iterator[str]:
    """What else there is to know of a prediction, a line each."""
    from qlora_tool.sizes import memory_size

    if profiled.target is not None and profiled.target.assumed:
        yield f"no card is named or here: {profiled.target} is assumed; name one, as --device-memory rtx-4090"
    if profiled.estimated:
        yield f"estimated, not measured: {', '.join(profiled.estimated)}"
    if profiled.start_bytes is not None:
        yield (f"init_lora_weights: {profiled.start}: while it is made, loading takes "
               f"{memory_size(profiled.start_bytes)} beside what stays")  # fmt: skip
    processes, device = profiled.report.processes, profiled.report.device
    if processes > 1 and device == "cpu" and profiled.report.predicted is not None:
        together = memory_size(processes * profiled.predicted.peak_bytes)
        yield f"{processes} processes on one machine take {together} together"
    if processes == 1 and profiled.config.training.sharding != "none":
        yield (f"training.sharding: {profiled.config.training.sharding}: one process shares nothing out; give "
               "--processes")  # fmt: skip


def _show_plan(profiled: MemoryProfile | None, console: Console) -> None:
    if profiled is not None and profiled.plan is not None:
        from qlora_tool.memory.show.plan_table import render_plan

        render_plan(profiled.plan, console)
