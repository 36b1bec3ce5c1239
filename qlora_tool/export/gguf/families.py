"""The families of models that GGUF export knows: what llama.cpp calls their tensors, and how it wants them laid out.

A family is here only where a file of it, read back by transformers or run by llama.cpp, gave the logits of the
safetensors export (tests/export/test_gguf.py, test_llama_cpp.py). Names come from the `gguf` package's own map; the
layouts follow what llama.cpp's graphs expect (https://github.com/ggml-org/llama.cpp, src/models).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qlora_tool.errors import UserError

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")


@dataclass(frozen=True)
class Family:
    """How one `model_type` of transformers becomes a GGUF architecture.

    Attributes:
        architecture: `general.architecture`.
        interleaved: llama.cpp rotates neighbouring pairs of q and k, transformers the two halves of a head: their rows
            change places.
        norm_plus_one: the norm multiplies by 1 + weight, and the file holds the sum.
        transposed: weights that the model keeps as (in, out), by the end of their module's name.
        needs: configuration values that llama.cpp takes for granted, `{key: values it may have}`.
        sliding_period: one layer in so many attends to the whole context, the others to a window; 0: llama.cpp knows no
            window for this family.
        layer_norm: LayerNorm rather than RMSNorm.
    """

    architecture: str
    interleaved: bool = False
    norm_plus_one: bool = False
    transposed: tuple[str, ...] = ()
    needs: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    sliding_period: int = 0
    layer_norm: bool = False


_SILU = {"hidden_act": ("silu",)}
_GELU_TANH = ("gelu_pytorch_tanh",)
FAMILIES: dict[str, Family] = {
    "llama": Family("llama", interleaved=True, needs=_SILU),
    "mistral": Family("llama", interleaved=True, needs=_SILU),
    "qwen2": Family("qwen2", needs=_SILU),
    "qwen3": Family("qwen3", needs=_SILU),
    "mixtral": Family("llama", interleaved=True, needs=_SILU),
    "qwen3_moe": Family(
        "qwen3moe", needs=_SILU | {"norm_topk_prob": (True,), "decoder_sparse_step": (1,), "mlp_only_layers": ([],)}
    ),
    "granite": Family("granite", interleaved=True, needs=_SILU),
    "smollm3": Family("smollm3", interleaved=True, needs=_SILU),
    "olmo2": Family("olmo2", needs=_SILU),
    "phi3": Family("phi3", needs=_SILU),
    "gemma": Family("gemma", norm_plus_one=True, needs={"hidden_act": _GELU_TANH}),
    "gemma2": Family("gemma2", norm_plus_one=True, needs={"hidden_activation": _GELU_TANH}, sliding_period=2),
    "gemma3_text": Family(
        "gemma3", norm_plus_one=True, sliding_period=6,
        needs={"hidden_activation": _GELU_TANH, "attn_logit_softcapping": (None,),
               "use_bidirectional_attention": (False, None)},
    ),
    "gpt2": Family(
        "gpt2", transposed=("c_attn", "c_proj", "c_fc"), layer_norm=True,
        needs={"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
               "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)},
    ),
    "starcoder2": Family("starcoder2", layer_norm=True, needs={"hidden_act": _GELU_TANH, "use_bias": (True,)}),
}  # fmt: skip


def find_family(config) -> Family:
    """The family of a transformers configuration.

    Raises:
        UserError: none that is known, or a configuration in which llama.cpp would compute something else.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(
            f"--format gguf: model type {config.model_type!r} is not among the families that it knows "
            f"({', '.join(FAMILIES)}); choose --format safetensors"
        )
    faults = [
        f"--format gguf: {key} is {found!r} in this {config.model_type} model, and llama.cpp computes it with "
        f"{values[0]!r} only; choose --format safetensors"
        for key, values in family.needs.items()
        if (found := getattr(config, key, values[0])) not in values
    ]
    faults += _odd_attention(family, config)
    if faults:
        raise UserError(faults)
    return family


