"""Write a merged model as a folder that plain transformers loads: shards, configuration, tokenizer, model card."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_tool.artifacts import Artifact, base_folder
from qlora_tool.errors import MachineError, UserError, did_you_mean
from qlora_tool.export.merge import MergedModel
from qlora_tool.export.model_card import model_card
from qlora_tool.files import existing_parent, replacing_folder, write_json, write_text
from qlora_tool.model.kept_hashes import file_hashes
from qlora_tool.model.load import Quantization, build_skeleton
from qlora_tool.model.source import read_model_config
from qlora_tool.model.tensor_files import INDEX_NAME, Checkpoint, TensorSpec, shard_name, shards, write_tensors

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
                    "chat_template.jinja", "chat_templates")  # fmt: skip
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    Attributes:
        base: dequantized or original.
        dtype: auto (the base's own), bfloat16, float16 or float32.
        max_shard_size: bytes of a file at most.
        overwrite: an existing folder may be replaced.
    """

    base: str = "dequantized"
    dtype: str = "auto"
    max_shard_size: int = 5 * 10**9
    overwrite: bool = False


def export_merged(artifact: Artifact, output: Path, options: ExportOptions) -> dict[str, Any]:
    """Merge an adapter into its base and write the result to `output`, whole or not at all.

    Returns:
        What was written: folder, dtype, files, bytes, seconds.

    Raises:
        UserError: nothing to merge, an existing folder, an adapter for another base, values beyond the dtype.
        MachineError: not enough space, known before the first byte.
    """
    started = time.perf_counter()
    if artifact.adapter is None:
        raise UserError(f"{artifact.name}: {_no_adapter(Path(artifact.name))}; expected a run's folder or an adapter's")
    _refuse_taken(output, options.overwrite)
    folder = base_folder(artifact)
    _refuse_inputs(output, {"the base": folder, "the adapter": artifact.adapter.folder})
    _refuse_changed_base(artifact, folder)
    config = read_model_config(folder, artifact.model.trust_remote_code)
    raw_config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    merged = MergedModel(
        build_skeleton(config, artifact.model.trust_remote_code), Checkpoint(folder),
        Quantization(artifact.model.quantization, artifact.model.double_quant), artifact.adapter, options.base,
        None if options.dtype == "auto" else DTYPES[options.dtype],
    )  # fmt: skip
    specs = [spec for group in merged.specs() for spec in group]
    _refuse_full_disk(output, sum(spec.nbytes for spec in specs))
    with replacing_folder(output.resolve()) as temporary:
        files = _write_shards(merged, specs, temporary, options.max_shard_size)
        _write_config(raw_config, merged, temporary)
        _copy_beside(folder, artifact.adapter.folder, temporary)
        result = {
            "output_dir": str(output),
            "dtype": str(merged.default_dtype).removeprefix("torch."),
            "base": options.base,
            "files": files,
            "bytes": sum(spec.nbytes for spec in specs),
            "seconds": round(time.perf_counter() - started, 2),
        }
        write_json(temporary / "qlora_tool.json", _provenance(artifact, options, result))
        card = model_card(artifact, folder, result, chat=_has_chat_template(temporary))
        write_text(temporary / "README.md", card)
    return result


def _no_adapter(path: Path) -> str:
    if path.exists():
        return "a model without an adapter"
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    return f"no such folder{did_you_mean(path.name, siblings)}"


