"""What an export can be: each format is one function that fills the staging folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tool.artifacts import Artifact
from qlora_tool.choices import ExportFormat
from qlora_tool.errors import UserError
from qlora_tool.export.beside import MODEL_FILES, write_config
from qlora_tool.export.encoding import Encoder
from qlora_tool.export.generation import write_generation_config
from qlora_tool.export.gguf.mixture import MIXTURES
from qlora_tool.export.merge import MergedModel
from qlora_tool.export.shards import write_shards
from qlora_tool.export.staging import Staging
from qlora_tool.export.types import BITSANDBYTES
from qlora_tool.model.tokenizer_files import copy_files, copy_tokenizer, has_tokenizer


@dataclass(frozen=True)
class Job:
    """What a format writes from, and how.

    Attributes:
        name: of the output.
        artifact: what is exported.
        base_folder: its base's.
        merged: the merged tensors, in the dtype of the files where the format has one.
        max_shard_size: bytes of a file at most.
        gguf_type: of `choices.GgufType`.
        encoder: makes the codes of formats that have them.
        with_base: whether the base's GGUF file lies beside an adapter's.
    """

    name: str
    artifact: Artifact
    base_folder: Path
    merged: MergedModel
    max_shard_size: int
    gguf_type: str
    encoder: Encoder
    with_base: bool = False

    @property
    def tokenizer_folder(self) -> Path:
        """The adapter's, with which it was trained, else the base's."""
        adapter = self.artifact.adapter.folder
        return adapter if has_tokenizer(adapter) else self.base_folder


Write = Callable[[Job, Staging], dict[str, Any]]


@dataclass(frozen=True)
class Format:
    """One form of the result.

    Attributes:
        write: fills the staging folder, and gives what else is to be said of it, as JSON.
        nbytes: about how many bytes that takes.
        check: refuses what the format cannot hold, before anything is written.
        auto_dtype: whether the one that keeps most is chosen for them, where the user leaves it.
        as_model: the result as a model folder that plain transformers loads, for as long as it is held against the live
            model; None where it is none.
    """

    write: Write
    nbytes: Callable[[Job], int]
    check: Callable[[Job], None] = lambda job: None
    auto_dtype: bool = False
    as_model: Callable[[Job, Staging], AbstractContextManager[Path]] | None = None


def _itself(job: Job, staging: Staging) -> AbstractContextManager[Path]:
    return nullcontext(staging.folder)


def _write_safetensors(job: Job, staging: Staging) -> dict[str, Any]:
    specs = [*(spec for group in job.merged.specs() for spec in group), *job.merged.copied_specs()]
    files = write_shards(staging, specs, job.merged.stream_from, job.max_shard_size)
    write_config(job.merged, staging.folder)
    _copy_beside(job, staging.folder)
    return {"files": files, "bytes": sum(spec.nbytes for spec in specs)}


def _merged_bytes(job: Job) -> int:
    merged = job.merged
    return sum(spec.nbytes for specs in (*merged.specs(), merged.copied_specs()) for spec in specs)


def _copy_beside(job: Job, folder: Path) -> None:
    copy_files(job.base_folder, MODEL_FILES, folder)
    copy_tokenizer(job.tokenizer_folder, job.base_folder, folder)
    write_generation_config(job.base_folder, job.merged.skeleton.config, job.tokenizer_folder, folder,
                            job.artifact.model.trust_remote_code)  # fmt: skip


def _write_gguf(job: Job, staging: Staging) -> dict[str, Any]:
    from qlora_tool.export.gguf.modelfile import write_modelfile
    from qlora_tool.export.gguf.write import write_gguf

    name = f"{job.name}.gguf"
    if not staging.done(name):
        with staging.whole(name) as file:
            facts = write_gguf(job.encoder, job.base_folder, job.tokenizer_folder, file, job.gguf_type)
            encoding = job.encoder.facts() if job.gguf_type in MIXTURES else None
            # Before the file counts as finished: killed in between, it is written anew.
            staging.note(gguf=facts, encoding=encoding)
    write_modelfile(staging.folder / "Modelfile", name, job.tokenizer_folder, job.base_folder)
    facts = {"files": [name], "bytes": (staging.folder / name).stat().st_size, "gguf": staging.notes["gguf"]}
    encoding = staging.notes.get("encoding")
    return facts | {"dtype": job.gguf_type} | ({"encoding": encoding} if encoding else {})


def _gguf_bytes(job: Job) -> int:
    from qlora_tool.export.gguf.write import planned_bytes

    return planned_bytes(job.merged, job.gguf_type)


def _check_gguf(job: Job) -> None:
    from qlora_tool.export.gguf.write import refuse_unwritable

    refuse_unwritable(job.merged.skeleton.config)


@contextmanager
def _gguf_read_back(job: Job, staging: Staging) -> Iterator[Path]:
    from qlora_tool.export.gguf.read_back import read_back

    with _folder_for_a_while(staging) as folder:
        read_back(job.merged, staging.folder / f"{job.name}.gguf", folder)
        yield folder


@contextmanager
def _folder_for_a_while(staging: Staging) -> Iterator[Path]:
    folder = staging.root / "read-back"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


ADAPTER_FILE, BASE_FILE = "adapter.gguf", "base.gguf"


def _write_gguf_adapter(job: Job, staging: Staging) -> dict[str, Any]:
    from qlora_tool.export.gguf.adapter import base_said, left_to_the_base, write_adapter_gguf

    if not staging.done(ADAPTER_FILE):
        with staging.whole(ADAPTER_FILE) as file:
            facts = write_adapter_gguf(job.merged, file, Path(job.artifact.model.name_or_path).name)
            staging.note(gguf_adapter=facts)
    files = [ADAPTER_FILE]
    facts = {"file": ADAPTER_FILE, **staging.notes["gguf_adapter"],
             "base": base_said(job.artifact, job.merged, BASE_FILE if job.with_base else None)}  # fmt: skip
    result: dict[str, Any] = {"files": files, "dtype": None, "gguf_adapter": facts}
    if job.with_base:
        result |= {"dtype": job.gguf_type, "gguf": _write_gguf_base(job, staging)}
        files.append(BASE_FILE)
    else:
        facts["left_to_base"] = left_to_the_base(job.artifact, job.base_folder, job.tokenizer_folder, staging.folder)
    return result | {"bytes": sum((staging.folder / name).stat().st_size for name in files)}


def _write_gguf_base(job: Job, staging: Staging) -> dict[str, Any]:
    from qlora_tool.export.gguf.adapter import base_of
    from qlora_tool.export.gguf.modelfile import write_modelfile
    from qlora_tool.export.gguf.write import write_gguf

    if not staging.done(BASE_FILE):
        with staging.whole(BASE_FILE) as file:
            encoder = Encoder(base_of(job.merged), ["dequantized"])
            facts = write_gguf(encoder, job.base_folder, job.tokenizer_folder, file, job.gguf_type)
            staging.note(gguf=facts)
    write_modelfile(staging.folder / "Modelfile", BASE_FILE, job.tokenizer_folder, job.base_folder, ADAPTER_FILE)
    return staging.notes["gguf"]


def _gguf_adapter_bytes(job: Job) -> int:
    from qlora_tool.export.gguf.adapter import adapter_bytes, base_of
    from qlora_tool.export.gguf.write import planned_bytes

    base = planned_bytes(base_of(job.merged), job.gguf_type) if job.with_base else 0
    return adapter_bytes(job.merged) + base


def _check_gguf_adapter(job: Job) -> None:
    from qlora_tool.export.gguf.adapter import refuse_unholdable

    refuse_unholdable(job.artifact, job.merged, job.with_base)


@contextmanager
def _gguf_adapter_read_back(job: Job, staging: Staging) -> Iterator[Path]:
    from qlora_tool.export.gguf.adapter import read_adapter_back

    base = staging.folder / BASE_FILE if job.with_base else None
    with _folder_for_a_while(staging) as folder:
        read_adapter_back(job.merged, staging.folder / ADAPTER_FILE, base, folder)
        yield folder


def _write_requantized(kind: str) -> Write:
    def write(job: Job, staging: Staging) -> dict[str, Any]:
        from qlora_tool.export.requantized import write_requantized

        facts = write_requantized(job.artifact, job.encoder, staging.folder, kind, job.max_shard_size)
        _copy_beside(job, staging.folder)
        written = {key: facts.pop(key) for key in ("files", "bytes")}
        return written | {"requantization": facts, "encoding": job.encoder.facts()}

    return write


def _requantized_bytes(kind: str) -> Callable[[Job], int]:
    def nbytes(job: Job) -> int:
        from qlora_tool.export.requantized import requantized_bytes

        return requantized_bytes(job.artifact, job.merged, kind)

    return nbytes


def _write_adapter(portable: bool) -> Write:
    def write(job: Job, staging: Staging) -> dict[str, Any]:
        from qlora_tool.export.adapter_only import write_adapter

        facts = write_adapter(job.artifact, staging.folder, portable)
        return _files_of(staging.folder) | facts

    return write


def _check_adapter(job: Job) -> None:
    if job.artifact.stack:
        raise UserError(
            "--format adapter, adapter-portable: a sum of adapters is not one of them; choose safetensors, gguf or "
            "nf4, which merge it, or export the adapters one by one"
        )


def _adapter_bytes(job: Job) -> int:
    return sum(path.stat().st_size for path in job.artifact.adapter.folder.iterdir() if path.is_file())


def _files_of(folder: Path) -> dict[str, Any]:
    files = sorted(folder.glob("*.safetensors"))
    return {"files": [file.name for file in files], "bytes": sum(file.stat().st_size for file in files)}


FORMATS: dict[ExportFormat, Format] = {
    "safetensors": Format(_write_safetensors, _merged_bytes, auto_dtype=True, as_model=_itself),
    "gguf": Format(_write_gguf, _gguf_bytes, _check_gguf, as_model=_gguf_read_back),
    "gguf-adapter": Format(_write_gguf_adapter, _gguf_adapter_bytes, _check_gguf_adapter,
                           as_model=_gguf_adapter_read_back),
    **{kind: Format(_write_requantized(kind), _requantized_bytes(kind), as_model=_itself)
       for kind in BITSANDBYTES},
    "adapter": Format(_write_adapter(portable=False), _adapter_bytes, _check_adapter),
    "adapter-portable": Format(_write_adapter(portable=True), lambda job: 4 * _adapter_bytes(job),
                               _check_adapter),
}
