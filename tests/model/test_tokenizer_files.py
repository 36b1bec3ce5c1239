"""A tokenizer's files are the base's byte for byte where nothing was changed, and else changed where it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_ggufs import sentencepiece
from tokenizers_for_tests import CHATML, STRIPPING, byte_level
from transformers import AutoTokenizer

from qlora_tool.errors import UserError
from qlora_tool.model.open import open_tokenizer
from qlora_tool.model.tokenizer_files import copy_tokenizer, has_tokenizer, read_templates, save_tokenizer


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Files as publishers have them: written by hand, in no order, with keys of earlier versions."""
    folder = tmp_path / "base"
    byte_level(CHATML).save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": False, "a_key_of_ours": [1, 2]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=7))
    (folder / "special_tokens_map.json").write_text('{"eos_token":   "<|im_end|>"}')
    (folder / "vocab.json").write_text("{}")
    (folder / "README.md").write_text("not a tokenizer's")
    return folder


def test_nothing_changed_nothing_written_anew(base: Path, tmp_path: Path):
    (tmp_path / "copy").mkdir()
    save_tokenizer(AutoTokenizer.from_pretrained(base), base, tmp_path / "copy")
    expected = contents(base)
    del expected["README.md"]
    assert contents(tmp_path / "copy") == expected


@pytest.mark.parametrize("inline", [True, False])
def test_another_template_changes_the_template_alone(base: Path, tmp_path: Path, inline: bool):
    if inline:  # as before transformers 4.52
        settings = json.loads((base / "tokenizer_config.json").read_text()) | {"chat_template": CHATML}
        (base / "tokenizer_config.json").write_text(json.dumps(settings))
        (base / "chat_template.jinja").unlink()
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert tokenizer.chat_template == CHATML == read_templates(base)
    tokenizer.chat_template = STRIPPING
    (tmp_path / "copy").mkdir()
    save_tokenizer(tokenizer, base, tmp_path / "copy")
    found, expected = contents(tmp_path / "copy"), contents(base)
    changed = {"chat_template.jinja", "tokenizer_config.json"} if inline else {"chat_template.jinja"}
    assert {name for name in found if found[name] != expected.get(name)} == changed
    settings = json.loads(found["tokenizer_config.json"])
    assert settings == json.loads(expected["tokenizer_config.json"]) | ({"chat_template": STRIPPING} if inline else {})
    assert AutoTokenizer.from_pretrained(tmp_path / "copy").chat_template == STRIPPING


@pytest.mark.parametrize("inline", [True, False])
def test_several_templates(base: Path, tmp_path: Path, inline: bool):
    named = {"default": CHATML, "tool_use": STRIPPING}
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = named
    tokenizer.save_pretrained(base, save_jinja_files=not inline)
    if inline:
        (base / "chat_template.jinja").unlink()
    assert read_templates(base) == named == AutoTokenizer.from_pretrained(base).chat_template
    for folder, template in (("same", named), ("one", CHATML), ("others", {"default": STRIPPING, "tool_use": CHATML})):
        (tmp_path / folder).mkdir()
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.chat_template = template
        save_tokenizer(tokenizer, base, tmp_path / folder)
        assert AutoTokenizer.from_pretrained(tmp_path / folder).chat_template == template
    same = contents(tmp_path / "same")
    assert same == {name: data for name, data in contents(base).items() if name in same}


def test_an_adapters_copy_in_another_form_is_the_bases(base: Path, tmp_path: Path):
    """As PEFT's trainers save it: the same tokenizer, its files in the form of transformers 5."""
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "TokenizersBackend"  # which transformers 4 does not know
    (tmp_path / "out").mkdir()
    copy_tokenizer(tmp_path / "adapter", base, tmp_path / "out")
    expected = contents(base)
    del expected["README.md"]
    assert contents(tmp_path / "out") == expected


def test_what_an_adapter_changed_is_changed(base: Path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token, tokenizer.chat_template = "<|endoftext|>", STRIPPING
    tokenizer.save_pretrained(tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    copy_tokenizer(tmp_path / "adapter", base, tmp_path / "out")
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (found.pad_token, found.eos_token, found.chat_template) == ("<|endoftext|>", "<|im_end|>", STRIPPING)
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and settings["a_key_of_ours"] == [1, 2]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_added_tokens_are_the_adapters(base: Path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|more|>"]})
    tokenizer.save_pretrained(tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    copy_tokenizer(tmp_path / "adapter", base, tmp_path / "out")
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert found("<|more|>").input_ids == tokenizer("<|more|>").input_ids
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    # In keys that transformers 4 knows too: there `extra_special_tokens` is a mapping, and no such class.
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and "backend" not in settings
    assert "<|more|>" in settings["additional_special_tokens"] and "extra_special_tokens" not in settings


def test_a_tokenizer_without_settings_gets_some(tmp_path: Path):
    (tmp_path / "bare").mkdir()
    sentencepiece().backend_tokenizer.save(str(tmp_path / "bare" / "tokenizer.json"))
    (tmp_path / "copy").mkdir()
    save_tokenizer(sentencepiece(CHATML), tmp_path / "bare", tmp_path / "copy")
    found = AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert found.chat_template == CHATML and found("a b").input_ids == sentencepiece()("a b").input_ids
    settings = json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_broken_settings_are_one_line(tmp_path: Path):
    for text, said in (("[1]", "a list, where a JSON object is expected"), ("{", "not JSON")):
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.raises(UserError, match=rf"tokenizer_config.json: {said}.*; download the model again"):
            read_templates(tmp_path)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "no tokenizer in it"),
        ({"tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast"}'}, "no tokenizer in it"),
        ({"tokenizer.model": "\0junk", "tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer"}'},
         "pip install sentencepiece"),
        ({"spiece.model": "\0junk", "tokenizer_config.json": '{"tokenizer_class": "T5Tokenizer"}'},
         "pip install sentencepiece"),
        ({"tokenizer.json": "{", "tokenizer_config.json": "{}"}, "its tokenizer cannot be read: "),
        ({"tokenizer.json": '{"version": "1.0"}', "tokenizer_config.json": "{}"}, "its tokenizer cannot be read: "),
        ({"tokenizer.py": "", "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["tokenizer.Own", null]}}'},
         "set model.trust_remote_code: true"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_cannot_be_read_is_one_line_with_what_mends_it(files, said, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("qlora_tool.model.open.find_spec", lambda name: None)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as raised:
        open_tokenizer(tmp_path)
    (line,) = raised.value.lines
    assert line.startswith(str(tmp_path)) and said in line and "\n" not in line


def test_a_link_to_nothing_is_refused_rather_than_passed_over(tmp_path):
    """Another folder's tokenizer would be taken without a word."""
    byte_level(CHATML).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert not has_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").symlink_to("nowhere")
    assert has_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"tokenizer_config\.json: cannot be read: No such file"):
        open_tokenizer(tmp_path)
