"""What is written about an export: what its files depend on, where they come from, and how they came out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qlora_tool._version import __version__
from qlora_tool.artifacts import Artifact
from qlora_tool.export.encoding import slopes_dtype
from qlora_tool.export.options import ExportOptions
from qlora_tool.files.digest import sha256
from qlora_tool.files.hashes import file_hashes
from qlora_tool.model.slots import Quantization
from qlora_tool.ops.products import products_choice

if TYPE_CHECKING:
    from qlora_tool.data.tokenize import Example
    from qlora_tool.export.rows import CalibrationRows


def inputs_of(
    artifact: Artifact, folder: Path, options: ExportOptions, calibration: CalibrationRows | str,
    rows: tuple[Sequence[Example], str] | None = None,
) -> dict[str, Any]:
    """All that the large files depend on; the small ones are written anew each time."""
    adapter = artifact.adapter.folder
    asked = {key: value for key, value in asdict(options).items() if key not in ("overwrite", "verify", "verify_data")}
    return {
        "versions": [__version__, torch.__version__],
        "adapter": {file.name: sha256(file) for file in sorted(adapter.glob("adapter_*"))},
        **({"stack": stack_facts(artifact)} if artifact.stack else {}),
        "tokenizer": {file.name: sha256(file) for file in sorted(adapter.glob("tokenizer*"))},
        "base": file_hashes(folder),
        "quantization": asdict(Quantization.of(artifact.model)),
        "options": asked,
        "calibration": None if isinstance(calibration, str) else [calibration.digest(), *made_by()],
        "rows": _digest(rows[0]) if rows and len(options.candidates) > 1 else None,  # by which a type is chosen
    }


def made_by() -> list[str]:
    """What the last digits of codes that are made with rows depend on, beside their inputs."""
    return [products_choice(), str(slopes_dtype()).removeprefix("torch.")]


def _digest(rows: Sequence[Example]) -> str:
    return hashlib.sha256(json.dumps([[row.input_ids, row.labels] for row in rows]).encode()).hexdigest()


def stack_facts(artifact: Artifact) -> list[dict[str, Any]]:
    """What a weighted sum was made of: every adapter with its weight, its files and its data."""
    return [
        {
            "name": one.name, "weight": one.weight, "method": one.stored.method.name,
            "files": {file.name: sha256(file) for file in sorted(one.stored.folder.glob("adapter_*"))},
            "data": (one.stored.provenance or {}).get("data"),
        }
        for one in artifact.stack
    ]  # fmt: skip


def provenance_of(artifact: Artifact, result: dict[str, Any]) -> dict[str, Any]:
    """What the adapter says of itself, and what it was merged onto in fact: the command line may have named another."""
    known = artifact.adapter.provenance or {"method": artifact.adapter.method.name}
    base = {"name_or_path": artifact.model.name_or_path, "revision": artifact.model.revision}
    return known | {
        "base": known.get("base", {}) | base,
        "quantization": artifact.model.quantization,
        "double_quant": artifact.model.double_quant,
        "embeddings": artifact.model.embeddings,
        "skip_modules": artifact.model.skip_modules,
        "merged": {"base": result["base"], "dtype": result["dtype"]},
        **({"method": "sum", "data": None, "stack": stack_facts(artifact)} if artifact.stack else {}),
    }


def report_of(artifact: Artifact, folder: Path, options: ExportOptions, result: dict[str, Any]) -> dict[str, Any]:
    """`export.json`: what was exported from what, and how well. Nothing that differs from one run to the next."""
    known = artifact.adapter.provenance or {}
    adapter = artifact.adapter.folder
    asked = {key: value for key, value in asdict(options).items() if key != "overwrite"}
    return {
        "schema": 1,
        "qlora_tool": __version__,
        "options": asked,
        **{key: value for key, value in result.items() if key not in ("output_dir", "verification")},
        "provenance": {
            "base": {
                "name_or_path": artifact.model.name_or_path,
                "revision": artifact.model.revision,
                "quantization": artifact.model.quantization,
                "double_quant": artifact.model.double_quant,
                "embeddings": artifact.model.embeddings,
                "skip_modules": artifact.model.skip_modules,
                "files": file_hashes(folder),
            },
            "adapter": None if artifact.stack else {
                "method": artifact.adapter.method.name,
                "files": {file.name: sha256(file) for file in sorted(adapter.glob("adapter_*"))},
            },
            **({"stack": stack_facts(artifact)} if artifact.stack else {}),
            "data": None if artifact.stack else known.get("data"),
        },
        "verification": result["verification"],
    }
