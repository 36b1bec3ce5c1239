"""A step traced on meta tensors against the same on fake ones, event by event."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_config

from qlora_tool.build.resolve import resolve
from qlora_tool.config import Config, with_values
from qlora_tool.memory.trace import on_meta
from qlora_tool.memory.trace import predict as predicting
from qlora_tool.memory.trace.deepen import same
from qlora_tool.memory.trace.on_meta import FIRST, NEW, LikeCpu, result_on_meta
from qlora_tool.memory.trace.predict import BatchShape, Untraceable, predict, traced_on_meta
from qlora_tool.memory.trace.tracer import Trace
from qlora_tool.ops.declare import CPU, Target

CARD = Target("cuda", (8, 9))
FAMILIES = ("llama", "gemma2", "gpt2", "mixtral", "opt", "bloom", "gpt_oss", "qwen3_moe", "phi3")
SETTINGS: list[dict] = [
    {}, {"training.gradient_checkpointing": False, "training.optim": "paged_adamw_8bit"},
    {"training.gradient_accumulation_steps": 2, "adapter.lora_dropout": 0.1, "model.quantization": "int8"},
    {"adapter.method": "dora", "training.optimizer_in_backward": True, "training.max_grad_norm": 0.0},
    {"training.tiled_mlp": True, "model.embeddings": "int8", "training.offload_boundaries": True},
    {"model.weights": "host"}, {"model.weights": "disk", "model.quantization": "int8"},
    {"model.weights": "host", "model.quantization": "none", "model.resident_layers": 1},
]  # fmt: skip
PADDED = BatchShape(2, 48, 90, padded=True)


def both(
    family: str, values: dict, target: Target, shape: BatchShape | None, dtype: torch.dtype
) -> tuple[Trace, Trace]:
    model = tiny_config(family)
    config = with_values(Config(), {"training.gradient_checkpointing": True, "data.max_length": 48,
                                    "training.per_device_train_batch_size": 2} | values)  # fmt: skip
    run = resolve(config, model, target.type, dtype), model, shape or BatchShape.assumed(config, model), dtype
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predicting, "traced_on_meta", _unable)
        fake = predict(*run, target=target)
    return traced_on_meta(*run, None, target), fake


def _unable(*_: object) -> Trace:
    raise NotImplementedError


# The mean and deviation of a layer norm, fp32 on CUDA, are 16 bits wide on a CPU's fake tensors: in fp32 there is one.
@pytest.mark.parametrize("shape", [None, BatchShape.full(2, 48), PADDED], ids=["assumed", "full", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_event_is_that_of_fake_tensors(family, shape):
    number = FAMILIES.index(family) + (shape is not None) + (shape is PADDED)
    for target in (CARD, CPU):
        one, other = both(family, SETTINGS[number % len(SETTINGS)], target, shape, torch.float32)
        assert same(one, other, "model.layers")


@pytest.mark.parametrize("values", SETTINGS, ids=str)
def test_each_setting_in_16_bits_on_a_card(values):
    assert same(*both("llama", values, CARD, None, torch.bfloat16), "model.layers")


def test_statistics_of_layer_norms():
    """fp32 of each row on a card, as its kernel has them; what a CPU has in 16 bits is left to fake tensors."""
    trace, _ = both("gpt2", {}, CARD, None, torch.bfloat16)
    norms = {storage.nbytes for storage in trace.storages if storage.operator == "aten::native_layer_norm"}
    tokens, width = 96, 64
    assert norms == {tokens * width * 2, tokens * 4}
    with pytest.raises(NotImplementedError):
        both("gpt2", {}, CPU, None, torch.bfloat16)


def test_what_meta_tensors_cannot_do_fake_ones_do(monkeypatch):
    """A model that asks on which device it is, and one whose code looks at values."""
    model, config, shape = tiny_config("llama"), Config(), BatchShape.full(1, 16)
    forward = torch.nn.Embedding.forward

    def asks(self, ids):
        if ids.device.type != "cpu":
            raise ValueError("only on a CPU")
        return forward(self, ids)

    expected = predict(config, model, shape, torch.float32)
    monkeypatch.setattr(torch.nn.Embedding, "forward", asks)
    assert same(predict(config, model, shape, torch.float32), expected, "model.layers")
    monkeypatch.setattr(torch.nn.Embedding, "forward", lambda self, ids: forward(self, ids) * ids.sum().item())
    with pytest.raises(Untraceable, match="embed_tokens"):
        predict(config, model, shape, torch.float32)


ATEN = torch.ops.aten
SIZES = [(), (1,), (4,), (3, 4), (2, 3, 4), (1, 3, 4), (2, 1, 4)]
UNARY = [
    ATEN.exp.default, ATEN.log.default, ATEN.neg.default, ATEN.silu.default, ATEN.gelu.default, ATEN.rsqrt.default,
    ATEN.zeros_like.default, ATEN.clone.default, ATEN.exp_.default, ATEN.zero_.default, ATEN.sum.default,
]  # fmt: skip
BINARY = [ATEN.add.Tensor, ATEN.sub.Tensor, ATEN.mul.Tensor, ATEN.div.Tensor, ATEN.pow.Tensor_Tensor, ATEN.eq.Tensor,
          ATEN.add_.Tensor, ATEN.mul_.Tensor, ATEN.copy_.default, ATEN.mm.default]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("operator", UNARY + BINARY, ids=str)
def test_an_answer_that_is_not_asked_for_again_is_pytorchs(operator, dtype):
    """Over all pairs of shapes, transposed ones among them, and numbers: shape, strides, dtype and bytes."""
    given = [torch.empty(size, dtype=dtype, device="meta") for size in SIZES]
    given += [tensor.transpose(-1, -2) for tensor in given if tensor.dim() > 1]
    second = [*given, torch.empty(4, dtype=torch.float64, device="meta"), 2, 0.5] if operator in BINARY else [None]
    tried = 0
    for one in given:
        for other in second:
            args = (one,) if other is None else (one, other)
            try:
                expected = operator(*args)
            except RuntimeError:  # shapes that do not go together, silu of whole numbers
                for _ in range(2):
                    with pytest.raises(RuntimeError):
                        result_on_meta(operator, args, {})
                continue
            result_on_meta(operator, args, {})
            found, tried = result_on_meta(operator, args, {}), tried + 1
            assert looks(found) == looks(expected)
            assert (found is one) is (expected is one) is (operator._schema.name.endswith("_"))
            assert found is one or found.untyped_storage()._cdata != one.untyped_storage()._cdata
    assert tried or (operator is ATEN.mm.default or not dtype.is_floating_point)


def looks(tensor: torch.Tensor) -> tuple:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.untyped_storage().nbytes(), tensor.device.type


def test_what_else_an_answer_depends_on_is_asked_for():
    """Numbers of another kind, PyTorch's default dtype, keywords."""
    whole = torch.empty(3, dtype=torch.int64, device="meta")
    for number, dtype in ((1, torch.int64), (True, torch.int64), (1.0, torch.float32), (1, torch.int64)):
        assert result_on_meta(ATEN.mul.Tensor, (whole, number), {}).dtype == dtype
    torch.set_default_dtype(torch.float64)
    try:
        assert result_on_meta(ATEN.mul.Tensor, (whole, 1.0), {}).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    for dtype in (torch.float16, torch.float32):
        assert result_on_meta(ATEN._to_copy.default, (whole,), {"dtype": dtype}).dtype == dtype


