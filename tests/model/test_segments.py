"""Attention by segment: each packed example gives what it gives alone, no mask is made, and no kernel differs."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from test_causal_lm import ROWS, example, open_tiny
from tiny_models import FAMILIES, read_by_transformers, read_tiny, relative_error, tiny_config, tokens
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_tool.data.batches import Segments, collate
from qlora_tool.model import segments
from qlora_tool.model.behaviour import behaviour_of
from qlora_tool.model.segments import NAME, SegmentMask, plain_attention, segment_attention, use_segments
from qlora_tool.ops.declare import Target, meant_for

# Some of these have windows of four tokens, and deepseek's values have another width than its keys.
BY_SEGMENT = ["llama", "qwen3", "mistral", "gemma3_text", "cohere2", "gpt2", "gpt_neox", "mixtral", "deepseek_v3"]
# A cap on the scores, code of its own for attention, sinks, positions in the scores.
OTHERWISE = ["gemma2", "gptj", "gpt_oss", "bloom"]


def trained_alone(chosen: int):
    """The batch of all rows with labels on one example only."""
    count, rows = 0, []
    for row in ROWS:
        rows.append([])
        for one in row:
            rows[-1].append(one if count == chosen else replace(one, labels=[-100] * len(one.labels)))
            count += 1
    return collate(rows, pad_token_id=0, packing=True)


def gradients(module, loss) -> dict[str, torch.Tensor]:
    """With respect to what `train_plain_parameters` trains."""
    names = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return dict(zip(names, torch.autograd.grad(loss, list(names.values())), strict=True))


def train_plain_parameters(module) -> None:
    """Norms and embeddings: whatever layer and token a loss depends on has a part in their gradients."""
    module.requires_grad_(False)
    for part in module.modules():
        if isinstance(part, nn.Embedding) or "norm" in type(part).__name__.lower():
            part.requires_grad_()


# --------------------------------------------------------------------------------------------------- as each one alone


@pytest.mark.parametrize("family", BY_SEGMENT)
def test_each_examples_loss_and_gradient_are_those_it_has_alone(family, tmp_path):
    model = open_tiny(family, tmp_path, tie_word_embeddings=False)
    reference = read_by_transformers(tmp_path)
    train_plain_parameters(model.module)
    train_plain_parameters(reference)
    examples = [one for row in ROWS for one in row]
    for index, one in enumerate(examples):
        batch = trained_alone(index)
        assert model.by_segment
        loss = model.loss_sum(batch)
        logits = reference(input_ids=torch.tensor([one.input_ids]), use_cache=False).logits[0, :-1]
        alone = nn.functional.cross_entropy(logits, torch.tensor(one.labels[1:]), reduction="sum")
        torch.testing.assert_close(loss, alone, atol=1e-6, rtol=2e-6)
        expected = gradients(reference, alone)
        found = gradients(model.module, loss)
        assert len(found) >= 4
        largest = max(float(gradient.abs().max()) for gradient in expected.values())
        assert largest > 0.1 or not one.trained_tokens
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-5 * largest, rtol=1e-4, msg=name)
        others = sorted({*range(131)} - set(one.input_ids))
        embeddings = [gradient for name, gradient in found.items() if gradient.shape[0] == 131]
        assert embeddings and not any(gradient[others].any() for gradient in embeddings)


@pytest.mark.parametrize("family", BY_SEGMENT)
def test_other_examples_tokens_change_nothing(family, tmp_path):
    model = open_tiny(family, tmp_path)
    examples = [one for row in ROWS for one in row]
    with torch.no_grad():
        for chosen in range(len(examples)):
            batch = trained_alone(chosen)
            before = model.loss_sum(batch)
            owner = torch.repeat_interleave(torch.arange(8), torch.tensor(batch.segments.lengths)).view(3, -1)
            own = owner == (0, 1, 2, 3, 5, 6)[chosen]  # 4 and 7 are padding
            other = torch.where(own, batch.input_ids, tokens(3, 16, seed=9))
            assert torch.equal(other[own].cpu(), torch.tensor(examples[chosen].input_ids))
            torch.testing.assert_close(model.loss_sum(replace(batch, input_ids=other)), before, atol=1e-6, rtol=1e-6)


def test_examples_that_see_one_another_would_be_noticed(tmp_path):
    """The tests above can fail: one segment for all of a row is contamination."""
    model = open_tiny("llama", tmp_path)
    batch = collate(ROWS[:1], pad_token_id=0, packing=True)
    whole = replace(batch, segments=Segments.of([16]))
    with torch.no_grad():
        assert relative_error(model.loss_sum(whole), model.loss_sum(batch)) > 1e-3


def test_rows_without_padding_have_the_loss_of_padded_ones(tmp_path):
    model = open_tiny("mistral", tmp_path)
    rows = [[one] for row in ROWS for one in row]
    padded = collate(rows, pad_token_id=0, packing=False)
    free = collate(rows, pad_token_id=0, packing=False, padding_free=True)
    assert free.input_ids.shape == (1, padded.tokens) and free.segments.lengths == (5, 9, 2, 14, 7, 6)
    with torch.no_grad():
        torch.testing.assert_close(model.loss_sum(free), model.loss_sum(padded), atol=0, rtol=1e-6)


def test_batches_may_go_forward_before_any_goes_back_and_layers_are_recomputed(tmp_path):
    """A layer's segments are those of its own batch, however late it is computed again."""
    model = open_tiny("mistral", tmp_path)
    model.module.train()
    train_plain_parameters(model.module)
    batches = [collate(rows, pad_token_id=0, packing=True) for rows in (ROWS, [ROWS[1]], [[*ROWS[2], *ROWS[0]]])]
    expected = [gradients(model.module, model.loss_sum(batch)) for batch in batches]
    model.checkpoint_layers(True)
    losses = [model.loss_sum(batch) for batch in batches]
    for loss, each in zip(losses, expected, strict=True):
        for name, gradient in gradients(model.module, loss).items():
            torch.testing.assert_close(gradient, each[name], msg=name)


