"""The model as training sees it: hidden states and their projection, the loss, packed rows, bytes."""

from __future__ import annotations

import logging
from collections import Counter

import pytest
import torch
from tiny_models import FAMILIES, logits, read_by_transformers, relative_error, tiny_config, tokens, write_tiny
from torch import nn
from transformers import LlamaForCausalLM

from qlora_tool.build.open import open_model
from qlora_tool.build.resolve import packs_apart
from qlora_tool.config import Config, ModelConfig, with_values
from qlora_tool.data.batches import collate
from qlora_tool.data.tokenize import Example
from qlora_tool.model.behaviour import behaviour_of
from qlora_tool.model.causal_lm import CausalLM, logits_transform
from qlora_tool.weights.handles import WeightHandle
from qlora_tool.weights.modules import FrozenLinear


def open_tiny(family: str, folder, kind: str = "none", **changes) -> CausalLM:
    write_tiny(family, folder, **changes)
    return open_model(ModelConfig(name_or_path=str(folder), quantization=kind, compute_dtype="float32"))


def example(length: int, seed: int, prompt: int = 1) -> Example:
    """`length` random tokens of which the first `prompt` are not trained."""
    ids = tokens(1, length, seed)[0].tolist()
    return Example(ids, [-100] * prompt + ids[prompt:], f"row {seed}")


# Rows of three, one and two examples; some longer than the sliding windows of four tokens.
ROWS = [[example(5, 1), example(9, 2, 4), example(2, 3)], [example(14, 4, 2)], [example(7, 5), example(6, 6, 6)]]


# ------------------------------------------------------------------------------------------------------ hidden states


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_projected_are_the_models_logits(family, tmp_path):
    model = open_tiny(family, tmp_path)
    batch = collate([[example(12, seed)] for seed in (1, 2)], pad_token_id=0, packing=False)
    with torch.no_grad():
        found = model.project(model.hidden_states(batch))
        assert relative_error(found, model.logits(batch)) <= 1e-6
    assert relative_error(found, logits(read_by_transformers(tmp_path), batch.input_ids)) <= 1e-5
    assert model.chunked_loss


def test_a_family_with_something_between_takes_full_logits(tmp_path):
    """modernbert's decoder has a dense layer and a norm before its head."""
    model = open_tiny("modernbert-decoder", tmp_path)
    assert not model.chunked_loss
    batch = collate([[example(12, 1)]], pad_token_id=0, packing=False)
    assert relative_error(model.loss_sum(batch).detach(), reference_loss(tmp_path, [example(12, 1)])) <= 1e-5


def test_a_body_that_is_the_whole_model_takes_full_logits(tmp_path):
    model = open_tiny("llama4_text", tmp_path)
    assert not model.chunked_loss


def test_a_trained_head_gets_its_gradient(tmp_path):
    model = open_tiny("llama", tmp_path)
    head = model.module.get_output_embeddings()
    head.weight.stored().requires_grad_()
    model.loss_sum(collate([[example(8, 1)]], pad_token_id=0, packing=False)).backward()
    assert head.weight.stored().grad.abs().sum() > 0


def test_what_families_do_to_their_logits_is_read_from_their_configuration():
    from tiny_models import tiny_config

    assert logits_transform(tiny_config("llama")).scale == 1.0
    assert logits_transform(tiny_config("cohere")).scale == 0.25
    assert logits_transform(tiny_config("granite")).scale == 1 / 8.0
    found = logits_transform(tiny_config("gemma2"))
    assert (found.scale, found.softcap) == (1.0, 3.0)
    assert logits_transform(tiny_config("mpt", logit_scale="inv_sqrt_d_model")).scale == 1.0


# --------------------------------------------------------------------------------------------------------------- loss


def reference_loss(folder, examples, label_smoothing: float = 0.0) -> torch.Tensor:
    """Each example alone through transformers' model, full logits, in fp64 from there."""
    reference = read_by_transformers(folder)
    total = torch.zeros((), dtype=torch.float64)
    for one in examples:
        found = logits(reference, torch.tensor([one.input_ids]))[0, :-1].double()
        total += nn.functional.cross_entropy(
            found, torch.tensor(one.labels[1:]), ignore_index=-100, reduction="sum", label_smoothing=label_smoothing
        )
    return total


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "phi"])
def test_the_loss_is_the_sum_over_the_trained_tokens_of_every_example(
    family, packing, chunked, label_smoothing, tmp_path
):
    model = open_tiny(family, tmp_path)
    model.projects_plainly = chunked
    examples = [one for row in ROWS for one in row]
    batch = collate(ROWS if packing else [[one] for one in examples], pad_token_id=0, packing=packing)
    with torch.no_grad():
        found = model.loss_sum(batch, label_smoothing)
    assert found.dtype == torch.float32
    expected = reference_loss(tmp_path, examples, label_smoothing)
    assert relative_error(found.double(), expected) <= 1e-5


