"""Replaying recorded traces: some written by hand from the allocator's rules, and the model's own, cut or altered."""

import random

import pytest

from qlora_tool.errors import UserError
from qlora_tool.memory.allocator.blocks import MIB
from qlora_tool.memory.allocator.model import CachingAllocator, OutOfMemory
from qlora_tool.memory.allocator.replay import compare_with_snapshot, replay
from qlora_tool.memory.allocator.start import restore, segments_before

# A real device's segments do not lie in the order in which they are taken.
HIGH, LOW, SMALL = 0x7F4C20000000, 0x7F4C10000000, 0x7F4C08000000
ELEVEN_AND_A_HALF = 23 * MIB // 2


def event(action, address, size, stream=0):
    return {"action": action, "addr": address, "size": size, "stream": stream, "frames": [], "time_us": 0}


def freed(address, size):
    return [event("free_requested", address, size), event("free_completed", address, size)]


def hand_made_trace():
    """Two large segments, the second below the first; then a request for which both have the same free size."""
    return [
        event("segment_alloc", HIGH, 20 * MIB),
        event("alloc", HIGH, 8 * MIB),
        event("alloc", HIGH + 8 * MIB, ELEVEN_AND_A_HALF),  # of the 12 MiB that are left it keeps all
        event("segment_alloc", LOW, 20 * MIB),
        event("alloc", LOW, 8 * MIB),
        event("segment_alloc", SMALL, 2 * MIB),
        event("alloc", SMALL, 4),
        event("alloc", SMALL + 512, 600),
        *freed(HIGH + 8 * MIB, ELEVEN_AND_A_HALF),
        event("alloc", LOW + 8 * MIB, 9 * MIB),  # 12 MiB free in both: the lower address; 3 MiB are split off
        event("alloc", SMALL + 1536, 4),
        event("alloc", HIGH + 8 * MIB, 11 * MIB),  # 1 MiB left over stays
        *freed(LOW, 8 * MIB),
        *freed(LOW + 8 * MIB, 9 * MIB),
        event("segment_free", LOW, 20 * MIB),
    ]


def test_a_trace_by_hand_is_met_event_by_event():
    trace = hand_made_trace()
    comparison = replay(trace)
    assert (comparison.events, comparison.mismatches, comparison.first_mismatches) == (len(trace), 0, [])
    assert comparison.predicted_reserved_peak == comparison.recorded_reserved_peak == 42 * MIB
    # After the last alloc: 8 + 12 of HIGH (11 asked for), 8 + 9 of LOW, and 512 + 1024 + 512 bytes.
    assert comparison.predicted_allocated_peak == 37 * MIB + 2048


def test_a_trace_by_hand_of_expandable_segments_is_met():
    trace = [
        event("segment_map", HIGH, 40 * MIB),
        event("alloc", HIGH, 30 * MIB),
        event("segment_map", HIGH + 40 * MIB, 20 * MIB),
        event("alloc", HIGH + 30 * MIB, 25 * MIB),
        event("segment_map", SMALL, 2 * MIB),
        event("alloc", SMALL, 4),
        *freed(HIGH, 30 * MIB),
        event("segment_unmap", HIGH, 20 * MIB),  # empty_cache: the page 20 ... 40 is in use from 30 on
        event("segment_map", HIGH, 20 * MIB),
        event("alloc", HIGH, 12 * MIB),  # the free 20 ... 30 is too small; the lowest room is mapped again
        event("alloc", HIGH + 12 * MIB, 18 * MIB),
    ]
    comparison = compare_with_snapshot({"device_traces": [trace], "segments": restore_segments(trace, True)})
    assert (comparison.mismatches, comparison.first_mismatches) == (0, [])
    assert comparison.predicted_reserved_peak == comparison.recorded_reserved_peak == 62 * MIB


def restore_segments(trace, expandable):
    """The segments after a trace that began with none: what a snapshot at its end holds."""
    allocator = CachingAllocator(expandable)
    blocks, bases = {}, {}
    allocator.place_segment = lambda size: bases["next"]
    for entry in trace:
        if entry["action"] in ("segment_map", "segment_alloc"):
            bases["next"] = entry["addr"]
        elif entry["action"] == "alloc":
            blocks[entry["addr"]] = allocator.allocate(entry["size"], entry["stream"])
        elif entry["action"] == "free_completed":
            allocator.free(blocks[entry["addr"]])
        elif entry["action"] in ("segment_free", "segment_unmap"):
            assert allocator.give_back(entry["addr"], entry["size"])
    return allocator.snapshot()


