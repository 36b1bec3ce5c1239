"""`qlora-tool evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

import click

from qlora_tool.choices import DataFormat
from qlora_tool.cli import ToolCommand
from qlora_tool.cli.options import NewFile, adapter_option, base_options, device_options, template_option
from qlora_tool.errors import printable
from qlora_tool.sizes import counted

if TYPE_CHECKING:
    from qlora_tool.inference.score import ScoredAnswer

_LONGEST = 600  # characters of a text that is shown


@click.command(
    cls=ToolCommand,
    second="--data",
    examples="""
    qlora-tool evaluate runs/my-model --data data/eval.jsonl
    qlora-tool evaluate runs/my-model --data eval.jsonl --adapter other=runs/other --compare-base
    qlora-tool evaluate merged/my-model --data new=eval.jsonl --data old=general.jsonl --generate --json scores.json
    """,
    groups={"The base": ("model", "quantization", "double_quant", "device", "compute_dtype")},
)
@click.argument("run_or_model")
@click.option("--data", multiple=True, required=True, metavar="FILE",
              help="What to score; repeatable, as NAME=FILE, for several sets.")  # fmt: skip
@click.option("--format", type=click.Choice(get_args(DataFormat)), default="auto", show_default=True,
              help="How rows are read, as in data.format.")  # fmt: skip
@click.option("--max-length", type=click.IntRange(min=2), metavar="TOKENS",
              help="Tokens of a row at most; by default the run's, else 2048.")  # fmt: skip
@click.option("--generate", is_flag=True,
              help="Also generate answers, greedily: how many are exact, how like they are (token F1).")  # fmt: skip
@click.option("--show", type=click.IntRange(min=0), metavar="N",
              help="With --generate: so many answers beside the expected ones, wrong ones first; else 3.")  # fmt: skip
@click.option("--max-new-tokens", type=click.IntRange(min=1), metavar="N",
              help="With --generate: of an answer at most; else 256.")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Rows at a time.")
@adapter_option("Another adapter for the same base; repeatable. Each is scored, and the base is read once.")
@click.option("--compare-base", is_flag=True, help="Score the base alone, and show its answers, too.")
@click.option("--json", type=NewFile(), metavar="FILE", help="Write scores, and all answers, as JSON.")
@template_option
@base_options
@device_options
def evaluate(run_or_model: str, data: tuple[str, ...], **options: Any) -> None:
    """Loss, perplexity, exact match and token F1 of a model on data.

    RUN_OR_MODEL is a run's folder, an adapter's, an exported model, any model folder, a hub id, or demo.
    With --adapter it is the base, or a run that is scored too.
    """
    from qlora_tool import api
    from qlora_tool.cli.logs import log_to_stderr

    log_to_stderr()
    result = api.evaluate(run_or_model, data, **options)
    for name, score in result.scores.items():
        _show_answers(name, len(score.scored), result.shown(name))
    if not result.by_adapter:
        named = result.scores
    elif len(result.scores) == 1:
        named = {name: next(iter(scores.values())) for name, scores in result.by_adapter.items()}
    else:
        named = {f"{name}, {key}": score for name, scores in result.by_adapter.items()
                 for key, score in scores.items()}  # fmt: skip
    width = max(map(len, named)) + 1 if result.by_adapter else 0
    for name, score in named.items():
        matched = "" if score.exact_match is None else \
            f"  exact match {score.exact_match:.1%}  token F1 {score.token_f1:.1%}"  # fmt: skip
        click.echo(f"{f'{name}:':{width}} loss {score.loss:.4f}  perplexity {score.perplexity:.3f}  "
                   f"tokens {score.tokens}{matched}")  # fmt: skip


def _show_answers(source: str, count: int, shown: Sequence[Mapping[str, ScoredAnswer]]) -> None:
    """Some answers of a data set below the expected ones."""
    if not shown:
        return
    click.echo(f"{source}: {len(shown)} of {counted(count, 'answer')}, those first that are not exact")
    for answers in shown:
        first = next(iter(answers.values()))
        lines = [("prompt", first.prompt), ("expected", first.expected)]
        for name, one in answers.items():
            like = "exact" if one.exact_match else f"token F1 {one.token_f1:.1%}"
            cut = "" if one.answer.finish_reason == "stop" else f", cut off after {counted(one.answer.tokens, 'token')}"
            lines.append((name, f"{printable(one.answer.text.strip(), _LONGEST)} ({like}{cut})"))
        width = max(len(name) for name, _ in lines) + 1
        click.echo(f"\n{first.where}")
        for name, text in lines:
            indented = printable(text.strip(), 2 * _LONGEST).replace("\n", "\n" + " " * (width + 3))
            click.echo(f"  {f'{name}:':{width}} {indented}")
    click.echo()
