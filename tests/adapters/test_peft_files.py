"""Adapters on disk: PEFT reads what is written here and gives the same logits, and the other way round."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_adapters import disturb, peft_logits, write_adapter, write_peft_adapter
from tiny_models import logits, read_by_transformers, read_tiny, tiny_model, tokens, write_tiny
from torch import Tensor

from qlora_tool.adapters.attach import attach
from qlora_tool.adapters.attach_stored import attach_stored
from qlora_tool.adapters.initial import initial_settings
from qlora_tool.adapters.peft_files import save_adapter
from qlora_tool.adapters.peft_reading import read_adapter
from qlora_tool.config import AdapterConfig
from qlora_tool.errors import UserError
from qlora_tool.weights.modules import FrozenLinear

IDS = tokens()
PATTERNS = {"rank_pattern": {"q_proj": 8, "layers.0.mlp.up_proj": 2}, "alpha_pattern": {"v_proj": 16, "q_proj": 3}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory):
    """A family's model folder, written once."""
    parent = tmp_path_factory.mktemp("bases")
    return lambda family: parent / family if (parent / family).exists() else write_tiny(family, parent / family)


def our_logits(base: Path, adapter: Path, quantization: str = "none") -> Tensor:
    model = read_tiny(base, quantization)
    attach_stored(model, read_adapter(adapter), torch.float32)
    return logits(model, IDS)


def assert_same(found: Tensor, expected: Tensor, base: Path) -> None:
    """Equal up to fp32's rounding through two layers (sums of up to 128 products, 128·6e-8 each), and no plain base."""
    assert float((found - expected).abs().max()) < 1e-4
    assert float((found - logits(read_by_transformers(base), IDS)).abs().max()) > 0.1


OURS = [
    ("llama", {}),
    ("llama", {"use_rslora": True, **PATTERNS}),
    ("llama", {"method": "dora", "rank_pattern": {"k_proj": 2}}),
    ("llama", {"target_modules": ["q_proj", "layers.1.mlp.up_proj"]}),
    ("llama", {"target_modules": r".*\.(q|v)_proj", "exclude_modules": ["model.layers.0.self_attn.q_proj"]}),
    ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    ("llama-tied", {"target_modules": ["embed_tokens", "q_proj"], "method": "dora"}),
    ("gemma2", {"target_modules": ["embed_tokens", "q_proj"], "method": "dora"}),  # its embeddings are scaled
    ("llama-tied", {"target_modules": ["lm_head", "q_proj"]}),
    ("llama", {"modules_to_save": ["lm_head"]}),
    ("llama", {"modules_to_save": ["o_proj", "model.norm", "embed_tokens"]}),
    ("llama-tied", {"modules_to_save": ["lm_head"]}),
    ("llama-tied", {"modules_to_save": ["embed_tokens", "lm_head"], "method": "dora"}),
    ("llama-biased", {"bias": "lora_only", "target_modules": ["q_proj", "up_proj"]}),
    ("llama-biased", {"bias": "all", "target_modules": ["q_proj", "up_proj"], "modules_to_save": ["v_proj"]}),
    ("gpt2", {}),
    ("gpt2", {"method": "dora", "use_rslora": True}),
    ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["attn.c_proj", "c_fc"]}),  # one is square
]


@pytest.mark.parametrize(("family", "settings"), OURS)
def test_peft_reads_what_is_written_here(base, tmp_path, family, settings):
    folder = base(family)
    adapter = write_adapter(tmp_path / "a", folder, quantization="none", **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = peft_logits(folder, adapter, IDS)
    assert not [str(warning.message) for warning in caught if "missing adapter keys" in str(warning.message)]
    assert_same(our_logits(folder, adapter), theirs, folder)


PEFTS = [
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": "all-linear", "use_rslora": True, **PATTERNS}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "use_dora": True, "alpha_pattern": {"q_proj": 3}}),
    ("llama", {"target_modules": ["q_proj", "down_proj"], "lora_bias": True, "lora_dropout": 0.5}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    ("llama", {"target_modules": r".*\.[01]\.mlp\.(up|down)_proj", "init_lora_weights": "gaussian"}),
    ("llama", {"target_modules": ["lm_head", "q_proj"]}),  # PEFT writes the layer's own weight along
    ("llama-tied", {"target_modules": ["lm_head", "q_proj"]}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),  # three kinds of norms
    ("llama", {"target_modules": ["q_proj", "gate_proj"], "modules_to_save": ["mlp"]}),
    ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),  # apart from the embedding
    ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    ("llama-biased", {"target_modules": ["q_proj", "up_proj"], "bias": "lora_only"}),
    ("llama-biased", {"target_modules": ["q_proj", "up_proj"], "bias": "all"}),
    ("llama-biased", {"target_modules": ["q_proj", "up_proj"], "lora_bias": True}),
    ("gpt2", {"target_modules": "all-linear", "fan_in_fan_out": True}),
    ("gpt2", {"target_modules": ["c_attn"], "use_dora": True, "bias": "all", "fan_in_fan_out": True}),
    ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["attn.c_proj"], "fan_in_fan_out": True}),
]


