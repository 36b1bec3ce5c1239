"""The most memory that some work has had: on CUDA the allocator's count, on a CPU the process's resident size."""

from __future__ import annotations

import gc
import threading

import torch


class PeakMemory:
    """Measures while it is open.

    On a CPU the operating system keeps one peak for the life of a process; a thread looks at the resident size twenty
    times a second instead, so that two stretches can be told apart.

    Attributes:
        bytes: the peak, set when it closes.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._device: torch.device | None = None
        self._stop = threading.Event()

    def __enter__(self) -> PeakMemory:
        import psutil

        gc.collect()
        self._process = psutil.Process()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def watch(self, device: torch.device) -> None:
        """Say where the work runs."""
        self._device = device

    def _look(self) -> None:
        while True:
            self.bytes = max(self.bytes, self._process.memory_info().rss)
            if self._stop.wait(0.05):
                return

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._device is not None and self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device)
