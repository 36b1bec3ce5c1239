"""Reading a model folder into a quantized model, against transformers and bitsandbytes."""

from __future__ import annotations

import json
import logging

import bitsandbytes.functional as bnb
import pytest
import safetensors.torch
import torch
from tiny_models import (
    FAMILIES,
    logits,
    read_by_transformers,
    read_tiny,
    relative_error,
    tiny_config,
    tiny_model,
    tokens,
    write_tiny,
)
from torch import nn

from qlora_tool.errors import UserError
from qlora_tool.files.tensors import Checkpoint
from qlora_tool.model import load as load_module
from qlora_tool.model import slots as slots_module
from qlora_tool.model.load import build_skeleton
from qlora_tool.model.slots import find_slots
from qlora_tool.weights.handles import WeightHandle, model_tensors
from qlora_tool.weights.modules import FrozenLinear
from qlora_tool.weights.quantized import QuantizedTensor, quantize

# Where both run the same operations in the same order nothing differs; Conv1D's product is a transposed one here.
FP32 = 1e-5


def fault(folder, kind: str = "none", double_quant: bool = True) -> str:
    with pytest.raises(UserError) as raised:
        read_tiny(folder, kind, double_quant)
    (line,) = raised.value.lines
    assert "\n" not in line
    return line


def weights_of(folder) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def write_weights(folder, named) -> None:
    safetensors.torch.save_file({name: t.clone() for name, t in named.items()}, folder / "model.safetensors")


# --------------------------------------------------------------------------------------------------- family by family


@pytest.mark.parametrize("family", [*FAMILIES, "longcat_flash"])
def test_unquantized_every_family_gives_transformers_logits(family, tmp_path):
    folder = write_tiny(family, tmp_path)
    expected = logits(read_by_transformers(folder), tokens())
    assert relative_error(logits(read_tiny(folder), tokens()), expected) <= FP32
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, 9:] = 0
    expected = logits(read_by_transformers(folder), tokens(), attention_mask=mask)[mask.bool()]
    found = logits(read_tiny(folder), tokens(), attention_mask=mask)[mask.bool()]
    assert relative_error(found, expected) <= FP32


@torch.no_grad()
def quantize_in_place(model, kind: str, double_quant: bool) -> list[str]:
    """What is expected of the loader, by bitsandbytes' own functions on transformers' own modules: every linear weight
    (out, in) and every expert's matrix goes through 4 bits, but for the output embeddings and routers."""
    from transformers.pytorch_utils import Conv1D

    def through(matrix):
        codes, state = bnb.quantize_4bit(matrix.contiguous(), quant_type=kind, compress_statistics=double_quant)
        # As one row: bitsandbytes 0.50 gives wrong values on AVX-512 where rows are no whole number of blocks.
        state.shape = torch.Size([1, matrix.numel()])
        return bnb.dequantize_4bit(codes, state).view(matrix.shape)

    changed, output = [], model.get_output_embeddings()
    for name, module in model.named_modules():
        left = name.endswith((".router", *(model._keep_in_fp32_modules or ()))) or module is output
        if isinstance(module, (nn.Linear, Conv1D)) and not left:
            transposed = isinstance(module, Conv1D)
            value = through(module.weight.t() if transposed else module.weight)
            module.weight.copy_(value.t() if transposed else value)
            changed.append(f"{name}.weight")
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and "experts" in name:
                transposed = getattr(module, "is_transposed", False)
                for expert in parameter:
                    value = through(expert.t() if transposed else expert)
                    expert.copy_(value.t() if transposed else value)
                changed.append(f"{name}.{parameter_name}")
    return changed


@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_every_family_gives_the_logits_of_its_quantized_weights(family, tmp_path):
    folder = write_tiny(family, tmp_path)
    reference = read_by_transformers(folder)
    unquantized = logits(reference, tokens())
    changed = quantize_in_place(reference, "nf4", True)
    expected = logits(reference, tokens())
    model = read_tiny(folder, "nf4")
    assert relative_error(logits(model, tokens()), expected) <= FP32
    assert relative_error(expected, unquantized) > 100 * FP32  # so that the line above says something
    handles = {name for name, m in model.named_modules() if isinstance(m, WeightHandle) and m.kind != "none"}
    assert handles == set(changed)


@pytest.mark.parametrize("kind", ["fp4", "int8"])
def test_other_kinds_too(kind, tmp_path):
    folder = write_tiny("llama", tmp_path)
    reference = read_by_transformers(folder)
    if kind == "fp4":
        quantize_in_place(reference, "fp4", False)
    else:
        for name, module in reference.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                codes, scales, _ = bnb.int8_vectorwise_quant(module.weight.detach().half())
                module.weight.data = bnb.int8_vectorwise_dequant(codes, scales)
    found = logits(read_tiny(folder, kind, False), tokens())
    assert relative_error(found, logits(reference, tokens())) <= FP32