# ------------------------------------------------------------------------------------------------------ which families


@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_more_in_their_attention_keep_their_own(family, tmp_path):
    model = open_tiny(family, tmp_path)
    before = model.config.get_text_config()._attn_implementation
    if use_segments(model.module):
        assert model.config.get_text_config()._attn_implementation == NAME and before == "sdpa"
    else:
        assert model.config.get_text_config()._attn_implementation == before
    assert family not in OTHERWISE or before == "eager"
    assert family not in BY_SEGMENT or use_segments(model.module)


def test_a_family_that_cannot_do_with_segments_gets_masks(tmp_path, monkeypatch):
    model = open_tiny("llama", tmp_path)

    class Touched(SegmentMask):
        @property
        def segments(self):
            raise AttributeError("what a family's code asks of a mask")

        segments = segments.setter(lambda *_: None)

    monkeypatch.setattr(segments, "SegmentMask", Touched)
    behaviour = behaviour_of(tiny_config("llama", max_position_embeddings=99))  # of no other test
    assert behaviour.keeps_apart == "masks"
    model.by_segment = False
    monkeypatch.undo()
    batch = collate(ROWS, pad_token_id=0, packing=True)
    by_mask = model.loss_sum(batch)
    model.by_segment = True
    torch.testing.assert_close(model.loss_sum(batch), by_mask, atol=0, rtol=1e-6)


