"""Which models pack, remembered: to find out takes torch's compiler to import, and seconds.

Only that a model packs is kept: where it does not, the trial runs anew and says why.
"""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import qlora_tool.model
from qlora_tool.config import Config
from qlora_tool.files.cache import cache_folder, read_cached, write_cached


def packs_as_known(config: Config, model_config: Any) -> bool:
    """`build.packs`, which is asked only where the cache does not know the model.

    Args:
        model_config: the model's transformers configuration.
    """
    if not config.data.packing:
        return False
    file, key = cache_folder() / "packing.json", _key(config, model_config)
    known = read_cached(file)
    if known.get(key) is True:
        return True
    from qlora_tool.build.resolve import packs

    found = packs(config, model_config)
    if found:
        write_cached(file, {**known, key: True})
    return found


def _key(config: Config, model_config: Any) -> str:
    """All that the answer depends on, as one number."""
    digest = hashlib.sha256()
    digest.update(model_config.to_json_string(use_diff=False).encode())
    digest.update(f"{config.model.trust_remote_code} {version('torch')} {version('transformers')}".encode())
    for file in sorted(Path(qlora_tool.model.__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
