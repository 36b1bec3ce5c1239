"""GGUF's block types: how the values of a block are described, and the bytes of it.

A block is cut into sub-blocks. Each value of a sub-block is a·level + b, the level being one of a few that all share, a
and b the sub-block's own; types without b have b = 0. In the types of 32 weights a and b are float16 themselves. In the
k-types (256 weights) a = d·(whole number) and b = -m·(whole number), d and m being float16 and the block's.

Layouts: https://github.com/ggml-org/llama.cpp, ggml/src/ggml-common.h; `gguf.quants` decodes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Blocks:
    """Blocks of one type, not yet bytes.

    Attributes:
        index: (blocks, weights of a block) uint8, which level each weight has.
        d, m: (blocks,) float16; m is None where there is no b. In types of 32 weights they are a and b themselves, in
            k-types what the whole numbers are multiplied by.
        scales, mins: (blocks, sub-blocks) the whole numbers, int16; None in types without.
    """

    index: Tensor
    d: Tensor
    m: Tensor | None = None
    scales: Tensor | None = None
    mins: Tensor | None = None


@dataclass(frozen=True)
class BlockType:
    """One type.

    Attributes:
        name: as `gguf.GGMLQuantizationType` has it.
        levels: ascending.
        affine: whether there is a b.
        weights: of a block.
        sub_blocks: of a block.
        steps: what a sub-block's whole numbers may be, (least, most); None: a and b are float16 themselves.
        pack: the bytes of blocks, (blocks, bytes) uint8.
    """

    name: str
    levels: tuple[int, ...]
    affine: bool
    weights: int
    sub_blocks: int
    steps: tuple[int, int] | None
    pack: Callable[[Blocks], Tensor]

    @property
    def uniform(self) -> bool:
        """Whether the levels are whole numbers one after the other."""
        return self.levels == tuple(range(self.levels[0], self.levels[-1] + 1))

    def coefficients(self, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """a and b of every sub-block, (blocks, sub-blocks) fp32, as they are decoded."""
        a = blocks.d.float().unsqueeze(-1)
        b = torch.zeros_like(a) if blocks.m is None else blocks.m.float().unsqueeze(-1)
        if blocks.scales is None:
            return a.expand(-1, self.sub_blocks), b.expand(-1, self.sub_blocks)
        a = a * blocks.scales.float()
        return a, torch.zeros_like(a) if blocks.mins is None else -(b * blocks.mins.float())

    def values(self, blocks: Blocks) -> Tensor:
        """What the blocks stand for, (blocks, weights) fp32."""
        a, b = self.coefficients(blocks)
        levels = torch.tensor(self.levels, dtype=torch.float32)[blocks.index.long()]
        parts = levels.view(len(levels), self.sub_blocks, -1)
        return (a.unsqueeze(-1) * parts + b.unsqueeze(-1)).flatten(1)


def _bytes(half: Tensor) -> Tensor:
    """(blocks,) float16 → (blocks, 2) uint8."""
    return half.half().contiguous().view(torch.uint8).view(-1, 2)


def _nibbles(low: Tensor, high: Tensor) -> Tensor:
    return low | (high << 4)


def _halves(index: Tensor) -> Tensor:
    """Of 32 weights the first 16 in the lower four bits, the others in the upper."""
    low = index & 15
    return _nibbles(low[:, :16], low[:, 16:])


def _fifth_bits(index: Tensor) -> Tensor:
    """(blocks, 32) → (blocks, 4): the fifth bit of each weight."""
    bits = (index >> 4).view(-1, 4, 8) << torch.arange(8, dtype=torch.uint8)
    return bits.sum(-1, dtype=torch.uint8)


def _pack_q4_0(blocks: Blocks) -> Tensor:
    return torch.cat([_bytes(blocks.d), _halves(blocks.index)], 1)


def _pack_q5_0(blocks: Blocks) -> Tensor:
    return torch.cat([_bytes(blocks.d), _fifth_bits(blocks.index), _halves(blocks.index)], 1)


def _pack_q4_1(blocks: Blocks) -> Tensor:
    assert blocks.m is not None
    return torch.cat([_bytes(blocks.d), _bytes(blocks.m), _halves(blocks.index)], 1)


def _pack_q5_1(blocks: Blocks) -> Tensor:
    assert blocks.m is not None
    fifth = _fifth_bits(blocks.index)
    return torch.cat([_bytes(blocks.d), _bytes(blocks.m), fifth, _halves(blocks.index)], 1)


def _six_bits(blocks: Blocks) -> Tensor:
    """Eight scales and eight mins of six bits in twelve bytes: the first four of each in the lower six bits of bytes 0
    to 7, the others' lower four bits in bytes 8 to 11 and their upper two in the upper two of bytes 0 to 7."""
    assert blocks.scales is not None and blocks.mins is not None
    scales, mins = blocks.scales.to(torch.uint8), blocks.mins.to(torch.uint8)
    return torch.cat([
        scales[:, :4] | ((scales[:, 4:] >> 4) << 6), mins[:, :4] | ((mins[:, 4:] >> 4) << 6),
        _nibbles(scales[:, 4:] & 15, mins[:, 4:] & 15),
    ], 1)  # fmt: skip


