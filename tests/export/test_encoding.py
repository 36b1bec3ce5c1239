"""Files of few bits made with rows: what they keep, how they are chosen, and what is refused."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_adapters import artifact_of, plain_logits, write_adapter, write_chat_base, write_run
from tiny_ggufs import CHANGES, merged_of

from qlora_tool.data.examples import Example
from qlora_tool.errors import UserError
from qlora_tool.export import proof
from qlora_tool.export.encoding import Calibration, Encoder, Kept, best
from qlora_tool.export.grids.coded import coded_4bit
from qlora_tool.export.options import ExportOptions
from qlora_tool.export.rows import (
    BATCH_TOKENS,
    MOST_TOKENS,
    CalibrationRows,
    _as_trained,
    calibration_rows,
    find_rows,
)
from qlora_tool.export.verify import Agreement, compare
from qlora_tool.export.write import export_merged
from qlora_tool.weights.quantized import disk_group, from_disk, quantize

NF4 = ExportOptions(format="nf4")


def write_rows(file: Path, rows: int) -> Path:
    lines = [{"prompt": f"What is {n} and {3 * n}?", "completion": f"It is {4 * n}, as anyone can count."}
             for n in range(rows)]  # fmt: skip
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_base("llama", tmp_path_factory.mktemp("bases") / "llama", hidden_size=256, intermediate_size=256,
                           num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4)  # fmt: skip


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapters") / "adapter", base, lora_alpha=0.1)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 60)


def options(rows: Path | str, **changes) -> ExportOptions:
    return ExportOptions(**({"format": "nf4", "calibration": str(rows)} | changes))


def calibration_of(adapter: Path, base: Path, rows: Path) -> Calibration:
    artifact = artifact_of(adapter)
    return Calibration(merged_of(artifact, base), calibration_rows(artifact, str(rows)))


@pytest.mark.parametrize(("form", "gguf_type"), [("nf4", "f16"), ("fp4", "f16"), ("gguf", "q4_k_m"), ("gguf", "q4_0")])
def test_more_of_the_update_is_kept_with_rows(form, gguf_type, base, adapter, rows, tmp_path):
    """Of the files' own weights, on the moments that the rows have: against the nearest codes."""
    artifact, found, name = artifact_of(adapter), {}, "model.layers.0.mlp.down_proj.weight"
    merged = merged_of(artifact, base, torch.float32)
    for calibration in (str(rows), "none"):
        folder = tmp_path / Path(calibration).stem
        export_merged(artifact, folder, options(calibration, format=form, gguf_type=gguf_type, base="dequantized"))
        if form == "gguf":
            stored = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / f"{folder.name}.gguf").tensors}
            down = stored["blk.0.ffn_down.weight"]
            found[calibration] = torch.from_numpy(gguf.dequantize(down.data, down.tensor_type).copy())
        else:
            tensors = load_file(folder / "model.safetensors")
            stored = {key: tensors[key] for key in disk_group(name, tensors)}
            found[calibration] = from_disk(name, stored).dequantize()
    moments = calibration_of(adapter, base, rows)
    trained = merged.value(name)
    weighted = (update := trained - replace(merged, adapter=None).value(name)) @ moments.of([name])
    missing = {key: abs(float(((values - trained) * weighted).sum() / (update * weighted).sum()))
               for key, values in found.items()}  # fmt: skip
    assert missing[str(rows)] < missing["none"]
    moments.close()


def test_the_base_off_the_grid_is_taken_and_said(base, adapter, rows, tmp_path):
    facts = {}
    for calibration in (str(rows), "none"):
        result = export_merged(artifact_of(adapter), tmp_path / Path(calibration).stem, options(calibration))
        facts[calibration] = result.facts["encoding"]
        assert result.base == facts[calibration]["started_from"]
        provenance = json.loads((result.folder / "qlora_tool.json").read_text(encoding="utf-8"))
        assert provenance["merged"]["base"] == result.base
        tried = facts[calibration]["tried_weights"]
        assert result.base == max(tried, key=tried.get) and sum(tried.values()) == 7
        weights_tell = calibration == "none"  # of codes that make good one another's errors single ones do not
        assert ("update kept" in (result.folder / "README.md").read_text(encoding="utf-8")) == weights_tell
    assert facts["none"]["started_from"] == "original"  # rounded again, nothing would be left of the update
    made = facts[str(rows)]
    assert (made["calibrated_weights"], made["plain_weights"]) == (7, 0)
    assert made["calibration"]["rows"] == str(rows) and made["calibration"]["tokens"] > 1024
    assert (facts["none"]["calibrated_weights"], facts["none"]["calibration"]) == (0, None)


