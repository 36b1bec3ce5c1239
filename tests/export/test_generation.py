"""An export stops where answers end as they were trained: by plain transformers, PEFT, llama.cpp and Ollama."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_adapters import artifact_of, write_adapter, write_chat_base
from tokenizers_for_tests import CHATML, byte_level
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qlora_tool.errors import UserError
from qlora_tool.export.options import ExportOptions
from qlora_tool.export.write import export_merged

SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05}
END, TURN = "<|endoftext|>", "<|im_end|>"


def base_ending_otherwise(folder: Path, settings: dict | None = None) -> Path:
    """As base models have it: everything names the end of text, and the chat template ends turns with another token."""
    write_chat_base("llama", folder)
    tokenizer = byte_level(CHATML)
    tokenizer.eos_token = END
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": tokenizer.eos_token_id}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink()
    if settings is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.eos_token_id} | settings))
    return folder


def exported(base: Path, folder: Path, **options) -> Path:
    adapter = write_adapter(folder / "adapter", base)
    AutoTokenizer.from_pretrained(base).save_pretrained(adapter)
    export_merged(artifact_of(adapter), folder / "out", ExportOptions(**options))
    return folder / "out"


def ids(*tokens: str) -> list[int]:
    return byte_level().convert_tokens_to_ids(list(tokens))


@pytest.mark.parametrize("form", ["safetensors", "nf4"])
def test_every_end_is_named_and_sampling_stays(form: str, tmp_path: Path):
    out = exported(base_ending_otherwise(tmp_path / "base", SAMPLING), tmp_path, format=form)
    found = json.loads((out / "generation_config.json").read_text())
    assert found == SAMPLING | {"eos_token_id": ids(END, TURN)}


def test_plain_transformers_stops(tmp_path: Path):
    """A model that says the end of turn now and then, with what lies in the folder alone."""
    out = exported(base_ending_otherwise(tmp_path / "base"), tmp_path, dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        model.get_output_embeddings().weight[ids(TURN)[0]] *= 4
    prompts = AutoTokenizer.from_pretrained(out)(["List", "Who?", "how many"], add_special_tokens=False)
    ended = 0
    for prompt in prompts.input_ids:
        answer = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt) :].tolist()
        settings = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": 409, "pad_token_id": 0}
        free = model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()
        stop = free.index(ids(TURN)[0]) + 1 if ids(TURN)[0] in free else len(free)
        assert answer == free[:stop]
        ended += stop < len(free)
    assert ended


def test_what_names_them_all_is_copied_byte_for_byte(tmp_path: Path):
    base = write_chat_base("llama", tmp_path / "base")
    (base / "generation_config.json").write_text(f'{{"eos_token_id":\t{ids(TURN)[0]},  "temperature": 0.6}}')
    out = exported(base, tmp_path)
    assert (out / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()


def test_nothing_is_written_where_the_configuration_names_them(tmp_path: Path):
    base = write_chat_base("llama", tmp_path / "base", eos_token_id=ids(TURN)[0])
    (base / "generation_config.json").unlink()
    assert not (exported(base, tmp_path) / "generation_config.json").exists()


def test_what_the_configuration_says_stays_where_there_were_no_settings(tmp_path: Path):
    out = exported(base_ending_otherwise(tmp_path / "base"), tmp_path)
    found = GenerationConfig.from_pretrained(out)
    base = GenerationConfig.from_pretrained(tmp_path / "base", "config.json")
    assert found.eos_token_id == ids(END, TURN)
    assert (found.bos_token_id, found.pad_token_id, found.do_sample) == (base.bos_token_id, base.pad_token_id, None)


def test_an_adapters_card_sets_them(tmp_path: Path):
    out = exported(base_ending_otherwise(tmp_path / "base", SAMPLING), tmp_path, format="adapter")
    assert f"model.generation_config.eos_token_id = {ids(END, TURN)}" in (out / "README.md").read_text()
    export = json.loads((out / "export.json").read_text())
    assert export["eos_token_id"] == ids(END, TURN)
    other = exported(write_chat_base("llama", tmp_path / "ends"), tmp_path / "other", format="adapter")
    assert "eos_token_id" not in (other / "README.md").read_text()


def test_ollama_and_llama_cpp_stop(tmp_path: Path):
    gguf = pytest.importorskip("gguf")
    out = exported(base_ending_otherwise(tmp_path / "base", SAMPLING), tmp_path, format="gguf")
    lines = (out / "Modelfile").read_text().splitlines()
    assert {f'PARAMETER stop "{TURN}"', f'PARAMETER stop "{END}"'} <= set(lines)
    assert {"PARAMETER temperature 0.6", "PARAMETER top_p 0.9", "PARAMETER top_k 20",
            "PARAMETER repeat_penalty 1.05"} <= set(lines)  # fmt: skip
    fields = gguf.GGUFReader(out / "out.gguf").fields
    named = {name: int(fields[f"tokenizer.ggml.{name}_token_id"].contents()) for name in ("eos", "eot")}
    assert list(named.values()) == ids(END, TURN)
    assert fields["tokenizer.ggml.add_eos_token"].contents() is False


def test_broken_settings_are_one_line(tmp_path: Path):
    base = base_ending_otherwise(tmp_path / "base", SAMPLING)
    (base / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config.json: not JSON .*; download the model again"):
        exported(base, tmp_path)