@pytest.mark.parametrize("family", ["gemma", "gemma3_text", "llama-tied", "gpt2", "bloom"])
def test_a_checkpoint_in_16_bits_gives_what_transformers_gives_in_fp32(family, tmp_path):
    """Embeddings stay in 16 bits; what comes out of them does not. 192 is no square: gemma scales by its root."""
    size = {"n_embd": 192} if family == "gpt2" else {"hidden_size": 192}
    folder = write_tiny(family, tmp_path, dtype=torch.bfloat16, **size)
    expected = logits(read_by_transformers(folder), tokens())
    assert relative_error(logits(read_tiny(folder), tokens()), expected) <= FP32


# ------------------------------------------------------------------------------------------ what is kept, and in what


def test_what_is_large_stays_in_16_bits_and_what_is_small_does_not(tmp_path):
    model = read_tiny(write_tiny("llama-biased", tmp_path, dtype=torch.bfloat16), "nf4")
    dtypes = {name: tensor.dtype for name, tensor, role in model_tensors(model) if role == "unquantized"}
    assert dtypes.pop("model.rotary_emb.inv_freq") == dtypes.pop("model.rotary_emb.original_inv_freq") == torch.float32
    assert dtypes.pop("model.embed_tokens.weight") == torch.bfloat16
    assert dtypes.pop("lm_head.weight") == torch.bfloat16
    assert set(dtypes.values()) == {torch.float32}
    assert {name.rpartition(".")[2] for name in dtypes} == {"weight", "bias"}  # norms and biases are left
    weights = [m for m in model.modules() if isinstance(m, WeightHandle) and m.kind != "none"]
    assert len(weights) == 2 * 7
    assert {weight.stored().dtype for weight in weights} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    assert not [name for name, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]


def test_a_checkpoint_wider_than_the_products_is_narrowed(tmp_path):
    from qlora_tool.model.load import load_base
    from qlora_tool.model.slots import Quantization

    folder = write_tiny("llama", tmp_path)
    model = load_base(folder, tiny_config("llama"), Quantization("none"), torch.device("cpu"), torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("deepseek_v3", ["mlp.gate.e_score_correction_bias"]),
        ("ernie4_5_moe", ["mlp.gate.weight", "mlp.gate.moe_statics"]),
    ],
)
def test_what_a_family_insists_on_keeping_in_fp32_is_kept_so(family, names, tmp_path):
    """Routing is decided by it; in 16 bits some families' forward passes fail, too."""
    from qlora_tool.model.load import load_base
    from qlora_tool.model.slots import Quantization

    folder = write_tiny(family, tmp_path, dtype=torch.bfloat16)
    model = load_base(folder, tiny_config(family), Quantization("nf4"), torch.device("cpu"), torch.bfloat16)
    wide = [name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32]
    wide = [name for name in wide if not name.endswith(("scales", "nested_offset"))]
    assert wide
    assert all(any(part in name for part in names) for name in wide), wide
    assert logits(model, tokens()).isfinite().all()


def test_a_router_that_derives_from_linear_stays_what_it_is(tmp_path):
    folder = write_tiny("phimoe", tmp_path)
    model = read_tiny(folder, "nf4")
    router = model.get_submodule("model.layers.0.mlp.router")
    assert not isinstance(router, FrozenLinear)
    assert torch.equal(router.weight, read_by_transformers(folder).get_submodule("model.layers.0.mlp.router").weight)


def test_falcons_own_linear_class_is_quantized(tmp_path):
    model = read_tiny(write_tiny("falcon", tmp_path), "nf4")
    assert model.get_submodule("transformer.h.0.self_attention.query_key_value").weight.kind == "nf4"


def test_a_family_that_multiplies_by_a_weight_itself_gets_the_product(tmp_path):
    """mamba's time steps: weight @ x, not the module's own forward pass."""
    folder = write_tiny("mamba", tmp_path)
    reference = read_by_transformers(folder)
    quantize_in_place(reference, "nf4", True)
    assert relative_error(logits(read_tiny(folder, "nf4"), tokens()), logits(reference, tokens())) <= FP32


def test_a_family_that_halves_its_weights_in_place_is_evaluated_as_it_trains(tmp_path):
    """rwkv, whenever it is evaluated: a quantized weight would not come out of that. In training it does not."""
    folder = write_tiny("rwkv", tmp_path)
    expected = logits(read_by_transformers(folder).train(), tokens())
    assert relative_error(logits(read_tiny(folder), tokens()), expected) <= FP32
    assert logits(read_tiny(folder, "nf4"), tokens()).isfinite().all()