def test_what_is_missing_everywhere_weighs_more_than_noise():
    """By hand: codes that lose a tenth of an update, codes with noise five times its size, codes that are right."""
    generator = torch.Generator().manual_seed(0)
    base, update = torch.randn(32, 32, generator=generator), torch.randn(32, 32, generator=generator)
    noise = torch.randn(32, 32, generator=generator)
    noise -= (noise * update).sum() / update.square().sum() * update
    noise *= 5 * update.norm() / noise.norm()
    short, noisy, exact = Kept(), Kept(), Kept()
    short.add(base + 0.9 * update, base + update, update, None)
    noisy.add(base + update + noise, base + update, update, None)
    exact.add(base + update, base + update, update, torch.eye(32))
    assert (short.missing, short.noise) == (pytest.approx(0.1, rel=1e-4), pytest.approx(0.01, rel=1e-3))
    assert (noisy.missing, noisy.noise) == (pytest.approx(0, abs=1e-5), pytest.approx(25, rel=1e-3))
    assert best({"short": short, "noisy": noisy}, 200) == "short"  # 0.1² against 25 / 400
    assert best({"short": short, "noisy": noisy}, 5000) == "noisy"
    gone = Kept()
    gone.add(base, base + update, update, None)
    assert best({"gone": gone, "noisy": noisy}, 1) == "noisy"  # however few the weights are
    assert best({"noisy": noisy, "exact": exact}, 200) == best({"exact": exact, "noisy": noisy}, 200) == "exact"
    assert best({"none": Kept(), "too": Kept()}, 1) == "none"


@pytest.mark.parametrize("dequantized, original, expected", [
    ((0.336, 39.1), (0.229, 1681), "dequantized"),  # q6_k: a mean KL of 0.016 against 0.80
    ((0.443, 77.9), (0.772, 1069), "dequantized"),  # q5_k_m
    ((0.345, 144.), (0.317, 1215), "dequantized"),  # q4_k_m: 0.157 against 0.730
    ((0.654, 278.), (0.520, 1218), "original"),  # iq4_nl: 70 % of the gain kept against 79
    ((0.611, 668.), (0.435, 1571), "original"),  # q4_0: 69 % against 73
    ((0.993, 1.14), (0.006, 67.4), "original"),  # nf4: 4 % against 99
    ((0.261, 0.52), (0.121, 4.23), "original"),  # nf4 with rows: 97 % against 98.5
    ((0.013, 7.10), (0.000, 31.8), "dequantized"),  # q4_k_m with rows: 0.031 against 0.198
    ((0.024, 3.74), (0.001, 52.5), "dequantized"),  # q6_k with rows
])  # fmt: skip
def test_the_base_that_was_better_is_chosen(dequantized, original, expected):
    """What the first 14 of SmolLM2's 210 weights showed (missing, noise), and which file was better in the end."""
    kept = {name: Kept(14 * (1 - missing), 14 * noise, 14)
            for name, (missing, noise) in {"dequantized": dequantized, "original": original}.items()}  # fmt: skip
    assert best(kept, 210) == expected


def test_without_an_update_there_is_nothing_to_choose_by(base, adapter):
    merged = merged_of(artifact_of(adapter), base)
    encoder = Encoder(merged, ["dequantized", "original"])
    weight = torch.randn(8, 64)
    encoder.encode(lambda one, _: coded_4bit(quantize(one, "nf4", False)), weight,
                   {"dequantized": weight, "original": weight + 1}, torch.zeros_like(weight), None)  # fmt: skip
    assert encoder.base == "dequantized"