@pytest.mark.parametrize(("family", "settings"), PEFTS)
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_what_peft_writes_is_read_here_and_written_back(base, tmp_path, family, settings):
    folder = base(family)
    adapter = write_peft_adapter(tmp_path / "a", folder, base_model_name_or_path=str(folder), **settings)
    theirs = peft_logits(folder, adapter, IDS)
    assert_same(our_logits(folder, adapter), theirs, folder)

    # As a start: what is read is trained on, and saved again it is the same adapter to PEFT.
    model, stored = read_tiny(folder), read_adapter(adapter)
    values = initial_settings(stored, AdapterConfig())
    config = AdapterConfig(**{key.removeprefix("adapter."): value for key, value in values.items()})
    again = tmp_path / "again"
    again.mkdir()
    save_adapter(again, attach_stored(model, stored, torch.float32, 0.0), config, model, str(folder), None)
    assert_same(peft_logits(folder, again, IDS), theirs, folder)


def test_an_adapter_of_a_quantized_base_is_one_of_its_dequantized_weights(base, tmp_path):
    folder = base("llama")
    adapter = write_adapter(tmp_path / "a", folder, quantization="nf4", method="dora")
    reference, quantized = read_by_transformers(folder), read_tiny(folder, "nf4")
    with torch.no_grad():
        for name, module in quantized.named_modules():
            if isinstance(module, FrozenLinear):
                reference.get_parameter(f"{name}.weight").copy_(module.weight.dense(torch.float32))
    plain = logits(reference, IDS)
    theirs = logits(peft.PeftModel.from_pretrained(reference, adapter).eval(), IDS)
    found = our_logits(folder, adapter, "nf4")
    assert float((found - theirs).abs().max()) < 1e-4
    assert float((theirs - plain).abs().max()) > 0.1
    assert float((plain - logits(read_by_transformers(folder), IDS)).abs().max()) > 0.1


