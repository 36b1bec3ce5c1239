"""A weighted sum of adapters merged: Σ wᵢΔᵢ on one base, against sums by hand, PEFT, and the live model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_adapters import (
    FP32,
    IDS,
    artifact_of,
    plain_logits,
    write_adapter,
    write_peft_adapter,
    write_run,
)
from tiny_models import read_by_transformers, write_tiny

from qlora_tool import UserError, api
from qlora_tool.artifacts import BaseOptions
from qlora_tool.build.open import open_model
from qlora_tool.export.options import ExportOptions
from qlora_tool.export.proof import measure_update, open_live
from qlora_tool.export.write import export_merged
from qlora_tool.inference.several import find_several
from qlora_tool.methods import METHODS

OPTIONS = ExportOptions(dtype="float32")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory):
    parent = tmp_path_factory.mktemp("bases")
    return lambda family: parent / family if (parent / family).exists() else write_tiny(family, parent / family)


def summed(base: Path, given: Sequence[str], **options):
    return find_several(str(base), given, BaseOptions(**FP32, **options), weighted=True).summed()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


STACKS = {
    "lora and others": ("llama", [{}, {"method": "loha", "r": 2}, {"method": "lokr"}, {"method": "vera"}]),
    "patterns": ("llama", [{"use_rslora": True, "rank_pattern": {"q_proj": 2}}, {"target_modules": ["q_proj"]}]),
    "Conv1D": ("gpt2", [{}, {"target_modules": ["c_attn"]}]),
    "replaced": ("llama", [{"modules_to_save": ["lm_head", "norm"]}, {"modules_to_save": ["norm", "v_proj"]}]),
    "replaced Conv1D": ("gpt2", [{"target_modules": ["c_attn"], "modules_to_save": ["c_fc"]}, {}]),
    "biases": ("llama-biased", [{"bias": "all", "target_modules": ["q_proj"]}, {"bias": "lora_only"}]),
    "symmetric": ("llama", [{"init_lora_weights": "symmetric"}, {}]),
    "embeddings": ("llama", [{"target_modules": ["embed_tokens", "q_proj"]}, {"target_modules": ["lm_head"]}]),
    "rows": ("llama", [{"trainable_token_indices": [3, 5], "target_modules": ["q_proj"]},
                       {"target_modules": ["embed_tokens", "lm_head"]},
                       {"trainable_token_indices": {"embed_tokens": [5, 8], "lm_head": [9, 3]}}]),
    "rows, tied": ("llama-tied", [{"trainable_token_indices": [3, 5]}, {"trainable_token_indices": [5, 2]}]),
    "rows and whole": ("llama", [{"trainable_token_indices": [3, 5]}, {"modules_to_save": ["embed_tokens"]}]),
    "full": ("llama", [{"method": "full", "quantization": "none"}, {"quantization": "none"}]),
    "experts": ("qwen3_moe", [{"target_parameters": ["mlp.experts.down_proj"]},
                              {"target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]}]),
}  # fmt: skip
WEIGHTS = (0.7, -0.4, 1.0, 2.5)


@pytest.mark.parametrize("name", STACKS)
def test_it_is_the_weighted_sum_and_the_live_model(bases, tmp_path: Path, name: str):
    """Of what each adapter alone, merged, adds to the dequantized base; and the logits are the live model's."""
    family, settings = STACKS[name]
    base = bases(family)
    given, alone = [], []
    for number, (weight, own) in enumerate(zip(WEIGHTS, settings, strict=False)):
        adapter = write_adapter(tmp_path / str(number), base, **own)
        given.append(f"n{number}={adapter}:{weight}")
        export_merged(artifact_of(adapter), tmp_path / f"alone{number}", OPTIONS)
        alone.append((weight, tensors_of(tmp_path / f"alone{number}")))
    artifact = summed(base, given)
    export_merged(artifact, tmp_path / "merged", OPTIONS)
    plain = dense(artifact_of(tmp_path / "0"))
    found = tensors_of(tmp_path / "merged")
    changed = 0
    for key, tensor in found.items():
        start = plain[key].double() if key in plain else alone[0][1][key].double()
        deltas = [weight * (own[key].double() - start) for weight, own in alone]
        scale = float(start.abs().max()) + sum(float(delta.abs().max()) for delta in deltas)
        # fp32's rounding of a few sums, and of the parts.
        torch.testing.assert_close(tensor.double(), start + sum(deltas), rtol=0, atol=2e-6 * scale)
        changed += any(float(delta.abs().max()) > 1e-3 for delta in deltas)
    assert changed >= 2
    live = open_live(artifact)
    update = measure_update(live, tmp_path / "merged")
    assert update is not None and update.kept == pytest.approx(1, abs=1e-4)
    expected = live.module(input_ids=IDS, use_cache=False).logits
    logits = plain_logits(tmp_path / "merged")
    torch.testing.assert_close(logits, expected, rtol=0, atol=3e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_rows_of_tokens_alone_are_held_against_the_files(bases, tmp_path: Path, family: str):
    """Those of an output projection are an update of it; a tied one is in the files under the embeddings' name."""
    rows = {"embed_tokens": [3, 5], "lm_head": [5, 8]} if family == "llama" else [3, 5]
    adapter = write_adapter(tmp_path / "a", bases(family), target_modules=[], trainable_token_indices=rows)
    artifact = artifact_of(adapter)
    export_merged(artifact, tmp_path / "merged", OPTIONS)
    update = measure_update(open_live(artifact), tmp_path / "merged")
    assert update is not None and update.kept == pytest.approx(1, abs=1e-4)


def dense(artifact) -> dict[str, torch.Tensor]:
    """The dequantized base alone, by the names and in the orientation of its files."""
    from qlora_tool.export.merge import MergedModel
    from qlora_tool.files.tensors import Checkpoint
    from qlora_tool.model.load import build_skeleton
    from qlora_tool.model.slots import Quantization
    from qlora_tool.model.source import read_model_config

    folder = Path(artifact.model.name_or_path)
    merged = MergedModel(build_skeleton(read_model_config(folder)), Checkpoint(folder),
                         Quantization.of(artifact.model), None, dtype=torch.float32)  # fmt: skip
    return {name: tensor for group in merged.groups for name, tensor in merged.tensors(group).items()}


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_it_is_pefts_weighted_adapter(bases, tmp_path: Path):
    """`add_weighted_adapter` with `combination_type="cat"`, which adds the updates up exactly, unquantized."""
    from peft import PeftModel

    base = bases("llama")
    for name, r in (("a", 4), ("b", 2)):
        write_peft_adapter(tmp_path / name, base, r=r, target_modules="all-linear")
    model = PeftModel.from_pretrained(read_by_transformers(base), tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.6, 1.3], "sum", combination_type="cat")
    model.set_adapter("sum")
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS, use_cache=False).logits
    given = [f"a={tmp_path / 'a'}:0.6", f"b={tmp_path / 'b'}:1.3"]
    export_merged(summed(base, given, quantization="none"), tmp_path / "merged", OPTIONS)
    found = plain_logits(tmp_path / "merged")
    torch.testing.assert_close(found, expected, rtol=0, atol=1.5e-5 * float(expected.abs().max()))