def test_the_same_export_gives_the_same_bytes(base, adapter, rows, tmp_path):
    written = []
    for again in (False, True):
        result = export_merged(artifact_of(adapter), tmp_path / "out", options(rows, overwrite=again))
        written.append({file: (result.folder / file).read_bytes() for file in result.files})
    assert written[0] == written[1]


def test_experts_are_told_as_made_without_rows(rows, tmp_path):
    base = write_chat_base("mixtral", tmp_path / "base")
    artifact = artifact_of(write_adapter(tmp_path / "adapter", base))
    said = export_merged(artifact, tmp_path / "out", options(rows, format="gguf", gguf_type="q4_0")).facts["encoding"]
    assert said["plain_weights"] > 0 and said["calibrated_weights"] > 0


# --------------------------------------------------------------------------------------------------------- rows


def test_rows_of_the_run_are_those_it_trained_on(base, tmp_path):
    run = write_run(tmp_path / "run", base, data={"eval": 0.25})
    artifact = artifact_of(run)
    why = calibration_rows(artifact, "auto")
    assert isinstance(why, str) and "too few" in why and "--calibration FILE" in why
    more = write_rows(tmp_path / "more.jsonl", 450)
    data = artifact.run.data.model_copy(update={"train": str(more)})
    found = calibration_rows(replace(artifact, run=artifact.run.model_copy(update={"data": data})), "auto")
    assert MOST_TOKENS - 300 < found.tokens <= MOST_TOKENS and found.source == f"{more} (changed since training)"
    assert sum(map(len, given_of(found))) == found.tokens


def given_of(rows: CalibrationRows) -> list[list[int]]:
    """Each row, without what fills it up."""
    found = []
    for batch in rows.batches:
        lengths = [batch.input_ids.shape[1]] * len(batch.input_ids) if batch.attention_mask is None else \
            batch.attention_mask.sum(1).tolist()  # fmt: skip
        for row, length in zip(batch.input_ids.tolist(), lengths, strict=True):
            assert not any(row[length:])
            found.append(row[:length])
    return found


def test_each_row_goes_through_layers_by_itself_as_in_training():
    """Whole, from its own first token, with no other one before it; of one too long the first tokens."""
    lengths = random.Random(3).choices([5, 9, 700, 5000], [5, 5, 2, 1], k=40)
    rows = [[100 * number + place % 90 for place in range(length)] for number, length in enumerate(lengths)]
    found = _as_trained([Example(row, row, "here") for row in rows], 1000, "here")
    given = given_of(found)
    taken = [row[:1000] for row in rows][: len(given)]
    assert sorted(given) == sorted(taken) and len(given) > 10
    assert found.tokens == sum(map(len, taken)) <= MOST_TOKENS
    assert len(given) == len(rows) or found.tokens + min(1000, lengths[len(given)]) > MOST_TOKENS
    assert all(batch.input_ids.numel() <= BATCH_TOKENS for batch in found.batches)
    assert len(found.batches) <= 3 + found.tokens // (BATCH_TOKENS // 2)  # of rows of like length
    long = [Example(row, row, "here") for row in [[7] * 40_000]]
    assert _as_trained(long, 40_000, "here").tokens == 40_000  # one is taken, whatever its length


