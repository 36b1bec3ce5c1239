"""What a CPU's trace becomes on a CUDA device: blocks, workspaces, what operators take inside, worked out by hand."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import LlamaConfig

from qlora_tool.config import Config, with_values
from qlora_tool.memory.allocator import timeline as replayed
from qlora_tool.memory.allocator.calibrate import Calibration
from qlora_tool.memory.allocator.model import OutOfMemory
from qlora_tool.memory.allocator.operators import (
    CPU_ATTENTION,
    CPU_ATTENTION_BACKWARD,
    VARIABLE_LENGTH,
    VARIABLE_LENGTH_BACKWARD,
    Attention,
    cublas_workspace,
    temporaries_inside,
)
from qlora_tool.memory.breakdown import PARTS
from qlora_tool.memory.trace.classify import timeline
from qlora_tool.memory.trace.predict import BatchShape, predict
from qlora_tool.memory.trace.tracer import Call, Storage, Trace
from qlora_tool.ops.declare import CPU, Target
from qlora_tool.ops.products import ONEDNN, PYTORCH, use_products
from qlora_tool.ops.speeds import has_onednn

MIB = 2**20
ADA, HOPPER = (8, 9), (9, 0)

cuda_timeline = functools.partial(replayed.cuda_timeline, compute_capability=ADA)
CHECKPOINTED = {"training.gradient_checkpointing": True}


def made_trace(*steps: tuple[str, int] | Call) -> Trace:
    """A trace of one forward phase: ("name", bytes) is born, ("name", 0) dies."""
    trace, live = Trace(marks=[(0, "forward", 1)]), {}
    for step in steps:
        if isinstance(step, Call):
            trace.calls.append(step)
            continue
        name, nbytes = step
        if nbytes:
            live[name] = Storage(nbytes, len(trace.events), "forward", 1, "", name, False)
            trace.storages.append(live[name])
        else:
            live[name].death, live[name].died_in, live[name].died_in_step = len(trace.events), "forward", 1
        trace.events.append((live[name], +1 if nbytes else -1))
    return trace


def call(operator: str, event: int, shapes=(), in_backward: bool = False, itemsize: int = 2, results=()) -> Call:
    return Call(event, operator, "forward", "", in_backward, tuple(shapes), itemsize, tuple(results))


def tiny_trace(
    settings: dict | None = None, segments: tuple[int, ...] | None = None, rows: int = 2, dtype=torch.bfloat16
) -> Trace:
    sizes = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=2048, max_position_embeddings=512, dtype=torch.bfloat16,
    )  # fmt: skip
    config = with_values(Config(), CHECKPOINTED | (settings or {}))
    shape = BatchShape(rows, 128, rows * 127, segments=segments)
    return predict(config, sizes, shape, dtype, target=Target("cuda", ADA))


@pytest.fixture(scope="module")
def tiny() -> Trace:
    return tiny_trace()


def test_blocks_and_segments():
    # 21.5 MiB gets a segment of 22, and what is left, half a MiB, is too little to split off. 1000 bytes take 1024 of a
    # segment of 2 MiB. After the large one is freed, 10 MiB are cut from it.
    trace = made_trace(("a", 43 * MIB // 2), ("b", 1000), ("a", 0), ("c", 10 * MIB))
    found = cuda_timeline(trace)
    assert found.requested_peak == 43 * MIB // 2 + 1000
    assert found.allocated_peak == 22 * MIB + 1024 == found.timeline.peak_bytes
    assert found.reserved_peak == 24 * MIB
    assert found.breakdown().at_peak["framework"] == MIB // 2 + 24
    assert found.timeline.totals[-1] == 10 * MIB + 1024
    # Expandable segments split everything, and grow by 20 MiB.
    found = cuda_timeline(trace, expandable_segments=True)
    assert found.allocated_peak == 43 * MIB // 2 + 1024 and found.reserved_peak == 42 * MIB


def test_a_workspace_for_each_thread_at_its_first_product():
    products = [call("aten::mm", 1), call("aten::bmm", 1, in_backward=True), call("aten::mm", 2, in_backward=True)]
    trace = made_trace(("a", MIB), *products, ("a", 0))
    for capability, each in (ADA, 8519680), (HOPPER, 32 * MIB):  # 8519680: as memory snapshots of such cards show it
        assert cublas_workspace(capability) == each
        found = cuda_timeline(trace, compute_capability=capability)
        assert found.workspace_bytes == 2 * each
        assert found.breakdown().at_peak["framework"] == 2 * each
        assert found.timeline.totals[0] == MIB and found.timeline.totals[-1] == 2 * each
    assert cuda_timeline(made_trace(("a", MIB))).workspace_bytes == 0


def test_measured_figures_take_the_place_of_estimates():
    trace = made_trace(("a", MIB), call("aten::mm", 1), call("aten::mm", 1, in_backward=True))
    [context] = [line for line in cuda_timeline(trace).estimated if line.startswith("the CUDA context")]
    assert context.startswith("the CUDA context, 0.58 GiB (0.40 GiB to 0.84 GiB were seen") and "--calibrate" in context
    found = cuda_timeline(trace, calibration=Calibration("card", 432_100_000, 4 * MIB, 0))
    assert found.context_bytes == 432_100_000 and found.workspace_bytes == 4 * MIB and not found.estimated
    assert found.breakdown().context_bytes == 432_100_000


def test_a_limit():
    trace = made_trace(("a", 20 * MIB), ("a", 0), ("b", 30 * MIB))
    assert cuda_timeline(trace).reserved_peak == 50 * MIB
    assert cuda_timeline(trace, limit=40 * MIB).reserved_peak == 30 * MIB  # the cached segment is given back
    with pytest.raises(OutOfMemory):
        cuda_timeline(trace, limit=29 * MIB)


def test_what_attention_takes():
    q, k, lse = (1, 32, 2048, 128), (1, 8, 2048, 128), (1, 2048, 32)
    forward = Attention.of(call(CPU_ATTENTION, 0, [q, k, k]))
    backward = call(CPU_ATTENTION_BACKWARD, 0, [q, q, k, k, q, lse])
    assert Attention.of(backward) == forward
    assert forward.kernel(ADA) == forward.kernel(HOPPER) == "flash"
    rows, dq, each_head = 32 * 2048 * 4, 2048 * 32 * 128 * 4, 2048 * 32 * 128 * 2
    assert temporaries_inside(backward, ADA) == [rows, dq, each_head, each_head]
    one_head_each = call(CPU_ATTENTION_BACKWARD, 0, [q, q, q, q, q, lse])
    assert temporaries_inside(one_head_each, ADA) == [rows, dq]
    # 100 tokens are worked on as 128, a head of 80 as one of 96.
    narrow = (2, 4, 100, 80)
    padded = call(CPU_ATTENTION_BACKWARD, 0, [narrow, narrow, narrow, narrow, narrow, (2, 100, 4)])
    assert temporaries_inside(padded, ADA) == [2 * 4 * 128 * 4, 2 * 128 * 4 * 96 * 4]
    # Deterministic, 128 multiprocessors share out 32 heads as 4 sums of dQ, 8 heads of two rows as 16.
    assert temporaries_inside(one_head_each, ADA, 128) == [rows, 4 * dq]
    assert temporaries_inside(padded, ADA, 128) == [2 * 4 * 128 * 4, 16 * 2 * 128 * 4 * 96 * 4]
    assert temporaries_inside(padded, ADA, 1) == temporaries_inside(padded, ADA)
    # A mask rules flash out, and so does fp32.
    masked = Attention.of(call(CPU_ATTENTION, 0, [narrow, narrow, narrow, (2, 1, 100, 100)]))
    assert masked.kernel(ADA) == "efficient" and masked.logsumexp("efficient") == 2 * 4 * 128 * 4
    full = Attention.of(call(CPU_ATTENTION, 0, [narrow, narrow, narrow], itemsize=4))
    assert full.kernel(HOPPER) == "efficient" and full.backward_temporaries("efficient") == [2 * 4 * 100 * 4]


def test_temporaries_inside_are_gone_after_the_operator():
    shape = (1, 4, 128, 64)
    inside = [4 * 128 * 4, 128 * 4 * 64 * 4]
    backward = call(CPU_ATTENTION_BACKWARD, 1, [shape] * 5 + [(1, 128, 4)])
    found = cuda_timeline(made_trace(("a", MIB), backward, ("b", 512)))
    assert found.allocated_peak == MIB + sum(inside)
    assert found.breakdown().at_peak["temporaries"] == sum(inside)
    assert found.timeline.totals[-1] == MIB + 512


def test_calls_of_a_real_step(tiny: Trace):
    forward = [one for one in tiny.calls if one.operator == CPU_ATTENTION and one.phase == "forward"]
    backward = [one for one in tiny.calls if one.operator == CPU_ATTENTION_BACKWARD]
    assert len(forward) == len(backward) == 4  # two layers, two steps
    sizes = Attention(batch=2, heads=4, key_heads=2, queries=128, keys=128, head_dim=64, itemsize=2, masked=False)
    assert {Attention.of(one) for one in forward + backward} == {sizes}
    output, logsumexp = forward[0].results
    assert (output.nbytes, logsumexp.nbytes) == (2 * 128 * 4 * 64 * 2, 2 * 128 * 4 * 4)
    products = [one for one in tiny.calls if one.operator == "qlora_tool::matmul"]
    assert {one.in_backward for one in products if one.phase == "backward"} == {True}
    assert {one.in_backward for one in products if one.phase == "forward"} == {False}


def test_packed_rows_go_through_one_kernel_of_variable_length():
    """As a card runs them, whatever a CPU does: two layers, two steps, and no attention of a CPU's."""
    trace = tiny_trace(segments=(60, 68), rows=1)
    steps = [one for one in trace.calls if one.phase != "load"]
    forward = [one for one in steps if one.operator == VARIABLE_LENGTH and one.phase == "forward"]
    backward = [one for one in steps if one.operator == VARIABLE_LENGTH_BACKWARD]
    assert len(forward) == len(backward) == 4
    assert not any(one.operator in (CPU_ATTENTION, CPU_ATTENTION_BACKWARD) for one in steps)
    assert forward[0].shapes == ((128, 4, 64), (128, 2, 64), (128, 2, 64), (3,), (3,))
    # The output, a sum of exponentials for each token and head, and the state of a dropout that there is none of.
    assert [one.nbytes for one in forward[0].results] == [128 * 4 * 64 * 2, 4 * 128 * 4, 16]
    # dO·O and dQ in fp32 with 128 rows more for each of two segments; dK and dV of each of four heads that share two.
    rows = 128 + 2 * 128
    assert temporaries_inside(backward[0], ADA) == [4 * 4 * rows, 4 * rows * 4 * 64, *[128 * 4 * 64 * 2] * 2]
    assert temporaries_inside(backward[0], ADA, 66)[1] == 9 * 4 * rows * 4 * 64  # for two segments of four heads
    in_fp32 = tiny_trace(segments=(60, 68), rows=1, dtype=torch.float32)
    steps = [Attention.of(one) for one in in_fp32.calls if one.operator == CPU_ATTENTION and one.phase != "load"]
    assert {(one.queries, one.key_heads, one.masked) for one in steps} == {(60, 4, False), (68, 4, False)}


