"""What a checkpoint belongs to: base, data and configuration that its numbers come from; and who made it."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch

from qlora_tool._version import __version__
from qlora_tool.files.hashes import file_hashes
from qlora_tool.files.reading import json_value
from qlora_tool.model.source import resolve as resolve_model

if TYPE_CHECKING:
    from qlora_tool.config import Config
    from qlora_tool.data.tokenize import Dataset
    from qlora_tool.training.run_data import RunData

_SAMPLED = 256  # examples whose tokens are hashed; of all of them the lengths are, and the files that they come from
# Of config.json: names and notes, which change no number.
_NO_NUMBERS = {"_name_or_path", "architectures", "transformers_version", "torch_dtype", "dtype", "use_cache",
               "auto_map"}  # fmt: skip


def made_by(device: torch.device, processes: int) -> dict[str, Any]:
    """What computes a run's numbers."""
    return {
        "qlora_tool": __version__,
        **{name: _version(name) for name in ("torch", "transformers", "bitsandbytes")},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "processes": processes,
    }


def _version(name: str) -> str | None:
    if name == "torch":
        return torch.__version__
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def belongs_to(config: Config, data: RunData) -> dict[str, Any]:
    """What the numbers of a run come from. Files are hashed where the cache does not know them yet."""
    folder = resolve_model(config.model.name_or_path, config.model.revision)
    files = file_hashes(folder)
    files.pop("config.json", None)
    return {
        "base": files,
        "model_config": json_value((folder / "config.json").read_text(encoding="utf-8")),
        "data": {"train": _of_files(data.train),
                 "eval": {name: _of_files(dataset) for name, dataset in data.evaluations.items()}},
        "template": _digest(str(getattr(data.tokenizer, "chat_template", None)).encode()),
        "rows": {"train": _of_rows(data.train),
                 "eval": {name: _of_rows(dataset) for name, dataset in data.evaluations.items()}},
        "config": config.model_dump(mode="json"),
    }  # fmt: skip


def _of_files(dataset: Dataset) -> dict[str, str]:
    """By the files' own names: where they lie does not matter. Of one name in several folders each counts."""
    found: dict[str, str] = {}
    for path, digest in dataset.report.files.items():
        name = Path(path).name
        again = sum(other == name or other.startswith(f"{name} (") for other in found)
        found[f"{name} ({again + 1})" if again else name] = digest
    return found


def _of_rows(dataset: Dataset) -> str:
    digest, count = hashlib.sha256(), len(dataset.examples)
    digest.update(numpy.asarray(dataset.lengths, dtype=numpy.int64).tobytes())
    for number in range(0, count, max(1, count // _SAMPLED)):
        example = dataset.examples[number]
        for values in (example.input_ids, example.labels):
            digest.update(numpy.asarray(values, dtype=numpy.int64).tobytes() + b"/")
    return digest.hexdigest()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def changes(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What changes a run's numbers, but for its configuration's keys: each as `what: there, and here`.

    Args:
        there, here: as `belongs_to` gives them.
    """
    found = [*_model_config(there["model_config"], here["model_config"])]
    found += _files("the base", there["base"], here["base"])
    data = [*_files("data.train", there["data"]["train"], here["data"]["train"])]
    data += _by_name("data.eval", there["data"]["eval"], here["data"]["eval"], _files)
    if there["template"] != here["template"]:
        data.append(f"the chat template: SHA-256 {there['template'][:12]} there, {here['template'][:12]} here")
    if not data and there["rows"] != here["rows"]:
        data.append("the rows that tokenizer and template make of the data")
    return found + data


def _model_config(there: Mapping[str, Any], here: Mapping[str, Any], inside: str = "") -> Iterator[str]:
    for key in sorted((there.keys() | here.keys()) - _NO_NUMBERS):
        one, other = there.get(key), here.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _model_config(one, other, f"{inside}{key}.")
        elif one != other:
            yield f"config.json: {inside}{key}: {_short(one)} there, {_short(other)} here"


def _files(what: str, there: Mapping[str, str], here: Mapping[str, str]) -> Iterator[str]:
    if list(there.values()) == list(here.values()):  # renamed, maybe
        return
    for name in sorted(there.keys() | here.keys()):
        one, other = there.get(name), here.get(name)
        if one != other:
            yield f"{what}: {name}: {_hash(one)} there, {_hash(other)} here"


def _by_name(what: str, there: Mapping[str, Any], here: Mapping[str, Any], compare: Any) -> Iterator[str]:
    for name in sorted(there.keys() | here.keys()):
        yield from compare(f"{what} ({name})", there.get(name) or {}, here.get(name) or {})


def _hash(found: str | None) -> str:
    return "none" if found is None else f"SHA-256 {found[:12]}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 60 else f"{text[:57]}..."


def other_version(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """The version of this tool, where that is another one: its numbers may be others."""
    one, other = there.get("qlora_tool"), here["qlora_tool"]
    return [] if one == other else [f"qlora-tool: {one} there, {other} here"]


def other_machine(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What rounds otherwise, maybe: other versions of libraries, another device."""
    names = ("torch", "transformers", "bitsandbytes", "device")
    return [f"{name}: {there.get(name)} there, {here[name]} here" for name in names if there.get(name) != here[name]]
