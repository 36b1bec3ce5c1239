"""Bytes and counts as they are told: memory in GiB, as cards and systems count it, files in GB, as disks and hubs do; a
noun in the plural but of one."""

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
        return counted(size, "byte")
    if size < MB / 10:
        return f"{size / 1000:.1f} kB"
    return f"{size / GB:.2f} GB" if size >= GB / 10 else f"{size / MB:.1f} MB"


def counted(number: int, one: str, several: str = "") -> str:
    """A number and what it counts: `1 example`, `12 examples`.

    Args:
        one: the noun, of one.
        several: of several; by default with an s.

    >>> counted(1, "step"), counted(0, "step"), counted(12, "process", "processes")
    ('1 step', '0 steps', '12 processes')
    """
    return f"{number} {noun_of(number, one, several)}"


def noun_of(number: float, one: str, several: str = "") -> str:
    """What so many are called, where the number stands elsewhere, or is told otherwise; as in `counted`."""
    return one if number == 1 else several or f"{one}s"