def test_deterministic_kernels_take_more():
    """Two rows of four heads: 144 multiprocessors make 18 sums of dQ, 2 x 128 x 4 x 64 in fp32 each; and the workspaces
    of both threads' cuBLAS are those of Hopper on every card."""
    plain, fixed = (tiny_trace({"training.full_determinism": wanted}) for wanted in (False, True))
    assert not plain.deterministic and fixed.deterministic
    found, other = (cuda_timeline(one, compute_capability=ADA, multiprocessors=144) for one in (fixed, plain))
    assert found.workspace_bytes == 64 * MIB and other.workspace_bytes == 2 * 8519680
    (dq,) = {max(temporaries_inside(one, ADA, 144)) for one in fixed.calls if one.operator == CPU_ATTENTION_BACKWARD}
    assert dq == 18 * 2 * 128 * 4 * 64 * 4
    assert found.allocated_peak - other.allocated_peak >= found.workspace_bytes - other.workspace_bytes
    # Of a card that nothing is known of, the most multiprocessors of its kind: the RTX 6000's 142.
    assert cuda_timeline(fixed, compute_capability=ADA).allocated_peak == cuda_timeline(
        fixed, compute_capability=ADA, multiprocessors=142).allocated_peak  # fmt: skip


@pytest.mark.skipif(not has_onednn(), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("settings", [{}, {"model.quantization": "int8"}])
def test_nothing_of_the_predicting_cpu_is_in_it(settings):
    """In fp32, where this CPU's products would take workspaces, and quantizing takes other temporaries than a card."""
    traces = []
    for library in (PYTORCH, ONEDNN):
        use_products(library)
        traces.append(tiny_trace(settings, dtype=torch.float32))
    use_products(PYTORCH)
    one, other = ([(life.nbytes, life.operator, sign) for life, sign in trace.events] for trace in traces)
    assert one == other
    quantized = [life.nbytes for life in traces[0].storages if life.operator.startswith("qlora_tool::quantize")]
    # For nf4 what is taken to look codes up, the codes, the scales, and their own codes, scales and mean; for int8 a
    # piece in 16 bits with its quotients and codes, 8 bytes a row, codes and scales. fp32 weights: q_proj's.
    weights, blocks = 256 * 256, 256 * 256 // 64
    expected = [14 * weights + 4 * blocks, weights // 2, 4 * blocks, blocks, 4 * blocks // 256, 4]
    if settings:
        expected = [7 * weights + 8 * 256, weights, 4 * 256]
    assert quantized[: len(expected)] == expected


@pytest.mark.parametrize("target", [Target("cuda", HOPPER), CPU])
def test_boundaries_in_host_memory_take_nothing_of_a_card(target):
    """Of eight layers' inputs, 2 MiB each, at most those of the layer that is differentiated and of the one before."""
    model = LlamaConfig(hidden_size=256, intermediate_size=256, num_hidden_layers=8, num_attention_heads=4,
                        num_key_value_heads=4, vocab_size=64, max_position_embeddings=1024)  # fmt: skip
    peaks, boundaries = {}, {}
    for offload in (False, True):
        config = with_values(Config(), CHECKPOINTED | {"training.offload_boundaries": offload})
        trace = predict(config, model, BatchShape.full(4, 1024), torch.bfloat16, target=target)
        found = cuda_timeline(trace, compute_capability=HOPPER) if target != CPU else timeline(trace)
        peaks[offload], boundaries[offload] = found.breakdown().peak_bytes, found.breakdown().activations["boundaries"]
    if target == CPU:
        assert peaks[True] == peaks[False]  # they are in host memory already
    else:
        assert boundaries[False] == 8 * 2 * MIB and boundaries[True] <= 2 * 2 * MIB
        assert peaks[False] - peaks[True] >= 5 * 2 * MIB


def test_a_tiny_step(tiny: Trace):
    on_cpu, found = timeline(tiny).breakdown(), cuda_timeline(tiny)
    assert found.timeline.peak_bytes == found.allocated_peak
    assert found.requested_peak <= found.allocated_peak <= found.reserved_peak
    assert found.workspace_bytes == 2 * 8519680
    breakdown = found.breakdown()
    for part in ("base_weights", "quantization_state", "other_weights", "adapter_weights"):
        assert breakdown.at_peak[part] == on_cpu.at_peak[part]
    assert breakdown.at_peak["framework"] >= found.workspace_bytes
    assert cuda_timeline(tiny, compute_capability=HOPPER).workspace_bytes == 64 * MIB


def test_dropout_keeps_a_byte_an_element():
    trace = tiny_trace({"adapter.lora_dropout": 0.1})
    drawn = [one for one in trace.calls if one.operator == "aten::bernoulli_"]
    noise = drawn[0].results[0]
    assert noise.nbytes == 2 * 128 * 256 * 2  # bf16 on a CPU
    alone = Trace([noise], [(noise, +1)], [(0, "forward", 1)], [one for one in drawn if noise in one.results])
    assert cuda_timeline(alone).requested_peak == 2 * 128 * 256


def test_the_optimizers_state(tiny: Trace):
    state = cuda_timeline(tiny).timeline.part_bytes[:, PARTS.index("optimizer_state")]
    adapters = sum(one.nbytes for one in tiny.storages if one.category == "adapter_weights")
    assert state.max() == 5 * adapters  # two moments in fp32 and 16 bits for each bf16 weight
    paged = made_trace(("small", 99_999), ("large", 100_000))
    assert cuda_timeline(paged).requested_peak == 199_999
    paged.storages[1].paged = True
    assert cuda_timeline(paged).requested_peak == 99_999


@pytest.mark.parametrize("layers", [2, pytest.param(32, marks=pytest.mark.slow)])
def test_llama_2_7b_by_hand(layers: int):
    """A Llama-2-7B, or its first layers, at 1 × 2048, r = 16 on all linears, checkpointed, bf16."""
    sizes = LlamaConfig(num_hidden_layers=layers, max_position_embeddings=4096, dtype=torch.bfloat16)
    run = with_values(Config(), CHECKPOINTED), sizes, BatchShape.full(1, 2048), torch.bfloat16
    trace = predict(*run, target=Target("cuda", ADA))
    found = cuda_timeline(trace).breakdown()
    hidden, wide, vocabulary, length, r = 4096, 11008, 32000, 2048, 16
    weights = layers * (4 * hidden * hidden + 3 * hidden * wide)  # q, k, v, o; gate, up, down
    assert found.at_peak["base_weights"] == weights // 2 == layers * 96.5 * MIB  # 3088 MiB of 32 layers
    # A byte for 64 weights, an fp32 scale for 256 of those, an fp32 mean for each weight.
    blocks = weights // 64
    assert found.at_peak["quantization_state"] == blocks + blocks // 256 * 4 + 7 * layers * 4
    # A (16, in) and B (out, 16) in bf16: 76.25 MiB of 32 layers. Two moments in fp32, and 16 bits beside each weight.
    adapters = layers * r * (4 * (hidden + hidden) + 3 * (hidden + wide)) * 2
    assert found.at_peak["adapter_weights"] == adapters == layers * 2.3828125 * MIB
    assert found.at_peak["optimizer_state"] == 5 * adapters
    # What goes into each layer, (1, 2048, 4096) in bf16: 16 MiB a layer, 512 of 32. The peak is in the backward of the
    # last layer, before any is dropped.
    assert found.activations["boundaries"] == layers * length * hidden * 2 == layers * 16 * MIB
    # Embeddings, output projection and norms in bf16, 64 rotary frequencies twice in fp32.
    others = (2 * vocabulary * hidden + (2 * layers + 1) * hidden) * 2
    assert found.at_peak["other_weights"] == pytest.approx(others, abs=1024)
    # In the MLP's backward, when the gradient of what goes into down_proj is made, before that of any adapter.
    assert found.peak_phase == "backward" and found.at_peak["gradients"] == 0
    # One layer recomputed and the step's temporaries, the same whatever the depth; two workspaces and rounding.
    one_layer = found.at_peak["temporaries"] + found.activations["recomputed"] + found.activations["saved"]
    assert one_layer == pytest.approx(345 * MIB, rel=0.03)
    assert found.at_peak["framework"] < 50 * MIB