def test_the_two_files_are_pefts_and_always_the_same_bytes(base, tmp_path):
    folder = base("llama-biased")
    settings = {"r": 4, "lora_alpha": 8, "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 1}}
    places = {"target_modules": ["up_proj", "q_proj"], "bias": "lora_only", "modules_to_save": ["lm_head"]}
    ours = write_adapter(tmp_path / "ours", folder, quantization="none", **settings, **places)
    again = write_adapter(tmp_path / "again", folder, quantization="none", **settings, **places)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (ours / name).read_bytes() == (again / name).read_bytes()

    theirs = write_peft_adapter(tmp_path / "theirs", folder, base_model_name_or_path=str(folder), **settings, **places)
    tensors, expected = (load_file(path / "adapter_model.safetensors") for path in (ours, theirs))
    assert {name: tensor.shape for name, tensor in tensors.items()} == {n: t.shape for n, t in expected.items()}
    with safe_open(ours / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}

    text = (ours / "adapter_config.json").read_text()
    config = json.loads(text)
    assert list(config) == sorted(config)
    names = [f"model.layers.{index}.mlp.up_proj" for index in range(2)]
    assert config == {
        "base_model_name_or_path": str(folder), "bias": "lora_only", "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "lora_alpha": 8, "lora_bias": False, "lora_dropout": 0.0,
        "modules_to_save": ["lm_head"], "peft_type": "LORA", "r": 4, "revision": None,
        "alpha_pattern": dict.fromkeys(names, 1), "rank_pattern": dict.fromkeys(names, 2),
        "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM", "use_dora": False, "use_rslora": False,
    }  # fmt: skip
    known = peft.LoraConfig().to_dict()
    assert not config.keys() - known.keys()


def test_the_orientation_of_the_base_is_told(base, tmp_path):
    for family, told in (("gpt2", True), ("llama", False)):
        adapter = write_adapter(tmp_path / family, base(family), quantization="none")
        assert json.loads((adapter / "adapter_config.json").read_text())["fan_in_fan_out"] is told


def test_target_modules_are_whole_names_where_last_parts_would_mean_more(base, tmp_path):
    settings = {"target_modules": ["layers.1.self_attn.v_proj", "layers.0.mlp.up_proj"]}
    adapter = write_adapter(tmp_path / "a", base("llama"), quantization="none", **settings)
    written = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    assert written == ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.v_proj"]


def test_bf16_adapters_are_read_in_the_dtype_that_is_asked_for(base, tmp_path):
    model = read_tiny(base("llama"))
    config = AdapterConfig(r=4, target_modules=["q_proj"])
    adapters = attach(model, config, torch.bfloat16, seed=0)
    disturb(adapters.parameters())
    save_adapter(tmp_path, adapters, config, model, "x", None)
    stored = read_adapter(tmp_path)
    assert {tensor.dtype for tensor in stored.tensors.values()} == {torch.bfloat16}
    for dtype in (None, torch.float32):
        loaded = attach_stored(read_tiny(base("llama")), stored, dtype)
        for name, tensor in loaded.tensors().items():
            assert tensor.dtype == (dtype or torch.bfloat16)
            assert torch.equal(tensor.bfloat16(), adapters.tensors()[name])


# ------------------------------------------------------------------------------------------------------- faults


@pytest.fixture
def adapter(base, tmp_path):
    return write_adapter(tmp_path / "a", base("llama"), quantization="none", target_modules=["q_proj", "up_proj"])


def lines_of(action, *arguments) -> list[str]:
    with pytest.raises(UserError) as error:
        action(*arguments)
    assert not any("\n" in line for line in error.value.lines)
    return error.value.lines


def change_config(adapter: Path, **values) -> Path:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({k: v for k, v in (json.loads(file.read_text()) | values).items() if v is not ...}))
    return file


def change_tensors(adapter: Path, change) -> Path:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return file


PREFIX = "base_model.model."
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' cannot be read here; expected one of LORA, LOHA"),
        ({"use_dora": True, "target_parameters": ["experts.down_proj"]}, "target_parameters is set"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4' changed the base too"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora' changed the base too"),
        ({"lora_alpha": ...}, "no key 'lora_alpha'"),
    ],
)
def test_adapters_of_other_kinds_are_refused(adapter, values, said):
    file = change_config(adapter, **values)
    (line,) = lines_of(read_adapter, adapter)
    assert line.startswith(f"{file}: {said}")


def test_a_folder_without_an_adapter(tmp_path, adapter):
    (line,) = lines_of(read_adapter, tmp_path)
    assert line == (
        f"{tmp_path}: no adapter_config.json in it, so it is not an adapter's folder; the adapter lies in {adapter}"
    )
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    (line,) = lines_of(read_adapter, adapter)
    assert line.startswith(f"{adapter}: no adapter_model.safetensors in it; its weights are a pickle: load and save it")
    (adapter / "adapter_model.bin").unlink()
    assert lines_of(read_adapter, adapter) == [f"{adapter}: no adapter_model.safetensors in it"]