@pytest.mark.parametrize(
    ("number", "change", "said"),
    [
        (10, {"addr": HIGH + 8 * MIB}, "event 10: put 9437184 bytes at 0x7f4c10800000; recorded: 0x7f4c20800000"),
        (3, {"size": 22 * MIB}, "event 4: took segment_alloc of 20 MiB at 0x7f4c10000000; recorded: segment_alloc of"),
        (17, {"addr": HIGH}, "event 17: segment_free of 20 MiB at 0x7f4c20000000 is in use in the model"),
        (8, {"addr": HIGH + MIB}, "event 8: free_requested at 0x7f4c20100000, where the model holds no block"),
    ],
)
def test_an_event_that_the_model_meets_otherwise_is_named(number, change, said):
    trace = hand_made_trace()
    trace[number] = {**trace[number], **change}
    comparison = replay(trace)
    assert comparison.mismatches >= 1
    assert comparison.first_mismatches[0].startswith(said)


def test_a_segment_that_is_missing_or_too_much_is_a_mismatch():
    trace = hand_made_trace()
    missing = replay(trace[:3] + trace[4:])
    assert missing.first_mismatches[0].endswith("recorded: no segment")
    assert missing.predicted_reserved_peak == missing.recorded_reserved_peak + 20 * MIB
    extra = replay([*trace, event("segment_alloc", LOW, 2 * MIB)])
    assert extra.first_mismatches == ["event 18: segment_alloc of 2 MiB at 0x7f4c10000000 served no request"]


def test_a_snapshot_without_events_says_how_to_record_them():
    with pytest.raises(UserError, match="_record_memory_history"):
        compare_with_snapshot({"segments": [], "device_traces": [[], []]})


def test_the_device_with_the_most_events_is_taken():
    snapshot = {"segments": [], "device_traces": [[], hand_made_trace(), hand_made_trace()[:2]]}
    snapshot["segments"] = [{**segment, "device": 1} for segment in restore_segments(hand_made_trace(), False)]
    assert compare_with_snapshot(snapshot).events == len(hand_made_trace())
    assert compare_with_snapshot(snapshot).mismatches == 0


# Traces that begin in the middle of a run


def test_the_segments_before_a_trace_are_those_after_it_with_every_event_undone():
    trace = hand_made_trace()
    after = restore_segments(trace, False)
    assert segments_before(trace, after) == []
    # Up to event 8 everything was handed out but 12 MiB of LOW, and 2 MiB - 1536 B of SMALL.
    segments = segments_before(trace[8:], after)
    assert [(segment["address"], segment["total_size"], segment["segment_type"]) for segment in segments] == [
        (SMALL, 2 * MIB, "small"),
        (LOW, 20 * MIB, "large"),
        (HIGH, 20 * MIB, "large"),
    ]
    assert [[(b["address"], b["size"], b["requested_size"]) for b in segment["blocks"]] for segment in segments] == [
        [(SMALL, 512, 4), (SMALL + 512, 1024, 600)],
        [(LOW, 8 * MIB, 8 * MIB)],
        [(HIGH, 8 * MIB, 8 * MIB), (HIGH + 8 * MIB, 12 * MIB, ELEVEN_AND_A_HALF)],
    ]


def test_a_block_that_kept_a_remainder_before_the_trace_began_is_found_by_what_follows_it():
    # When the trace begins, a block of 10.5 MiB that asked for 9.75 lies before 19.5 MiB that are free. (They were in
    # use when it was handed out, so that the 0.75 MiB stayed with it.) Its size is nowhere: the snapshot at the end
    # does not know it any more, and its free says 9.75 MiB. But a request is served at 10.5 MiB first.
    half, quarter = MIB // 2, MIB // 4
    trace = [
        event("alloc", HIGH + 10 * MIB + half, 4 * MIB),
        *freed(HIGH, 9 * MIB + 3 * quarter),
        event("alloc", HIGH, 10 * MIB + quarter),
    ]
    blocks = [
        {"size": 10 * MIB + half, "requested_size": 10 * MIB + quarter, "state": "active_allocated"},
        {"size": 4 * MIB, "requested_size": 4 * MIB, "state": "active_allocated"},
        {"size": 15 * MIB + half, "requested_size": 0, "state": "inactive"},
    ]
    segment = {"address": HIGH, "total_size": 30 * MIB, "stream": 0, "segment_type": "large", "blocks": blocks}
    (before,) = segments_before(trace, [segment])
    assert [(block["address"], block["size"]) for block in before["blocks"]] == [(HIGH, 10 * MIB + half)]
    assert compare_with_snapshot({"segments": [segment], "device_traces": [trace]}).mismatches == 0


