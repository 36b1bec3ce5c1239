"""Reading another tool's configuration: YAML, JSON, a notebook or a program, of which literals alone are read."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_tool.config.imports.axolotl import AXOLOTL
from qlora_tool.config.imports.formats import Format
from qlora_tool.config.imports.llama_factory import LLAMA_FACTORY
from qlora_tool.config.imports.peft import PEFT, PROGRAM_DEFAULTS
from qlora_tool.config.imports.unsloth import UNSLOTH
from qlora_tool.config.yaml_file import LARGEST, parse_mapping
from qlora_tool.errors import UserError
from qlora_tool.files.reading import json_value, read_text

FORMATS = (PEFT, AXOLOTL, UNSLOTH, LLAMA_FACTORY)
_CURE = ("expected a configuration of PEFT (adapter_config.json), Axolotl, Unsloth or LLaMA-Factory: .yaml, .json, .py "
         "or .ipynb")  # fmt: skip
_OTHER_CALLS = (
    "IA3Config", "AdaLoraConfig", "OFTConfig", "BOFTConfig", "PrefixTuningConfig", "PromptTuningConfig",
    "PromptEncoderConfig", "DPOTrainer", "DPOConfig", "ORPOTrainer", "ORPOConfig", "KTOTrainer", "KTOConfig",
    "CPOTrainer", "CPOConfig", "GRPOTrainer", "GRPOConfig", "PPOTrainer", "PPOConfig", "RewardTrainer", "RewardConfig",
)  # fmt: skip
_FEWEST = 2  # keys of a tool's own that tell its files


def read_foreign(file: Path, tool: str | None = None) -> tuple[Format, dict[str, Any], Mapping[str, Any]]:
    """A configuration of another tool: which, its keys, and what that tool takes for those it leaves out.

    Args:
        file: the file; or an adapter's folder, whose adapter_config.json is read.
        tool: the tool's name where it is known.

    Raises:
        UserError: it cannot be read, or is none that is known.
    """
    if file.is_dir():
        if not (file / "adapter_config.json").exists():
            raise UserError(f"{file}: a folder without an adapter_config.json; {_CURE}")
        file = file / "adapter_config.json"
    if file.suffix in (".py", ".ipynb"):
        return _of_program(file, tool)
    content, _ = parse_mapping(str(file), read_text(file, _CURE, LARGEST), _CURE)
    found = {str(key): value for key, value in content.items()}
    chosen = next((known for known in FORMATS if known.name == tool), None) or recognized(found)
    if chosen is None:
        ours = found and set(found) <= {"model", "adapter", "data", "training"}
        what = "a configuration of qlora-tool already: train, preview and profile-memory take it" if ours else _CURE
        raise UserError(f"{file}: {what}")
    return chosen, flattened(chosen, found), chosen.defaults


def flattened(chosen: Format, content: Mapping[str, Any]) -> dict[str, Any]:
    """The keys, those of sections among them."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if key in chosen.sections and isinstance(value, Mapping):
            flat |= {str(name): entry for name, entry in value.items()}
        else:
            flat[str(key)] = value
    return flat


def recognized(content: Mapping[Any, Any]) -> Format | None:
    """The tool whose own keys a file has most of; None where it has fewer than two of any."""

    def marks(known: Format) -> int:
        return len(known.marks & set(flattened(known, content)))

    best = max(FORMATS, key=marks)
    return best if marks(best) >= _FEWEST else None


def _of_program(file: Path, tool: str | None) -> tuple[Format, dict[str, Any], Mapping[str, Any]]:
    """The arguments of the calls in a program that say how it trains."""
    text = read_text(file, _CURE, LARGEST)
    try:
        tree = ast.parse(_cells(text) if file.suffix == ".ipynb" else text)
    except (SyntaxError, ValueError, RecursionError) as error:
        where = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise UserError(f"{file}{where}: not a Python program: {getattr(error, 'msg', None) or error}") from None
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    known = UNSLOTH if tool == "Unsloth" or (tool is None and any("FastLanguage" in name or name == "FastModel"
                                                                 for name in names)) else PEFT  # fmt: skip
    constants = dict(_constants(tree))
    found: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _called(node) in _OTHER_CALLS:
            raise UserError(
                f"{file}, line {node.lineno}: {_called(node)}: not done here: supervised fine-tuning by the methods of "
                "docs/methods.md is"
            )
        if isinstance(node, ast.Call) and (call := _called(node)) in known.calls:
            found |= dict(_arguments(node, call, known, constants))
        elif isinstance(node, ast.Call) and _called(node) == "train_on_responses_only":
            found["train_on_completions"] = True
    if not found:
        raise UserError(f"{file}: no call of {', '.join(known.calls)} in it, whose arguments would be read; {_CURE}")
    return known, found, known.defaults if known is UNSLOTH else PROGRAM_DEFAULTS


def _cells(text: str) -> str:
    """The code of a notebook, without the lines that are the notebook's own commands."""
    try:
        cells = json_value(text)["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except (ValueError, KeyError, TypeError):
        raise ValueError("not a notebook") from None
    lines = "\n".join(part for part in code if not part.startswith("%%")).split("\n")
    return "\n".join("pass" if line.lstrip().startswith(("%", "!")) else line for line in lines if line.strip())


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _constants(tree: ast.Module) -> Iterator[tuple[str, Any]]:
    """Names that are given a literal: `max_seq_length = 2048`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            try:
                yield node.targets[0].id, ast.literal_eval(node.value)
            except (ValueError, TypeError, RecursionError):
                continue


def _arguments(
    node: ast.Call, call: str, known: Format, constants: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """The keyword arguments of a call that are literals, or names of such; others of the table as their text."""
    if call == "from_pretrained" and node.args:
        named = _value(node.args[0], constants)
        if isinstance(named, str):
            yield "model_name", named
    for keyword in node.keywords:
        if keyword.arg is None:
            continue
        value = _value(keyword.value, constants)
        if value is not _UNREAD:
            yield keyword.arg, value
        elif keyword.arg in known.keys and keyword.arg not in ("model", "dataset"):
            yield keyword.arg, Expression(ast.unparse(keyword.value))


class Expression(str):
    """A value that a program works out, as it is written there."""


_UNREAD = object()


def _value(node: ast.expr, constants: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Name) and node.id in constants:
        return constants[node.id]
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("torch", "TaskType"):
        return f"{node.value.id}.{node.attr}"
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError):
        return _UNREAD
