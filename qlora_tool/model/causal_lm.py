"""A causal language model as training, evaluation and export see it: hidden states, logits, the sum of the loss."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_tool.errors import UserError
from qlora_tool.model.layers import FrozenWeight
from qlora_tool.model.load import Quantization
from qlora_tool.ops.loss import LogitsTransform, linear_cross_entropy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qlora_tool.data.batches import Batch

logger = logging.getLogger(__name__)


@dataclass
class CausalLM:
    """A transformers model on a frozen base.

    Attributes:
        module: the transformers model, its linear modules replaced by `FrozenLinear`.
        folder: where its checkpoint lies.
        quantization: how the base is kept.
        compute_dtype: what products run in.
        chunked_loss: whether the loss is taken from the hidden states in chunks, or from whole logits.
    """

    module: PreTrainedModel
    folder: Path
    quantization: Quantization
    compute_dtype: torch.dtype
    chunked_loss: bool = True

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def config(self):
        return self.module.config

    def hidden_states(self, batch: Batch) -> Tensor:
        """The last hidden states, (rows, length, hidden), normalized as the output projection takes them."""
        body = self.module.base_model
        return body(**self._inputs(batch), use_cache=False)[0]

    def logits(self, batch: Batch) -> Tensor:
        """Whole logits, (rows, length, vocabulary), by the model's own forward pass."""
        return self.module(**self._inputs(batch), use_cache=False).logits

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        inputs = {"input_ids": batch.input_ids}
        if batch.attention_mask is not None:
            inputs["attention_mask"] = batch.attention_mask
        if batch.position_ids is not None:
            inputs["position_ids"] = batch.position_ids
        return inputs

    def project(self, hidden: Tensor) -> Tensor:
        """hidden (…, hidden) → logits (…, vocabulary), with what the family does to them."""
        return logits_transform(self.config)(self.module.get_output_embeddings()(hidden))

    def loss_sum(self, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        """The sum of the cross-entropy over the batch's trained tokens, fp32.

        Rows without a label are dropped before the output projection.
        """
        if self.chunked_loss:
            hidden = self.hidden_states(batch).flatten(0, 1)[batch.predicting]  # (trained tokens, hidden)
            return linear_cross_entropy(hidden, batch.targets, self.project, label_smoothing=label_smoothing)
        logits = self.logits(batch).flatten(0, 1)[batch.predicting].float()
        return nn.functional.cross_entropy(logits, batch.targets, reduction="sum", label_smoothing=label_smoothing)

    def choose_loss(self) -> None:
        """Take the loss in chunks if that gives this family's logits, from whole logits otherwise.

        What a family does between its last hidden state and its logits is not declared anywhere; six tokens through
        both ways tell.
        """
        self.chunked_loss = False
        head = self.module.get_output_embeddings()
        if head is None or self._head_is_trained():
            return
        ids = torch.arange(1, 7, device=self.device).unsqueeze(0) % self.config.get_text_config().vocab_size
        training = self.module.training
        self.module.eval()
        with torch.no_grad():
            expected = self.module(input_ids=ids, use_cache=False).logits.float()
            hidden = self.module.base_model(input_ids=ids, use_cache=False)[0]  # llama4's is the whole model: logits
            found = self.project(hidden).float() if hidden.shape[-1] == head.in_features else None
        self.module.train(training)
        # Both run the same operations on the same numbers; a family that adds one differs in the first digits.
        tolerance = 1e-2 * float(expected.abs().max())
        self.chunked_loss = found is not None and torch.allclose(found, expected, rtol=1e-2, atol=tolerance)
        if not self.chunked_loss:
            logger.warning("%s changes its logits in a way of its own: whole logits are kept for the loss, which takes "
                           "more memory", self.config.model_type)  # fmt: skip

    def keeps_packed_apart(self) -> bool:
        """Whether examples packed into one row, their positions beginning anew, give what each gives alone.

        Not every family reads position ids, or builds its mask from them; eight tokens in two examples tell.
        """
        parameters = inspect.signature(self.module.base_model.forward).parameters
        if "position_ids" not in parameters:
            return False
        ids = torch.arange(1, 9, device=self.device).unsqueeze(0) % self.config.get_text_config().vocab_size
        positions = torch.arange(4, device=self.device).repeat(1, 2)
        training = self.module.training
        self.module.eval()
        with torch.no_grad():
            body = self.module.base_model
            packed = body(input_ids=ids, position_ids=positions, use_cache=False)[0][:, 4:]
            alone = body(input_ids=ids[:, 4:], use_cache=False)[0]
        self.module.train(training)
        return torch.allclose(packed, alone, rtol=1e-2, atol=1e-2 * float(alone.abs().max()))

    def _head_is_trained(self) -> bool:
        head = self.module.get_output_embeddings()
        return any(parameter.requires_grad for parameter in head.parameters())

    def checkpoint_layers(
        self, enabled: bool, around_recomputation: Callable[[], AbstractContextManager] = nullcontext
    ) -> None:
        """Recompute each decoder layer in backward instead of keeping its activations.

        Args:
            around_recomputation: a context that is open while a layer is computed again.

        Raises:
            UserError: the model's code has no layers that can be recomputed.
        """
        layers = [module for module in self.module.modules() if isinstance(module, GradientCheckpointingLayer)]
        if enabled and not layers:
            raise UserError(
                f"{self.config.model_type} has no layers that can be recomputed; set training.gradient_checkpointing: false"
            )
        recompute = partial(
            checkpoint,
            use_reentrant=False,
            preserve_rng_state=self._draws_random_numbers(),
            context_fn=lambda: (nullcontext(), around_recomputation()),
        )
        for layer in layers:
            layer.gradient_checkpointing = enabled
            layer._gradient_checkpointing_func = recompute

    def _draws_random_numbers(self) -> bool:
        """Whether training drops anything, so that recomputation must draw the same numbers again."""
        settings = self.config.get_text_config().to_dict()
        return any(isinstance(module, nn.Dropout) and module.p for module in self.module.modules()) or any(
            value for name, value in settings.items() if "dropout" in name or name.endswith("pdrop")
        )

    def checkpointed_layers(self) -> list[nn.Module]:
        """The layers that are recomputed in backward."""
        return [module for module in self.module.modules()
                if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing]  # fmt: skip

    def unquantized_bytes(self) -> dict[str, int]:
        """Bytes of every module tensor that is kept unquantized, largest first; tied ones once."""
        found: dict[str, int] = {}
        seen: set[int] = set()
        quantized = {id(tensor) for module in self.module.modules() if isinstance(module, FrozenWeight)
                     for tensor in module.buffers(recurse=False)}  # fmt: skip
        for name, tensor in [*self.module.named_parameters(), *self.module.named_buffers()]:
            if id(tensor) in quantized or id(tensor) in seen or tensor.requires_grad:
                continue
            seen.add(id(tensor))
            found[name.removesuffix(".plain")] = tensor.nbytes
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def quantized_bytes(self) -> int:
        """Bytes of all quantized weights, scales included."""
        return sum(
            tensor.nbytes
            for module in self.module.modules() if isinstance(module, FrozenWeight) and module.quantized
            for tensor in module.buffers(recurse=False)
        )  # fmt: skip


def logits_transform(config) -> LogitsTransform:
    """What the family does to its logits, read from its configuration (gemma's cap, cohere's and granite's scales)."""
    config = config.get_text_config()
    scale = 1.0
    if isinstance(value := getattr(config, "logit_scale", None), (int, float)):  # mpt's may be text, and is not used
        scale *= value
    if value := getattr(config, "logits_scaling", None):
        scale /= value
    return LogitsTransform(scale, getattr(config, "final_logit_softcapping", None))
