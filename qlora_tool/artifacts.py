"""What a user points at: a run, an adapter, or a model; and what is needed to open it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_tool.adapters.peft_files import StoredAdapter, is_adapter, read_adapter
from qlora_tool.config import ModelConfig
from qlora_tool.errors import UserError
from qlora_tool.run_folder import RunFolder

if TYPE_CHECKING:
    from qlora_tool.config import Config


@dataclass(frozen=True)
class Artifact:
    """A model, with an adapter on it where there is one.

    Attributes:
        name: as the user gave it.
        model: the model to open; an adapter's base where there is an adapter.
        adapter: to put on it, or None.
        run: the configuration of the run that made the adapter, or None.
        base: what `--compare-base` compares with, or None.
    """

    name: str
    model: ModelConfig
    adapter: StoredAdapter | None = None
    run: Config | None = None
    base: ModelConfig | None = None


@dataclass(frozen=True)
class BaseOptions:
    """What the command line says of an adapter's base; None where it says nothing."""

    model: str | None = None
    quantization: str | None = None
    double_quant: bool | None = None
    device: str = "auto"
    compute_dtype: str = "auto"


def find_artifact(name: str, options: BaseOptions) -> Artifact:
    """Tell what `name` is and how to open it.

    Args:
        name: a run's folder, an adapter's folder, a model folder, a hub id, or demo.
        options: override what the artifact itself says of its base.

    Raises:
        UserError: an unfinished run, an adapter whose base or quantization is not known.
    """
    path = Path(name).expanduser()
    run = RunFolder(path)
    if run.holds_run():
        if not run.is_finished():
            raise UserError(
                f"{path}: this run is not finished; finish it with `qlora-tool train {run.config_file}`, which goes on from "
                "its last checkpoint"
            )
        config = run.config()
        base = _override(config.model, options)
        return Artifact(name, base, read_adapter(run.adapter), config, base)
    if path.is_dir() and is_adapter(path):
        stored = read_adapter(path)
        base = _base_of(stored, options)
        return Artifact(name, base, stored, None, base)
    model = ModelConfig(name_or_path=name, quantization=options.quantization or "none",
                        double_quant=options.double_quant is not False,
                        device=options.device, compute_dtype=options.compute_dtype)  # fmt: skip
    return Artifact(name, model, base=_base_of_export(path, options))


def _override(model: ModelConfig, options: BaseOptions) -> ModelConfig:
    values = {"name_or_path": options.model, "quantization": options.quantization, "double_quant": options.double_quant}
    changed = {key: value for key, value in values.items() if value is not None}
    return model.model_copy(
        update=changed | {"device": options.device, "compute_dtype": options.compute_dtype, "keep_quantized": False}
    )


def _base_of(stored: StoredAdapter, options: BaseOptions) -> ModelConfig:
    """The base of an adapter outside a run: from its provenance, or from the options where PEFT alone made it."""
    if stored.provenance is not None:
        return _override(_base_of_provenance(stored.provenance), options)
    name = options.model or stored.base
    if not name:
        raise UserError(f"{stored.folder}: does not say which base it was trained on; name it with --model BASE")
    if options.quantization is None:
        raise UserError(
            f"{stored.folder}: PEFT's files do not say how the base was quantized while it was trained; give "
            "--quantization nf4, fp4, int8 or none (with --no-double-quant where the scales were not)"
        )
    return _override(ModelConfig(name_or_path=name, revision=stored.peft.get("revision")), options)


def _base_of_provenance(provenance: dict) -> ModelConfig:
    base = provenance["base"]
    return ModelConfig(
        name_or_path=base["name_or_path"], revision=base["revision"], quantization=provenance["quantization"],
        double_quant=provenance["double_quant"],
    )  # fmt: skip


def _base_of_export(path: Path, options: BaseOptions) -> ModelConfig | None:
    """What an exported model was made from; None for any other model."""
    file = path / "qlora_tool.json"
    if not file.exists():
        return None
    provenance = json.loads(file.read_text(encoding="utf-8"))
    return _override(_base_of_provenance(provenance), options)
