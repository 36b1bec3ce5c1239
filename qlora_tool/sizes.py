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


def file_size(size: int) -> str:
    """Of files: `3.11 GB` (10^9 bytes each), below a tenth of that `12.5 MB` (10^6 bytes each), and so on: a figure is
    always shown.

    >>> file_size(3 * 10**9), file_size(12_500_000), file_size(12_500), file_size(12)
    ('3.00 GB', '12.5 MB', '12.5 kB', '12 bytes')
    """
    if size < 1000:
        return f"{size} byte{'' if size == 1 else 's'}"
    if size < MB / 10:
        return f"{size / 1000:.1f} kB"
    return f"{size / GB:.2f} GB" if size >= GB / 10 else f"{size / MB:.1f} MB"
