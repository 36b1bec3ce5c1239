"""The adapter without its base: as it is, or in the form that every reader of PEFT's files takes.

`adapter-portable` leaves a reader nothing to work out: scales are in B, every layer has one rank (zeros fill it up),
lora_alpha = r, so that rank-stabilised scales, rank and alpha patterns are gone, and modules are named. PEFT, vLLM and
llama.cpp, which read different parts of `adapter_config.json`, then compute the same.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from qlora_tool.adapters.adapter import ExpertsAdapter
from qlora_tool.adapters.peft_names import CONFIG_NAME, PREFIX, WEIGHTS_NAME
from qlora_tool.adapters.stored import StoredAdapter
from qlora_tool.artifacts import base_folder
from qlora_tool.errors import UserError
from qlora_tool.export.generation import named_and_trained
from qlora_tool.export.readers import readers
from qlora_tool.files.atomic import write_json
from qlora_tool.files.tensors import write_all
from qlora_tool.model.config_file import read_config_file
from qlora_tool.model.load import build_skeleton
from qlora_tool.model.source import read_model_config
from qlora_tool.model.tokenizer_files import copy_tokenizer, has_tokenizer

if TYPE_CHECKING:
    from qlora_tool.artifacts import Artifact
    from qlora_tool.methods.lora import Lora


def write_adapter(artifact: Artifact, folder: Path, portable: bool) -> dict[str, Any]:
    """Write an adapter in PEFT's two files, and the tokenizer that lies beside it.

    Args:
        artifact: with an adapter.
        folder: an empty one.
        portable: for readers that know PEFT's files alone; else the files are copied as they are.

    Returns:
        method, layers and base (a hub id, or the full path of a folder); where `portable`, the ranks' common size `r`
        and the `dtype`; `readers`, as `readers.readers` tells them; `resize_token_embeddings`, where a reader has to
        call that on the base first; `eos_token_id`, where answers end in tokens that the base's generation settings do
        not name.

    Raises:
        UserError: `portable`, and PEFT has nothing that computes what this adapter does.
    """
    stored = artifact.adapter
    base = base_name(artifact)
    facts: dict[str, Any] = {"method": stored.method.name, "layers": len(stored.by_module), "base": base}
    if stored.method.keys.trains_base:
        raise UserError(
            f"--format adapter: this run is {stored.method.name}: it trained the base's own weights, and there is no "
            "adapter; choose --format safetensors"
        )
    facts["readers"] = readers(stored, artifact_skeleton(artifact), portable)
    if portable:
        if stored.token_rows() or any(stored.adapter_class(name) is ExpertsAdapter for name in stored.by_module):
            raise UserError(
                "--format adapter-portable: its readers know LoRA on modules alone, and this adapter is on experts or "
                "rows of tokens too; choose --format adapter, which PEFT reads, or safetensors, which merges it"
            )
        if stored.method.peft_type != "LORA":
            raise UserError(
                f"--format adapter-portable: its readers know LoRA alone, and this adapter is {stored.method.name}; "
                "choose --format adapter, which PEFT reads, or safetensors, which merges it"
            )
        if stored.repeats_start:
            raise UserError(
                f"--format adapter-portable: {stored.folder}: PEFT took its start "
                f"({stored.peft.get('init_lora_weights')}) out of the base, and readers of portable adapters do not; "
                "choose --format adapter, which PEFT reads, or safetensors, which merges it"
            )
        facts |= _write_portable(stored, base, artifact.model.revision, folder)
    else:
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            shutil.copyfile(stored.folder / name, folder / name)
    copy_tokenizer(stored.folder, base_folder(artifact), folder)
    if has_tokenizer(stored.folder) and (ends := other_ends(artifact)):
        facts["eos_token_id"] = ends
    if rows := _new_rows(artifact):
        facts["resize_token_embeddings"] = rows
    return facts


def artifact_skeleton(artifact: Artifact) -> Any:
    """The modules of an adapter's base, without weights."""
    config = read_model_config(base_folder(artifact), artifact.model.trust_remote_code)
    return build_skeleton(config, artifact.model.trust_remote_code)


