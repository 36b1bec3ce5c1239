"""Matrices that bitsandbytes quantized one by one, joined into experts without quantizing them again."""

from __future__ import annotations

import pytest
import torch

from qlora_tool.weights.by_rows import experts_from_rows, rows_of
from qlora_tool.weights.quantized import quantize

KINDS = [("nf4", True), ("nf4", False), ("fp4", True), ("int8", True)]


@pytest.mark.parametrize(("kind", "double_quant"), KINDS)
@pytest.mark.parametrize("shape", [(48, 64), (300, 128)])
def test_joined_rows_have_the_values_of_the_matrices(kind, double_quant, shape):
    generator = torch.Generator().manual_seed(0)
    matrices = [quantize(torch.randn(shape, generator=generator), kind, double_quant) for _ in range(4)]
    rows = [rows_of(matrix) for matrix in matrices]
    gate, up = rows[:2], rows[2:]
    codes, scales = (torch.cat([torch.stack([one[part] for one in some]) for some in (gate, up)], 1) for part in (0, 1))
    joined = experts_from_rows(matrices[0], codes, scales, (2, 2 * shape[0], shape[1]))
    expected = torch.cat([torch.stack([m.dequantize() for m in some]) for some in (matrices[:2], matrices[2:])], 1)
    assert torch.equal(joined.dequantize(), expected)
    assert torch.equal(joined.expert(1).dequantize(torch.bfloat16), expected[1].bfloat16())


def test_what_has_no_rows_of_its_own_is_left_to_others():
    matrix = quantize(torch.randn(64, 96), "nf4")  # a block in two rows
    assert rows_of(matrix) is None
    codes, scales = rows_of(quantize(torch.randn(64, 128), "nf4"))
    with pytest.raises(ValueError, match="for a weight of"):
        experts_from_rows(matrix, codes[None], scales[None].transpose(1, 2), (1, 64, 128))
