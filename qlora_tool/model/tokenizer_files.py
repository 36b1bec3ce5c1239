"""A tokenizer's files: copied byte for byte, and written anew only where something of the tokenizer was changed.

transformers' `save_pretrained` rewrites them in the form of its own version, which earlier versions and other tools do
not read (a `tokenizer_class: TokenizersBackend`, say); what was not changed is therefore never saved through it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_tool.errors import UserError, printable
from qlora_tool.files.atomic import write_json, write_text
from qlora_tool.files.reading import LARGEST, read_object, read_text, refuse_odd_files, refuse_other_than_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SETTINGS = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
TEMPLATES = "additional_chat_templates"  # a folder
TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "vocab-*", "merges.txt", "*.model",
    "*.tiktoken", "tekken.json", "tokenization*.py", TEMPLATE, "chat_template.json", "chat_templates", TEMPLATES,
)  # fmt: skip
LARGEST_TEMPLATE = 4 << 20  # bytes: the longest ones have a hundredth of it
_CURE = "download the model again"
_TEMPLATE_FILES = (TEMPLATE, "chat_template.json", "chat_templates", TEMPLATES)
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

Templates = str | dict[str, str] | None


def copy_files(source: Path, patterns: Iterable[str], folder: Path, leave_out: Iterable[str] = ()) -> None:
    """Copy what fits one of `patterns`, folders as a whole, but for the names in `leave_out`.

    Raises:
        UserError: see `files_to_copy`.
    """
    for path in files_to_copy(source, patterns, leave_out):
        if path.is_dir():
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, folder / path.name)


def files_to_copy(source: Path, patterns: Iterable[str], leave_out: Iterable[str] = ()) -> list[Path]:
    """What fits one of `patterns`, files and folders.

    Raises:
        UserError: one of them, or something in a folder, is no file that ends, or larger than any such file is.
    """
    found = {path for pattern in patterns for path in source.glob(pattern) if path.name not in set(leave_out)}
    for path in sorted(found):
        for file in [path] if not path.is_dir() else (inner for inner in path.rglob("*") if not inner.is_dir()):
            size = refuse_other_than_file(file, _CURE).st_size
            if size > LARGEST:
                raise UserError(f"{file}: {size:,} bytes, expected {LARGEST:,} at most of what lies beside the "
                                f"weights; {_CURE}")  # fmt: skip
    return sorted(found)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer that can be opened by itself. A link to nothing counts, and is refused then:
    another tokenizer would be taken in its place."""
    return os.path.lexists(folder / SETTINGS)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, source: Path, folder: Path) -> None:
    """Write a tokenizer that was opened from `source`: its files as they are there, with another chat template where it
    has got one.

    Args:
        tokenizer: as it is used; nothing but its chat template may differ from its files.
        source: the folder that it was opened from.
        folder: where to.
    """
    if not has_tokenizer(source):  # files of an older kind, which can only be opened beside a config.json
        tokenizer.save_pretrained(folder)
        make_readable(folder)
        return
    template = tokenizer.chat_template
    if template == read_templates(source):
        copy_files(source, TOKENIZER_FILES, folder)
    else:
        copy_files(source, TOKENIZER_FILES, folder, leave_out=_TEMPLATE_FILES)
        _write_templates(template, folder)


def copy_tokenizer(trained: Path, base: Path, folder: Path) -> None:
    """Write the tokenizer that an adapter was trained with: the base's files where they say the same, what differs
    changed in them.

    Args:
        trained: the folder of the adapter's tokenizer; it may be `base`.
        base: the base's folder.
        folder: where to.
    """
    if trained == base or not _same_vocabulary(trained, base):
        copy_files(trained, TOKENIZER_FILES, folder)
        if trained != base:
            make_readable(folder)
        return
    settings, known = read_settings(trained), read_settings(base)
    changed = {name: settings[name] for name in _SPECIAL if name in settings}
    changed = {name: token for name, token in changed.items() if _text(token) != _text(known.get(name))}
    templates = read_templates(trained)
    same = templates == read_templates(base)
    copy_files(base, TOKENIZER_FILES, folder, leave_out=() if same else _TEMPLATE_FILES)
    if changed:
        write_json(folder / SETTINGS, known | changed)
        _change_map(folder / "special_tokens_map.json", changed)
    if not same:
        _write_templates(templates, folder)