def test_slots_leave_the_output_embeddings_out():
    slots = find_slots(build_skeleton(tiny_config("gpt2")))
    assert {name.split(".", 3)[-1] for name in slots} == {
        "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight",
    }  # fmt: skip
    assert all(slot.transposed for slot in slots.values())
    slots = find_slots(build_skeleton(tiny_config("gpt_oss")))
    assert {name.split(".", 3)[-1]: slot.transposed for name, slot in slots.items()} == {
        **{f"self_attn.{part}_proj.weight": False for part in "qkvo"},
        "mlp.experts.gate_up_proj": True,
        "mlp.experts.down_proj": True,
    }


# ------------------------------------------------------------------------------------------------ one after the other


def test_tensors_are_read_one_after_the_other_and_quantized_at_once(tmp_path, monkeypatch):
    """Between two reads nothing is left of the weight before but its quantized form."""
    folder = write_tiny("llama", tmp_path, dtype=torch.bfloat16)
    events = []
    read, quantize = Checkpoint.read, slots_module.quantize
    monkeypatch.setattr(Checkpoint, "read", lambda self, name, *rest: events.append(name) or read(self, name, *rest))
    monkeypatch.setattr(slots_module, "quantize", lambda *rest: events.append("quantized") or quantize(*rest))
    model = read_tiny(folder, "nf4")
    slots = find_slots(build_skeleton(tiny_config("llama")))
    assert [name for name in events if name != "quantized"] == sorted(weights_of(folder))
    assert all(events[index + 1] == "quantized" for index, name in enumerate(events) if name in slots)
    assert events.count("quantized") == len(slots)
    del model


def test_a_group_of_experts_is_gone_before_the_next_is_read(tmp_path, monkeypatch):
    import weakref

    folder = write_tiny("mixtral", tmp_path)
    alive: dict[str, weakref.ref] = {}
    most = 0
    read = Checkpoint.read

    def counted(self, name, *rest):
        nonlocal most
        value = read(self, name, *rest)
        alive[name] = weakref.ref(value)
        most = max(most, sum(reference() is not None for other, reference in alive.items() if ".experts." in other))
        return value

    monkeypatch.setattr(Checkpoint, "read", counted)
    read_tiny(folder, "nf4")
    assert most == 8  # gate and up of a layer's four experts, of 24 tensors in all


# --------------------------------------------------------------------------------------------------------------- ties


def same_storage(model) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight.stored()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("held", ["the embeddings", "the head", "both"])
@pytest.mark.parametrize("family", ["llama-tied", "gemma"])
def test_tied_weights_share_one_parameter_whichever_the_file_holds(family, held, dtype, tmp_path):
    folder = write_tiny(family, tmp_path, dtype=dtype)
    expected = logits(read_by_transformers(folder), tokens())
    named = weights_of(folder)
    assert "lm_head.weight" not in named
    if held != "the embeddings":
        named["lm_head.weight"] = named["model.embed_tokens.weight"]
    if held == "the head":
        del named["model.embed_tokens.weight"]
    write_weights(folder, named)
    model = read_tiny(folder)
    assert same_storage(model)
    assert relative_error(logits(model, tokens()), expected) <= FP32


def test_a_head_that_differs_stays_apart_and_is_told(tmp_path, caplog):
    folder = write_tiny("llama-tied", tmp_path)
    named = weights_of(folder)
    write_weights(folder, named | {"lm_head.weight": named["model.embed_tokens.weight"] * 2})
    with caplog.at_level(logging.WARNING):
        model = read_tiny(folder)
    assert "lm_head.weight" in caplog.text
    assert not same_storage(model)
    assert load_module.tied_names(model) == {}
    assert relative_error(logits(model, tokens()), logits(read_by_transformers(folder), tokens())) <= FP32


def test_nothing_is_tied_where_the_configuration_ties_nothing(tmp_path):
    assert not same_storage(read_tiny(write_tiny("llama", tmp_path)))


# ---------------------------------------------------------------------------------------- checkpoints that do not fit


def test_missing_tensors_are_counted_and_named(tmp_path):
    folder = write_tiny("llama", tmp_path)
    named = weights_of(folder)
    named["model.norms.weight"] = named.pop("model.norm.weight")
    del named["model.layers.1.mlp.up_proj.weight"], named["model.layers.1.mlp.gate_proj.weight"]
    write_weights(folder, named)
    line = fault(folder)
    assert line.startswith(f"{folder}: 3 of the model's 21 tensors are missing")
    assert "model.layers.1.mlp.gate_proj.weight, model.layers.1.mlp.up_proj.weight and 1 more" in line


