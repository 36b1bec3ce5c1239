"""What tokenized data depend on, as one number: equal numbers, equal data."""

from __future__ import annotations

import datetime
import hashlib
import json
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_tool.data.ends import generation_stops
from qlora_tool.files.digest import sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_tool.config import DataConfig

# Keys that say which data there are, or what becomes of them afterwards. All others count, those to come too.
NOT_IN_TOKENS = ("train", "eval", "packing", "padding_free", "shuffle", "chat_template")
# What a tokenizer notes of where it was read from, and whether the hub could be reached.
COME_BY = ("is_local", "local_files_only", "name_or_path", "_commit_hash")
LIBRARIES = ("transformers", "tokenizers", "jinja2", "pyarrow", "openpyxl")


def fingerprint(
    files: Mapping[str, str], data: DataConfig, tokenizer: PreTrainedTokenizerBase, template: str | None
) -> str:
    """The fingerprint of a source, tokenized.

    Args:
        files: SHA-256 by file, under the names that places are told with.
        data: with the source's own `format` and `columns`.
        tokenizer: all that it would save counts.
        template: the text of the chat template that is used in the place of the tokenizer's own.
    """
    facts: dict[str, Any] = {
        "files": dict(files),
        "data": data.model_dump(mode="json", exclude=set(NOT_IN_TOKENS)),
        "template": template,
        "tokenizer": _saved(tokenizer),
        "stops": generation_stops(tokenizer),  # answers end there where the template writes no end
        "libraries": {name: version(name) for name in LIBRARIES},
        "code": _code(),
    }
    if "strftime_now" in f"{template}{tokenizer.chat_template}":
        facts["date"] = datetime.date.today().isoformat()  # the template writes it into every row
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _saved(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """SHA-256 of the files that the tokenizer would save, but for how it was come by."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        config = Path(folder) / "tokenizer_config.json"
        kept = {key: value for key, value in json.loads(config.read_text("utf-8")).items() if key not in COME_BY}
        config.write_text(json.dumps(kept, sort_keys=True), "utf-8")
        return {file.relative_to(folder).as_posix(): sha256(file)
                for file in sorted(Path(folder).rglob("*")) if file.is_file()}  # fmt: skip


def _code() -> str:
    """SHA-256 of the modules that read, render and tokenize."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
