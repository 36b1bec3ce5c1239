"""What click finds wrong with a command line, in a line that says what to type instead."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence

import click

from qlora_tool.errors import closest, did_you_mean, meant_share

WORDS = "qlora_tool.words"  # in a context's `meta`: the words that the innermost command was given
_VALUE = "VALUE"  # in a suggestion, where none was given
# What options are called elsewhere, and what they are called here, where the command has one of that name.
_ALSO_CALLED = {
    "gpu": "--device-memory", "card": "--device-memory", "vram": "--device-memory", "gpu_memory": "--device-memory",
    "memory": "--device-memory", "question": "--prompt", "input": "--prompt", "text": "--prompt", "message": "--prompt",
    "dataset": "--data", "file": "--data", "out": "--output-dir", "output": "--output-dir", "max_length":
    "--max-new-tokens", "max_tokens": "--max-new-tokens",
}  # fmt: skip
_KEYS_ALSO_CALLED = {"data": "data.train", "dataset": "data.train", "file": "data.train"}
_THE_ARGUMENT = ("config", "config_file", "recipe", "yaml", "run", "run_dir", "run_or_model", "run_or_adapter")


def note_words(context: click.Context, words: Sequence[str]) -> None:
    """Keep the words of a command, from which `usage_lines` tells what was meant."""
    context.meta[WORDS] = list(words)


def usage_lines(error: click.ClickException) -> list[str]:
    """What click found wrong with a command line: what was found, the closest that is right, where to look."""
    context = getattr(error, "ctx", None)
    if isinstance(error, click.exceptions.NoSuchOption):
        message = f"no option '{error.option_name}'{_instead(error.option_name, context) if context else ''}"
    elif isinstance(error, click.BadParameter) and error.param and not isinstance(error, click.MissingParameter):
        message = f"{error.param.get_error_hint(context)}: {error.message.rstrip('.')}{_value_meant(error)}"
    else:
        message = error.format_message().rstrip(".")
        message = f"{message[:1].lower()}{message[1:]}{_of_words_left(context) if context else ''}"
    if context is None:
        return [message]
    return [f"{message} (in '{context.command_path}'; see '{context.command_path} --help')"]


def _value_meant(error: click.BadParameter) -> str:
    """The value that was meant in the place of one that is none of an option's."""
    given = error.message.split("'")
    if len(given) < 2 or error.param is None:
        return ""
    if isinstance(error.param.type, click.Choice):
        return did_you_mean(given[1], map(str, error.param.type.choices))
    return meant_share(given[1]) if error.param.type.name.startswith("float") else ""


def _instead(option: str, context: click.Context) -> str:
    """What to say of an option that a command has not."""
    own = _names(context.command, context)
    plain = option.lstrip("-").replace("-", "_").lower()
    value = _value_of(option, context.meta.get(WORDS, ()))
    if any(plain == name.lstrip("-").replace("-", "_") for name in own):
        return did_you_mean(option, own)
    if (ours := _ALSO_CALLED.get(plain)) in own:
        return f"; did you mean '{' '.join([str(ours), *[_quoted(value)] * bool(value)])}'?"
    arguments = [one.name for one in context.command.get_params(context) if isinstance(one, click.Argument)]
    if plain in _THE_ARGUMENT and arguments[:1] in (["config"], ["run_or_model"], ["run_or_adapter"]):
        return f"; write {_quoted(value) if value else str(arguments[0]).upper()} without it"
    keys = _known_keys()
    if "--set" in own and (said := _as_setting(plain, value, keys)):
        return said
    if said := _elsewhere(option, plain, value, context, keys):
        return said
    settings = {f"--{key.partition('.')[2].replace('_', '-')}": key for key in keys} if "--set" in own else {}
    close = difflib.get_close_matches(option, [*own, *settings], n=1)
    if close and close[0] not in own:
        return _setting(settings[close[0]], value, keys)
    return did_you_mean(option, own)


def _elsewhere(
    option: str, plain: str, value: str | None, context: click.Context, keys: Mapping[str, Sequence[object]]
) -> str:
    """Of an option of other commands, or a key that this command takes none of: who has it."""
    root = context.find_root().command
    having = []
    for name in root.list_commands(context) if isinstance(root, click.Group) else ():
        command = root.get_command(context, name) if isinstance(root, click.Group) else None
        if command is not None and command is not context.command and option in _names(command, context):
            having.append(name)
    if having:
        last = f"{' and ' if having[:-1] else ''}{having[-1]}"
        return f" here; {', '.join(having[:-1])}{last} {'have' if having[:-1] else 'has'} it"
    key = _key(plain, keys)
    if key:
        return f" here; it is a key of a configuration: qlora-tool train CONFIG --set {key}={_quoted(value or _VALUE)}"
    return ""


