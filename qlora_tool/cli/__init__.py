"""The command line: `main` is the program `qlora-tool`.

Each command is a module of its own beside this one, imported when it is called; `COMMANDS` says which there are. Every
failure ends up in `ToolGroup.main`, which turns it into lines that begin with `error:` and an exit code: 2 where the
user's input is at fault, 1 where the machine is, 130 and 143 after SIGINT and SIGTERM.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import inspect
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple

import click

from qlora_tool._version import __version__
from qlora_tool.cli.usage import note_words, usage_lines
from qlora_tool.errors import LONGEST, OptionError, ToolError, UserError, did_you_mean, printable
from qlora_tool.files.reading import has_half
from qlora_tool.training.interrupt import Interrupted


class Entry(NamedTuple):
    """One command, as the list of commands shows it, without importing it."""

    section: str
    target: str
    help: str


MAIN, USE, AROUND = "Main commands", "Use a model", "Around them"
COMMANDS = {
    "train": Entry(MAIN, "qlora_tool.cli.train:train", "Train an adapter on a quantized model."),
    "preview": Entry(MAIN, "qlora_tool.cli.preview:preview", "Show rows as they will be trained, and counts."),
    "profile-memory": Entry(
        MAIN, "qlora_tool.cli.profile_memory:profile_memory", "Predict where every byte of a run goes, before it."
    ),
    "export-merged": Entry(MAIN, "qlora_tool.cli.export_merged:export_merged", "Merge an adapter into its base."),
    "generate": Entry(USE, "qlora_tool.cli.generate:generate", "Answer prompts with a run or a model."),
    "evaluate": Entry(USE, "qlora_tool.cli.evaluate:evaluate", "Scores and answers of a run or a model on a file."),
    "inspect": Entry(USE, "qlora_tool.cli.inspect_adapter:inspect", "What an adapter learned, and if its rank fits."),
    "report": Entry(USE, "qlora_tool.cli.report:report", "Write the page about a run, which opens offline."),
    "recipes": Entry(AROUND, "qlora_tool.cli.recipes:recipes", "List, copy and import configurations."),
    "doctor": Entry(AROUND, "qlora_tool.cli.doctor:doctor", "What this machine has: versions, devices, dtypes, disk."),
}

EXAMPLES = """
qlora-tool recipes                            # what is ready to run
qlora-tool preview demo                       # what of your data will be trained
qlora-tool train demo --output-dir runs/demo  # train an adapter on a small model
qlora-tool export-merged runs/demo --output-dir merged/demo
qlora-tool train my.yaml --set training.max_steps=20 --set model.quantization=int8
"""

WELCOME = """\
qlora-tool fine-tunes a language model on one consumer graphics card, or on a CPU: LoRA on a frozen 4-bit or int8 base.
It says beforehand whether a run fits, and exports the result exactly, for transformers, llama.cpp and Ollama.

Three commands to start with (my.jsonl: your questions and answers; .csv and .xlsx will do, too):

  qlora-tool recipes                                          what is ready to run, by the card that it is for
  qlora-tool preview smollm2-cpu --set data.train=my.jsonl    what of your data will be trained
  qlora-tool train smollm2-cpu --set data.train=my.jsonl      train, on a CPU as well

