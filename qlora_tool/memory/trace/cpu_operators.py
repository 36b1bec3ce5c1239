"""What PyTorch's operators take inside on a CPU and give back, beside their results, told from the shapes of a call.

Read in PyTorch 2.13: attention in `aten/src/ATen/native/cpu/FlashAttentionKernel.cpp`, decompositions in
`native/BatchLinearAlgebra*.cpp`, and what LAPACK's ?geqrf, ?orgqr and ?syevd work in, in their documentation. Attention
in 16 bits also packs blocks for some processors' products, which are left out. `allocator/operators.py` has what a card
takes; for the decompositions, which the starts of adapters are made by, these sizes stand there as an estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
ATTENTION_BACKWARD = f"{ATTENTION}_backward"

_COLUMNS = 32  # that ?geqrf and ?orgqr work on at a time
_TURNED = 60  # rows and columns of the block by which a matrix is copied into column order (`native/Copy.cpp`)
_INT, _FLOAT = 4, 4


def _blocks(query: Tensor, key: Tensor) -> tuple[int, int]:
    """Queries and keys of (batch, heads, length, head_dim) that a thread works on at a time."""
    queries, keys = query.shape[-2], key.shape[-2]
    many = 256 if queries >= 768 else 64 if queries >= 192 else 32
    return min(many, queries), min(512, keys)


def _attention(query: Tensor, key: Tensor, *_: object) -> int:
    """Of each thread scores, their rows' greatest and sums, and results, fp32; scores in 16 bits again."""
    queries, keys = _blocks(query, key)
    again = queries * keys * query.element_size() if query.element_size() < _FLOAT else 0
    return torch.get_num_threads() * (_FLOAT * queries * (keys + 2 + query.shape[-1]) + again)


def _attention_backward(_gradient: Tensor, query: Tensor, key: Tensor, *_: object) -> int:
    """Of each thread scores and their gradients; the rows' sums."""
    queries, keys = _blocks(query, key)
    again = query.element_size() if query.element_size() < _FLOAT else 0
    return torch.get_num_threads() * 2 * queries * keys * (_FLOAT + again) + _FLOAT * queries


def _svd(matrix: Tensor, *_: object) -> int:
    """The copy in column order, and how that is made. ?gesdd's own work is in no allocator's count."""
    return matrix.element_size() * (matrix.numel() + min(_TURNED**2, matrix.numel())) + _INT


def _qr(matrix: Tensor, *_: object) -> int:
    """A number for each reflection, and ?geqrf's or ?orgqr's work."""
    return matrix.element_size() * min(matrix.shape) * (1 + _COLUMNS)


def _eigh(matrix: Tensor, *_: object) -> int:
    """?syevd's work; the eigenvectors take the place of the matrix's copy."""
    size = matrix.shape[0]
    return matrix.element_size() * (2 + 6 * size + 2 * size**2) + _INT * (4 + 5 * size)


_INSIDE: Mapping[str, Callable[..., int]] = {
    ATTENTION: _attention,
    ATTENTION_BACKWARD: _attention_backward,
    "aten::_linalg_svd": _svd,
    "aten::linalg_qr": _qr,
    "aten::_linalg_eigh": _eigh,
}
DECOMPOSITIONS = frozenset(name for name in _INSIDE if "linalg" in name)


def taken_inside(operator: str, arguments: tuple) -> int:
    """Bytes that an operator takes inside a call on a CPU, as far as they are known here."""
    inside = _INSIDE.get(operator)
    return inside(*arguments) if inside else 0
