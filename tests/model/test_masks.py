"""What is known of a batch spares transformers a look at it, and changes nothing."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from test_causal_lm import ROWS, example, open_tiny
from tiny_models import FAMILIES
from transformers import masking_utils

from qlora_tool.data.batches import Batch, collate
from qlora_tool.model import causal_lm
from qlora_tool.model.masks import Known, known

ALONE = [[one] for row in ROWS for one in row]
FULL = collate([[example(12, 1)], [example(12, 2)]], pad_token_id=0, packing=False)
PADDED = collate(ALONE, pad_token_id=0, packing=False)
PACKED = collate(ROWS, pad_token_id=0, packing=True)
ONE_A_ROW = collate([[example(12, 1)], [example(12, 2)]], pad_token_id=0, packing=True)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_masks_are_those_that_transformers_finds_out(family, tmp_path, monkeypatch):
    model = open_tiny(family, tmp_path)
    batches = {"full": FULL, "padded": PADDED, "packed": PACKED, "one a row": ONE_A_ROW}
    found = {name: model.logits(batch) for name, batch in batches.items()}
    monkeypatch.setattr(causal_lm, "known", lambda batch: nullcontext())
    for name, batch in batches.items():
        assert torch.equal(found[name], model.logits(batch)), name


def test_what_is_known_is_what_collating_knows():
    assert Known.of(FULL) == Known.of(ONE_A_ROW) == Known(begins_anew=False, padded=False)
    assert Known.of(PADDED) == Known(begins_anew=False, padded=True)
    assert Known.of(PACKED) == Known(begins_anew=True, padded=False)


@pytest.mark.parametrize("batch", [PACKED, ONE_A_ROW], ids=["packed", "one a row"])
def test_examples_are_numbered_as_transformers_numbers_them(batch: Batch):
    expected = masking_utils.find_packed_sequence_indices(batch.position_ids)
    with known(batch):
        found = masking_utils.find_packed_sequence_indices(batch.position_ids)
    assert (found is None) == (expected is None) == (batch is ONE_A_ROW)
    assert found is None or torch.equal(found, expected)


def test_nothing_is_known_of_other_batches():
    """Rows in which positions begin anew are found out where nobody says what they are."""
    with known(FULL):
        assert masking_utils.find_packed_sequence_indices(PACKED.position_ids) is None
    found = masking_utils.find_packed_sequence_indices(PACKED.position_ids)
    assert found.max() == 2
