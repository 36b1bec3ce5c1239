"""Adapters read from PEFT's format; what PEFT 0.21 writes, and what earlier versions wrote."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qlora_tool.adapters.adapter import Adapter, ExpertsAdapter
from qlora_tool.adapters.as_written import refuse_damaged
from qlora_tool.adapters.peft_names import (
    CONFIG_NAME,
    PREFIX,
    WEIGHTS_NAME,
    check_config,
    check_provenance,
    is_saved,
    is_target,
    join_experts,
    moved,
    plain_names,
)
from qlora_tool.adapters.stored import StoredAdapter
from qlora_tool.adapters.targets import from_pattern
from qlora_tool.adapters.token_rows import SUFFIX
from qlora_tool.errors import UserError
from qlora_tool.files.reading import read_object
from qlora_tool.files.tensors import read_all
from qlora_tool.methods import METHODS
from qlora_tool.methods.method import Method, Settings, refuse_keys
from qlora_tool.model.parameter_source import tied_names
from qlora_tool.once import log_once
from qlora_tool.sizes import counted, noun_of

logger = logging.getLogger(__name__)


def is_adapter(folder: Path) -> bool:
    """Whether there is a PEFT configuration in `folder`."""
    return (folder / CONFIG_NAME).exists()


def adapters_inside(folder: Path) -> list[Path]:
    """The folders in `folder` that are adapters: PEFT saves those that have a name so."""
    return sorted(file.parent for file in folder.glob(f"*/{CONFIG_NAME}"))


def read_adapter(folder: Path) -> StoredAdapter:
    """Read an adapter's folder, ours or PEFT's.

    Raises:
        UserError: files missing, a kind of adapter that cannot be read, pickled weights.
    """
    config_file, weights_file = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    if not config_file.exists() and not config_file.is_symlink():
        inside = adapters_inside(folder)
        what = "a run's adapter is" if (folder / "adapter") in inside else "the adapter lies in"
        cure = f"; {what} {folder / 'adapter' if what.startswith('a run') else inside[0]}" if inside else ""
        raise UserError(f"{folder}: no {CONFIG_NAME} in it, so it is not an adapter's folder{cure}")
    if weights_file.exists():
        refuse_damaged(folder)
    peft = _read_json(config_file)
    check_config(config_file, peft)
    if not weights_file.exists():
        hint = "; its weights are a pickle: load and save it once with PEFT (safe_serialization is its default)" if (
            folder / "adapter_model.bin"
        ).exists() else ""  # fmt: skip
        raise UserError(f"{folder}: no {WEIGHTS_NAME} in it{hint}")
    method, usual = _method_of(config_file, peft)
    tensors = plain_names(read_all(weights_file))
    provenance_file = folder / "qlora_tool.json"
    provenance = _read_json(provenance_file) if provenance_file.exists() else None
    if provenance is not None:
        check_provenance(provenance_file, provenance)
    stored = StoredAdapter(folder, peft, tensors, provenance, method, usual)
    _refuse_no_numbers(weights_file, tensors)
    stored = _of_targets(weights_file, stored)
    _refuse_incomplete(weights_file, stored)
    return stored


def _of_targets(file: Path, stored: StoredAdapter) -> StoredAdapter:
    """The adapter without tensors that PEFT would not read, as no target names their modules; a warning counts them."""
    left: dict[str, list[str]] = {}
    for key in stored.tensors:
        owner = stored.owner(key)
        if owner is not None and stored.adapter_class(owner[0]) is not ExpertsAdapter:
            module = owner[0].replace(".base_layer", "")
            if not is_target(module, stored.peft):
                left.setdefault(owner[0], []).append(key)
    if not left or stored.method.on_attention:  # prompts are on attention, whatever target_modules says
        return stored
    if len(left) == len(stored.by_module):
        none = noun_of(len(left), "does not name the module", f"names none of the {len(left)} modules")
        raise UserError(
            f"{file}: {CONFIG_NAME} {none} that its tensors are for "
            f"({next(iter(left))} …) in target_modules, or excludes them, so that PEFT reads none of them; correct it, "
            "or copy it again"
        )
    count = sum(map(len, left.values()))
    log_once(
        logger, logging.WARNING,
        f"{file}: {counted(count, 'tensor')} of {counted(len(left), 'module')} ({next(iter(left))} …) "
        f"{noun_of(count, 'is', 'are')} not read: {CONFIG_NAME} does not name them in target_modules, or excludes "
        "them, and PEFT leaves them out as well"
    )
    names = {key for keys in left.values() for key in keys}
    return replace(stored, tensors={key: tensor for key, tensor in stored.tensors.items() if key not in names})


def for_model(stored: StoredAdapter, model: nn.Module) -> StoredAdapter:
    """The adapter by the names that a model has: those of earlier versions of transformers, and LoRA on single experts
    that are one weight today, are brought to it as PEFT does. What it replaces of two tied tensors it replaces of both,
    unless `modules_to_save` trains one of them apart.

    Raises:
        UserError: see `join_experts`.
    """
    modules = {name for name, _ in model.named_modules()}
    shared = set(stored.method.shared_names.values())
    tensors = {key if key in shared else moved(key, modules.__contains__): tensor
               for key, tensor in stored.tensors.items()}  # fmt: skip
    if stored.method.on_experts:
        joined = join_experts(tensors, stored.usual.r, modules.__contains__, stored.folder / WEIGHTS_NAME)
    else:
        joined = tensors
    twins = _twins(replace(stored, tensors=joined), model)
    if joined.keys() == stored.tensors.keys() and not twins:
        return stored
    peft = dict(stored.peft)
    if joined.keys() != tensors.keys():
        fused = {r".*\.experts\.gate_up_proj": 2}
        peft["target_parameters"] = ["experts.gate_up_proj", "experts.down_proj"] if any(
            ".experts.base_layer." in key for key in joined) else ["experts.down_proj"]  # fmt: skip
        peft["rank_pattern"] = {key: times * stored.usual.r for key, times in fused.items()}
        peft["alpha_pattern"] = {key: times * stored.usual.alpha for key, times in fused.items()}
    return replace(stored, tensors=joined | twins, peft=peft)


def _twins(stored: StoredAdapter, model: nn.Module) -> dict[str, Tensor]:
    """What is tied to tensors that the file replaces alone."""
    replaced = stored.replaced_tensors()
    pairs = [pair for tied in tied_names(model).items() for pair in (tied, tied[::-1])]
    return {other: replaced[one] for one, other in pairs
            if one in replaced and other not in replaced and not is_saved(one, stored.peft)}  # fmt: skip


def _read_json(file: Path) -> dict[str, Any]:
    return read_object(file, "copy or save the adapter again")


def _method_of(file: Path, peft: dict[str, Any]) -> tuple[Method, Settings]:
    """The method of an adapter_config.json, and the settings in it."""
    for method in METHODS.values():
        if (settings := method.from_peft(file, peft)) is not None:
            if peft.get("target_parameters") and not method.on_experts:
                refuse_keys(file, peft, {"target_parameters": None})
            return method, settings
    known = ", ".join(dict.fromkeys(method.peft_type for method in METHODS.values()))
    raise UserError(f"{file}: peft_type {peft.get('peft_type')!r} cannot be read here; expected one of {known}")


def _refuse_no_numbers(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors with values that are no finite numbers, or codes that something made of them."""
    if empty := [name for name, tensor in tensors.items() if not tensor.numel()]:
        raise UserError(f"{file}: tensor {empty[0]} has shape {tuple(tensors[empty[0]].shape)}, and so no values; copy "
                        "or save the adapter again")  # fmt: skip
    if codes := [name for name, tensor in tensors.items()
                 if not tensor.is_floating_point() or tensor.dtype.itemsize == 1]:  # fmt: skip
        numbers = noun_of(len(codes), "is not of floating-point numbers", "are not floating-point numbers")
        raise UserError(f"{file}: {len(codes)} of its {len(tensors)} tensors {numbers} of 16 bits or more, the first "
                        f"{codes[0]} ({tensors[codes[0]].dtype}); save the adapter again in 16 or 32 bits")  # fmt: skip
    faults = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if faults:
        hold = noun_of(len(faults), "holds", "hold")
        raise UserError(
            f"{file}: {len(faults)} of its {len(tensors)} tensors {hold} values that are not finite numbers, the first "
            f"{faults[0]}: the training that made it diverged; take an earlier checkpoint, or train again"
        )