def test_rows_that_were_edited_are_not_called_those_of_the_run(base, tmp_path, caplog):
    """Both by the SHA-256 in the adapter's qlora_tool.json, each told once; moved or renamed files are the same."""
    evaluation = write_rows(tmp_path / "eval.jsonl", 3)
    run = write_run(tmp_path / "run", base, data={"train": str(write_rows(tmp_path / "t.jsonl", 60)),
                                                  "eval": str(evaluation)})  # fmt: skip
    caplog.clear()
    artifact, file = artifact_of(run), tmp_path / "t.jsonl"
    assert calibration_rows(artifact, "auto").source == f"{file} (trained on)"
    assert find_rows(artifact, None)[1] == f"{evaluation} (evaluation)" and not caplog.records
    moved = file.rename(tmp_path / "moved.jsonl")
    data = artifact.run.data.model_copy(update={"train": str(moved)})
    elsewhere = replace(artifact, run=artifact.run.model_copy(update={"data": data}))
    assert calibration_rows(elsewhere, "auto").source == f"{moved} (trained on)" and not caplog.records
    write_rows(file, 61)
    write_rows(evaluation, 4)
    for _ in range(2):
        assert calibration_rows(artifact, "auto").source == f"{file} (changed since training)"
        assert find_rows(artifact, None)[1] == f"{evaluation} (evaluation, changed since training)"
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} not as when {run} was trained (SHA-256 differs): what is read now are not {which}"
        for path, which in ((file, "the trained rows"), (evaluation, "the evaluation rows of the run"))
    ]
    caplog.clear()
    without = artifact.run.data.model_copy(update={"eval": None})
    found = find_rows(replace(artifact, run=artifact.run.model_copy(update={"data": without})), None)
    assert found[1] == f"{file} (changed since training: the run has no evaluation rows)" and not caplog.records


def test_an_adapter_without_its_run_is_made_without_rows_and_says_so(base, adapter, tmp_path, caplog):
    with caplog.at_level("WARNING"):
        export_merged(artifact_of(adapter), tmp_path / "out", NF4)
    assert "the adapter comes without its run, and so without rows; give some with --calibration FILE" in caplog.text
    assert plain_logits(tmp_path / "out").isfinite().all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"calibration": "missing.jsonl"}, "--calibration missing.jsonl: no such file; expected auto, none or a file"),
        ({"calibration": ""}, "--calibration : no such file; expected auto, none or a file"),
        ({"format": "safetensors"}, "is for merged files of few bits (--format nf4, fp4, and gguf of type "),
        ({"format": "gguf", "gguf_type": "q8_0"}, "is for merged files of few bits"),
        ({"min_kept": 0.9}, "--min-kept 0.9: chooses between GGUF's types; set --format gguf"),
        ({"min_kept": 1.5, "format": "gguf", "calibration": "none"}, "--min-kept 1.5: expected a share"),
        ({"min_kept": 95, "format": "gguf", "calibration": "none"}, "at most 1; did you mean 0.95?"),
        ({"gguf_type": "auto", "format": "gguf", "calibration": "none"}, "--gguf-type auto: what a type keeps"),
        ({"gguf_type": "auto"}, "--gguf-type auto: is for --format gguf"),
        ({"gguf_type": "auto", "format": "gguf-adapter", "with_base": True, "calibration": "none"},
         "--gguf-type auto: is for --format gguf, not gguf-adapter"),
        *(({"format": form, "calibration": "auto"} | change, said)
          for form in ("adapter", "adapter-portable") for change, said in [
            ({"base": "original"}, f"--base original: --format {form} writes the adapter alone, merged onto no base; "),
            ({"base": "dequantized"}, "--base dequantized: "),
            ({"verify": True, "verify_data": __file__}, f": --format {form} writes the adapter that was trained, and "),
        ]),
        *(({"format": form, "calibration": "auto", "max_shard_size": 30_000},
           f"--max-shard-size 30.0 kB: --format {form} writes no shards; leave it out, or choose --format safetensors, "
           "nf4 or fp4") for form in ("gguf", "gguf-adapter", "adapter", "adapter-portable")),
        ({"verify_data": __file__}, ": nothing is verified with --no-verify; leave one of them out"),
    ],
)
def test_options_that_do_not_go_together_are_refused(changes, said, adapter, rows, tmp_path):
    with pytest.raises(UserError) as found:
        export_merged(artifact_of(adapter), tmp_path / "out", options(rows, **changes))
    assert said in str(found.value) and "\n" not in str(found.value)
    assert not list(tmp_path.iterdir())


def test_too_few_rows_are_refused(adapter, tmp_path):
    few = write_rows(tmp_path / "few.jsonl", 3)
    with pytest.raises(UserError, match=r"few\.jsonl: holds \d+ tokens in rows of at most 128, too few to tell"):
        export_merged(artifact_of(adapter), tmp_path / "out", options(few))
    assert [path.name for path in tmp_path.iterdir()] == ["few.jsonl"]