def _pairs(index: Tensor) -> Tensor:
    """Of 256 weights in runs of 32, every second run in the upper four bits."""
    runs = (index & 15).view(-1, 4, 2, 32)
    return _nibbles(runs[:, :, 0], runs[:, :, 1]).flatten(1)


def _pack_q4_k(blocks: Blocks) -> Tensor:
    assert blocks.m is not None
    return torch.cat([_bytes(blocks.d), _bytes(blocks.m), _six_bits(blocks), _pairs(blocks.index)], 1)


def _pack_q5_k(blocks: Blocks) -> Tensor:
    assert blocks.m is not None
    places = torch.arange(8, dtype=torch.uint8).view(1, 8, 1)
    fifth = ((blocks.index >> 4).view(-1, 8, 32) << places).sum(1, dtype=torch.uint8)
    return torch.cat([_bytes(blocks.d), _bytes(blocks.m), _six_bits(blocks), fifth, _pairs(blocks.index)], 1)


def _pack_q6_k(blocks: Blocks) -> Tensor:
    assert blocks.scales is not None
    halves = blocks.index.view(-1, 2, 2, 64)  # of each half the first 64 in the lower four bits
    low = _nibbles(halves[:, :, 0] & 15, halves[:, :, 1] & 15).flatten(1)
    places = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(1, 1, 4, 1)
    high = ((blocks.index >> 4).view(-1, 2, 4, 32) << places).sum(2, dtype=torch.uint8).flatten(1)
    return torch.cat([low, high, blocks.scales.to(torch.int8).view(torch.uint8), _bytes(blocks.d)], 1)


BLOCK_TYPES = {
    kind.name: kind
    for kind in (
        BlockType("Q4_0", tuple(range(-8, 8)), False, 32, 1, None, _pack_q4_0),
        BlockType("Q4_1", tuple(range(16)), True, 32, 1, None, _pack_q4_1),
        BlockType("Q5_0", tuple(range(-16, 16)), False, 32, 1, None, _pack_q5_0),
        BlockType("Q5_1", tuple(range(32)), True, 32, 1, None, _pack_q5_1),
        BlockType("IQ4_NL", _IQ4_NL, False, 32, 1, None, _pack_q4_0),
        BlockType("Q4_K", tuple(range(16)), True, 256, 8, (0, 63), _pack_q4_k),
        BlockType("Q5_K", tuple(range(32)), True, 256, 8, (0, 63), _pack_q5_k),
        BlockType("Q6_K", tuple(range(-32, 32)), False, 256, 16, (-128, 127), _pack_q6_k),
    )
}
