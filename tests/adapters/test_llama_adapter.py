"""LLaMA-Adapter: attention to the prompts by the formula in fp64, PEFT both ways, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from one_layer import fill, noise, relative_error
from safetensors.torch import load_file, save_file
from tiny_adapters import artifact_of, write_adapter
from tiny_models import logits, read_by_transformers, read_tiny, tokens, write_tiny
from torch import Tensor

from qlora_tool.adapters.adapter import Adapter
from qlora_tool.adapters.attach import attach
from qlora_tool.adapters.attach_stored import attach_stored
from qlora_tool.adapters.peft_files import save_adapter
from qlora_tool.adapters.peft_reading import read_adapter
from qlora_tool.build.setup import Setup
from qlora_tool.config import AdapterConfig, load_config
from qlora_tool.errors import UserError
from qlora_tool.export.options import ExportOptions
from qlora_tool.export.write import export_merged
from qlora_tool.methods import METHODS
from qlora_tool.methods.method import Settings

HEADS, KEY_HEADS, WIDTH, PROMPTS = 4, 2, 16, 3


def test_each_token_attends_to_the_prompts_alone_behind_the_gate():
    """Against a softmax by hand for each head and token, in fp64."""
    q, k, v = noise(2, HEADS, 5, WIDTH, seed=1), noise(1, KEY_HEADS, PROMPTS, WIDTH, seed=2), noise(
        1, KEY_HEADS, PROMPTS, WIDTH, seed=3
    )
    gate = torch.tensor([0.7])
    adapter = Adapter(METHODS["llama_adapter"], {"adaption_prompt": torch.zeros(1, PROMPTS, 8), "adaption_gate": gate},
                      Settings(1, 1.0))  # fmt: skip
    found = METHODS["llama_adapter"].attended(adapter, q, k, v)
    expected = torch.zeros(2, 5, HEADS, WIDTH, dtype=torch.double)
    for row, head, token in torch.cartesian_prod(torch.arange(2), torch.arange(HEADS), torch.arange(5)).tolist():
        keys, values = (one[0, head // (HEADS // KEY_HEADS)].double() for one in (k, v))
        weights = (keys @ q[row, head, token].double() / WIDTH**0.5).exp()
        expected[row, token, head] = 0.7 * (weights / weights.sum()) @ values
    assert found.shape == (2, 5, HEADS * WIDTH)
    assert relative_error(found.detach(), expected.flatten(2)) < 1e-6


def with_prompts(base: Path, **settings) -> tuple[torch.nn.Module, list[Tensor]]:
    model = read_tiny(base)
    adapters = attach(model, AdapterConfig(method="llama_adapter", **settings), torch.float32, seed=0)
    return model, adapters


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return lambda family: folder / family if (folder / family).exists() else write_tiny(family, folder / family)


def test_the_first_step_is_the_bases_and_moves_the_gate(base):
    model, adapters = with_prompts(base("llama"))
    found = model.eval()(input_ids=tokens(), use_cache=False).logits
    assert torch.equal(found, logits(read_tiny(base("llama")).eval(), tokens()))
    found.square().sum().backward()
    gates = [parameter for name, parameter in adapters.tensors().items() if name.endswith("adaption_gate")]
    assert len(gates) == 2
    assert all(float(gate.grad.abs()) > 0 for gate in gates)
    assert all(not parameter.requires_grad for name, parameter in model.named_parameters() if "adaption" not in name)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "llama-biased", "mistral", "gpt2"])
@pytest.mark.parametrize("settings", [{}, {"adapter_len": 3, "adapter_layers": 1}])
def test_pefts_reading_of_our_file_gives_our_logits(base, tmp_path, family, settings):
    model, adapters = with_prompts(base(family), **settings)
    fill(adapters.parameters())
    config = AdapterConfig(method="llama_adapter", **settings)
    save_adapter(tmp_path, adapters, config, model, str(base(family)), None)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["adapter_len"], written["adapter_layers"]) == (3, 1) if settings else (10, 2)
    assert not {"r", "lora_alpha", "rank_pattern", "modules_to_save"} & written.keys()
    found = logits(model.eval(), tokens())
    theirs = peft.PeftModel.from_pretrained(read_by_transformers(base(family)), tmp_path).eval()
    assert relative_error(found, logits(theirs, tokens())) < 1e-5
    assert relative_error(found, logits(read_tiny(base(family)).eval(), tokens())) > 0.01
    again = read_tiny(base(family))
    attach_stored(again, read_adapter(tmp_path))
    assert torch.equal(logits(again.eval(), tokens()), found)


def saved_by_peft(base: Path, folder: Path, layers: int = 2) -> torch.nn.Module:
    config = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=layers, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(read_by_transformers(base), config).eval()
    fill([parameter for parameter in theirs.parameters() if parameter.requires_grad])
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("family", ["llama", "llama-biased", "mistral", "gpt2"])
def test_our_reading_of_pefts_file_gives_pefts_logits(base, tmp_path, family, layers):
    theirs = saved_by_peft(base(family), tmp_path, layers)
    model = read_tiny(base(family))
    attach_stored(model, read_adapter(tmp_path))
    assert relative_error(logits(model.eval(), tokens()), logits(theirs, tokens())) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_answering_word_by_word_gives_what_one_pass_gives(base, family):
    """With the cache of keys and values: a new token's query is rotated by its own position."""
    model, adapters = with_prompts(base(family))
    fill(adapters.parameters())
    ids, cache, found = tokens(), None, []
    with torch.no_grad():
        for position in range(ids.shape[1]):
            step = model.eval()(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            found.append(step.logits)
    assert relative_error(torch.cat(found, 1), logits(model, ids)) < 1e-5


def test_without_the_adapter_the_base_computes(base):
    model, adapters = with_prompts(base("llama"))
    fill(adapters.parameters())
    with adapters.disabled(model):
        assert torch.equal(logits(model.eval(), tokens()), logits(read_tiny(base("llama")).eval(), tokens()))
    assert relative_error(logits(model, tokens()), logits(read_tiny(base("llama")).eval(), tokens())) > 0.01


@pytest.mark.parametrize("form", ["safetensors", "gguf", "gguf-adapter", "nf4", "adapter-portable"])
def test_every_export_but_the_adapter_is_refused_in_one_line(base, tmp_path, form):
    adapter = write_adapter(tmp_path / "adapter", base("llama"), method="llama_adapter", r=16, lora_alpha=32)
    with pytest.raises(UserError, match=rf"--format {form}: llama_adapter.*set --format adapter") as refused:
        export_merged(artifact_of(adapter), tmp_path / "out", ExportOptions(format=form, verify=False))
    assert len(refused.value.lines) == 1
    assert not (tmp_path / "out").exists()


def test_its_export_is_the_adapter(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", base("llama"), method="llama_adapter", r=16, lora_alpha=32)
    export_merged(artifact_of(adapter), tmp_path / "out", ExportOptions(format="adapter", verify=False))
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == (
        adapter / "adapter_model.safetensors"
    ).read_bytes()


def test_a_family_that_peft_does_not_have_is_refused(base):
    with pytest.raises(UserError, match=r"adapter\.method: llama_adapter .*llama, mistral, gpt2.*this model is bloom"):
        with_prompts(base("bloom"))


def test_more_layers_than_there_are_is_refused(base):
    with pytest.raises(UserError, match=r"adapter\.adapter_layers: 3, but the model has 2 layers"):
        with_prompts(base("llama"), adapter_layers=3)


def test_a_bias_that_counts_twice_is_said(base):
    for family, said in (("llama-biased", 1), ("llama", 0)):
        setup = Setup.of(load_config({
            "model": {"name_or_path": base(family), "compute_dtype": "float32"}, "adapter": {"method": "llama_adapter"},
        }))  # fmt: skip
        assert sum("o_proj has a bias" in remark for remark in setup.build().remarks) == said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"adapter_len": None}, "adapter_len is None"),
        ({"adapter_layers": "2"}, "adapter_layers is '2'"),
        ({"target_modules": "mlp"}, "target_modules is 'mlp'"),
        ({"adapter_layers": 1}, "adapter_layers 1 means the top 1 of the 2 layers"),
        ({"adapter_len": 5}, "do not fit together"),
    ],
)
def test_files_that_peft_would_not_read_so_are_refused(base, tmp_path, change, said):
    saved_by_peft(base("llama"), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=said):
        attach_stored(read_tiny(base("llama")), read_adapter(tmp_path))


def test_an_adapter_for_another_width_is_refused(base, tmp_path):
    saved_by_peft(base("llama"), tmp_path)
    other = write_tiny("llama", tmp_path / "other", hidden_size=128)
    with pytest.raises(UserError, match=r"adapts model\.layers\.0\.self_attn as \(\d+, 64\), but it is \(\d+, 128\)"):
        attach_stored(read_tiny(other), read_adapter(tmp_path))


def test_a_tensor_that_is_missing_is_named(base, tmp_path):
    saved_by_peft(base("llama"), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.model.layers.1.self_attn.adaption_gate"]
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.adaption_gate is missing"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("setting", ["r: 8", "lora_dropout: 0.1", "target_modules: [q_proj]", "bias: all",
                                     "modules_to_save: [lm_head]", "adapter_len: 0"])  # fmt: skip
def test_keys_that_it_does_not_take_are_refused(setting, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"adapter: {{method: llama_adapter, {setting}}}")
    with pytest.raises(UserError, match=rf"adapter\.{setting.partition(':')[0]}"):
        load_config(str(file))
