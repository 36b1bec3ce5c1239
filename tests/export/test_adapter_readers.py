"""Who can read an adapter's files: told by the export, against PEFT where it reads something else."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from tiny_adapters import IDS, artifact_of, live_logits, write_adapter
from tiny_models import read_by_transformers, write_tiny

from qlora_tool.errors import UserError
from qlora_tool.export.options import ExportOptions
from qlora_tool.export.write import export_merged

LORA_ALONE = "it reads LoRA alone, and this is "
NO_WHOLE = "it reads no biases and no tensors trained in full"
PLACES = "it reads LoRA on linear modules alone, and this is on embeddings or experts too"


def readers(tmp_path: Path, family: str, form: str = "adapter", **keys) -> dict[str, str | None]:
    adapter = write_adapter(tmp_path / "adapter", write_tiny(family, tmp_path / "base"), quantization="none", **keys)
    return export_merged(artifact_of(adapter), tmp_path / "out", ExportOptions(format=form)).facts["readers"]


@pytest.mark.parametrize("keys, vllm, llama_cpp", [
    ({}, None, None),
    ({"use_rslora": True}, None, "it ignores use_rslora; --format gguf-adapter"),
    ({"rank_pattern": {"q_proj": 2}}, "it ignores rank_pattern; --format adapter-portable", None),
    ({"alpha_pattern": {"q_proj": 2}}, "it ignores alpha_pattern; --format adapter-portable",
     "it ignores alpha_pattern; --format gguf-adapter"),
    ({"method": "dora"}, *[f"{LORA_ALONE}dora"] * 2), ({"method": "loha"}, *[f"{LORA_ALONE}loha"] * 2),
    ({"modules_to_save": ["lm_head"]}, NO_WHOLE, NO_WHOLE), ({"bias": "all"}, NO_WHOLE, NO_WHOLE),
    ({"target_modules": ["embed_tokens", "q_proj"]}, PLACES, f"{PLACES}; --format gguf-adapter"),
], ids=str)  # fmt: skip
def test_each_reader(tmp_path, keys, vllm, llama_cpp):
    assert readers(tmp_path, "llama-biased", **keys) == {"PEFT": None, "vLLM": vllm, "llama.cpp": llama_cpp}


def test_the_portable_form_has_no_patterns(tmp_path):
    keys = {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}}
    assert set(readers(tmp_path, "llama", "adapter-portable", **keys).values()) == {None}


def test_experts_have_no_portable_form(tmp_path):
    keys = {"target_parameters": ["down_proj"], "target_modules": []}
    with pytest.raises(UserError, match="this adapter is on experts or rows of tokens too; choose --format adapter"):
        readers(tmp_path, "mixtral", "adapter-portable", **keys)


@pytest.mark.parametrize("family, module, rewritten", [
    ("deepseek_v3", "shared_experts.down_proj", True), ("qwen2_moe", "shared_expert.down_proj", False),
    ("ernie4_5_moe", "layers.0.mlp.down_proj", True), ("deepseek_v3", "o_proj", False), ("llama", "down_proj", False),
])  # fmt: skip
def test_what_peft_takes_for_experts(tmp_path, family, module, rewritten):
    """PEFT's logits are not the live model's just where the export says so."""
    said = readers(tmp_path, family, target_modules=[module])["PEFT"]
    assert (said or "").startswith("PEFT 0.21 takes down_proj for weights of experts") is rewritten
    live = live_logits(artifact_of(tmp_path / "adapter"))
    with torch.no_grad():
        model = peft.PeftModel.from_pretrained(read_by_transformers(tmp_path / "base"), tmp_path / "out")
        theirs = model.eval()(IDS).logits
    assert torch.allclose(theirs, live, atol=1e-4) is not rewritten
