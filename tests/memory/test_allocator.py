"""The model of the caching allocator: each rule on a sequence by hand, long random ones against naive models."""

import itertools
import random

import pytest

from qlora_tool.memory.allocator.blocks import MIB, round_size, segment_size
from qlora_tool.memory.allocator.model import CachingAllocator, OutOfMemory


def layout(allocator):
    """Each segment as (MiB, [MiB of each block, negative where free])."""
    return [
        (
            segment["total_size"] / MIB,
            [b["size"] / MIB * (-1 if b["state"] == "inactive" else 1) for b in segment["blocks"]],
        )
        for segment in allocator.snapshot()
    ]


@pytest.mark.parametrize(("asked", "size"), [(1, 512), (512, 512), (513, 1024), (MIB, MIB), (MIB + 1, MIB + 512)])
def test_sizes_are_rounded_up_to_512_bytes(asked, size):
    assert round_size(asked) == size


@pytest.mark.parametrize(
    ("asked", "segment", "allocated"),
    [
        (1, 2 * MIB, 512),
        (MIB, 2 * MIB, MIB),
        (MIB + 1, 20 * MIB, MIB + 512),
        (10 * MIB - 1024, 20 * MIB, 10 * MIB - 1024),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB, 10 * MIB + 512),  # 2 MiB - 512 B left over: more than 1 MiB, so it is split off
        (11 * MIB, 12 * MIB, 12 * MIB),  # just 1 MiB left over: it stays with the block
        (21 * MIB + MIB // 2, 22 * MIB, 22 * MIB),  # the 4-bit codes of a 4096 x 11008 weight
    ],
)
def test_a_first_request_takes_this_segment_and_counts_as_this_much(asked, segment, allocated):
    allocator = CachingAllocator()
    allocator.allocate(asked)
    assert (allocator.requested_bytes, allocator.allocated_bytes, allocator.reserved_bytes) == (
        asked,
        allocated,
        segment,
    )
    assert segment_size(round_size(asked)) == segment


def test_the_4_bit_codes_of_a_llama_2_7b_cost_48_mib_more_than_they_hold():
    # 32 layers of four 4096 x 4096 weights (8 MiB at half a byte each) and three of 4096 x 11008 (21.5 MiB):
    # 32 * (32 + 64.5) = 3088 MiB asked for. Each of the 96 large ones keeps the last 0.5 MiB of its own 22 MiB segment.
    # The 128 small ones lie two by two in 20 MiB segments: 64 * 20 + 96 * 22 = 3392 MiB reserved.
    shapes = [(4096, 4096)] * 4 + [(4096, 11008)] * 3
    codes = [rows * columns // 2 for _ in range(32) for rows, columns in shapes]
    native = CachingAllocator()
    expandable = CachingAllocator(expandable_segments=True)
    for nbytes in codes:
        native.allocate(nbytes)
        expandable.allocate(nbytes)
    assert native.requested_bytes == expandable.requested_bytes == 3088 * MIB
    assert native.allocated_bytes == (3088 + 48) * MIB
    assert native.reserved_bytes == 3392 * MIB
    # Expandable segments cut to 512 bytes, and grow by pages of 20 MiB: 155 of them.
    assert expandable.allocated_bytes == 3088 * MIB
    assert expandable.reserved_bytes == 3100 * MIB


def test_the_smallest_free_block_that_is_large_enough_is_used():
    allocator = CachingAllocator()
    first, second, third = (allocator.allocate(n * MIB) for n in (40, 30, 50))
    for block in (first, second, third):
        allocator.free(block)
    assert allocator.allocate(25 * MIB).address == second.address  # of 30, 40 and 50 MiB free
    assert allocator.allocate(35 * MIB).address == first.address
    assert allocator.reserved_bytes == 120 * MIB


def test_of_two_free_blocks_of_one_size_the_lower_address_is_used():
    allocator = CachingAllocator()
    low, high = allocator.allocate(30 * MIB), allocator.allocate(30 * MIB)
    allocator.free(high)
    allocator.free(low)
    assert allocator.allocate(30 * MIB).address == low.address


def test_what_is_left_over_is_split_off_above_1_mib_in_the_large_pool_and_from_512_bytes_in_the_small_one():
    allocator = CachingAllocator()
    allocator.allocate(19 * MIB)  # its segment has 20 MiB; 1 MiB left over stays
    allocator.allocate(9 * MIB)  # 20 MiB; 11 MiB are split off
    allocator.allocate(10 * MIB)  # from those 11 MiB; 1 MiB left over stays
    allocator.allocate(MIB - 512)  # the small pool: 2 MiB, of which 1 MiB + 512 B are split off
    allocator.allocate(MIB)  # 512 B are split off
    assert layout(allocator) == [(20, [20]), (20, [9, 11]), (2, [1 - 512 / MIB, 1, -512 / MIB])]
    assert allocator.allocated_bytes == 20 * MIB + 20 * MIB + 2 * MIB - 512


def test_freed_neighbours_merge_to_one_block():
    allocator = CachingAllocator()
    blocks = [allocator.allocate(4 * MIB) for _ in range(4)]  # 4 x 4 of 20 MiB, 4 left over
    allocator.free(blocks[0])
    allocator.free(blocks[2])
    assert layout(allocator) == [(20, [-4, 4, -4, 4, -4])]
    allocator.free(blocks[1])  # merges to both sides
    assert layout(allocator) == [(20, [-12, 4, -4])]
    allocator.free(blocks[3])
    assert layout(allocator) == [(20, [-20])]
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (0, 20 * MIB)


def test_a_stream_does_not_use_what_another_one_freed():
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(30 * MIB, stream=0))
    allocator.allocate(30 * MIB, stream=1)
    assert allocator.reserved_bytes == 60 * MIB
    allocator.allocate(30 * MIB, stream=0)
    assert allocator.reserved_bytes == 60 * MIB