def base_name(artifact: Artifact) -> str:
    """What a reader can open the base by: a hub id, or the full path of a folder."""
    name = artifact.model.name_or_path
    if name == "demo" or Path(name).expanduser().is_dir():
        return str(base_folder(artifact).resolve())
    return name


def _write_portable(stored: StoredAdapter, base: str, revision: str | None, folder: Path) -> dict[str, Any]:
    tensors, rank = portable_tensors(stored)
    write_all(folder / WEIGHTS_NAME, tensors, {"format": "pt"})
    write_json(folder / CONFIG_NAME, plain_config(stored, rank, base, revision), sort_keys=True)
    return {"r": rank, "dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch.")}


def portable_tensors(stored: StoredAdapter) -> tuple[dict[str, Tensor], int]:
    """The adapter's tensors by PEFT's names, scales multiplied into B and ranks filled up; and the common rank.

    All of the adapter's are of one dtype: see `Lora.portable`, or fp32 where that leaves several.
    """
    method = cast("Lora", stored.method)
    settings = {name: stored.settings(name) for name in stored.by_module}
    rank = max(layer.r for layer in settings.values())
    adapted, result = {}, {}
    for key, tensor in sorted(stored.tensors.items()):
        if (owner := stored.owner(key)) is None:
            result[f"{PREFIX}{key}"] = tensor.contiguous()
        else:
            module, name = owner
            adapted[f"{PREFIX}{key}"] = method.portable(name, tensor, settings[module], rank).contiguous()
    if len({tensor.dtype for tensor in adapted.values()}) > 1:
        adapted = {key: tensor.float() for key, tensor in adapted.items()}
    return adapted | result, rank


def plain_config(stored: StoredAdapter, rank: int, base: str, revision: str | None) -> dict[str, Any]:
    """The configuration of a LoRA of scale 1 and one rank, with `stored`'s places: keys that PEFT has known from its
    first LoRA on, and those of later ones only where they are needed."""
    peft = stored.peft
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": peft.get("lora_dropout", 0.0),
        "init_lora_weights": True,
        "bias": "lora_only" if str(peft.get("bias")).endswith("_only") else peft.get("bias", "none"),  # vera_only
        "fan_in_fan_out": bool(peft.get("fan_in_fan_out")),
        "target_modules": _named_modules(stored),
        "modules_to_save": peft.get("modules_to_save") or None,
    }
    config |= {key: True for key in ("use_dora", "lora_bias") if peft.get(key)}
    rows = peft.get("trainable_token_indices")
    return config | ({"trainable_token_indices": rows} if rows else {})


def _named_modules(stored: StoredAdapter) -> list[str]:
    """The adapted modules: as listed, unless it takes more than the list to tell them."""
    peft, names = stored.peft, sorted(stored.by_module)
    listed = peft.get("target_modules")
    further = any(peft.get(key) for key in ("exclude_modules", "layers_to_transform", "layers_pattern"))
    return sorted(listed) if isinstance(listed, list) and not further else names


def other_ends(artifact: Artifact) -> list[int]:
    """The ends of an answer, where those at which the base ends one are not all."""
    base, trust = base_folder(artifact), artifact.model.trust_remote_code
    named, ends = named_and_trained(base, read_model_config(base, trust), artifact.adapter.folder, trust)
    return ends if ends != named else []


def _new_rows(artifact: Artifact) -> int | None:
    """The rows of the adapter's own embeddings, where the base has another number: tokens were added."""
    ends = ("embed_tokens.weight", "wte.weight")
    replaced = artifact.adapter.replaced_tensors()
    rows = next((tensor.shape[0] for name, tensor in replaced.items() if name.endswith(ends)), None)
    if rows is None:
        return None
    config = read_config_file(base_folder(artifact))
    return rows if config.get("vocab_size") not in (None, rows) else None
