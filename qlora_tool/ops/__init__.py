"""Numbers only: operations and their versions by device. Knows nothing of models or files."""

import logging
import os

from qlora_tool.ops.onednn_caches import bound_caches


def _import_bitsandbytes() -> None:
    """As it is imported it asks for an optional kernel package, which nothing here needs, on a CPU with bf16
    instructions; and lets torch compile two of its operations, for which the whole compiler is imported."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        import bitsandbytes  # noqa: F401
    finally:
        if before is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = before


bound_caches()
_import_bitsandbytes()
