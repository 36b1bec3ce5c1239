"""Which example goes where, and that a model sees of each just what it sees of it alone."""

from __future__ import annotations

import math
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_tool.data.batches import collate, plan_epoch
from qlora_tool.data.tokenize import Example

PAD = 2


def lengths(count, longest=64, seed=1):
    draw = random.Random(seed)
    return [draw.randint(1, longest) for _ in range(count)]


def plan(given, **options):
    defaults = {"batch_size": 4, "max_length": 64, "packing": False, "shuffle": True, "seed": 0, "epoch": 0}
    return plan_epoch(given, **{**defaults, **options})


def flat(batches) -> list[int]:
    return [index for batch in batches for row in batch for index in row]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_example_comes_once_and_batches_are_full_but_the_last(packing, shuffle):
    given = lengths(203)
    batches = plan(given, packing=packing, shuffle=shuffle)
    assert sorted(flat(batches)) == list(range(203))
    assert all(len(batch) == 4 for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= 4
    for row in (row for batch in batches for row in batch):
        assert len(row) == 1 if not packing else sum(given[index] for index in row) <= 64


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_sums_are_those_of_the_rows_in_their_order(packing, shuffle):
    given = lengths(203)
    batches = plan(given, packing=packing, shuffle=shuffle)
    values = [3 * length + number for number, length in enumerate(given)]
    assert batches.sums(values).tolist() == [sum(values[n] for n in row) for batch in batches for row in batch]


@pytest.mark.parametrize("packing", [False, True])
def test_without_shuffling_the_files_order_is_kept_in_every_epoch(packing):
    given = lengths(50)
    for epoch in range(2):
        assert flat(plan(given, packing=packing, shuffle=False, epoch=epoch)) == list(range(50))


@pytest.mark.parametrize("packing", [False, True])
def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else(packing):
    given = lengths(200)
    first = plan(given, packing=packing)
    random.seed(5)
    torch.manual_seed(5)
    state = random.getstate(), torch.get_rng_state().tolist()
    assert plan(given, packing=packing) == first
    assert (random.getstate(), torch.get_rng_state().tolist()) == state
    assert plan(given, packing=packing, seed=1) != first
    assert plan(given, packing=packing, epoch=1) != first
    assert plan(given, packing=packing, seed=1) != plan(given, packing=packing, epoch=1)


def test_an_order_written_down_so_that_resuming_elsewhere_repeats_it():
    assert plan([5] * 8, batch_size=3, seed=3, epoch=2) == [[[2], [5], [0]], [[6], [7], [4]], [[1], [3]]]


def test_packing_by_hand():
    # Longest first, into the row with the least room left: 6, 5, then 5 beside the 5, 4 beside the 6, and 3 with 2.
    given = [5, 2, 6, 3, 5, 4]
    rows = [row for batch in plan(given, packing=True, max_length=10) for row in batch]
    assert sorted(sorted(given[index] for index in row) for row in rows) == [[2, 3], [4, 6], [5, 5]]
    # In the file's order a row is left as soon as the next example does not fit.
    rows = [row for batch in plan(given, packing=True, shuffle=False, max_length=10) for row in batch]
    assert rows == [[0, 1], [2, 3], [4, 5]]


def test_the_last_two_of_a_row_are_chosen_to_fill_it():
    # 9 leaves 11: 6 + 5 fill it where 8, the longest that fits, leaves a rest that nothing fits into.
    given = [9, 8, 6, 5, 6, 6]
    rows = [row for batch in plan(given, packing=True, max_length=20) for row in batch]
    assert sorted(sorted(given[index] for index in row) for row in rows) == [[5, 6, 9], [6, 6, 8]]
    # Half of what is left is a pair only where there are two of it.
    given = [6, 2, 1]
    rows = [row for batch in plan(given, packing=True, max_length=10) for row in batch]
    assert [sorted(row) for row in rows] == [[0, 1, 2]]


def test_rows_are_nearly_full_where_no_example_is_short():
    """Lengths such that best-fit decreasing fills 96 % of a row: its rest is too short for the shortest example."""
    draw = random.Random(4)
    given = [draw.randint(100, 200) for _ in range(3000)]
    rows = sum(map(len, plan(given, packing=True, max_length=512)))
    assert sum(given) >= 0.98 * 512 * rows


def lengths_by_batch(batches, given) -> list[list[int]]:
    return [[given[index] for row in batch for index in row] for batch in batches]


def test_batches_grouped_by_length_hold_examples_of_like_length_in_no_order():
    given = lengths(203)
    batches = plan(given, group_by_length=True)
    assert sorted(flat(batches)) == list(range(203))
    assert all(len(batch) == 4 for batch in batches[:-1]) and len(batches[-1]) == 3
    found = lengths_by_batch(batches, given)
    padded = sum(len(batch) * max(batch) for batch in found)
    assert padded < 1.1 * sum(given) < sum(len(batch) * max(batch) for batch in lengths_by_batch(plan(given), given))
    longest = [max(batch) for batch in found]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)
    assert plan(given, group_by_length=True, epoch=1) != batches == plan(given, group_by_length=True)


