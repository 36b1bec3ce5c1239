"""The starts of LoRA that leave a frozen part or change the base: what they compute, save, make again, and refuse."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy
import pytest
import torch
from tiny_adapters import IDS, artifact_of, peft_logits, plain_logits, write_chat_base, write_peft_adapter, write_run
from tiny_models import read_by_transformers, write_tiny
from torch import Tensor, nn

from qlora_tool.adapters.adapter import Adapter, generator_for
from qlora_tool.adapters.attach_stored import attach_stored
from qlora_tool.adapters.initial import initial_settings
from qlora_tool.adapters.peft_reading import read_adapter
from qlora_tool.build.build import Start
from qlora_tool.build.open import open_model
from qlora_tool.build.setup import Setup
from qlora_tool.config import AdapterConfig, Config, load_config
from qlora_tool.errors import UserError
from qlora_tool.export.merge import MergedModel
from qlora_tool.export.options import ExportOptions
from qlora_tool.export.write import export_merged
from qlora_tool.files.tensors import Checkpoint
from qlora_tool.inspection.truncate import refuse_truncation, truncate
from qlora_tool.inspection.updates import inspect_adapter
from qlora_tool.methods import METHODS
from qlora_tool.methods.lora import Lora, LoraKeys
from qlora_tool.methods.method import Settings
from qlora_tool.model.load import build_skeleton
from qlora_tool.model.slots import Quantization
from qlora_tool.model.source import read_model_config
from qlora_tool.ops.products import PYTORCH, use_products
from qlora_tool.training.loop import train
from qlora_tool.weights.handles import WeightHandle
from qlora_tool.weights.modules import FrozenLinear
from qlora_tool.weights.quantized import quantize


@pytest.fixture(autouse=True, scope="module")
def own_products():
    use_products(PYTORCH)
    yield
    use_products(None)


OUT, IN, R, ALPHA = 48, 64, 4, 12.0
LORA = METHODS["lora"]


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def settings_of(start: str, **keys) -> Settings:
    return Settings(R, ALPHA, keys=LoraKeys(init_lora_weights=start, **keys))


def frozen_linear(weight: Tensor) -> FrozenLinear:
    linear = FrozenLinear(IN, OUT, nn.Parameter(noise(OUT, seed=9), requires_grad=False))
    linear.weight = WeightHandle(weight)
    return linear


# -------------------------------------------------------------------------------------------------- the symmetric start


def symmetric(linear: FrozenLinear, dtype: torch.dtype = torch.float32) -> Adapter:
    return Adapter.start(LORA, linear, settings_of("symmetric"), dtype, generator_for(0, "a"))


def test_both_sides_of_a_symmetric_start_are_drawn_alike_and_the_first_output_is_the_bases():
    linear = frozen_linear(noise(OUT, IN, seed=1) / 8)
    layer, x = symmetric(linear), noise(20, IN, seed=2)
    lora_A, lora_B = layer.lora_A.detach(), layer.lora_B.detach()
    for tensor, width in ((lora_A, IN), (lora_B, OUT)):  # uniform within ±1/√width: of deviation 1/√(3·width)
        assert float(tensor.abs().max()) <= 1 / math.sqrt(width)
        assert float(tensor.std()) == pytest.approx(1 / math.sqrt(3 * width), rel=0.15)  # of some 200 values
    assert torch.equal(layer.start_A, lora_A) and torch.equal(layer.start_B, lora_B)
    y, base = layer(x, linear).detach(), linear(x)
    term = float((3.0 * x @ lora_A.T @ lora_B.T).abs().max())  # the size of what cancels
    assert float((y - base).abs().max()) < 16 * 2**-24 * (term + float(base.abs().max()))
    assert set(dict(layer.named_parameters())) == {"lora_A", "lora_B"}


@pytest.mark.parametrize("fused", [True, False])
def test_a_symmetric_start_computes_and_derives_as_the_formula_says(fused, monkeypatch):
    monkeypatch.setattr(Lora, "fused", fused)
    linear = frozen_linear(noise(OUT, IN, seed=1) / 8)
    layer, x, grad = symmetric(linear), noise(20, IN, seed=2).requires_grad_(), noise(20, OUT, seed=3)
    with torch.no_grad():
        layer.lora_A.add_(noise(R, IN, seed=4) / 8)
        layer.lora_B.add_(noise(OUT, R, seed=5) / 8)
    trained = [layer.lora_A, layer.lora_B]
    y = layer(x, linear)
    found = [y.detach(), *torch.autograd.grad(y, [x, *trained], grad)]
    x64, A, B = (tensor.detach().double().requires_grad_() for tensor in (x, *trained))
    A0, B0, weight = layer.start_A.double(), layer.start_B.double(), linear.weight.dense(torch.float64)
    y64 = x64 @ (weight + 3.0 * (B @ A - B0 @ A0)).T + linear.bias.double()
    exact = [y64.detach(), *torch.autograd.grad(y64, [x64, A, B], grad.double())]
    for value, expected in zip(found, exact, strict=True):
        assert float((value - expected).abs().max() / expected.abs().max()) < (IN + OUT) * 2**-24
    delta = layer.delta(linear.weight.dense(torch.float32)).detach()
    expected = 3.0 * (B @ A - B0 @ A0).detach()
    assert float((delta - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    merged = layer.merge(linear.weight.dense(torch.float32).clone()).detach()
    assert float((merged - weight - expected).abs().max()) < 1e-5


# ------------------------------------------------------------------------------------------- starts made of the weights


def of_weight(weight: Tensor, settings: Settings, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a start, and the weight that is then quantized."""

    def quantized(part: Tensor) -> Tensor:
        return quantize(part, "nf4").dequantize(torch.float32)

    tensors = LORA.from_weight(weight, settings, dtype, torch.Generator().manual_seed(0), quantized)
    return tensors, LORA.without(tensors, settings, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pissa_takes_out_the_principal_part(dtype):
    weight = noise(OUT, IN, seed=1)
    tensors, rest = of_weight(weight, settings_of("pissa"), dtype)
    left, sizes, right = torch.linalg.svd(weight.double(), full_matrices=False)
    principal = left[:, :R] * sizes[:R] @ right[:R]
    gap = float(sizes[0] / (sizes[R - 1] - sizes[R]))  # by which an error of the decomposition turns its vectors
    step = 2**-24 * gap if dtype == torch.float32 else 2**-8  # of each factor, rounded
    update = 3.0 * tensors["lora_B"].double() @ tensors["lora_A"].double()
    assert float((update - principal).abs().max()) < 8 * step * float(principal.abs().max())
    # Whatever the factors were rounded to, nothing is lost between the two.
    assert float((rest + update - weight).abs().max()) < 2**-23 * float(weight.abs().max())
    assert torch.equal(tensors["start_A"], tensors["lora_A"]) and torch.equal(tensors["start_B"], tensors["lora_B"])


def test_pissa_starts_as_pefts_does():
    import peft

    weight = noise(OUT, IN, seed=1)
    plain = nn.Linear(IN, OUT, bias=False)
    with torch.no_grad():
        plain.weight.copy_(weight)
    config = peft.LoraConfig(r=R, lora_alpha=int(ALPHA), init_lora_weights="pissa", target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(plain), config).base_model.model[0]
    tensors, rest = of_weight(weight, settings_of("pissa"), torch.float32)
    assert torch.allclose(rest, theirs.base_layer.weight, atol=1e-5)
    product = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
    assert torch.allclose(tensors["lora_B"] @ tensors["lora_A"], product, atol=1e-5)


def test_each_step_of_loftq_leaves_less_and_the_first_is_the_best_fit_of_nf4s_error():
    weight = noise(OUT, IN, seed=1)
    errors = []
    for steps in (1, 2, 5):
        tensors, rest = of_weight(weight, settings_of("loftq", loftq_iter=steps), torch.float32)
        base = quantize(rest, "nf4").dequantize(torch.float32)
        errors.append(float((weight - base - 3.0 * tensors["lora_B"] @ tensors["lora_A"]).norm()))
        assert ("start_A" in tensors) == (steps > 1)
        if steps == 1:
            assert rest is weight
            left, sizes, right = torch.linalg.svd(weight - base)
            expected = left[:, :R] * sizes[:R] @ right[:R]
            assert torch.allclose(3.0 * tensors["lora_B"] @ tensors["lora_A"], expected, atol=1e-5)
    assert errors[2] < errors[1] < errors[0] < float((weight - quantize(weight, "nf4").dequantize()).norm())


# ----------------------------------------------------------------------------------------------------------- whole runs

RUNS = {
    "default": {},
    "symmetric": {"init_lora_weights": "symmetric"},
    "stabilised": {"init_lora_weights": "symmetric", "use_rslora": True, "rank_pattern": {"v_proj": 2},
                   "alpha_pattern": {"q_proj": 7.3}},
    "pissa": {"init_lora_weights": "pissa"},
    "patterns": {"init_lora_weights": "pissa_niter_2", "lora_alpha": 7, "rank_pattern": {"v_proj": 3},
                 "use_rslora": True, "alpha_pattern": {"q_proj": 7.3}},
    "loftq": {"init_lora_weights": "loftq"},
    "alternating": {"init_lora_weights": "loftq", "loftq_iter": 3},
    "calibrated": {"init_lora_weights": "calibrated"},
}  # fmt: skip
TAKEN_OUT = ("pissa", "patterns", "alternating")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_base("llama", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory):
    """Each start's run, trained once."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name: str, quantization: str = "nf4", dtype: str = "float32") -> Path:
        path = folder / f"{name}-{quantization}-{dtype}"
        if not path.exists():
            model = {"quantization": quantization, "compute_dtype": dtype}
            write_run(path, base, adapter=RUNS[name], model=model, save_steps=1)
        return path

    return run


@torch.no_grad()
def opened_logits(folder: Path) -> Tensor:
    artifact = artifact_of(folder)
    return open_model(artifact.model, artifact.adapter).module(input_ids=IDS, use_cache=False).logits


@torch.no_grad()
def merged_weights(folder: Path) -> dict[str, Tensor]:
    artifact = artifact_of(folder)
    base = Path(artifact.model.name_or_path)
    merged = MergedModel(build_skeleton(read_model_config(base)), Checkpoint(base), Quantization.of(artifact.model),
                         artifact.adapter, dtype=torch.float32)  # fmt: skip
    return {name: tensor for group in merged.groups for name, tensor in merged.tensors(group).items()}


@pytest.mark.parametrize("name", RUNS)
def test_the_merge_computes_what_was_trained(base, runs, name, tmp_path):
    """And the files of an export, held against the live model."""
    reference = read_by_transformers(base)
    reference.load_state_dict(merged_weights(runs(name)), strict=False)
    found = reference(input_ids=IDS, use_cache=False).logits.detach()
    live = opened_logits(runs(name))
    assert float((found - live).abs().max()) < 1e-4  # fp32 through two layers
    assert float((live - plain_logits(base)).abs().max()) > 0.1
    options = ExportOptions(dtype="float32", verify=True)
    result = export_merged(artifact_of(runs(name)), tmp_path / "merged", options)
    assert result.proof is not None and result.proof.agreement.worst_kl < 1e-6 and not result.proof.warnings()
    assert float((plain_logits(tmp_path / "merged") - live).abs().max()) < 1e-4


@pytest.mark.parametrize("embeddings", ["as_stored", "int8"])
@pytest.mark.parametrize("start", ["pissa", "calibrated"])
def test_a_module_with_nothing_to_start_from_starts_as_default_and_is_named(
    base, start, embeddings, tmp_path, caplog
):
    write_run(tmp_path / "run", base, adapter={"init_lora_weights": start, "target_modules": ["q_proj", "lm_head"]},
              model={"embeddings": embeddings})  # fmt: skip
    said = [line for line in caplog.messages if "has nothing to start from in 1 of 3 modules, such as lm_head" in line]
    assert bool(said) == (start == "calibrated" or embeddings == "as_stored")
    reference = read_by_transformers(base)
    merged = merged_weights(tmp_path / "run")
    reference.load_state_dict(merged, strict=False)
    found = reference(input_ids=IDS, use_cache=False).logits.detach()
    assert float((found - opened_logits(tmp_path / "run")).abs().max()) < 2e-4


@pytest.mark.parametrize("name", RUNS)
def test_what_is_opened_is_the_model_of_the_last_step(base, runs, name):
    """The base to the last bit, and the trained tensors: as the run itself had them."""
    config = load_config(runs(name) / "config.yaml", {"training.max_steps": 4, "training.output_dir": str(runs(name))})
    run = train(config, resume=str(runs(name)), dry_run=True)
    from qlora_tool.training.checkpoints import Checkpoint
    from qlora_tool.training.going_on import checkpoint_at
    from qlora_tool.world import World

    Checkpoint.read(checkpoint_at(runs(name))).load(run.adapters, run.optimizer, World())
    artifact = artifact_of(runs(name))
    opened = open_model(artifact.model, artifact.adapter)
    handles = [module for module in opened.module.modules() if isinstance(module, WeightHandle)]
    own = [module for module in run.model.module.modules() if isinstance(module, WeightHandle)]
    assert len(handles) == len(own) > 14
    for ours, theirs in zip(handles, own, strict=True):
        assert all(torch.equal(tensor, theirs.tensors()[part]) for part, tensor in ours.tensors().items())
    tensors = {name: tensor for name, tensor in opened.module.named_parameters() if "lora_" in name}
    assert tensors
    for key, tensor in run.model.module.named_parameters():
        if "lora_" in key:
            assert torch.equal(tensor, tensors[key])


@pytest.mark.parametrize("name", RUNS)
def test_a_start_resumes_to_the_bit(base, runs, name, tmp_path):
    """Also where the checkpoint was made by another machine, whose decompositions end in other bits."""
    whole = runs(name)
    config = load_config(whole / "config.yaml", {"training.output_dir": str(tmp_path / "again")})
    checkpoint = whole / "checkpoints" / "step-000002"
    train(config, resume=str(checkpoint))
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / "adapter" / file).read_bytes() == (whole / "adapter" / file).read_bytes()


@pytest.mark.parametrize("name", ["symmetric", "stabilised", "loftq", "calibrated"])
def test_peft_reads_what_was_trained_on_the_same_quantized_base(base, runs, name):
    """Its base is the one that was trained on: here with the same values, dequantized."""
    import peft

    artifact = artifact_of(runs(name))
    quantized = open_model(artifact.model)
    reference = read_by_transformers(base)
    with torch.no_grad():
        for key, module in quantized.module.named_modules():
            if isinstance(module, FrozenLinear):
                reference.get_parameter(f"{key}.weight").copy_(module.weight.dense(torch.float32))
    theirs = peft.PeftModel.from_pretrained(reference, runs(name) / "adapter").eval()
    found = theirs(input_ids=IDS, use_cache=False).logits.detach()
    assert float((found - opened_logits(runs(name))).abs().max()) < 1e-5 * 10


@pytest.mark.parametrize("name", ["symmetric", "stabilised", "pissa", "patterns"])
def test_peft_reads_what_was_trained_on_an_unquantized_base(base, runs, name):
    folder = runs(name, "none")
    found = peft_logits(base, folder / "adapter")
    assert float((found - opened_logits(folder)).abs().max()) < 1e-4


@pytest.mark.parametrize("name", TAKEN_OUT)
def test_other_readers_are_told_that_the_quantized_base_was_another(runs, name):
    folder = runs(name) / "adapter"
    readme = (folder / "README.md").read_text()
    assert "export-merged" in readme and RUNS[name]["init_lora_weights"] in readme
    assert json.loads((folder / "adapter_config.json").read_text())["init_lora_weights"] is True
    assert not (runs("loftq") / "adapter" / "README.md").exists()


@pytest.mark.parametrize(("form", "name"), [("adapter", "pissa"), ("adapter", "symmetric"),
                                            ("adapter-portable", "patterns")])  # fmt: skip
def test_an_exported_adapter_is_the_same_adapter_and_says_what_it_needs(base, runs, form, name, tmp_path):
    folder = runs(name, "none")
    export_merged(artifact_of(folder), tmp_path / "a", ExportOptions(format=form))
    assert float((peft_logits(base, tmp_path / "a") - opened_logits(folder)).abs().max()) < 1e-4
    export_merged(artifact_of(runs(name)), tmp_path / "b", ExportOptions(format=form))
    card = (tmp_path / "b" / "README.md").read_text()
    assert f"r 4 from a {RUNS[name]['init_lora_weights']} start" in card
    assert ("without what the adapter took over" in card) == (name in TAKEN_OUT)
    if form == "adapter":
        assert torch.equal(opened_logits(tmp_path / "b"), opened_logits(runs(name)))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_from_an_adapter_of_every_start(base, runs, name, tmp_path):
    stored = read_adapter(runs(name) / "adapter")
    values = initial_settings(stored, AdapterConfig())
    assert (values["adapter.r"], values["adapter.lora_alpha"]) == (4, RUNS[name].get("lora_alpha", 32))
    write_run(tmp_path / "more", base, adapter={"init_from": str(runs(name) / "adapter"), "r": 4}, learning_rate=1e-12)
    assert float((opened_logits(tmp_path / "more") - opened_logits(runs(name))).abs().max()) < 1e-4
    found = json.loads((tmp_path / "more" / "adapter" / "qlora_tool.json").read_text()).get("start") or {}
    if name not in ("loftq", "calibrated"):  # plain by now
        assert found == stored.start


@pytest.mark.parametrize("name", ["pissa", "alternating"])
def test_a_cached_base_is_the_same_base_with_the_same_start(base, runs, name, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(tmp_path / "cache"))
    from qlora_tool.methods import starts

    expected = (runs(name) / "adapter" / "adapter_model.safetensors").read_bytes()
    for number in range(2):
        write_run(tmp_path / f"run{number}", base, adapter=RUNS[name], model={"keep_quantized": True}, save_steps=1)
        assert (tmp_path / f"run{number}" / "adapter" / "adapter_model.safetensors").read_bytes() == expected
        monkeypatch.setattr(starts, "of_weight", lambda *_: pytest.fail("the second run makes nothing again"))
    monkeypatch.undo()


def test_the_start_of_a_run_in_bf16_keeps_its_base_too(runs):
    """Its adapters, and so what was taken out, are rounded to bf16: the base is without exactly that."""
    live, merged = opened_logits(runs("pissa", "nf4", "bfloat16")), merged_weights(runs("pissa", "nf4", "bfloat16"))
    reference = read_by_transformers(Path(artifact_of(runs("pissa", "nf4", "bfloat16")).model.name_or_path))
    reference.load_state_dict(merged, strict=False)
    assert float((reference(input_ids=IDS, use_cache=False).logits.detach() - live).abs().max()) < 1e-4


def test_the_first_loss_of_a_symmetric_start_is_the_bases(base, tmp_path):
    """Before the first step, and in it: with dropout, which drops the same of both terms."""
    losses = {}
    for start in ("default", "symmetric"):
        write_run(tmp_path / start, base, adapter={"init_lora_weights": start, "lora_dropout": 0.3}, max_steps=1,
                  logging_steps=1, data={})  # fmt: skip
        state = json.loads(next((tmp_path / start / "checkpoints").iterdir()).joinpath("state.json").read_text())
        metrics = json.loads((tmp_path / start / "metrics.jsonl").read_text().splitlines()[0])
        losses[start] = state["untuned"]["loss"], metrics["loss"]
    assert losses["symmetric"] == pytest.approx(losses["default"], rel=1e-6)


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"adapter.init_lora_weights": "loftq", "model.quantization": "none"}, "none leaves no error"),
        ({"adapter.init_lora_weights": "calibrated", "model.quantization": "none"}, "none leaves no error"),
        ({"adapter.init_lora_weights": "pissa", "adapter.method": "dora"}, "method dora starts at the base's own"),
        ({"adapter.init_lora_weights": "symmetric", "adapter.method": "dora"}, "method dora starts at the base's own"),
        ({"adapter.loftq_iter": 2}, "set init_lora_weights: loftq"),
        ({"adapter.init_lora_weights": "pissa_niter_0"}, "pissa_niter_N"),
        ({"adapter.init_lora_weights": "pisa"}, "pissa"),
    ],
)
def test_a_start_that_makes_no_sense_is_one_line(values, line):
    with pytest.raises(UserError) as raised:
        load_config({}, values)
    (found,) = raised.value.lines
    assert line in found and "\n" not in found


@pytest.mark.parametrize("start", ["pissa", "loftq", "calibrated"])
def test_a_base_that_is_quantized_already_is_one_line(base, start, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(base, quantization_config=how).save_pretrained(tmp_path / "nf4")
    for file in base.glob("*token*"):
        (tmp_path / "nf4" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError) as raised:
        write_run(tmp_path / "run", tmp_path / "nf4", adapter={"init_lora_weights": start})
    (line,) = raised.value.lines
    assert "already quantized as nf4" in line and "16-bit" in line


def test_a_rank_above_a_weights_own_is_told_before_weights_are_read(tmp_path):
    folder = write_tiny("llama", tmp_path)
    config = Config.model_validate({
        "model": {"name_or_path": str(folder), "device": "cpu"}, "adapter": {"r": 65, "init_lora_weights": "pissa"},
    })  # fmt: skip
    next(folder.glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match="takes the 65 largest parts of a weight, but one of"):
        Setup.of(config)


def test_a_base_that_was_quantized_for_another_adapter_is_one_line(base, runs):
    """Both ways: a plain adapter on a base that lacks a part, and one that needs such a base on a whole one."""
    pissa, plain = artifact_of(runs("pissa")), artifact_of(runs("symmetric"))
    for opened, other in ((pissa, plain), (plain, pissa)):
        model = open_model(opened.model, opened.adapter)
        with pytest.raises(UserError) as raised:
            attach_stored(model.module, other.adapter)
        (line,) = raised.value.lines
        assert "quantized whole" in line and "without what" in line and "export each merged" in line


def test_without_its_adapters_such_a_base_is_no_reference(runs):
    """A symmetric start's base is."""
    for name in ("pissa", "symmetric"):
        config = load_config(runs(name) / "config.yaml")
        built = Setup.of(config).build(start=Start())
        if name == "pissa":
            with pytest.raises(UserError, match="no untrained model to compare with"), \
                    built.adapters.disabled(built.model.module):
                pass
            continue
        with torch.no_grad(), built.adapters.disabled(built.model.module):
            found = built.model.module(input_ids=IDS, use_cache=False).logits
            plain = open_model(config.model).module(input_ids=IDS, use_cache=False).logits
        assert torch.equal(found, plain)


def test_a_run_whose_adapters_stay_as_they_started_says_so(base, tmp_path):
    write_run(tmp_path / "run", base, adapter={"init_lora_weights": "symmetric"}, learning_rate=1e-30)
    config = load_config(tmp_path / "run" / "config.yaml", {"training.output_dir": str(tmp_path / "again")})
    run = train(config)
    assert run.outcome is not None and not run.outcome.learned
    assert run.outcome.warnings[0].startswith("nothing was learned: B is as it started in all 14 adapters")


# ------------------------------------------------------------------------------------- PiSSA's adapters as PEFT saves


@pytest.mark.parametrize(("family", "settings"), [
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "rank_pattern": {"q_proj": 3}}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
])  # fmt: skip
def test_pefts_pissa_is_opened_and_merged_as_peft_loads_it(family, settings, tmp_path):
    base = write_chat_base(family, tmp_path / "base")
    folder = write_peft_adapter(tmp_path / "a", base, init_lora_weights="pissa", base_model_name_or_path=str(base),
                                **settings)  # fmt: skip
    expected = peft_logits(base, folder)
    assert float((expected - plain_logits(base)).abs().max()) > 0.1
    assert artifact_of(folder).model.quantization == "none"
    assert float((opened_logits(folder) - expected).abs().max()) < 1e-4
    reference = read_by_transformers(base)
    reference.load_state_dict(merged_weights(folder), strict=False)
    assert float((reference(input_ids=IDS, use_cache=False).logits.detach() - expected).abs().max()) < 1e-4


