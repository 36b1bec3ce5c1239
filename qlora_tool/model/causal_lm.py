"""A causal language model as training, evaluation and export see it: hidden states, logits, the sum of the loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qlora_tool.data.batches import Batch
from qlora_tool.model.checkpointing import Recomputation, checkpoint_layers, checkpointed_modules, has_dropout
from qlora_tool.model.fused_modules import FusedModules
from qlora_tool.model.layout import Layout, laid_out
from qlora_tool.model.masks import known
from qlora_tool.model.segments import attending_by, use_segments
from qlora_tool.model.sharding import whole
from qlora_tool.model.slots import BeyondPeft, Quantization
from qlora_tool.model.text_part import text_modules
from qlora_tool.ops.loss import CHUNK_ROWS, LogitsTransform, frozen_cross_entropy, linear_cross_entropy
from qlora_tool.weights.handles import model_tensors
from qlora_tool.weights.modules import FrozenLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

@dataclass
class CausalLM:
    """A transformers model on a frozen base.

    Attributes:
        module: the transformers model, its linear modules replaced by `FrozenLinear`.
        folder: where its checkpoint lies.
        quantization: how the base is quantized.
        compute_dtype: what products run in.
        projects_plainly: whether `project` gives the family's logits; see `behaviour.Behaviour`.
        recomputation: what is recomputed in backward; None where nothing was ever said of it.
        offload_boundaries: whether what goes into recomputed layers waits for backward in host memory.
        by_segment: whether packed examples are kept apart by attention by segment, or at most by transformers' masks.
        pads_apart: whether an example gives in a padded batch what it gives alone; else rows go through one by one.
        fused: the modules of the family's code that compute by fused operations.
        draws: whether the family's code draws random numbers in training, which recomputation must draw again.
        sharded_head: the output projection, where it is shared out over processes by itself.
    """

    module: PreTrainedModel
    folder: Path
    quantization: Quantization
    compute_dtype: torch.dtype
    projects_plainly: bool = True
    recomputation: Recomputation | None = None
    by_segment: bool = True
    pads_apart: bool = True
    offload_boundaries: bool = False
    fused: FusedModules = field(default_factory=FusedModules)
    draws: bool = True
    sharded_head: nn.Module | None = None

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def config(self):
        return self.module.config

    @property
    def left_linears(self) -> int:
        """How many of the text part's linear modules stay unquantized while others are quantized, the output
        projection apart."""
        if self.quantization.kind == "none":
            return 0
        output = self.module.get_output_embeddings()
        linears = (one for one in text_modules(self.module).values() if isinstance(one, FrozenLinear))
        return sum(
            one is not output and one.weight.kind == "none" and not one.weight.is_trained for one in linears
        )

    @property
    def beyond_peft(self) -> BeyondPeft | None:
        """What is quantized here and would not be under PEFT; None for nothing."""
        return getattr(self.module, "beyond_peft", None)

    def hidden_states(self, batch: Batch) -> Tensor:
        """The last hidden states, (rows, length, hidden), normalized as the output projection takes them."""
        return self._forward(self.module.base_model, batch)

    def logits(self, batch: Batch) -> Tensor:
        """Whole logits, (rows, length, vocabulary), by the model's own forward pass."""
        return self._forward(self.module, batch)

    def _forward(self, module: nn.Module, batch: Batch) -> Tensor:
        """The first of what a module gives: (rows, length, …)."""
        if batch.attention_mask is not None and not self.pads_apart:
            return self._row_by_row(module, batch.input_ids, batch.attention_mask.sum(dim=1).tolist())
        inputs = {"input_ids": batch.input_ids}
        if batch.attention_mask is not None:
            inputs["attention_mask"] = batch.attention_mask
        if batch.position_ids is not None and takes(self.module.base_model, "position_ids"):
            inputs["position_ids"] = batch.position_ids
        by_segment = self.by_segment and use_segments(self.module)
        with laid_out(Layout.of(batch)):
            if batch.segments is None or not by_segment:
                with known(batch):
                    return module(**inputs, use_cache=False)[0]
            # With a mask transformers leaves the positions alone.
            inputs["attention_mask"] = torch.ones_like(batch.input_ids, dtype=torch.bool)
            with attending_by(batch.segments):
                return module(**inputs, use_cache=False)[0]

    def _row_by_row(self, module: nn.Module, input_ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """The same of each row without its padding, for which zeros are put in."""
        found = []
        for row, length in zip(input_ids, lengths, strict=True):
            with laid_out(Layout(1, length, (length,))):
                output = module(input_ids=row[None, :length], use_cache=False)[0]
            found.append(nn.functional.pad(output, (0, 0, 0, len(row) - length)))
        return torch.cat(found)

    def project(self, hidden: Tensor) -> Tensor:
        """hidden (…, hidden) → logits (…, vocabulary), with what the family does to them."""
        return logits_transform(self.config)(self.module.get_output_embeddings()(hidden))

    def loss_sum(self, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        """The sum of the cross-entropy over the batch's trained tokens, fp32.

        Rows without a label are dropped before the output projection.
        """
        if self.chunked_loss:
            hidden = self.hidden_states(batch).flatten(0, 1)[batch.predicting]  # (trained tokens, hidden)
            with whole(self.sharded_head):
                return self._loss_of(hidden, batch.targets, label_smoothing)
        logits = self.logits(batch).flatten(0, 1)[batch.predicting].float()
        return nn.functional.cross_entropy(logits, batch.targets, reduction="sum", label_smoothing=label_smoothing)

    def _loss_of(self, hidden: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
        head = self.module.get_output_embeddings()
        if any(parameter.requires_grad for parameter in head.parameters()):
            return self._loss_by_chunk(hidden, targets, label_smoothing)
        if not isinstance(head, FrozenLinear) or head.active_adapters:
            return linear_cross_entropy(hidden, targets, self.project, label_smoothing=label_smoothing)
        transform = logits_transform(self.config)
        return frozen_cross_entropy(
            hidden, targets, head.weight, head.bias, transform=transform, label_smoothing=label_smoothing
        )

    def example_losses(self, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        """The same sum for each example of the batch by itself, fp32, (examples,); differentiable.

        Logits of some rows at a time are made, and once more in backward.
        """
        if self.chunked_loss:
            hidden = self.hidden_states(batch).flatten(0, 1)[batch.predicting]  # (trained tokens, hidden)
            losses = torch.cat([hidden.new_zeros(0, dtype=torch.float32),
                                *self._losses_by_chunk(hidden, batch.targets, label_smoothing)])  # fmt: skip
        else:
            logits = self.logits(batch).flatten(0, 1)[batch.predicting].float()
            losses = nn.functional.cross_entropy(logits, batch.targets, reduction="none",
                                                 label_smoothing=label_smoothing)  # fmt: skip
        examples, count = batch.example_of(batch.predicting)
        return losses.new_zeros(count).index_add(0, examples, losses)

    def _loss_by_chunk(self, hidden: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
        """The sum where the output projection is trained too: logits of some rows at a time are made, and once more in
        backward."""
        total = hidden[:0].sum(dtype=torch.float32)
        for losses in self._losses_by_chunk(hidden, targets, label_smoothing):
            total = total + losses.sum()
        return total

    def _losses_by_chunk(self, hidden: Tensor, targets: Tensor, label_smoothing: float) -> Iterator[Tensor]:
        head = self.module.get_output_embeddings()
        for pair in zip(hidden.split(CHUNK_ROWS), targets.split(CHUNK_ROWS), strict=True):
            if len(pair[1]):
                yield checkpoint(self._token_losses, *pair, label_smoothing, use_reentrant=False,
                                 preserve_rng_state=has_dropout(head))  # fmt: skip

    def _token_losses(self, hidden: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
        logits = self.project(hidden).float()
        return nn.functional.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)

    @property
    def chunked_loss(self) -> bool:
        """Whether the loss is taken from the hidden states in chunks, or from full logits, where the family changes
        its logits in a way of its own."""
        return self.projects_plainly and self.module.get_output_embeddings() is not None

    def checkpoint_layers(
        self,
        recomputed: Recomputation | bool,
        around_recomputation: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        """Recompute activations in backward instead of keeping them; see `checkpointing.checkpoint_layers`."""
        self.recomputation = checkpoint_layers(
            self.module, recomputed, around_recomputation, self.offload_boundaries, self.draws
        )

    def checkpointed_layers(self) -> list[nn.Module]:
        """The layers, and children of layers, that are recomputed in backward."""
        return checkpointed_modules(self.module)

    def unquantized_bytes(self) -> dict[str, int]:
        """Bytes of every module tensor that is left unquantized, largest first; tied ones once."""
        found = {name: tensor.nbytes for name, tensor, role in model_tensors(self.module)
                 if role == "unquantized" and not tensor.requires_grad}  # fmt: skip
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def quantized_bytes(self) -> int:
        """Bytes of all quantized weights, scales included."""
        return sum(tensor.nbytes for _, tensor, role in model_tensors(self.module) if role != "unquantized")


def takes(module: nn.Module, argument: str) -> bool:
    """Whether a module's forward pass has an argument of this name."""
    return argument in _arguments(type(module))


@cache
def _arguments(kind: type[nn.Module]) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def logits_transform(config) -> LogitsTransform:
    """What the family does to its logits, read from its configuration (gemma's cap, cohere's and granite's scales)."""
    config = config.get_text_config()
    scale = 1.0
    if isinstance(value := getattr(config, "logit_scale", None), (int, float)):  # mpt's may be text, and is not used
        scale *= value
    if value := getattr(config, "logits_scaling", None):
        scale /= value
    return LogitsTransform(scale, getattr(config, "final_logit_softcapping", None))