def _refuse_incomplete(file: Path, stored: StoredAdapter) -> None:
    """Refuse tensors that do not make up complete adapters, all faults in one report."""
    method, adapted = stored.method, stored.by_module
    if method.keys.trains_base:
        if not stored.tensors:
            raise UserError(f"{file}: no tensors in it; copy it again")
        return
    family = next(iter(method.peft_names.values())).partition("_")[0]  # what all of its tensors begin with
    for infix, what in method.peft_unread.items():
        if any(infix in name for name in stored.tensors):
            raise UserError(f"{file}: {what} cannot be read here; merge this adapter with PEFT instead")
    if not adapted and not stored.token_rows():
        example = f"{PREFIX}model.layers.0.….{next(iter(method.peft_names.values()))}"
        raise UserError(f"{file}: no {method.peft_type} tensors in it; expected names such as {example}")
    faults = [
        f"{file}: tensor {name} cannot be read here" for name in stored.replaced_tensors() if f".{family}_" in name
    ]
    faults += _shared_faults(file, stored) + _not_as_said(file, stored)
    for name, tensors in adapted.items():
        kind = stored.adapter_class(name)
        names = kind.names(method)
        faults += [f"{file}: tensor {name}.{names[key]} is missing" for key in method.missing(tensors)]
        if not faults and not _fit_together(stored, name):
            shapes = ", ".join(f"{names[key]} {tuple(tensor.shape)}" for key, tensor in tensors.items())
            faults.append(f"{file}: the tensors of {name} do not fit together: {shapes}")
        says = from_pattern(name, stored.peft.get("rank_pattern") or {}, stored.usual.r)
        if not faults and (r := stored.sizes(name)[1]) not in (0, says) and "r" not in method.keys.not_read:
            faults.append(f"{file}: the tensors of {name} are of rank {r}, but {CONFIG_NAME} says {says}; correct r or "
                          "rank_pattern there, or copy the adapter again")  # fmt: skip
    if faults:
        more = [f"{file}: and {len(faults) - 5} more such tensors"] if len(faults) > 5 else []
        raise UserError([*faults[:5], *more])


