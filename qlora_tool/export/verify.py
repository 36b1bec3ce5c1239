"""Hold an exported model against the live one that it stands for: the same rows through both, token by token.

One model after the other: of each only the last hidden states (tokens, hidden) and the output layer are kept, and the
logits of both are made again a chunk of tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qlora_tool.data.batches import Batch
from qlora_tool.data.labels import IGNORED
from qlora_tool.export.rows import by_length
from qlora_tool.model.causal_lm import CausalLM, logits_transform
from qlora_tool.terminal import progress

if TYPE_CHECKING:
    from qlora_tool.data.tokenize import Example

BATCH_TOKENS = 2048  # of a forward pass, padding included; one row at least
LEAST_GAIN = 0.05  # nats of loss a trained token
_CHUNK = 1 << 23  # logits at a time: 64 MB in float64


@dataclass(frozen=True)
class Agreement:
    """How far two models' predictions agree.

    Attributes:
        tokens: positions compared.
        mean_kl, worst_kl: KL(live ‖ exported) of the next-token distributions, in nats.
        argmax_agreement: share of positions where both find the same token likeliest.
        trained_tokens: of the positions, those that predict a trained token.
        live_loss, exported_loss: mean cross-entropy of these, as in evaluation; None where there are none.
        live_loss_all, exported_loss_all: over every token of the rows but the first; None where there are none.
        untuned_loss: of the trained tokens, with the adapter left out of the live model; None where that is not known.
    """

    tokens: int
    mean_kl: float
    worst_kl: float
    argmax_agreement: float
    trained_tokens: int
    live_loss: float | None
    exported_loss: float | None
    live_loss_all: float | None
    exported_loss_all: float | None
    untuned_loss: float | None = None

    @property
    def gain_kept(self) -> float | None:
        """How much of what training gained, in loss of trained tokens, the exported model keeps; None where it gained
        less than `LEAST_GAIN`, or that is not known."""
        if self.untuned_loss is None or self.live_loss is None or self.exported_loss is None:
            return None
        gained = self.untuned_loss - self.live_loss
        return (self.untuned_loss - self.exported_loss) / gained if gained >= LEAST_GAIN else None


@dataclass(frozen=True)
class Rows:
    """What both models are shown.

    Attributes:
        batches: the rows, those of like length together.
        targets: (tokens,), the token that follows each position; -100 after the last one of a row.
        trained: (tokens,), whether that token was trained.
    """

    batches: list[Batch]
    targets: Tensor
    trained: Tensor

    @property
    def tokens(self) -> int:
        return len(self.targets)


def first_examples(examples: Sequence[Example], max_tokens: int) -> list[Example]:
    """Those that together have `max_tokens` tokens, the last one cut to that."""
    chosen, left = [], max_tokens
    for example in examples:
        if left <= 0:
            break
        chosen.append(replace(example, input_ids=example.input_ids[:left], labels=example.labels[:left]))
        left -= len(example.input_ids)
    return chosen


def choose_rows(examples: Sequence[Example], max_tokens: int) -> Rows:
    """The first examples, of `max_tokens` tokens together, in batches."""
    chosen = first_examples(examples, max_tokens)
    collated = by_length(chosen, BATCH_TOKENS)
    targets, trained = [], []
    for batch in collated:
        following = torch.full_like(batch.input_ids, IGNORED)
        following[:, :-1] = batch.input_ids[:, 1:]
        labels = torch.full_like(batch.labels, IGNORED)
        labels[:, :-1] = batch.labels[:, 1:]
        if batch.attention_mask is not None:
            following[:, :-1][batch.attention_mask[:, 1:] == 0] = IGNORED
        targets.append(following[_there(batch)])
        trained.append(labels[_there(batch)] != IGNORED)
    return Rows(collated, torch.cat(targets), torch.cat(trained))


def _there(batch: Batch) -> Tensor:
    """(rows, length), true where a token is, not padding."""
    if batch.attention_mask is None:
        return torch.ones_like(batch.input_ids, dtype=torch.bool)
    return batch.attention_mask.bool()


@dataclass(frozen=True)
class Predictions:
    """What a model predicts for some rows, without the model.

    Attributes:
        features: (tokens, hidden) on the CPU, fp32: the last hidden states, or full logits.
        project: features (n, hidden) → logits (n, vocabulary).
        full_logits: whether the features are logits already.
    """

    features: Tensor
    project: Callable[[Tensor], Tensor]
    full_logits: bool = False

    def log_probabilities(self, part: slice) -> Tensor:
        """(n, vocabulary) in float64, on the CPU."""
        return self.project(self.features[part]).double().cpu().log_softmax(-1)


@torch.no_grad()
def predict(model: CausalLM, rows: Rows) -> Predictions:
    """Run rows through a model and keep what its logits can be made from again.

    Args:
        model: in evaluation; `chunked_loss` says whether its logits are its output layer's of its hidden states. Its
            weights may be on meta, where accelerate reads them from the disk; it then computes on the CPU.
    """
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    forward = model.hidden_states if model.chunked_loss else model.logits
    found = []
    with progress("verifying", rows.tokens, "tokens") as bar:
        for batch in rows.batches:
            found.append(forward(batch.to(device))[_there(batch).to(device)].float().cpu())
            bar.advance(len(found[-1]))
    if not model.chunked_loss:
        return Predictions(torch.cat(found), lambda logits: logits, full_logits=True)
    # Of the model only the output layer lives on: the closure must not hold the rest.
    head, transform = model.module.get_output_embeddings(), logits_transform(model.config)
    return Predictions(torch.cat(found), lambda hidden: transform(head(hidden.to(device))))


@torch.no_grad()
def compare(live: Predictions, exported: Predictions, rows: Rows) -> Agreement:
    """Compare two models' predictions for the same rows, in float64, a chunk of tokens at a time."""
    kl_sum, worst, agreed = 0.0, 0.0, 0
    taken = torch.empty(2, rows.tokens, dtype=torch.float64)  # (live, exported) × the loss of each token
    start, stop = 0, 1  # the first chunk, of one token, tells the size of the vocabulary
    with progress("comparing", rows.tokens, "tokens") as bar:
        while start < rows.tokens:
            part = slice(start, min(stop, rows.tokens))
            expected, found = live.log_probabilities(part), exported.log_probabilities(part)  # (n, vocabulary)
            kl = (expected.exp() * (expected - found)).sum(-1)  # (n,)
            kl_sum, worst = kl_sum + float(kl.sum()), max(worst, float(kl.max()))
            agreed += int((expected.argmax(-1) == found.argmax(-1)).sum())
            targets = rows.targets[part].clamp(min=0).unsqueeze(-1)
            for row, predicted in enumerate((expected, found)):
                taken[row, part] = -predicted.gather(-1, targets).squeeze(-1)
            start, stop = part.stop, part.stop + max(1, _CHUNK // expected.shape[-1])
            bar.reach(part.stop)
    followed = rows.targets != IGNORED
    return Agreement(
        rows.tokens, kl_sum / rows.tokens, worst, agreed / rows.tokens, int(rows.trained.sum()),
        *(_mean(row[where]) for where in (rows.trained, followed) for row in taken),
    )  # fmt: skip


@torch.no_grad()
def trained_loss(predictions: Predictions, rows: Rows) -> float | None:
    """The mean cross-entropy of the trained tokens, in float64; None where there are none."""
    places = rows.trained.nonzero().squeeze(-1)
    taken = []
    for part in places.split(256):
        chosen = predictions.project(predictions.features[part]).double().cpu().log_softmax(-1)
        taken.append(-chosen.gather(-1, rows.targets[part].unsqueeze(-1)).squeeze(-1))
    return _mean(torch.cat(taken)) if taken else None


def _mean(losses: Tensor) -> float | None:
    return float(losses.mean()) if len(losses) else None