def check_tokenizer_files(folder: Path) -> None:
    """Check the files that a tokenizer is read from, before it is: files, JSON where they say so, texts for templates.

    Raises:
        UserError: naming the file, and the key of its settings.
    """
    refuse_odd_files(folder, _CURE)
    files_to_copy(folder, TOKENIZER_FILES)  # what is made of the model has them beside it
    for name in (SETTINGS, "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).exists():
            _check_settings(folder / name, _read_json(folder / name))
    if (folder / TEMPLATE).exists():
        read_text(folder / TEMPLATE, _CURE, LARGEST_TEMPLATE)
    if (folder / "tokenizer.json").exists():
        read_text(folder / "tokenizer.json", _CURE)


def _check_settings(file: Path, settings: dict[str, Any]) -> None:
    faults = [
        f"{file}: {key} is {printable(repr(settings[key]), 80)}, expected {expected}; {_CURE}"
        for key, (fits, expected) in _SETTINGS.items() if key in settings and not fits(settings[key])
    ]  # fmt: skip
    if faults:
        raise UserError(faults)


def _is_token(value: Any) -> bool:
    return value is None or isinstance(value, str) or (
        isinstance(value, dict) and isinstance(value.get("content"), str))


def _is_template(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(one, dict) and isinstance(one.get("name"), str) and isinstance(one.get("template"), str)
                   for one in value)  # fmt: skip
    texts = value.values() if isinstance(value, dict) else [value]
    return value is None or all(isinstance(one, str) and len(one) <= LARGEST_TEMPLATE for one in texts)


def _is_length(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and value > 0)


def _is_tokens(value: Any) -> bool:
    return value is None or (isinstance(value, list | dict) and all(
        _is_token(one) and one is not None for one in (value.values() if isinstance(value, dict) else value)))


def _is_numbered(value: Any) -> bool:
    return isinstance(value, dict) and all(str(key).isdecimal() and isinstance(one, dict) and _is_token(one)
                                           for key, one in value.items())  # fmt: skip


_SETTINGS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(_SPECIAL, (_is_token, "a text, an object with its content, or null")),
    "chat_template": (_is_template, "a template's text, or a list of {name, template}"),
    "model_max_length": (_is_length, "a number of tokens above 0"),
    "tokenizer_class": (lambda value: value is None or isinstance(value, str), "a class's name"),
    "added_tokens_decoder": (_is_numbered, "an object of tokens by their ids"),
    "additional_special_tokens": (_is_tokens, "a list of tokens"),
    "extra_special_tokens": (_is_tokens, "a list or an object of tokens"),
}


def read_settings(folder: Path) -> dict[str, Any]:
    """What `tokenizer_config.json` says; empty where there is none.

    Raises:
        UserError: it is broken.
    """
    return _read_json(folder / SETTINGS) if (folder / SETTINGS).exists() else {}


def read_templates(folder: Path) -> Templates:
    """The chat template of a folder's files, or several by name, as transformers reads them; None where there is none.

    A `chat_template.jinja` counts before what `tokenizer_config.json` says.
    """
    named = {path.stem: read_text(path, _CURE, LARGEST_TEMPLATE)
             for path in sorted((folder / TEMPLATES).glob("*.jinja"))}
    if (folder / TEMPLATE).exists():
        named["default"] = read_text(folder / TEMPLATE, _CURE, LARGEST_TEMPLATE)
    if named:
        return named["default"] if set(named) == {"default"} else named
    found = read_settings(folder).get("chat_template")
    return {item["name"]: item["template"] for item in found} if isinstance(found, list) else found


def _write_templates(templates: Templates, folder: Path) -> None:
    """Put templates in the place of those of the tokenizer's files, which are there but for the template's own."""
    settings = read_settings(folder)
    if "chat_template" in settings:  # not two that differ
        listed = [{"name": name, "template": text} for name, text in templates.items()] \
            if isinstance(templates, dict) else templates  # fmt: skip
        write_json(folder / SETTINGS, settings | {"chat_template": listed})
    default = templates.get("default") if isinstance(templates, dict) else templates
    if default is not None:
        write_text(folder / TEMPLATE, default)
    for name, text in (templates.items() if isinstance(templates, dict) else ()):
        if name != "default":
            (folder / TEMPLATES).mkdir(exist_ok=True)
            write_text(folder / TEMPLATES / f"{name}.jinja", text)


def _same_vocabulary(trained: Path, base: Path) -> bool:
    """Whether two folders' `tokenizer.json` split and number text alike."""
    files = [folder / "tokenizer.json" for folder in (trained, base)]
    if not all(file.exists() for file in files):
        return False
    if files[0].read_bytes() == files[1].read_bytes():
        return True
    first, second = ({k: v for k, v in _read_json(file).items() if k not in ("version", "truncation", "padding")}
                     for file in files)  # fmt: skip
    return first == second


def make_readable(folder: Path) -> None:
    """Change a `tokenizer_config.json` of transformers 5 so that version 4 reads it too."""
    settings = read_settings(folder)
    if settings and (readable := _for_earlier_versions(settings)) != settings:
        write_json(folder / SETTINGS, readable)


def _for_earlier_versions(settings: dict[str, Any]) -> dict[str, Any]:
    """The same settings in names that transformers 4 and 5 both know."""
    changed = dict(settings)
    if changed.get("tokenizer_class") == "TokenizersBackend":
        changed["tokenizer_class"] = "PreTrainedTokenizerFast"
    if changed.get("backend") == "tokenizers":
        del changed["backend"]
    if isinstance(changed.get("extra_special_tokens"), list):  # a mapping in version 4
        changed["additional_special_tokens"] = changed.pop("extra_special_tokens")
    return changed


def _change_map(file: Path, changed: dict[str, Any]) -> None:
    if file.exists():
        write_json(file, _read_json(file) | changed)


def _text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _read_json(file: Path) -> dict[str, Any]:
    return read_object(file, _CURE)
