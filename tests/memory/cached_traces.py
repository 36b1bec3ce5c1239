"""Predictions that several tests of a file look at, each made once."""

from __future__ import annotations

from collections.abc import Callable

from qlora_tool.config import memory_settings
from qlora_tool.memory.trace.tracer import Trace
from qlora_tool.ops.declare import CPU


def once(predict: Callable[..., Trace]) -> Callable[..., Trace]:
    """`predict`, which gives what it gave before where it is asked the same again."""
    made: dict[tuple, Trace] = {}

    def predict_once(config, model_config, shape, compute_dtype, recomputation=None, target=CPU) -> Trace:
        settings = repr(memory_settings(config))
        key = settings, model_config.to_json_string(use_diff=False), shape, compute_dtype, recomputation, target
        if key not in made:
            made[key] = predict(config, model_config, shape, compute_dtype, recomputation, target)
        return made[key]

    return predict_once
