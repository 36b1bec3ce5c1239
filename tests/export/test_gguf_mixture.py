"""Which tensors of a GGUF file get which type: llama.cpp's own choices, as it was seen to make them."""

from __future__ import annotations

import ctypes
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import gguf
import numpy as np
import pytest

from qlora_tool.choices import GgufType
from qlora_tool.export.gguf.mixture import MIXTURES, PLAIN, fallbacks, tensor_types
from qlora_tool.export.types import GGUF_TYPES, MIXED

LETTERS = {"F16": "h", "F32": "f", "Q8_0": "8", "Q6_K": "6", "Q5_K": "5", "Q4_K": "4", "Q5_1": "b", "Q5_0": "a",
           "Q4_0": "o", "IQ4_NL": "n"}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model of some family, its sizes as small as they may be."""

    family: str
    layers: int
    hidden: int = 256
    inner: int = 512
    heads: int = 8
    shared: int = 2  # heads of keys and values
    experts: int = 0
    tied: bool = False

    @property
    def config(self) -> SimpleNamespace:
        return SimpleNamespace(
            model_type=self.family, num_hidden_layers=self.layers, num_attention_heads=self.heads,
            num_key_value_heads=self.shared, num_local_experts=self.experts,
        )  # fmt: skip

    def shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, inner, shared = self.hidden, self.inner, self.hidden // self.heads * self.shared
        layer: dict[str, tuple[int, ...]] = {"attn_norm": (hidden,), "attn_output": (hidden, hidden)}
        if self.family in ("phi3", "gpt2"):
            layer |= {"attn_qkv": (hidden + 2 * shared, hidden)}
        else:
            layer |= {"attn_q": (hidden, hidden), "attn_k": (shared, hidden), "attn_v": (shared, hidden)}
        if self.experts:
            layer |= {"ffn_gate_inp": (self.experts, hidden), "ffn_up_exps": (self.experts, inner, hidden),
                      "ffn_down_exps": (self.experts, hidden, inner)}  # fmt: skip
        else:
            layer |= {"ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}
        shapes = {"token_embd.weight": (64, hidden), "output_norm.weight": (hidden,)}
        shapes |= {} if self.tied else {"output.weight": (64, hidden)}
        shapes |= {"position_embd.weight": (16, hidden)} if self.family == "gpt2" else {}
        return shapes | {f"blk.{index}.{name}.weight": shape for index in range(self.layers)
                         for name, shape in layer.items()}  # fmt: skip


CASES = {
    "22 layers": Case("llama", 22),
    "70B": Case("llama", 80, inner=256, shared=4),
    "65B": Case("llama", 80, inner=256, shared=8),
    "qwen2 72B": Case("qwen2", 80, inner=256, shared=8),
    "qwen3 of 80 layers": Case("qwen3", 80, inner=256, shared=1),
    "eight experts": Case("mixtral", 10, experts=8),
    "four experts": Case("mixtral", 9, experts=4),
    "tied, rows of 576": Case("llama", 9, hidden=576, inner=1536, heads=9, shared=3, tied=True),
    "tied gemma": Case("gemma", 18, heads=2, shared=1, tied=True),
    "one matrix for q, k, v": Case("phi3", 16),
    "gpt2": Case("gpt2", 12, heads=4, shared=4, tied=True),
    "rows of 36 and 100": Case("llama", 4, hidden=36, inner=100, heads=2),
}


def letters(types: dict[str, str], name: str) -> str:
    """A letter a layer, one of all where they are alike."""
    found = [LETTERS[types[key]] for key in sorted((key for key in types if f".{name}." in key), key=layer_of)]
    return found[0] if len(set(found)) == 1 else "".join(found)


def layer_of(name: str) -> int:
    return int(name.split(".")[1])


def summary(types: dict[str, str]) -> str:
    """All types of a model in a line, `name=letters`, without those of norms."""
    kinds = sorted({name.split(".")[2] for name in types if name.startswith("blk.")})
    rest = {name.removesuffix(".weight"): LETTERS[kind] for name, kind in types.items() if "blk." not in name}
    found = {name: letters(types, name) for name in kinds} | rest
    return " ".join(f"{name}={kind}" for name, kind in found.items() if "norm" not in name)


def by_llama_cpp(case: Case, gguf_type: str, folder: Path) -> dict[str, str]:
    """What its quantizer makes of a file of zeros."""
    import llama_cpp

    source, made = folder / "zeros.gguf", folder / "made.gguf"
    architecture = {"mixtral": "llama"}.get(case.family, case.family)
    writer = gguf.GGUFWriter(source, architecture)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_block_count(case.layers)
    writer.add_context_length(128)
    writer.add_embedding_length(case.hidden)
    writer.add_feed_forward_length(case.inner)
    writer.add_head_count(case.heads)
    writer.add_head_count_kv(case.shared)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_layer_norm_eps(1e-6)
    writer.add_vocab_size(64)
    if case.experts:
        writer.add_expert_count(case.experts)
        writer.add_expert_used_count(2)
    for name, shape in case.shapes().items():
        whole = len(shape) == 1 or "gate_inp" in name or "position" in name
        writer.add_tensor(name, np.zeros(shape, np.float32 if whole else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    asked = llama_cpp.llama_model_quantize_default_params()
    asked.nthread, asked.ftype = 1, int(gguf.LlamaFileType[f"MOSTLY_{gguf_type.upper()}"])
    done = llama_cpp.llama_model_quantize(str(source).encode(), str(made).encode(), ctypes.byref(asked))
    assert done == 0
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(made).tensors}


SHAPES = {"token_embd.weight": (1000, 512), "output.weight": (1000, 512), "output_norm.weight": (512,)} | {
    f"blk.{layer}.{name}.weight": shape for layer in range(16)
    for name, shape in (("attn_q", (512, 512)), ("attn_v", (128, 512)), ("attn_norm", (512,)), ("ffn_down", (512, 768)),
                        ("ffn_gate_inp", (8, 512)))
}  # fmt: skip


class Config:
    model_type, num_hidden_layers, num_attention_heads, num_key_value_heads = "llama", 16, 8, 2


def test_the_names_that_options_are_checked_by():
    assert set(MIXED) == set(MIXTURES) and {*MIXTURES, *PLAIN} == set(GGUF_TYPES)
    assert {*GGUF_TYPES, "auto"} == set(get_args(GgufType))


def test_the_mixture_of_the_usual_type():
    """q4_k_m: a half of attention's values and of the ways down in six bits: the first and the last eighth of the
    layers, and of the others every third (2 and 2 of 16, then 4, 7, 10 and 13)."""
    types = tensor_types(SHAPES, "q4_k_m", Config)
    more = {layer for layer in range(16) if types[f"blk.{layer}.attn_v.weight"] == "Q6_K"}
    assert more == {0, 1, 4, 7, 10, 13, 14, 15} == {
        layer for layer in range(16) if types[f"blk.{layer}.ffn_down.weight"] == "Q6_K"
    }
    assert types["token_embd.weight"] == types["blk.0.attn_q.weight"] == types["blk.2.attn_v.weight"] == "Q4_K"
    assert types["output.weight"] == "Q6_K"
    assert types["blk.0.attn_norm.weight"] == types["blk.3.ffn_gate_inp.weight"] == "F32"
    assert fallbacks(SHAPES, types, "q4_k_m", Config) == 0


def test_tied_embeddings_are_the_output():
    tied = {name: shape for name, shape in SHAPES.items() if name != "output.weight"}
    assert tensor_types(tied, "q4_k_s", Config)["token_embd.weight"] == "Q6_K"


@pytest.mark.parametrize(("columns", "expected"), [
    (512, {"Q4_K", "Q5_K", "Q6_K"}), (576, {"Q5_0", "Q5_1", "Q8_0"}), (100, {"F16", "Q8_0"}),
])  # fmt: skip
def test_rows_of_other_lengths_fall_back(columns, expected):
    shapes = {name: (*shape[:-1], columns) if len(shape) > 1 else shape for name, shape in SHAPES.items()}
    for mixture in ("q4_k_m", "q4_k_s", "q5_k_m", "q6_k"):
        types = tensor_types(shapes, mixture, Config)
        large = {kind for name, kind in types.items() if kind != "F32"}
        assert large <= expected
        if columns != 512:
            assert fallbacks(shapes, types, mixture, Config) == sum(kind != "F32" for kind in types.values())


@pytest.mark.parametrize("name", CASES)
def test_the_types_are_llama_cpps(name):
    """As recorded of llama.cpp (0c1e57098) by the next test's way."""
    case, recorded = CASES[name], json.loads(Path(__file__).with_name("llama_cpp_types.json").read_text())[name]
    for gguf_type in MIXTURES:
        assert summary(tensor_types(case.shapes(), gguf_type, case.config)) == recorded[gguf_type], gguf_type


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_itself_picks_the_same_types(name, tmp_path):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    case = CASES[name]
    for gguf_type in MIXTURES:
        assert by_llama_cpp(case, gguf_type, tmp_path) == tensor_types(case.shapes(), gguf_type, case.config), gguf_type
