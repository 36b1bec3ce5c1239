"""The table of cards: names in every spelling, and what a size means."""

import pytest

from qlora_tool.config import Config
from qlora_tool.errors import UserError
from qlora_tool.memory.allocator.cards import (
    CARDS,
    GIB,
    MIB,
    estimate_total,
    find_card,
    named_budget,
    parse_device_memory,
)
from qlora_tool.memory.plan.limit import limit_on

# Data-centre cards whose GDDR memory keeps a sixteenth for ECC.
WITH_ECC = {"t4", "l4", "l40s", "a10", "a10g", "a40"}


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("rtx-4090", "rtx-4090"),
        ("RTX 4090", "rtx-4090"),
        ("4090", "rtx-4090"),
        ("rtx4070 Ti SUPER", "rtx-4070-ti-super"),
        ("rtx-3080-12gb", "rtx-3080-12gb"),
        ("RTX 4090 24GB", "rtx-4090"),
        ("A6000", "rtx-a6000"),
        ("6000 Ada", "rtx-6000-ada"),
        # As torch.cuda.get_device_name says it
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "rtx-4090-laptop"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "rtx-pro-6000"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("Tesla V100-SXM2-32GB", "v100-32gb"),
        ("Tesla P100-PCIE-16GB", "p100"),
        ("Tesla T4", "t4"),
    ],
)
def test_a_card_is_found_in_any_spelling(written, name):
    assert find_card(written).name == name


def test_every_card_is_found_by_its_own_name():
    assert [find_card(card.name) for card in CARDS] == list(CARDS)
    assert len({card.name for card in CARDS}) == len(CARDS)


def test_a_name_that_was_sold_with_several_sizes_says_which():
    with pytest.raises(UserError, match="exists with 40 GB and 80 GB: write a100-40gb or a100-80gb"):
        find_card("A100")


def test_an_unknown_card_names_the_closest():
    with pytest.raises(UserError, match=r"'rtx-4091' is not in the table of cards; .*rtx-4090.* 24GB"):
        find_card("rtx-4091")
    with pytest.raises(UserError, match="'toaster' is not in the table of cards; give its memory"):
        find_card("toaster")


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_what_cuda_sees_is_somewhat_less_than_the_card_is_sold_with(card):
    share = card.total_bytes / (card.nominal_gib * GIB)
    assert (0.91 if card.name in WITH_ECC else 0.89 if card.nominal_gib == 4 else 0.92) < share < 1
    if card.name not in WITH_ECC:
        assert estimate_total(card.nominal_gib) <= card.total_bytes  # the estimate promises no more than was read
    assert card.estimated == (card.total_bytes == estimate_total(card.nominal_gib))
    assert card.tensor_tflops is None or 10 < card.tensor_tflops < 1000
    assert (card.bandwidth is None) == (card.tensor_tflops is None)


def test_bf16_begins_with_ampere():
    assert find_card("rtx-3060").bf16 and find_card("h100").bf16
    assert not find_card("t4").bf16 and not find_card("v100-32gb").bf16 and not find_card("rtx-2080-ti").bf16


def test_a_whole_number_of_gb_is_what_a_card_is_sold_with():
    budget = parse_device_memory("24GB")
    # 24 GiB less 4 %
    assert budget.bytes == 24 * GIB - 24 * GIB * 4 // 100
    assert budget.estimated and budget.name == "a card of 24 GB"
    assert parse_device_memory("24 gb") == budget
    # at least 448 MiB are kept
    assert parse_device_memory("8GB").bytes == (8192 - 448) * MIB


@pytest.mark.parametrize(
    ("written", "nbytes"),
    [
        ("22GiB", 22 * GIB),
        ("24081MiB", 24081 * MIB),
        ("23.5GB", 23_500_000_000),
        ("25000000000", 25_000_000_000),
    ],
)
def test_other_sizes_are_exact(written, nbytes):
    budget = parse_device_memory(written)
    assert (budget.bytes, budget.name, budget.estimated) == (nbytes, written, False)


def test_a_card_gives_what_was_read_of_it():
    budget = parse_device_memory("NVIDIA GeForce RTX 4090")
    assert (budget.bytes, budget.name, budget.estimated) == (24081 * MIB, "rtx-4090", False)
    assert parse_device_memory("4090") == budget
    assert parse_device_memory("rtx-4080").estimated


@pytest.mark.parametrize(
    ("written", "meant"),
    [("24", "24GB"), ("24G", "24GB"), ("24g", "24GB"), ("22Gi", "22GiB"), ("24 gigs", "24GB"), ("24.5", "24.5GB")],
)
def test_a_size_without_its_unit_gets_it(written, meant):
    with pytest.raises(UserError, match=rf"^'{written}' is neither a size nor a card .*; did you mean {meant}\?$"):
        parse_device_memory(written)


def test_a_size_for_a_cpu_is_no_cards():
    """16 * 10^9 bytes are 14.90 GiB; a card of 16 GB has 16 GiB less what its driver keeps."""
    found = named_budget("16GB", "cpu")
    assert (found.bytes, found.estimated) == (16 * 10**9, False) and "card" not in found.name
    assert str(limit_on(Config(), "cpu", found)) == "the limit is 14.90 GiB"
    assert named_budget("16GB", "cuda").name == "a card of 16 GB"


@pytest.mark.parametrize("written", ["0GB", "0", "24", "much", "-24GB", ""])
def test_what_is_neither_size_nor_card_is_an_error(written):
    with pytest.raises(UserError, match="24GB"):
        parse_device_memory(written)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0GB", r"above 0.*found '0GB'"), ("-3GB", "above 0"), ("0", "above 0"), ("0.0GiB", "above 0"),
        ("12", "did you mean 12GB"), ("mi300x", "only those are supported"), ("m2", "NVIDIA's cards"),
        ("M3 Max", "--device cpu"), ("Radeon RX 7900", "--device cpu"), ("rx-7900", "--device cpu"),
        ("Intel Arc A770", "--device cpu"),
    ],
)  # fmt: skip
def test_what_is_no_size_and_no_card_of_nvidia(text, said):
    with pytest.raises(UserError, match=said):
        parse_device_memory(text)