@pytest.mark.parametrize(("text", "said"), [("{", "not JSON"), ("[]", "a list, where a JSON object is expected")])
def test_a_broken_configuration(adapter, text, said):
    (adapter / "adapter_config.json").write_text(text)
    (line,) = lines_of(read_adapter, adapter)
    assert line.startswith(f"{adapter / 'adapter_config.json'}: {said}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{PREFIX}{Q_PROJ}.lora_B.weight"), f"tensor {Q_PROJ}.lora_B.weight is missing"),
        (lambda t: t.pop(f"{PREFIX}{Q_PROJ}.lora_A.weight"), f"tensor {Q_PROJ}.lora_A.weight is missing"),
        (lambda t: t.update({f"{PREFIX}{Q_PROJ}.lora_C.weight": torch.zeros(1)}),
         f"tensor {Q_PROJ}.lora_C.weight cannot be read here"),
        (lambda t: t.update({f"{PREFIX}{Q_PROJ}.lora_A.weight": torch.zeros(3, 64)}),
         f"the tensors of {Q_PROJ} do not fit together: lora_A.weight (3, 64), lora_B.weight (64, 4)"),
        (lambda t: t.clear(), "no LORA tensors in it"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_make_up_layers(adapter, change, said):
    file = change_tensors(adapter, change)
    (line,) = lines_of(read_adapter, adapter)
    assert line.startswith(f"{file}: {said}")


def test_a_dora_adapter_without_lengths(adapter):
    change_config(adapter, use_dora=True)
    lines = lines_of(read_adapter, adapter)
    file = adapter / "adapter_model.safetensors"
    assert sorted(lines)[-1] == f"{file}: tensor model.layers.1.self_attn.q_proj.lora_magnitude_vector is missing"
    assert len(lines) == 4


def test_an_adapter_for_another_model_is_refused_in_one_report(base, tmp_path, adapter):
    lines = lines_of(attach_stored, read_tiny(base("gpt2")), read_adapter(adapter))
    assert (
        lines[0]
        == f"{adapter}: adapts {Q_PROJ.replace('self_attn.q', 'mlp.up')}, which is not a linear module of this model"
    )
    assert lines[-2:] == [f"{adapter}: and 1 more like these",
                          f"{adapter}: name the base that it was trained on, {base('llama')}"]  # fmt: skip
    assert len(lines) == 5
    other = write_tiny("llama", tmp_path / "wide", intermediate_size=192)
    lines = lines_of(attach_stored, read_tiny(other), read_adapter(adapter))
    assert lines[0] == f"{adapter}: adapts model.layers.0.mlp.up_proj as (128, 64), but it is (192, 64) in this model"
    assert len(lines) == 3


def test_whole_tensors_that_do_not_fit_are_refused(base, tmp_path):
    adapter = write_adapter(
        tmp_path / "a", base("llama"), quantization="none", modules_to_save=["lm_head", "model.norm"]
    )
    larger = write_tiny("llama", tmp_path / "larger", vocab_size=133)
    lines = lines_of(attach_stored, read_tiny(larger), read_adapter(adapter))
    assert lines[0].startswith(
        f"{adapter}: replaces lm_head.weight as (131, 64), but it is (133, 64) in this model; the vocabulary was "
        "resized to 131 tokens before training: call resize_token_embeddings(131) on the base"
    )
    change_tensors(adapter, lambda t: t.update({f"{PREFIX}model.scale": torch.zeros(1)}))
    lines = lines_of(attach_stored, read_tiny(base("llama")), read_adapter(adapter))
    assert lines[0] == f"{adapter}: replaces model.scale, which is not a parameter of this model"


def test_a_start_from_an_adapter_on_some_layers_names_its_modules(tmp_path):
    """Its own target_modules mean more modules than it is on."""
    stored = read_adapter(made_by_peft(tmp_path, layers_to_transform=[1], layers_pattern="layers"))
    assert stored.by_module and all(".layers.1." in name for name in stored.by_module)
    assert initial_settings(stored, AdapterConfig())["adapter.target_modules"] == sorted(stored.by_module)


def test_a_start_of_its_own_beside_an_adapter_to_start_from_is_refused(tmp_path):
    stored = read_adapter(made_by_peft(tmp_path))
    initial_settings(stored, AdapterConfig(init_lora_weights="default"))
    with pytest.raises(UserError, match=r"adapter\.init_lora_weights: gaussian, but A and B start as"):
        initial_settings(stored, AdapterConfig(init_lora_weights="gaussian"))


def test_the_folder_of_a_run_in_the_place_of_its_adapter(tmp_path):
    made_by_peft(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"a run's adapter is .*adapter"):
        read_adapter(tmp_path)


def made_by_peft(folder: Path, **options) -> Path:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], **options)
    peft.get_peft_model(tiny_model("llama"), config).save_pretrained(folder)
    return folder