def test_what_a_family_adds_to_its_masks_or_scores_is_refused():
    segment = Segments.of([3])
    with segments.attending_by(segment):
        for options in ({"use_vmap": True}, {"allow_is_causal_skip": False}):
            with pytest.raises(NotImplementedError):
                segments.segment_mask(1, 3, 3, **options)
    x = torch.randn(1, 2, 3, 8)
    for name in ("softcap", "s_aux", "position_bias"):
        with pytest.raises(NotImplementedError):
            segment_attention(nn.Module(), x, x, x, SegmentMask(segment), **{name: 1.0})


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_without_segments_it_is_sdpa(family, tmp_path):
    model, reference = open_tiny(family, tmp_path), read_tiny(tmp_path)
    assert use_segments(model.module)
    batch = collate([[one] for one in ROWS[0]], pad_token_id=0, packing=False)
    with torch.no_grad():
        expected = reference(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        assert torch.equal(model.logits(batch), expected)
        prompt = tokens(1, 5)
        written = [one.generate(prompt, max_new_tokens=4, do_sample=False) for one in (model.module, reference)]
    assert torch.equal(*written)


# ------------------------------------------------------------------------------------------------------------- kernels


class Made(TorchDispatchMode):
    """The shapes of all that is made meanwhile."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(one.shape) for one in (result if isinstance(result, (list, tuple)) else [result])
                        if isinstance(one, torch.Tensor)}  # fmt: skip
        return result


@pytest.mark.parametrize(("family", "by_segment", "made"), [("llama", True, False), ("llama", False, True),
                                                            ("mistral", True, False)])  # fmt: skip
def test_no_mask_of_row_by_row_is_made(family, by_segment, made, tmp_path):
    model = open_tiny(family, tmp_path)
    model.by_segment = by_segment
    batch = collate([[example(30, 1), example(31, 2)]], pad_token_id=0, packing=True)  # 61: the size of nothing else
    with torch.no_grad(), Made() as seen:
        model.loss_sum(batch)
    assert any(shape[-2:] == (61, 61) for shape in seen.shapes) is made


def made_up(lengths, heads=4, key_heads=2, dim=16, dtype=torch.float64, rows=1):
    generator = torch.Generator().manual_seed(sum(lengths))
    shapes = [(rows, sum(lengths) // rows, count, dim) for count in (heads, key_heads, key_heads)]
    return [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2).requires_grad_() for shape in shapes]


def dense(query, key, value, lengths, window, scale):
    """By the definition: softmax(q·kᵀ · scale) over what each token may see, the rows flattened to one."""
    query, key, value = (x.transpose(1, 2).flatten(0, 1).transpose(0, 1) for x in (query, key, value))
    key, value = (x.repeat_interleave(query.shape[0] // x.shape[0], 0) for x in (key, value))
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(sum(lengths))
    back = place[:, None] - place[None, :]
    seen = (owner[:, None] == owner[None, :]) & (back >= 0) & (back < (window or sum(lengths)))
    scores = (query @ key.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(0, 1)  # (tokens, heads, dim)


CASES = [
    ((7,), 1, None), ((5, 3, 1, 9), 1, None), ((4, 4, 4, 2, 2), 1, None), ((6, 6), 2, None), ((5, 3, 2, 6), 2, None),
    ((5, 3, 1, 9), 1, 4), ((9, 9, 3), 1, 4), ((3, 2), 1, 1), ((8, 2), 1, 8), ((9, 1), 1, 8),
]  # fmt: skip


@pytest.mark.parametrize("heads", [(4, 2), (2, 2), (4, 1)])
@pytest.mark.parametrize(("lengths", "rows", "window"), CASES)
@pytest.mark.parametrize("way", ["kernel", "plain", "variable length", "variable length, torch 2.11"])
def test_values_and_gradients_are_those_of_the_definition(way, lengths, rows, window, heads, monkeypatch):
    if way == "plain":
        monkeypatch.setattr(segments, "has_flash_cpu", lambda *_: False)
    if way != "kernel" and way != "plain":
        monkeypatch.setattr(segments, "has_flash_cuda", lambda *_: True)
        newer = way == "variable length"
        monkeypatch.setattr(segments, "GROUPED", {"enable_gqa": True} if newer else {})
        monkeypatch.setattr(segments, "varlen_attn", documented_varlen if newer else older_varlen)
    inputs = made_up(lengths, *heads, rows=rows)
    found, _ = segment_attention(nn.Module(), *inputs, SegmentMask(Segments.of(lengths), window), scaling=0.3)
    expected = dense(*inputs, lengths, window, 0.3)
    assert found.shape == (rows, sum(lengths) // rows, heads[0], 16)
    torch.testing.assert_close(found.flatten(0, 1), expected)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = [
        torch.autograd.grad((output.reshape(weight.shape) * weight).sum(), inputs) for output in (found, expected)
    ]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def documented_varlen(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """`torch.nn.attention.varlen.varlen_attn` by its documentation: (left, right) tokens are seen beside one's own."""
    assert cu_q.dtype == torch.int32 and enable_gqa == (query.shape[1] != key.shape[1])
    left, right = window_size
    assert right == 0
    lengths = cu_q.diff().tolist()
    assert max_q == max_k == max(lengths)
    inputs = (x.unsqueeze(0).transpose(1, 2) for x in (query, key, value))
    return dense(*inputs, lengths, None if left == -1 else left + 1, scale)


def older_varlen(query, key, value, cu_q, cu_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
    """torch 2.11's: without `enable_gqa`, and without the question whether heads are meant to be grouped."""
    grouped = query.shape[1] != key.shape[1]
    return documented_varlen(
        query, key, value, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window_size, enable_gqa=grouped
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_as_exact_as_its_reference(dtype):
    lengths = (40, 24, 24, 7, 33)
    inputs = made_up(lengths, dtype=dtype)
    mask = SegmentMask(Segments.of(lengths))

    def results(attend, inputs):
        output = attend(*(x.transpose(1, 2).flatten(0, 1) for x in inputs), mask, 0.25)
        weights = torch.linspace(-1, 1, output.numel()).view_as(output).to(output.dtype)
        return [output, *torch.autograd.grad((output * weights).sum(), inputs)]

    exact = results(plain_attention, [x.detach().double().requires_grad_() for x in inputs])
    found, reference = results(segments._FlashCpu.apply, inputs), results(plain_attention, inputs)
    for one, other, right in zip(found, reference, exact, strict=True):
        assert one.dtype == dtype
        assert relative_error(one.double(), right) <= 1.1 * relative_error(other.double(), right) + 1e-7


def test_outputs_are_kept_once():
    """What lives from forward to backward: query, key, value, output and a number per head and token."""
    lengths = (40, 24, 7)
    inputs = [x.detach().transpose(1, 2).flatten(0, 1).requires_grad_() for x in made_up(lengths, dtype=torch.float32)]
    kept: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}) or x, lambda x: x
    ):
        segments._FlashCpu.apply(*inputs, SegmentMask(Segments.of(lengths)), None)
    assert sum(kept.values()) == 71 * 4 * (4 * 16 + 2 * 2 * 16 + 4 * 16 + 4)


