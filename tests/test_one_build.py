"""`train` and `profile-memory` build one and the same run: held against one another for every key of a configuration,
for families that pack in another way, and for those that cannot keep packed examples apart."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from key_values import EVAL, KEYS, VALUES, with_company, write_inputs
from tiny_models import write_tiny
from tiny_runs import run_config, write_model, write_rows
from tokenizers_for_tests import CHATML, byte_level
from torch import nn

from qlora_tool.adapters.attach import AdapterSet
from qlora_tool.adapters.calibration import start_tokens
from qlora_tool.config import SECTIONS, Config, with_values
from qlora_tool.config.schema import choices_of, schemas_of
from qlora_tool.data.batches import Batch, collate
from qlora_tool.data.tokenize import Example
from qlora_tool.memory import profile as profiling
from qlora_tool.memory.profile_run import profile_run
from qlora_tool.memory.run_report import RunMemory
from qlora_tool.memory.trace.predict import BatchShape, TracerWatch
from qlora_tool.model.causal_lm import CausalLM
from qlora_tool.ops.products import PYTORCH, use_products
from qlora_tool.training import loop
from qlora_tool.training.loop import Run, train
from qlora_tool.weights.handles import WeightHandle
from qlora_tool.weights.quantized import QuantizedTensor


@pytest.fixture(autouse=True, scope="module")
def own_products():
    use_products(PYTORCH)
    yield
    use_products(None)


# ----------------------------------------------------------------------------------------------------------- structure


class Loaded(BaseException):
    """Raised where the profile has loaded its model: nothing is traced after it."""


def profiled(config: Config, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], Config, BatchShape]:
    """What `profile-memory` builds, the configuration that it runs, and the batch that it assumes."""
    seen: list[Any] = []

    def predict(config, model_config, shape, *rest, predict=profiling.predict_deep, **options):
        seen.extend([config, shape])
        return predict(config, model_config, shape, *rest, **options)

    def loaded(self, model: CausalLM, adapters: AdapterSet, loaded=TracerWatch.loaded) -> None:
        if not seen:  # `gradient_checkpointing: auto` is being decided
            return loaded(self, model, adapters)
        seen.append(structure(model, adapters))
        raise Loaded

    with monkeypatch.context() as patch, pytest.raises(Loaded):
        patch.setattr(profiling, "predict_deep", predict)
        patch.setattr(TracerWatch, "loaded", loaded)
        profile_run(config, "cpu")
    return seen[2], seen[0], seen[1]


def structure(model: CausalLM, adapters: AdapterSet) -> dict[str, Any]:
    """All that a step's tensors follow from, values left out."""
    module = model.module
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return {
        "modules": {name: type(child).__name__ for name, child in module.named_modules()},
        "training": {name for name, child in module.named_modules() if child.training},
        "parameters": {name: (tuple(value.shape), value.dtype, value.requires_grad)
                       for name, value in parameters.items()},
        "tied": [[name for name, other in parameters.items() if other is value] for value in module.parameters()],
        "buffers": {name: (tuple(value.shape), value.dtype) for name, value in module.named_buffers()},
        "weights": {name: described(child) for name, child in module.named_modules()
                    if isinstance(child, WeightHandle)},
        "dropout": {name: child.p for name, child in module.named_modules() if isinstance(child, nn.Dropout)},
        "forwards": {name: described_forward(child.forward) for name, child in module.named_modules()
                     if "forward" in vars(child)},
        "adapters": {name: (layer.method.name, layer.settings, layer.shared is not None)
                     for name, layer in adapters.layers.items()},
        "trained in full": (list(adapters.saved), list(adapters.biases), adapters.transposed),
        "rates": {rate: len(found) for rate, found in adapters.rates().items()},
        "model": (model.quantization, model.compute_dtype, model.projects_plainly, model.by_segment,
                  model.pads_apart, model.chunked_loss, model.offload_boundaries),
        "recomputed": (model.recomputation, len(model.checkpointed_layers())),
    }  # fmt: skip


def described(handle: WeightHandle) -> tuple:
    stored = handle.stored()
    kind = (stored.kind, stored.double_quant) if isinstance(stored, QuantizedTensor) else None
    return kind, stored.dtype, handle.is_trained


