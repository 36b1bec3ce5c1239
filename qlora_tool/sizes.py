"""Bytes as they are told: memory in GiB, as cards and systems count it, files in GB, as disks and hubs do."""

from __future__ import annotations

GB, MB = 10**9, 10**6
GIB, MIB = 2**30, 2**20


def memory_size(size: int) -> str:
    """Of memory: `3.11 GiB` (2^30 bytes each), below a tenth of that `12.5 MiB` (2^20 bytes each).

    >>> memory_size(3 * 2**30), memory_size(13_107_200)
    ('3.00 GiB', '12.5 MiB')
    """
    if not size:
        return "0 MiB"
    return f"{size / GIB:.2f} GiB" if abs(size) >= GIB / 10 else f"{size / MIB:.1f} MiB"