def test_a_block_that_another_stream_still_uses_is_not_handed_out():
    allocator = CachingAllocator()
    block = allocator.allocate(30 * MIB)
    allocator.request_free(block)
    assert allocator.allocated_bytes == 0
    assert allocator.snapshot()[0]["blocks"][0]["state"] == "active_pending_free"
    allocator.allocate(30 * MIB)
    assert allocator.reserved_bytes == 60 * MIB
    allocator.complete_free(block)
    allocator.allocate(30 * MIB)
    assert allocator.reserved_bytes == 60 * MIB


def test_empty_cache_gives_back_whole_segments_only():
    allocator = CachingAllocator()
    kept, beside, alone = allocator.allocate(4 * MIB), allocator.allocate(4 * MIB), allocator.allocate(30 * MIB)
    allocator.free(beside)
    allocator.free(alone)
    allocator.empty_cache()
    assert layout(allocator) == [(20, [4, -16])]
    allocator.free(kept)
    allocator.empty_cache()
    assert allocator.snapshot() == []
    assert (allocator.reserved_bytes, allocator.peak_reserved_bytes) == (0, 50 * MIB)


def test_before_it_runs_out_of_memory_it_gives_back_what_it_has_cached():
    allocator = CachingAllocator(limit=100 * MIB)
    allocator.allocate(40 * MIB)
    allocator.free(allocator.allocate(50 * MIB))
    allocator.allocate(60 * MIB)  # 40 + 60 fit once the 50 are given back
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (100 * MIB, 100 * MIB)
    with pytest.raises(OutOfMemory) as error:
        allocator.allocate(1)
    assert (error.value.requested, error.value.allocated) == (1, 100 * MIB)
    assert (error.value.reserved, error.value.limit) == (100 * MIB, 100 * MIB)
    # The failed request changed nothing.
    assert (allocator.requested_bytes, allocator.allocated_bytes) == (100 * MIB, 100 * MIB)


def test_free_memory_in_pieces_serves_a_large_request_only_in_expandable_segments():
    # 60 MiB are taken, 31 of them in use. Native: 20 and 9 MiB are free in two segments that are both in use, so that
    # neither can be given back, and 60 + 26 MiB are over the limit. Expandable: the 29 MiB are in one piece.
    native = CachingAllocator(limit=80 * MIB)
    expandable = CachingAllocator(expandable_segments=True, limit=80 * MIB)
    for allocator in (native, expandable):
        first, second = allocator.allocate(30 * MIB), allocator.allocate(30 * MIB)
        allocator.free(first)
        allocator.allocate(10 * MIB)
        allocator.free(second)
        allocator.allocate(21 * MIB)
    assert layout(native) == [(30, [10, -20]), (30, [21, -9])]
    assert layout(expandable) == [(60, [10, 21, -29])]
    with pytest.raises(OutOfMemory):
        native.allocate(25 * MIB)
    expandable.allocate(25 * MIB)
    assert expandable.reserved_bytes == 60 * MIB