def test_it_is_verified_and_says_what_it_was_made_of(two_runs: Path, tmp_path: Path, capsys):
    result = api.export_merged(two_runs / "sums", tmp_path / "both", adapter={"two": f"{two_runs / 'other'}:0.25"},
                               dtype="float32")  # fmt: skip
    assert result.proof is not None and result.proof.agreement is not None
    assert result.proof.agreement.mean_kl < 1e-9 and result.proof.update.kept == pytest.approx(1, abs=1e-6)
    assert "the live model (quantized base with 1·sums + 0.25·two)" in result.proof.lines()[0]
    for file in ("export.json", "qlora_tool.json"):
        facts = json.loads((tmp_path / "both" / file).read_text())
        stack = facts["provenance"]["stack"] if file == "export.json" else facts["stack"]
        assert [(one["name"], one["weight"], one["method"]) for one in stack] == [
            ("sums", 1.0, "lora"), ("two", 0.25, "lora"),
        ]  # fmt: skip
        assert all(one["files"]["adapter_model.safetensors"] for one in stack)
    card = (tmp_path / "both" / "README.md").read_text()
    assert "| adapter sums | 1 times lora, r 4 |" in card and "| adapter two | 0.25 times lora, r 2 |" in card


def test_one_adapter_of_weight_1_is_the_export_of_it(two_runs: Path, tmp_path: Path):
    """Byte for byte, whichever way it is named."""
    api.export_merged(two_runs / "sums", tmp_path / "one", verify=False)
    api.export_merged(two_runs / "model", tmp_path / "two", adapter=[f"a={two_runs / 'sums'}"], verify=False)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


# ------------------------------------------------------------------------------------------------------- mistakes


def refusal(base: Path, *given: str, **options) -> str:
    with pytest.raises(UserError) as caught:
        api.export_merged(base, base.parent / "never", adapter=given, **options)
    assert not (base.parent / "never").exists()
    (line,) = caught.value.lines
    return line


def test_every_method_that_adds_says_what_scales_it():
    for method in METHODS.values():
        assert bool(method.scales) == (method.additive and method.has_delta), method.name


def test_what_cannot_be_added(two_runs: Path, tmp_path: Path):
    model, sums = two_runs / "model", f"sums={two_runs / 'sums'}"
    dora = write_adapter(tmp_path / "dora", model, method="dora")
    line = refusal(model, sums, f"d={dora}", verify=False)
    assert line.startswith(f"d ({dora}): dora scales the whole weight") and "export it merged alone" in line
    assert "--format adapter" in refusal(model, sums, f"o={two_runs / 'other'}", format="adapter")
    assert "finite number and not 0" in refusal(model, f"{sums}:inf")
    taken = tmp_path / "taken"
    write_run(taken, model, adapter={"init_lora_weights": "pissa"})
    assert "so it is on a base of its own; use it alone" in refusal(model, sums, f"p={taken}")
    with pytest.raises(UserError, match="without the part that its start took out"):
        api.inspect(taken, truncate=1, output_dir=tmp_path / "cut")


def test_a_stack_of_dora_alone_is_that_adapter(two_runs: Path, tmp_path: Path):
    dora = write_adapter(tmp_path / "dora", two_runs / "model", method="dora")
    api.export_merged(two_runs / "model", tmp_path / "merged", adapter=[f"d={dora}"], verify=False, dtype="float32")
    live = open_model(artifact_of(dora).model, artifact_of(dora).adapter).module(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(plain_logits(tmp_path / "merged"), live, rtol=0, atol=1.5e-5 * float(live.abs().max()))
