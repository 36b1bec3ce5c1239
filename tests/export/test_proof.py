"""The proof of an export: against logits computed apart, against faults put into the files, or left out, and why."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_adapters import FP32, artifact_of, live_logits, plain_logits, write_adapter, write_chat_base, write_run
from transformers.utils import logging as transformers_logging

from qlora_tool.artifacts import Artifact
from qlora_tool.build.open import open_model
from qlora_tool.config import ModelConfig
from qlora_tool.data.tokenize import build_dataset, build_evaluation_sets
from qlora_tool.errors import MachineError, UserError
from qlora_tool.export import proof
from qlora_tool.export.gguf import read_back
from qlora_tool.export.options import ExportOptions
from qlora_tool.export.proof import prove
from qlora_tool.export.rows import find_rows
from qlora_tool.export.verification import MEAN_KL, Proof, Update
from qlora_tool.export.verify import Agreement, choose_rows, compare, predict
from qlora_tool.export.write import export_merged
from qlora_tool.model.open import open_tokenizer

TOKENS = 120
FAMILIES = ["llama", "gpt2", "mixtral"]  # gpt2's weights are (in, out), mixtral's experts are fused on load


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {family: write_run(folder / family, write_chat_base(family, folder / f"{family}-base"))
            for family in FAMILIES}  # fmt: skip


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The llama run in bfloat16."""
    return export(artifact_of(runs["llama"]), tmp_path_factory.mktemp("exports") / "llama", dtype="bfloat16")


def export(artifact: Artifact, folder: Path, **options) -> Path:
    export_merged(artifact, folder, ExportOptions(**options))
    return folder


def proven(artifact: Artifact, folder: Path, base: str = "dequantized", data: str | None = None) -> Proof:
    return prove(artifact, folder, find_rows(artifact, data), base=base, max_tokens=TOKENS)


@pytest.mark.parametrize("family", FAMILIES)
def test_figures_are_those_of_both_models_logits(runs, family, tmp_path):
    artifact = artifact_of(runs[family])
    folder = export(artifact, tmp_path / "out", dtype="bfloat16")
    found = proven(artifact, folder)
    assert found.left_out is None
    examples, _ = find_rows(artifact, None)
    kl, agreed, tokens = [], 0, 0
    for example in examples:
        ids = torch.tensor([example.input_ids[: TOKENS - tokens]])
        tokens += ids.shape[1]
        if not ids.shape[1]:
            break
        live = live_logits(artifact, ids)[0].double().log_softmax(-1)
        files = plain_logits(folder, ids)[0].double().log_softmax(-1)
        kl.append((live.exp() * (live - files)).sum(-1))
        agreed += int((live.argmax(-1) == files.argmax(-1)).sum())
    kl = torch.cat(kl)
    assert found.agreement.tokens == len(kl) == TOKENS
    assert found.agreement.mean_kl == pytest.approx(float(kl.mean()), rel=1e-2)  # rows are padded here: another order
    assert found.agreement.worst_kl == pytest.approx(float(kl.max()), rel=1e-2)
    assert found.agreement.argmax_agreement == pytest.approx(agreed / TOKENS, abs=1 / TOKENS)
    assert found.update.kept == pytest.approx(1, abs=1e-2)
    assert 1e-3 < found.update.error < 0.1  # what bfloat16 leaves of an update of this size


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_files_are_exact(runs, family, tmp_path):
    artifact = artifact_of(runs[family])
    found = proven(artifact, export(artifact, tmp_path / "out", dtype="float32"))
    assert found.agreement.worst_kl < 1e-9
    assert found.agreement.argmax_agreement == 1
    assert (found.update.kept, found.update.error) == (pytest.approx(1, abs=1e-6), pytest.approx(0, abs=1e-6))
    assert found.agreement.exported_loss == pytest.approx(found.agreement.live_loss, rel=1e-5)
    assert found.warnings() == []


def test_the_update_is_measured_in_the_weights(runs, exported, tmp_path):
    """Against W₀ and Δ made by hand: files without Δ hold none of it, files with half of it hold half."""
    artifact = artifact_of(runs["llama"])
    live = proof.open_live(artifact)
    damaged = tmp_path / "damaged"
    shutil.copytree(exported, damaged)
    for share in (0.0, 0.5):
        tensors = load_file(exported / "model.safetensors")
        for name, module in live.module.named_modules():
            if getattr(module, "adapter", None) is not None:
                start = module.weight.stored().dequantize(torch.float32)
                a, b = module.adapter.lora_A.float(), module.adapter.lora_B.float()
                tensors[f"{name}.weight"] = start + share * (b @ a) * (32 / 4)
        save_file({name: tensor.float() for name, tensor in tensors.items()}, damaged / "model.safetensors")
        found = proof.measure_update(live, damaged)
        assert found.kept == pytest.approx(share, abs=1e-5)
        assert found.error == pytest.approx(1 - share, abs=1e-5)


