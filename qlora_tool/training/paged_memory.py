"""Managed memory of a CUDA device: the driver moves it to the host page by page where the device has no room for it,
and back where it is used. It is no part of what PyTorch's allocator hands out.

As tensors on the device, so that what is done to it keeps to the order of PyTorch's streams.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_tool.sizes import memory_size

_ALIGNMENT = 256
_ATTACH_GLOBAL = 1  # CU_MEM_ATTACH_GLOBAL
_CONCURRENT_MANAGED_ACCESS = 89  # CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS
_log = logging.getLogger(__name__)


class PagedMemory:
    """Bytes of managed memory, all zero, given out one tensor after the other.

    Args:
        size: bytes.
        device: a CUDA device.

    Raises:
        OSError: there is none to be had; with the reason.
    """

    def __init__(self, size: int, device: torch.device):
        self._block = _Block(size, device)
        self._bytes = torch.as_tensor(self._block, device=device).zero_()
        if not self._block.holds(self._bytes):
            raise OSError("PyTorch copies managed memory into its own")
        self._taken = 0

    @classmethod
    def of(cls, sizes: Sequence[int], device: torch.device) -> PagedMemory | None:
        """For tensors of these sizes, in bytes; None where there is none to be had, which is said in a line."""
        try:
            return cls(sum(map(_aligned, sizes)), device)
        except OSError as error:
            _log.warning("training.optim: paged_adamw_8bit runs as adamw_8bit, as %s", error)
            return None

    def take(self, size: int) -> Tensor:
        """The next `size` bytes, as uint8."""
        start = self._taken
        self._taken += _aligned(size)
        return self._bytes[start : start + size]

    def prefetch(self) -> None:
        """Ask for all of it ahead of its use, in one piece instead of page by page."""
        self._block.prefetch()


class _Block:
    """One allocation of managed memory, given back when no tensor looks at it any more."""

    def __init__(self, size: int, device: torch.device):
        index = torch.cuda.current_device() if device.index is None else device.index
        with torch.cuda.device(index):
            if torch.cuda.mem_get_info(index)[0] < size:
                torch.cuda.empty_cache()
            if (free := torch.cuda.mem_get_info(index)[0]) < size:
                raise OSError(f"its state takes {memory_size(size)} and the card has {memory_size(free)} free")
            self._driver = _driver()
            self._device, concurrent = ctypes.c_int(), ctypes.c_int()
            self._check("cuDeviceGet", ctypes.byref(self._device), index)
            self._check("cuDeviceGetAttribute", ctypes.byref(concurrent), _CONCURRENT_MANAGED_ACCESS, self._device)
            if not concurrent.value:  # Windows, WSL: it would stay on the device
                raise OSError("the driver pages no memory here")
            address = ctypes.c_uint64()
            self._check("cuMemAllocManaged", ctypes.byref(address), ctypes.c_size_t(size), _ATTACH_GLOBAL)
        self._address, self._size = address, size
        self._stream_device = index

    def _check(self, name: str, *arguments: Any) -> None:
        if error := getattr(self._driver, name)(*arguments):
            raise OSError(f"the driver's {name} fails with error {error}")

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self._size,), "typestr": "|u1", "data": (self._address.value, False), "version": 2}

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor begins where it begins."""
        return tensor.data_ptr() == self._address.value

    def prefetch(self) -> None:
        """Have all of it moved to the device, in the order of PyTorch's stream; where that fails, use moves it."""
        stream = ctypes.c_void_p(torch.cuda.current_stream(self._stream_device).cuda_stream)
        self._driver.cuMemPrefetchAsync(self._address, ctypes.c_size_t(self._size), self._device, stream)

    def __del__(self) -> None:
        if hasattr(self, "_address"):
            self._driver.cuMemFree_v2(self._address)


def _driver() -> Any:
    """CUDA's driver, with C calls that give an error's number, or 0."""
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")  # x64 has one kind of call


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
