"""Fine-tune language models on a quantized base with LoRA, and export the result exactly.

    from qlora_tool import evaluate, export_merged, generate, inspect, preview, profile_memory, train

What the command line does, as functions; see `qlora_tool.api`. Importing this package imports nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qlora_tool._version import __version__
from qlora_tool.errors import MachineError, UserError

if TYPE_CHECKING:
    from qlora_tool.api import evaluate, export_merged, generate, inspect, preview, profile_memory, report, train
    from qlora_tool.config import Config
    from qlora_tool.export.write import ExportResult
    from qlora_tool.inference.generate import GenerateResult
    from qlora_tool.inference.score import EvaluateResult
    from qlora_tool.inspection.inspect import InspectResult
    from qlora_tool.memory.profile_run import MemoryProfile
    from qlora_tool.reporting.page import ReportResult
    from qlora_tool.training.interrupt import Interrupted
    from qlora_tool.training.preview import PreviewResult
    from qlora_tool.training.result import TrainResult

__all__ = [
    "Config",
    "EvaluateResult",
    "ExportResult",
    "GenerateResult",
    "InspectResult",
    "Interrupted",
    "MachineError",
    "MemoryProfile",
    "PreviewResult",
    "ReportResult",
    "TrainResult",
    "UserError",
    "__version__",
    "evaluate",
    "export_merged",
    "generate",
    "inspect",
    "preview",
    "profile_memory",
    "report",
    "train",
]

_HOMES = {
    "evaluate": "api",
    "export_merged": "api",
    "generate": "api",
    "inspect": "api",
    "preview": "api",
    "profile_memory": "api",
    "report": "api",
    "train": "api",
    "Config": "config",
    "EvaluateResult": "inference.score",
    "ExportResult": "export.write",
    "GenerateResult": "inference.generate",
    "InspectResult": "inspection.inspect",
    "Interrupted": "training.interrupt",
    "MemoryProfile": "memory.profile_run",
    "PreviewResult": "training.preview",
    "ReportResult": "reporting.page",
    "TrainResult": "training.result",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for, when it is."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