def test_the_smallest_type_that_keeps_enough_is_found(tmp_path):
    """Held against what each type keeps when it is made alone."""
    base = write_chat_base("llama", tmp_path / "base", hidden_size=256, intermediate_size=256, num_hidden_layers=1,
                           num_attention_heads=4, num_key_value_heads=4)  # fmt: skip
    run = write_run(tmp_path / "run", base, learning_rate=2e-2, max_steps=8)
    more = {"format": "gguf", "verify": True, "verify_data": str(tmp_path / "run.jsonl"), "calibration": "none"}
    alone = {}
    for kind in ("q4_0", "iq4_nl", "q4_k_s"):  # the smallest three
        result = export_merged(artifact_of(run), tmp_path / kind, ExportOptions(gguf_type=kind, **more))
        alone[kind] = round(result.proof.agreement.gain_kept, 4)
    least = max(alone.values()) - 1e-4  # of which they are rounded to
    expected = next(kind for kind, kept in alone.items() if kept >= least)
    found = export_merged(artifact_of(run), tmp_path / "auto", ExportOptions(gguf_type="auto", min_kept=least, **more))
    assert found.dtype == expected and list(tmp_path.joinpath("auto").glob("*.gguf"))
    tried = {one["gguf_type"]: one["gain_kept"] for one in found.facts["candidates"]}
    assert tried == {kind: alone[kind] for kind in tried} and list(tried)[-1] == expected
    assert (tmp_path / "auto" / "auto.gguf").stat().st_size == (tmp_path / expected / f"{expected}.gguf").stat().st_size
    later = export_merged(artifact_of(run), tmp_path / "from", ExportOptions(gguf_type="q6_k", min_kept=0.01, **more))
    assert later.dtype == "q6_k"


