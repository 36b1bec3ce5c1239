"""The tools without a `.py` as modules: one tool takes a function or a table from another."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType


def load_script(name: str) -> ModuleType:
    """`tools/NAME` as a module, its `main` not run."""
    loader = SourceFileLoader(name, str(Path(__file__).parent / name))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    sys.modules[name] = module  # where its dataclasses look up their annotations
    loader.exec_module(module)
    return module