def test_a_merge_onto_the_original_weights_is_told_from_a_good_one(runs, tmp_path):
    artifact = artifact_of(runs["llama"])
    found = proven(artifact, export(artifact, tmp_path / "out", base="original", dtype="float32"), base="original")
    assert found.agreement.mean_kl > 1e-3
    (warning,) = found.warnings()
    assert "mean KL" in warning and "--base dequantized" in warning


def test_damaged_files_are_a_warning(runs, exported, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(exported, damaged)
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"].zero_()
    save_file(tensors, damaged / "model.safetensors")
    found = proven(artifact_of(runs["llama"]), damaged)
    assert found.agreement.mean_kl > MEAN_KL
    assert "--dtype float16" in found.warnings()[0]


def test_the_runs_evaluation_rows_come_first(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs["llama"], run)
    rows = tmp_path / "held_out.jsonl"
    rows.write_text('{"prompt": "What is 90 and 1?", "completion": "It is 91."}\n')
    text = (run / "config.yaml").read_text()
    assert "eval: null" in text
    (run / "config.yaml").write_text(text.replace("eval: null", f"eval: {rows}"))
    examples, source = find_rows(artifact_of(run), None)
    assert (len(examples), source) == (1, f"{rows} (evaluation)")
    (run / "config.yaml").write_text(text.replace("eval: null", "eval: 0.25"))
    examples, source = find_rows(artifact_of(run), None)
    assert "25% of it) (evaluation)" in source
    data, tokenizer = artifact_of(run).run.data, open_tokenizer(run / "adapter")
    held_out = build_evaluation_sets(data, tokenizer, build_dataset(data.train, data, tokenizer))[1]["eval"].examples
    assert examples == held_out and len(held_out) == 3
    (run / "config.yaml").write_text(text.replace("eval: null", f"eval: {{one: {rows}, two: {rows}}}"))
    assert len(find_rows(artifact_of(run), None)[0]) == 2
    rows.unlink()
    examples, why = find_rows(artifact_of(run), None)
    assert examples == [] and "held_out.jsonl" in why and "--verify-data" in why


def test_without_evaluation_rows_those_it_trained_on(runs):
    examples, source = find_rows(artifact_of(runs["llama"]), None)
    assert len(examples) == 12
    assert "the run has no evaluation rows" in source


def test_rows_that_are_named_are_taken_or_refused(runs, exported, tmp_path):
    rows = tmp_path / "mine.jsonl"
    rows.write_text('{"prompt": "What is 3 and 3?", "completion": "It is 6."}\n')
    assert str(rows) in proven(artifact_of(runs["llama"]), exported, data=str(rows)).rows
    rows.write_text("no row\n")
    with pytest.raises(UserError, match=r"mine\.jsonl, line 1"):
        proven(artifact_of(runs["llama"]), exported, data=str(rows))


def test_an_adapter_alone_has_no_rows(runs, tmp_path):
    base = runs["llama"].with_name("llama-base")
    artifact = artifact_of(write_adapter(tmp_path / "adapter", base))
    folder = export(artifact, tmp_path / "out")
    found = proven(artifact, folder)
    assert "--verify-data FILE" in found.left_out
    assert found.as_dict() == {"left_out": found.left_out}
    assert found.lines() == [f"not verified: {found.left_out}"]
    assert found.warnings() == []
    rows = runs["llama"].with_name("llama.jsonl")
    assert proven(artifact, folder, data=str(rows)).agreement.tokens == TOKENS


def test_left_out_where_memory_is_short(runs, exported, monkeypatch):
    monkeypatch.setattr(proof, "free_bytes", lambda device: 1000)
    found = proven(artifact_of(runs["llama"]), exported)
    assert "0.0 MiB of memory are free" in found.left_out


def test_left_out_where_memory_runs_out(runs, exported, monkeypatch):
    def full(*arguments):
        raise MemoryError("no more")

    monkeypatch.setattr(proof, "predict", full)
    assert "out of memory" in proven(artifact_of(runs["llama"]), exported).left_out


def test_a_failure_of_transformers_is_a_warning(runs, exported, monkeypatch):
    from transformers import AutoModelForCausalLM

    def fail(*arguments, **options):
        raise KeyError("model.layers.7")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    found = proven(artifact_of(runs["llama"]), exported)
    assert "model.layers.7" in found.left_out
    assert found.warnings() == [found.left_out]


def test_no_model_is_alive_while_the_other_is(runs, exported, monkeypatch):
    """The live one is gone before the files are read, and their weights stay on the disk."""
    opened, original = [], proof.predict

    def watching(model, rows):
        gc.collect()
        if opened and opened[0]() is not model.module:  # which predicts with its adapter and without
            assert opened[0]() is None
            assert {parameter.device.type for parameter in model.module.parameters()} == {"meta"}
        opened.append(weakref.ref(model.module))
        return original(model, rows)

    monkeypatch.setattr(proof, "predict", watching)
    assert proven(artifact_of(runs["llama"]), exported).agreement
    assert len(opened) == 3


def test_transformers_settings_are_as_before(runs, exported, capfd):
    transformers_logging.enable_progress_bar()
    level = logging.getLogger("accelerate.big_modeling").level
    proven(artifact_of(runs["llama"]), exported)
    assert transformers_logging.is_progress_bar_enabled()
    assert logging.getLogger("accelerate.big_modeling").level == level
    assert "meta device" not in capfd.readouterr().err


GOOD = Agreement(5000, 1.25e-4, 1.8e-3, 0.9964, 859, 1.82327, 1.82317, 4.1, 4.1)


@pytest.mark.parametrize(
    ("base", "dtype", "better"),
    [
        ("original", "float16", "--base dequantized"),
        ("dequantized", "bfloat16", "--dtype float16"),
        ("dequantized", "float16", "--dtype float32"),
        ("dequantized", "nf4", "--format safetensors"),
        ("original", "nf4", "--format safetensors"),
        ("dequantized", "float32", "report"),
    ],
)
def test_each_bad_figure_is_a_warning_with_a_better_choice(base, dtype, better):
    good = Proof(base, dtype, "rows", GOOD, Update(0.999, 0.05))
    assert good.warnings() == []
    for fault, named in (
        (dataclasses.replace(good, agreement=dataclasses.replace(GOOD, mean_kl=0.68)), "mean KL 0.68"),
        (dataclasses.replace(good, agreement=dataclasses.replace(GOOD, mean_kl=float("nan"))), "mean KL nan"),
        (dataclasses.replace(good, agreement=dataclasses.replace(GOOD, argmax_agreement=0.6)), "60.0%"),
        (dataclasses.replace(good, update=Update(0.4, 0.8)), "error of 0.8"),
    ):
        (warning,) = fault.warnings()
        assert named in warning and better in warning and "--base original" not in warning


def test_what_is_kept_of_the_gain_comes_first_for_coarse_files():
    """4.0 untuned, 2.0 live: 2.1 keeps 95 % and 2.3 85 %. A KL above the limit is a warning all the same: a file that
    is misread can keep nearly all of the gain."""
    coarse = dataclasses.replace(GOOD, mean_kl=9e-4, argmax_agreement=0.96, live_loss=2.0, untuned_loss=4.0)
    for dtype, finer in (("q4_k_m", "--gguf-type q5_k_m is the next finer"), ("q4_0", "--gguf-type iq4_nl is"),
                         ("q8_0", "--gguf-type bf16"), ("nf4", "--format safetensors")):  # fmt: skip
        kept = Proof("dequantized", dtype, "rows", dataclasses.replace(coarse, exported_loss=2.1), Update(0.9, 8.0))
        assert "of what training gained (loss 4.00 → 2.00) the files keep 95.0%" in "\n".join(kept.lines())
        assert kept.as_dict()["gain_kept"] == pytest.approx(0.95)
        lost = dataclasses.replace(kept, agreement=dataclasses.replace(coarse, exported_loss=2.3))
        none = dataclasses.replace(kept, agreement=dataclasses.replace(coarse, exported_loss=float("nan")))
        assert kept.warnings() == []
        (warning,) = lost.warnings()
        assert "keeps 85.0% (below 90%)" in warning and "KL" not in warning and finer in warning
        assert none.warnings()
        figures = (({"mean_kl": 0.094}, "mean KL 0.094 (above 0.001)"),
                   ({"argmax_agreement": 0.89}, "the same likeliest token at 89.0% (below 95%)"))  # fmt: skip
        for figure, told in figures:
            far = dataclasses.replace(coarse, exported_loss=2.1, **figure)
            (warning,) = dataclasses.replace(kept, agreement=far).warnings()
            assert "keeps 95.0% of what training gained" in warning and told in warning and finer in warning
    small = dataclasses.replace(coarse, untuned_loss=2.04, exported_loss=3.0)
    assert small.gain_kept is None and dataclasses.replace(coarse, untuned_loss=None).gain_kept is None


def test_the_untuned_loss_is_that_of_the_base_alone(runs, exported):
    """Against the quantized base without the adapter, opened by itself; not known where tensors were replaced."""
    artifact = artifact_of(runs["llama"])
    (row, *_), _ = find_rows(artifact, None)
    rows = choose_rows([row], TOKENS)
    base = predict(open_model(artifact.model.model_copy(update={"compute_dtype": "float32"})), rows)
    expected = compare(base, base, rows).live_loss
    found = prove(artifact, exported, ([row], "one row"), base="dequantized", max_tokens=TOKENS)
    assert found.agreement.untuned_loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("family", "gguf_type", "most"), [
    ("llama", "f16", 1e-5), ("gpt2", "q8_0", 1e-2), ("mixtral", "bf16", 1e-3),
])  # fmt: skip
def test_a_gguf_file_is_held_against_the_live_model(runs, family, gguf_type, most, tmp_path):
    """Read back beside it, and nothing of that is left. `most` is far above the type's rounding of these weights and
    far below what one tensor in the wrong place would give."""
    options = ExportOptions(format="gguf", gguf_type=gguf_type, verify=True)
    result = export_merged(artifact_of(runs[family]), tmp_path / "out", options)
    assert result.proof.dtype == gguf_type and result.proof.agreement.mean_kl < most
    assert result.proof.update.kept == pytest.approx(1, abs=0.05)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".gguf", ".json", ".md", ""}


