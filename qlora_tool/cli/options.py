"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from qlora_tool.choices import ComputeDtype, Device, Quantization
from qlora_tool.errors import UserError
from qlora_tool.files.atomic import refuse_no_folder
from qlora_tool.files.reading import json_value

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


def adapter_option(about: str, metavar: str = "NAME=FOLDER") -> Callable[[Command], Command]:
    """`--adapter`, repeatable."""
    return click.option("--adapter", multiple=True, metavar=metavar, help=about)


class NewFile(click.Path):
    """A file to be written, in a folder that is there already: told before the work starts."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        try:
            refuse_no_folder(Path(found))
        except UserError as error:
            self.fail(str(error), param, ctx)
        return found


class JsonMapping(click.ParamType):
    """A mapping, as JSON writes it."""

    name = "mapping"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        try:
            found = json_value(value) if isinstance(value, str) else value
        except ValueError:
            found = None
        if not isinstance(found, dict):
            self.fail(f"{value!r} is no JSON mapping; expected such as '{{\"enable_thinking\": false}}'", param, ctx)
        return found


def template_option(command: Command) -> Command:
    """`--chat-template-kwargs`."""
    about = "What the chat template is given besides; by default what it was in training."
    return click.option("--chat-template-kwargs", type=JsonMapping(), metavar="JSON", help=about)(command)
