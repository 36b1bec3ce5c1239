"""Full fine-tuning: the steps of transformers and torch's AdamW, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_adapters import artifact_of
from tiny_models import read_by_transformers, read_tiny, write_tiny
from tiny_runs import run_config, write_rows
from tokenizers_for_tests import CHATML, byte_level

from qlora_tool.adapters.attach import attach
from qlora_tool.adapters.attach_stored import attach_stored
from qlora_tool.adapters.peft_reading import read_adapter
from qlora_tool.build.setup import Setup
from qlora_tool.cli import main
from qlora_tool.config import AdapterConfig
from qlora_tool.data.batches import collate
from qlora_tool.errors import UserError
from qlora_tool.export.options import ExportOptions
from qlora_tool.export.write import export_merged
from qlora_tool.training.loop import train
from qlora_tool.training.optimizers import Optimizer
from qlora_tool.training.prepare import prepare_data
from qlora_tool.training.step import StepSettings, train_step

STEPS, ROWS, RATE, DECAY = 6, 4, 1e-3, 0.01
FULL = {"adapter.method": "full", "adapter.r": 16, "adapter.lora_dropout": 0.0, "model.quantization": "none"}


def base(family: str, folder: Path) -> Path:
    tokenizer = byte_level(CHATML)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 256, "n_positions": 256}
    write_tiny(family, folder, **sizes)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
def test_training_as_transformers_trains(tmp_path: Path, family: str):
    folder, rows = base(family, tmp_path / "base"), write_rows(tmp_path / "rows.jsonl", STEPS * ROWS)
    data, setup = prepare_data(Setup.of(run_config(folder, rows, tmp_path / "run", FULL)))
    built = setup.build()
    theirs = read_by_transformers(folder).train()
    for dropout in (module for module in theirs.modules() if isinstance(module, torch.nn.Dropout)):
        dropout.p = 0.0
    for dropout in (module for module in built.model.module.modules() if isinstance(module, torch.nn.Dropout)):
        dropout.p = 0.0
    assert sum(p.numel() for p in built.adapters.parameters()) == sum(p.numel() for p in theirs.parameters())
    optimizer = Optimizer("adamw", built.adapters.parameters(), DECAY)
    their_optimizer = torch.optim.AdamW(theirs.parameters(), lr=RATE, weight_decay=DECAY)
    for step in range(STEPS):
        examples = data.train.examples[step * ROWS : (step + 1) * ROWS]
        batch = collate([[example] for example in examples], pad_token_id=0, packing=False)
        loss = float(train_step(built.model, optimizer, [batch], StepSettings(max_grad_norm=0), RATE).loss)
        their_loss = theirs(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        their_loss.backward()
        their_optimizer.step()
        their_optimizer.zero_grad()
        # As in tests/training/test_against_peft.py: AdamW divides by the gradient's size.
        assert loss == pytest.approx(float(their_loss.detach()), rel=1e-5 if step == 0 else 1e-3), f"step {step}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder, in a folder with its base and rows."""
    place = tmp_path_factory.mktemp("full")
    rows = write_rows(place / "rows.jsonl", 8)
    train(run_config(base("llama-tied", place / "base"), rows, place / "run", FULL | {"training.max_steps": 3}))
    return place / "run"


def test_the_export_is_the_trained_weights(run: Path, tmp_path: Path):
    export_merged(artifact_of(run), tmp_path / "model", ExportOptions(dtype="float32", verify=False))
    trained, written = load_file(run / "adapter" / "adapter_model.safetensors"), load_file(
        tmp_path / "model" / "model.safetensors"
    )
    before = load_file(run.parent / "base" / "model.safetensors")
    assert written.keys() == before.keys()
    for name, tensor in written.items():
        assert torch.equal(tensor, trained[f"base_model.model.{name}"])
        assert not torch.equal(tensor, before[name])


def test_there_is_no_update_to_inspect(run: Path):
    result = CliRunner().invoke(main, ["inspect", str(run)])
    assert result.exit_code == 2
    assert "full has no update beside the weights" in result.output


@pytest.mark.parametrize("form", ["adapter", "adapter-portable", "gguf-adapter"])
def test_there_is_no_adapter_to_export(run: Path, tmp_path: Path, form: str):
    with pytest.raises(UserError, match=r"there is no adapter; choose --format (safetensors|gguf)"):
        export_merged(artifact_of(run), tmp_path / "adapter", ExportOptions(format=form, verify=False))
    assert not (tmp_path / "adapter").exists()


def test_another_run_goes_on_from_it(run: Path, tmp_path: Path):
    values = FULL | {"adapter.init_from": str(run / "adapter"), "training.max_steps": 1}
    values = {key: value for key, value in values.items() if key not in ("adapter.method", "adapter.r")}
    config = run_config(run.parent / "base", run.parent / "rows.jsonl", tmp_path / "run", values | {"adapter.r": 16})
    train(config)
    before, after = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run, tmp_path / "run"))
    assert before.keys() == after.keys()
    assert all(0 < float((after[name] - before[name]).abs().max()) < 0.05 for name in before)


def test_a_file_without_one_of_the_weights_is_refused(run: Path, tmp_path: Path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((run / "adapter" / name).read_bytes())
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.model.norm.weight"]
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"has no model\.norm\.weight"):
        attach_stored(read_tiny(run.parent / "base"), read_adapter(tmp_path))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"adapter": {"method": "full"}}, "set model.quantization: none"),
        ({"adapter": {"method": "full", "r": 8}, "model": {"quantization": "none"}}, "adapter.r: 8"),
        ({"adapter": {"method": "full"}, "model": {"quantization": "none", "embeddings": "int8"}}, "model.embeddings"),
        ({"adapter": {"method": "full", "modules_to_save": ["norm"]}, "model": {"quantization": "none"}},
         "adapter.modules_to_save"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_it_is_one_line(run: Path, tmp_path: Path, settings: dict, said: str):
    settings.setdefault("model", {})["name_or_path"] = str(run.parent / "base")
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(settings | {"data": {"train": str(run.parent / "rows.jsonl")}}))
    result = CliRunner().invoke(main, ["train", str(file), "--output-dir", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert said in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_experts_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"adapter\.method: full: \S*experts holds experts.*choose another"):
        attach(read_tiny(write_tiny("mixtral", tmp_path / "base")), AdapterConfig(method="full"), torch.float32, seed=0)


def test_a_base_that_is_stored_quantized_is_refused(tmp_path: Path):
    model = read_tiny(write_tiny("llama", tmp_path / "base"), "nf4")
    with pytest.raises(UserError, match=r"quantized in its files, such as model\.layers\.0.*16 bits"):
        attach(model, AdapterConfig(method="full"), torch.float32, seed=0)
