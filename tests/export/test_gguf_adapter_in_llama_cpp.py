"""llama.cpp runs a base's GGUF file with an adapter's: the logits of the live model (pip install llama-cpp-python)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_adapters import IDS, artifact_of, live_logits, write_adapter, write_chat_base
from tiny_ggufs import CHANGES, LLAMA_CPP_ONLY
from tiny_models import relative_error

from qlora_tool.export.write import ExportOptions, export_merged

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytestmark = pytest.mark.slow

EXPERTS = {"target_parameters": ["gate_up_proj", "down_proj"]}
EVERYWHERE = {"target_modules": ["embed_tokens", "lm_head", "q_proj", "k_proj", "down_proj"]}
PATTERNS = {"use_rslora": True, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 3.7}}
CASES = {
    **{case: (case, changes, {}) for case, changes in CHANGES.items()},
    **{case: (family, changes, {}) for case, (family, changes) in LLAMA_CPP_ONLY.items()},
    "mixtral, experts": ("mixtral", {}, EXPERTS),
    "qwen3_moe, experts": ("qwen3_moe", {}, EXPERTS),
    "llama, embeddings": ("llama", {}, EVERYWHERE),
    "gpt2, embeddings": ("gpt2", CHANGES["gpt2"] | {"tie_word_embeddings": False},
                         {"target_modules": ["wte", "c_attn", "c_proj"]}),
    "llama, patterns": ("llama", {}, PATTERNS),
}  # fmt: skip


def logits(folder: Path, **options) -> torch.Tensor:
    """(length, vocabulary), fp32."""
    file = str(folder / "base.gguf")
    model = llama_cpp.Llama(file, n_ctx=256, verbose=False, n_threads=1, logits_all=True, **options)
    model.eval(IDS[0].tolist())
    result = torch.tensor(model.scores[: IDS.shape[1]], dtype=torch.float32)
    model.close()
    return result


@pytest.mark.parametrize("case", CASES)
def test_base_and_adapter_are_the_live_model(case, tmp_path):
    family, changes, keys = CASES[case]
    base = write_chat_base(family, tmp_path / "base", **changes)
    artifact = artifact_of(write_adapter(tmp_path / "adapter", base, **keys))
    export_merged(artifact, tmp_path / "out", ExportOptions(format="gguf-adapter", with_base=True))
    live, without = live_logits(artifact)[0], logits(tmp_path / "out")
    found = logits(tmp_path / "out", lora_path=str(tmp_path / "out" / "adapter.gguf"))
    # As for merged files: llama.cpp multiplies f16 weights with inputs rounded to f16, and keeps k and v in f16.
    assert relative_error(found, live) < 5e-3
    assert relative_error(without, live) > 0.05  # the adapter does something
