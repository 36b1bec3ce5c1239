"""The kinds of values that a configuration's keys hold, beside pydantic's own and the numbers of `methods.keys`.

A `title` is what messages and documents call the kind. A validator's ValueError says why, if that is not plain from it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from qlora_tool.config.messages import Advised, found
from qlora_tool.config.patterns import check_pattern
from qlora_tool.config.sources import check_columns, check_sources
from qlora_tool.errors import UserError, meant_share, meant_size
from qlora_tool.files.reading import why_no_path
from qlora_tool.methods.keys import AS_WRITTEN, MOST, WHOLE, NotEmpty, to_number

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)?", re.IGNORECASE)
_SIZE_UNITS = {"": 1, "B": 1}
_MOST_BYTES = 2**63 - 1
_LEAST_BARE = 1000  # a number of bytes below it is one whose unit was left out
for _power, _letter in enumerate("KMGT", start=1):
    _SIZE_UNITS[f"{_letter}B"] = 1000**_power
    _SIZE_UNITS[f"{_letter}IB"] = 1024**_power


def parse_size(value: str | int) -> int:
    """A size in bytes: `24GB` is 24·10⁹, `22GiB` 22·2³⁰, `512MB`, `800MiB`; a whole number from 1000 on is bytes.

    Raises:
        UserError: `value` is not one of these, not more than zero, or more than 64 bits count.
    """
    size = least = 0
    if isinstance(value, int) and not isinstance(value, bool):
        size, least = value, _LEAST_BARE
    elif isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        size = int(min(float(match[1]) * _SIZE_UNITS[(match[2] or "").upper()], 2.0 * _MOST_BYTES))
        least = 0 if match[2] else _LEAST_BARE
    if not max(least, 1) <= size <= _MOST_BYTES:
        raise UserError(
            "expected a size such as 24GB (10^9 bytes each), 22GiB (2^30 bytes each) or a whole number of bytes, "
            f"found {found(value)}{meant_size(value)}"
        )
    return size


def _path(path: str) -> str:
    if reason := why_no_path(path):
        raise ValueError(f"it {reason}")
    return str(Path(path).expanduser()) if path.startswith("~/") else path


def _check_size(size: str) -> str:
    try:
        parse_size(size)
    except UserError:
        raise Advised(meant_size(size)) from None
    return size


def _check_bytes(size: int) -> int:
    if 0 < size < _LEAST_BARE:
        raise Advised(meant_size(size))
    return size


def _no_file_of_model(name: str) -> str:
    path = Path(name)
    if (path.name == "config.json" or path.suffix == ".safetensors") and not path.is_dir():
        raise Advised(f"; did you mean '{path.parent}'?")
    return name


def _no_percent(value: Any) -> Any:
    if isinstance(value, str) and (advice := meant_share(value)):
        raise Advised(advice)
    return value


def _share_or_count(value: float) -> float:
    if value >= 1 and not value.is_integer():
        raise ValueError
    return value if value < 1 else int(value)


def _to_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _one_to_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else _to_list(value)


Text = Annotated[NotEmpty, AfterValidator(_path)]
ModelName = Annotated[Text, AfterValidator(_no_file_of_model), Field(title="a hub id, a folder or demo")]
Pattern = Annotated[str, AfterValidator(check_pattern), Field(title="one regular expression")]
Epochs = Annotated[float, Field(gt=0, le=MOST), AS_WRITTEN]
_LayerNumber = Annotated[int, Field(ge=0, le=MOST), WHOLE]
LayerNumbers = Annotated[
    _LayerNumber | Annotated[list[_LayerNumber], Field(min_length=1)],
    BeforeValidator(_to_list),
    Field(title="a layer's number, counted from 0, or a list of such"),
]
ModuleNames = Annotated[list[NotEmpty], BeforeValidator(_to_list), Field(title="a list of module names")]
Size = (
    Annotated[
        str,
        AfterValidator(_check_size),
        Field(title="a size such as 24GB (10^9 bytes each) or 22GiB (2^30 bytes each)"),
    ]
    | Annotated[int, Field(gt=0, le=_MOST_BYTES, title="a whole number of bytes"), AfterValidator(_check_bytes)]
)
_Prompt = Annotated[NotEmpty, Field(max_length=4000)]
_Prompts = Annotated[list[_Prompt], Field(max_length=8, title="a list of at most 8 texts of at most 4000 characters")]
Prompts = (
    Annotated[int, Field(ge=1, le=8, title="a number of held-out rows from 1 to 8"), WHOLE]
    | Annotated[_Prompts, BeforeValidator(_one_to_list, json_schema_input_type=_Prompts | _Prompt)]
)
Fraction = Annotated[float, Field(gt=0, lt=1, title="a fraction above 0 and below 1"), AS_WRITTEN]
Mixture = Annotated[
    list[str | dict[str, Any]],
    BeforeValidator(_to_list),
    AfterValidator(check_sources),
    Field(min_length=1, title="a list of such, each a path or {path, weight or rows or repeat, format, columns}"),
]
Columns = Annotated[
    dict[str, str],
    AfterValidator(check_columns),
    Field(title="a mapping such as {prompt: question, completion: reply}"),
]
Training = Annotated[Text, Field(title="a file, a folder, a hub id")] | Mixture
Evaluation = Annotated[
    Fraction
    | Annotated[Text, Field(title="a file, a folder, a hub id")]
    | Mixture
    | Annotated[dict[NotEmpty, Text], Field(min_length=1, title="a mapping from names to such")]
    | None,
    BeforeValidator(to_number),
    BeforeValidator(_no_percent),
]
StepsOrShare = Annotated[
    float,
    Field(ge=0, le=MOST, title="a number of at least 0 (below 1 a share, from 1 on a whole number)"),
    AfterValidator(_share_or_count),
    AS_WRITTEN,
]
