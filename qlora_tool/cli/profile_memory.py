"""`qlora-tool profile-memory`."""

from __future__ import annotations

from typing import get_args

import click

from qlora_tool.choices import Device
from qlora_tool.cli import ToolCommand


@click.command(
    cls=ToolCommand,
    examples="""
    qlora-tool profile-memory llama-2-7b-24gb --device-memory rtx-4090
    qlora-tool profile-memory my-run.yaml --device cpu --measure --plot memory.html
    qlora-tool profile-memory my-run.yaml --device-memory 12GB --plan
    """,
)
@click.argument("config")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one key; repeatable.")
@click.option("--device", type=click.Choice([device for device in get_args(Device) if device != "auto"]),
              help="What to predict for; by default cuda, unless the configuration says cpu.")  # fmt: skip
@click.option("--device-memory", metavar="24GB|CARD", help="What must suffice: a size, or a card such as rtx-4090.")
@click.option("--measure", is_flag=True, help="Also run real steps, with made-up weights, and compare.")
@click.option("--plan", "plan_too", is_flag=True, help="Show what fits: lengths, batches, checkpointing, quantization.")
@click.option(
    "--calibrate", "calibrate_first", is_flag=True, help="Measure this card's context and workspaces, and keep them."
)
@click.option("--json", "json_file", metavar="FILE", help="Write the breakdown as JSON.")
@click.option("--plot", "plot_file", metavar="FILE.png|FILE.html", help="Draw the step's memory over time.")
def profile_memory(
    config: str,
    overrides: tuple[str, ...],
    device: str | None,
    device_memory: str | None,
    measure: bool,
    plan_too: bool,
    calibrate_first: bool,
    json_file: str | None,
    plot_file: str | None,
):
    """Predict where every byte of a run goes, without weights, data or a GPU.

    CONFIG is a YAML file or the name of a recipe. Full batches of `data.max_length` tokens are assumed.
    """
    import os
    from pathlib import Path

    from rich.console import Console

    from qlora_tool.cli.logs import log_to_stderr
    from qlora_tool.config import load_config, with_values
    from qlora_tool.errors import UserError
    from qlora_tool.memory.allocator.cards import CARDS, parse_device_memory

    configuration = load_config(config, overrides)
    budget = parse_device_memory(device_memory) if device_memory else None
    if plot_file and Path(plot_file).suffix not in (".png", ".html"):
        raise click.BadParameter(f"{plot_file}: expected a name that ends in .png or .html", param_hint="--plot")
    if plan_too and budget is None:
        raise click.UsageError("--plan needs to know what must suffice: give --device-memory, such as 24GB or rtx-4090")
    device = device or ("cpu" if configuration.model.device == "cpu" else "cuda")
    log_to_stderr()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's own lines about when it starts and stops
    from qlora_tool.files.atomic import write_json
    from qlora_tool.memory.plan.budget import choose_for_profile
    from qlora_tool.memory.profile import profile, refuse_small_budget
    from qlora_tool.memory.show.table import render_report

    if calibrate_first:
        from qlora_tool.memory.allocator.calibrate import calibrate

        calibrate()
    card = next((card for card in CARDS if budget and card.name == budget.name), None)
    choice = choose_for_profile(configuration, device, card, budget and budget.bytes)
    if choice is None and configuration.training.gradient_checkpointing == "auto":
        configuration = with_values(configuration, {"training.gradient_checkpointing": True})
    recomputation = choice and choice.recomputation
    profiled = profile(configuration, device, measure=measure, card=card, recomputation=recomputation)
    limits = {"budget": None, "budget_name": ""}
    if budget:
        limits = {"budget": budget.bytes, "budget_name": budget.name if card or budget.estimated else ""}
        if not plan_too:  # a plan may find another quantization
            refuse_small_budget(profiled, **limits)
    console = Console(highlight=False)
    render_report(profiled.report, **limits, unquantized=profiled.unquantized, console=console)
    estimated = [*profiled.estimated, *(["what the driver keeps of the card"] if budget and budget.estimated else [])]
    if estimated:
        console.print(f"estimated, not measured: {', '.join(estimated)}")
    if budget and not plan_too and profiled.report.predicted.needed_bytes > budget.bytes:
        console.print("it does not fit; run again with --plan to see what would")
    if profiled.allocator_peak is not None:
        error = profiled.report.predicted.peak_bytes / profiled.allocator_peak - 1
        console.print(f"the allocator itself, without a tracer: {profiled.allocator_peak / 1e6:.1f} MB at the peak; "
                      f"predicted {error:+.2%}")  # fmt: skip
    if json_file:
        write_json(Path(json_file), profiled.report.to_json())
    if plot_file:
        _plot(Path(plot_file), profiled, limits, configuration.model.name_or_path)
    if plan_too:
        from qlora_tool.memory.plan.search import plan
        from qlora_tool.memory.profile import compute_dtype_on, model_config_of
        from qlora_tool.memory.show.plan_table import render_plan

        dtype = compute_dtype_on(configuration, device, card)
        found = plan(configuration, model_config_of(configuration), budget.bytes, dtype, device)
        render_plan(found, console)
        if not found.fits and found.change is None:
            raise UserError(
                f"--device-memory: the smallest configuration that was tried takes {found.misses_by / 1e6:.1f} MB too "
                "much; take a smaller model, or a larger device"
            )


def _plot(path, profiled, limits: dict, title: str) -> None:
    from qlora_tool.memory.show.html import write_html
    from qlora_tool.memory.show.plot import write_png

    if path.suffix == ".png":
        write_png(path, profiled.timelines, profiled.report, **limits, title=title)
    else:
        write_html(path, profiled.timelines, profiled.report, **limits, unquantized=profiled.unquantized, title=title)
