"""The sections of a report that are told: summary, samples, rows, ranks, exports, configuration, versions."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from qlora_tool._version import __version__
from qlora_tool.adapters.calibration import start_tokens
from qlora_tool.config import config_to_yaml
from qlora_tool.data.spans import UNICODE, visible
from qlora_tool.inspection.table import too_early
from qlora_tool.reporting.charts import bar, number
from qlora_tool.reporting.escape import escaped
from qlora_tool.reporting.found import Found
from qlora_tool.reporting.parts import command, facts, missing, section, table
from qlora_tool.sizes import file_size, memory_size, noun_of

LONGEST_SAMPLE = 4000  # characters


def summary(found: Found) -> str:
    """What the run was, and what came of it."""
    config, last = found.config, found.folder.last_record()
    losses, speeds = found.series("loss"), [speed for _, speed in found.series("tokens_per_second")]
    shape = [f"{key} {value:g}" for key in ("r", "lora_alpha")
             if isinstance(value := getattr(config.adapter, key, None), int | float)]  # fmt: skip
    pairs = [
        ("model", f"{config.model.name_or_path}, {config.model.quantization}"),
        ("method", ", ".join([config.adapter.method, *shape])),
        ("steps", f"{number(last['step'])}, {_numbered(last['epoch'], 'epoch')}"
         if {"step", "epoch"} <= last.keys() else number(losses[-1][0]) if losses else "none yet"),
    ]  # fmt: skip
    if losses:
        pairs.append(("training loss", f"{losses[0][1]:.4f} → {losses[-1][1]:.4f}"))
    for name in found.evaluations:
        points = found.series(name)
        before = found.untuned.get(name)
        pairs.append((name, f"{'' if before is None else f'{before:.4f} → '}{points[-1][1]:.4f}"))
    if speeds:
        pairs.append(("speed", f"{sum(speeds) / len(speeds):,.0f} tokens/s on average"))
    if found.memory is not None and found.memory.measured is not None:
        pairs.append(("peak of tensors", f"{memory_size(found.memory.measured.peak_bytes)} measured"))
    state = "" if found.folder.is_finished() else missing("this run is not finished", command(
        "train", str(found.folder.config_file)))  # fmt: skip
    return f"{state}{facts(pairs)}"


def samples(found: Found) -> str:
    """Answers to fixed prompts before the first step and after the last."""
    title = "Samples before and after"
    if not found.samples:
        how = command("generate", str(found.folder.path), "--prompt", "...", "--compare-base")
        return section("samples", title, [missing("no prompts were answered while it trained (training.eval_prompts); "
                                                  "to see base and run side by side", how)])  # fmt: skip
    (first, before), (last, after) = found.samples[0], found.samples[-1]
    names = ["before" if first == 0 else f"after step {number(first)}", f"after step {number(last)}"]
    body = []
    for index, sample in enumerate(after):
        answers = [before[index] if index < len(before) else {}, sample] if len(found.samples) > 1 else [sample]
        told = "".join(f'<dt>{escaped(name)}</dt><dd class="said">{_said(answer.get("answer", ""))}</dd>'
                       for name, answer in zip(names[-len(answers) :], answers, strict=True))  # fmt: skip
        prompt = f'<dt>prompt</dt><dd class="said">{_said(sample.get("prompt", ""))}</dd>'
        wanted = f'<dt>expected</dt><dd class="said">{_said(sample["expected"])}</dd>' if "expected" in sample else ""
        body.append(f'<dl class="sample">{prompt}{wanted}{told}</dl>')
    return section("samples", title, body)


def rows(found: Found) -> str:
    """A few rows with what is trained of them, and what became of the data."""
    title = "Rows as they are trained"
    if found.rows is None:
        return section("rows", title, [missing("the run kept none", command("preview", str(found.folder.config_file)))])
    body = ["<p>What is <mark>marked</mark> is trained; ↵ is a line end, · a space at an edge.</p>"]
    try:
        for examples in found.rows["rows"]:
            body += [_example(example) for example in examples]
        for name, lines in found.rows["counts"].items():
            told = [(label, said) for label, said in lines]
            body.append(f"<h3>{escaped(f'Data: {name}')}</h3>{facts(told)}")
    except (KeyError, TypeError, ValueError):
        body.append(missing("what was noted of the rows cannot be read", command(
            "preview", str(found.folder.config_file))))  # fmt: skip
    return section("rows", title, body)


def _example(example: Mapping[str, Any]) -> str:
    text = "".join(f"<mark>{shown}</mark>" if trained else shown
                   for shown, trained in ((_said(text), trained) for text, trained in example["spans"]))  # fmt: skip
    said = f"{example['where']}: {_numbered(example['tokens'], 'token')}, {number(example['trained_tokens'])} trained"
    return f'<h3>{escaped(said, 300)}</h3><pre class="row">{text}</pre>'


def _numbered(count: float, noun: str) -> str:
    return f"{number(count)} {noun_of(count, noun)}"


def _said(text: object) -> str:
    """Text of data or a model, with signs for what is not to be seen."""
    shown = str(text)
    if len(shown) > LONGEST_SAMPLE:
        shown = f"{shown[:LONGEST_SAMPLE]} … {len(shown) - LONGEST_SAMPLE:,} more characters"
    return escaped(visible(shown, UNICODE))


def ranks(found: Found) -> str:
    """What the singular values of the updates say of the rank, by kind of module."""
    title, how = "Effective ranks", command("inspect", str(found.folder.path))
    if found.ranks is None:
        return section("ranks", title, [missing(found.no_ranks, how)])
    seen = found.ranks
    heads = ["module", "count", "r", "effective rank", "r for 90 %", "of all", "", "what that says of r"]
    head = "".join(f'<th scope="col">{escaped(cell)}</th>' for cell in heads)
    body = ""
    for row in seen.rows:
        low, high = row.ranks
        cells = [row.name, str(row.count), str(low) if low == high else f"{low}–{high}", f"{row.effective[1]:.1f}",
                 f"{row.needed[1]:.0f}", f"{row.share:.1%}"]  # fmt: skip
        told = "".join(f"<td>{escaped(cell)}</td>" for cell in cells)
        body += f'<tr>{told}<td>{bar(row.share)}</td><td class="words">{escaped(row.verdict)}</td></tr>\n'
    needed = "Nothing was learned: every update is 0."
    if seen.needed:
        needed = f"One rank everywhere that keeps 90 % of all updates: {seen.needed}, of r {seen.rank}."
        if early := too_early(seen):
            needed += f" {early[0].upper()}{early[1:]}."
    return section("ranks", title, [
        f'<div class="scrolls" tabindex="0"><table class="numbers"><thead><tr>{head}</tr></thead><tbody>{body}</tbody>'
        f"</table></div><p>{escaped(needed)} Effective rank: exp of the entropy of the singular values; of all: share "
        f"of the updates’ squared norm. Held against the base’s weights: {how}</p>"
    ])  # fmt: skip


def exports(found: Found) -> str:
    """How the files that were exported compare with the model that was trained."""
    title, path = "Exports and their proof", found.folder.path
    how = command("export-merged", str(path), "--output-dir", f"{path}-merged")
    earlier = [missing(f"{found.earlier_exports} made of an earlier adapter of this run, not shown", "")] \
        if found.earlier_exports else []  # fmt: skip
    if not found.exports:
        return section("exports", title, [missing("nothing was exported yet", how), *earlier])
    body = []
    for folder, one in found.exports.items():
        about = [str(one[key]) for key in ("format", "gguf_type", "dtype", "base") if one.get(key)]
        size = one.get("bytes")
        told = [("what", ", ".join(about)), *([("size", file_size(size))] if isinstance(size, int) else []),
                ("when", str(one.get("date", ""))), *_proof(one.get("verification"))]  # fmt: skip
        body.append(f"<h3>{escaped(folder)}</h3>{facts(told)}")
    return section("exports", title, [*body, *_two_of_the_untuned(found), *earlier])


def _two_of_the_untuned(found: Found) -> list[str]:
    """Why the loss before the first step and that of the untuned model differ, where the page has both."""
    adapter = found.config.adapter
    start = f"init_from: {adapter.init_from}" if adapter.init_from else \
        f"init_lora_weights: {getattr(adapter, 'init_lora_weights', '')}"  # fmt: skip
    verified = [one.get("verification") for one in found.exports.values()]
    shown = any(isinstance(one, Mapping) and one.get("untuned_loss") is not None for one in verified)
    as_the_base = not adapter.init_from and start_tokens(found.config, ()) is None
    if as_the_base or not shown or not found.untuned:
        return []
    return [f"<p>Untuned is the base without an adapter; the losses before the first step are those of the base with "
            f"the adapter as it started (<code>{escaped(start)}</code>), which is another model.</p>"]  # fmt: skip


def _proof(verification: Any) -> list[tuple[str, str]]:
    """The figures of a verification, as `export.json` has them."""
    if not isinstance(verification, Mapping):
        return [("verified", "no")]
    if verification.get("left_out"):
        return [("not verified", str(verification["left_out"]))]
    told = [("verified on", f"{_numbered(verification['tokens'], 'token')} of {verification.get('rows')}")] \
        if verification.get("tokens") else []  # fmt: skip
    for key, name, form in _FIGURES:
        if isinstance(value := verification.get(key), int | float):
            told.append((name, form.format(value)))
    update = verification.get("update") or {}
    for key, name, form in _OF_UPDATE:
        if isinstance(value := update.get(key), int | float):
            told.append((name, form.format(value)))
    return told + [("warning", str(line)) for line in verification.get("warnings") or ()]


_FIGURES = (
    ("mean_kl", "KL divergence, mean", "{:.4g} nats"),
    ("worst_kl", "KL divergence, worst", "{:.4g} nats"),
    ("argmax_agreement", "same likeliest token", "{:.2%}"),
    ("untuned_loss", "loss, untuned", "{:.4g}"),
    ("live_loss", "loss, trained", "{:.4g}"),
    ("exported_loss", "loss, exported", "{:.4g}"),
    ("gain_kept", "kept of what training gained", "{:.1%}"),
)
_OF_UPDATE = (("kept", "update kept", "{:.2%}"), ("error", "rounding error, of its size", "{:.2%}"))


def configuration(found: Found) -> str:
    """The whole configuration."""
    return section("configuration", "Configuration", [
        f'<pre class="scrolls" tabindex="0">{escaped(config_to_yaml(found.config).strip())}</pre>'
    ])  # fmt: skip


def versions(found: Found) -> str:
    """What computed the run, and what made this page."""
    here = f"qlora-tool {__version__}, Python {platform.python_version()}, " \
           f"{datetime.now(timezone.utc).isoformat(timespec='seconds')}"  # fmt: skip
    told: Sequence[tuple[str, str]] = [(name.replace("_", "-"), said) for name, said in found.versions.items()]
    body = [table(["of the run", ""], told, numbers=False)] if told else [
        missing("no checkpoint is there that says what computed the run", "")]  # fmt: skip
    return section("versions", "Versions", [*body, f"<p>This page was made by {escaped(here)}.</p>"])