def test_only_a_stretch_of_the_shuffled_examples_is_sorted_at_a_time():
    given = list(range(1, 1001))
    found = lengths_by_batch(plan(given, group_by_length=True, batch_size=2), given)
    assert max(max(batch) - min(batch) for batch in found) > 5  # all at once would give neighbours everywhere


def test_every_epoch_has_as_many_packed_rows_and_few_more_than_there_must_be():
    given = lengths(500)
    counts = {sum(map(len, plan(given, packing=True, epoch=epoch))) for epoch in range(4)}
    (count,) = counts
    assert count <= 11 / 9 * math.ceil(sum(given) / 64) + 6 / 9  # best-fit decreasing's bound (Johnson 1974)


def test_an_example_longer_than_a_row_cannot_be_packed():
    with pytest.raises(ValueError, match="example 1 has 65 tokens, more than a row's max_length of 64"):
        plan([3, 65], packing=True)


def example(ids, first_trained=1, where="somewhere"):
    return Example(list(ids), [-100] * first_trained + list(ids[first_trained:]), where)


class TestCollate:
    def test_padded_rows(self):
        rows = [[example([5, 6, 7], 2, "a")], [example([8, PAD], 0, "b")]]
        batch = collate(rows, pad_token_id=PAD, packing=False)
        assert batch.input_ids.tolist() == [[5, 6, 7], [8, PAD, PAD]]
        # The trained token whose id is the padding's keeps its label; the first of a row has none.
        assert batch.labels.tolist() == [[-100, -100, 7], [-100, PAD, -100]]
        assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
        assert batch.position_ids is batch.segments is None
        assert (batch.tokens, batch.trained_tokens, batch.where) == (5, 2, ["a", "b"])

    def test_rows_of_one_length_need_no_mask(self):
        batch = collate([[example([5, 6])], [example([7, PAD])]], pad_token_id=PAD, packing=False)
        assert batch.attention_mask is None
        assert (batch.tokens, batch.trained_tokens) == (4, 2)

    def test_packed_rows(self):
        rows = [[example([5, 6, 7], 0), example([8, 9], 0)], [example([4, 3], 0)]]
        batch = collate(rows, pad_token_id=PAD, packing=True)
        assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [4, 3, PAD, PAD, PAD]]
        assert batch.labels.tolist() == [[-100, 6, 7, -100, 9], [-100, 3, -100, -100, -100]]
        assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
        assert batch.segments.lengths == (3, 2, 2, 3)  # the last one is padding
        assert batch.segments.offsets.tolist() == [0, 3, 5, 7, 10] and batch.segments.offsets.dtype == torch.int32
        assert batch.segments.runs() == [(1, 3), (2, 2), (1, 3)] and batch.segments.longest == 3
        assert batch.attention_mask is None
        assert (batch.tokens, batch.trained_tokens) == (7, 4)

    def test_no_position_of_padding_is_beyond_the_longest_example(self):
        rows = [[example([5, 6, 7]), example([8, 9]), example([5, 6, 7])], [example([4])]]
        batch = collate(rows, pad_token_id=PAD, packing=True)
        assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], [0, 0, 1, 2, 0, 1, 2, 0]]
        assert batch.segments.lengths == (3, 2, 3, 1, 3, 3, 1) and batch.segments.padding == {4, 5, 6}
        places, count = batch.example_of(torch.tensor([0, 3, 7, 8]))
        assert (places.tolist(), count) == ([0, 1, 2, 3], 4)

    def test_rows_without_padding(self):
        rows = [[example([5, 6, 7], 2, "a")], [example([8, PAD], 0, "b")]]
        batch = collate(rows, pad_token_id=0, packing=False, padding_free=True)
        assert batch.input_ids.tolist() == [[5, 6, 7, 8, PAD]]
        assert batch.labels.tolist() == [[-100, -100, 7, -100, PAD]]
        assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]] and batch.attention_mask is None
        assert batch.segments.lengths == (3, 2)
        assert (batch.predicting.tolist(), batch.targets.tolist()) == ([1, 3], [7, PAD])
        assert (batch.tokens, batch.trained_tokens, batch.where) == (5, 2, ["a", "b"])

    def test_packed_rows_stay_rows(self):
        rows = [[example([5, 6]), example([7, 8])], [example([4, 3])]]
        found, expected = (collate(rows, pad_token_id=0, packing=True, padding_free=free) for free in (True, False))
        assert torch.equal(found.input_ids, expected.input_ids) and found.segments.lengths == expected.segments.lengths

    def test_several_examples_in_a_row_are_packing(self):
        with pytest.raises(ValueError, match="one example"):
            collate([[example([5, 6]), example([7])]], pad_token_id=PAD, packing=False)

    def test_a_card_gets_it_without_waiting(self, monkeypatch):
        """Every tensor from pinned memory: from other memory torch waits for the device, and so would each step."""
        asked = []

        def pin(tensor):
            asked.append(("pinned", tensor.data_ptr()))
            return tensor

        def to(tensor, device, non_blocking=False):
            asked.append((str(device), non_blocking, tensor.data_ptr()))
            return tensor

        batch = collate([[example([5, 6])], [example([7, 8, 9])]], pad_token_id=PAD, packing=False, padding_free=True)
        monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
        monkeypatch.setattr(torch.Tensor, "to", to)
        batch.to("cuda:0")
        fields = [*vars(batch).values(), batch.segments.offsets]
        tensors = [value.data_ptr() for value in fields if isinstance(value, torch.Tensor)]
        assert len(tensors) >= 5
        assert sorted(asked, key=str) == sorted(
            [("pinned", one) for one in tensors] + [("cuda:0", True, one) for one in tensors], key=str
        )

    def test_moving_to_another_device_keeps_the_rest(self):
        batch = collate([[example([5, 6])]], pad_token_id=PAD, packing=True).to("meta")
        assert batch.input_ids.device.type == batch.labels.device.type == batch.position_ids.device.type == "meta"
        assert batch.segments.offsets.device.type == "meta" and batch.segments.lengths == (2,)
        assert (batch.attention_mask, batch.tokens, batch.trained_tokens) == (None, 2, 1)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        use_cache=False,
        attn_implementation="sdpa",
        initializer_range=0.4,  # so that a token of another example that is seen is noticed
    )
    return LlamaForCausalLM(config).eval()


