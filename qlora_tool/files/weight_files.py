"""Which files of a model folder hold its weights, told before anything heavy is imported."""

from __future__ import annotations

import logging
from pathlib import Path

from qlora_tool.errors import UserError, printable
from qlora_tool.files.kinds import kind_of
from qlora_tool.files.reading import found_as, is_inside, read_object
from qlora_tool.once import log_once
from qlora_tool.sizes import counted, noun_of

logger = logging.getLogger(__name__)

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


def refuse_no_weights(name: str | None) -> None:
    """Refuse a model folder without weights that can be read; what is no model folder is passed over.

    Raises:
        UserError: see `weight_files`.
    """
    if name is not None and kind_of(name) == "model":
        weight_files(Path(name).expanduser())


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder.

    Raises:
        UserError: there are none, only pickles, or one that the index names is missing.
    """
    index = folder / INDEX_NAME
    if (folder / SINGLE_NAME).exists():  # before an index, as transformers reads it
        if index.exists():
            log_once(logger, logging.WARNING, f"{folder}: {SINGLE_NAME} is read, as transformers does, not the shards "
                     f"that {INDEX_NAME} names")  # fmt: skip
        return [folder / SINGLE_NAME]
    if index.exists():
        names = _shard_names(index)
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            gone = f"{counted(len(names), 'shard')} {noun_of(len(missing), 'is', 'are')} missing"
            raise UserError(
                f"{folder}: {len(missing)} of {gone} ({', '.join(missing[:3])}); download the model again"
            )
        return [folder / name for name in names]
    pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pth"), *folder.glob("*.pt")])
    if pickles:
        raise UserError(
            f"{folder}: its weights are pickles ({pickles[0].name}), which can run code when read; convert them once: "
            f'python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
        )
    raise UserError(
        f"{folder}: no weights in it, where {SINGLE_NAME} is expected, or shards with {INDEX_NAME}; name a folder that "
        "has them, or download the model again"
    )


def _shard_names(index: Path) -> list[str]:
    """The files that an index names, all of them in its folder: a link in it may lead elsewhere, a name not.

    Raises:
        UserError: no index, or a name that leads outside.
    """
    cure = "download the model again"
    weight_map = read_object(index, cure).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: not an index of shards (weight_map is {found_as(weight_map)}, expected an object of "
                        f"files by tensors); {cure}")  # fmt: skip
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not is_inside(name):
            raise UserError(f"{index}: {printable(tensor, 80)} lies in {printable(repr(name), 80)}, which is no name "
                            f"of a file in this folder; {cure}")  # fmt: skip
    return sorted(set(weight_map.values()))