def test_windows_take_masks_where_they_are_longer_only():
    mask = SegmentMask(Segments.of([3, 5, 4]), 4)
    like = torch.zeros(())
    assert mask.window_mask(3, like) is None and mask.window_mask(4, like) is None
    made = mask.window_mask(5, like)
    inf = -torch.inf
    assert made.tolist() == [[0, inf, inf, inf, inf], [0, 0, inf, inf, inf], [0, 0, 0, inf, inf], [0, 0, 0, 0, inf],
                             [inf, 0, 0, 0, 0]]  # fmt: skip
    assert mask.window_mask(5, like) is made
    assert SegmentMask(Segments.of([3, 5]), 5).window is None


AMPERE, TURING = Target("cuda", (8, 0)), Target("cuda", (7, 5))


@pytest.mark.parametrize(
    ("target", "dtype", "kernel"),
    [(AMPERE, torch.bfloat16, True), (AMPERE, torch.float32, False), (TURING, torch.float16, False)],
)
def test_cuda_takes_one_kernel_for_all_segments_in_16_bits(target, dtype, kernel):
    """On fake CPU tensors that are meant for a card: shapes, and which operators are asked for."""
    asked = []

    class Asked(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            asked.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), meant_for(target), Asked():
        inputs = [torch.empty(2, 8, n, 64, dtype=dtype).transpose(1, 2).requires_grad_() for n in (4, 2, 2)]
        mask = SegmentMask(Segments((5, 3, 8), torch.empty(4, dtype=torch.int32)), 4 if kernel else None)
        output, _ = segment_attention(nn.Module(), *inputs, mask, scaling=0.1)
        assert output.shape == (2, 8, 4, 64)
        gradients = torch.autograd.grad(output.sum(), inputs)
        assert [one.shape for one in gradients] == [one.shape for one in inputs]
    assert asked.count("torch_attn::_varlen_attn") == asked.count("torch_attn::_varlen_attn_backward") == kernel
    on_cpu = asked.count("aten::_scaled_dot_product_flash_attention_for_cpu")
    assert on_cpu == (0 if kernel else 3)
    assert not any("item" in name or "local_scalar" in name for name in asked)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("lengths", "rows", "window"), CASES)
def test_cuda_gives_what_the_definition_gives(dtype, lengths, rows, window):
    inputs = made_up(lengths, dtype=torch.float64, rows=rows)
    there = [x.detach().to("cuda", dtype).requires_grad_() for x in inputs]
    given = Segments.of(lengths)
    mask = SegmentMask(replace(given, offsets=given.offsets.cuda()), window)
    found = segment_attention(nn.Module(), *there, mask, scaling=0.3)[0].flatten(0, 1)
    expected = dense(*inputs, lengths, window, 0.3)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(found.double().cpu(), expected, atol=tolerance, rtol=tolerance)
    grads = [torch.autograd.grad(x.square().sum(), of) for x, of in ((found, there), (expected, inputs))]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one.double().cpu(), other, atol=4 * tolerance, rtol=4 * tolerance)


@pytest.mark.cuda
def test_a_card_says_when_it_goes_from_example_to_example(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("qlora_tool"), "propagate", True)
    lengths = (5, 3, 8)
    for dtype, said in ((torch.bfloat16, 0), (torch.float32, 1), (torch.float32, 1)):  # once
        inputs = [x.detach().to("cuda", dtype) for x in made_up(lengths, dim=24)]
        given = Segments.of(lengths)
        segment_attention(nn.Module(), *inputs, SegmentMask(replace(given, offsets=given.offsets.cuda())))
        assert sum("from example to example" in one.getMessage() for one in caplog.records) == said
