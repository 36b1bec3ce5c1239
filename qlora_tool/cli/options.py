"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, get_args

import click

from qlora_tool.choices import ComputeDtype, Device, Quantization

Command = TypeVar("Command", bound=Callable[..., Any])


def base_options(command: Command) -> Command:
    """`--model`, `--quantization` and `--double-quant`: the base of an adapter that does not say it all."""
    for option in (
        click.option("--double-quant/--no-double-quant", default=None, help="Whether its scales were quantized too."),
        click.option("--quantization", type=click.Choice(get_args(Quantization)), help="How the base was quantized."),
        click.option("--model", metavar="BASE", help="The base; by default what the adapter names."),
    ):
        command = option(command)
    return command


def device_options(command: Command) -> Command:
    """`--device` and `--compute-dtype`."""
    for option in (
        click.option("--compute-dtype", type=click.Choice(get_args(ComputeDtype)), default="auto", show_default=True,
                     help="The dtype of matrix products."),
        click.option("--device", type=click.Choice(get_args(Device)), default="auto", show_default=True,
                     help="Where it runs."),
    ):  # fmt: skip
        command = option(command)
    return command