def random_run(expandable, limit, seed, steps=1500):
    chance = random.Random(seed)
    allocator = CachingAllocator(expandable, limit, record_history=True)
    held, waiting = [], []
    for _ in range(steps):
        dice = chance.random()
        if held and dice < 0.48:
            block = held.pop(chance.randrange(len(held)))
            if chance.random() < 0.1:  # another stream still uses it
                allocator.request_free(block)
                waiting.append(block)
            else:
                allocator.free(block)
        elif waiting and dice < 0.52:
            allocator.complete_free(waiting.pop(0))
        elif dice < 0.525 and not expandable:
            allocator.empty_cache()
        else:
            try:
                held.append(allocator.allocate(int(2 ** chance.uniform(3, 25)), chance.choice([0, 7])))
            except OutOfMemory:
                allocator.free(held.pop())
    return allocator


@pytest.mark.parametrize(("expandable", "limit"), [(False, None), (False, 200 * MIB), (True, None)])
@pytest.mark.parametrize("seed", range(3))
def test_the_models_own_history_is_met_from_wherever_it_begins(expandable, limit, seed):
    allocator = random_run(expandable, limit, seed)
    settings = {"expandable_segments": expandable}
    for begin in (0, 700, 1500):
        trace = allocator.history[begin:]
        snapshot = {"segments": allocator.snapshot(), "device_traces": [trace], "allocator_settings": settings}
        comparison = compare_with_snapshot(snapshot)
        assert comparison.first_mismatches == []
        assert comparison.predicted_reserved_peak == comparison.recorded_reserved_peak
    # The whole run's peak, whether or not it lies after where the last trace began.
    assert allocator.peak_reserved_bytes >= comparison.predicted_reserved_peak


@pytest.mark.parametrize("expandable", [False, True])
def test_a_restored_allocator_holds_the_same_and_goes_on_the_same(expandable):
    allocator = random_run(expandable, None, seed=11)
    copy = restore(allocator.snapshot(), expandable)
    assert copy.snapshot() == allocator.snapshot()
    assert (copy.allocated_bytes, copy.reserved_bytes) == (allocator.allocated_bytes, allocator.reserved_bytes)
    before = allocator.reserved_bytes
    for nbytes in (3 * MIB, 700, 2 * MIB, 9 * MIB, 1, 5 * MIB):
        assert copy.allocate(nbytes).address == allocator.allocate(nbytes).address
    assert allocator.reserved_bytes == copy.reserved_bytes == before  # all from what was free


def test_pages_that_a_failed_request_mapped_are_there_all_the_same():
    # The first 5 MiB lie in a page of their own stream. A request for 50 MiB maps two pages, fails at what follows
    # (another process took the memory), and all but the first page is unmapped again.
    trace = [
        event("segment_map", HIGH, 20 * MIB),
        event("alloc", HIGH, 5 * MIB),
        event("segment_map", HIGH + 20 * MIB, 40 * MIB),
        event("segment_unmap", HIGH + 20 * MIB, 40 * MIB),
        event("oom", 0, 50 * MIB),
        event("alloc", HIGH + 5 * MIB, 15 * MIB),
    ]
    comparison = replay(trace, expandable_segments=True)
    assert comparison.first_mismatches == []
    assert comparison.predicted_reserved_peak == comparison.recorded_reserved_peak == 60 * MIB


def test_private_pools_of_cuda_graphs_are_kept_apart():
    private = {"pool_id": (0, 1)}
    trace = [
        event("segment_alloc", HIGH, 30 * MIB),
        event("alloc", HIGH, 30 * MIB),
        *freed(HIGH, 30 * MIB),
        {**event("segment_alloc", LOW, 30 * MIB), **private},
        {**event("alloc", LOW, 30 * MIB), **private},
    ]
    assert replay(trace).first_mismatches == []
