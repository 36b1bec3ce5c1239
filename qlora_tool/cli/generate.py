"""`qlora-tool generate`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from qlora_tool.cli import ToolCommand
from qlora_tool.cli.options import adapter_option, base_options, device_options, template_option
from qlora_tool.errors import printable

if TYPE_CHECKING:
    from qlora_tool.inference.generate import Effort, GenerateResult


@click.command(
    cls=ToolCommand,
    examples="""
    qlora-tool generate runs/my-model --prompt "Unpack a.tar.gz" --compare-base
    qlora-tool generate demo --prompt "Write to Ann" --adapter letters=runs/letters --adapter poems=runs/poems
    qlora-tool generate merged/my-model --prompts questions.txt
    """,
    groups={
        "Sampling": ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "batch_size"),
        "The base": ("model", "quantization", "double_quant", "device", "compute_dtype"),
    },
)
@click.argument("run_or_model")
@click.option("--prompt", multiple=True, metavar="TEXT", help="What to ask; repeatable.")
@click.option("--prompts", metavar="FILE", help="A data file, or a .txt with one prompt a line.")
@adapter_option("An adapter, called NAME; repeatable. Each answers, on one base that is read once.")
@click.option("--compare-base", is_flag=True, help="Let the base answer first; show time and peak memory of each.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True,
              help="Of an answer at most.")  # fmt: skip
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=click.FloatRange(min=0, max=1), default=1.0, show_default=True, help="Nucleus sampling.")
@click.option("--top-k", type=click.IntRange(min=0), default=0, show_default=True, help="0: all tokens.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sampling.")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Prompts at a time.")
@template_option
@base_options
@device_options
def generate(run_or_model: str, **options: Any) -> None:
    """Answer prompts with a run, an adapter, an exported model or any model.

    RUN_OR_MODEL is a folder, a hub id, or demo; with --adapter the base, or a run that answers too.
    """
    from qlora_tool import api
    from qlora_tool.cli.logs import log_to_stderr

    log_to_stderr()
    result = api.generate(run_or_model, **options)
    if result.by_adapter:
        _show_several(result)
        return
    for answer in result.answers:
        if answer.base_text is not None:
            click.echo(f"{_quoted(answer.prompt)}\n  base:  {_indented(_shown(answer.base_text))}\n"
                       f"  tuned: {_indented(_shown(answer.text))}\n")  # fmt: skip
        elif len(result.answers) > 1:
            click.echo(f"{_quoted(answer.prompt)}\n  {_indented(_shown(answer.text), 2)}\n")
        else:
            click.echo(_shown(answer.text))
    if result.base_effort is None:
        click.echo(_speed("answers", result.effort), err=True)
    else:
        click.echo(_speed("base", result.base_effort))
        click.echo(_speed("tuned", result.effort))


def _show_several(result: GenerateResult) -> None:
    """Every prompt with the answer of each adapter under its name, and what each took."""
    efforts = {**({"base": result.base_effort} if result.base_effort else {}), **result.by_adapter}
    width = max(map(len, efforts)) + 4  # two spaces before a name, a colon and a space behind it
    for answer in result.answers:
        texts = {**({} if answer.base_text is None else {"base": answer.base_text}), **answer.by_adapter}
        lines = [f"  {f'{name}:':{width - 3}} {_indented(text, width)}" for name, text in texts.items()]
        click.echo("\n".join([_quoted(answer.prompt), *lines, ""]))
    for name, effort in efforts.items():
        click.echo(_speed(name, effort), err=result.base_effort is None)


def _quoted(prompt: str) -> str:
    return "> " + prompt.replace("\n", "\n> ")


def _indented(text: str, width: int = len("  tuned: ")) -> str:
    return text.strip().replace("\n", "\n" + " " * width)


def _speed(name: str, effort: Effort) -> str:
    return (
        f"{name}: {effort.seconds:.1f} s, {effort.tokens} tokens, {effort.tokens_per_second:.0f} tokens/s, "
        f"peak memory {effort.peak_bytes / 1e9:.2f} GB"
    )


def _shown(text: str) -> str:
    """A text that a model wrote: as it is into a file or a pipe, on a terminal without what acts there."""
    return printable(text) if sys.stdout.isatty() else text
