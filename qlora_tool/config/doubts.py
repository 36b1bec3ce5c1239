"""Values that may be meant, and are more likely to be slips: a line each, and no more than that."""

from __future__ import annotations

import math
from collections.abc import Iterator

from qlora_tool.config.keys import Config
from qlora_tool.methods import METHODS

# How far a learning rate may be above, and below, the usual ones of its method without a word: tiny models are trained
# at many times the usual, and rates are tried out by powers of ten.
FAR_ABOVE, FAR_BELOW = 100, 1e-3


def doubts(config: Config) -> Iterator[str]:
    """What to ask about values of a configuration that are allowed, and seldom meant."""
    rate, method = config.training.learning_rate, config.adapter.method
    low, high = METHODS[method].usual_rates
    if not FAR_BELOW * low <= rate <= FAR_ABOVE * high * (1 + 1e-9):
        where = "above" if rate > high else "below"
        yield (f"training.learning_rate: {short(rate)} is far {where} what is usual with method {method}, {short(low)} "
               f"to {short(high)}; {_instead(rate, low, high)}")  # fmt: skip


def _instead(rate: float, low: float, high: float) -> str:
    """What to write: the same figure with the other sign of the exponent, where that is a usual rate."""
    exponent = math.floor(math.log10(rate))
    slipped = rate / 10.0**exponent * 10.0**-exponent if abs(exponent) < 100 else 0.0
    if low / 10 <= slipped <= 10 * high:
        return f"if {short(slipped)} was meant, set training.learning_rate: {short(slipped)}"
    return "if it was not meant, set training.learning_rate to one of those"


def short(rate: float) -> str:
    """`5e-4`."""
    figure, _, exponent = f"{rate:.2e}".partition("e")
    return f"{float(figure):g}e{int(exponent)}"
