"""What is trained is what `tokenizer.json` says, whatever class `tokenizer_config.json` names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_ggufs import sentencepiece
from tokenizers import Tokenizer
from tokenizers_for_tests import CHATML, byte_level, metaspace

from qlora_tool.errors import UserError
from qlora_tool.model.open import open_tokenizer
from qlora_tool.model.tokenizer_check import check_on, read_as_written

TEXTS = [
    "<|im_start|>user\nWhat is number 3 plus 3?<|im_end|>\n", "  two  spaces\r\n\tand 1234 digits", "żółw café 漢字 🚀",
    "if x:\n    return x</s> and </s>\nmore",
]  # fmt: skip


def written(folder: Path, text: str) -> list[int]:
    """The ids by the file alone."""
    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids


def saved(tokenizer, folder: Path, **settings) -> Path:
    """A tokenizer's folder whose settings say something else too."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    found = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))
    return folder


@pytest.mark.parametrize("named", ["LlamaTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer", "GemmaTokenizerFast"])
@pytest.mark.parametrize("make", [byte_level, sentencepiece, metaspace])
def test_the_ids_are_those_of_the_file(make, named: str, tmp_path: Path):
    """transformers builds such a class from the vocabulary alone, with a way of splitting of the class's own."""
    folder = saved(make(CHATML), tmp_path, tokenizer_class=named, backend=None)
    tokenizer = open_tokenizer(folder)
    assert [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS] == [
        written(folder, text) for text in TEXTS
    ]
    assert tokenizer.chat_template == CHATML
    assert (tokenizer.bos_token, tokenizer.eos_token) == (make().bos_token, make().eos_token)


def test_a_class_that_reads_otherwise_is_told_once(tmp_path: Path, caplog):
    folder = saved(sentencepiece(), tmp_path, tokenizer_class="LlamaTokenizer", backend=None)
    open_tokenizer(folder)
    open_tokenizer(folder)
    (line,) = caplog.messages
    assert line.startswith(f"{folder}: transformers ") and "\n" not in line
    assert "otherwise than tokenizer.json says" in line and "names LlamaTokenizer; taken as tokenizer.json says" in line


def test_nothing_is_told_where_they_agree(tmp_path: Path, caplog):
    for number, make in enumerate((byte_level, sentencepiece, metaspace)):
        open_tokenizer(saved(make(CHATML), tmp_path / str(number)))
    assert not caplog.messages


def test_special_tokens_that_are_split_are_told(tmp_path: Path, caplog):
    folder = saved(byte_level(CHATML), tmp_path, split_special_tokens=True)
    tokenizer = open_tokenizer(folder)
    (line,) = caplog.messages
    assert line.startswith(f"{folder}: its tokenizer_config.json has split_special_tokens: true")
    assert len(tokenizer("<|im_end|>", add_special_tokens=False).input_ids) > 1  # what is told is so


def test_the_end_that_only_the_class_names_stays(tmp_path: Path):
    folder = saved(sentencepiece(), tmp_path, tokenizer_class="LlamaTokenizer", backend=None, eos_token=None)
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    assert open_tokenizer(folder).eos_token == "</s>"


def test_tokens_that_the_settings_add_are_no_difference(tmp_path: Path, caplog):
    added = {"605": {"content": "<|tool|>", "special": True, "normalized": False, "lstrip": False, "rstrip": False,
                     "single_word": False}}  # fmt: skip
    folder = saved(byte_level(CHATML), tmp_path, added_tokens_decoder=added)
    tokenizer = open_tokenizer(folder)
    assert len(tokenizer("<|tool|>", add_special_tokens=False).input_ids) == 1 and not caplog.messages


def test_a_file_that_nothing_reads_as_it_is_written_is_refused(tmp_path: Path, monkeypatch):
    folder = saved(byte_level(CHATML), tmp_path)
    state = json.loads((folder / "tokenizer.json").read_text()) | {"normalizer": {"type": "Lowercase"}}
    (folder / "tokenizer.json").write_text(json.dumps(state))
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.from_pretrained", lambda folder: byte_level(CHATML))
    with pytest.raises(UserError, match=r"otherwise than tokenizer.json says \(.*; take out of tokenizer_config.json"):
        read_as_written(byte_level(CHATML), folder)


def test_the_data_are_looked_at_too(tmp_path: Path):
    """A text of the data that is read otherwise, though no text of ours is."""
    folder = saved(byte_level(CHATML), tmp_path)
    tokenizer = open_tokenizer(folder)
    check_on(tokenizer, folder, TEXTS)
    state = json.loads((folder / "tokenizer.json").read_text())
    state["normalizer"] = {"type": "Replace", "pattern": {"String": "Paris"}, "content": "London"}
    (folder / "tokenizer.json").write_text(json.dumps(state))
    check_on(tokenizer, folder, TEXTS)
    with pytest.raises(UserError, match=r"reads 'in Paris' of the data otherwise than tokenizer.json says"):
        check_on(tokenizer, folder, [*TEXTS, "in Paris"])
