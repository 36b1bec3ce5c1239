"""GGUF files, read back by transformers: the logits of the safetensors export, its tokenizer, its template."""

from __future__ import annotations

import importlib.util
import json
import math
import warnings

import gguf
import numpy as np
import pytest
import torch
import transformers
from tiny_adapters import IDS, artifact_of, plain_logits, write_adapter, write_chat_base, write_peft_adapter
from tiny_ggufs import (
    CHANGES,
    LLAMA_CPP_ONLY,
    gguf_of,
    in_whole_blocks,
    merged_of,
    rounded_reference,
    sentencepiece,
)  # fmt: skip
from tiny_models import relative_error, tiny_config
from tokenizers import Regex, pre_tokenizers
from tokenizers_for_tests import CHATML, byte_level
from torch.torch_version import TorchVersion
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from qlora_tool.errors import UserError
from qlora_tool.export.encoding import Encoder
from qlora_tool.export.gguf.families import FAMILIES, find_family
from qlora_tool.export.gguf.read_back import read_back
from qlora_tool.export.gguf.settings import rope_tensors
from qlora_tool.export.gguf.tokenizer import BYTE, CONTROL, UNUSED, USER_DEFINED, read_tokenizer
from qlora_tool.export.gguf.write import quantized_blocks, refuse_unwritable, write_gguf


@torch.no_grad()
def logits_of(file) -> torch.Tensor:
    """As transformers computes them from the file alone, in fp32."""
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    return model.eval()(input_ids=IDS, use_cache=False).logits


def base_and_artifact(folder, family="llama", **changes):
    base = write_chat_base(family, folder / "base", **changes)
    return base, artifact_of(write_adapter(folder / "adapter", base))


def test_every_family_is_tested():
    families = [*CHANGES, *(family for family, _ in LLAMA_CPP_ONLY.values())]
    assert {tiny_config(family).model_type for family in families} == set(FAMILIES)


@pytest.mark.parametrize("family", CHANGES)
def test_transformers_reads_the_same_model_back(family, tmp_path):
    base, artifact = base_and_artifact(tmp_path, family, **CHANGES[family])
    file, facts = gguf_of(artifact, base, tmp_path / "model.gguf")
    assert relative_error(logits_of(file), rounded_reference(artifact, base, tmp_path)) < 1e-5
    assert facts["bytes"] == file.stat().st_size


@pytest.mark.parametrize("family", [
    pytest.param(family, marks=() if family == "llama-tied" else pytest.mark.slow) for family in CHANGES
    if family != "llama-odd"
])  # fmt: skip
def test_transformers_reads_a_four_bit_file_as_it_is_read_back(family, tmp_path):
    base, artifact = base_and_artifact(tmp_path, family, **(in_whole_blocks(family) | CHANGES[family]))
    file, _ = gguf_of(artifact, base, tmp_path / "model.gguf", "q4_k_m")
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert {"Q4_K", "Q6_K"} <= kinds <= {"F32", "Q4_K", "Q5_K", "Q6_K"}
    (tmp_path / "back").mkdir()
    read_back(merged_of(artifact, base), file, tmp_path / "back")
    assert relative_error(logits_of(file), plain_logits(tmp_path / "back")) < 1e-5


def as_q8_0(values: torch.Tensor) -> torch.Tensor:
    """By the gguf package's own reference."""
    kind = gguf.GGMLQuantizationType.Q8_0
    return torch.from_numpy(gguf.dequantize(gguf.quantize(values.numpy(), kind), kind).copy())


@pytest.mark.parametrize(
    ("gguf_type", "rounding"), [("bf16", lambda values: values.bfloat16().float()), ("q8_0", as_q8_0)]
)
def test_the_other_types_round_as_they_should(gguf_type, rounding, tmp_path):
    base, artifact = base_and_artifact(tmp_path)
    file, _ = gguf_of(artifact, base, tmp_path / "model.gguf", gguf_type)
    assert relative_error(logits_of(file), rounded_reference(artifact, base, tmp_path, rounding)) < 1e-5