def _odd_attention(family: Family, config) -> list[str]:
    """What of a model's attention llama.cpp cannot be told."""
    faults = []
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is not None and scalar != config.head_dim:
        # gemma 27B: llama.cpp takes hidden size / heads, which it tells by the number of layers.
        known = (config.num_hidden_layers, scalar) in {
            (46, config.hidden_size // config.num_attention_heads),
            (62, config.hidden_size // config.num_attention_heads),
        }
        if not known:
            faults.append(
                f"--format gguf: query_pre_attn_scalar is {scalar}, and llama.cpp scales by head_dim "
                f"({config.head_dim}); choose --format safetensors"
            )
    if (rotated := getattr(config, "no_rope_layers", None)) is not None:
        expected = [int((index + 1) % 4 != 0) for index in range(config.num_hidden_layers)]
        if list(rotated) != expected:
            faults.append(
                "--format gguf: llama.cpp leaves out the rotary embedding in every 4th layer, but no_rope_layers says "
                "something else; choose --format safetensors"
            )
    if family.sliding_period:
        period = family.sliding_period
        expected = [
            "full_attention" if (index + 1) % period == 0 else "sliding_attention"
            for index in range(config.num_hidden_layers)
        ]
        if list(config.layer_types) != expected:
            faults.append(
                f"--format gguf: llama.cpp takes every {period}th layer of {config.model_type} to attend to the whole "
                "context, but layer_types says something else; choose --format safetensors"
            )
    return faults


class TensorNames:
    """Checkpoint tensors → GGUF tensors of one model.

    Args:
        family: the model's.
        config: its transformers configuration.
        prefix: what some checkpoints leave out in front of every name (gpt2's `transformer`).
    """

    def __init__(self, family: Family, config, prefix: str):
        import gguf

        architectures = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
        self._map = gguf.get_tensor_name_map(architectures[family.architecture], config.num_hidden_layers)
        self._family, self._config, self._prefix = family, config, prefix

    def convert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The GGUF tensors that one group of checkpoint tensors becomes, in llama.cpp's layout.

        Raises:
            UserError: a tensor that llama.cpp has no place for.
        """
        result: dict[str, Tensor] = {}
        experts: dict[str, dict[int, Tensor]] = {}
        for name, tensor in tensors.items():
            if match := _EXPERT.fullmatch(name):
                experts.setdefault(f"{match[1]}.{match[3]}.weight", {})[int(match[2])] = tensor
            else:
                result[self.gguf_name(name)] = self._laid_out(name, tensor)
        for name, parts in experts.items():  # (out, in) each → (experts, out, in)
            result[self.gguf_name(name)] = torch.stack([parts[index] for index in sorted(parts)])
        return result

    def restored(self, name: str, stored: Callable[[str], Tensor]) -> Tensor:
        """A checkpoint tensor as the file holds it.

        Args:
            stored: the file's tensors by llama.cpp's names, in fp32.
        """
        if match := _EXPERT.fullmatch(name):
            return stored(self.gguf_name(f"{match[1]}.{match[3]}.weight"))[int(match[2])]
        tensor, kind = stored(self.gguf_name(name)), self._layout(name)
        if kind == "plus one":
            return tensor - 1
        if kind == "transposed":
            return tensor.T
        return halves_first(tensor, self._heads(name)) if kind == "interleaved" else tensor

    def gguf_name(self, name: str) -> str:
        """llama.cpp's name for a checkpoint tensor."""
        suffixes = (".weight", ".bias")
        found = self._map.get_name(name, suffixes) or self._map.get_name(f"{self._prefix}.{name}", suffixes)
        if found is None:
            raise UserError(
                f"--format gguf: llama.cpp's {self._family.architecture} has no place for the tensor {name}; choose "
                "--format safetensors"
            )
        return found

    def _laid_out(self, name: str, tensor: Tensor) -> Tensor:
        kind = self._layout(name)
        if kind == "plus one":
            return tensor.float() + 1
        if kind == "transposed":
            return tensor.T
        return interleaved(tensor, self._heads(name)) if kind == "interleaved" else tensor

    def _layout(self, name: str) -> str | None:
        """How llama.cpp's tensor differs from the checkpoint's; None: it does not."""
        module, _, kind = name.rpartition(".")
        last = module.rpartition(".")[2]
        if self._family.norm_plus_one and name.endswith("norm.weight"):
            return "plus one"
        if kind == "weight" and last in self._family.transposed:
            return "transposed"
        return "interleaved" if self._family.interleaved and last in ("q_proj", "k_proj") else None

    def _heads(self, name: str) -> int:
        config = self._config
        return config.num_key_value_heads if ".k_proj." in name else config.num_attention_heads


def interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Rows of every head from (first half, second half) to (pairs): 0, d/2, 1, d/2 + 1 and so on.

    Args:
        tensor: (heads · d, …), a weight or a bias.
    """
    half = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, 2, half, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def halves_first(tensor: Tensor, heads: int) -> Tensor:
    """What `interleaved` was made from."""
    half = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, half, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