def described_forward(forward: Callable) -> Any:
    """What stands in for a module's own pass, with the size of its tiles."""
    if isinstance(forward, functools.partial):
        return forward.func, forward.keywords
    return type(forward)


def full_rows(run: Run) -> Batch:
    """What training makes of full rows of one example each."""
    rows, length = run.training.per_device_train_batch_size, run.config.data.max_length
    ids = [3 + index % 61 for index in range(length)]
    rows = [[Example(ids, list(ids), "here")]] * rows
    return collate(rows, pad_token_id=0, packing=run.config.data.packing, padding_free=run.padding_free)


def listed(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else value


def vars_listed(value: Any) -> dict[str, Any]:
    return {name: listed(held) for name, held in vars(value).items()}


def assert_one_build(config: Config, monkeypatch: pytest.MonkeyPatch) -> Run:
    # What is recomputed is then decided by a watcher of the run.
    decides = config.training.max_memory is not None and config.training.gradient_checkpointing == "auto"
    run = train(config, dry_run=True, watcher=RunMemory() if decides else None)
    trained = structure(run.model, run.adapters)
    found, resolved, shape = profiled(config, monkeypatch)
    for part, expected in trained.items():
        assert found[part] == expected, part
    by_data = {"data.train_on": run.config.data.train_on,
               "training.num_train_epochs": run.config.training.num_train_epochs}  # fmt: skip
    assert with_values(resolved, by_data) == run.config
    batch, assumed = full_rows(run), shape.batch()
    made_of = start_tokens(run.config, repeat(run.config.data.max_length))
    assert shape == replace(BatchShape.of(batch), start_tokens=made_of)
    assert assumed.attention_mask is batch.attention_mask is None
    assert listed(assumed.position_ids) == listed(batch.position_ids)
    assert (assumed.segments is None) == (batch.segments is None)
    if batch.segments is not None:
        assert vars_listed(assumed.segments) == vars_listed(batch.segments)
    assert assumed.input_ids.shape == batch.input_ids.shape
    assert assumed.trained_tokens == batch.trained_tokens
    return run


# ----------------------------------------------------------------------------------------------------------- every key


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    (folder / EVAL).write_bytes((folder / "eval-alpaca.jsonl").read_bytes())
    write_model(folder / "other", tie_word_embeddings=True, num_hidden_layers=3)
    write_tiny("mixtral", folder / "experts", vocab_size=len(byte_level(CHATML)), max_position_embeddings=256)
    byte_level(CHATML).save_pretrained(folder / "experts")
    return folder


BASE = {
    "model.name_or_path": "base", "model.compute_dtype": "float32", "model.device": "cpu", "adapter.r": 4,
    "data.train": "alpaca.jsonl", "data.max_length": 96, "training.output_dir": "run",
}  # fmt: skip
OTHERS = {"model.name_or_path": "other", "training.output_dir": "elsewhere", "training.report_to": ["tensorboard"],
          "data.max_length": 64, "adapter.target_parameters": ["experts.down_proj"]}  # fmt: skip
# With `auto` a budget decides, by tracing: that is a test of its own.
DECIDED = {"training.max_memory": {"training.gradient_checkpointing": True},
           "adapter.target_parameters": {"model.name_or_path": "experts"}}  # fmt: skip


def changes() -> list[dict[str, Any]]:
    """One key at a time has another value than in BASE: each of its choices, or one of its numbers or texts."""
    base = with_values(Config(), BASE)
    found = []
    for key, values in VALUES.items():
        section, _, name = key.partition(".")
        usual = getattr(getattr(base, section), name)
        others = [OTHERS[key]] if key in OTHERS else [value for value in values if value != usual]
        section_keys = schemas_of(SECTIONS[section])[name]
        listed = choices_of(section_keys) is not None or key.startswith("adapter.")
        found += [with_company(key, value) | DECIDED.get(key, {}) for value in (others if listed else others[:1])]
    return found


CHANGES = changes()


def test_every_key_is_changed():
    assert {key for change in CHANGES for key in change} == set(KEYS)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_both_build_the_same(inputs: Path, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(inputs)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # `auto` is a CPU, as in the profile
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["tensorboard"])
    assert_one_build(with_values(Config(), BASE | change), monkeypatch)


@pytest.mark.slow
def test_both_recompute_what_a_budget_asks_for(inputs: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(inputs)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_one_build(with_values(Config(), BASE | {"training.max_memory": "2GB"}), monkeypatch)


# ------------------------------------------------------------------------------------------------------------ families


def write_family(folder: Path, family: str, **changes) -> Path:
    """A tiny model of a family with a tokenizer."""
    tokenizer = byte_level(CHATML)
    write_tiny(family, folder, **({"vocab_size": len(tokenizer)} | changes))
    tokenizer.save_pretrained(folder)
    return folder


def write_text(file: Path) -> Path:
    """A document, which is cut into rows that are full but for the last one."""
    file.write_text(" ".join(f"{index} boats and {index * 7 % 31} trips a day" for index in range(120)))
    return file


PHI3 = {"hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 256, "head_dim": 64}
NEOX = {"hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 256}


@pytest.mark.parametrize(
    "family, sizes, packing",
    [
        ("phi3", PHI3, True), ("gpt_neox", NEOX, True), ("llama", {"max_position_embeddings": 256}, False),
        pytest.param("phi3", PHI3, False, marks=pytest.mark.slow),
        pytest.param("gpt_neox", NEOX, False, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_run_on_full_rows_is_predicted_without_its_data(tmp_path: Path, family, sizes, packing):
    """Exactly as `train` predicts it, from the rows themselves; and as the allocator counts it."""
    model = write_family(tmp_path / "model", family, **sizes)
    config = run_config(model, write_text(tmp_path / "text.txt"), tmp_path / "run", {
        "data.packing": packing, "adapter.lora_dropout": 0.0, "data.shuffle": False, "training.max_steps": 2,
        "training.per_device_train_batch_size": 2,
    })  # fmt: skip
    train(config, watcher=RunMemory())
    found = profile_run(config, "cpu", measure=True)
    memory = json.loads((tmp_path / "run" / "memory.json").read_text())
    assert found.report.to_json()["predicted"] == memory["predicted"]
    assert memory["measured"]["peak_bytes"] == pytest.approx(memory["predicted"]["peak_bytes"], rel=5e-3)
    assert found.allocator_peak == pytest.approx(found.predicted.peak_bytes, rel=1e-3)


@pytest.mark.parametrize("padding_free", [True, False])
@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_a_family_that_cannot_keep_packed_examples_apart(tmp_path: Path, family, padding_free, monkeypatch):
    """The memory check and `memory.json` are about the batch that is trained on: one of padded rows."""
    sizes = {"max_seq_len": 128} if family == "mpt" else {}
    config = run_config(write_family(tmp_path / "model", family, **sizes), write_rows(tmp_path / "rows.jsonl"),
                        tmp_path / "run", {"data.packing": True, "data.padding_free": padding_free,
                                           "training.max_steps": 8})  # fmt: skip
    checked: list[Batch] = []
    trained: list[Batch] = []

    class Watch(RunMemory):
        def check(self, config: Config, batch: Batch, start=None):
            checked.append(batch)
            return super().check(config, batch, start)

    def step(model, optimizer, batches, *rest, train_step=loop.train_step):
        trained.extend(batches)
        return train_step(model, optimizer, batches, *rest)

    monkeypatch.setattr(loop, "train_step", step)
    run = train(config, watcher=Watch())
    assert run.config.data.packing is False and run.padding_free is False
    [largest] = checked
    for batch in [largest, *trained]:
        assert batch.position_ids is None and batch.segments is None
        assert batch.attention_mask is not None  # no batch of these rows is of one length
        assert batch.input_ids.shape[0] <= 4
    assert largest.input_ids.shape == max((batch.input_ids.shape for batch in trained), key=lambda shape: shape.numel())
    memory = json.loads((tmp_path / "run" / "memory.json").read_text())
    assert memory["config"]["data"]["packing"] is False
    assumed = profile_run(config, "cpu").report.config["data"]
    assert assumed["packing"] is False  # without data, too


@pytest.mark.parametrize("family", ["bloom", "phi3", "mixtral", "gemma2"])
def test_families_are_built_the_same(tmp_path: Path, family, monkeypatch):
    sizes = {} if family == "bloom" else {"max_position_embeddings": 128}
    model = write_family(tmp_path / "model", family, **sizes)
    config = run_config(model, write_rows(tmp_path / "rows.jsonl"), tmp_path / "run", {"data.packing": True})
    assert_one_build(config, monkeypatch)
