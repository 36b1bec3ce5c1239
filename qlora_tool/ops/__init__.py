"""Numbers only: operations and their versions by device. Knows nothing of models or files."""

import logging

from qlora_tool.ops.onednn_caches import bound_caches

# On a CPU with bf16 instructions bitsandbytes asks for an optional kernel package at import; nothing here needs it.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
bound_caches()