def test_pefts_pissa_is_refused_where_its_start_cannot_be_repeated(base, tmp_path):
    options = {"init_lora_weights": "pissa", "base_model_name_or_path": str(base)}
    folder = write_peft_adapter(tmp_path / "a", base, target_modules=["q_proj"], **options)
    for action, line in (
        (lambda: artifact_of(folder, quantization="nf4"), "cannot load it onto another"),
        (lambda: initial_settings(read_adapter(folder), AdapterConfig()), "path_initial_model_for_weight_conversion"),
        (lambda: export_merged(artifact_of(folder), tmp_path / "p", ExportOptions(format="adapter-portable")),
         "readers of portable adapters do not"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=line) as raised:
            action()
        assert len(raised.value.lines) == 1
    head = write_peft_adapter(tmp_path / "b", base, target_modules=["q_proj", "lm_head"], **options)
    for open_it in (opened_logits, merged_weights):
        with pytest.raises(UserError, match="out of lm_head, where it cannot be repeated here"):
            open_it(head)


def test_an_adapter_whose_base_lacks_a_part_is_not_cut(runs, tmp_path):
    with pytest.raises(UserError, match=r"without the part that its start took out \(pissa\)") as raised:
        refuse_truncation(artifact_of(runs("pissa")), 2, tmp_path / "cut")
    assert len(raised.value.lines) == 1


def test_a_symmetric_start_is_inspected_and_cut_as_the_update_of_its_base(base, runs, tmp_path):
    """Of rank 2r: sBA − sB₀A₀, whose singular values are numpy's."""
    artifact = artifact_of(runs("symmetric"))
    found = inspect_adapter(artifact)
    for module in found.modules:
        layer = artifact.adapter.layers(torch.float32)[module.name]
        delta = layer.delta(torch.zeros(module.out_features, module.in_features)).detach().double()
        expected = numpy.linalg.svd(delta.numpy(), compute_uv=False)[: len(module.spectrum.values)]
        assert numpy.allclose(module.spectrum.values, expected, atol=1e-6 * expected[0])
    truncate(artifact, found, 7, tmp_path / "cut", None)
    assert float((opened_logits(tmp_path / "cut") - opened_logits(runs("symmetric"))).abs().max()) < 0.5
    assert "start" not in json.loads((tmp_path / "cut" / "qlora_tool.json").read_text())