def test_without_space_to_read_it_back_a_file_is_written_unverified(runs, tmp_path, monkeypatch):
    def full(*arguments):
        raise MachineError("to read the file back takes 9 GB beside it for a while, and 1 GB are free")

    monkeypatch.setattr(read_back, "read_back", full)
    options = ExportOptions(format="gguf", verify=True)
    result = export_merged(artifact_of(runs["llama"]), tmp_path / "out", options)
    assert "1 GB are free" in result.not_verified and (tmp_path / "out" / "out.gguf").exists()


def test_what_was_left_unquantized_is_told_with_the_figures():
    left = Proof("dequantized", "nf4", "rows", GOOD, unquantized="4 of 14 weights: rows of 96 are misread")
    assert left.lines()[-1] == f"  not quantized: {left.unquantized}"
    assert left.table()[-1] == ("not quantized", left.unquantized) and not left.warnings()
    unverified = dataclasses.replace(left, agreement=None, left_out="not asked for")
    assert unverified.lines()[-1] == f"  not quantized: {left.unquantized}"


def test_what_nf4_keeps_of_the_update_comes_first():
    bad = Proof("dequantized", "nf4", "rows", GOOD, Update(0.002, 1.02), finer_base=True)
    (warning,) = bad.warnings()
    assert warning.startswith("update kept 0.2% through rounding to nf4 again: ") and "--base original keeps" in warning
    (onto_original,) = dataclasses.replace(bad, base="original").warnings()
    assert "--base original" not in onto_original
    unverified = dataclasses.replace(bad, agreement=None, left_out="not asked for")
    assert unverified.warnings()[0].startswith("update kept 0.2%")
    assert unverified.as_dict()["update"] == {"kept": 0.002, "error": 1.02}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_nf4_files_are_compared_by_bitsandbytes(runs, family, tmp_path):
    """Against our own reading of the files, which bitsandbytes has no part in."""
    artifact = artifact_of(runs[family])
    folder = export(artifact, tmp_path / "out", format="nf4", base="original")
    model = open_model(ModelConfig(name_or_path=str(folder), quantization="nf4", **FP32))
    (row, *_), _ = find_rows(artifact, None)
    rows = choose_rows([row], TOKENS)
    expected = compare(predict(proof.open_live(artifact), rows), predict(model, rows), rows)
    found = prove(artifact, folder, ([row], "one row"), base="original", max_tokens=TOKENS)
    assert found.left_out is None
    assert found.agreement.mean_kl == pytest.approx(expected.mean_kl, rel=1e-2)


def test_json_and_lines_hold_the_figures():
    found = Proof("dequantized", "bfloat16", "rows.jsonl", GOOD, Update(0.99987654, 0.05))
    written = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert written["left_out"] is None
    assert (written["mean_kl"], written["update"]["kept"], written["trained_tokens"]) == (1.25e-4, 0.9999, 859)
    broken = dataclasses.replace(found, agreement=dataclasses.replace(GOOD, mean_kl=float("nan")))
    assert broken.as_dict()["mean_kl"] is None
    text = "\n".join(found.lines())
    parts = ("5,000 tokens of rows.jsonl", "0.00013 nats on average", "99.64%", "1.8233 trained, 1.8232 exported",
             "update kept 99.99%, with a rounding error of 5% of its size")  # fmt: skip
    assert all(part in text for part in parts)
