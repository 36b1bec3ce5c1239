"""What PyTorch's operators take on a CUDA device that a trace made on a CPU does not show: temporaries inside them,
results of another size, workspaces of libraries. Operations of our own say it themselves (`ops/declare.py`).

Everything is told from the shapes of a call. Where a figure is not read from a source but estimated, the table says so,
and `ESTIMATED` names the operator. Read in PyTorch 2.13 and bitsandbytes 0.50.2.

Operators that take nothing beside their results, and so have no entry: `_log_softmax`, `nll_loss` and their backward
passes; `embedding`; all elementwise operators. Reductions over more rows than a card has blocks keep partial sums of
some KB, and `topk` sorts within a block: both are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qlora_tool.memory.allocator.blocks import MIB
from qlora_tool.memory.trace.cpu_operators import ATTENTION, ATTENTION_BACKWARD, DECOMPOSITIONS
from qlora_tool.memory.trace.tracer import Call
from qlora_tool.sizes import memory_size

CPU_ATTENTION, CPU_ATTENTION_BACKWARD = ATTENTION, ATTENTION_BACKWARD
VARIABLE_LENGTH = "torch_attn::_varlen_attn"
VARIABLE_LENGTH_BACKWARD = f"{VARIABLE_LENGTH}_backward"
FLASH_HEAD_DIM = 256  # the widest head of the flash kernels


def cublas_workspace(capability: tuple[int, int], deterministic: bool = False) -> int:
    """Bytes of the workspace that each thread's cuBLAS handle keeps from its first product on, cuBLASLt's included.

    `parseChosenWorkspaceSize` in `aten/src/ATen/cuda/CublasHandlePool.cpp`: 32 MiB on Hopper and (since pytorch#175344)
    Blackwell, else `:4096:2:16:8`, that is 2 × 4096 KiB + 8 × 16 KiB. CUBLAS_WORKSPACE_CONFIG changes it; deterministic
    kernels ask for `:4096:8`, 32 MiB. From pytorch#194311 on (after 2.13) it is freed after each product instead.
    """
    return 32 * MIB if deterministic or capability[0] in (9, 10, 12) else 2 * 4096 * 1024 + 8 * 16 * 1024


# The CUDA context with the kernels of a step in it, in MB: PyTorch's, cuBLAS', bitsandbytes' and Triton's are loaded
# when they are first used. Capability 9 was measured: 905 on an H200 (driver 580, CUDA 13, torch 2.11), 730 of them
# before a step. The others are ESTIMATED: between 430 and 620 was seen on older cards, more with newer
# drivers and with more multiprocessors; `calibrate` measures it.
_CONTEXT_MB = {7: 450, 8: 620, 9: 905, 10: 905, 12: 700}


_CONTEXTS_SEEN_MB = (430, 905)


def estimated_context(capability: tuple[int, int]) -> int:
    """Bytes of the CUDA context, for want of a measurement."""
    return _CONTEXT_MB.get(capability[0], 600) * 10**6


def about_estimated_context(capability: tuple[int, int]) -> str:
    """That estimate in words: how large, how far it may be off, and how to replace it."""
    least, most = (memory_size(size * 10**6) for size in _CONTEXTS_SEEN_MB)
    return (
        f"the CUDA context, {memory_size(estimated_context(capability))} ({least} to {most} were seen on various "
        "cards; `qlora-tool profile-memory CONFIG --calibrate` on the card measures it)"
    )


# ------------------------------------------------------------------------------------------------------- attention


@dataclass(frozen=True)
class Attention:
    """The sizes of one call of scaled-dot-product attention.

    Attributes:
        batch, heads, key_heads, queries, keys, head_dim: of q (batch, heads, queries, head_dim) and k (batch,
            key_heads, keys, head_dim).
        itemsize: bytes of an element of q.
        masked: whether a mask is given.
    """

    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    head_dim: int
    itemsize: int
    masked: bool

    @classmethod
    def of(cls, call: Call) -> Attention:
        """Of a forward call (q, k, v, mask?) or a backward one (dO, q, k, v, O, logsumexp, mask?) on a CPU."""
        backward = call.operator == CPU_ATTENTION_BACKWARD
        q, k = call.shapes[1:3] if backward else call.shapes[:2]
        masked = len(call.shapes) > (6 if backward else 3)
        return cls(q[0], q[1], k[1], q[2], k[2], q[3], call.itemsize, masked)

    def kernel(self, capability: tuple[int, int]) -> str:
        """Which kernel CUDA takes: `flash` or `efficient`.

        `aten/src/ATen/native/transformers/cuda/sdp_utils.cpp`, without cuDNN's (`segments.leave_out_cudnn`): flash (16
        bits, no mask, from 8.0 on), then the memory-efficient one. Not looked at: head dimensions that are not
        multiples of 8, and those above 192 where dropout or 8.6, 8.9 and 12.x forbid flash.
        """
        short = self.itemsize == 2 and self.head_dim <= FLASH_HEAD_DIM
        if short and capability >= (8, 0) and not self.masked:
            return "flash"
        return "efficient"

    def logsumexp(self, kernel: str) -> int:
        """Bytes of what forward keeps of each query beside the output: fp32 (batch, heads, queries).

        The memory-efficient kernel rounds the queries up to 32 (`kAlignLSE`).
        """
        return 4 * self.batch * self.heads * (_up(self.queries, 32) if kernel == "efficient" else self.queries)

    def backward_temporaries(self, kernel: str, deterministic_on: int | None = None) -> list[int]:
        """Bytes of what backward takes inside, beside dQ, dK and dV.

        `deterministic_on`: of deterministic kernels, the card's multiprocessors.

        flash (`flash_attn/flash_api.cpp`, `mha_bwd`): the rows' sums dO·O, fp32 (batch, heads, queries to 128); dQ in
        fp32 (batch, queries to 128, heads, head_dim to 32, above 128 to 64); where several query heads share a key
        head, dK and dV of every query head before they are summed, (batch, keys, heads, head_dim) each.
        The memory-efficient kernel's (`mem_eff_attention/
        kernel_backward.h`) dQ in fp32 is ESTIMATED likewise, queries and head_dim to 64; fp32 needs none.
        """
        if kernel == "efficient":
            rows, width = _up(self.queries, 64), _up(self.head_dim, 64)
            delta = 4 * self.batch * self.heads * self.queries
            return [delta] if self.itemsize == 4 else [delta, 4 * self.batch * rows * self.heads * width]
        rows, width = _up(self.queries, 128), _flash_width(self.head_dim)
        sums = _sums_of_queries(self.batch, self.heads, deterministic_on)
        temporaries = [4 * self.batch * self.heads * rows, sums * 4 * self.batch * rows * self.heads * width]
        if self.heads != self.key_heads:
            temporaries += [self.batch * self.keys * self.heads * self.head_dim * self.itemsize] * 2
        return temporaries


RANDOM_STATE = (16, 8)
"""Bytes of what the attention kernels keep for dropout whether there is any or not: seed and offset, and one unused."""


def _flash_width(head_dim: int) -> int:
    return _up(head_dim, 32 if head_dim <= 128 else 64)


def _sums_of_queries(batch: int, heads: int, deterministic_on: int | None) -> int:
    """How many sums flash attention keeps for the queries' gradient (`nsplits`): one that blocks add to as they finish,
    or, deterministic, one for each block of keys that may run at a time."""
    return 1 if deterministic_on is None else -(-deterministic_on // (batch * heads))


def _variable_length_backward(call: Call, deterministic_on: int | None) -> list[int]:
    """The same over segments of any length (`mha_varlen_bwd`): the sums dO·O and dQ in fp32 have 128 rows more for each
    segment; dK and dV of every query head, (keys, heads, head_dim) each, where several share a key head."""
    _, (queries, heads, head_dim), (keys, key_heads, _), _, _, _, (offsets, *_), *_ = call.shapes
    rows = queries + 128 * (offsets - 1)
    sums = _sums_of_queries(offsets - 1, heads, deterministic_on)
    temporaries = [4 * heads * rows, sums * 4 * rows * heads * _flash_width(head_dim)]
    if heads != key_heads:
        temporaries += [keys * heads * head_dim * call.itemsize] * 2
    return temporaries


# ------------------------------------------------------------------------------------------------ other operators


def _index_put(call: Call) -> list[int]:
    """Adding at indices sorts them (`native/cuda/Indexing.cu`, `index_put_with_sort_kernel`): int64, linear, sorted,
    the order before and after. ESTIMATED: as much again for the sort itself (cub)."""
    count = _numel(call.shapes[1]) if len(call.shapes) > 1 else 0
    return [8 * count] * 4 + [16 * count]


def _embedding_backward(call: Call) -> list[int]:
    """`native/cuda/Embedding.cu`, `embedding_dense_backward_cuda`: nothing up to 3072 indices; above, they are sorted,
    and the rows of every ten indices are summed in fp32 first. ESTIMATED: the sort's own, and that no two of those tens
    are of one token."""
    gradient, indices = call.shapes
    count = _numel(indices)
    return [] if count <= 3072 else [8 * count] * 4 + [16 * count, 4 * -(-count // 10) * gradient[-1]]


def _sort(call: Call) -> list[int]:
    """`native/cuda/Sort.cu`, `sort_cuda_kernel`: the indices before, int64, and (ESTIMATED) cub's second buffers."""
    count = _numel(call.shapes[0])
    return [8 * count, (8 + call.itemsize) * count]


_INSIDE: dict[str, Callable[[Call], list[int]]] = {
    "aten::index_put": _index_put,
    "aten::index_put_": _index_put,
    "aten::embedding_dense_backward": _embedding_backward,
    "aten::sort": _sort,
}

ESTIMATED = {
    "efficient": "what memory-efficient attention takes in backward",
    "aten::embedding_dense_backward": "what the embedding's gradient is sorted in",
    **dict.fromkeys(DECOMPOSITIONS, "what decompositions take while the adapters' start is made"),
}
"""What is estimated where it is not small, by kernel or operator."""


def temporaries_inside(
    call: Call, capability: tuple[int, int], deterministic_on: int | None = None
) -> list[int]:
    """Bytes of each block that the operator takes and gives back before it returns.

    `deterministic_on`: of deterministic kernels, the card's multiprocessors.
    """
    if call.operator == CPU_ATTENTION_BACKWARD:
        attention = Attention.of(call)
        return attention.backward_temporaries(attention.kernel(capability), deterministic_on)
    if call.operator == VARIABLE_LENGTH_BACKWARD:
        return _variable_length_backward(call, deterministic_on)
    inside = _INSIDE.get(call.operator)
    return inside(call) if inside else []


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