def test_what_cannot_be_measured_is_not_chosen_by(adapter, rows, tmp_path):
    """A random adapter gains nothing; nothing is left behind."""
    with pytest.raises(UserError, match=r"training gained less than 0\.05 in loss on these rows"):
        export_merged(artifact_of(adapter), tmp_path / "out", options(
            "none", format="gguf", gguf_type="auto", verify=True, verify_data=str(rows)))  # fmt: skip
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "form", "gguf_type"),
    [("gpt2", "gguf", "q4_0"), ("gpt2", "nf4", "f16"), ("phi3", "gguf", "iq4_nl"), ("gemma2", "gguf", "q4_0"),
     pytest.param("qwen3_moe", "gguf", "q4_k_m", marks=pytest.mark.slow),
     pytest.param("starcoder2", "gguf", "q5_k_m", marks=pytest.mark.slow),
     pytest.param("llama-tied", "gguf", "q6_k", marks=pytest.mark.slow)],
)  # fmt: skip
def test_other_families_come_nearer_too(family, form, gguf_type, rows, tmp_path):
    """Transposed and fused weights among them, and models of few positions."""
    changes = CHANGES.get(family, {}) | {"num_hidden_layers": 1}
    if gguf_type == "q6_k":  # narrower rows fall back to q8_0, whose codes are the nearest ones
        changes |= {"hidden_size": 256, "intermediate_size": 256}
    base = write_chat_base(family, tmp_path / "base", **changes)
    artifact = artifact_of(write_adapter(tmp_path / "adapter", base, lora_alpha=2))
    kl = {}
    for calibration in (str(rows), "none"):
        made = options(calibration, format=form, gguf_type=gguf_type, base="dequantized", verify=True,
                       verify_data=str(rows))  # fmt: skip
        kl[calibration] = export_merged(artifact, tmp_path / Path(calibration).stem, made).proof.agreement.mean_kl
    assert kl[str(rows)] < 0.8 * kl["none"]


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("calibrated", [True, False])
def test_values_that_are_no_numbers_are_refused(name, calibrated, rows, tmp_path):
    base = write_chat_base("llama", tmp_path / "base", num_hidden_layers=1)
    artifact = artifact_of(write_adapter(tmp_path / "adapter", base))
    tensors = load_file(base / "model.safetensors")
    tensors[name][1, 2] = float("nan")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    artifact = artifact_of(tmp_path / "adapter", model=str(base))
    with pytest.raises(UserError, match=f"tensor {name}: 1 of its .* values is no finite number"):
        export_merged(artifact, tmp_path / "out", options(rows if calibrated else "none"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_family_whose_layers_are_not_known_is_made_without_rows(rows, tmp_path, caplog, monkeypatch):
    base = write_chat_base("llama", tmp_path / "base", num_hidden_layers=1)
    artifact = artifact_of(write_adapter(tmp_path / "adapter", base))
    for module in ("moments", "write"):
        monkeypatch.setattr(f"qlora_tool.export.{module}.decoder_layers", lambda model: {})
    found = calibration_rows(artifact, str(rows))
    monkeypatch.setattr("qlora_tool.export.rows.calibration_rows", lambda *_: found)
    with caplog.at_level("WARNING"):
        said = export_merged(artifact, tmp_path / "out", NF4).facts["encoding"]
    assert "no decoder layers are found" in caplog.text and said["calibration"] is None
    with pytest.raises(UserError, match="--calibration: no decoder layers are found in a llama model; choose"):
        export_merged(artifact, tmp_path / "other", options(rows))


def test_where_no_type_keeps_enough_the_one_that_keeps_most_is_made(adapter, rows, tmp_path, caplog, monkeypatch):
    shares = iter([0.7, 0.9, 0.8, 0.9])  # of q6_k, q8_0, f16, and q8_0 again
    known: dict[Agreement, float] = {}

    def share(self: Agreement) -> float:
        if self not in known:
            known[self] = next(shares)
        return known[self]

    monkeypatch.setattr(Agreement, "gain_kept", property(share))
    count = itertools.count()  # so that no two are equal
    monkeypatch.setattr(proof, "compare", lambda *of: replace(compare(*of), worst_kl=1.0 + next(count)))
    made = options("none", format="gguf", gguf_type="q6_k", min_kept=0.95, verify=True, verify_data=str(rows))
    with caplog.at_level("WARNING"):
        result = export_merged(artifact_of(adapter), tmp_path / "out", made)
    assert result.dtype == "q8_0" and "no type keeps 95% of what training gained; q8_0 keeps most" in caplog.text
    assert [one["gguf_type"] for one in result.facts["candidates"]] == ["q6_k", "q8_0", "f16"]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| q6_k, tried |" in card and "keeps 90.0%" in card


def test_a_share_without_a_type_is_looked_for_among_all(rows, tmp_path, caplog):
    """And the types that have codes are made with rows, as when one of them is named."""
    asked = ExportOptions(format="gguf", min_kept=0.9)
    assert [one.gguf_type for one in asked.candidates][:2] == ["q4_0", "iq4_nl"]
    assert asked.candidates[-1].gguf_type == "f16" and asked.has_codes and not asked.candidates[-1].has_codes
    base = write_chat_base("llama", tmp_path / "base", num_hidden_layers=1)
    run = write_run(tmp_path / "run", base, learning_rate=2e-2, max_steps=8)
    with caplog.at_level("INFO"):
        result = export_merged(artifact_of(run), tmp_path / "out", options(
            rows, format="gguf", min_kept=0.01, verify=True, verify_data=str(tmp_path / "run.jsonl")))  # fmt: skip
    assert "the nearest ones" not in caplog.text and f"codes are made with 3,304 tokens of {rows}" in caplog.text
    assert result.dtype == "q4_0" and result.facts["encoding"]["calibrated_weights"] == 7


@pytest.mark.parametrize("adapted", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 4]}])
def test_a_type_is_not_chosen_where_the_base_is_not_left(adapted, rows, tmp_path):
    base = write_chat_base("llama", tmp_path / "base", num_hidden_layers=1)
    artifact = artifact_of(write_adapter(tmp_path / "adapter", base, **adapted))
    made = options("none", format="gguf", gguf_type="auto", verify=True, verify_data=str(rows))
    with pytest.raises(UserError, match=r"^--gguf-type auto: what a type keeps is told against the base"):
        export_merged(artifact, tmp_path / "out", made)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
