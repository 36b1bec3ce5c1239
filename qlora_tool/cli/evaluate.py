"""`qlora-tool evaluate`."""

from __future__ import annotations

from typing import get_args

import click

from qlora_tool.choices import DataFormat
from qlora_tool.cli import ToolCommand
from qlora_tool.cli.options import base_options, base_options_of, device_options


@click.command(
    cls=ToolCommand,
    examples="""
    qlora-tool evaluate runs/my-model --data data/eval.jsonl
    qlora-tool evaluate merged/my-model --data new=eval.jsonl --data old=general.jsonl --generate --json scores.json
    """,
    groups={"The base": ("model", "quantization", "double_quant", "device", "compute_dtype")},
)
@click.argument("run_or_model")
@click.option("--data", "sources", multiple=True, required=True, metavar="FILE",
              help="What to score; repeatable, as NAME=FILE, for several sets.")  # fmt: skip
@click.option("--format", "data_format", type=click.Choice(get_args(DataFormat)), default="auto", show_default=True,
              help="How rows are read, as in data.format.")  # fmt: skip
@click.option("--max-length", type=click.IntRange(min=2), metavar="TOKENS",
              help="Tokens of a row at most; by default the run's, else 2048.")  # fmt: skip
@click.option("--generate", is_flag=True, help="Also generate answers, greedily, and count the exact matches.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True,
              help="Of an answer at most.")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Rows at a time.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False), metavar="FILE", help="Write the scores as JSON.")
@base_options
@device_options
def evaluate(run_or_model: str, sources: tuple[str, ...], data_format: str, max_length: int | None, generate: bool,
             max_new_tokens: int, batch_size: int, json_file: str | None, **options):  # fmt: skip
    """Loss, perplexity and exact match of a model on data.

    RUN_OR_MODEL is a run's folder, an adapter's, an exported model, any model folder, a hub id, or demo.
    """
    from pathlib import Path

    from qlora_tool.cli.logs import log_to_stderr

    log_to_stderr()
    from qlora_tool.artifacts import find_artifact
    from qlora_tool.config import DataConfig
    from qlora_tool.data.formats import find_format
    from qlora_tool.data.sources import read_rows
    from qlora_tool.files.atomic import write_json
    from qlora_tool.inference.answer import Sampling
    from qlora_tool.inference.open import open_artifact
    from qlora_tool.inference.score import score
    from qlora_tool.model.open import check_length

    named = _named(sources)
    artifact = find_artifact(run_or_model, base_options_of(options))
    for source in named.values():
        find_format(read_rows(source), data_format)  # a fault of the data is told before the model is read
    model, tokenizer = open_artifact(artifact)
    own = artifact.run.data if artifact.run else DataConfig()
    if max_length:
        check_length(model.config, max_length, "--max-length")
    else:
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        max_length = min(own.max_length, positions or own.max_length)
    data = DataConfig(format=data_format, max_length=max_length, train_on=own.train_on)
    sampling = Sampling(max_new_tokens=max_new_tokens, batch_size=batch_size) if generate else None
    scores = {
        name: score(model, tokenizer, source, data, sampling=sampling, batch_size=batch_size)
        for name, source in named.items()
    }
    if json_file:
        results = {name: result.as_json() for name, result in scores.items()}
        write_json(Path(json_file), results if len(results) > 1 else next(iter(results.values())))
    for name, result in scores.items():
        matched = "" if result.exact_match is None else f"  exact match {result.exact_match:.1%}"
        click.echo(
            f"{name}: loss {result.loss:.4f}  perplexity {result.perplexity:.3f}  tokens {result.tokens}{matched}"
        )


def _named(sources: tuple[str, ...]) -> dict[str, str]:
    """{name: source}; a source without a name of its own is called by its file's."""
    from pathlib import Path

    from qlora_tool.errors import UserError

    named: dict[str, str] = {}
    for source in sources:
        name, equals, rest = source.partition("=")
        if not equals or Path(source).exists():
            name, rest = Path(source).stem or source, source
        if name in named:
            raise UserError(f"--data: two sets are called {name!r}; name them apart, as NAME=FILE")
        named[name] = rest
    return named