def q8_0_by_formula(values: torch.Tensor) -> np.ndarray:
    """As ggml-quants.c writes it (quantize_row_q8_0_ref), number by number in fp32: d = max |x| / 127, halves of x / d
    rounded away from zero."""
    blocks = []
    for block in values.numpy().reshape(-1, 32):
        d = np.abs(block).max() / np.float32(127)
        inverse = np.float32(1) / d if d else np.float32(0)
        scaled = [float(x * inverse) for x in block]  # exact in double, as are the sums with a half
        whole = [int(math.copysign(math.floor(abs(x) + 0.5), x)) for x in scaled]
        blocks.append(d.astype(np.float16).tobytes() + np.array(whole, np.int8).tobytes())
    return np.frombuffer(b"".join(blocks), np.uint8)


def edge_values() -> torch.Tensor:
    values = torch.randn(2000, 96, generator=torch.Generator().manual_seed(0))
    values[0, :32], values[1, 0], values[2, :32] = 0, 300, -0.0
    values[3, :32] = torch.arange(32) - 15.5  # halves
    values[4, :32] = 0.49999997  # the number below a half: added to one, it rounds up in fp32
    values[3:5, 0] = 127
    values[5] *= 1e-30
    values[6] = values[6].bfloat16().float()
    values[7] *= 8e6  # a scale at the edge of fp16
    return values


@pytest.mark.parametrize("rows", [700, 2000])  # three pieces, the last one smaller; or all at once
def test_eight_bits_are_llama_cpps(rows):
    with warnings.catch_warnings(), np.errstate(over="ignore"):
        warnings.simplefilter("error")
        found = quantized_blocks(edge_values(), gguf.GGMLQuantizationType.Q8_0, at_a_time=rows * 96)
        assert found.shape == (2000, 96 // 32 * 34)
        assert np.array_equal(found.ravel(), q8_0_by_formula(edge_values()))


@pytest.mark.parametrize("size", [1e-40, 1.4e-45])
def test_weights_too_small_for_a_scale_become_zero_without_a_word(size):
    values = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * size
    kind = gguf.GGMLQuantizationType.Q8_0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        blocks = quantized_blocks(values, kind)
    assert not gguf.dequantize(blocks, kind).any()


def test_types_of_tensors(tmp_path):
    base, artifact = base_and_artifact(tmp_path, "llama-odd")  # 36 wide: no whole number of blocks of 32
    file, _ = gguf_of(artifact, base, tmp_path / "model.gguf", "q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert kinds["blk.0.attn_norm.weight"] == kinds["output_norm.weight"] == "F32"
    assert kinds["blk.0.attn_q.weight"] == "F16"
    base, artifact = base_and_artifact(tmp_path / "even")
    file, _ = gguf_of(artifact, base, tmp_path / "even.gguf", "q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert kinds["token_embd.weight"] == kinds["blk.1.ffn_down.weight"] == kinds["output.weight"] == "Q8_0"


def test_the_same_model_gives_the_same_bytes(tmp_path):
    base, artifact = base_and_artifact(tmp_path)
    first, _ = gguf_of(artifact, base, tmp_path / "a" / "model.gguf")
    second, _ = gguf_of(artifact, base, tmp_path / "b" / "model.gguf")
    assert first.read_bytes() == second.read_bytes()


def test_tensors_are_written_before_the_next_are_made(tmp_path):
    """What is held at once does not grow with the number of layers."""
    base, artifact = base_and_artifact(tmp_path)
    merged, file, sizes = merged_of(artifact, base), tmp_path / "model.gguf", []
    make = type(merged).tensors

    def tensors(self, group):
        sizes.append(file.stat().st_size if file.exists() else 0)
        return make(self, group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(merged), "tensors", tensors)
        write_gguf(Encoder(merged, [merged.base]), base, base, file)
    assert len(sizes) == len(merged.groups)
    assert sizes[0] > 0  # the header, before the first tensor
    # Python's file object holds back up to 8 KB.
    assert sizes[-1] > 0.9 * file.stat().st_size - 2**15


def test_embeddings_that_were_trained_apart_are_both_there(tmp_path):
    base = write_chat_base("llama-tied", tmp_path / "base")
    adapter = write_peft_adapter(tmp_path / "adapter", base, modules_to_save=["lm_head"])  # PEFT unties it
    artifact = artifact_of(adapter, quantization="nf4")
    file, _ = gguf_of(artifact, base, tmp_path / "model.gguf")
    assert {"token_embd.weight", "output.weight"} <= {tensor.name for tensor in gguf.GGUFReader(file).tensors}
    assert relative_error(logits_of(file), rounded_reference(artifact, base, tmp_path)) < 1e-5


def test_embeddings_that_llama_cpp_cannot_keep_apart_are_refused(tmp_path):
    base = write_chat_base("gemma2", tmp_path / "base", **CHANGES["gemma2"])
    adapter = write_peft_adapter(tmp_path / "adapter", base, modules_to_save=["lm_head"])
    artifact = artifact_of(adapter, quantization="nf4")
    with pytest.raises(UserError, match=r"gemma2 has no place for the tensor lm_head\.weight"):
        gguf_of(artifact, base, tmp_path / "model.gguf")


# ------------------------------------------------------------------------------------------------------- tokenizers


def as_gguf(tokenizer, folder, more_rows: int = 0):
    tokenizer.save_pretrained(folder)
    return read_tokenizer(folder, folder, len(tokenizer) + more_rows)


LLAMA_3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
           r"|\s+(?!\S)|\s+")  # fmt: skip
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
          r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")  # fmt: skip


def split_by(*steps, ignore_merges: bool = False):
    """A byte-level tokenizer that splits text by these steps first."""
    tokenizer = byte_level()
    last = [] if steps and steps[-1] == "bytes" else [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    parts = [pre_tokenizers.ByteLevel(add_prefix_space=False) if step == "bytes" else step for step in steps]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*parts, *last])
    tokenizer.backend_tokenizer.model.ignore_merges = ignore_merges
    return tokenizer


def isolated(regex: str):
    return pre_tokenizers.Split(Regex(regex), "isolated")


@pytest.mark.parametrize(
    ("steps", "ignore_merges", "expected"),
    [
        (["bytes"], False, "gpt-2"),
        ([pre_tokenizers.Digits(individual_digits=True), "bytes"], False, "smollm"),
        ([isolated(LLAMA_3)], True, "llama-bpe"),
        ([isolated(LLAMA_3)], False, "smaug-bpe"),
        ([isolated(QWEN_2)], False, "qwen2"),
        ([isolated(TEKKEN)], True, "tekken"),
    ],
)
def test_the_way_of_splitting_is_named(steps, ignore_merges, expected, tmp_path):
    assert as_gguf(split_by(*steps, ignore_merges=ignore_merges), tmp_path).pre == expected


@pytest.mark.parametrize(
    "tokenizer",
    [
        split_by(isolated(r"\w+"), "bytes"),
        split_by(isolated(QWEN_2), ignore_merges=True),
        split_by(pre_tokenizers.Punctuation(), "bytes"),
    ],
)
def test_a_way_of_splitting_without_a_name_is_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"splits text in a way.*llama-bpe"):
        as_gguf(tokenizer, tmp_path)


