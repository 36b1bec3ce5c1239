"""Where data lie: files of the kinds in `READERS`, packed or not, folders of them, or the hub."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from qlora_tool.data.faults import RowFaults
from qlora_tool.data.readers.arrow import read_arrow, read_parquet
from qlora_tool.data.readers.delimited import read_delimited
from qlora_tool.data.readers.json_lines import read_json, read_json_lines
from qlora_tool.data.readers.plain_text import read_text
from qlora_tool.data.readers.rows import MOST_COLUMNS, Row
from qlora_tool.data.readers.spreadsheet import read_spreadsheet
from qlora_tool.data.readers.streams import COMPRESSIONS
from qlora_tool.errors import MachineError, UserError, did_you_mean, did_you_mean_path
from qlora_tool.files.digest import sha256
from qlora_tool.files.hashes import kept_hash, kept_hashes
from qlora_tool.files.reading import json_value, refuse_other_than_file

__all__ = ["READERS", "Part", "Row", "Rows", "hashes", "read_rows", "skipped_files", "source_files", "source_parts"]

HASH_KEPT_FROM = 4 << 20  # bytes: smaller files are hashed sooner than the kept hashes are read
MOST_FILES = 100_000  # in a folder and those below it
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+){0,2}")


@dataclass(frozen=True)
class Rows:
    """The rows of a data source, in order; each iteration reads them anew, one after the other.

    Attributes:
        source: as it was given.
        parts: what it consists of, each by itself: files, or a data set of the hub.
        faults: is told of faulty rows; None: they are raised together behind the last row.
    """

    source: str
    parts: list[Part]
    faults: RowFaults | None = None

    def __iter__(self) -> Iterator[Row]:
        faults = RowFaults() if self.faults is None else self.faults
        for part in self.parts:
            yield from part.rows(faults)
        if self.faults is None:
            faults.raise_any()


def read_rows(source: str, faults: RowFaults | None = None) -> Rows:
    """The rows of a data source, lazily.

    Args:
        source: a file; a folder, whose data files are read in the order of their names; or, where no such path
            exists, a hub id: `owner/name`, `owner/name:split` or `owner/name:configuration:split` (default: train).
            A .txt file is one row whose `text` is the whole file. A spreadsheet's sheet is `FILE.xlsx:SHEET`.
        faults: see `Rows`.

    Raises:
        UserError: nothing there; and, while rows are read, nothing in it or rows that cannot be read (several are named
            at once).
        MachineError: the hub cannot be reached.
    """
    return Rows(source, source_parts(source), faults)


class Part:
    """A source whose rows have one form: a file or a data set of the hub.

    Attributes:
        name: what it is called.
        file: None for a data set of the hub.
    """

    name: str
    file: Path | None = None

    @property
    def nbytes(self) -> int:
        """About how many bytes of text it has."""
        raise NotImplementedError

    def rows(self, faults: RowFaults) -> Iterator[Row]:
        """Its rows, read one after the other."""
        raise NotImplementedError

    def hashes(self) -> dict[str, str]:
        """SHA-256 by file, of its bytes; for a hub id, of its rows as JSON lines."""
        raise NotImplementedError

    def kept_hashes(self) -> dict[str, str] | None:
        """The same where it is known without much reading, else None."""
        return None


class FilePart(Part):
    """A file, or a sheet of one."""

    def __init__(self, file: Path, sheet: str | None = None):
        self.file, self.sheet = file, sheet
        self.name = f"{file}:{sheet}" if sheet else str(file)

    @property
    def nbytes(self) -> int:
        size = self.file.stat().st_size
        return 4 * size if self.file.suffix.lower() in (*COMPRESSIONS, *_NOT_PACKED) else size

    def rows(self, faults: RowFaults) -> Iterator[Row]:
        reader = _reader(self.file)
        before, empty, faults.row_at = faults.count, True, faults.bytes_read
        rows = read_spreadsheet(self.file, faults, self.sheet) if self.sheet else reader(self.file, faults)
        try:
            for row in rows:
                if len(row.fields) > MOST_COLUMNS:
                    raise UserError(f"{row.where}: {len(row.fields):,} columns, expected {MOST_COLUMNS:,} at most; "
                                    "leave out those that are not trained on")  # fmt: skip
                empty, faults.row_at = False, faults.bytes_read
                yield row
        except OSError as error:
            raise UserError(f"{self.file}: cannot be read: {error.strerror or error}") from error
        if empty and faults.count == before:
            raise UserError(f"{self.name}: the file has no rows; expected at least one")

    def hashes(self) -> dict[str, str]:
        keep = self.file.stat().st_size >= HASH_KEPT_FROM
        return {str(self.file): kept_hashes([self.file])[self.file] if keep else sha256(self.file)}

    def kept_hashes(self) -> dict[str, str] | None:
        if self.file.stat().st_size < HASH_KEPT_FROM:
            return self.hashes()
        found = kept_hash(self.file)
        return None if found is None else {str(self.file): found}


class HubPart(Part):
    """A split of a data set on the hub."""

    def __init__(self, source: str):
        self.name = source

    @cached_property
    def loaded(self) -> Any:
        """The data set, as `datasets` has it."""
        return _hub_rows(self.name)

    @property
    def nbytes(self) -> int:
        return int(self.loaded.data.nbytes)

    def rows(self, faults: RowFaults) -> Iterator[Row]:
        for number, fields in enumerate(self.loaded, start=1):
            yield Row(dict(fields), f"{self.name}, row {number}")

    def hashes(self) -> dict[str, str]:
        digest = hashlib.sha256()
        for row in self.rows(RowFaults()):
            digest.update(json.dumps(row.fields, sort_keys=True, default=str).encode() + b"\n")
        return {self.name: digest.hexdigest()}


def source_parts(source: str) -> list[Part]:
    """What a source consists of; a folder of its data files, in the order of their names.

    Raises:
        UserError: there is nothing, or a file of an unknown kind, or a folder with none that is known.
    """
    path = Path(source).expanduser()
    if path.exists():
        if not path.is_dir():
            _reader(path)
            refuse_other_than_file(path, "expected a data file or a folder")
        return [FilePart(file) for file in source_files(source)]
    file, colon, sheet = source.rpartition(":")
    if colon and file.lower().endswith(".xlsx") and Path(file).expanduser().is_file():
        return [FilePart(Path(file).expanduser(), sheet)]
    if _looks_like_hub_id(source, path):
        return [HubPart(source)]
    raise UserError(_missing(source, path))


def source_files(source: str) -> list[Path]:
    """The files that a source on this machine consists of, sorted; none for a hub id."""
    path = Path(source).expanduser()
    if not path.is_dir():
        return [path] if path.exists() else []
    _refuse_model(path)
    files = [file for file in _inside(path) if _kind(file) in READERS and not _is_beside(file)]
    if not files:
        raise UserError(f"{source}: a folder without data files; expected {_kinds()} files in it")
    return files


def _refuse_model(folder: Path) -> None:
    """Refuse a folder of a model, an adapter or a run, whose settings and figures would be read as rows."""
    found = "an adapter's" if (folder / "adapter_config.json").exists() else None
    found = "a run's" if (folder / "adapter" / "adapter_config.json").exists() else found
    settings = folder / "config.json"
    try:
        config = json_value(settings.read_text(encoding="utf-8")) if settings.is_file() else None
    except (OSError, ValueError):
        config = None
    if isinstance(config, dict) and "model_type" in config:
        found = "a model's"
    if found:
        raise UserError(f"{folder}: {found} folder, not one of data; name a file of rows, or a folder of such files")


def _is_beside(file: Path) -> bool:
    """Whether a file of a folder holds no rows, whatever its ending says: spreadsheets that are open have a `~$` one
    besides."""
    return file.name in _BESIDE or file.name.startswith("~$")


def skipped_files(source: str) -> list[str]:
    """The files of a folder that are not read, by their names in it; hidden ones are not named."""
    path = Path(source).expanduser()
    if not path.is_dir():
        return []
    read = {*source_files(source)}
    return [file.relative_to(path).as_posix() for file in _inside(path) if file not in read]


def _inside(folder: Path) -> list[Path]:
    """The files of a folder and those below it, but hidden ones, in the order of their names."""
    try:
        found = list(islice(folder.rglob("*"), MOST_FILES + 1))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror or error}; name a folder of data files") from error
    if len(found) > MOST_FILES:
        raise UserError(f"{folder}: a folder with more than {MOST_FILES:,} files; name the one that the data are in")
    inside = sorted(found, key=lambda file: file.relative_to(folder).as_posix())
    return [file for file in inside if file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(folder).parts)]  # fmt: skip


def hashes(source: str) -> dict[str, str]:
    """SHA-256 by file, of its bytes; for a hub id, of its rows as JSON lines."""
    return {name: digest for part in source_parts(source) for name, digest in part.hashes().items()}


def _kind(file: Path) -> str:
    """The ending that tells how a file is read, without that of its packed form."""
    ending = file.suffix.lower()
    if ending not in COMPRESSIONS:
        return ending
    inner = Path(file.stem).suffix.lower()
    return f"{inner}{ending}" if inner in _NOT_PACKED else inner


def _reader(file: Path) -> Callable[[Path, RowFaults], Iterator[Row]]:
    kind = _kind(file)
    if kind in READERS:
        return READERS[kind]
    if cure := _CURES.get(file.suffix.lower()):
        raise UserError(f"{file}: no data file; {cure} (read are {_kinds()} files)")
    found = f"the unknown ending '{file.suffix}'" if file.suffix else "no ending"
    if file.suffix.lower() in COMPRESSIONS:
        found = f"the ending '{Path(file.stem).suffix}{file.suffix}', which is read unpacked only"
        found = found if kind else f"no ending before '{file.suffix}'"
    raise UserError(f"{file}: a data file with {found}; expected {_kinds()}")


def _kinds() -> str:
    *most, last = READERS
    return f"{', '.join(most)} or {last}"


def _missing(source: str, path: Path) -> str:
    if any(sign in source for sign in "*?"):
        return f"{source}: no such file, and patterns are not read; name the folder, or list the files"
    if not path.parent.is_dir():
        return f"{source}: no such file; there is no folder {path.parent} either"
    close = did_you_mean_path(Path(source), (entry.name for entry in path.parent.iterdir()))
    return f"{source}: no such file or folder{close or f' in {path.parent.absolute()}'}"


def _looks_like_hub_id(source: str, path: Path) -> bool:
    """Whether a source that is not a path can be meant as a hub id: not a file's name, not in a folder that exists, and
    not a misspelling of something in this folder."""
    if not HUB_ID.fullmatch(source) or _kind(path) in READERS:
        return False
    if "/" in source:
        return not path.parent.is_dir()
    return not did_you_mean(source, (entry.name for entry in Path().iterdir()))


READERS: dict[str, Callable[[Path, RowFaults], Iterator[Row]]] = {
    ".json": read_json,
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".csv": read_delimited,
    ".tsv": read_delimited,
    ".xlsx": read_spreadsheet,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".txt": read_text,
}
# What is read as a whole file that can be sought in, and so not unpacked on the way.
_NOT_PACKED = (".xlsx", ".parquet", ".arrow")
# What people have besides, and what to do with it.
_CURES = {
    ".xls": "save it as .xlsx or .csv",
    ".xlsm": "save it as .xlsx",
    ".ods": "save it as .xlsx or .csv",
    ".zip": "unpack it",
    ".tar": "unpack it",
    ".tgz": "unpack it",
    ".pkl": "save it as .jsonl or .parquet",
    ".pdf": "save its text as .txt",
    ".docx": "save its text as .txt, or its table as .csv",
    ".md": "rename it to .txt to train on its text",
    ".yaml": "save it as .jsonl",
    ".yml": "save it as .jsonl",
}
# What `datasets` writes beside its Arrow files.
_BESIDE = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


def _hub_rows(source: str) -> Any:
    import datasets
    import huggingface_hub

    name, *rest = source.split(":")
    split = rest[-1] if rest else "train"
    configuration = rest[0] if len(rest) == 2 else None
    verbosity = huggingface_hub.logging.get_verbosity()
    huggingface_hub.logging.set_verbosity_error()  # its retries would be a dozen lines before our one
    try:
        rows = datasets.load_dataset(name, configuration, split=split)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(f"{source}: no such file or folder, and no data set '{name}' on the hub") from error
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{source}: {reason}; name a split as {name}:SPLIT or {name}:CONFIGURATION:SPLIT") from error
    except OSError as error:
        reason = " ".join(str(error).split())
        raise MachineError(
            f"{source}: no such file or folder, and the hub cannot be reached ({reason}); "
            "go online, or download the data and name its file"
        ) from error
    finally:
        huggingface_hub.logging.set_verbosity(verbosity)
    if not len(rows):
        raise UserError(f"{source}: the split '{split}' has no rows; expected at least one")
    return rows
