"""Adapters as PEFT's users have them: every option, older names, raw keys; read as PEFT reads them, or refused."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import read_by_transformers, read_tiny, tokens, write_tiny
from transformers import BertConfig, BertLMHeadModel

from qlora_tool.adapters.attach import attach
from qlora_tool.adapters.attach_stored import attach_stored
from qlora_tool.adapters.initial import initial_settings
from qlora_tool.adapters.peft_reading import read_adapter
from qlora_tool.adapters.token_rows import follows
from qlora_tool.build.setup import Setup
from qlora_tool.config import AdapterConfig, Config, with_values
from qlora_tool.errors import UserError
from qlora_tool.export.merge import MergedModel
from qlora_tool.files.tensors import Checkpoint
from qlora_tool.model.load import build_skeleton
from qlora_tool.model.slots import Quantization

FP32 = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """A family's model folder, written once."""
    parent = tmp_path_factory.mktemp("models")
    return lambda family: parent / family if (parent / family).exists() else write_tiny(family, parent / family)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens(), use_cache=False).logits


def made_by_peft(base: Path, adapter: Path, kind=peft.LoraConfig, saves="auto", **keys) -> Path:
    torch.manual_seed(0)
    start = {"init_lora_weights": False} if kind is peft.LoraConfig else {"init_weights": False}
    model = peft.get_peft_model(read_by_transformers(base), kind(**({"r": 3} | start | keys)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    model.save_pretrained(adapter, save_embedding_layers=saves)
    return adapter


def by_peft(base: Path, adapter: Path) -> torch.Tensor:
    return logits(peft.PeftModel.from_pretrained(read_by_transformers(base), adapter))


def by_us(base: Path, adapter: Path) -> torch.Tensor:
    model = read_tiny(base, "none")
    attach_stored(model, read_adapter(adapter))
    return logits(model)


def change(adapter: Path, rename=None, drop=(), **config) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({rename(name) if rename else name: tensor for name, tensor in tensors.items() if name not in drop}, file)
    saved = json.loads((adapter / "adapter_config.json").read_text()) | config
    (adapter / "adapter_config.json").write_text(json.dumps({k: v for k, v in saved.items() if v is not ...}))


# One value of every option that changes what is computed, and pairs of them.
OPTIONS = [
    {"rank_pattern": {"q_proj": 5, r"layers\.0\..*up_proj": 2}}, {"alpha_pattern": {"v_proj": 3, "^model.*q_proj": 7}},
    {"layers_to_transform": [1]}, {"layers_to_transform": 0, "layers_pattern": "layers"},
    {"exclude_modules": ["v_proj"]}, {"exclude_modules": r".*\.1\..*"}, {"use_rslora": True}, {"lora_bias": True},
    {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["norm", "v_proj"]}, {"bias": "all"}, {"bias": "lora_only"},
    {"bias": "all", "modules_to_save": ["o_proj"]}, {"trainable_token_indices": [3, 90]}, {"use_dora": True},
    {"target_modules": r".*layers\.[01]\.self_attn\.(q|k)_proj"}, {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": "all-linear"}, {"lora_alpha": 0.5}, {"init_lora_weights": "mica"}, {"lora_dropout": 0.3},
]  # fmt: skip


def possible(keys: dict) -> bool:
    """Whether PEFT makes such an adapter."""
    on_embeddings = "embed_tokens" in keys.get("target_modules", "")
    by_expression = isinstance(keys.get("target_modules"), str)
    return not (
        ({"use_dora", "lora_bias"} <= keys.keys() or {"use_dora", "init_lora_weights"} <= keys.keys())
        or ("layers_to_transform" in keys and by_expression)
        or (on_embeddings and {"trainable_token_indices", "lora_bias"} & keys.keys())
    )


PAIRS = [one | other for number, one in enumerate(OPTIONS) for other in OPTIONS[number + 1 :: 4]
         if not one.keys() & other.keys() and possible(one | other)]  # fmt: skip


@pytest.mark.parametrize("keys", OPTIONS + PAIRS, ids=str)
def test_every_option_gives_pefts_logits(folder, keys, tmp_path):
    base = folder("llama-biased")
    adapter = made_by_peft(base, tmp_path / "a", **({"target_modules": ["q_proj", "v_proj", "up_proj"]} | keys))
    torch.testing.assert_close(by_us(base, adapter), by_peft(base, adapter), rtol=0, atol=FP32)


@pytest.mark.parametrize("rename", [
    lambda name: re.sub("lora_([AB])[.]weight", r"lora_\1.default.weight", name),
    lambda name: f"_orig_mod.{name}", lambda name: name.replace("model.layers", "model._orig_mod.layers"),
    lambda name: name.removeprefix("base_model.model."),
], ids=["default", "compiled", "a compiled part", "no prefix"])  # fmt: skip
def test_names_of_raw_checkpoints(folder, rename, tmp_path):
    base = folder("llama")
    adapter = made_by_peft(base, tmp_path / "a", target_modules=["q_proj"])
    expected = by_peft(base, adapter)
    change(adapter, rename)
    torch.testing.assert_close(by_us(base, adapter), expected, rtol=0, atol=FP32)


@pytest.mark.parametrize("config", [{"target_modules": ["q_proj"]}, {"exclude_modules": ["v_proj"]}], ids=str)
def test_tensors_that_no_target_names_are_left_out_as_in_peft(folder, config, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("qlora_tool"), "propagate", True)
    base = folder("llama")
    adapter = made_by_peft(base, tmp_path / "a", target_modules=["q_proj", "v_proj"])
    change(adapter, **config)
    torch.testing.assert_close(by_us(base, adapter), by_peft(base, adapter), rtol=0, atol=FP32)
    assert "4 tensors of 2 modules (model.layers.0.self_attn.v_proj …) are not read" in caplog.text


# What each kind of PEFT's file may lack of a layer; VeRA's shared projections are as large as that layer's need.
LACKING = [
    (peft.LoraConfig, {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    (peft.LoraConfig, {"target_modules": "all-linear", "use_dora": True}),
    (peft.LoraConfig, {"target_modules": ["q_proj", "embed_tokens", "down_proj"]}),
    (peft.LoraConfig, {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}),
    (peft.LoraConfig, {"target_modules": r".*layers\.\d\.(self_attn\.q_proj|mlp\.down_proj)"}),
    (peft.LoHaConfig, {"target_modules": ["q_proj", "down_proj"]}),
    (peft.LoKrConfig, {"target_modules": ["q_proj", "down_proj"]}),
    (peft.VeraConfig, {"target_modules": ["q_proj", "down_proj"], "save_projection": False, "d_initial": 0.1}),
]


@pytest.mark.parametrize("kind, keys", LACKING, ids=str)
def test_what_a_file_lacks_starts_fresh_as_in_peft(folder, kind, keys, tmp_path, caplog, monkeypatch):
    """It adds nothing; a run that starts from the file trains it, and a merge leaves it."""
    monkeypatch.setattr(logging.getLogger("qlora_tool"), "propagate", True)
    base = folder("llama")
    adapter = made_by_peft(base, tmp_path / "a", kind, **keys)
    lost = {name for name in load_file(adapter / "adapter_model.safetensors") if ".down_proj." in name
            and (".layers.1." in name or "vera" in name or "embed_tokens" in keys["target_modules"])}  # fmt: skip
    start = "init_lora_weights" if kind is peft.LoraConfig else "init_weights"
    change(adapter, drop=lost, **{start: True})  # the start that adds nothing
    expected = by_peft(base, adapter)
    places = {name.partition(".lora_")[0].partition(".hada_")[0].partition(".lokr_")[0].partition(".vera_")[0]
              .removeprefix("base_model.model.") for name in lost}  # fmt: skip
    torch.testing.assert_close(by_us(base, adapter), expected, rtol=0, atol=FP32)
    assert f"has no tensors for {len(places)} of the" in caplog.text and "base stays as it is there" in caplog.text

    run = with_values(Config(), {"model.name_or_path": str(base), "model.quantization": "none",
                                 "model.compute_dtype": "float32", "model.device": "cpu",
                                 "adapter.init_from": str(adapter)})  # fmt: skip
    built = Setup.of(run).build()
    assert places and places == set(built.adapters.fresh) <= built.adapters.layers.keys()
    assert all(parameter.requires_grad for name in places for parameter in built.adapters.layers[name].parameters())
    assert [line for line in built.remarks if f"has no tensors for {len(places)} of the" in line]
    torch.testing.assert_close(logits(built.model.module), expected, rtol=0, atol=FP32)

    merged = read_by_transformers(base)
    made = MergedModel(build_skeleton(merged.config), Checkpoint(base), Quantization("none"), read_adapter(adapter))
    values = dict(made.stream_from(0))
    merged.load_state_dict(values, strict=False)
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=FP32)


@pytest.mark.parametrize("asked, keys, drop, message", [
    ({"modules_to_save": ["lm_head"]}, {}, "lm_head", r"adapter\.modules_to_save: lm_head is among them, but .*has no "
                                                     "tensor of it"),
    ({"trainable_token_indices": [3, 90]}, {"adapter.trainable_token_indices": [5]}, None,
     r"adapter\.trainable_token_indices: \[5\] of model\.embed_tokens, but .*has rows of \[3, 90\]"),
    ({}, {"adapter.trainable_token_indices": [5]}, None, r"\[5\] of model\.embed_tokens, but .*has rows of none"),
], ids=str)  # fmt: skip
def test_what_is_trained_whole_and_not_in_the_file_is_refused(folder, tmp_path, asked, keys, drop, message):
    """To start from; PEFT cannot load such a file."""
    base = folder("llama")
    adapter = made_by_peft(base, tmp_path / "a", target_modules=["q_proj"], **asked)
    change(adapter, drop={name for name in load_file(adapter / "adapter_model.safetensors") if drop and drop in name})
    run = with_values(Config(), {"model.name_or_path": str(base), "model.quantization": "none", "model.device": "cpu",
                                 "adapter.init_from": str(adapter), **keys})  # fmt: skip
    with pytest.raises(UserError, match=message):
        Setup.of(run)


@pytest.mark.parametrize("left", ["lm_head", "embed_tokens"])
def test_of_tied_tensors_that_are_saved_along_one_stands_for_both(folder, left, tmp_path):
    """As in PEFT, which loads it into the one that they are; live and merged."""
    base = folder("llama-tied")
    adapter = made_by_peft(base, tmp_path / "a", target_modules=["q_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.embed_tokens.weight" if left == "lm_head" else "base_model.model.lm_head.weight"
    tensors[name] = load_file(base / "model.safetensors")["model.embed_tokens.weight"] * 1.5
    save_file(tensors, adapter / "adapter_model.safetensors")
    expected = by_peft(base, adapter)
    torch.testing.assert_close(by_us(base, adapter), expected, rtol=0, atol=FP32)
    merged = read_by_transformers(base)
    made = MergedModel(build_skeleton(merged.config), Checkpoint(base), Quantization("none"), read_adapter(adapter))
    merged.load_state_dict(dict(made.stream_from(0)), strict=False)
    assert not made.unties
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=FP32)


def test_embeddings_saved_along_are_not_trained(folder, tmp_path):
    base = folder("llama")
    adapter = made_by_peft(base, tmp_path / "a", target_modules=["q_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    embeddings = load_file(base / "model.safetensors")["model.embed_tokens.weight"] * 1.5
    tensors["base_model.model.model.embed_tokens.weight"] = embeddings
    save_file(tensors, adapter / "adapter_model.safetensors")
    model = read_tiny(base, "none")
    adapters = attach_stored(model, read_adapter(adapter))
    assert adapters.places == "2 linear modules"
    assert len(adapters.parameters()) == 4 and not model.get_input_embeddings().weight.requires_grad
    torch.testing.assert_close(model.get_input_embeddings().weight, torch.nn.Parameter(embeddings), check_device=False)
    assert "model.embed_tokens.weight" in adapters.peft_tensors()  # they go along with what is saved


@pytest.mark.parametrize("family, container, names", [
    ("qwen3_moe", "mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    ("mixtral", "block_sparse_moe.experts", ("w1", "w3", "w2")),
])  # fmt: skip
def test_experts_of_transformers_4(folder, family, container, names, tmp_path):
    """By hand: each expert's own B·A on its slice; and as PEFT converts it."""
    base, generator, tensors = folder(family), torch.Generator().manual_seed(0), {}
    plain = read_by_transformers(base)
    weights = dict(plain.named_parameters())
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts"
        half = weights[f"{experts}.gate_up_proj"].shape[1] // 2
        for expert in range(4):
            deltas = []
            for name, (rows, columns) in zip(names, [(half, 64), (half, 64), (64, half)], strict=True):
                key = f"base_model.model.model.layers.{layer}.{container}.{expert}.{name}"
                lora_A = torch.randn(3, columns, generator=generator) * 0.1
                lora_B = torch.randn(rows, 3, generator=generator) * 0.1
                tensors |= {f"{key}.lora_A.weight": lora_A, f"{key}.lora_B.weight": lora_B}
                deltas.append(2.0 * lora_B @ lora_A)
            with torch.no_grad():
                weights[f"{experts}.gate_up_proj"][expert] += torch.cat(deltas[:2])
                weights[f"{experts}.down_proj"][expert] += deltas[2]
    (tmp_path / "a").mkdir()
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 6, "target_modules": list(names),
              "base_model_name_or_path": str(base)}  # fmt: skip
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    torch.testing.assert_close(by_us(base, tmp_path / "a"), logits(plain), rtol=0, atol=FP32)


@pytest.mark.parametrize("config, message", [
    ({"lora_alpha": None}, "lora_alpha is None, expected a number"),
    ({"lora_alpha": "16"}, "lora_alpha is '16', expected a number"),
    ({"alpha_pattern": ["q_proj"]}, r"alpha_pattern is \['q_proj'\], expected a mapping"),
    ({"alpha_pattern": {"(": 3}}, "alpha_pattern is {'\\(': 3}, expected a mapping from regular expressions"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern is .*, expected a mapping from regular expressions to ranks"),
    ({"r": 0}, "r is 0, expected a whole number from 1"),
    ({"r": 4}, "are of rank 3, but adapter_config.json says 4; correct r"),
    ({"lora_dropout": 1.0}, "lora_dropout is 1.0, expected a number from 0 to below 1"),
    ({"task_type": "SEQ_CLS"}, "task_type SEQ_CLS: it is for a model with another head"),
    ({"lora_parameters": {"rank": 3}}, "an adapter of mlx-lm, which cannot be read here; fuse it there"),
    ({"layer_replication": [[0, 1]]}, "layer_replication is set"),
    ({"kasa_config": {}}, "kasa_config is set"),
    ({"target_modules": "("}, r"target_modules is '\(', expected a list of names or one regular expression"),
    ({"exclude_modules": "("}, r"exclude_modules is '\('"),
    ({"target_modules": ["v_proj"]}, r"names none of the 2 modules .*q_proj"),
    ({"exclude_modules": ["q_proj"]}, "names none of the 2 modules"),
    ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head', expected a list of names"),
    ({"layers_to_transform": 1.0}, "layers_to_transform is 1.0, expected a whole number or a list"),
    ({"layers_pattern": ["("]}, r"layers_pattern is \['\('\]"),
    ({"bias": ""}, "bias is '', expected one of none, all"),
    ({"use_rslora": "false"}, "use_rslora is 'false', expected true or false"),
    ({"revision": 5}, "revision is 5"),
    ({"lora_bias": True}, "q_proj.lora_B.bias is missing, as lora_bias of adapter_config.json is True"),
    ({"trainable_token_indices": "5"}, "trainable_token_indices is '5'"),
    ({"trainable_token_indices": [3, 3]}, "no two alike"),
    ({"trainable_token_indices": {"embed_tokens": [3]}}, "the file has no rows of tokens"),
], ids=str)  # fmt: skip
def test_what_cannot_be_read_is_one_line(folder, config, message, tmp_path):
    adapter = made_by_peft(folder("llama"), tmp_path / "a", target_modules=["q_proj"])
    change(adapter, **config)
    with pytest.raises(UserError, match=message) as raised:
        read_adapter(adapter)
    assert len(raised.value.lines) <= 2


@pytest.mark.parametrize("kind, weight", [(peft.LoHaConfig, "hada_w1_a"), (peft.LoKrConfig, "lokr_w1"),
                                          (peft.VeraConfig, "vera_lambda_b")])  # fmt: skip
def test_targets_that_name_no_module_of_the_file_are_refused_for_every_method(folder, kind, weight, tmp_path):
    adapter = made_by_peft(folder("llama"), tmp_path / "a", kind, target_modules=["q_proj"])
    assert any(weight in name for name in load_file(adapter / "adapter_model.safetensors"))
    change(adapter, target_modules=["v_proj"])
    with pytest.raises(UserError, match="names none of the 2 modules"):
        read_adapter(adapter)


def test_codes_in_the_place_of_numbers_are_refused(folder, tmp_path):
    adapter = made_by_peft(folder("llama"), tmp_path / "a", target_modules=["q_proj"])
    file = adapter / "adapter_model.safetensors"
    save_file({name: (tensor * 100).to(torch.int8) for name, tensor in load_file(file).items()}, file)
    with pytest.raises(UserError, match=r"4 of its 4 tensors are not floating-point numbers.*torch.int8"):
        read_adapter(adapter)


@pytest.mark.parametrize("family, keys, saves", [
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm", "o_proj"]}, "auto"),
    ("gptj", {"target_modules": ["q_proj"], "modules_to_save": ["ln_1"], "bias": "all"}, "auto"),
    ("qwen2", {"target_modules": ["q_proj"]}, True),
    ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["c_fc", "wpe"]}, "auto"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_what_a_file_in_16_bits_replaces_computes_in_the_bases_dtype(folder, family, keys, saves, dtype, tmp_path):
    base = folder(family)
    adapter = made_by_peft(base, tmp_path / "a", saves=saves, **keys)
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    torch.testing.assert_close(by_us(base, adapter), by_peft(base, adapter), rtol=0, atol=FP32)


@pytest.mark.parametrize("keys", [
    {"target_modules": ["q_proj"], "target_parameters": ["v_proj.weight"]},
    {"target_modules": "all-linear", "exclude_modules": ["v_proj"], "target_parameters": ["v_proj.weight"]},
], ids=str)  # fmt: skip
def test_weights_of_linear_modules_among_target_parameters_are_read(folder, keys, tmp_path):
    base = folder("llama")
    adapter = made_by_peft(base, tmp_path / "a", **keys)
    torch.testing.assert_close(by_us(base, adapter), by_peft(base, adapter), rtol=0, atol=FP32)


@pytest.mark.parametrize("tokens", [[3, 90], {"embed_tokens": [5], "lm_head": [5, 7]}], ids=str)
def test_embeddings_saved_beside_rows_of_tokens_are_read(folder, tokens, tmp_path):
    base = folder("llama")
    adapter = made_by_peft(base, tmp_path / "a", saves=True, target_modules=["q_proj"], trainable_token_indices=tokens)
    assert any("token_adapter.base_layer" in name for name in load_file(adapter / "adapter_model.safetensors"))
    torch.testing.assert_close(by_us(base, adapter), by_peft(base, adapter), rtol=0, atol=FP32)


@pytest.mark.parametrize("family, keys, message", [
    ("gptj", {"trainable_token_indices": {"lm_head": [5]}}, "lm_head has a bias, which PEFT leaves out"),
    ("qwen2", {"target_modules": ["lm_head"], "trainable_token_indices": [5]}, "lm_head has an adapter"),
], ids=str)  # fmt: skip
def test_rows_of_tokens_that_peft_computes_otherwise_are_refused(folder, family, keys, message, tmp_path):
    base = folder(family)
    adapter = made_by_peft(base, tmp_path / "a", **({"target_modules": ["q_proj"]} | keys))
    with pytest.raises(UserError, match=f"trainable_token_indices: {message}"):
        attach_stored(read_tiny(base, "none"), read_adapter(adapter))
    with pytest.raises(UserError, match=f"adapter.trainable_token_indices: {message}"):
        attach(read_tiny(base, "none"), AdapterConfig(**({"target_modules": ["q_proj"]} | keys)), torch.float32, 0)


def test_rows_of_embeddings_that_are_tied_to_what_is_trained_in_full_are_refused(folder):
    """PEFT raises where such a file is opened."""
    config = AdapterConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices=[5])
    with pytest.raises(UserError, match=r"adapter.trainable_token_indices: model.embed_tokens has an adapter, or"):
        attach(read_tiny(folder("qwen2"), "none"), config, torch.float32, 0)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("keys", [
    {"target_modules": ["o_proj"], "target_parameters": ["gate_up_proj", "down_proj"]},
    {"target_modules": ["o_proj"], "target_parameters": ["down_proj"]},
], ids=str)  # fmt: skip
def test_weights_of_experts_by_their_last_name_are_read(folder, family, keys, tmp_path):
    """PEFT itself names them so where it takes target_modules for those of transformers 4 (all-linear, down_proj)."""
    base = folder(family)
    adapter = made_by_peft(base, tmp_path / "a", **keys)
    torch.testing.assert_close(by_us(base, adapter), by_peft(base, adapter), rtol=0, atol=FP32)


def test_a_misfit_on_the_base_that_the_adapter_names_does_not_name_it_as_the_cure(folder, tmp_path):
    base = folder("llama")
    adapter = made_by_peft(base, tmp_path / "a", target_modules=["q_proj"])
    change(adapter, lambda name: name.replace("model.layers", "module.layers"))
    with pytest.raises(UserError, match=r"adapter_config.json names this base.*merge it with what made it"):
        attach_stored(read_tiny(base, "none"), read_adapter(adapter))
    other = folder("mistral")
    with pytest.raises(UserError, match=f"name the base that it was trained on, {base}"):
        attach_stored(read_tiny(other, "none"), read_adapter(adapter))


def test_what_a_run_takes_over_from_an_adapter_that_it_starts_from(folder, tmp_path):
    """Dropout, layers, and names of modules that are there; biases that the file lacks are trained all the same."""
    adapter = made_by_peft(folder("llama-biased"), tmp_path / "a", lora_dropout=0.25, bias="lora_only",
                           target_modules=["q_proj", "v_proj"], modules_to_save=["v_proj"])  # fmt: skip
    biases = {name for name in load_file(adapter / "adapter_model.safetensors") if name.endswith("base_layer.bias")}
    change(adapter, drop=biases, target_modules=["q_proj", "v_proj", "not_there"])
    config = AdapterConfig(init_from=str(adapter))
    decided = initial_settings(read_adapter(adapter), config)
    assert decided["adapter.lora_dropout"] == 0.25 and decided["adapter.target_modules"] == ["q_proj"]
    assert initial_settings(read_adapter(adapter), AdapterConfig(lora_dropout=0.0)).get("adapter.lora_dropout") is None
    run = with_values(Config(), {"model.name_or_path": str(folder("llama-biased")), "model.quantization": "none",
                                 "model.compute_dtype": "float32", "model.device": "cpu",
                                 "adapter.init_from": str(adapter)})  # fmt: skip
    built = Setup.of(run).build()
    assert {name for name in built.adapters.biases if "q_proj" in name} == {
        f"model.layers.{layer}.self_attn.q_proj.bias" for layer in range(2)
    }


def test_a_linear_weight_among_target_parameters_is_that_modules_adapter(folder, tmp_path):
    """PEFT itself names routers so, where its conversions take `gate` for a parameter."""
    base = folder("llama")
    adapter = made_by_peft(base, tmp_path / "a", target_modules=["q_proj"],
                           target_parameters=["o_proj.weight", "1.mlp.up_proj.weight"])  # fmt: skip
    torch.testing.assert_close(by_us(base, adapter), by_peft(base, adapter), rtol=0, atol=FP32)
    run = with_values(Config(), {"model.name_or_path": str(base), "model.quantization": "none", "model.device": "cpu",
                                 "model.compute_dtype": "float32", "adapter.init_from": str(adapter)})  # fmt: skip
    built = Setup.of(run).build()
    assert built.adapters.layers.keys() == read_adapter(adapter).by_module.keys()
    torch.testing.assert_close(logits(built.model.module), by_peft(base, adapter), rtol=0, atol=FP32)


def test_tied_biases_are_no_output_projection():
    """BERT's kind ties a bias, too, which is no module."""
    with torch.device("meta"):
        model = BertLMHeadModel(BertConfig(is_decoder=True, num_hidden_layers=1))
    assert follows(model) == {"bert.embeddings.word_embeddings": "cls.predictions.decoder"}