TEXTS = ["Hello, world! It's 12 o'clock.", "two  spaces\nand a line", "Größe 漢字 🚀", "yes</s>", "<|im_end|>"]


@pytest.mark.skipif(
    TorchVersion(transformers.__version__) < "5.23", reason="5.17 ends texts with the token that begins them, say"
)
@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_transformers_reads_the_same_tokenizer_back(make, tmp_path):
    tokenizer = make(CHATML)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    base = write_chat_base("llama", tmp_path / "base", vocab_size=len(tokenizer) + 5)
    artifact = artifact_of(write_adapter(tmp_path / "adapter", base))
    gguf_of(artifact, base, tmp_path / "model.gguf", tokenizer=tmp_path / "tokenizer")
    found = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in TEXTS:
        assert found(text).input_ids == tokenizer(text).input_ids, text
    assert found.chat_template == CHATML
    assert (found.bos_token, found.eos_token) == (tokenizer.bos_token, tokenizer.eos_token)


def test_what_is_said_of_tokens(tmp_path):
    tokenizer = sentencepiece()
    tokenizer.add_tokens(["<thought>"])
    found = as_gguf(tokenizer, tmp_path, more_rows=2)
    kinds = dict(zip(found.tokens, found.types, strict=True))
    assert kinds["<0x0A>"] == BYTE and kinds["</s>"] == CONTROL and kinds["<thought>"] == USER_DEFINED
    assert found.types[-2:] == [UNUSED, UNUSED]
    assert found.model == "llama" and found.add_space_prefix and found.add_bos and not found.add_eos
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    scores = dict(zip(found.tokens, found.scores, strict=True))
    assert scores["".join(merges[0])] > scores["".join(merges[1])] > scores["".join(merges[-1])]


