"""Adapters cut to a lower rank: the best one, read by PEFT, with the losses that evaluation gives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_adapters import artifact_of, live_logits, peft_logits, write_adapter, write_chat_base, write_run
from tiny_models import write_tiny

from qlora_tool import UserError, evaluate, inspect
from qlora_tool.adapters.peft_reading import read_adapter
from qlora_tool.inspection.inspect import inspect as look
from qlora_tool.inspection.truncate import cut_tensors
from qlora_tool.inspection.updates import open_adapter

PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("bases") / "llama")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    rows = [{"prompt": f"What is {n} plus 1?", "completion": f"It is {n + 1}."} for n in range(20, 26)]
    (folder / "eval.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    base = write_chat_base("llama", folder / "base")
    return write_run(folder / "run", base, data={"eval": str(folder / "eval.jsonl")})


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}},
        {"method": "loha", "r": 3},
        {"method": "lokr", "r": 3},
        {"method": "vera", "r": 5},
        {"method": "additive", "r": 2},
        {"target_modules": ["embed_tokens", "q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    ],
    ids=str,
)
def test_it_is_the_best_rank_r_of_each_update(base, tmp_path, settings):
    adapter = write_adapter(tmp_path / "a", base, quantization="none", **settings)
    look(artifact_of(adapter), r=3, output=tmp_path / "cut")
    cut = load_file(tmp_path / "cut" / "adapter_model.safetensors")
    opened = open_adapter(artifact_of(adapter))
    for name, layer in opened.layers.items():
        delta = layer.delta(torch.zeros(opened.shapes[name]))
        U, values, Vh = np.linalg.svd(delta.detach().double().numpy(), full_matrices=False)
        expected = (U[:, :3] * values[:3]) @ Vh[:3]
        embeds = name.endswith("embed_tokens")  # of which PEFT has the weight turned
        lora_B, lora_A = (cut[f"{PREFIX}{name}.lora_{f'embedding_{part}' if embeds else f'{part}.weight'}"].double()
                          for part in "BA")  # fmt: skip
        found = (lora_B @ lora_A).T if embeds else lora_B @ lora_A
        # fp32's rounding of either factor, and of the delta that numpy decomposes.
        np.testing.assert_allclose(found.numpy(), expected, atol=2e-6 * values[0])
    config = json.loads((tmp_path / "cut" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 3)
    # PEFT reads it as it is meant, which is also how it is read here.
    ours = live_logits(artifact_of(tmp_path / "cut"))
    assert float((ours - peft_logits(base, tmp_path / "cut")).abs().max()) < 1e-4


@pytest.mark.parametrize("parameters", [["experts.gate_up_proj", "experts.down_proj"], ["experts.down_proj"]], ids=str)
def test_it_is_the_best_rank_r_of_every_expert(tmp_path, parameters):
    """As it is read again, by the tensors that it adds to each matrix; and PEFT reads the same."""
    folder = write_tiny("qwen3_moe", tmp_path / "base")
    adapter = write_adapter(tmp_path / "a", folder, quantization="none", target_modules=["q_proj"],
                            target_parameters=parameters)  # fmt: skip
    look(artifact_of(adapter), r=2, output=tmp_path / "cut")
    whole, cut = (open_adapter(artifact_of(one)) for one in (adapter, tmp_path / "cut"))
    assert whole.layers.keys() == cut.layers.keys()
    for name, layer in whole.layers.items():
        zeros = torch.zeros(whole.shapes[name])
        deltas, found = (one.delta(zeros).detach().double().numpy() for one in (layer, cut.layers[name]))
        for delta, kept in zip(*(one if one.ndim == 3 else one[None] for one in (deltas, found)), strict=True):
            U, values, Vh = np.linalg.svd(delta, full_matrices=False)
            np.testing.assert_allclose(kept, (U[:, :2] * values[:2]) @ Vh[:2], atol=2e-6 * values[0])
    ours = live_logits(artifact_of(tmp_path / "cut"))
    assert float((ours - peft_logits(folder, tmp_path / "cut")).abs().max()) < 1e-4


@pytest.mark.parametrize("module, dropped", [("shared_experts.down_proj", True), ("o_proj", False)])
def test_what_peft_drops_of_it_is_said(tmp_path, module, dropped):
    base = write_tiny("deepseek_v3", tmp_path / "base")
    adapter = write_adapter(tmp_path / "a", base, quantization="none", method="vera", r=8, target_modules=[module])
    cut = look(artifact_of(adapter), r=2, output=tmp_path / "cut").truncation
    ours = live_logits(artifact_of(tmp_path / "cut"))
    assert (float((ours - peft_logits(base, tmp_path / "cut")).abs().max()) > 1e-4) is dropped
    assert any("PEFT 0.21 takes down_proj for weights of experts" in line for line in cut.lines()) is dropped


def test_what_is_trained_whole_goes_along(base, tmp_path):
    """At a rank that every update has, the cut adapter is the whole one."""
    biased = write_tiny("llama-biased", tmp_path / "biased")
    settings = {"modules_to_save": ["lm_head"], "bias": "lora_only", "rank_pattern": {"q_proj": 8}}
    adapter = write_adapter(tmp_path / "a", biased, **settings)
    stored = read_adapter(adapter)
    cut = cut_tensors(stored, open_adapter(artifact_of(adapter)), 4)
    whole = {f"{PREFIX}{name}" for name in stored.tensors}
    assert cut.keys() == whole
    look(artifact_of(adapter), r=7, output=tmp_path / "cut")
    q_proj = [module for module in look(artifact_of(tmp_path / "cut")).inspection.modules if "q_proj" in module.name]
    assert [len([value for value in module.spectrum.values if value > 1e-6]) for module in q_proj] == [7, 7]
    assert read_adapter(tmp_path / "cut").replaced_tensors().keys() == stored.replaced_tensors().keys()


def test_losses_are_those_of_evaluate_and_provenance_says_what_was_cut(run: Path, tmp_path: Path):
    result = inspect(run, truncate=2, output_dir=tmp_path / "cut")
    cut = result.truncation
    assert cut is not None and cut.losses is not None
    rows = run.parent / "eval.jsonl"
    for folder, loss in ((run, cut.losses.before), (tmp_path / "cut", cut.losses.after)):
        score = evaluate(folder, rows, device="cpu", batch_size=8).scores["eval"]
        assert (loss, cut.losses.tokens) == (pytest.approx(score.loss, rel=1e-6), score.tokens)
    assert "eval.jsonl (evaluation)" in cut.losses.rows
    before, after = (json.loads((folder / "qlora_tool.json").read_text()) for folder in (run / "adapter", cut.folder))
    assert {key: after[key] for key in before if key != "method"} == {k: before[k] for k in before if k != "method"}
    assert (after["truncated"]["from_r"], after["truncated"]["r"], after["truncated"]["kept"]) == (4, 2, cut.kept)
    assert (cut.folder / "tokenizer.json").exists()
    other = inspect(run, truncate=2, output_dir=tmp_path / "other", data=run.with_suffix(".jsonl")).truncation
    assert other is not None and other.losses is not None and other.losses.before != cut.losses.before


def test_an_adapter_without_rows_is_cut_and_the_loss_left_out(run, tmp_path):
    adapter = write_adapter(tmp_path / "a", run.parent / "base")
    cut = look(artifact_of(adapter), r=1, output=tmp_path / "cut").truncation
    assert cut is not None and cut.losses is None and "--data FILE" in (cut.no_losses or "")
    assert cut.lines()[1].startswith("loss not measured: ")


def test_what_cannot_be_cut(base, run, tmp_path):
    with pytest.raises(UserError, match=r"--truncate 4: .* has updates of rank 4 at most; give a rank below 4"):
        inspect(run, truncate=4, output_dir=tmp_path / "cut")
    with pytest.raises(UserError, match=r"--truncate 2: .* is dora, whose update is not of a low rank"):
        look(artifact_of(write_adapter(tmp_path / "a", base, method="dora")), r=2, output=tmp_path / "cut")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="taken: "):
            inspect(run, truncate=2, output_dir=tmp_path / "taken", overwrite=overwrite)
    assert not (tmp_path / "cut").exists() and (tmp_path / "taken" / "notes.txt").exists()
