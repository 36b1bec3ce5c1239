"""LLaMA-Adapter (Zhang et al. 2023, arXiv 2303.16199): learned prompts that the top layers' attention looks at too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from qlora_tool.errors import UserError
from qlora_tool.methods.keys import Count, MethodKeys
from qlora_tool.methods.method import Adapter, Method, SavedWith, Settings, keys_of_file, number_in

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qlora_tool.weights.handles import WeightHandle


class LlamaAdapterKeys(MethodKeys):
    """LLaMA-Adapter's own keys, PEFT's names. It sits on attention, so no other key of an adapter is read."""

    only_read = frozenset({"init_from"})

    adapter_len: Count = 10
    """LLaMA-Adapter: the number of prompts in each layer."""
    adapter_layers: Count | None = None
    """LLaMA-Adapter: on how many of the top layers; null: on all."""


class LlamaAdapter(Method):
    """attention(x) + o(g · softmax(q·Kᵀ/√d)·V), K and V the attention's own k and v of the prompts P (1, n, hidden).

    The prompts have no positions and each token looks at all of them; their softmax is apart from that of the tokens
    (equation 8 of the paper). The gate g, one number for a layer as in PEFT, starts at 0, so training begins with the
    base's output; where o has a bias, that is added once more, and in gpt2 there is no o, both as in PEFT. There is no
    update of a weight in this: it cannot be merged.
    """

    name = "llama_adapter"
    usual_rates = (1e-3, 5e-2)  # prompts and a gate are trained
    peft_type = "ADAPTION_PROMPT"
    keys = LlamaAdapterKeys
    on_attention = True
    peft_names: ClassVar[Mapping[str, str]] = {"adaption_prompt": "adaption_prompt", "adaption_gate": "adaption_gate"}
    has_delta = False
    additive = False

    def shapes(self, out_features: int, in_features: int, r: int) -> dict[str, tuple[int, ...]]:
        """Of `r` prompts; `in_features` is the hidden size."""
        return {"adaption_prompt": (1, r, in_features), "adaption_gate": (1,)}

    def start(
        self, out_features: int, in_features: int, settings: Settings, weight: WeightHandle, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """P normal of deviation 1, g = 0, as in PEFT."""
        import torch

        prompts = torch.empty(1, getattr(settings.keys, "adapter_len", 1), in_features)
        return {"adaption_prompt": prompts.normal_(generator=generator), "adaption_gate": torch.zeros(1)}

    def attended(self, adapter: Adapter, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What attention to the prompts gives, gate included: q (batch, heads, tokens, d), rotated, k and v
        (1, key heads, n, d) → (batch, tokens, heads · d)."""
        import torch

        k, v = (one.repeat_interleave(q.shape[1] // one.shape[1], dim=1) for one in (k, v))
        scores = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1, dtype=torch.float32)
        gated = (adapter.tensors["adaption_gate"].float() * scores).to(q.dtype)
        attended: Tensor = (gated @ v).transpose(1, 2).flatten(2)
        return attended

    def branch(self, adapter: Adapter, x: Tensor) -> Tensor:
        raise NotImplementedError("prompts are on attention, not on one linear module: see `attended`")

    def delta(self, tensors: Mapping[str, Tensor], settings: Settings, weight: Tensor) -> Tensor:
        raise NotImplementedError("prompts have no update of a weight")

    def to_peft(self, settings: Settings, saved: SavedWith) -> dict[str, Any]:
        return {
            "adapter_len": getattr(settings.keys, "adapter_len", 1),
            "adapter_layers": saved.modules,
            "target_modules": min(saved.names, default="self_attn"),
        }

    def from_peft(self, file: Path, config: Mapping[str, Any]) -> Settings | None:
        if config.get("peft_type") != self.peft_type:
            return None
        given = {key: number_in(file, config, key, whole=True) for key in ("adapter_len", "adapter_layers")}
        if (target := config.get("target_modules")) not in (None, "self_attn", "attn"):
            raise UserError(f"{file}: target_modules is {target!r}, but prompts are read on 'self_attn' (gpt2: 'attn') "
                            "alone; save the adapter again")  # fmt: skip
        return Settings(1, 1.0, keys=keys_of_file(file, self.keys, given))

    def fits(self, tensors: Mapping[str, Tensor], settings: Settings) -> bool:
        expected = self.shapes(0, self.sizes(tensors)[1], getattr(settings.keys, "adapter_len", 1))
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected

    def sizes(self, tensors: Mapping[str, Tensor]) -> tuple[int, int, int]:
        return 0, tensors["adaption_prompt"].shape[-1], 0


METHOD = LlamaAdapter()
