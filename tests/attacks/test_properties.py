"""What holds for every input, tried on made-up ones: a fault is a line, and what is written is read again as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import CHATML, byte_level

from qlora_tool.adapters.peft_names import check_config, check_provenance
from qlora_tool.config import DataConfig, config_to_yaml, load_config
from qlora_tool.config.patterns import check_pattern
from qlora_tool.config.yaml_file import parse
from qlora_tool.data.batches import plan_epoch
from qlora_tool.data.tokenize import build_dataset
from qlora_tool.errors import UserError, printable
from qlora_tool.files.reading import is_inside, parse_json
from qlora_tool.files.tensors import TensorSpec, encoded_header, read_all, read_header, write_all
from qlora_tool.model.config_file import read_config_file

few = settings(max_examples=40, derandomize=True, deadline=None, database=None,
               suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip
KEYS = ("model.quantization", "model.skip_modules", "adapter.r", "adapter.lora_alpha", "adapter.target_modules",
        "adapter.rank_pattern", "data.max_length", "data.eval", "data.columns", "training.learning_rate",
        "training.warmup_steps", "training.max_memory", "training.seed", "training.report_to")  # fmt: skip
texts = st.text(st.characters(codec="utf-8"), max_size=12)
numbers = st.integers() | st.floats() | st.booleans() | st.none()
values = st.recursive(numbers | texts, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner,
    max_size=3),
                      max_leaves=6)  # fmt: skip
anything = st.text(max_size=20)  # halves of characters too


class TestConfiguration:
    @few
    @given(st.sampled_from(KEYS), values)
    def test_any_value_is_taken_and_written_or_refused_in_a_line(self, key, value):
        try:
            config = load_config({}, {key: value})
        except UserError as error:
            assert all(key in line for line in error.lines)
            return
        again = load_config(yaml.safe_load(config_to_yaml(config)))
        assert again == config

    @few
    @given(st.text("abc:*&[]{}-!,'\"\n \t#0123456789.eE_<", max_size=40))
    def test_any_text_is_yaml_or_a_fault_of_yaml(self, text):
        try:
            found, _ = parse(text)
        except yaml.YAMLError:
            return
        try:
            assert repr(found) == repr(yaml.safe_load(text))
        except (ValueError, TypeError):  # words that YAML itself stumbles over are refused before
            pytest.fail("read what the library cannot")

    @few
    @given(st.text("ab.*+?()[]|\\d{2}", max_size=14))
    def test_patterns_that_are_taken_come_to_an_end(self, pattern):
        import re

        try:
            check_pattern(pattern)
        except ValueError:
            return
        re.fullmatch(pattern, "model.layers.0.self_attn.q_proj")


class TestFiles:
    @few
    @given(anything)
    def test_what_is_shown_holds_nothing_that_acts(self, text):
        shown = printable(text)
        shown.encode()
        assert all(letter.isprintable() or letter in "\n\t" or ord(letter) > 0x9F for letter in shown)

    @few
    @given(anything)
    def test_names_inside_stay_inside(self, tmp_path: Path, name):
        if is_inside(name):
            found = Path(f"{tmp_path}/model", name)
            assert (tmp_path / "model") in found.parents and ".." not in found.parts

    @few
    @given(anything)
    def test_any_text_is_json_or_refused(self, text):
        try:
            found = parse_json(text, "x", "mend it")
        except UserError:
            return
        assert json.loads(json.dumps(found)) == found or found != found

    @few
    @given(st.dictionaries(st.sampled_from(("hidden_size", "num_hidden_layers", "rms_norm_eps", "text_config",
                                            "x")), values))
    def test_numbers_of_a_model_are_within_bounds(self, tmp_path: Path, config):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
        try:
            found = read_config_file(tmp_path)
        except UserError:
            return
        assert found.get("hidden_size") is None or isinstance(found["hidden_size"], int | list)
        layers = found.get("num_hidden_layers")
        assert layers is None or isinstance(layers, list) or 1 <= layers <= 4096


class TestTensors:
    @few
    @given(st.lists(st.tuples(st.sampled_from((torch.float32, torch.bfloat16, torch.int8)),
                              st.lists(st.integers(0, 4), max_size=3)), max_size=4))  # fmt: skip
    def test_what_is_written_is_read(self, tmp_path: Path, shapes):
        tensors = {f"t{n}": torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
                   for n, (dtype, shape) in enumerate(shapes)}  # fmt: skip
        write_all(tmp_path / "a.safetensors", tensors, {"format": "pt"})
        found = read_all(tmp_path / "a.safetensors")
        assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
        assert {name: entry.shape for name, entry in read_header(tmp_path / "a.safetensors").items()} == {
            name: tuple(tensor.shape) for name, tensor in tensors.items()}  # fmt: skip

    @few
    @given(st.integers(0, 200), st.binary(min_size=1, max_size=3))
    def test_changed_bytes_of_a_header_give_a_line_or_tensors_within_the_file(self, tmp_path: Path, place, change):
        specs = [TensorSpec("a", torch.float32, (2, 2)), TensorSpec("b", torch.bfloat16, (3,))]
        whole = bytearray(encoded_header(specs, {"format": "pt"}) + bytes(22))
        place %= len(whole)
        whole[place : place + len(change)] = change
        (tmp_path / "a.safetensors").write_bytes(whole)
        try:
            entries = read_header(tmp_path / "a.safetensors")
        except UserError:
            return
        assert all(0 <= entry.start <= entry.stop <= len(whole) for entry in entries.values())


class TestAdapters:
    @few
    @given(st.dictionaries(st.sampled_from(("r", "lora_alpha", "target_modules", "rank_pattern", "bias", "revision",
                                            "layers_to_transform", "trainable_token_indices")), values))  # fmt: skip
    def test_settings_are_taken_or_refused_in_lines(self, config):
        try:
            check_config(Path("adapter_config.json"), config)
        except UserError as error:
            assert all(line.startswith("adapter_config.json: ") for line in error.lines)
            return
        assert config.get("r", 1) >= 1

    @few
    @given(st.dictionaries(st.sampled_from(("base", "quantization", "double_quant", "start", "skip_modules")), values))
    def test_provenance_is_taken_or_refused_in_lines(self, provenance):
        try:
            check_provenance(Path("qlora_tool.json"), provenance)
        except UserError as error:
            assert all(line.startswith("qlora_tool.json: ") for line in error.lines)


class TestData:
    TOKENIZER = byte_level(CHATML)

    @few
    @given(st.lists(st.dictionaries(st.sampled_from(("prompt", "completion", "system")), values, max_size=3),
                    min_size=1,
                    max_size=4))  # fmt: skip
    def test_rows_become_examples_or_lines(self, tmp_path: Path, rows):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        try:
            found = build_dataset(str(file), DataConfig(max_length=64), self.TOKENIZER)
        except UserError as error:
            assert error.lines
            return
        for example in found:
            assert len(example.input_ids) == len(example.labels) <= 64
            assert any(label != -100 for label in example.labels)

    @few
    @given(st.binary(max_size=60), st.sampled_from((".jsonl", ".json", ".csv", ".tsv", ".txt", ".jsonl.gz",
                                                    ".parquet")))
    def test_any_bytes_become_examples_or_lines(self, tmp_path: Path, content, ending):
        file = tmp_path / f"rows{ending}"
        file.write_bytes(content)
        try:
            build_dataset(str(file), DataConfig(max_length=64), self.TOKENIZER)
        except UserError as error:
            assert error.lines


class TestPacking:
    @few
    @given(st.lists(st.integers(1, 64), min_size=1, max_size=40), st.integers(1, 4), st.booleans(), st.integers(0, 5))
    def test_every_example_comes_once_and_no_row_is_too_long(self, lengths, rows, shuffle, seed):
        batches = plan_epoch(lengths, batch_size=rows, max_length=64, packing=True, shuffle=shuffle, seed=seed, epoch=0)
        assert sorted(index for batch in batches for row in batch for index in row) == list(range(len(lengths)))
        assert all(sum(lengths[index] for index in row) <= 64 for batch in batches for row in batch)
