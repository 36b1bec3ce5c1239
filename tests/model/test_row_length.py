"""How long a row may be."""

from __future__ import annotations

import pytest
from tiny_models import tiny_config
from transformers import AutoConfig

from qlora_tool.errors import UserError
from qlora_tool.model.open import check_length, positions_of


def test_a_limit_of_minus_one_is_none():
    """xlnet's; and mamba and T5 kinds name none."""
    for config in (AutoConfig.for_model("xlnet"), tiny_config("mamba")):
        assert positions_of(config) is None
        check_length(config, 100_000)


def test_rows_beyond_the_positions_are_refused():
    config = tiny_config("llama", max_position_embeddings=64)
    assert positions_of(config) == 64
    check_length(config, 64)
    with pytest.raises(UserError, match="max_length: 65, but the model's max_position_embeddings is 64"):
        check_length(config, 65)
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    check_length(tiny_config("llama", max_position_embeddings=64, rope_parameters=scaled), 65)