def test_a_request_of_0_bytes_costs_nothing():
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(0))
    assert (allocator.requested_bytes, allocator.reserved_bytes) == (0, 0)


def test_freeing_twice_is_an_error():
    allocator = CachingAllocator()
    block = allocator.allocate(1000)
    allocator.free(block)
    with pytest.raises(ValueError, match="freed before"):
        allocator.free(block)


def test_peaks_are_kept_until_they_are_reset():
    allocator = CachingAllocator()
    block = allocator.allocate(1000)
    allocator.allocate(MIB)
    allocator.free(block)
    assert (allocator.peak_requested_bytes, allocator.peak_allocated_bytes) == (MIB + 1000, MIB + 1024)
    allocator.reset_peaks()
    assert (allocator.peak_requested_bytes, allocator.peak_allocated_bytes) == (MIB, MIB)


# Expandable segments


def test_an_expandable_segment_grows_by_whole_pages_at_its_end():
    allocator = CachingAllocator(expandable_segments=True)
    first = allocator.allocate(25 * MIB)  # two pages of 20 MiB
    second = allocator.allocate(20 * MIB)  # 15 MiB are free at the end: one page more
    assert second.address == first.address + 25 * MIB
    assert layout(allocator) == [(60, [25, 20, -15])]
    allocator.allocate(1000)  # the small pool has a segment of its own, with pages of 2 MiB
    allocator.allocate(MIB)
    allocator.allocate(MIB)  # 1 MiB - 1024 B are free: one page more
    assert layout(allocator)[1] == (4, [1024 / MIB, 1, 1, -(2 - 1024 / MIB)])
    assert allocator.reserved_bytes == 64 * MIB


def test_the_growing_end_of_an_expandable_segment_is_used_last():
    allocator = CachingAllocator(expandable_segments=True)
    gap = allocator.allocate(12 * MIB)
    allocator.allocate(19 * MIB)  # 31 of 40 MiB: 9 are free at the end
    allocator.free(gap)
    # The free end of 9 MiB would be the better fit for 8 MiB than the 12 MiB gap, but it can grow.
    assert allocator.allocate(8 * MIB).address == gap.address
    assert layout(allocator) == [(40, [8, -4, 19, -9])]


def test_empty_cache_unmaps_the_whole_pages_of_an_expandable_segment_and_they_are_mapped_again_first():
    allocator = CachingAllocator(expandable_segments=True)
    blocks = [allocator.allocate(n * MIB) for n in (30, 25, 30)]  # 85 MiB: five pages, 15 MiB free at the end
    start = blocks[0].address
    allocator.free(blocks[1])  # free: 30 ... 55 MiB, of which 40 ... 55 lies in the page 40 ... 60: no whole page
    allocator.empty_cache()
    assert layout(allocator) == [(100, [30, -25, 30, -15])]
    allocator.free(blocks[0])  # free: 0 ... 55, with the pages 0 ... 40
    allocator.empty_cache()
    assert layout(allocator) == [(60, [-15, 30, -15])]
    assert allocator.snapshot()[0]["address"] == start + 40 * MIB
    assert allocator.allocate(16 * MIB).address == start  # the lowest address, and only the page that it needs
    assert allocator.reserved_bytes == 80 * MIB
    # 20 MiB more are unmapped at 20 ... 40 between free 16 ... 20 and 40 ... 55: one page makes room for 30 MiB.
    assert allocator.allocate(30 * MIB).address == start + 16 * MIB
    assert layout(allocator) == [(100, [16, 30, -9, 30, -15])]


def test_an_expandable_segment_that_is_wholly_free_goes_away():
    allocator = CachingAllocator(expandable_segments=True)
    allocator.free(allocator.allocate(30 * MIB))
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0
    allocator.allocate(5 * MIB)
    assert layout(allocator) == [(20, [5, -15])]


def test_a_request_that_an_expandable_segment_has_no_pages_for_fails_after_unmapping_what_is_free():
    allocator = CachingAllocator(expandable_segments=True, limit=100 * MIB)
    allocator.allocate(30 * MIB, stream=0)  # two pages
    allocator.free(allocator.allocate(55 * MIB, stream=1))  # the other three
    allocator.allocate(45 * MIB, stream=0)  # 10 MiB are free: two pages more, from the other stream's
    assert allocator.reserved_bytes == 80 * MIB
    with pytest.raises(OutOfMemory) as error:
        allocator.allocate(30 * MIB, stream=1)  # two pages, and only one is left
    assert (error.value.allocated, error.value.reserved) == (75 * MIB, 80 * MIB)


