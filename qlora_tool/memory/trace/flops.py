"""Floating point operations of what a trace has noted."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from qlora_tool.memory.trace.tracer import PRODUCTS

if TYPE_CHECKING:
    from qlora_tool.memory.trace.tracer import Call, Trace

_ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
_VARIABLE_LENGTH = "torch_attn::_varlen_attn"


def flops_of(call: Call) -> int:
    """Floating point operations of a call: of a product, or of causal attention (segments taken as equally long)."""
    if call.operator in PRODUCTS:
        left, right = call.shapes[-2:]  # (…, m, k) · (…, k, n)
        return 2 * math.prod(left) * right[-1]
    if call.operator == _ATTENTION:
        query, key = call.shapes[:2]  # (rows, heads, length, head size)
        return 2 * math.prod(query) * key[-2]  # scores and sums, half of each as nothing attends to what follows it
    if call.operator == _VARIABLE_LENGTH:
        query, offsets = call.shapes[0], call.shapes[3]  # (tokens, heads, head size), (segments + 1,)
        return 2 * math.prod(query) * (query[0] // (offsets[0] - 1))
    return 0


def flops_of_step(trace: Trace, step: int) -> int:
    """The same of a step's forward and backward passes, all its batches; attention's backward is not in it."""
    begin = next(event for event, name, number in trace.marks if (name, number) == ("forward", step))
    return sum(flops_of(call) for call in trace.calls if call.event >= begin)