def _names(command: click.Command, context: click.Context) -> list[str]:
    options = [one for one in command.get_params(context) if isinstance(one, click.Option)]
    return [name for option in options for name in [*option.opts, *option.secondary_opts]]


def _value_of(option: str, words: Sequence[str]) -> str | None:
    """What an unknown option was given."""
    for place, word in enumerate(words):
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
        if word == option and words[place + 1 : place + 2] and not words[place + 1].startswith("-"):
            return words[place + 1]
    return None


def _quoted(word: str) -> str:
    """A word as a shell takes it, in double quotes where those will do."""
    if shlex.quote(word) == word:
        return word
    return shlex.quote(word) if re.search(r'["$`\\!]', word) else f'"{word}"'


def _known_keys() -> Mapping[str, Sequence[object]]:
    from qlora_tool.cli.completion import known_keys

    return known_keys()


def _key(name: str, keys: Mapping[str, Sequence[object]]) -> str | None:
    """The key that is meant by its dotted name, or by its last part alone."""
    dotted = name if name in keys else _KEYS_ALSO_CALLED.get(name)
    return dotted or next((key for key in keys if key.partition(".")[2] == name), None)


def _setting(key: str, value: str | None, keys: Mapping[str, Sequence[object]]) -> str:
    if list(keys.get(key, ())) == [True, False] and value not in ("true", "false"):
        value = "true"  # a flag, as other tools have it
    choices = [choice for choice in keys.get(key, ()) if isinstance(choice, str)]
    if value is not None and value not in choices:
        value = closest(value.lower(), choices, value) or value
    value = _VALUE if value is None else value
    return f"; did you mean '--set {key}={_quoted(value)}'?"


def _as_setting(plain: str, value: str | None, keys: Mapping[str, Sequence[object]]) -> str:
    """Of an option that is a key, here or in other tools: how it is set."""
    if key := _key(plain, keys):
        return _setting(key, value, keys)
    off = _key(plain.removeprefix("no_"), keys)
    if off and False in keys[off]:
        return _setting(off, "false", keys)
    from qlora_tool.config.imports.names import known_elsewhere

    said = known_elsewhere(plain)
    if found := re.match(r"; here it is ([a-z_]+\.[a-z_]+)( \(.*)?$", said):
        return f"{said}: --set {found[1]}={_VALUE}" if found[2] else _setting(found[1], value, keys)
    return said


def _of_words_left(context: click.Context) -> str:
    """Of words that no argument takes: the option that was meant."""
    words = context.meta.get(WORDS, [])
    try:
        _, left, _ = context.command.make_parser(context).parse_args(list(words))
    except click.UsageError:
        return ""
    if not left:
        return ""
    own = _names(context.command, context)
    meant = next(_settings_meant(words, left), None) if "--set" in own else _option_meant(left, context)
    return f"; did you mean '{meant}'?" if meant else ""


def _settings_meant(words: Sequence[str], left: Sequence[str]) -> Iterator[str]:
    """`--set KEY=VALUE`, where it was written as `--set KEY VALUE`, as `KEY=VALUE`, or as a file alone."""
    keys = _known_keys()
    for option, key, value in zip(words, words[1:], words[2:], strict=False):
        if option == "--set" and "=" not in key and not value.startswith("-"):
            yield f"--set {_key(key, keys) or key}={_quoted(value)}"
    key, equals, value = left[0].partition("=")
    if equals and (known := _key(key, keys)):
        yield f"--set {known}={_quoted(value)}"
    from qlora_tool.files.kinds import kind_of

    if place := {"data": "data.train", "model": "model.name_or_path"}.get(kind_of(left[0])):
        yield f"--set {place}={_quoted(left[0])}"


def _option_meant(left: Sequence[str], context: click.Context) -> str | None:
    """The option that a command's second word is meant for, with it."""
    option = next((one for one in context.command.get_params(context)
                   if one.opts[0] == getattr(context.command, "second", None)), None)  # fmt: skip
    if option is None or (context.params.get(option.name or "") and not option.multiple):
        return None
    return f"{option.opts[0]} {_quoted(' '.join(left))}"
