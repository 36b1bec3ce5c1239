"""`qlora-tool preview`."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import click

from qlora_tool.cli import ToolCommand
from qlora_tool.cli.completion import CONFIGURATION, SETTING
from qlora_tool.cli.options import NewFile
from qlora_tool.sizes import counted, noun_of

if TYPE_CHECKING:
    from rich.console import Console

    from qlora_tool.data.preview import PreviewCounts, PreviewExample, PreviewRow
    from qlora_tool.data.spans import Signs
    from qlora_tool.training.preview import PreviewResult

TRAINED = "bold green underline"
SHOWN = 4
"""Examples of a packed row that are shown."""


@click.command(
    cls=ToolCommand,
    examples="""
    qlora-tool preview my-run.yaml
    qlora-tool preview smollm2-cpu --set data.train=my.csv --rows 2
    qlora-tool preview my-run.yaml --all --json preview.json
    """,
)
@click.argument("config", type=CONFIGURATION)
@click.option("--set", multiple=True, type=SETTING, metavar="KEY=VALUE", help="Override one key; repeatable.")
@click.option("--rows", type=click.IntRange(min=0), default=5, show_default=True, metavar="N",
              help="How many rows to show.")  # fmt: skip
@click.option("--all", is_flag=True, help="Count and pack all rows, not the first 2,000 of each file alone.")
@click.option("--json", type=NewFile(), metavar="FILE", help="Write rows and counts as JSON.")
def preview(config: str, **options: Any) -> None:
    """Show rows as the model will see them, what of them is trained, and what became of the data.

    CONFIG is a YAML file or the name of a recipe. The tokenizer and the data are read, no weights.
    """
    from rich.console import Console

    from qlora_tool import api
    from qlora_tool.cli.logs import log_to_stderr

    log_to_stderr()
    result = api.preview(config, **options)
    _Screen(Console(highlight=False, soft_wrap=True, emoji=False, markup=False)).show(result)
    settings = "".join(f" --set {shlex.quote(setting)}" for setting in options["set"])
    click.echo(f"\nnext: qlora-tool train {config}{settings}")


class _Screen:
    """Where a preview is printed: in colour on a terminal that has some, else with signs around what is trained."""

    def __init__(self, console: Console):
        from qlora_tool.data.spans import ASCII, UNICODE

        self.console = console
        self.coloured = console.is_terminal and not console.no_color and console.color_system is not None
        self.signs: Signs = UNICODE if "utf" in console.encoding.lower() else ASCII
        self.marks = self.signs.marks[0]

    def show(self, result: PreviewResult) -> None:
        self.marks = self.signs.marks_for(row.text for row in result.rows)
        if result.rows:
            self._legend()
        for number, row in enumerate(result.rows, start=1):
            part = f" from the first {result.packed_first:,} of the data" if result.packed_first else ""
            self._row(f"row {number} of {result.rows_per_epoch:,}{part}", row, result)
        for name, counts in {"data.train": result.counts, **_named(result.evaluations)}.items():
            self._counts(name, counts)

    def _legend(self) -> None:
        trained = [("trained tokens look like this", TRAINED)] if self.coloured else [
            (f"trained tokens stand between {self.marks[0]} and {self.marks[1]}", "")]  # fmt: skip
        signs = f"; {self.signs.line_end} a line end, {self.signs.space} a space at an edge"
        self._print([*trained, (signs, "")])

    def _row(self, title: str, row: PreviewRow, result: PreviewResult) -> None:
        examples = len(row.examples)
        held = counted(examples, "example")
        tokens = f"{len(row.input_ids):,} of {result.max_length:,} {noun_of(result.max_length, 'token')}, " \
                 f"{row.trained_tokens:,} of them trained"  # fmt: skip
        self._print([])
        self._print([(f"{title}: {held}, {tokens}", "bold")])
        for example in row.examples[:SHOWN]:
            self._example(example)
        if examples > SHOWN:
            more = f"{counted(examples - SHOWN, 'more example')} in this row"
            self._print([(f"{self._rule} {more}; --json FILE has all {self._rule * 10}", "dim")])

    @property
    def _rule(self) -> str:
        return "──" if self.signs.space == "·" else "--"

    def _example(self, example: PreviewExample) -> None:
        from qlora_tool.data.spans import marked, visible

        count = len(example.input_ids)
        tokens = f"{count:,} {noun_of(count, 'token')}, {example.trained_tokens:,} trained"
        self._print([(f"{self._rule} {example.where}: {tokens} {self._rule * 10}", "dim")])
        if not self.coloured:
            self._print([(marked(example.spans, self.signs, self.marks).removesuffix("\n"), "")])
            return
        parts = [(visible(span.text, self.signs), TRAINED if span.trained else "") for span in example.spans]
        self._print([*parts[:-1], (parts[-1][0].removesuffix("\n"), parts[-1][1])])

    def _counts(self, name: str, counts: PreviewCounts) -> None:
        self._print([])
        self._print([(f"{name}: {counts.report.source}, {counts.over}", "bold")])
        for label, said in counts.lines():
            self._print([(f"  {label:14} {said}", "")])

    def _print(self, parts: list[tuple[str, str]]) -> None:
        from rich.text import Text

        self.console.print(Text.assemble(*[(_printable(text, self.console.encoding), style) for text, style in parts]))


def _named(evaluations: dict[str, PreviewCounts]) -> dict[str, PreviewCounts]:
    return {"data.eval" if name == "eval" else f"data.eval.{name}": counts for name, counts in evaluations.items()}


def _printable(text: str, encoding: str) -> str:
    """The text with escapes for what a terminal's encoding does not have."""
    return text.encode(encoding, "backslashreplace").decode(encoding)