@pytest.mark.parametrize(
    "families", [("llama", "hidden_size"), ("llama", "vocab_size"), ("mixtral", "intermediate_size")]
)
@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_a_configuration_of_another_size_is_told_apart(families, kind, tmp_path):
    family, key = families
    folder = write_tiny(family, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: config[key] + 64}))
    line = fault(folder, kind)
    assert line.startswith(f"{folder}: tensor ")
    assert "config.json makes it" in line


@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_a_weight_stored_the_wrong_way_round_is_refused(kind, tmp_path):
    folder = write_tiny("llama", tmp_path)
    named = weights_of(folder)
    name = "model.layers.0.mlp.down_proj.weight"
    write_weights(folder, named | {name: named[name].t().contiguous()})
    assert f"tensor {name} has shape (128, 64), but config.json makes it (64, 128)" in fault(folder, kind)


def test_an_expert_that_is_missing_is_told(tmp_path):
    folder = write_tiny("mixtral", tmp_path)
    named = weights_of(folder)
    del named["model.layers.1.block_sparse_moe.experts.2.w1.weight"]
    write_weights(folder, named)
    line = fault(folder)
    assert "model.layers.1.mlp.experts.gate_up_proj" in line
    assert "missing" in line


def test_tensors_without_a_place_are_told_and_left(tmp_path, caplog):
    folder = write_tiny("llama", tmp_path)
    write_weights(folder, weights_of(folder) | {"model.extra": torch.ones(2), "model.other": torch.ones(2)})
    with caplog.at_level(logging.WARNING):
        model = read_tiny(folder)
    assert "2 tensors of the checkpoint are not used by the model: model.extra, model.other" in caplog.text
    assert relative_error(logits(model, tokens()), logits(tiny_model("llama"), tokens())) <= FP32


def test_tensors_that_a_family_always_ignores_are_not_told(tmp_path, caplog):
    folder = write_tiny("llama", tmp_path)
    named = weights_of(folder) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    write_weights(folder, named)
    with caplog.at_level(logging.WARNING):
        read_tiny(folder)
    assert "no place" not in caplog.text


def test_a_truncated_shard_is_named(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert relative_error(logits(read_tiny(tmp_path), tokens()), logits(tiny_model("llama"), tokens())) <= FP32
    shards[1].write_bytes(shards[1].read_bytes()[:-100])
    assert fault(tmp_path).startswith(f"{shards[1]}: truncated")


def test_values_that_int8_cannot_hold_name_the_weight(tmp_path):
    folder = write_tiny("llama", tmp_path)
    named = weights_of(folder)
    named["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e6
    write_weights(folder, named)
    line = fault(folder, "int8")
    assert line.startswith("model.layers.1.mlp.up_proj.weight: int8")
    assert "choose another model.quantization" in line


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("bert", {}, "'bert' is not a causal language model"),
        ("t5", {}, "'t5'"),
        ("llama", {"hidden_act": "nope"}, "nope"),
        ("llama", {"rope_parameters": {"rope_type": "nope", "rope_theta": 1e4}}, "nope"),
    ],
)
def test_what_is_no_causal_language_model_is_told_in_one_line(family, changes, words):
    from transformers import AutoConfig

    config = tiny_config("llama", **changes) if family == "llama" else AutoConfig.for_model(family)
    with pytest.raises(UserError) as raised:
        build_skeleton(config)
    (line,) = raised.value.lines
    assert words in line
    assert "\n" not in line


