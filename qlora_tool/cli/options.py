"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

_QUANTIZATIONS = click.Choice(["nf4", "fp4", "int8", "none"])

Command = TypeVar("Command", bound=Callable[..., Any])


def base_options(command: Command) -> Command:
    """`--model`, `--quantization` and `--double-quant`: the base of an adapter that does not say it all."""
    for option in (
        click.option("--double-quant/--no-double-quant", default=None, help="Whether its scales were quantized too."),
        click.option("--quantization", type=_QUANTIZATIONS, help="How the base was quantized."),
        click.option("--model", metavar="BASE", help="The base; by default what the adapter names."),
    ):
        command = option(command)
    return command


def device_options(command: Command) -> Command:
    """`--device` and `--compute-dtype`."""
    for option in (
        click.option("--compute-dtype", type=click.Choice(["auto", "bfloat16", "float16", "float32"]), default="auto",
                     show_default=True, help="What products run in."),
        click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True,
                     help="Where it runs."),
    ):  # fmt: skip
        command = option(command)
    return command
