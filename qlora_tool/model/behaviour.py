"""What a family's code does that no configuration declares, found by running it: its first layers, on random numbers.

No weights are needed, so that predicting decides as training does. Linear modules get random weights of low rank, and
embeddings overlapping rows of one vector of noise: nothing of a weight's size is made, whatever the model's. What is
asked is asked at a scale at which a difference shows: logits small and so large that any cap would cut them, examples
of several lengths, longer than the windows and choices of tokens that the family makes, which are made small for it.
"""

from __future__ import annotations

import copy
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
from qlora_tool.errors import UserError
from qlora_tool.model.by_example import is_mixer, keep_mixers_apart
from qlora_tool.model.causal_lm import CausalLM, takes
from qlora_tool.model.checkpointing import decoder_layers
from qlora_tool.model.experts import is_experts_module
from qlora_tool.model.layer_stack import layer_stack, with_layers
from qlora_tool.model.load import build_skeleton
from qlora_tool.model.positions import rotate_by_example
from qlora_tool.model.segments import use_segments
from qlora_tool.model.slots import Quantization, is_linear

logger = logging.getLogger(__name__)

RANK = 16
LARGE = 1 << 20  # values: a tensor of more is made of overlapping parts of one of noise
LOGITS = (1.0, 1e4)  # deviations: a cap takes most of the large ones away; small ones show what else is done
# Both ways run the same operations in fp32 on the same numbers, a few products of other shapes aside; a family that
# does something else differs in the first digits.
TOLERANCE = 1e-3
EXAMPLES = (4, 7, 3, 6)  # tokens of those that are packed into one row
# How many tokens, or blocks of them, a token sees at most, by the names that families have for it.
_SEEN = {
    "sliding_window": 3, "window_size": 3, "attention_window_size": 3, "local_attention": 4, "index_topk": 2,
    "index_block_size": 2, "index_topk_blocks": 1, "index_local_blocks": 1, "indexer_budget": 2,
}  # fmt: skip
NARROW = 64
_EXPERT_WIDTHS = ("intermediate_size", "moe_intermediate_size")


@dataclass(frozen=True)
class Behaviour:
    """How a family can be run.

    Attributes:
        projects_plainly: its logits are the output projection of its last hidden states, times what its configuration
            declares; so the loss can be taken in chunks of rows.
        keeps_apart: examples packed into one row, their positions beginning anew, give what each gives alone: by
            `segments`, by the `masks` that transformers makes of positions, or not at all (None).
        draws: in training its code draws random numbers of its own (jitter before a router, dropout), which
            recomputation must draw again.
        recomputes: it has layers that can be recomputed in backward.
        pads_apart: an example is known to give in a padded batch what it gives alone.
    """

    projects_plainly: bool
    keeps_apart: str | None
    draws: bool = True
    recomputes: bool = True
    pads_apart: bool = True


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
    """How a model can be run, by its configuration alone; the same first layers are tried once, however deep it is."""
    return _behaviour_of(_first_of(_ByText(model_config), trust_remote_code), trust_remote_code)


class _ByText:
    """A model's configuration that is equal to another with the same text."""

    def __init__(self, model_config: Any):
        self.model_config, self.text = model_config, model_config.to_json_string(use_diff=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByText) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)


@lru_cache(maxsize=64)
def _first_of(key: _ByText, trust_remote_code: bool) -> _ByText:
    """A model's first layers, one of each kind that repeats, with little to see and to compute."""
    with unset_fake_temporarily(), _disable_current_modes(), torch.device("cpu"):
        stack = layer_stack(key.model_config, trust_remote_code)
        depth = min(stack.layers, stack.first + stack.period) if stack.path else stack.layers
        config = with_layers(copy.deepcopy(key.model_config), depth)
        _see_little(config.get_text_config())
        return _ByText(_with_narrow_experts(config, trust_remote_code))


def _with_narrow_experts(config: Any, trust_remote_code: bool) -> Any:
    """The same with few hidden units in each expert, where there are experts: their products, of real numbers, would
    take seconds."""
    if not any(map(is_experts_module, build_skeleton(config, trust_remote_code).modules())):
        return config
    narrow = copy.deepcopy(config)
    text_config = narrow.get_text_config()
    for name in _EXPERT_WIDTHS:
        value = getattr(text_config, name, None)
        if isinstance(value, int) and value > NARROW:
            setattr(text_config, name, NARROW)
    try:
        build_skeleton(narrow, trust_remote_code)
    except UserError:  # a width that others follow
        return config
    return narrow


@lru_cache(maxsize=64)
def _behaviour_of(key: _ByText, trust_remote_code: bool) -> Behaviour:
    with unset_fake_temporarily(), _disable_current_modes(), torch.no_grad(), torch.device("cpu"):
        model = _first_layers(key.model_config, trust_remote_code)
        # Before `_keeps_apart`, which lets attention go by segment.
        draws, pads = _tried(_draws, model, ""), _tried(_pads_apart, model, "")
        return Behaviour(
            _tried(_projects_plainly, model, "the loss from hidden states") or False,
            _tried(_keeps_apart, model, "packing"),
            draws is not False,
            bool(decoder_layers(model.module)),
            pads is True,
        )


