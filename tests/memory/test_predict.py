"""The prediction: held against the same steps run for real, and against what can be worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from measuring import prediction
from tiny_models import tiny_config
from torch import nn
from transformers import LlamaConfig, masking_utils
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qlora_tool.build.build import build
from qlora_tool.build.tensors import Random
from qlora_tool.config import Config, with_values
from qlora_tool.errors import UserError
from qlora_tool.memory.trace.classify import timeline
from qlora_tool.memory.trace.predict import BatchShape, predict
from qlora_tool.memory.trace.tracer import Trace
from qlora_tool.ops import loss

ON = {"training.gradient_checkpointing": True}
OFF = {"training.gradient_checkpointing": False}


def settings(**values) -> Config:
    """A configuration by keys with two underscores for their point."""
    return with_values(Config(), OFF | {key.replace("__", "."): value for key, value in values.items()})


def parts(trace: Trace) -> dict[str, int]:
    """Bytes at the peak by part, the activations split."""
    return timeline(trace).breakdown().parts


# ------------------------------------------------------------------------------------- against the same steps for real


SMALL = [
    ("llama", {"values": ON}),
    ("gpt2", {"values": OFF | {"model.quantization": "int8", "adapter.lora_dropout": 0.1}, "padded": True}),
    ("mixtral", {"values": ON | {"training.optim": "adamw_8bit", "training.gradient_accumulation_steps": 2}}),
    ("gemma2", {"values": OFF | {"adapter.method": "dora", "model.quantization": "none"}, "examples": (100, 28)}),
    ("gemma3_text", {"values": ON | {"model.embeddings": "int8"}}),
    ("phi", {"values": OFF | {"model.embeddings": "int8"}}),
    ("llama", {"values": ON | {"adapter.target_modules": ["embed_tokens", "lm_head", "q_proj"]}}),
    ("qwen3", {"values": OFF | {"adapter.target_modules": ["embed_tokens", "v_proj"]}}),
    ("mixtral", {"values": ON | {"adapter.target_parameters": ["gate_up_proj", "down_proj"]}}),
    ("llama", {"values": OFF | {"adapter.modules_to_save": ["lm_head"]}}),
    ("mistral", {"values": ON | {"adapter.init_lora_weights": "symmetric"}}),
    ("qwen2", {"values": OFF | {"adapter.init_lora_weights": "pissa"}}),
    ("gemma2", {"values": ON | {"adapter.trainable_token_indices": [5, 7, 9]}}),
    ("llama", {"values": ON | {"model.weights": "disk"}}),
    ("gpt2", {"values": OFF | {"model.quantization": "none", "model.weights": "disk"}}),
    ("mixtral", {"values": ON | {"model.quantization": "int8", "model.weights": "disk"}}),
    ("qwen2", {"values": OFF | {"adapter.init_lora_weights": "pissa", "model.weights": "disk"}}),
]


@pytest.mark.parametrize("family, options", SMALL, ids=str)
def test_the_allocators_count_is_predicted(family, options, monkeypatch):
    small = {"hidden_size": 256, "n_embd": 256, "num_hidden_layers": 2, "n_layer": 2, "vocab_size": 2048}
    sizes = {key: small.get(key, value) for key, value in prediction.FAMILIES[family].items()}
    monkeypatch.setitem(prediction.FAMILIES, family, sizes)
    outcome = prediction.measure(prediction.Case(family, rows=2, length=128, **options), prediction.even_routing)
    assert abs(outcome.error) <= 1e-3, (outcome.predicted.peak_bytes, outcome.measured)
    assert outcome.off_categories == {}
    assert outcome.predicted.activations == outcome.traced.activations


def test_the_limits_are_the_issues():
    """1 % at worst, 0.1 % in the median, every category within 2 % or 1 MB."""

    def outcome(error: float, off: int = 0):
        predicted = SimpleNamespace(peak_bytes=round(1e9 * (1 + error)), at_peak={"activations": 10_000_000 + off})
        traced = SimpleNamespace(at_peak={"activations": 10_000_000})
        return prediction.Outcome(prediction.Case("llama"), predicted, 1_000_000_000, traced)

    assert prediction.judge([outcome(0.0099), outcome(0.0009), outcome(-0.0009)])["passed"]
    assert not prediction.judge([outcome(-0.0101), outcome(0), outcome(0)])["passed"]
    assert not prediction.judge([outcome(0.0099), outcome(0.0011), outcome(-0.0011)])["passed"]
    assert prediction.judge([outcome(0, 1_000_000)])["passed"]
    assert prediction.judge([outcome(0, -1_000_001)])["categories_missed"]


def test_there_are_enough_configurations():
    cases = prediction.cases()
    names = [case.name for case in cases]
    assert len(set(names)) == len(names) >= 30
    issue = "llama mistral qwen2 qwen3 gemma2 gemma3_text phi phi3 gpt2 gpt_neox falcon opt bloom starcoder2 olmo2 "
    issue += "cohere2 granite stablelm glm4 smollm3 mixtral qwen3_moe gpt_oss"
    assert {case.family for case in cases} >= set(issue.split())


# ----------------------------------------------------------------------------------------------------------- by hand


LLAMA_2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000,
              "max_position_embeddings": 4096}  # fmt: skip
IN_LAYER = 4 * [4096 * 4096] + 3 * [4096 * 11008]  # q, k, v, o; gate, up, down
MIB = 2**20


@pytest.mark.parametrize("layers", [2, pytest.param(32, marks=pytest.mark.slow)])
def test_a_7b_by_hand(layers):
    """Llama-2 shapes at 1 × 2048 in bf16, r = 16, checkpointed."""
    model_config = LlamaConfig(**LLAMA_2_7B, num_hidden_layers=layers, dtype=torch.bfloat16)
    trace = predict(settings(**{"training__gradient_checkpointing": True}), model_config, BatchShape.full(1, 2048),
                    torch.bfloat16)  # fmt: skip
    found = parts(trace)

    # Two weights a byte.
    assert found["base_weights"] == layers * sum(IN_LAYER) // 2 == round(layers * 96.5 * MIB)
    # One uint8 scale for 64 weights; one fp32 scale for 256 of those, and their fp32 mean for each weight.
    scales = sum(count // 64 + count // 64 // 256 * 4 + 4 for count in IN_LAYER)
    assert found["quantization_state"] == layers * scales
    # A (16, in) and B (out, 16), two bytes each: 16 · (in + out) · 2.
    trained = 16 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert found["adapter_weights"] == layers * trained * 2
    # AdamW: 16 bits that make an fp32 weight of one in bf16, and two moments in fp32.
    assert found["optimizer_state"] == layers * trained * (2 + 8)
    # What goes into a layer, (1, 2048, 4096) in bf16: one is kept for each layer.
    assert found["boundaries"] == layers * 2048 * 4096 * 2 == layers * 16 * MIB
    # Embeddings and output projection, two norms a layer and one at the end in bf16; two tables of 64 fp32 frequencies.
    norms = (2 * layers + 1) * 4096
    assert found["other_weights"] == (2 * 32000 * 4096 + norms) * 2 + 2 * 64 * 4
    # Everything adds up, and the peak lies in backward, where a layer has been computed again.
    whole = timeline(trace).breakdown()
    assert sum(found.values()) == whole.peak_bytes == whole.phase_peak_bytes["backward"]
    # Recomputed at once, in bf16, at least: the input and output of the norms, q, k, v, attention's result, and gate,
    # up, their product and the activation of (2048, 11008).
    assert found["recomputed"] > 2048 * (4 * 4096 + 4 * 11008) * 2
    if layers == 32:
        named = [found[name] / MIB for name in ("base_weights", "adapter_weights", "boundaries", "optimizer_state")]
        assert named == pytest.approx([3088, 76.25, 512, 381.25], abs=0.01)
        assert 5.2e9 < whole.peak_bytes < 5.6e9


def test_adamw_8bit_by_hand():
    """Two codes of 8 bits a weight, two fp32 scales for 256 of them; 16 bits that make an fp32 weight of one in bf16;
    two tables of values."""
    model_config = LlamaConfig(hidden_size=1024, intermediate_size=2048, num_hidden_layers=1, num_attention_heads=8,
                               vocab_size=64, dtype=torch.bfloat16)  # fmt: skip
    config = settings(training__optim="adamw_8bit", adapter__r=8, adapter__target_modules=["q_proj", "down_proj"])
    found = parts(predict(config, model_config, BatchShape.full(1, 512), torch.bfloat16))
    tensors = [8 * 1024, 1024 * 8, 8 * 2048, 1024 * 8]  # A and B of q_proj and of down_proj
    assert found["optimizer_state"] == sum((2 + 2) * count + 2 * count // 256 * 4 for count in tensors) + 2 * 256 * 4


def test_unquantized_tensors_are_never_left_out():
    """What the loaded model says of itself, for families that keep more than embeddings and norms."""
    for family in ("gpt2", "gpt_oss", "phimoe", "opt-projected", "mamba"):
        model = build(settings(), tiny_config(family), Random(), device=torch.device("cpu"),
                      compute_dtype=torch.float32).model  # fmt: skip
        found = parts(predict(settings(), tiny_config(family), BatchShape.full(1, 16), torch.float32))
        assert found["other_weights"] == sum(model.unquantized_bytes().values()), family
        assert found["base_weights"] + found["quantization_state"] == model.quantized_bytes(), family


# ------------------------------------------------------------------------------------------------------------ batches


def masks(trace: Trace, length: int, rows: int = 1) -> list[int]:
    """Storages of the second step with a place for each pair of positions, by their bytes an element."""
    square = rows * length * length
    return [storage.nbytes // square for storage in trace.storages
            if storage.step == 2 and storage.phase == "forward" and storage.nbytes in (square, 4 * square)]  # fmt: skip


def test_only_rows_that_need_one_get_a_mask():
    """Of length × length: never made for full rows, where attention is told that it is causal, nor where it goes by
    segment; gemma2 caps its scores, which needs a mask."""
    length = 61  # of nothing else
    full = BatchShape.full(1, length)
    assert not masks(predict(settings(), tiny_config("llama"), full, torch.float32), length)
    assert not masks(predict(settings(), tiny_config("opt", max_position_embeddings=128), full, torch.float32), length)
    packed = BatchShape(1, length, length - 2, segments=(30, 31))
    assert not masks(predict(settings(), tiny_config("llama"), packed, torch.float32), length)
    assert masks(predict(settings(), tiny_config("gemma2"), packed, torch.float32), length)
    padded = BatchShape(2, length, 2 * length - 3, padded=True)
    assert masks(predict(settings(), tiny_config("llama"), padded, torch.float32), length, 2)


def test_rows_that_would_need_a_mask_together_are_padded_instead():
    """Laid one after the other, four rows of 64 would get a mask of 256 × 256."""
    config = settings(data__packing=False, data__max_length=64, training__per_device_train_batch_size=4)
    assert BatchShape.assumed(config, tiny_config("llama")) == BatchShape(1, 256, 4 * 63, segments=(64,) * 4)
    assert BatchShape.assumed(config, tiny_config("gemma2")) == BatchShape.full(4, 64)
    packed = BatchShape.assumed(with_values(config, {"data.packing": True}), tiny_config("gemma2"))
    assert packed == BatchShape(4, 64, 4 * 63, segments=(64,))


def test_batches_have_the_shape_that_they_say():
    packed = BatchShape(2, 5, 7, segments=(2, 3)).batch()
    assert packed.position_ids.tolist() == 2 * [[0, 1, 0, 1, 2]] and packed.attention_mask is None
    assert packed.segments.lengths == (2, 3, 2, 3)
    assert (len(packed.predicting), len(packed.targets), packed.trained_tokens) == (7, 7, 7)
    padded = BatchShape(2, 5, 7, padded=True).batch()
    assert padded.attention_mask.sum() < 10 and padded.position_ids is None
    assert BatchShape.full(3, 5).batch().trained_tokens == 3 * 4


# ------------------------------------------------------------------------------------------------------- full logits


@pytest.mark.parametrize(
    "keys", [{}, {"adapter__modules_to_save": ["lm_head"]}, {"adapter__target_modules": ["lm_head"]}]
)
def test_no_head_trained_or_not_makes_full_logits(monkeypatch, keys):
    monkeypatch.setattr(loss, "CHUNK_BYTES", 0)
    rows = 509  # more than a chunk, and of nothing else
    model_config = tiny_config("llama", max_position_embeddings=1024)
    trace = predict(settings(**keys), model_config, BatchShape(1, 512, rows), torch.float32)
    sizes = {storage.nbytes for storage in trace.storages}
    assert rows * 131 * 4 not in sizes and 128 * 131 * 4 in sizes


# ------------------------------------------------------------------------------------------------------------ failures


def test_fp16_takes_its_steps():
    """Its optimizer asks whether the gradients are finite, which fake ones cannot say."""
    found = parts(predict(settings(), tiny_config("llama"), BatchShape.full(1, 32), torch.float16))
    weights = found["adapter_weights"] // 2
    assert found["optimizer_state"] == weights * (4 + 8)  # fp16's exponent is no fp32's: a master of its own


def test_code_that_looks_at_values_is_named(monkeypatch):
    def looks(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x

    before = masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(LlamaRMSNorm, "forward", looks)
    with pytest.raises(UserError) as caught:
        predict(settings(), tiny_config("llama"), BatchShape.full(1, 16), torch.float32)
    [line] = caught.value.lines
    assert "'llama'" in line and "module model.layers.0.input_layernorm (LlamaRMSNorm)" in line and "--measure" in line
    assert masking_utils.find_packed_sequence_indices is before


def test_a_users_mistake_stays_one():
    with pytest.raises(UserError, match="no module 'lm_haed'; did you mean 'lm_head'"):
        predict(settings(adapter__modules_to_save=["lm_haed"]), tiny_config("llama"), BatchShape.full(1, 16),
                torch.float32)  # fmt: skip
