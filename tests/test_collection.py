"""Garbage that is not searched for meanwhile, and is again afterwards."""

from __future__ import annotations

import gc

import pytest

from qlora_tool.collection import without_collection


def test_a_search_is_left_out_meanwhile_alone():
    assert gc.isenabled()
    with without_collection():
        assert not gc.isenabled()
        with without_collection():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(KeyError), without_collection():
        raise KeyError
    assert gc.isenabled()


def test_who_has_switched_it_off_finds_it_off():
    gc.disable()
    try:
        with without_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
