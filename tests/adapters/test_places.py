"""Adapters on embeddings, output projections and experts, against PEFT in fp32 and by hand."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import read_by_transformers, read_tiny, tokens, write_tiny

from qlora_tool.adapters.attach import AdapterSet, attach
from qlora_tool.adapters.attach_stored import attach_stored
from qlora_tool.adapters.lacking import lacking
from qlora_tool.adapters.peft_files import save_adapter
from qlora_tool.adapters.peft_reading import read_adapter
from qlora_tool.adapters.targets import unmatched_patterns
from qlora_tool.config import AdapterConfig
from qlora_tool.data.batches import collate
from qlora_tool.data.examples import Example
from qlora_tool.errors import UserError
from qlora_tool.methods.lora import Lora
from qlora_tool.model.causal_lm import CausalLM
from qlora_tool.model.load import load_base
from qlora_tool.model.slots import Quantization
from qlora_tool.model.source import read_model_config
from qlora_tool.ops.speeds import PYTORCH

# Logits of tiny models are below 2; a few hundred roundings of 2^-24 each.
FP32 = 1e-5
EMBEDDINGS = {
    "llama": "embed_tokens", "llama-tied": "embed_tokens", "gemma": "embed_tokens", "gemma3_text": "embed_tokens",
    "granite": "embed_tokens", "gpt2": "wte", "gpt_neox": "embed_in", "bloom": "word_embeddings", "mpt": "wte",
    "opt": "embed_tokens", "falcon": "word_embeddings", "qwen3": "embed_tokens",
}  # fmt: skip
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "granitemoe", "olmoe", "phimoe", "deepseek_v3")


@pytest.fixture(autouse=True)
def products_of_pytorch(monkeypatch: pytest.MonkeyPatch):
    """As PEFT's are: which library is faster here, and whether an earlier test asked, decides their last digits."""
    monkeypatch.setattr("qlora_tool.ops.products._choice", PYTORCH)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """A family's model folder, written once."""
    parent = tmp_path_factory.mktemp("models")
    return lambda family: parent / family if (parent / family).exists() else write_tiny(family, parent / family)


def randomized(adapters: AdapterSet) -> AdapterSet:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.normal_(0, 0.1, generator=generator)
    return adapters


def written(model, config: AdapterConfig, base: Path, folder: Path) -> Path:
    """An adapter with random tensors, saved."""
    adapters = randomized(attach(model, config, torch.float32, 0))
    folder.mkdir()
    save_adapter(folder, adapters, config, model, str(base), None)
    return folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(), use_cache=False).logits


def by_peft(base: Path, adapter: Path) -> torch.Tensor:
    return logits(peft.PeftModel.from_pretrained(read_by_transformers(base), adapter).eval())


def by_us(base: Path, adapter: Path) -> torch.Tensor:
    model = read_tiny(base, "none")
    attach_stored(model, read_adapter(adapter))
    return logits(model.eval())


def as_peft_reads_it(folder, family: str, tmp_path: Path, **keys) -> None:
    """The logits of a fresh adapter, of its file read here and of its file read by PEFT are one."""
    base = folder(family)
    model = read_tiny(base, "none")
    untuned = logits(model.eval())
    adapter = written(model, AdapterConfig(r=4, **keys), base, tmp_path / "adapter")
    live = logits(model.eval())
    assert (live - untuned).abs().max() > 1e-3  # it does something
    assert lacking(model, read_adapter(adapter)) == []
    torch.testing.assert_close(by_us(base, adapter), live, rtol=0, atol=FP32)
    torch.testing.assert_close(by_peft(base, adapter), live, rtol=0, atol=FP32)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("family", EMBEDDINGS)
def test_adapters_on_embeddings_are_pefts(folder, family, method, tmp_path):
    as_peft_reads_it(folder, family, tmp_path, target_modules=[EMBEDDINGS[family]], method=method)