# What it looks like


def test_a_snapshot_has_pytorchs_form():
    allocator = CachingAllocator()
    block = allocator.allocate(MIB + 1, stream=7)
    free = {"address": block.address + block.size, "size": 19 * MIB - 512, "requested_size": 0, "state": "inactive"}
    used = {"address": block.address, "size": MIB + 512, "requested_size": MIB + 1, "state": "active_allocated"}
    (segment,) = allocator.snapshot()
    assert segment.pop("blocks") == [{**used, "frames": []}, {**free, "frames": []}]
    sizes = {"total_size": 20 * MIB, "allocated_size": MIB + 512, "active_size": MIB + 512, "requested_size": MIB + 1}
    assert segment == {
        "device": 0,
        "address": block.address,
        "stream": 7,
        "segment_type": "large",
        "segment_pool_id": (0, 0),
        "is_expandable": False,
        "frames": [],
        **sizes,
    }


def test_the_history_has_pytorchs_form():
    allocator = CachingAllocator(record_history=True)
    block = allocator.allocate(30 * MIB - 1)
    address = block.address
    allocator.free(block)
    allocator.empty_cache()
    assert [(event["action"], event["addr"] - address, event["size"]) for event in allocator.history] == [
        ("segment_alloc", 0, 30 * MIB),
        ("alloc", 0, 30 * MIB - 1),
        ("free_requested", 0, 30 * MIB - 1),
        ("free_completed", 0, 30 * MIB - 1),
        ("segment_free", 0, 30 * MIB),
    ]


# Long random sequences