All commands: qlora-tool --help. One of them: qlora-tool train --help. What this machine has: qlora-tool doctor.
Coming from PEFT, Axolotl, Unsloth or LLaMA-Factory: qlora-tool recipes import FILE my-run.yaml
"""

# What the system says of a path that cannot be what is meant.
_OF_PATHS = (errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.ELOOP)


class Terminated(BaseException):
    """SIGTERM arrived. Not an Exception, so that only what cleans up sees it on its way out."""


OUTPUT = "Output"


def _output_options() -> list[click.Option]:
    """What is shown; taken before and after the command's name. `cli/logs.py` reads them from the context's `meta`."""
    # `ToolGroup.main` looks for --debug in the words themselves, as parsing can fail.
    given = [(["-q", "--quiet"], "Show errors, warnings and results alone."),
             (["-v", "--verbose"], "Also show what is chosen and why, with times."),
             (["--debug"], "Show tracebacks, too.")]  # fmt: skip
    return [click.Option(names, is_flag=True, expose_value=False, help=about, callback=_note_output)
            for names, about in given]  # fmt: skip


def _note_output(ctx: click.Context, option: click.Parameter, given: bool) -> None:
    if given:
        ctx.meta[f"qlora_tool.{option.name}"] = True
    if ctx.meta.get("qlora_tool.quiet") and ctx.meta.get("qlora_tool.verbose"):
        raise click.UsageError("--quiet and --verbose contradict one another: give one of the two", ctx)


def _write_examples(formatter: click.HelpFormatter, examples: str | None) -> None:
    """The end of a help text: examples, one a line, not wrapped."""
    if examples:
        with formatter.section("Examples"):
            for line in inspect.cleandoc(examples).splitlines():
                formatter.write(f"{'':>{formatter.current_indent}}{line}\n" if line else "\n")


class ToolCommand(click.Command):
    """A command whose help ends with worked examples, and which takes `--quiet`,
    `--verbose` and `--debug`.

        @click.command(cls=ToolCommand, examples="qlora-tool doctor", groups={"Sampling": ("temperature", "top_p")})

    Args:
        examples: shell lines, shown as they are.
        groups: titles of option groups and the parameter names that go under each; the rest go under Options.
        second: the option that a second word is meant for, such as `--prompt`, which an error on it suggests.
    """

    def __init__(
        self, *args: Any, examples: str | None = None, groups: Mapping[str, Sequence[str]] | None = None,
        second: str | None = None, **kwargs: Any,
    ):  # fmt: skip
        super().__init__(*args, **kwargs)
        self.examples, self.second = examples, second
        self.groups = dict(groups or {}) | {OUTPUT: ("quiet", "verbose", "debug")}
        self.params += _output_options()

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        note_words(ctx, args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        from qlora_tool.files.cache import place_torchs_cache

        place_torchs_cache()
        try:
            return super().invoke(ctx)
        except OptionError as error:
            raise click.UsageError(str(error), ctx) from error

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        titles = {name: title for title, parameters in self.groups.items() for name in parameters}
        own = [title for title in self.groups if title != OUTPUT]
        sections: dict[str, list[tuple[str, str]]] = {title: [] for title in [*own, "Options", OUTPUT]}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                sections[titles.get(parameter.name or "", "Options")].append(record)
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _write_examples(formatter, self.examples)


class ExampleGroup(click.Group):
    """A group of commands whose help ends with worked examples, and which knows a misspelt command."""

    command_class = ToolCommand

    def __init__(self, *args: Any, examples: str | None = None, **settings: Any):
        super().__init__(*args, **settings)
        self.examples = examples
        self.params += _output_options()

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        note_words(ctx, args)
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name, valid = args[0], self.list_commands(ctx)
        if name not in valid and not name.startswith("-"):
            close = did_you_mean(name, valid) or f"; commands are {', '.join(valid)}"
            raise click.UsageError(f"no command '{name}'{close}", ctx)
        return super().resolve_command(ctx, args)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _write_examples(formatter, self.examples)


class ToolGroup(ExampleGroup):
    """The program: commands are imported when called, listed by section, and their failures are reported here."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*COMMANDS, *(name for name in self.commands if name not in COMMANDS)]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in COMMANDS and name not in self.commands:
            module, _, attribute = COMMANDS[name].target.partition(":")
            self.commands[name] = getattr(importlib.import_module(module), attribute)
        return self.commands.get(name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, COMMANDS))
        for section in dict.fromkeys(entry.section for entry in COMMANDS.values()):
            rows = [(name.ljust(width), entry.help) for name, entry in COMMANDS.items() if entry.section == section]
            with formatter.section(section):
                formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> None:
        super().invoke(ctx)  # what a command returns is not an exit code; `ctx.exit(code)` is

    def main(  # type: ignore[override]  # click has an overload for each value of standalone_mode, which is decided here
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **settings: Any
    ) -> Any:
        """Run a command line and exit.

        Args:
            args: the words after the program's name; None: the process's own.
        """
        args = list(sys.argv[1:] if args is None else args)
        _open_closed_streams()
        settings["standalone_mode"] = False
        # On a CPU with bf16 instructions it asks for an optional kernel package, which nothing here needs.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        try:
            _refuse_other_than_text(args)
            with _sigterm_raises():
                code = super().main(args, prog_name or "qlora-tool", **settings)
        except (Exception, KeyboardInterrupt, Terminated) as error:
            if "--debug" in args:
                traceback.print_exc()
            lines, code = describe_failure(error, args)
            for line in lines:
                click.echo(printable(" ".join(line.splitlines()), LONGEST), err=True)
        sys.exit(code or 0)