def test_dora_on_embeddings_by_its_formula(folder):
    """In fp64, the embeddings turned to (dim, vocabulary); it starts as the base, and is merged as it computes."""
    model = read_tiny(folder("gemma"), "none")
    embeddings, every = model.get_input_embeddings(), torch.arange(131)
    plain, scaled = embeddings.weight.detach().double(), embeddings(every).detach()
    adapters = attach(model, AdapterConfig(r=3, target_modules=["embed_tokens"], method="dora"), torch.float32, 0)
    torch.testing.assert_close(embeddings(every).detach(), scaled, rtol=1e-6, atol=1e-7)
    [layer] = randomized(adapters).layers.values()
    lora_A, lora_B, magnitude = (layer.tensors[name].detach().double() for name in ("lora_A", "lora_B", "magnitude"))
    direction = plain.T + layer.settings.alpha / layer.settings.r * lora_B @ lora_A
    expected = (magnitude / direction.norm(dim=1)).unsqueeze(1) * direction
    torch.testing.assert_close(layer.merge(plain.float()).detach().double(), expected.T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(embeddings(every).detach().double(), 8 * expected.T, rtol=1e-5, atol=1e-6)  # √64


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_the_output_projection_beside_the_embeddings(folder, family, tmp_path):
    as_peft_reads_it(folder, family, tmp_path, target_modules=["embed_tokens", "lm_head", "q_proj"])


@pytest.mark.parametrize("family", EXPERTS)
def test_lora_on_experts_is_pefts(folder, family, tmp_path):
    keys = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": ["q_proj"]}
    if family in ("deepseek_v3", "granitemoe"):
        keys["target_modules"] = ["o_proj"]
    as_peft_reads_it(folder, family, tmp_path, **keys)


@pytest.mark.parametrize("parameter", ["gate_up_proj", "down_proj"])
def test_lora_on_some_experts_weights(folder, parameter, tmp_path):
    as_peft_reads_it(folder, "qwen3_moe", tmp_path, target_parameters=[f"experts.{parameter}"], target_modules=[])


@pytest.mark.parametrize("family", EMBEDDINGS)
def test_rows_of_tokens_are_pefts(folder, family, tmp_path):
    as_peft_reads_it(folder, family, tmp_path, trainable_token_indices=[77, 5, 130, 8])


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
@pytest.mark.parametrize("keys", [
    {"trainable_token_indices": {"embed_tokens": [77, 5], "lm_head": [8, 3, 42]}, "target_modules": ["q_proj"]},
    {"trainable_token_indices": {"lm_head": [8, 3, 42]}},
], ids=str)  # fmt: skip
def test_rows_of_the_output_projection_are_pefts(folder, family, keys, tmp_path):
    as_peft_reads_it(folder, family, tmp_path, **keys)


def test_only_the_rows_of_the_tokens_move(folder):
    """Also where a token comes twice, and one of them never; embeddings in 8 bits start from what they give."""
    quantization = Quantization("nf4", embeddings="int8")
    base = folder("llama-tied")
    model = load_base(base, read_model_config(base), quantization, torch.device("cpu"), torch.float32)
    untuned = logits(model.eval())
    adapters = attach(model, AdapterConfig(target_modules=[], trainable_token_indices=[5, 130]), torch.float32, 0)
    torch.testing.assert_close(logits(model), untuned, rtol=0, atol=1e-6)
    [rows] = adapters.parameters()
    ids = tokens()
    model(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum().backward()
    assert rows.grad is not None and bool(rows.grad[0].any()) and bool(rows.grad[1].any())  # both by the tied head
    with adapters.disabled(model), torch.no_grad():
        rows.add_(1.0)
        torch.testing.assert_close(logits(model), untuned, rtol=0, atol=1e-6)
    embeddings, every = model.get_input_embeddings(), torch.arange(131)
    changed = embeddings(every) - embeddings.weight.rows(every)
    assert changed.abs().amax(1).nonzero().flatten().tolist() == [5, 130]


@pytest.mark.parametrize("keys", [
    {"target_modules": ["embed_tokens", "v_proj"]},
    {"target_modules": ["v_proj"], "trainable_token_indices": [77, 5, 130, 8]},
    {"target_modules": ["v_proj"], "trainable_token_indices": {"embed_tokens": [77], "lm_head": [8, 5]}},
    {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
])  # fmt: skip
def test_pefts_own_files_are_read(folder, keys, tmp_path):
    base = folder("qwen3_moe")
    config = peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, **keys)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(read_by_transformers(base), config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(by_us(base, tmp_path / "adapter"), logits(theirs), rtol=0, atol=FP32)


def test_a_start_on_embeddings_and_experts_is_the_base(folder):
    model = read_tiny(folder("qwen3_moe"), "none")
    untuned = logits(model.eval())
    config = AdapterConfig(target_modules=["embed_tokens"], target_parameters=["gate_up_proj", "down_proj"])
    attach(model, config, torch.float32, 0)
    assert torch.equal(logits(model), untuned)


def test_what_is_written(folder, tmp_path):
    base = folder("qwen3_moe")
    config = AdapterConfig(r=2, target_modules=["embed_tokens"], target_parameters=["gate_up_proj", "down_proj"])
    adapter = written(read_tiny(base, "none"), config, base, tmp_path / "adapter")
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    of_layer = "base_model.model.model.layers.1.mlp.experts"
    expected = {
        "base_model.model.model.embed_tokens.lora_embedding_A": (2, 131),
        "base_model.model.model.embed_tokens.lora_embedding_B": (64, 2),
        f"{of_layer}.base_layer.lora_A.weight": (4 * 2, 64), f"{of_layer}.base_layer.lora_B.weight": (128, 2 * 4),
        f"{of_layer}.lora_A.weight": (4 * 2, 64), f"{of_layer}.lora_B.weight": (64, 2 * 4),
    }  # fmt: skip
    assert expected.items() <= shapes.items()
    saved = json.loads((adapter / "adapter_config.json").read_text())
    assert saved["target_modules"] == ["embed_tokens"]
    assert saved["target_parameters"][0] == "model.layers.0.mlp.experts.down_proj"


@pytest.mark.parametrize("family, keys, message", [
    ("llama", {"target_parameters": ["experts.gate_up_proj"]}, "target_parameters.*matches no weight of experts"),
    ("mixtral", {"target_parameters": ["gate_up"]}, "matches no weight of experts; it has experts.down_proj"),
    ("llama", {"target_parameters": ["o_proj.weight"]}, "a linear module: name o_proj in adapter.target_modules"),
    ("mixtral", {"target_parameters": ["down_proj"], "method": "dora"}, "dora cannot be on experts; choose lora"),
    ("mixtral", {"target_parameters": ["down_proj"], "lora_dropout": 0.1}, "lora_dropout: PEFT has no dropout on exp"),
    ("llama", {"target_modules": ["embed_tokens"], "method": "loha"}, "are embeddings, which adapter.method loha"),
    ("phi3", {"target_modules": ["qkv_proj.w"]}, "qkv_proj has no part 'w'.*it has q, k, v"),
    ("llama", {"target_modules": ["q_proj.q"]}, "q_proj has no part 'q'; no parts of it are known; name it as a whole"),
    ("phi3", {"target_modules": ["qkv_proj.q", "qkv_proj"]}, "is named as a whole and by its part 'q'"),
    ("phi3", {"target_modules": ["qkv_proj.q"], "method": "loha"}, "cannot be on a part of a projection"),
    ("phi3", {"target_modules": ["qkv_proj.q"], "init_lora_weights": "symmetric"}, "is of a part"),
    ("llama", {"trainable_token_indices": [131]}, "131, but model.embed_tokens has rows 0 to 130"),
    ("llama", {"trainable_token_indices": [3, 4, 3]}, "3 is there twice for model.embed_tokens"),
    ("llama", {"trainable_token_indices": {"embed_token": [3]}}, "is no embeddings or output.*did you mean 'embed_to"),
    ("llama", {"trainable_token_indices": [3], "modules_to_save": ["embed_tokens"]}, "or trained in full"),
])  # fmt: skip
def test_what_cannot_be(folder, family, keys, message):
    with pytest.raises(UserError, match=message):
        attach(read_tiny(folder(family), "none"), AdapterConfig(**keys), torch.float32, 0)


@pytest.mark.parametrize("keys", [
    {"modules_to_save": ["lm_head"]}, {"target_modules": ["lm_head", "q_proj"]},
    {"target_modules": ["embed_tokens", "lm_head"]},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_trained_output_projection_takes_its_loss_in_chunks(folder, keys, label_smoothing):
    """Loss and gradients are those of full logits; 128 rows a chunk, so of 300 two and a rest."""
    model = read_tiny(folder("llama"), "none")
    parameters = randomized(attach(model, AdapterConfig(r=4, **keys), torch.float32, 0)).parameters()
    lm = CausalLM(model, folder("llama"), Quantization("none"), torch.float32)
    ids = torch.randint(3, 131, (5, 61), generator=torch.Generator().manual_seed(0))
    rows = [[Example(row, [-100, *row[1:]], "here")] for row in ids.tolist()]
    batch = collate(rows, pad_token_id=0, packing=False)
    found = torch.autograd.grad(loss := lm.loss_sum(batch, label_smoothing), parameters)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    full = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum",
                                             label_smoothing=label_smoothing)  # fmt: skip
    expected = torch.autograd.grad(full, parameters)
    torch.testing.assert_close(loss, full, rtol=1e-5, atol=0)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


PARTS = [
    ("phi3", ["qkv_proj.q", "qkv_proj.v"]), ("phi3", ["gate_up_proj.up", "o_proj"]),
    ("gpt_neox", ["query_key_value.k"]), ("falcon", ["query_key_value.v", "query_key_value.q"]),
    ("bloom", ["query_key_value.q"]),
    ("gpt2", ["c_attn.q", "c_attn.v"]), ("gpt_bigcode", ["c_attn.k"]), ("mpt", ["Wqkv.v"]), ("codegen", ["qkv_proj.v"]),
    ("glm", ["gate_up_proj.gate"]),
]  # fmt: skip


@pytest.mark.parametrize("family, parts", PARTS, ids=str)
@pytest.mark.parametrize("rslora", [False, True])
def test_parts_of_fused_projections_are_read_by_peft(folder, family, parts, rslora, tmp_path):
    as_peft_reads_it(folder, family, tmp_path, target_modules=parts, use_rslora=rslora)


def test_a_part_trains_its_own_rows_alone(folder):
    """q (64 rows) and v (32) of phi3's 128: as many weights as LoRA on matrices of those sizes, and no other row of the
    merged weight moves."""
    model = read_tiny(folder("phi3"), "nf4")
    adapters = attach(model, AdapterConfig(r=3, target_modules=["qkv_proj.v", "qkv_proj.q"]), torch.float32, 0)
    assert sum(p.numel() for p in adapters.parameters()) == 2 * 3 * (64 + 64 + 64 + 32)
    assert torch.equal(logits(model.eval()), logits(read_tiny(folder("phi3"), "nf4").eval()))
    (layer, *_) = randomized(adapters).layers.values()
    moved = layer.delta(torch.zeros(128, 64)).detach().abs().sum(1) > 0
    assert moved.nonzero().flatten().tolist() == [*range(64), *range(96, 128)]


@pytest.mark.parametrize("keys", [{}, {"use_rslora": True}])
def test_parts_compute_fused_as_plainly(folder, keys, monkeypatch):
    """The fused operation and the plain path: outputs and gradients."""
    found = []
    for fused in (True, False):
        monkeypatch.setattr(Lora, "fused", fused)
        model = read_tiny(folder("phi3"), "nf4")
        adapters = randomized(attach(model, AdapterConfig(target_modules=["qkv_proj.q"], **keys), torch.float32, 0))
        output = model(input_ids=tokens(), use_cache=False).logits
        output.square().mean().backward()
        found.append([output.detach(), *(parameter.grad for parameter in adapters.parameters())])
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_what_is_trained_in_words(folder):
    config = AdapterConfig(target_modules=["q_proj", "embed_tokens"], target_parameters=["down_proj"],
                           trainable_token_indices={"lm_head": [4, 5]}, modules_to_save=["norm"])  # fmt: skip
    adapters = attach(read_tiny(folder("mixtral"), "nf4"), config, torch.float32, 0)
    assert adapters.places == (
        "1 embedding table, 2 linear modules, 2 weights of experts, 1 tensor in full, rows of 2 tokens"
    )


def test_patterns_that_match_nothing_are_said():
    config = AdapterConfig(rank_pattern={"q_prj": 3, "v_proj": 2}, alpha_pattern={"embed_tokens": 3})
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]
    assert unmatched_patterns(names, config) == [
        "adapter.rank_pattern: 'q_prj' matches no adapted module and changes nothing; did you mean 'q_proj'?; there "
        "are q_proj, v_proj",
        "adapter.alpha_pattern: 'embed_tokens' matches no adapted module and changes nothing; there are q_proj, v_proj",
    ]