def _not_as_said(file: Path, stored: StoredAdapter) -> list[str]:
    """Tensors that the configuration says are there and are not, or the other way round, which PEFT would not read."""
    peft, faults = stored.peft, []
    asked = peft.get("trainable_token_indices")
    if any(asked.values() if isinstance(asked, dict) else [asked or ()]) and not stored.token_rows():
        faults.append(f"{file}: {CONFIG_NAME} has trainable_token_indices, but the file has no rows of tokens "
                      f"(….{SUFFIX}); copy or save the adapter again")  # fmt: skip
    if "lora_B_bias" in stored.method.peft_names:
        linear = {name: tensors for name, tensors in stored.by_module.items() if stored.adapter_class(name) is Adapter}
        says = bool(peft.get("lora_bias"))
        if other := [name for name, tensors in linear.items() if ("lora_B_bias" in tensors) is not says]:
            found = "is missing" if says else "is there, which PEFT would not read"
            tensor = f"{other[0]}.{stored.method.peft_names['lora_B_bias']}"
            faults.append(f"{file}: tensor {tensor} {found}, as lora_bias of {CONFIG_NAME} is {says}: save the adapter "
                          "again, or change that")  # fmt: skip
    return faults


def _shared_faults(file: Path, stored: StoredAdapter) -> list[str]:
    """What the file has of the tensors that all adapters share, against what its configuration says that it has."""
    method, faults = stored.method, []
    says = bool(method.saved_shared(stored.usual))
    for full in method.shared_names.values():
        if (full in stored.tensors) is not says:
            found = "is missing" if says else "is there, which PEFT would not read"
            cure = f"{method.shared_saved_by} of {CONFIG_NAME} is {says}: save the adapter again, or change that"
            faults.append(f"{file}: tensor {full} {found}, as {cure}")
    return faults[:1]


def _fit_together(stored: StoredAdapter, name: str) -> bool:
    tensors = stored.by_module[name]
    if stored.adapter_class(name) is ExpertsAdapter:
        return True  # seen when they were taken apart
    return all(tensor.dim() for tensor in tensors.values()) and stored.method.fits(tensors, stored.settings(name))
