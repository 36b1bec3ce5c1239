"""Which dtype the files of an export get, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qlora_tool.errors import UserError
from qlora_tool.ops.precision import COMPUTE_DTYPES

FLOAT16_LIMIT = 65520.0  # from here on a value rounds to infinity; float16's largest is 65504

# Families, by the beginning of their model type, whose activations leave float16's range, so that who reads the files
# multiplies in bfloat16 (gemma 3: transformers#36822; gemma 2 and 3, glm4 and plamo2: vLLM refuses to run them in
# float16). Their weights fit; but a file in float16 is multiplied in float16 by default.
BFLOAT16_FAMILIES = ("gemma", "glm4", "plamo2", "t5gemma", "recurrent_gemma", "vaultgemma")


@dataclass(frozen=True)
class Choice:
    """A dtype for the files.

    Attributes:
        dtype: None leaves every tensor its own.
        reason: why this one, for a line to the user.
        keeps_wider: tensors that are stored in more than 16 bits stay as they are.
    """

    dtype: torch.dtype | None
    reason: str
    keeps_wider: bool = False


class Unfit(UserError):
    """A tensor that float16 cannot hold.

    Attributes:
        name: of the tensor.
        how: what is wrong with it, "has values up to 1.2e+06".
        largest: its largest value.
    """

    def __init__(self, name: str, how: str, largest: float):
        super().__init__(f"float16: {name} {how}; choose bfloat16 or float32")
        self.name, self.how, self.largest = name, how, largest


def choices(asked: str, stored: torch.dtype, model_types: Sequence[str]) -> list[Choice]:
    """The dtypes to try, best first: each but the last gives way to the next where a tensor is `Unfit`.

    Args:
        asked: auto, or a dtype's name.
        stored: what the base is stored in.
        model_types: of the base's configuration and of its text part.
    """
    if asked != "auto":
        return [Choice(COMPUTE_DTYPES[asked], "as asked for")]
    if stored.itemsize > 2:
        return [Choice(None, "the base's own")]
    family = next((kind for kind in model_types if kind.startswith(BFLOAT16_FAMILIES)), None)
    if stored == torch.bfloat16 and family:
        reason = f"activations of {family} models overflow float16, so they are read in bfloat16"
        return [Choice(torch.bfloat16, reason, keeps_wider=True)]
    return [
        Choice(torch.float16, "every value fits, and it rounds eight times finer than bfloat16", keeps_wider=True),
        Choice(torch.bfloat16, "float16 does not hold every value", keeps_wider=True),
    ]


def refuse_unfit(found: Sequence[Unfit], option: str) -> UserError:
    """One line for all tensors that a dtype asked for cannot hold, the first three named."""
    named = ", ".join(f"{fault.name} {fault.how}" for fault in found[:3])
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return UserError(f"{option}: {named}{more}, beyond float16's 65504; choose bfloat16 or float32")
