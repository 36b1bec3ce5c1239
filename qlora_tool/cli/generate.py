"""`qlora-tool generate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from qlora_tool.cli import ToolCommand
from qlora_tool.cli.options import base_options, base_options_of, device_options

if TYPE_CHECKING:
    from qlora_tool.artifacts import Artifact
    from qlora_tool.data.prompts import Prompt
    from qlora_tool.inference.answer import Answers, Sampling


@click.command(
    cls=ToolCommand,
    examples="""
    qlora-tool generate runs/my-model --prompt "Unpack a.tar.gz" --compare-base
    qlora-tool generate merged/my-model --prompts questions.txt
    """,
    groups={
        "Sampling": ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "batch_size"),
        "The base": ("model", "quantization", "double_quant", "device", "compute_dtype"),
    },
)
@click.argument("run_or_model")
@click.option("--prompt", "texts", multiple=True, metavar="TEXT", help="What to ask; repeatable.")
@click.option("--prompts", "file", metavar="FILE", help="A data file, or a .txt with one prompt a line.")
@click.option("--compare-base", is_flag=True, help="Let the base answer first; show time and peak memory of each.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True,
              help="Of an answer at most.")  # fmt: skip
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=click.FloatRange(min=0, max=1), default=1.0, show_default=True, help="Nucleus sampling.")
@click.option("--top-k", type=click.IntRange(min=0), default=0, show_default=True, help="0: all tokens.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sampling.")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Prompts at a time.")
@base_options
@device_options
def generate(run_or_model: str, texts: tuple[str, ...], file: str | None, compare_base: bool, **options):
    """Answer prompts with a run, an adapter, an exported model or any model.

    RUN_OR_MODEL is a folder, a hub id, or demo.
    """
    from qlora_tool.cli.logs import log_to_stderr
    from qlora_tool.errors import UserError

    if not texts and file is None:
        raise click.UsageError("nothing to answer: give --prompt TEXT or --prompts FILE")
    if not options["temperature"] and (options["top_p"] < 1 or options["top_k"]):
        raise click.UsageError("--top-p and --top-k restrict sampling, and --temperature 0 takes no samples; raise it")
    sampling_values = {key: options.pop(key) for key in ("max_new_tokens", "temperature", "top_p", "top_k", "seed",
                                                         "batch_size")}  # fmt: skip
    log_to_stderr()
    from qlora_tool.artifacts import Artifact, find_artifact
    from qlora_tool.data.sources import read_rows
    from qlora_tool.inference.answer import Sampling

    if file is not None:
        read_rows(file)  # a fault of the file is told before the model is read
    artifact = find_artifact(run_or_model, base_options_of(options))
    if compare_base and artifact.base is None:
        raise UserError(f"--compare-base: {run_or_model} does not say what it was made from; give a run or an adapter")
    sampling = Sampling(**sampling_values)
    if compare_base:
        base = Artifact(artifact.base.name_or_path, artifact.base)
        prompts, before, base_peak = _answers(base, texts, file, sampling)
        prompts, after, peak = _answers(artifact, texts, file, sampling)
        for prompt, old, new in zip(prompts, before.texts, after.texts, strict=True):
            click.echo(f"{_quoted(prompt)}\n  base:  {_indented(old)}\n  tuned: {_indented(new)}\n")
        click.echo(_speed("base", before, base_peak))
        click.echo(_speed("tuned", after, peak))
        return
    prompts, answers, peak = _answers(artifact, texts, file, sampling)
    for prompt, text in zip(prompts, answers.texts, strict=True):
        click.echo(f"{_quoted(prompt)}\n  {_indented(text, 2)}\n" if len(prompts) > 1 else text)
    click.echo(_speed("answers", answers, peak), err=True)


def _answers(
    artifact: Artifact, texts: tuple[str, ...], file: str | None, sampling: Sampling
) -> tuple[list[Prompt], Answers, int]:
    """The prompts as this artifact's tokenizer writes them, its answers, and the peak of memory over its life."""
    from qlora_tool.data.prompts import prompts_from_texts, read_prompts
    from qlora_tool.inference.answer import answer
    from qlora_tool.inference.open import open_artifact
    from qlora_tool.inference.peak import PeakMemory

    with PeakMemory() as peak:
        model, tokenizer = open_artifact(artifact)
        peak.watch(model.device)
        prompts: list[Any] = prompts_from_texts(texts, tokenizer)
        if file is not None:
            prompts += read_prompts(file, "auto", tokenizer)
        answers = answer(model, tokenizer, prompts, sampling)
    return prompts, answers, peak.bytes


def _quoted(prompt: Prompt) -> str:
    return "> " + prompt.text.replace("\n", "\n> ")


def _indented(text: str, width: int = len("  tuned: ")) -> str:
    return text.strip().replace("\n", "\n" + " " * width)


def _speed(name: str, answers: Answers, peak: int) -> str:
    speed = answers.tokens / answers.seconds
    return (
        f"{name}: {answers.seconds:.1f} s, {answers.tokens} tokens, {speed:.0f} tokens/s, "
        f"peak memory {peak / 1e9:.2f} GB"
    )