def _tried(question: Callable[[CausalLM], Any], model: CausalLM, what: str) -> Any:
    """The answer; None, with a warning of what is done without, where the family's code cannot be run like this,
    whatever it raises."""
    try:
        return question(model)
    except Exception as error:  # what an unknown architecture's code raises can be anything
        if not what:
            return None
        logger.warning("%s: %s is done without, as its first layers could not be tried on random numbers: %s",
                       model.config.model_type, what, " ".join(str(error).split()) or type(error).__name__)  # fmt: skip
        return None


def _first_layers(model_config: Any, trust_remote_code: bool) -> CausalLM:
    """The first layers of a model (`_first_of`) on random numbers in fp32."""
    module = build_skeleton(copy.deepcopy(model_config), trust_remote_code, torch.float32).eval()
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
    keep_mixers_apart(module)
    rotate_by_example(module)
    return CausalLM(module, Path(), Quantization("none"), torch.float32)


def _see_little(text_config: Any) -> None:
    """Let a token see fewer tokens than an example has, where it sees a choice of them."""
    for name, few in _SEEN.items():
        value = getattr(text_config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > few:
            setattr(text_config, name, few)


def _noise(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Random numbers of deviation 1/√(last dimension); near 1 where there is one dimension, as a norm's are."""
    if len(shape) < 2:
        return 1 + torch.randn(shape, generator=generator) / 10
    if math.prod(shape) <= LARGE:
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
    rows, columns = shape[-2:]
    noise = torch.randn(rows + columns, generator=generator) / math.sqrt(columns)
    return noise.as_strided((rows, columns), (1, 1)).expand(shape)  # row n is the noise from place n on


def _ids(model: CausalLM, count: int) -> Tensor:
    return torch.arange(1, count + 1).unsqueeze(0) % model.config.get_text_config().vocab_size


def _projects_plainly(model: CausalLM) -> bool:
    head, body = model.module.get_output_embeddings(), model.module.base_model
    if head is None or body is model.module:
        return False
    ids = _ids(model, 6)
    hidden = body(input_ids=ids, use_cache=False)[0]  # llama4's is the whole model: logits
    if hidden.shape[-1] != head.in_features:
        return False
    for deviation in LOGITS if isinstance(head, _LowRank) else LOGITS[:1]:
        if isinstance(head, _LowRank):
            head.up *= deviation
        if not _is_near(model.project(hidden), model.module(input_ids=ids, use_cache=False).logits):
            return False
    return True


def _draws(model: CausalLM) -> bool:
    """Whether a forward pass in training changes the state of PyTorch's random numbers."""
    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        model.module.train()
        try:
            model.module.base_model(input_ids=_ids(model, 6), use_cache=False)
        finally:
            model.module.eval()
        return not torch.equal(before, torch.get_rng_state())


def _pads_apart(model: CausalLM) -> bool:
    """The shorter of two examples in a padded batch against it by itself."""
    short, long = sorted(EXAMPLES)[0], sorted(EXAMPLES)[-1]
    ids = _ids(model, long).repeat(2, 1)
    mask = torch.ones_like(ids)
    ids[0, short:], mask[0, short:] = 0, 0
    alone = model.module(input_ids=ids[:1, :short], use_cache=False)[0]  # prophetnet's body alone is more than it
    padded = model.module(input_ids=ids, attention_mask=mask, use_cache=False)[0]
    return _is_near(padded[:1, :short], alone)


def _keeps_apart(model: CausalLM) -> str | None:
    """Examples packed into a row, by segments and by masks, against each by itself."""
    takes_positions = takes(model.module.base_model, "position_ids")
    recurrent = not takes_positions and any(is_mixer(module) for module in model.module.modules())
    if not takes_positions and not recurrent:
        return None
    ids = _ids(model, sum(EXAMPLES))
    none = torch.empty(0, dtype=torch.int64)
    batch = Batch(
        input_ids=ids, labels=ids, attention_mask=None,
        position_ids=torch.cat([torch.arange(length) for length in EXAMPLES]).unsqueeze(0), predicting=none,
        targets=none, tokens=ids.shape[1], trained_tokens=0, where=[], segments=Segments.of(EXAMPLES),
    )  # fmt: skip
    alone = [model.module.base_model(input_ids=part, use_cache=False)[0] for part in ids.split(EXAMPLES, dim=1)]
    own = model.config.get_text_config()._attn_implementation
    for way in ("segments", "masks"):
        model.by_segment = way == "segments"
        if way == "masks" and model.config.get_text_config()._attn_implementation != own:
            model.module.set_attn_implementation(own)
        if model.by_segment and not recurrent and not use_segments(model.module):
            continue
        try:
            packed = model.hidden_states(batch).split(EXAMPLES, dim=1)
        except (NotImplementedError, AttributeError, TypeError) as error:  # what a family does with a mask
            logger.debug("%s: no attention by %s: %s", model.config.model_type, way, error)
            continue
        if all(_is_near(one, other) for one, other in zip(packed, alone, strict=True)):
            return way
    return None


def _is_near(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() < TOLERANCE * expected.norm())
