"""What a user points at: a run, an adapter, or a model; and what is needed to open it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_tool.adapters.peft_reading import is_adapter, read_adapter
from qlora_tool.adapters.stack import Weighted
from qlora_tool.adapters.stored import StoredAdapter
from qlora_tool.config import ModelConfig
from qlora_tool.config.places import refuse_unopenable
from qlora_tool.errors import ToolError, UserError
from qlora_tool.files.hashes import file_hashes
from qlora_tool.files.reading import read_object
from qlora_tool.files.tensors import Checkpoint
from qlora_tool.model.source import resolve
from qlora_tool.run_folder import PROVENANCE, RunFolder

if TYPE_CHECKING:
    from qlora_tool.config import Config


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Artifact:
    """A model, with an adapter on it where there is one.

    Attributes:
        name: as the user gave it.
        model: the model to open; an adapter's base where there is an adapter.
        adapter: to put on it, or None.
        stack: adapters whose weighted sum is on it instead, `adapter` being the first of them.
        run: the configuration of the run that made the adapter, or None.
        base: what `--compare-base` compares with, or None.
        base_named: whether the command line named the base.
        chat_template_kwargs: what its chat template is given besides, as in training.
    """

    name: str
    model: ModelConfig
    adapter: StoredAdapter | None = None
    run: Config | None = None
    base: ModelConfig | None = None
    base_named: bool = False
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    stack: tuple[Weighted, ...] = ()

    def summed(self) -> Artifact:
        """Itself: what `inference.several.Several` makes one artifact of."""
        return self


@dataclass(frozen=True)
class BaseOptions:
    """What the command line says of an adapter's base; None where it says nothing.

    Attributes:
        quantization_else: how the base is quantized where neither the command line nor the adapter says it; None: that
            is an error.
    """

    model: str | None = None
    quantization: str | None = None
    double_quant: bool | None = None
    device: str = "auto"
    compute_dtype: str = "auto"
    quantization_else: str | None = None


def find_artifact(name: str, options: BaseOptions) -> Artifact:
    """Tell what `name` is and how to open it.

    Args:
        name: a run's folder, an adapter's folder, a model folder, a hub id, or demo.
        options: override what the artifact itself says of its base.

    Raises:
        UserError: an unfinished run, an adapter whose base or quantization is not known.
    """
    path = Path(name).expanduser()
    refuse_unopenable(path)
    run = RunFolder(path)
    if run.holds_run():
        config, stored = run.config(), read_adapter(run.adapter)
        _refuse_other_configuration(run, config, stored)
        base = _override(config.model, options, trained=True)
        named, kwargs = options.model is not None, config.data.chat_template_kwargs
        return Artifact(name, base, stored, config, base, named, kwargs)
    if path.is_dir() and is_adapter(path):
        stored = read_adapter(path)
        base = _base_of(stored, options)
        kwargs = (stored.provenance or {}).get("chat_template_kwargs", {})
        return Artifact(name, base, stored, None, base, options.model is not None, kwargs)
    model = ModelConfig(**({"name_or_path": name, "quantization": "none"} | _own_quantization(name)))
    provenance = _provenance_of_export(path)
    return Artifact(
        name, _override(model, replace(options, model=None)), base=_base_of_export(provenance, options),
        chat_template_kwargs=provenance.get("chat_template_kwargs", {}),
    )  # fmt: skip


def base_folder(artifact: Artifact) -> Path:
    """The local folder of an artifact's model: of its base, where there is an adapter.

    Raises:
        UserError, MachineError: it is not to be had; see `model.source.resolve`.
    """
    try:
        return resolve(artifact.model.name_or_path, artifact.model.revision)
    except ToolError as error:
        if artifact.adapter is None:
            raise
        hint = f"; it is the base of {artifact.name}: say with --model BASE where it is"
        raise type(error)([line + hint for line in error.lines]) from error


def changed_base(artifact: Artifact, folder: Path) -> str | None:
    """Which weights in `folder` are others than those that the adapter was trained on, in words; None where none are
    known to be.

    Args:
        artifact: with an adapter.
        folder: the base's.
    """
    return changed_base_of(artifact.adapter, artifact.name, folder)


def changed_base_of(stored: StoredAdapter, name: str, folder: Path) -> str | None:
    """The same of an adapter alone.

    Args:
        name: what a line calls it.
    """
    trained_on = ((stored.provenance or {}).get("base") or {}).get("files")
    if not trained_on:
        return None
    files = [file.name for file in Checkpoint(folder).files]
    hashes = file_hashes(folder)
    changed = [file for file in files if hashes[file] != trained_on.get(file)]
    if not changed:
        return None
    return f"{folder}: {', '.join(changed[:3])} not as when {name} was trained on it (SHA-256 differs)"


def _override(model: ModelConfig, options: BaseOptions, trained: bool = False) -> ModelConfig:
    """The base with what the options say in its place.

    Args:
        trained: whether `model` is known to be what an adapter was trained on: another quantization is said.
    """
    values = {"name_or_path": options.model, "quantization": options.quantization, "double_quant": options.double_quant}
    changed = {key: value for key, value in values.items() if value is not None}
    for key, option in (("quantization", "--quantization"), ("double_quant", "--double-quant")):
        if trained and key in changed and changed[key] != getattr(model, key):
            logger.warning("%s %s: the adapter was trained on %s: what is opened now is another model than the trained "
                           "one; leave the option out", option, changed[key], getattr(model, key))  # fmt: skip
    return model.model_copy(
        update=changed | {"device": options.device, "compute_dtype": options.compute_dtype, "keep_quantized": False}
    )


def _refuse_other_configuration(run: RunFolder, config: Config, stored: StoredAdapter) -> None:
    """Refuse a run whose configuration was changed since in what its adapter belongs to: another model would be opened.

    Raises:
        UserError: naming the keys.
    """
    known = stored.provenance or {}
    says = {"model.quantization": config.model.quantization, "model.double_quant": config.model.double_quant,
            "model.embeddings": config.model.embeddings, "model.skip_modules": config.model.skip_modules,
            "adapter.method": config.adapter.method,
            "data.chat_template_kwargs": config.data.chat_template_kwargs}  # fmt: skip
    trained = {key: known[name] for key in says if (name := key.partition(".")[2]) in known}
    lines = [
        f"{run.config_file}: {key}: {says[key]!r}, but the adapter beside it was trained with {value!r} "
        f"({stored.folder / PROVENANCE}); the file was changed or damaged since: write {value!r} there "
        "again, or give the adapter's folder in the place of the run's"
        for key, value in trained.items() if says[key] != value
    ]  # fmt: skip
    if lines:
        raise UserError(lines)


def _base_of(stored: StoredAdapter, options: BaseOptions) -> ModelConfig:
    """The base of an adapter outside a run: from its provenance, or from the options where PEFT alone made it."""
    if stored.provenance is not None:
        try:
            return _override(_base_of_provenance(stored.provenance), options, trained=True)
        except (KeyError, TypeError) as error:
            file = stored.folder / "qlora_tool.json"
            raise UserError(
                f"{file}: does not name the base and its quantization ({error}); remove it, and give --model and "
                "--quantization"
            ) from error
    name = options.model or stored.base
    if not name:
        raise UserError(f"{stored.folder}: does not say which base it was trained on; name it with --model BASE")
    own = _own_quantization(name)
    if stored.repeats_start:
        if (options.quantization or own.get("quantization", "none")) != "none":
            raise UserError(
                f"{stored.folder}: PEFT took its start (init_lora_weights: {stored.peft.get('init_lora_weights')}) out "
                "of an unquantized base, and cannot load it onto another; leave --quantization out and name that base"
            )
        options = replace(options, quantization="none")
    if options.quantization is None and not own and options.quantization_else:
        options = replace(options, quantization=options.quantization_else)
    elif options.quantization is None and not own:
        raise UserError(
            f"{stored.folder}: PEFT's files do not say how the base was quantized while it was trained; give "
            "--quantization nf4, fp4, int8 or none (with --no-double-quant where the scales were not)"
        )
    # What PEFT trains on: bitsandbytes' modules alone are quantized.
    base = ModelConfig(name_or_path=name, revision=stored.peft.get("revision"), skip_modules="as-peft", **own)
    return _override(base, options)


def _own_quantization(name: str) -> dict[str, Any]:
    """How the weights of a model folder are themselves quantized by bitsandbytes, as keys of `ModelConfig`; empty where
    they are not, and for what is not a folder."""
    try:
        config = read_object(Path(name).expanduser() / "config.json", "")
        found = config.get("quantization_config") or {}
        found = found if isinstance(found, dict) else {}
    except UserError:
        return {}  # whoever opens the model says what is wrong with it
    if found.get("load_in_8bit"):
        return {"quantization": "int8"}
    if found.get("load_in_4bit"):
        double = found.get("bnb_4bit_use_double_quant", False)
        return {"quantization": found.get("bnb_4bit_quant_type", "fp4"), "double_quant": double}
    return {}


def _base_of_provenance(provenance: dict) -> ModelConfig:
    base = provenance["base"]
    return ModelConfig(
        name_or_path=base["name_or_path"], revision=base["revision"], quantization=provenance["quantization"],
        double_quant=provenance["double_quant"], embeddings=provenance.get("embeddings", "as_stored"),
        skip_modules=provenance.get("skip_modules", []),
    )  # fmt: skip


def _provenance_of_export(path: Path) -> dict[str, Any]:
    """What an exported model says of itself; empty for any other model."""
    try:
        return read_object(path / "qlora_tool.json", "")
    except UserError:
        return {}


def _base_of_export(provenance: dict[str, Any], options: BaseOptions) -> ModelConfig | None:
    """What an exported model was made from, quantized as it was then; None for any other model."""
    try:
        base = _base_of_provenance(provenance)
    except (KeyError, TypeError):
        return None
    return _override(base, replace(options, quantization=None, double_quant=None))