class NaiveNative:
    """The same rules written down plainly: every segment a list of [size, free], searched from end to end."""

    def __init__(self, limit):
        self.limit = limit
        self.next_address = CachingAllocator().place_segment(0)
        self.segments = []  # (address, size, key, blocks)

    @property
    def reserved(self):
        return sum(size for _, size, _, _ in self.segments)

    def allocate(self, nbytes, stream):
        size = -(-nbytes // 512) * 512
        small = size <= MIB
        found = []
        for address, _, key, blocks in self.segments:
            offset = 0
            for number, (block, free) in enumerate(blocks):
                if key == (stream, small) and free and block >= size:
                    found.append((block, address + offset, blocks, number))
                offset += block
        if found:
            block, address, blocks, number = min(found, key=lambda entry: entry[:2])
        else:
            step = 2 * MIB if small or size >= 10 * MIB else 20 * MIB
            block = -(-size // step) * step
            if self.reserved + block > self.limit:
                self.empty_cache()
                if self.reserved + block > self.limit:
                    return None
            address, blocks, number = self.next_address, [[block, True]], 0
            self.next_address += block
            self.segments.append((address, block, (stream, small), blocks))
        if block - size >= 512 if small else block - size > MIB:
            blocks.insert(number + 1, [block - size, True])
            blocks[number][0] = size
        blocks[number][1] = False
        return address

    def free(self, wanted):
        for address, size, _, blocks in self.segments:
            if address <= wanted < address + size:
                offset = 0
                for entry in blocks:
                    if address + offset == wanted:
                        entry[1] = True
                    offset += entry[0]
                merged = []
                for block, free in blocks:
                    if merged and free and merged[-1][1]:
                        merged[-1][0] += block
                    else:
                        merged.append([block, free])
                blocks[:] = merged

    def empty_cache(self):
        self.segments = [entry for entry in self.segments if not (len(entry[3]) == 1 and entry[3][0][1])]


@pytest.mark.parametrize("seed", range(6))
def test_random_requests_are_placed_as_by_a_naive_allocator(seed):
    chance = random.Random(seed)
    limit = 150 * MIB
    allocator, naive = CachingAllocator(limit=limit), NaiveNative(limit)
    held, failures = [], 0
    for _ in range(1200):
        if held and chance.random() < 0.47:
            block = held.pop(chance.randrange(len(held)))
            address = block.address
            allocator.free(block)
            naive.free(address)
        elif chance.random() < 0.01:
            allocator.empty_cache()
            naive.empty_cache()
        else:
            nbytes, stream = int(2 ** chance.uniform(5, 25)), chance.randrange(2)
            expected = naive.allocate(nbytes, stream)
            if expected is None:
                failures += 1
                with pytest.raises(OutOfMemory):
                    allocator.allocate(nbytes, stream)
            else:
                held.append(allocator.allocate(nbytes, stream))
                assert held[-1].address == expected
        assert allocator.reserved_bytes == naive.reserved
    assert failures  # the limit was met


class NaiveExpandable:
    """One list of [size, free] for each pool, whose last entry, if free, can grow."""

    def __init__(self):
        self.pools = {}

    @property
    def reserved(self):
        return sum(-(-sum(size for size, _ in blocks) // page) * page for (_, page), blocks in self.pools.items())

    def allocate(self, nbytes, stream):
        """Where it lies: (its pool, its distance from the pool's start)."""
        size = -(-nbytes // 512) * 512
        key = (stream, 2 * MIB if size <= MIB else 20 * MIB)
        blocks = self.pools.setdefault(key, [])
        fits = [(block, number) for number, (block, free) in enumerate(blocks[:-1]) if free and block >= size]
        if fits:
            number = min(fits)[1]
        else:
            if not (blocks and blocks[-1][1]):
                blocks.append([0, True])
            number = len(blocks) - 1
            missing = max(0, size - blocks[-1][0])
            blocks[-1][0] += -(-missing // key[1]) * key[1]
        if blocks[number][0] > size:
            blocks.insert(number + 1, [blocks[number][0] - size, True])
        blocks[number] = [size, False]
        return key, sum(block for block, _ in blocks[:number])

    def free(self, key, start):
        offset, merged = 0, []
        for block, free in self.pools[key]:
            free = free or offset == start
            offset += block
            if merged and free and merged[-1][1]:
                merged[-1][0] += block
            else:
                merged.append([block, free])
        self.pools[key] = merged


@pytest.mark.parametrize("seed", range(4))
def test_random_requests_in_expandable_segments_are_placed_as_by_a_naive_allocator(seed):
    chance = random.Random(seed)
    allocator, naive = CachingAllocator(expandable_segments=True), NaiveExpandable()
    held, starts = [], {}
    for _ in range(1200):
        if held and chance.random() < 0.47:
            block, key, offset = held.pop(chance.randrange(len(held)))
            allocator.free(block)
            naive.free(key, offset)
        else:
            nbytes, stream = int(2 ** chance.uniform(5, 25)), chance.randrange(2)
            block = allocator.allocate(nbytes, stream)
            key, offset = naive.allocate(nbytes, stream)
            held.append((block, key, offset))
            assert block.address == starts.setdefault(key, block.address) + offset
        assert allocator.reserved_bytes == naive.reserved


@pytest.mark.parametrize("expandable", [False, True])
@pytest.mark.parametrize("limit", [None, 300 * MIB])
def test_random_requests_leave_no_overlap_and_the_sums_agree(expandable, limit):
    chance = random.Random(str((expandable, limit)))
    allocator = CachingAllocator(expandable, limit)
    held = []
    for step in range(4000):
        if held and chance.random() < 0.47:
            allocator.free(held.pop(chance.randrange(len(held))))
        else:
            try:
                held.append(allocator.allocate(int(2 ** chance.uniform(3, 25)), stream=chance.randrange(2)))
            except OutOfMemory:
                allocator.free(held.pop(chance.randrange(len(held))))
        if step % 50 == 0:
            check_invariants(allocator, held, limit)
    for block in held:
        allocator.free(block)
    # Everything merges: one free block a segment.
    assert {len(segment["blocks"]) for segment in allocator.snapshot()} == {1}
    allocator.empty_cache()
    assert (allocator.requested_bytes, allocator.allocated_bytes, allocator.reserved_bytes) == (0, 0, 0)


def check_invariants(allocator, held, limit):
    blocks = allocator.blocks()
    for before, after in itertools.pairwise(blocks):
        assert before.end <= after.address
        assert before.next is not after or not (before.idle and after.idle)
    assert [block for block in blocks if block.allocated] == sorted(held, key=lambda block: block.address)
    assert allocator.requested_bytes == sum(block.requested_size for block in held)
    assert allocator.allocated_bytes == sum(block.size for block in held)
    assert allocator.reserved_bytes == sum(block.size for block in blocks)
    assert allocator.requested_bytes <= allocator.allocated_bytes <= allocator.reserved_bytes
    assert limit is None or allocator.reserved_bytes <= limit
    assert all(segment["total_size"] % (2 * MIB) == 0 for segment in allocator.snapshot())