def _refuse_taken(output: Path, overwrite: bool) -> None:
    """Refuse to write over anything, or with `overwrite` over anything that is no model."""
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{output}: a file, where --output-dir expects a folder that does not exist yet")
    if not any(output.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{output}: exists; give --overwrite to replace it, or another --output-dir")
    if not (output / "config.json").exists():
        raise UserError(
            f"{output}: holds something else than a model, which --overwrite would remove; give another --output-dir"
        )


def _refuse_inputs(output: Path, inputs: Mapping[str, Path]) -> None:
    for what, path in inputs.items():
        if output.resolve() in (path.resolve(), *path.resolve().parents) and output.exists():
            raise UserError(f"{output}: holds {what}, which is merged; give another --output-dir")


def _refuse_changed_base(artifact: Artifact, folder: Path) -> None:
    """Refuse a base whose weights are others than those that the adapter was trained on; where the command line names
    the base, warn."""
    trained_on = ((artifact.adapter.provenance or {}).get("base") or {}).get("files")
    if not trained_on:
        return
    files = [file.name for file in Checkpoint(folder).files]
    hashes = file_hashes(folder)
    changed = [name for name in files if hashes[name] != trained_on.get(name)]
    if not changed:
        return
    found = f"{folder}: {', '.join(changed[:3])} not as when {artifact.name} was trained on it (SHA-256 differs)"
    if not artifact.base_named:
        raise UserError(f"{found}; bring the old files back, or name a base with --model to merge onto it all the same")
    logger.warning("%s; merging onto it all the same, as --model names it", found)


def _refuse_full_disk(output: Path, needed: int) -> None:
    free = shutil.disk_usage(existing_parent(output)).free
    if needed > free:
        raise MachineError(
            f"{output}: the model takes {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free there; free some, or "
            "choose another --output-dir"
        )


def _write_shards(merged: MergedModel, specs: list[TensorSpec], folder: Path, max_shard_size: int) -> list[str]:
    """Write all tensors in order, one group in memory at a time; the index too where there are several files."""
    stream = _stream(merged)
    cut = shards(specs, max_shard_size)
    names = [shard_name(index, len(cut)) for index in range(len(cut))]
    for name, shard in zip(names, cut, strict=True):
        # zip asks the specs first, so that no tensor is taken from the stream that belongs to the next file
        tensors = (tensor for _, tensor in zip(shard, stream, strict=False))
        write_tensors(folder / name, shard, tensors, {"format": "pt"})
    if len(cut) > 1:
        weight_map = {spec.name: name for name, shard in zip(names, cut, strict=True) for spec in shard}
        metadata = {"total_size": sum(spec.nbytes for spec in specs)}
        write_json(folder / INDEX_NAME, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
    return names


def _stream(merged: MergedModel) -> Iterator[tuple[str, Tensor]]:
    for group in merged.groups:
        yield from merged.tensors(group).items()


def _write_config(raw: dict[str, Any], merged: MergedModel, folder: Path) -> None:
    """The base's config.json with the new dtype and without a word of quantization."""
    dropped = ("quantization_config", "torch_dtype", "_name_or_path")
    config = {key: value for key, value in raw.items() if key not in dropped}
    config["dtype"] = str(merged.default_dtype).removeprefix("torch.")
    if merged.unties:
        config["tie_word_embeddings"] = False
    write_json(folder / "config.json", config)


def _copy_beside(base: Path, adapter: Path, folder: Path) -> None:
    """Generation settings and code from the base; the tokenizer from the adapter, which it was trained with, else from
    the base."""
    tokenizer = adapter if (adapter / "tokenizer_config.json").exists() else base
    for source, patterns in ((base, ("generation_config.json", "*.py", "LICENSE*")), (tokenizer, _TOKENIZER_FILES)):
        for path in sorted({path for pattern in patterns for path in source.glob(pattern)}):
            copy = shutil.copytree if path.is_dir() else shutil.copyfile
            copy(path, folder / path.name)


def _has_chat_template(folder: Path) -> bool:
    settings = folder / "tokenizer_config.json"
    named = json.loads(settings.read_text(encoding="utf-8")).get("chat_template") if settings.exists() else None
    return bool(named) or (folder / "chat_template.jinja").exists()


def _provenance(artifact: Artifact, options: ExportOptions, result: dict[str, Any]) -> dict[str, Any]:
    """What the adapter says of itself, and what it was merged onto in fact: the command line may have named another."""
    known = artifact.adapter.provenance or {"method": artifact.adapter.method}
    base = {"name_or_path": artifact.model.name_or_path, "revision": artifact.model.revision}
    return known | {
        "base": known.get("base", {}) | base,
        "quantization": artifact.model.quantization,
        "double_quant": artifact.model.double_quant,
        "merged": {"base": options.base, "dtype": result["dtype"]},
    }