def _open_closed_streams() -> None:
    """Where the process was started without one of its three streams (`<&-`), an empty one takes its place: nothing is
    read or shown, as with /dev/null."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            nothing = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115 -- open as long as the process runs
            setattr(sys, name, nothing)


def _refuse_other_than_text(words: Sequence[str]) -> None:
    """Refuse a command line that is not UTF-8: paths of it stand in JSON and pages that are written.

    Raises:
        UserError: naming the word.
    """
    for word in words:
        if has_half(word):
            shown = word.encode(errors="backslashreplace").decode()
            raise UserError(f"{shown}: not UTF-8; write it in UTF-8, or rename what it names")


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM raises `Terminated`, once: files are cleaned up on the way out, and a second one ends the process."""

    def terminate(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def describe_failure(error: BaseException, args: Sequence[str] = ()) -> tuple[list[str], int]:
    """The lines to print for what ended a command, and the exit code."""
    if isinstance(error, click.Abort):  # click's wrapping of the two below; an EOFError is a file cut short
        error = error.__cause__ or KeyboardInterrupt()
    if isinstance(error, KeyboardInterrupt):
        return ["interrupted"], 130
    if isinstance(error, Terminated):
        return ["terminated"], 143
    if isinstance(error, Interrupted):
        return [] if error.told_elsewhere else error.lines, error.exit_code
    if isinstance(error, ToolError):
        return [] if error.told_elsewhere else [f"error: {_process()}{line}" for line in error.lines], error.exit_code
    if isinstance(error, click.ClickException):
        return [f"error: {line}" for line in usage_lines(error)], 2
    if isinstance(error, BrokenPipeError):  # the reader of our output has gone, as `| head` does
        return [], 1
    if isinstance(error, OSError) and not error.filename and _is_of_stdout(error):
        return [f"error: standard output cannot be written: {error.strerror}; what was written to files is there"], 1
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" for {error.filename}" if error.filename else ""
        return [f"error: no space left on the disk{where}; free some, or choose another folder"], 1
    if isinstance(error, OSError) and error.errno in _OF_PATHS and error.filename:
        return [f"error: {error.filename}: {error.strerror}; name another"], 2
    if isinstance(error, MemoryError):
        return ["error: out of memory; take smaller batches or a smaller data.max_length"], 1
    message = " ".join(str(error).split())
    hint = "" if "--debug" in args else " (run again with --debug for the traceback)"
    return [f"error: {type(error).__name__}{': ' if message else ''}{message}{hint}"], 1


def _is_of_stdout(error: OSError) -> bool:
    """Whether it was raised where results are shown, rather than where a file is written: it names neither."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if not frames:
        return False
    last = frames[-1]
    return last.f_globals.get("__name__") == "rich.console" or \
        (last.f_code is click.echo.__code__ and last.f_locals["file"] is sys.stdout)  # fmt: skip


def _process() -> str:
    """Which of several processes of a run it is that fails; empty for the first one, which talks for all."""
    rank = os.environ.get("RANK", "0")
    return "" if rank in ("", "0") else f"process {rank}: "


@click.group(
    "qlora-tool",
    cls=ToolGroup,
    examples=EXAMPLES,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="qlora-tool")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Fine-tune a language model on a frozen 4-bit or int8 base with LoRA, and export the result exactly.

    Results go to stdout, logs and progress to stderr. Exit codes: 0 done, 2 the input is at fault, 1 the machine is.
    """
    if ctx.invoked_subcommand is None:
        click.echo(WELCOME, err=True, nl=False)
        ctx.exit(2)
