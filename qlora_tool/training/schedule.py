"""The learning rate as a function of the step alone, so that resuming needs no state of it."""

from __future__ import annotations

import math


def warmup_length(warmup_steps: float, total_steps: int) -> int:
    """Steps of warmup: below 1 a share of all steps, rounded up as in transformers."""
    return math.ceil(warmup_steps * total_steps) if warmup_steps < 1 else int(warmup_steps)


def learning_rate(
    step: int, peak: float, kind: str, warmup: int, total_steps: int, *, from_zero: bool = False
) -> float:
    """The rate of step `step` (from 0): linear warmup to `peak`, then constant, linear to 0 or half a cosine to 0.

    As transformers' schedulers of the same names give it, but for the warmup: theirs gives its i-th of w steps the rate
    (i - 1)/w, so that the first one, which may be the only one, changes nothing. Here it is i/w.

    Args:
        from_zero: warm up as transformers does, and as version 0.1.0 did.
    """
    if step < warmup:
        return peak * (step if from_zero else step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    if kind == "linear":
        return peak * max(0.0, 1.0 - progress)
    if kind == "cosine":
        return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    return peak