def test_a_batch_without_a_trained_token_has_no_loss(tmp_path):
    model = open_tiny("llama", tmp_path)
    batch = collate([[example(5, 1, prompt=5)]], pad_token_id=0, packing=False)
    assert batch.trained_tokens == 0
    for model.projects_plainly in (True, False):
        assert model.loss_sum(batch).item() == 0.0


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_gradients_are_the_same_in_chunks_and_checkpointed(family, tmp_path):
    """With respect to the norms, made trainable: every layer's gradient flows through frozen products."""
    batch = collate(ROWS, pad_token_id=0, packing=True)
    results = []
    for chunked, checkpointed in ((False, False), (True, False), (True, True)):
        model = open_tiny(family, tmp_path, "nf4")
        model.projects_plainly = chunked
        model.module.train()
        norms = [p.requires_grad_() for name, p in model.module.named_parameters() if name.endswith("norm.weight")]
        model.checkpoint_layers(checkpointed)
        model.loss_sum(batch).backward()
        results.append([norm.grad for norm in norms])
        assert len(norms) >= 5
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            assert relative_error(found, expected) <= 1e-4


class Branch(nn.Module):
    """The least that an adapter is: its branch first, then the frozen product."""

    def __init__(self, linear):
        super().__init__()
        self.down = nn.Linear(linear.in_features, 4, bias=False)
        self.up = nn.Linear(4, linear.out_features, bias=False)

    def forward(self, x, linear):
        branch = self.up(self.down(x))
        return linear.product(x) + branch


def test_checkpointed_layers_do_not_recompute_their_last_product(tmp_path, monkeypatch):
    """Forward, recomputation, backward: three products a linear module, but two for the one that a layer ends in."""
    model = open_tiny("llama", tmp_path, "nf4")
    names = {}
    for name, module in model.module.named_modules():
        if isinstance(module, FrozenLinear) and name != "lm_head":
            module.add_adapter("default", Branch(module))
            names[module.weight] = name.rpartition(".")[2]
    model.module.train()
    model.checkpoint_layers(True)
    asked, dense = Counter(), WeightHandle.dense
    monkeypatch.setattr(
        WeightHandle, "dense", lambda self, *rest: asked.update([names.get(self)]) or dense(self, *rest)
    )
    model.loss_sum(collate(ROWS, pad_token_id=0, packing=True)).backward()
    del asked[None]  # the output projection
    # Nothing below the first layer's adapters wants a gradient, so q, k and v have none to hand on there.
    assert asked.pop("down_proj") == 2 * 2
    assert {name: asked.pop(name) for name in ("o_proj", "gate_proj", "up_proj")} == dict.fromkeys(
        ("o_proj", "gate_proj", "up_proj"), 2 * 3
    )
    assert asked == dict.fromkeys(("q_proj", "k_proj", "v_proj"), 3 + 2)


# -------------------------------------------------------------------------------------------------------- packed rows


@torch.no_grad()
def packed_states_differ(model: CausalLM) -> float:
    """How far, relatively, packed examples' hidden states are from those of each example alone."""
    packed = model.hidden_states(collate(ROWS, pad_token_id=0, packing=True))
    worst = 0.0
    for states, row in zip(packed, ROWS, strict=True):
        start = 0
        for one in row:
            alone = model.module.base_model(input_ids=torch.tensor([one.input_ids]), use_cache=False)[0][0]
            worst = max(worst, relative_error(states[start : start + len(one.input_ids)], alone))
            start += len(one.input_ids)
    return worst


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_packed_examples_apart_is_said_truly(family, tmp_path):
    model = open_tiny(family, tmp_path)
    if behaviour_of(model.config).keeps_apart:
        assert packed_states_differ(model) <= 1e-5
    elif family not in ("bloom", "mpt"):  # these take no positions, so nothing can be told apart
        assert packed_states_differ(model) > 1e-2


