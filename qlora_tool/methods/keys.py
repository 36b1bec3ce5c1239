"""What classes of configuration keys are made of: their base, and the kinds of numbers.

    class LohaKeys(MethodKeys):
        rank_dropout: Share = 0.0
        \"\"\"Shown in docs/configuration.md and by editors.\"\"\"

`qlora_tool.config` builds its sections from the same; it is above the methods, which therefore do not import it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from enum import Enum
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WrapValidator

# YAML 1.1 reads `2e-4`, which has no dot, as text.
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_DIGITS = 4000  # Python reads no more of them
MOST, MOST_RANK = 2**31 - 1, 2**16  # of what is counted; of columns of A, which no layer is wider than
MOST_RATE = 1e30  # of what is multiplied by: a float of 32 bits holds it, and some room is left
_EXACT = 2**53  # whole numbers up to here are floats, too


class Mark(Enum):
    """What else is known of a key, written in its annotation: `Annotated[Count, Mark.NOT_IN_MEMORY]`."""

    NOT_IN_MEMORY = "no tensor of a training step depends on it, or only through the shape of the batch"
    FREE_ON_RESUME = "a run may be resumed with another value: its numbers stay the same"


class Keys(BaseModel):
    """A class of keys: values cannot be changed, unknown keys are errors, the text below a key describes it.

    Values are taken as YAML gives them: true is not a number, 16 not a text.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
    marks: ClassVar[frozenset[Mark]] = frozenset()
    """Marks of every key of the class."""


class MethodKeys(Keys):
    """Keys of the section `adapter` that not every method reads. Methods may share a class, or a base of it.

    Class attributes:
        not_read: keys of every adapter that this method does not read all the same, such as `bias`.
        only_read: the keys of every adapter that it reads beside `method`, where those are few; None: all others.
        trains_base: whether it trains the base's own weights, which must not be quantized then.
    """

    not_read: ClassVar[frozenset[str]] = frozenset()
    only_read: ClassVar[frozenset[str] | None] = None
    trains_base: ClassVar[bool] = False

    @classmethod
    def reads(cls, key: str) -> bool:
        """Whether it reads a key of every adapter, or has it itself."""
        if key in cls.model_fields or key == "method":
            return True
        return key not in cls.not_read if cls.only_read is None else key in cls.only_read


def to_number(value: Any) -> Any:
    """Text that is a finite number (`2e-4`, `16`) as that number, anything else as it is."""
    if not isinstance(value, str) or not _NUMBER.fullmatch(text := value.strip()):
        return value
    if text.lstrip("+-").isdigit():
        return int(text) if len(text) <= _DIGITS else value
    return number if math.isfinite(number := float(text)) else value


def _to_whole(value: Any) -> Any:
    value = to_number(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _as_written(value: Any, check: Callable[[Any], float]) -> float:
    """32 stays 32, and is written back so, where a float is as good; what no 64 bits hold is a float."""
    value = to_number(value)
    checked = check(value)
    return value if isinstance(value, int) and abs(value) <= _EXACT else checked


WHOLE, AS_WRITTEN = BeforeValidator(_to_whole), WrapValidator(_as_written)
Count = Annotated[int, Field(ge=1, le=MOST), WHOLE]
Rank = Annotated[int, Field(ge=1, le=MOST_RANK), WHOLE]
Positive = Annotated[float, Field(gt=0, le=MOST_RATE), AS_WRITTEN]
NotNegative = Annotated[float, Field(ge=0, le=MOST_RATE), AS_WRITTEN]
NotEmpty = Annotated[str, Field(pattern=r"\S")]
Share = Annotated[float, Field(ge=0, lt=1), AS_WRITTEN]
