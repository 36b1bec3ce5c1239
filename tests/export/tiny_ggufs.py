"""GGUF files of tiny models, and what a model is once its matrices are rounded as the file's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_adapters import IDS

from qlora_tool.artifacts import Artifact
from qlora_tool.export.encoding import Encoder
from qlora_tool.export.gguf.write import write_gguf
from qlora_tool.export.merge import MergedModel
from qlora_tool.files.tensors import Checkpoint
from qlora_tool.model.load import build_skeleton
from qlora_tool.model.slots import Quantization
from qlora_tool.model.source import read_model_config

# Sizes of families of which transformers does not read everything that the file says: they get the values that it
# takes then.
_GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 256}
CHANGES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {},
    "llama-odd": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "phi3": {},
    "gemma2": _GEMMA | {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, "sliding_window": 32},
    "gemma3_text": _GEMMA | {"num_hidden_layers": 6, "sliding_window": 32},
    "gpt2": {"max_position_embeddings": 1024},
    "starcoder2": {},
}
# Those that llama.cpp reads and transformers does not, or not all of.
_LLAMA_3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
# llama.cpp takes the long factors where its context is longer than the original one, transformers where the text is.
_LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 256,
         "short_factor": [1.0 + index / 8 for index in range(8)], "long_factor": [9.0] * 8}  # fmt: skip
LLAMA_CPP_ONLY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-biased": ("llama-biased", {}),
    "llama3": ("llama", {"rope_parameters": _LLAMA_3}),
    "linear": ("llama", {"rope_parameters": _LINEAR}),
    "yarn": ("qwen2", {"rope_parameters": _YARN}),
    "longrope": (
        "phi3",
        {"rope_parameters": _LONG, "original_max_position_embeddings": 256, "max_position_embeddings": 1024},
    ),
    "gemma": ("gemma", {}),
    "granite": ("granite", {}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4}),
    "olmo2": ("olmo2", {}),
    "mixtral": ("mixtral", {}),
    "qwen3_moe": ("qwen3_moe", {}),
}


def in_whole_blocks(family: str) -> dict[str, Any]:
    """Sizes that make every row of a family's tiny model a multiple of 256, the block of k-types."""
    if family == "gpt2":
        return {"n_embd": 256, "n_head": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32}
    if family.startswith("gemma"):
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 256}
    return {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 256} | heads


def merged_of(artifact: Artifact, base: Path, dtype: torch.dtype | None = None) -> MergedModel:
    quantization = Quantization(artifact.model.quantization, artifact.model.double_quant)
    skeleton = build_skeleton(read_model_config(base))
    return MergedModel(skeleton, Checkpoint(base), quantization, artifact.adapter, dtype=dtype)


def gguf_of(
    artifact: Artifact, base: Path, file: Path, gguf_type: str = "f16", tokenizer: Path | None = None
) -> tuple[Path, dict[str, Any]]:
    """Write the GGUF file of a merged artifact; the path and what the writer says of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    encoder = Encoder(merged_of(artifact, base), ["dequantized"])
    return file, write_gguf(encoder, base, tokenizer or base, file, gguf_type)


def half(values: torch.Tensor) -> torch.Tensor:
    return values.half().float()


@torch.no_grad()
def rounded_reference(
    artifact: Artifact, base: Path, folder: Path, rounding: Callable[[torch.Tensor], torch.Tensor] = half
) -> torch.Tensor:
    """Logits of the safetensors export in fp32, each of its matrices rounded as the file's are; (rows, length,
    vocabulary)."""
    from transformers import AutoModelForCausalLM

    from qlora_tool.export.options import ExportOptions
    from qlora_tool.export.write import export_merged

    export_merged(artifact, folder / "safetensors", ExportOptions(dtype="float32"))
    model = AutoModelForCausalLM.from_pretrained(folder / "safetensors", dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.endswith("wpe.weight"):  # positions stay in fp32
            parameter.copy_(rounding(parameter))
    return model(input_ids=IDS, use_cache=False).logits


def sentencepiece(chat_template: str | None = None):
    """A tokenizer of Llama 2's kind: ▁ for spaces, one before the text, and a token for every byte."""
    from tokenizers import Tokenizer
    from tokenizers_for_tests import metaspace
    from transformers import PreTrainedTokenizerFast

    state = json.loads(metaspace().backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    state["pre_tokenizer"] = None
    state["normalizer"] = {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]}  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        chat_template=chat_template, clean_up_tokenization_spaces=False,
    )  # fmt: skip