def test_ordinary_families_are_packed():
    for family in ("llama", "qwen3", "gemma2", "mistral", "phi3", "mixtral", "gpt2"):
        assert behaviour_of(tiny_config(family)).keeps_apart == ("masks" if family == "gemma2" else "segments")


def test_padding_that_is_seen_is_noticed():
    """CPM-Ant tells padding by its tokens, which the mask that it is given does not."""
    assert not behaviour_of(tiny_config("cpmant")).pads_apart
    assert behaviour_of(tiny_config("llama")).pads_apart and behaviour_of(tiny_config("bloom")).pads_apart


def test_where_padding_is_seen_rows_go_one_by_one(tmp_path):
    model = open_tiny("cpmant", tmp_path)
    assert not model.pads_apart
    rows = [[example(length, length)] for length in (5, 9, 3)]
    losses = model.example_losses(collate(rows, pad_token_id=0, packing=False))
    alone = [model.loss_sum(collate([row], pad_token_id=0, packing=False)) for row in rows]
    torch.testing.assert_close(losses, torch.stack(alone), atol=0, rtol=1e-6)


def test_a_cap_is_noticed_however_high(monkeypatch):
    """The loss would otherwise be taken of logits without it."""
    plain = LlamaForCausalLM.forward

    def capped(self, *args, **kwargs):
        found = plain(self, *args, **kwargs)
        found.logits = 500 * torch.tanh(found.logits / 500)
        return found

    monkeypatch.setattr(LlamaForCausalLM, "forward", capped)
    assert not behaviour_of(tiny_config("llama", max_position_embeddings=97)).projects_plainly  # of no other test


@pytest.mark.parametrize("far", [8, 4096])
def test_packing_is_decided_by_what_a_long_row_would_show(far):
    """Attention in chunks of fixed places cuts an example in two where a row is longer than a chunk."""
    config = tiny_config("llama4_text", attention_chunk_size=far)
    settings = with_values(Config(), {"data.max_length": 2048})
    assert packs_apart(settings, config) == (far == 4096)


def test_a_family_that_cannot_be_tried_is_padded_and_that_is_said(monkeypatch, caplog):
    def refuse(_model):
        raise RuntimeError("a shape that only real weights have")

    monkeypatch.setattr("qlora_tool.model.behaviour.use_segments", refuse)
    monkeypatch.setattr(logging.getLogger("qlora_tool"), "propagate", True)
    behaviour = behaviour_of(tiny_config("llama", max_position_embeddings=98))  # of no other test
    assert behaviour.keeps_apart is None and behaviour.projects_plainly
    assert "llama: packing is done without" in caplog.text and "a shape that only real weights have" in caplog.text


# -------------------------------------------------------------------------------------------------------------- bytes


def test_bytes_are_those_of_the_tensors(tmp_path):
    model = open_tiny("llama", tmp_path / "plain", "nf4", dtype=torch.bfloat16)
    plain = model.unquantized_bytes()
    assert list(plain.values()) == sorted(plain.values(), reverse=True)
    assert plain["model.embed_tokens.weight"] == plain["lm_head.weight"] == 131 * 64 * 2
    assert plain["model.norm.weight"] == 64 * 4
    linear = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 128)
    blocks = linear // 64
    nested = sum(-(-count // 256) for count in [64, 64, 32, 32, 128, 128, 128] * 2)
    assert model.quantized_bytes() == linear // 2 + blocks + (nested + 14) * 4  # codes; scales; theirs, and offsets
    tensors = {t.data_ptr(): t.nbytes for t in [*model.module.parameters(), *model.module.buffers()]}
    assert sum(plain.values()) + model.quantized_bytes() == sum(tensors.values())


def test_tied_tensors_count_once_and_trained_ones_do_not(tmp_path):
    model = open_tiny("llama-tied", tmp_path, "nf4")
    plain = model.unquantized_bytes()
    assert sum(size == 131 * 64 * 4 for size in plain.values()) == 1
    assert model.module.model.norm.weight.requires_grad_() is not None
    assert "model.norm.weight" not in model.unquantized_bytes()


def test_no_weight_is_quantized_without_quantization(tmp_path):
    assert open_tiny("llama", tmp_path).quantized_bytes() == 0
