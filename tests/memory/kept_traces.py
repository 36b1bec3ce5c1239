"""Predictions that several tests of a file look at, each made once."""

from __future__ import annotations

from collections.abc import Callable

from qlora_tool.memory.trace.tracer import Trace
from qlora_tool.ops.declare import CPU

# No tensor of a prediction depends on these.
_OF_NO_ACCOUNT = {
    "model": {"name_or_path", "device"},
    "training": {"output_dir", "max_memory", "max_steps", "learning_rate", "seed"},
}


def once(predict: Callable[..., Trace]) -> Callable[..., Trace]:
    """`predict`, which gives what it gave before where it is asked the same again."""
    kept: dict[tuple, Trace] = {}

    def predict_once(config, model_config, shape, compute_dtype, recomputation=None, target=CPU) -> Trace:
        settings = config.model_dump_json(include={"model", "adapter", "training"}, exclude=_OF_NO_ACCOUNT)
        key = settings, model_config.to_json_string(use_diff=False), shape, compute_dtype, recomputation, target
        if key not in kept:
            kept[key] = predict(config, model_config, shape, compute_dtype, recomputation, target)
        return kept[key]

    return predict_once