def token_losses(model, batch) -> torch.Tensor:
    """The loss of every trained token, in order of rows and places."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
    with torch.no_grad():
        logits = model(**{name: tensor for name, tensor in inputs.items() if tensor is not None}).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="none", ignore_index=-100
    )
    return losses[batch.labels[:, 1:].flatten() != -100]


@pytest.fixture(scope="module")
def examples():
    draw = random.Random(3)
    made = [[draw.randrange(3, 128) for _ in range(n)] for n in (17, 1, 9, 30, 2, 12, 5)]
    return [example(ids, first_trained=len(ids) // 3) for ids in made]


@pytest.fixture(scope="module")
def alone(model, examples):
    reference = []
    for each in examples:
        ids = torch.tensor([each.input_ids])
        with torch.no_grad():
            predicted = model(input_ids=ids).logits.log_softmax(-1)[0]
        trained = [place for place in range(1, len(each.labels)) if each.labels[place] != -100]
        reference.append(torch.tensor([-predicted[place - 1, each.input_ids[place]].item() for place in trained]))
    return reference


class TestAgainstOneExampleAtATime:
    """The reference: each example in a forward pass of its own, with neither mask nor positions given."""

    @pytest.mark.parametrize(
        "rows", [[[0, 1, 2], [3, 4]], [[6, 5, 0], [3], [1, 4, 2]], [[1], [3]], [[0, 1, 2, 3, 4, 5, 6]]]
    )
    def test_packed(self, model, examples, alone, rows):
        batch = collate([[examples[index] for index in row] for row in rows], pad_token_id=PAD, packing=True)
        expected = torch.cat([alone[index] for row in rows for index in row])
        assert batch.trained_tokens == len(expected)
        torch.testing.assert_close(token_losses(model, batch), expected, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("indices", [[0, 3, 5], [3], [4, 6, 2, 0]])
    def test_padded(self, model, examples, alone, indices):
        batch = collate([[examples[index]] for index in indices], pad_token_id=PAD, packing=False)
        expected = torch.cat([alone[index] for index in indices])
        assert batch.trained_tokens == len(expected)
        torch.testing.assert_close(token_losses(model, batch), expected, atol=1e-5, rtol=0)

    def test_the_model_would_notice_examples_that_see_one_another(self, model, examples, alone):
        """The tests above can fail: positions that run on make one sequence of the row."""
        batch = collate([[examples[0], examples[2]]], pad_token_id=PAD, packing=True)
        batch.position_ids.copy_(torch.arange(batch.position_ids.shape[1])[None])
        expected = torch.cat([alone[0], alone[2]])
        assert (token_losses(model, batch) - expected).abs().max() > 1e-2
