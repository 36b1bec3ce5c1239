"""What a family's code does that no configuration declares, found by running it: its first layers, on random numbers.

No weights are needed, so that predicting decides as training does. Linear modules get random weights of low rank, and
embeddings overlapping rows of one vector of noise: nothing of a weight's size is made, whatever the model's. The
numbers are of a size at which a cap on logits or on attention scores would show.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from qlora_tool.data.batches import Batch, Segments
from qlora_tool.model.causal_lm import CausalLM
from qlora_tool.model.layer_stack import layer_stack, with_layers
from qlora_tool.model.load import build_skeleton
from qlora_tool.model.segments import use_segments
from qlora_tool.model.slots import Quantization, is_linear

logger = logging.getLogger(__name__)

RANK = 16
LARGE = 1 << 20  # values: a tensor of more is made of overlapping parts of one of noise
LOGITS = 30.0  # their deviation: gemma2's cap, say, takes a third of such a logit away
# Both ways run the same operations in fp32 on the same numbers, a few products of other shapes aside; a family that
# does something else differs in the first digit.
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Behaviour:
    """How a family can be run.

    Attributes:
        projects_plainly: its logits are the output projection of its last hidden states, times what its configuration
            declares; so the loss can be taken in chunks of rows.
        keeps_apart: examples packed into one row, their positions beginning anew, give what each gives alone: by
            `segments`, by the `masks` that transformers makes of positions, or not at all (None).
    """

    projects_plainly: bool
    keeps_apart: str | None


class _LowRank(nn.Module):
    """A linear module whose weight (out, in) is a product of rank RANK."""

    def __init__(self, in_features: int, out_features: int, bias: bool, generator: torch.Generator):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.down = torch.randn(in_features, RANK, generator=generator) / math.sqrt(in_features)
        self.up = torch.randn(RANK, out_features, generator=generator) / math.sqrt(RANK)
        self.bias = torch.randn(out_features, generator=generator) / 10 if bias else None

    @property
    def weight(self) -> Tensor:
        return (self.down @ self.up).T

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.down @ self.up
        return y if self.bias is None else y + self.bias


def behaviour_of(model_config: Any, trust_remote_code: bool = False) -> Behaviour:
    """How a model can be run, by its configuration alone; the same configuration is tried once."""
    return _behaviour_of(_ByText(model_config), trust_remote_code)


class _ByText:
    """A model's configuration that is equal to another with the same text."""

    def __init__(self, model_config: Any):
        self.model_config, self.text = model_config, model_config.to_json_string(use_diff=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByText) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)


@lru_cache(maxsize=64)
def _behaviour_of(key: _ByText, trust_remote_code: bool) -> Behaviour:
    with unset_fake_temporarily(), _disable_current_modes(), torch.no_grad(), torch.device("cpu"):
        model = _first_layers(key.model_config, trust_remote_code)
        return Behaviour(
            _tried(_projects_plainly, model, "the loss from hidden states") or False,
            _tried(_keeps_apart, model, "packing"),
        )


def _tried(question: Callable[[CausalLM], Any], model: CausalLM, what: str) -> Any:
    """The answer; None, with a warning, where the family's code cannot be run like this, whatever it raises."""
    try:
        return question(model)
    except Exception as error:  # what an unknown architecture's code raises can be anything
        logger.warning("%s: %s is done without, as its first layers could not be tried on random numbers: %s",
                       model.config.model_type, what, " ".join(str(error).split()) or type(error).__name__)  # fmt: skip
        return None


def _first_layers(model_config: Any, trust_remote_code: bool) -> CausalLM:
    """The first layers of a model, one of each kind that repeats, on random numbers in fp32."""
    stack = layer_stack(model_config, trust_remote_code)
    depth = min(stack.layers, stack.first + stack.period) if stack.path else stack.layers
    config = with_layers(copy.deepcopy(model_config), depth)
    module = build_skeleton(config, trust_remote_code, torch.float32).eval()
    if hasattr(module, "set_experts_implementation"):
        module.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(0)
    for name, child in list(module.named_modules()):
        if is_linear(child):
            out_features, in_features = child.weight.shape if isinstance(child, nn.Linear) else child.weight.shape[::-1]
            module.set_submodule(name, _LowRank(in_features, out_features, child.bias is not None, generator))
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = nn.Parameter(_noise(parameter.shape, generator), requires_grad=False)
    head = module.get_output_embeddings()
    if isinstance(head, _LowRank):
        head.up *= LOGITS
    return CausalLM(module, Path(), Quantization("none"), torch.float32)


def _noise(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Random numbers of deviation 1/√(last dimension); near 1 where there is one dimension, as a norm's are."""
    if len(shape) < 2:
        return 1 + torch.randn(shape, generator=generator) / 10
    if math.prod(shape) <= LARGE:
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
    rows, columns = shape[-2:]
    noise = torch.randn(rows + columns, generator=generator) / math.sqrt(columns)
    return noise.as_strided((rows, columns), (1, 1)).expand(shape)  # row n is the noise from place n on


def _projects_plainly(model: CausalLM) -> bool:
    head, body = model.module.get_output_embeddings(), model.module.base_model
    if head is None or body is model.module:
        return False
    ids = torch.arange(1, 7).unsqueeze(0) % model.config.get_text_config().vocab_size
    expected = model.module(input_ids=ids, use_cache=False).logits
    hidden = body(input_ids=ids, use_cache=False)[0]  # llama4's is the whole model: logits
    return hidden.shape[-1] == head.in_features and _is_near(model.project(hidden), expected)


def _keeps_apart(model: CausalLM) -> str | None:
    """Eight tokens in two examples, by segments and by masks, against the second by itself."""
    if "position_ids" not in inspect.signature(model.module.base_model.forward).parameters:
        return None
    ids = torch.arange(1, 9).unsqueeze(0) % model.config.get_text_config().vocab_size
    none = torch.empty(0, dtype=torch.int64)
    batch = Batch(
        input_ids=ids, labels=ids, attention_mask=None, position_ids=torch.arange(4).repeat(1, 2), predicting=none,
        targets=none, tokens=8, trained_tokens=0, where=[], segments=Segments.of([4, 4]),
    )  # fmt: skip
    alone = model.module.base_model(input_ids=ids[:, 4:], use_cache=False)[0]
    for way in ("segments", "masks"):
        model.by_segment = way == "segments"
        if model.by_segment and not use_segments(model.module):
            continue
        try:
            packed = model.hidden_states(batch)[:, 4:]
        except (NotImplementedError, AttributeError, TypeError) as error:  # what a family does with a mask
            logger.debug("%s: no attention by %s: %s", model.config.model_type, way, error)
            continue
        if _is_near(packed, alone):
            return way
    return None


def _is_near(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() < TOLERANCE * expected.norm())