def test_what_is_written_into_is_the_result(monkeypatch):
    """It is asked once; what it makes larger each time."""
    monkeypatch.setattr(on_meta, "_answers", {})
    x = torch.empty(3, 3, device="meta")
    for _ in range(3):
        assert result_on_meta(ATEN.addmm_.default, (x, x, x), {"beta": 0.5}) is x
        assert result_on_meta(ATEN.gelu_backward.grad_input, (x, x), {"grad_input": x}) is x
        wanted = torch.empty(0, device="meta")
        assert result_on_meta(ATEN.mul.out, (x, x), {"out": wanted}) is wanted and wanted.shape == (3, 3)
    assert [answer.known for answer in on_meta._answers.values()] == [True, True, False]
    gives = {operator: on_meta._gives(operator) for operator in (
        ATEN.add_.Tensor, ATEN.mul.out, ATEN.mul.Tensor, ATEN.topk.default, ATEN.view.default, ATEN.detach.default,
        ATEN.split.Tensor, ATEN._local_scalar_dense.default,
    )}  # fmt: skip
    assert list(gives.values()) == [FIRST, "out", NEW, NEW, None, None, None, None]


def test_a_view_that_does_not_say_so_and_memory_larger_than_needed_are_asked_for_each_time(monkeypatch):
    monkeypatch.setattr(on_meta, "_answers", {})
    x = torch.empty(4, 6, device="meta")
    for _ in range(2):
        seen = result_on_meta(ATEN._unsafe_view.default, (x, [24]), {})
        assert seen.untyped_storage()._cdata == x.untyped_storage()._cdata
    assert not on_meta._Results.of((), torch.empty(8, device="meta")[:4]).known
    assert not on_meta._Results.of((), (x, x.view(-1))).known
    assert on_meta._Results.of((x,), (torch.empty(2, device="meta"), None)).again()[1] is None


@pytest.mark.parametrize("operator", UNARY + BINARY, ids=str)
def test_tensors_with_values_are_computed_with(operator):
    """Buffers that stay real, and what is made of them; as the operator does on a CPU without a tracer."""
    x, other = torch.tensor([[0.5, 2.0], [3.0, 4.0]]), torch.tensor([[2.0, 0.25], [1.0, 8.0]])
    more = (other,) if operator in BINARY else ()
    expected = operator(x.clone(), *more)
    for _ in range(2):
        assert torch.equal(result_on_meta(operator, (x.clone(), *more), {}), expected)


def test_nothing_comes_out_of_meta():
    """A copy to where values are is no result: fake tensors take over."""
    with pytest.raises(NotImplementedError):
        result_on_meta(ATEN.copy_.default, (torch.zeros(2), torch.empty(2, device="meta")), {})


def test_what_is_made_without_a_device_lies_on_meta_and_a_named_device_is_kept():
    with LikeCpu():
        assert torch.zeros(2).is_meta and torch.tensor([1.0]).is_meta and torch.empty(1, device=None).is_meta
        assert torch.zeros(2, device="cpu").device.type == "cpu"
        with torch.device("cpu"):
            assert torch.zeros(2).device.type == "cpu"
    assert torch.zeros(2).device.type == "cpu"
