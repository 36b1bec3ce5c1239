"""What a folder on the command line is taken for: a run, an adapter of ours or of PEFT, an export, a plain model."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from tiny_adapters import FP32, artifact_of, write_adapter, write_chat_base, write_peft_adapter, write_run

from qlora_tool.artifacts import BaseOptions, base_folder, find_artifact
from qlora_tool.config import ModelConfig
from qlora_tool.errors import MachineError, UserError
from qlora_tool.export.options import ExportOptions
from qlora_tool.export.write import export_merged
from qlora_tool.inference.open import open_artifact


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_base("llama", tmp_path_factory.mktemp("bases") / "llama")


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    return write_run(folder, base, model={"quantization": "fp4", "double_quant": False, "keep_quantized": True})


def model_of(base: Path, **changes) -> ModelConfig:
    return ModelConfig(**({"name_or_path": str(base), **FP32} | changes))


def test_a_run_says_all_of_its_base(base: Path, run: Path):
    artifact = artifact_of(run)
    assert artifact.model == artifact.base == model_of(base, quantization="fp4", double_quant=False)
    assert artifact.run.training.max_steps == 3
    assert artifact.adapter.folder == run / "adapter"
    assert not artifact.base_named


def test_the_adapter_of_a_run_says_as_much(base: Path, run: Path):
    artifact = artifact_of(run / "adapter")
    assert artifact.model == artifact.base == model_of(base, quantization="fp4", double_quant=False)
    assert artifact.run is None


def test_options_override_what_is_said(run: Path):
    artifact = artifact_of(run, model="other", quantization="int8", double_quant=True)
    assert artifact.model == model_of(Path("other"), quantization="int8")
    assert artifact.base_named


def test_an_adapter_of_peft_needs_its_base_and_quantization(base: Path, tmp_path: Path):
    adapter = write_peft_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    with pytest.raises(UserError, match=f"{adapter}: PEFT's files do not say how the base was quantized .* --quant"):
        artifact_of(adapter)
    as_peft = {"skip_modules": "as-peft"}
    assert artifact_of(adapter, quantization="nf4").model == model_of(base, **as_peft)
    once = artifact_of(adapter, quantization="nf4", double_quant=False).model
    assert once == model_of(base, double_quant=False, **as_peft)
    assert artifact_of(adapter, quantization="none", model="elsewhere").model.name_or_path == "elsewhere"
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(UserError, match=f"{adapter}: does not say which base it was trained on; name it with --model"):
        artifact_of(adapter, quantization="nf4")


def test_a_base_that_is_itself_quantized_says_how(base: Path, tmp_path: Path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    for name, settings, expected in [
        ("nf4", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"double_quant": False}),
        ("int8", {"load_in_8bit": True}, {}),
    ]:
        model = AutoModelForCausalLM.from_pretrained(
            base, quantization_config=BitsAndBytesConfig(**settings), dtype=torch.bfloat16
        )
        model.save_pretrained(tmp_path / name)
        assert artifact_of(tmp_path / name).model == model_of(tmp_path / name, quantization=name, **expected)
        adapter = write_peft_adapter(tmp_path / f"adapter {name}", base, target_modules=["q_proj"])
        artifact = artifact_of(adapter, model=str(tmp_path / name))
        assert artifact.model == model_of(tmp_path / name, quantization=name, skip_modules="as-peft", **expected)


def test_any_other_model_is_taken_as_it_is(base: Path):
    artifact = artifact_of(base)
    assert (artifact.model, artifact.adapter, artifact.base) == (model_of(base, quantization="none"), None, None)
    assert artifact_of(base, quantization="nf4").model == model_of(base)
    assert find_artifact("owner/name", BaseOptions()).model.name_or_path == "owner/name"


def test_an_export_knows_what_it_was_made_from(base: Path, run: Path, tmp_path: Path):
    export_merged(artifact_of(run), tmp_path / "merged", ExportOptions())
    artifact = artifact_of(tmp_path / "merged", quantization="int8")
    assert artifact.model == model_of(tmp_path / "merged", quantization="int8")
    assert artifact.base == model_of(base, quantization="fp4", double_quant=False)
    (tmp_path / "merged" / "qlora_tool.json").write_text("{")
    assert artifact_of(tmp_path / "merged").base is None


def test_an_unfinished_run_says_how_to_finish_it(run: Path, tmp_path: Path):
    unfinished = tmp_path / "run"
    shutil.copytree(run, unfinished)
    shutil.rmtree(unfinished / "adapter")
    with pytest.raises(
        UserError, match=rf"{unfinished}: this run is not finished; .* train {unfinished}/config\.yaml`"
    ):
        artifact_of(unfinished)


@pytest.mark.parametrize(("line", "other", "key"), [
    ("  quantization: fp4", "  quantization: nf4", "model.quantization: 'nf4', but .* with 'fp4'"),
    ("  double_quant: false", "  double_quant: true", "model.double_quant: True, but .* with False"),
    ("  embeddings: as_stored", "  embeddings: int8", "model.embeddings: 'int8', but .* with 'as_stored'"),
    ("  skip_modules: []", "  skip_modules: [q_proj]", r"model.skip_modules: \['q_proj'\], but .* with \[\]"),
    ("  method: lora", "  method: dora", "adapter.method: 'dora', but .* with 'lora'"),
    ("  chat_template_kwargs: {}", "  chat_template_kwargs: {thinking: true}", "data.chat_template_kwargs: {'think"),
])  # fmt: skip
def test_a_run_whose_configuration_is_no_longer_its_adapters_is_refused(run: Path, tmp_path: Path, line, other, key):
    changed = tmp_path / "run"
    shutil.copytree(run, changed)
    text = (changed / "config.yaml").read_text()
    assert text.count(f"{line}\n") == 1, text
    (changed / "config.yaml").write_text(text.replace(f"{line}\n", f"{other}\n"))
    with pytest.raises(UserError, match=rf"{changed}/config.yaml: {key}"):
        artifact_of(changed)


def test_broken_provenance_is_named(base: Path, tmp_path: Path):
    adapter = write_adapter(tmp_path / "adapter", base)
    (adapter / "qlora_tool.json").write_text('{"quantization": "nf4"}')
    with pytest.raises(UserError, match=rf"{adapter}/qlora_tool\.json: does not name the base and its quantization"):
        artifact_of(adapter)


def test_a_missing_base_is_told_with_the_adapter_that_needs_it(base: Path, tmp_path: Path):
    adapter = write_adapter(tmp_path / "adapter", base)
    for name, kind in [("owner/name", MachineError), (str(tmp_path / "gone"), UserError)]:
        artifact = artifact_of(adapter, model=name)
        for function in (base_folder, open_artifact):
            with pytest.raises(kind, match=rf"model {name}: .*; it is the base of {adapter}: say with --model BASE"):
                function(artifact)
    with pytest.raises(UserError) as failure:
        base_folder(artifact_of(tmp_path / "gone"))
    assert "--model" not in str(failure.value)


def test_another_quantization_than_the_one_trained_on_is_said(run: Path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("qlora_tool"), "propagate", True)
    find_artifact(str(run), BaseOptions(quantization="fp4"))
    assert not own_lines(caplog)
    find_artifact(str(run), BaseOptions(quantization="int8"))
    (line,) = own_lines(caplog)
    assert "--quantization int8: the adapter was trained on fp4" in line


def own_lines(caplog) -> set[str]:
    return {record.getMessage() for record in caplog.records if record.name == "qlora_tool.artifacts"}
