"""The folder that an export leaves: what lies in it, who can read it, and what stays when something fails."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_adapters import (
    FP32,
    artifact_of,
    live_logits,
    plain_logits,
    write_adapter,
    write_chat_base,
    write_peft_adapter,
    write_run,
)
from tiny_models import write_tiny

from qlora_tool.artifacts import BaseOptions, find_artifact
from qlora_tool.errors import MachineError, UserError
from qlora_tool.export import preflight, staging, write
from qlora_tool.export.merge import MergedModel
from qlora_tool.export.options import ExportOptions
from qlora_tool.export.write import export_merged
from qlora_tool.sizes import file_size


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_base("llama", tmp_path_factory.mktemp("bases") / "llama", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", base)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", base)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1.5e-5 * float(expected.abs().max()))  # see test_merge


def test_a_run_becomes_a_model_folder(base: Path, run: Path, tmp_path: Path):
    result = export_merged(artifact_of(run), tmp_path / "merged", ExportOptions())
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    expected = load_file(base / "model.safetensors")
    assert {name: (t.dtype, t.shape) for name, t in tensors.items()} == {
        name: (t.dtype, t.shape) for name, t in expected.items()
    }
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config == json.loads((base / "config.json").read_text()) | {"dtype": "float32"}
    assert not {"quantization_config", "torch_dtype"} & config.keys()
    sizes = sum(tensor.nbytes for tensor in tensors.values())
    assert result.facts.pop("seconds") < 600
    assert result.proof is None
    assert result.facts == {
        "output_dir": str(tmp_path / "merged"), "format": "safetensors", "dtype": "float32", "base": "dequantized",
        "dtype_reason": "the base's own", "files": ["model.safetensors"], "bytes": sizes,
        "verification": {"left_out": "not asked for"},
    }  # fmt: skip
    assert_close(plain_logits(tmp_path / "merged"), live_logits(artifact_of(run)))


def test_tokenizer_template_and_generation_settings_come_along(base: Path, run: Path, tmp_path: Path):
    from transformers import AutoTokenizer, GenerationConfig

    merged = tmp_path / "merged"
    (tmp_path / "base").mkdir()
    shutil.copytree(base, tmp_path / "base", dirs_exist_ok=True)
    (tmp_path / "base" / "LICENSE").write_text("free\n")
    export_merged(artifact_of(run, model=str(tmp_path / "base")), merged, ExportOptions())
    tokenizer, original = (AutoTokenizer.from_pretrained(folder) for folder in (merged, base))
    assert tokenizer.get_vocab() == original.get_vocab()
    assert tokenizer.chat_template == original.chat_template
    assert GenerationConfig.from_pretrained(merged).eos_token_id == original.eos_token_id
    assert (merged / "LICENSE").read_text() == "free\n"
    provenance = json.loads((merged / "qlora_tool.json").read_text())
    assert provenance["merged"] == {"base": "dequantized", "dtype": "float32"}
    assert provenance["base"]["name_or_path"] == str(tmp_path / "base")  # where it was in fact


def test_pipeline_answers_a_chat(run: Path, tmp_path: Path):
    from transformers import pipeline

    export_merged(artifact_of(run), tmp_path / "merged", ExportOptions())
    chat = [{"role": "user", "content": "What is 1 and 1?"}]
    answer = pipeline("text-generation", model=str(tmp_path / "merged"), device="cpu")(chat, max_new_tokens=5)
    assert answer[0]["generated_text"][-1]["role"] == "assistant"
    assert answer[0]["generated_text"][-1]["content"]


def test_the_tokenizer_is_the_bases_where_the_adapter_has_none(base: Path, adapter: Path, tmp_path: Path):
    export_merged(artifact_of(adapter), tmp_path / "merged", ExportOptions())
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_several_shards_and_their_index(adapter: Path, tmp_path: Path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    export_merged(artifact_of(adapter), whole, ExportOptions())
    result = export_merged(artifact_of(adapter), cut, ExportOptions(max_shard_size=50_000))
    expected = load_file(whole / "model.safetensors")
    index = json.loads((cut / "model.safetensors.index.json").read_text())
    assert len(result.files) > 2
    assert list(result.files) == sorted(path.name for path in cut.glob("*.safetensors"))
    assert result.files[0] == f"model-00001-of-{len(result.files):05d}.safetensors"
    assert index["metadata"]["total_size"] == result.bytes == sum(t.nbytes for t in expected.values())
    found = {}
    for name in result.files:
        tensors = load_file(cut / name)
        assert sum(t.nbytes for t in tensors.values()) <= 50_000 or len(tensors) == 1
        assert {index["weight_map"][key] for key in tensors} == {name}
        found |= tensors
    assert found.keys() == expected.keys() == index["weight_map"].keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    assert torch.equal(plain_logits(cut), plain_logits(whole))


def test_exporting_twice_gives_the_same_bytes(run: Path, tmp_path: Path):
    export_merged(artifact_of(run), tmp_path / "merged", ExportOptions(max_shard_size=100_000))
    first = contents(tmp_path / "merged")
    export_merged(artifact_of(run), tmp_path / "merged", ExportOptions(max_shard_size=100_000, overwrite=True))
    assert contents(tmp_path / "merged") == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]


def test_a_trained_mixture_of_experts_exports_as_it_is_live(tmp_path: Path):
    """Its experts lie one by one in the files, are fused on load, quantized, and written one by one again."""
    base = write_chat_base("mixtral", tmp_path / "base")
    run = write_run(tmp_path / "run", base)
    artifact = artifact_of(run)
    export_merged(artifact, tmp_path / "merged", ExportOptions())
    assert_close(plain_logits(tmp_path / "merged"), live_logits(artifact))
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    assert {name: t.shape for name, t in before.items()} == {name: t.shape for name, t in after.items()}
    experts = [name for name in before if ".experts." in name]
    assert len(experts) == 2 * 4 * 3
    assert all(not torch.equal(before[name], after[name]) for name in experts)  # they were quantized


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
        ("gpt2", {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}),
        ("llama-tied", {"load_in_8bit": True}),
        # its output layer too
        ("llama", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["none"]}),
    ],
    ids=str,
)
def test_a_base_that_bitsandbytes_quantized(tmp_path: Path, family: str, settings: dict):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plain, base = write_tiny(family, tmp_path / "plain", dtype=torch.bfloat16), tmp_path / "base"
    quantized = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=BitsAndBytesConfig(**settings), dtype=torch.bfloat16
    )
    quantized.save_pretrained(base)
    kind = settings.get("bnb_4bit_quant_type", "int8")
    double = settings.get("bnb_4bit_use_double_quant", False)
    adapter = write_adapter(tmp_path / "adapter", base, quantization=kind, double_quant=double)
    artifact = artifact_of(adapter)
    live = live_logits(artifact)
    result = export_merged(artifact, tmp_path / "merged", ExportOptions(dtype="float32"))
    assert_close(plain_logits(tmp_path / "merged"), live)
    assert "quantization_config" in json.loads((base / "config.json").read_text())
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    expected = load_file(plain / "model.safetensors")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in expected.items()}
    result = export_merged(artifact, tmp_path / "auto", ExportOptions())
    assert result.dtype == "float16"
    assert {t.dtype for t in load_file(tmp_path / "auto" / "model.safetensors").values()} == {torch.float16}
    with pytest.raises(UserError, match=f"--base original: {base} is itself quantized"):
        export_merged(artifact, tmp_path / "original", ExportOptions(base="original"))
    assert not (tmp_path / "original").exists()


# ------------------------------------------------------------------------------------------------------- faults


def test_an_existing_folder_stays_as_it_is(adapter: Path, tmp_path: Path):
    output = tmp_path / "merged"
    output.mkdir()
    export_merged(artifact_of(adapter), output, ExportOptions())  # an empty one is no hindrance
    before = contents(output)
    with pytest.raises(UserError, match=f"{output}: exists; give --overwrite to replace it"):
        export_merged(artifact_of(adapter), output, ExportOptions(dtype="bfloat16"))
    assert contents(output) == before
    file = tmp_path / "a file"
    file.write_text("mine")
    with pytest.raises(UserError, match=f"{file}: a file, where --output-dir expects a folder"):
        export_merged(artifact_of(adapter), file, ExportOptions(overwrite=True))
    assert file.read_text() == "mine"


def test_a_link_goes_on_to_lead_to_the_folder(adapter: Path, tmp_path: Path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "merged").symlink_to(tmp_path / "disk")
    for dtype in ("float32", "bfloat16"):
        export_merged(artifact_of(adapter), tmp_path / "merged", ExportOptions(dtype=dtype, overwrite=True))
        assert (tmp_path / "merged").is_symlink()
        assert json.loads((tmp_path / "disk" / "config.json").read_text())["dtype"] == dtype
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    export_merged(artifact_of(adapter), Path("."), ExportOptions())
    assert (tmp_path / "empty" / "config.json").exists()


def test_overwrite_replaces_models_alone_and_never_what_is_merged(base: Path, adapter: Path, tmp_path: Path):
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "diary.txt").write_text("dear diary")
    with pytest.raises(UserError, match=f"{notes}: holds something other than an export"):
        export_merged(artifact_of(adapter), notes, ExportOptions(overwrite=True))
    with pytest.raises(UserError, match=f"{base}: holds something other than an export"):
        export_merged(artifact_of(adapter), base, ExportOptions(overwrite=True))
    base = shutil.copytree(base, tmp_path / "base")
    adapter = shutil.copytree(adapter, tmp_path / "an adapter")
    settings = json.loads((adapter / "qlora_tool.json").read_text())
    settings["base"]["name_or_path"] = str(base)
    (adapter / "qlora_tool.json").write_text(json.dumps(settings))
    (adapter / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    (base / "export.json").write_text("{}")
    with pytest.raises(UserError, match=f"{base}: holds the base, which the merge reads"):
        export_merged(artifact_of(adapter), base, ExportOptions(overwrite=True))
    outer = tmp_path / "outer"
    shutil.copytree(base, outer)
    shutil.copytree(adapter, outer / "adapter")
    (outer / "export.json").write_text("{}")
    with pytest.raises(UserError, match=f"{outer}: holds the adapter, which the merge reads"):
        export_merged(artifact_of(outer / "adapter"), outer, ExportOptions(overwrite=True))
    with pytest.raises(UserError, match=r"inner: lies in .*an adapter, which is the adapter, or the run of it"):
        export_merged(artifact_of(adapter), adapter / "inner", ExportOptions())
    assert not (adapter / "inner").exists()
    assert (notes / "diary.txt").exists()
    assert contents(outer / "adapter") == contents(adapter)


@pytest.mark.parametrize("error", [MachineError("in the middle"), KeyboardInterrupt()], ids=repr)
def test_an_interruption_leaves_the_earlier_export_and_goes_on(adapter: Path, tmp_path: Path, monkeypatch, error):
    output, options = tmp_path / "merged", ExportOptions(dtype="bfloat16", overwrite=True, max_shard_size=30_000)
    export_merged(artifact_of(adapter), tmp_path / "undisturbed", options)
    export_merged(artifact_of(adapter), output, ExportOptions())
    before, beside = contents(output), sorted(tmp_path.iterdir())
    whole, made = MergedModel.tensors, []

    def counting(self, group):
        made.append(group.names)
        if len(made) == 10 and error is not None:
            raise error
        return whole(self, group)

    monkeypatch.setattr(MergedModel, "tensors", counting)
    monkeypatch.setattr(staging, "SAVE_EVERY", 1)
    with pytest.raises(type(error)):
        export_merged(artifact_of(adapter), output, options)
    assert contents(output) == before
    assert sorted(tmp_path.iterdir()) == [tmp_path / ".merged.partial", *beside]
    stopped, error = made[-1], None
    made.clear()
    export_merged(artifact_of(adapter), output, options)
    assert made[0] == stopped  # in the middle of a shard
    assert contents(output).keys() == contents(tmp_path / "undisturbed").keys()
    for name in contents(output).keys() - {"README.md"}:  # which names the folder
        assert contents(output)[name] == contents(tmp_path / "undisturbed")[name], name
    assert sorted(tmp_path.iterdir()) == beside


@pytest.mark.parametrize("name", [
    "LICENSE", "preprocessor_config.json", "own_code.py", "README.md", "tokenizer.model.v3",
    "chat_templates/tools.jinja",
])  # fmt: skip
@pytest.mark.parametrize("kind", ["pipe", "endless", "large", "gone"])
def test_what_has_no_end_beside_the_weights_is_refused_before_anything_is_written(
    adapter: Path, base: Path, tmp_path: Path, name, kind
):  # fmt: skip
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    (folder / name).unlink(missing_ok=True)
    (folder / name).parent.mkdir(exist_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "large":
        with (folder / name).open("wb") as file:
            file.truncate(1 << 40)  # a hole: no byte of it is on the disk
    else:
        (folder / name).symlink_to("/dev/zero" if kind == "endless" else "nowhere")
    artifact = find_artifact(str(adapter), BaseOptions(model=str(folder)))
    if name == "README.md":  # of which a line is taken, where it has one
        export_merged(artifact, tmp_path / "merged", ExportOptions())
        return
    with pytest.raises(UserError, match=re.escape(str(folder / name))):
        export_merged(artifact, tmp_path / "merged", ExportOptions())
    assert {path.name for path in tmp_path.iterdir()} <= {"base", "adapter"}


def test_a_link_to_a_folder_that_is_not_there_is_refused(adapter: Path, tmp_path: Path):
    (tmp_path / "merged").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=f"{tmp_path / 'merged'}: a link to a folder that is not there; remove it"):
        export_merged(artifact_of(adapter), tmp_path / "merged", ExportOptions())
    assert {path.name for path in tmp_path.iterdir()} <= {"merged", "adapter"}


def test_a_fault_of_the_input_leaves_nothing(adapter: Path, tmp_path: Path, monkeypatch):
    before = sorted(tmp_path.iterdir())

    def failing(self, group):
        raise UserError("a broken base")

    monkeypatch.setattr(MergedModel, "tensors", failing)
    with pytest.raises(UserError, match="a broken base"):
        export_merged(artifact_of(adapter), tmp_path / "merged", ExportOptions())
    assert sorted(tmp_path.iterdir()) == before


def test_other_inputs_start_anew(adapter: Path, tmp_path: Path, monkeypatch, caplog):
    whole, made = MergedModel.tensors, []

    def failing(self, group):
        made.append(group)
        if len(made) == 20:
            raise KeyboardInterrupt
        return whole(self, group)

    with monkeypatch.context() as patch:
        patch.setattr(MergedModel, "tensors", failing)
        with pytest.raises(KeyboardInterrupt):
            export_merged(artifact_of(adapter), tmp_path / "merged", ExportOptions(max_shard_size=30_000))
    assert list((tmp_path / ".merged.partial" / "model").iterdir())
    options = ExportOptions(dtype="bfloat16", max_shard_size=30_000)
    export_merged(artifact_of(adapter), tmp_path / "merged", options)
    assert "holds the start of another export (options differs); starting anew" in caplog.text
    export_merged(artifact_of(adapter), tmp_path / "again", options)
    for file in (tmp_path / "again").glob("*.safetensors"):
        assert (tmp_path / "merged" / file.name).read_bytes() == file.read_bytes()


def test_the_kept_start_counts_against_the_space_needed(adapter: Path, tmp_path: Path, monkeypatch):
    """An export that has written most of itself needs room for the rest alone."""
    whole, made = MergedModel.tensors, []

    def failing(self, group):
        made.append(group)
        if len(made) == 15:
            raise KeyboardInterrupt
        return whole(self, group)

    options = ExportOptions(dtype="float32", max_shard_size=20_000)
    with monkeypatch.context() as patch:
        patch.setattr(MergedModel, "tensors", failing)
        with pytest.raises(KeyboardInterrupt):
            export_merged(artifact_of(adapter), tmp_path / "merged", options)
    folder = tmp_path / ".merged.partial" / "model"
    there = sum(file.stat().st_size for file in folder.iterdir())
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage(0, 0, 1000))
    with pytest.raises(MachineError, match=rf"B, {file_size(there)} of it written, and [\d.]+ \w+ are free"):
        export_merged(artifact_of(adapter), tmp_path / "merged", options)
    assert sum(file.stat().st_size for file in folder.iterdir()) == there
    total = sum(tensor.nbytes for tensor in live_tensors(adapter))
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage(0, 0, total - there))
    export_merged(artifact_of(adapter), tmp_path / "merged", options)


def live_tensors(adapter: Path) -> list[torch.Tensor]:
    base = Path(json.loads((adapter / "qlora_tool.json").read_text())["base"]["name_or_path"])
    return list(load_file(base / "model.safetensors").values())


def test_a_full_disk_is_known_before_the_first_byte(adapter: Path, tmp_path: Path, monkeypatch):
    asked = []

    def usage(path):
        asked.append(path)
        return namedtuple("Usage", "total used free")(10**12, 10**12 - 1000, 1000)

    monkeypatch.setattr(preflight.shutil, "disk_usage", usage)
    monkeypatch.setattr(write, "staged_folder", lambda *args: pytest.fail("something was written"))
    message = r"the model takes [\d.]+ [kM]B, and [\d.]+ \w+ are free there; free some, or choose another --output-dir"
    with pytest.raises(MachineError, match=message):
        export_merged(artifact_of(adapter), tmp_path / "new" / "merged", ExportOptions())
    assert asked == [tmp_path]  # the disk that the folder would lie on
    assert not (tmp_path / "new").exists()


def test_a_base_that_changed_since_is_refused(base: Path, run: Path, tmp_path: Path, caplog):
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    export_merged(artifact_of(run, model=str(moved)), tmp_path / "same bytes", ExportOptions())
    assert not caplog.records

    own = tmp_path / "own"
    shutil.copytree(base, own)
    trained = write_run(tmp_path / "run", own)
    tensors = load_file(own / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] += 1
    save_file(tensors, own / "model.safetensors", {"format": "pt"})
    message = rf"{own}: model\.safetensors not as when {trained} was trained on it .*--model"
    with pytest.raises(UserError, match=message):
        export_merged(artifact_of(trained), tmp_path / "merged", ExportOptions())
    assert not (tmp_path / "merged").exists()
    export_merged(artifact_of(trained, model=str(own)), tmp_path / "merged", ExportOptions())
    assert "merging onto it all the same" in caplog.text


def test_a_base_that_is_gone_is_named_with_its_adapter(base: Path, tmp_path: Path):
    own = tmp_path / "own"
    shutil.copytree(base, own)
    adapter = write_adapter(tmp_path / "adapter", own)
    shutil.rmtree(own)
    with pytest.raises(UserError) as failure:
        export_merged(artifact_of(adapter), tmp_path / "merged", ExportOptions())
    (line,) = failure.value.lines
    assert line.startswith(f"model {own}: no such folder")
    assert line.endswith(f"it is the base of {adapter}: say with --model BASE where it is")
    export_merged(artifact_of(adapter, model=str(base)), tmp_path / "merged", ExportOptions())


def test_a_model_without_an_adapter_is_refused(base: Path, tmp_path: Path):
    (tmp_path / "my-run").mkdir()
    message = f"{base}: a model without an adapter; expected a run's folder or an adapter's"
    with pytest.raises(UserError, match=message):
        export_merged(artifact_of(base), tmp_path / "merged", ExportOptions())
    misspelt = tmp_path / "my-rnu"
    with pytest.raises(UserError, match=rf"{misspelt}: no such folder; did you mean '.*/my-run'\?; expected a run's"):
        export_merged(artifact_of(misspelt), tmp_path / "merged", ExportOptions())


def test_an_adapter_of_peft_says_nothing_of_quantization(base: Path, tmp_path: Path):
    adapter = write_peft_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    with pytest.raises(UserError, match=f"{adapter}: PEFT's files do not say how the base was quantized"):
        find_artifact(str(adapter), BaseOptions(**FP32))
    export_merged(artifact_of(adapter, quantization="fp4"), tmp_path / "merged", ExportOptions())
    provenance = json.loads((tmp_path / "merged" / "qlora_tool.json").read_text())
    assert provenance == {
        "method": "lora", "base": {"name_or_path": str(base), "revision": None}, "quantization": "fp4",
        "double_quant": True, "embeddings": "as_stored", "skip_modules": "as-peft",
        "merged": {"base": "dequantized", "dtype": "float32"},
    }  # fmt: skip


def test_overwrite_replaces_what_an_export_wrote_and_keeps_all_else(adapter: Path, tmp_path: Path):
    output = tmp_path / "merged"
    export_merged(artifact_of(adapter), output, ExportOptions(max_shard_size=30_000))
    (output / "notes.txt").write_text("mine")
    (output / "plots").mkdir()
    (output / "plots" / "a.png").write_bytes(b"mine")
    export_merged(artifact_of(adapter), output, ExportOptions(overwrite=True))
    assert (output / "notes.txt").read_text() == "mine" and (output / "plots" / "a.png").exists()
    assert [file.name for file in output.glob("*.safetensors")] == ["model.safetensors"]
    assert not list(tmp_path.glob(".*"))
    written = json.loads((output / "export.json").read_text())["written"]
    left = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()} - {*written}
    assert left == {"notes.txt", "plots/a.png"}
