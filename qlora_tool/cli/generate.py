"""`qlora-tool generate`."""

from __future__ import annotations

import json as _json
import sys
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from qlora_tool.cli import ToolCommand
from qlora_tool.cli.options import NewFile, adapter_option, base_options, device_options, template_option
from qlora_tool.errors import UserError, printable
from qlora_tool.sizes import counted, memory_size

if TYPE_CHECKING:
    from qlora_tool.inference.generate import Effort, GenerateResult, PromptAnswer


@click.command(
    cls=ToolCommand,
    second="--prompt",
    examples="""
    qlora-tool generate runs/my-model --prompt "Unpack a.tar.gz" --compare-base
    qlora-tool generate runs/my-model --chat --system "Answer in one sentence."
    qlora-tool generate demo --prompt "Write to Ann" --adapter letters=runs/letters --adapter poems=runs/poems
    qlora-tool generate merged/my-model --prompts questions.txt --json answers.jsonl
    """,
    groups={
        "Sampling": ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "batch_size"),
        "The base": ("model", "quantization", "double_quant", "device", "compute_dtype"),
    },
)
@click.argument("run_or_model")
@click.option("--prompt", multiple=True, metavar="TEXT", help="What to ask; repeatable.")
@click.option("--prompts", metavar="FILE", help="A data file, or a .txt with one prompt a line.")
@click.option("--chat", is_flag=True,
              help="Talk: each line of standard input is a turn, with those before in view; Ctrl-D ends.")  # fmt: skip
@click.option("--system", metavar="TEXT", help="A system turn before each prompt, or before the chat.")
@adapter_option("An adapter, called NAME; repeatable. Each answers, on one base that is read once.")
@click.option("--compare-base", is_flag=True, help="Let the base answer first; show time and peak memory of each.")
@click.option("--json", type=NewFile(), is_flag=False, flag_value="-", metavar="[FILE]",
              help="Write answers as JSON, one a line, with tokens and why it ended; no FILE: show them.")  # fmt: skip
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True,
              help="Of an answer at most.")  # fmt: skip
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=click.FloatRange(min=0, max=1), default=1.0, show_default=True, help="Nucleus sampling.")
@click.option("--top-k", type=click.IntRange(min=0), default=0, show_default=True, help="0: all tokens.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sampling, above temperature 0.")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Prompts at a time.")
@template_option
@base_options
@device_options
def generate(run_or_model: str, chat: bool, json: str | None, **options: Any) -> None:
    """Answer prompts with a run, an adapter, an exported model or any model.

    RUN_OR_MODEL is a folder, a hub id, or demo; with --adapter the base, or a run that answers too.
    """
    from qlora_tool import api
    from qlora_tool.cli.logs import log_to_stderr

    log_to_stderr()
    as_json, file = json == "-", None if json == "-" else json
    if chat:
        typed = sys.stdin.isatty() and sys.stdout.isatty()
        result = api.generate(
            run_or_model, chat=_turns(typed), json=file, on_answer=partial(_show_turn, as_json, typed),
            on_text=None if as_json or not typed else _show_piece, **options,
        )  # fmt: skip
    else:
        result = api.generate(run_or_model, json=file, **options)
        if as_json:
            _show_json(*result.answers)
        else:
            _show(result)
    _show_efforts(result, as_json)
    _show_cut(result, options["max_new_tokens"])


def _turns(asks: bool) -> Iterator[str]:
    """The lines of standard input, until it ends.

    Args:
        asks: on a terminal.
    """
    if asks:
        click.echo("A line is a turn; Ctrl-D ends.", err=True)
    while True:
        try:
            yield input("> " if asks else "")
        except EOFError:
            if asks:
                click.echo(err=True)
            return
        except UnicodeDecodeError as error:
            raise UserError(f"--chat: standard input is not UTF-8 ({error.reason} at byte {error.start}); expected "
                            "text") from error  # fmt: skip


def _show_piece(text: str) -> None:
    click.echo(printable(text), nl=False)


def _show_turn(as_json: bool, typed: bool, answer: PromptAnswer) -> None:
    """An answer of a chat; on a terminal it is there already."""
    if as_json:
        _show_json(answer)
    elif typed:
        click.echo("\n")
    else:
        click.echo(f"{_quoted(answer.prompt)}\n  {_indented(_shown(answer.text), 2)}\n")


def _show_json(*answers: PromptAnswer) -> None:
    for answer in answers:
        click.echo(_json.dumps(answer.as_json(), ensure_ascii=False))


def _show(result: GenerateResult) -> None:
    """The answers, each below its prompt where there are several."""
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


def _show_cut(result: GenerateResult, most: int) -> None:
    """How many answers did not come to their end."""
    reasons = [one.finish_reason for answer in result.answers for one in (answer.each or {"": answer.answer}).values()]
    longest = f"{counted(most, 'token')} (--max-new-tokens)"
    for reason, why in {"length": longest, "context": "the model's last position"}.items():
        if count := reasons.count(reason):
            click.echo(f"cut off: {count} of {counted(len(reasons), 'answer')}, after {why}", err=True)


def _show_several(result: GenerateResult) -> None:
    """Every prompt with the answer of each adapter under its name."""
    names = [*(["base"] if result.base_effort else []), *result.by_adapter]
    width = max(map(len, names)) + 4  # two spaces before a name, a colon and a space behind it
    for answer in result.answers:
        texts = {**({} if answer.base_text is None else {"base": answer.base_text}), **answer.by_adapter}
        lines = [f"  {f'{name}:':{width - 3}} {_indented(_shown(text), width)}" for name, text in texts.items()]
        click.echo("\n".join([_quoted(answer.prompt), *lines, ""]))


def _show_efforts(result: GenerateResult, as_json: bool) -> None:
    """What it took: beside what is compared, else apart from the answers."""
    base = {"base": result.base_effort} if result.base_effort else {}
    own = result.by_adapter or {"tuned" if base else "answers": result.effort}
    for name, effort in {**base, **own}.items():
        click.echo(_speed(name, effort), err=as_json or not base)


def _quoted(prompt: str) -> str:
    return "> " + _shown(prompt).replace("\n", "\n> ")


def _indented(text: str, width: int = len("  tuned: ")) -> str:
    return text.strip().replace("\n", "\n" + " " * width)


def _speed(name: str, effort: Effort) -> str:
    return (
        f"{name}: {effort.seconds:.1f} s, {counted(effort.tokens, 'token')}, {effort.tokens_per_second:.0f} tokens/s, "
        f"peak memory {memory_size(effort.peak_bytes)}"
    )


def _shown(text: str) -> str:
    """A text that a model wrote: as it is into a file or a pipe, on a terminal without what acts there."""
    return printable(text) if sys.stdout.isatty() else text