def test_an_end_of_turn_beside_the_end_of_text_is_named(tmp_path):
    tokenizer = byte_level()
    turn = tokenizer.convert_tokens_to_ids("</s>")
    ends = {"eos_token_id": [tokenizer.eos_token_id, turn]}
    (tmp_path / "generation_config.json").write_text(json.dumps(ends), encoding="utf-8")
    found = as_gguf(tokenizer, tmp_path)
    assert (found.special["eos"], found.special["eot"]) == (tokenizer.eos_token_id, turn)


# ---------------------------------------------------------------------------------------------------- what is refused


def test_a_family_that_is_not_known_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"'bloom' is not among the families that it knows \(llama, mistral, .*gpt2"
    ) as e:
        refuse_unwritable(tiny_config("bloom"))
    assert len(e.value.lines) == 1


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("gemma2", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar is 100"),
        ("gemma3_text", {"layer_types": ["full_attention", "full_attention"]}, "every 6th layer"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(family, changes, said):
    with pytest.raises(UserError, match=said):
        find_family(tiny_config(family, **changes))


def test_a_rotary_embedding_without_counterpart_is_refused(tmp_path):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    base, artifact = base_and_artifact(tmp_path, rope_parameters=rope)
    with pytest.raises(UserError, match="rope_type 'dynamic'"):
        gguf_of(artifact, base, tmp_path / "model.gguf")


def test_without_the_package_a_line_says_how_to_get_it(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else found(name))
    with pytest.raises(UserError, match=r"pip install 'qlora-tool\[gguf\]'"):
        refuse_unwritable(tiny_config("llama"))


def test_values_beyond_f16_are_named(tmp_path):
    base = write_chat_base("llama", tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 5] = -1e5
    model.save_pretrained(base)
    artifact = artifact_of(write_adapter(tmp_path / "adapter", base))
    with pytest.raises(UserError, match=r"65504 in token_embd.weight \(up to 1e\+05\); choose bf16"):
        gguf_of(artifact, base, tmp_path / "model.gguf")
    gguf_of(artifact, base, tmp_path / "model.gguf", "bf16")
    with pytest.raises(UserError, match=r"q4_0: values beyond float16's 65504 in token_embd.weight"):
        gguf_of(artifact, base, tmp_path / "model.gguf", "q4_0")


@pytest.mark.parametrize("gguf_type", ["f16", "bf16", "q8_0", "iq4_nl"])
def test_what_is_no_number_is_in_no_file(gguf_type, tmp_path):
    base = write_chat_base("llama", tmp_path / "base")
    artifact = artifact_of(write_adapter(tmp_path / "adapter", base))
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.lm_head.weight[3, 5] = float("nan")
        model.model.layers[1].mlp.gate_proj.weight[0, 7] = float("-inf")
    model.save_pretrained(base)
    with pytest.raises(UserError, match=r"(lm_head|layers.1.mlp.gate_proj).weight: 1 of its .* no finite number"):
        gguf_of(artifact, base, tmp_path / "model.gguf", gguf_type)


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path):
    base, artifact = base_and_artifact(tmp_path, vocab_size=300)
    with pytest.raises(UserError, match=r"has \d+ tokens, the model's embeddings 300 rows"):
        gguf_of(artifact, base, tmp_path / "model.gguf")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no tokenizer"):
        gguf_of(artifact, base, tmp_path / "model.gguf", tokenizer=tmp_path / "empty")


# ------------------------------------------------------------------------------------------------------------ settings


def test_llama_3_factors_are_transformers_own():
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    config = tiny_config("llama", rope_parameters=rope, head_dim=128, max_position_embeddings=131072)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(torch.arange(0, 128, 2).double() / 128)
    torch.testing.assert_close(rope_tensors(config)["rope_freqs.weight"].double(), plain / frequencies.double(),
                               rtol=1e-5, atol=0)  # fmt: skip


def test_settings_of_a_long_phi(tmp_path):
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
            "original_max_position_embeddings": 32}  # fmt: skip
    base, artifact = base_and_artifact(tmp_path, "phi3", rope_parameters=rope, original_max_position_embeddings=32)
    file, _ = gguf_of(artifact, base, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(file)
    tensors = {tensor.name: tensor.data.tolist() for tensor in reader.tensors}
    assert tensors["rope_factors_long.weight"] == [2.0] * 8
    factor = reader.fields["phi3.rope.scaling.attn_factor"].contents()
    assert factor == pytest.approx(math.sqrt(1 + math.log(128 / 32) / math.log(32)))
