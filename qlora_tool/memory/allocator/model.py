"""A model of PyTorch's CUDA caching allocator: what a sequence of allocations costs on a card, worked out without one.

The rules are those of `c10/cuda/CUDACachingAllocator.cpp` and `c10/core/AllocatorConfig.h` in PyTorch 2.13 with its
default settings, or with `expandable_segments:True`. Memory is taken from the device in segments, which are cut into
blocks:

- A request is rounded up to 512 bytes. Up to 1 MiB it goes to the small pool, above to the large one. Each stream has
  its own two pools.
- The smallest free block that is large enough is used, of equals the one at the lowest address. What is left over
  becomes a block of its own if it is at least 512 bytes (small pool, expandable segments) or more than 1 MiB (large
  pool); otherwise it stays with the block, and counts as allocated.
- Without such a block a new segment is taken: 2 MiB in the small pool, 20 MiB for requests below 10 MiB, else the
  request rounded up to 2 MiB. Expandable segments grow instead, by pages of 2 MiB (small) or 20 MiB (large).
- A freed block merges with free neighbours. Nothing goes back to the device before `empty_cache`, or before the device
  is full: then every segment that is wholly free is given back and the request is tried once more. (The step before
  it, which gives back single blocks, applies only where `max_split_size_mb` is set.)

Not modelled, since off by default: `max_split_size_mb`, `roundup_power2_divisions`, `garbage_collection_threshold`.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from qlora_tool.memory.allocator.blocks import (
    BLOCK_STEP,
    LARGE_SEGMENT,
    MIB,
    SMALL_REQUEST,
    Arena,
    Block,
    Pool,
    round_size,
    segment_size,
    segments_of,
)

# Where the first segment lies. A real device's addresses look like this; only differences mean anything.
FIRST_ADDRESS = 0x7F0000000000
# The address space of an expandable segment is 9/8 of the device's memory; without a limit, that of a 1 TiB device.
UNLIMITED_DEVICE = 2**40


class OutOfMemory(Exception):
    """The modelled device is full, even after all cached segments were given back.

    Attributes:
        requested, allocated, reserved, limit: bytes: the request, what blocks and segments held at that moment, and
            the most that segments may hold.
    """

    def __init__(self, requested: int, allocated: int, reserved: int, limit: int):
        self.requested, self.allocated, self.reserved, self.limit = requested, allocated, reserved, limit
        super().__init__(
            f"asked for {requested / MIB:.1f} MiB with {allocated / MIB:.1f} MiB allocated and "
            f"{reserved / MIB:.1f} MiB reserved of {limit / MIB:.1f} MiB"
        )


class CachingAllocator:
    """The allocator of one device.

    Args:
        expandable_segments: as `PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True`.
        limit: the most bytes that segments may hold together: the device's memory less what the CUDA context and
            other processes take. None: no limit.
        record_history: keep every event in `history`, in the form of `torch.cuda.memory._snapshot()['device_traces']`.

    Attributes:
        requested_bytes, allocated_bytes, reserved_bytes: what was asked for, what the blocks handed out hold
            (`torch.cuda.memory_allocated`) and what all segments hold (`torch.cuda.memory_reserved`).
        peak_requested_bytes, peak_allocated_bytes, peak_reserved_bytes: the most of each since the beginning, or
            since `reset_peaks`.
    """

    def __init__(self, expandable_segments: bool = False, limit: int | None = None, *, record_history: bool = False):
        self.expandable_segments = expandable_segments
        self.limit = limit
        self.history: list[dict[str, Any]] | None = [] if record_history else None
        self.requested_bytes = self.allocated_bytes = self.reserved_bytes = 0
        self.peak_requested_bytes = self.peak_allocated_bytes = self.peak_reserved_bytes = 0
        self._pools: dict[tuple[Hashable, bool], Pool] = {}
        self.active: dict[int, Block] = {}  # blocks that are not idle, by address
        self._next_address = FIRST_ADDRESS

    # Handing out and taking back

    def allocate(self, nbytes: int, stream: Hashable = 0) -> Block:
        """A block for `nbytes` bytes. A request of 0 bytes costs nothing, as in PyTorch.

        Raises:
            OutOfMemory: `limit` would be exceeded, even without the cached segments.
        """
        if nbytes == 0:
            return Block(0, 0, None)
        size = round_size(nbytes)
        pool = self.pool(stream, size <= SMALL_REQUEST)
        block = pool.best_fit(size)
        if block is None:
            block = self._grow(pool, size)
        if block is None:
            self.empty_cache()
            block = self._grow(pool, size)
        if block is None:
            raise OutOfMemory(nbytes, self.allocated_bytes, self.reserved_bytes, self.limit or 0)
        pool.remove(block)
        self._split(pool, block, size)
        self._hand_out(block, nbytes)
        return block

    def free(self, block: Block) -> None:
        """Take a block back. Of a block that other streams used, the two steps below come apart."""
        if block.size:
            self.request_free(block)
            self.complete_free(block)

    def request_free(self, block: Block) -> None:
        """The tensor is gone: the block no longer counts as allocated, but stays where it is."""
        if not block.allocated:
            raise ValueError(f"the block at {block.address:#x} is not allocated: it was freed before")
        block.allocated = False
        block.awaiting_free = True
        self.allocated_bytes -= block.size
        self._record("free_requested", block.address, block.requested_size, block.pool)

    def complete_free(self, block: Block) -> None:
        """No stream uses the block any more: it merges with its neighbours and can be handed out again."""
        self._record("free_completed", block.address, block.requested_size, block.pool)
        self.requested_bytes -= block.requested_size
        block.awaiting_free = False
        block.requested_size = 0
        del self.active[block.address]
        self._merge(block, block.prev)
        self._merge(block, block.next)
        block.pool.add(block)

    def empty_cache(self) -> None:
        """Give back every segment that is wholly free; of expandable segments, every page that is."""
        for pool in self._pools.values():
            for _, address in list(pool.by_size):
                block = pool.at[address]
                if block.arena is not None:
                    self._unmap(pool, block)
                elif block.prev is None and block.next is None:
                    self._release(pool, block)

    def give_back(self, address: int, size: int) -> bool:
        """Give back one segment, or one stretch of whole pages, as a real allocator is known to have done.

        Returns:
            False where the model does not hold just that, free.
        """
        for pool in self._pools.values():
            block = pool.at.get(address) or next(
                (pool.at[start] for _, start in pool.by_size if start < address < start + pool.at[start].size), None
            )
            if block is None or not block.mapped:
                continue
            if block.arena is None:
                whole = block.address == address and block.size == size and block.prev is None and block.next is None
                if whole:
                    self._release(pool, block)
                return whole
            before = self.reserved_bytes
            if block.arena.page_end(block.address) == address and block.arena.page_start(block.end) == address + size:
                self._unmap(pool, block)
            return self.reserved_bytes < before
        return False

    def take_segment(self, address: int, size: int, stream: Hashable) -> bool:
        """Map pages of an expandable segment without handing them out, as a real allocator is known to have done
        (before a request that failed).

        Returns:
            False where the model has no room for them just there.
        """
        pool = self.pool(stream, size % LARGE_SEGMENT != 0)
        block = pool.at.get(address)
        return block is not None and not block.mapped and size <= block.size and self._map(pool, block, size)

    def reset_peaks(self) -> None:
        self.peak_requested_bytes = self.requested_bytes
        self.peak_allocated_bytes = self.allocated_bytes
        self.peak_reserved_bytes = self.reserved_bytes

    def pool(self, stream: Hashable, small: bool) -> Pool:
        found = self._pools.get((stream, small))
        if found is None:
            found = self._pools[stream, small] = Pool(stream, small)
        return found

    def _hand_out(self, block: Block, nbytes: int) -> None:
        block.allocated = True
        block.requested_size = nbytes
        self.active[block.address] = block
        self.requested_bytes += nbytes
        self.allocated_bytes += block.size
        self.peak_requested_bytes = max(self.peak_requested_bytes, self.requested_bytes)
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        self._record("alloc", block.address, nbytes, block.pool)

    def _split(self, pool: Pool, block: Block, size: int) -> None:
        """Cut a block down to `size`, where enough is left over to be a block of its own."""
        left_over = block.size - size
        if left_over < BLOCK_STEP or (left_over <= SMALL_REQUEST and not pool.small and not self.expandable_segments):
            return
        rest = Block(block.address + size, left_over, pool, block.arena)
        rest.insert_after(block)
        block.size = size
        pool.add(rest)

    def _merge(self, block: Block, neighbour: Block | None) -> None:
        """Let `block`, which is in no list of its pool, take in a neighbour that is idle too."""
        if neighbour is None or not neighbour.idle or neighbour.mapped != block.mapped:
            return
        block.pool.remove(neighbour)
        if neighbour is block.prev:
            block.address = neighbour.address
            block.prev = neighbour.prev
            if block.prev:
                block.prev.next = block
        else:
            block.next = neighbour.next
            if block.next:
                block.next.prev = block
        block.size += neighbour.size

    # Segments

    def _grow(self, pool: Pool, size: int) -> Block | None:
        """A free block of at least `size` bytes with memory new from the device, or None where there is none left."""
        if self.expandable_segments:
            return self._expand(pool, size)
        total = segment_size(size)
        if not self._fits(total):
            return None
        block = Block(self.place_segment(total), total, pool)
        pool.add(block)
        self._reserve("segment_alloc", block.address, total, pool)
        return block

    def _release(self, pool: Pool, block: Block) -> None:
        pool.remove(block)
        self._reserve("segment_free", block.address, -block.size, pool)

    def _expand(self, pool: Pool, size: int) -> Block | None:
        block = self._expandable_block(pool, size)
        if not block.mapped and not self._map(pool, block, min(size, block.size)):
            return None
        while block.size < size:
            # `block` is free and what follows it is not mapped; mapped, the next takes in `block`.
            following = block.next
            if not self._map(pool, following, min(size - block.size, following.size)):
                return None
            block = following
        return block

    def _expandable_block(self, pool: Pool, size: int) -> Block:
        """The block at the lowest address from which idle blocks, mapped or not, have room for `size` bytes."""
        for address in pool.unmapped:
            block = pool.at[address]
            if block.prev and block.prev.idle:
                block = block.prev
            room, following = 0, block
            while following and following.idle and room < size:
                room += following.size
                following = following.next
            if room >= size:
                return block
        device = self.limit if self.limit is not None else UNLIMITED_DEVICE
        pages = -(-(device + device // 8) // pool.page)
        arena = Arena(self.place_segment(pages * pool.page), pages * pool.page, pool.page)
        block = Block(arena.start, arena.size, pool, arena, mapped=False)
        pool.add(block)
        return block

    def _map(self, pool: Pool, block: Block, size: int) -> bool:
        """Put memory behind the first `size` bytes of an unmapped block, in whole pages, and merge it with its
        neighbours; False where the device has too little."""
        mapped = block.arena.page_end(block.address + size) - block.address
        if not self._fits(mapped):
            return False
        pool.remove(block)
        block.mapped = True
        if mapped < block.size:
            rest = Block(block.address + mapped, block.size - mapped, pool, block.arena, mapped=False)
            rest.insert_after(block)
            block.size = mapped
            pool.add(rest)
        start = block.address
        self._merge(block, block.prev)
        self._merge(block, block.next)
        pool.add(block)
        self._reserve("segment_map", start, mapped, pool)
        return True

    def _unmap(self, pool: Pool, block: Block) -> None:
        """Take the memory from the whole pages of a free block; what is left of pages at its ends stays free."""
        start = block.arena.page_end(block.address)
        size = block.arena.page_start(block.end) - start
        if size <= 0:
            return
        pool.remove(block)
        before, after = start - block.address, block.size - size - (start - block.address)
        if after:
            rest = Block(start + size, after, pool, block.arena)
            rest.insert_after(block)
            pool.add(rest)
        if before:
            block.size = before
            pages = Block(start, size, pool, block.arena)
            pages.insert_after(block)
            pool.add(block)
            block = pages
        block.size = size
        block.mapped = False
        self._merge(block, block.prev)
        self._merge(block, block.next)
        if block.prev or block.next:
            pool.add(block)  # otherwise the whole expandable segment is gone, its address space too
        self._reserve("segment_unmap", start, -size, pool)

    def place_segment(self, size: int) -> int:
        """The address of a new segment: segments follow one another."""
        address = self._next_address
        self._next_address += size
        return address

    def _fits(self, nbytes: int) -> bool:
        return self.limit is None or self.reserved_bytes + nbytes <= self.limit

    def _reserve(self, action: str, address: int, change: int, pool: Pool) -> None:
        self.reserved_bytes += change
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        self._record(action, address, abs(change), pool)

    # What it looks like

    def _record(self, action: str, address: int, size: int, pool: Pool) -> None:
        if self.history is not None:
            self.history.append({"action": action, "addr": address, "size": size, "stream": pool.stream, "frames": []})

    def blocks(self) -> list[Block]:
        """All blocks that have memory behind them, by address."""
        free = (pool.at[address] for pool in self._pools.values() for _, address in pool.by_size)
        return sorted([*self.active.values(), *free], key=lambda block: block.address)

    def snapshot(self) -> list[dict[str, Any]]:
        """The segments and their blocks, in the form of `torch.cuda.memory_snapshot()`. Of an expandable segment, each
        stretch that has memory behind it is one."""
        return segments_of(self.blocks())