def test_an_encoder_made_a_decoder_is_accepted():
    from transformers import AutoConfig

    config = AutoConfig.for_model("bert", is_decoder=True, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
    assert find_slots(build_skeleton(config))


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq", "torchao"])
def test_weights_quantized_by_others_are_refused_not_misread(method, tmp_path):
    folder = write_tiny("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    line = fault(folder, "nf4")
    assert f"quantized by {method}" in line


# --------------------------------------------------------------------------------- checkpoints bitsandbytes quantized


def quantized_by_transformers(folder, kind: str, double_quant: bool, family: str = "llama"):
    """A model folder as `save_pretrained` writes a model that bitsandbytes quantized."""
    from transformers import BitsAndBytesConfig

    plain = write_tiny(family, folder / "plain", dtype=torch.bfloat16)
    if kind == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
    model = read_by_transformers(plain, quantization_config=config, device_map="cpu")
    model.save_pretrained(folder / "quantized")
    return plain, folder / "quantized", model


@pytest.mark.parametrize(("kind", "double_quant"), [("nf4", True), ("fp4", False), ("int8", True)])
def test_a_checkpoint_that_bitsandbytes_quantized_is_read_bit_for_bit(kind, double_quant, tmp_path, monkeypatch):
    plain, folder, theirs = quantized_by_transformers(tmp_path, kind, double_quant)
    expected = read_tiny(plain, kind, double_quant)
    monkeypatch.setattr(slots_module, "quantize", None)  # nothing is quantized again
    found = read_tiny(folder, kind, double_quant)
    compared = 0
    for name, module in found.named_modules():
        if not isinstance(module, WeightHandle) or module.kind == "none":
            continue
        assert_same_bits(module.stored(), expected.get_submodule(name).stored())
        weight = theirs.get_parameter(name)
        if kind == "int8":
            assert torch.equal(module.stored().codes, weight.data)
        else:
            expected_weight = bnb.dequantize_4bit(weight.data, weight.quant_state)
            assert torch.equal(module.dense(torch.float32), expected_weight)
        compared += 1
    assert compared == 14
    assert relative_error(logits(found, tokens()), logits(expected, tokens())) == 0


def assert_same_bits(found: QuantizedTensor, expected: QuantizedTensor) -> None:
    assert found.tensors().keys() == expected.tensors().keys()
    for part, tensor in expected.tensors().items():
        assert torch.equal(found.tensors()[part], tensor), part
    assert (found.kind, found.shape, found.block_size) == (expected.kind, expected.shape, expected.block_size)


def test_conv1d_weights_that_bitsandbytes_quantized_are_turned_right(tmp_path):
    plain, folder, _ = quantized_by_transformers(tmp_path, "nf4", True, "gpt2")
    assert relative_error(logits(read_tiny(folder, "nf4"), tokens()), logits(read_tiny(plain, "nf4"), tokens())) == 0


@pytest.mark.parametrize(("asked", "double_quant"), [("nf4", False), ("fp4", True), ("int8", True), ("none", True)])
def test_asking_for_another_quantization_than_the_stored_one_is_an_error_that_names_it(asked, double_quant, tmp_path):
    _, folder, _ = quantized_by_transformers(tmp_path, "nf4", True)
    line = fault(folder, asked, double_quant)
    assert "already quantized as nf4 with double quantization" in line
    assert "model.quantization: nf4" in line
    assert "model.double_quant: true" in line


def test_a_broken_quantized_weight_is_named(tmp_path):
    _, folder, _ = quantized_by_transformers(tmp_path, "nf4", True)
    named = weights_of(folder)
    name = "model.layers.0.self_attn.q_proj.weight"
    del named[f"{name}.quant_state.bitsandbytes__nf4"]
    write_weights(folder, named)
    assert f"{folder}: cannot read the quantized weight {name}" in fault(folder, "nf4")


# ------------------------------------------------------------------------------------ tensors that come from elsewhere


class Drawn:
    """Every tensor of a model from random numbers, under both names of tied ones."""

    def __init__(self, model, has_values: bool):
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.names = list(self.shapes)
        self.has_values = has_values

    def read(self, name: str) -> torch.Tensor:
        return torch.randn(self.shapes[name])


@pytest.mark.parametrize("has_values", [False, True])
def test_a_source_without_values_leaves_tied_weights_tied(has_values, tmp_path):
    """What it gives under the two names differs, and says nothing."""
    model = read_tiny(write_tiny("llama-tied", tmp_path), open_source=lambda model, device: Drawn(model, has_values))
    assert same_storage(model) is not has_values


@pytest.mark.parametrize(
    ("family", "stored", "module"),
    [
        ("phimoe", "model.layers.0.mlp.router.weight", "model.layers.0.mlp.router"),  # derives from nn.Linear
        ("llama-tied", "lm_head.weight", "model.embed_tokens"),
    ],
)
def test_a_quantized_weight_in_a_place_without_a_handle_is_dequantized(family, stored, module, tmp_path):
    class Quantized(Drawn):
        def __init__(self, model, device):
            super().__init__(model, True)
            self.value = quantize(torch.randn(self.shapes[stored]), "nf4")
            self.names = [name for name in self.names if name == stored or name != f"{module}.weight"]
            sources.append(self)

        def read(self, name):
            return self.value if name == stored else super().read(name)

    sources = []
    weight = read_tiny(write_tiny(family, tmp_path), "nf4", open_source=Quantized).get_submodule(module).weight
    assert torch.equal(weight, sources[0].value.dequantize(torch.float32))
