"""Hold an exported model against the live one that it stands for: the same rows through both, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Agreement:
    """How far two models' predictions agree.

    Attributes:
        tokens: positions compared.
        mean_kl, worst_kl: KL(live ‖ exported) of the next-token distributions, in nats.
        argmax_agreement: share of positions where both find the same token likeliest.
    """

    tokens: int
    mean_kl: float
    worst_kl: float
    argmax_agreement: float


@torch.no_grad()
def compare(
    rows: Iterable[list[int]], live: Callable[[Tensor], Tensor], exported: Callable[[Tensor], Tensor], max_tokens: int
) -> Agreement:
    """Run rows one by one through both models until `max_tokens` positions are compared.

    Args:
        rows: token ids.
        live, exported: ids (1, length) → logits (1, length, vocabulary).
    """
    tokens, kl_sum, worst, agreed = 0, 0.0, 0.0, 0
    for row in rows:
        ids = torch.tensor([row[: max_tokens - tokens]])
        expected = live(ids)[0].double().log_softmax(-1)  # (length, vocabulary)
        found = exported(ids)[0].double().log_softmax(-1)
        kl = (expected.exp() * (expected - found)).sum(-1)  # (length,)
        tokens += len(kl)
        kl_sum += float(kl.sum())
        worst = max(worst, float(kl.max()))
        agreed += int((expected.argmax(-1) == found.argmax(-1)).sum())
        if tokens >= max_tokens:
            break
    return Agreement(tokens, kl_sum / tokens, worst, agreed / tokens)
