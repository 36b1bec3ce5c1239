"""Checkpoint boundaries in host memory between forward and backward.

Of a recomputed layer its input alone is kept; on a long row of a large model that is most of what a step
keeps. Each boundary is copied to pinned host memory on a stream of its own while the next layer computes, and fetched
while the layer after it is differentiated. The last one, which backward needs first, stays where it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from qlora_tool.ops.host_memory import to_host

SMALLEST = 2_000_000  # bytes: below, starting a copy takes longer than the copy


class HostBoundaries:
    """Runs checkpointed regions, with what goes into them kept in host memory.

    Args:
        run: `torch.utils.checkpoint.checkpoint`, without reentrance.
        device: where the model is; on CUDA copies overlap with computing, elsewhere, as in a prediction, they are plain
            copies.
        smallest: tensors of fewer bytes stay.
    """

    def __init__(self, run: Callable, device: torch.device, smallest: int = SMALLEST):
        self._run, self._device, self._smallest = run, device, smallest
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._latest: _Boundary | None = None

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(self._pack, _unpack):
            return self._run(function, *args, **kwargs)

    def _pack(self, tensor: Tensor) -> Tensor | _Boundary:
        if tensor.nbytes < self._smallest or isinstance(tensor, nn.Parameter) or not tensor.is_floating_point():
            return tensor
        before = None if self._latest is None or self._latest.given_back else self._latest
        self._latest = _Boundary(tensor, before, self._stream)
        if before is not None:
            before.move()
        return self._latest


class _Boundary:
    """One saved tensor: on the device, or in host memory."""

    def __init__(self, tensor: Tensor, before: _Boundary | None, stream: torch.cuda.Stream | None):
        self.tensor: Tensor | None = tensor.detach()
        self.before, self.stream, self.device = before, stream, tensor.device
        self.host: Tensor | None = None
        self.given_back = False

    def move(self) -> None:
        """To the host; the device's memory is free for others as soon as the copy is done."""
        if self.stream is None:
            self.host = to_host(self.tensor)
        else:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                self.host = torch.empty(self.tensor.shape, dtype=self.tensor.dtype, pin_memory=True)
                self.host.copy_(self.tensor, non_blocking=True)
            self.tensor.record_stream(self.stream)
        self.tensor = None

    def fetch(self) -> None:
        """Begin to bring it back."""
        if self.tensor is None and self.stream is None:
            self.tensor = self.host.clone()
        elif self.tensor is None:
            with torch.cuda.stream(self.stream):
                self.tensor = self.host.to(self.device, non_blocking=True)
        self.host = None


def _unpack(kept: Tensor | _Boundary) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    kept.fetch()
    tensor, before = kept.tensor, kept.before
    kept.tensor, kept.before, kept.given_back = None, None, True  # nothing here keeps it alive any longer
    if kept.stream is not None:
        torch.cuda.current_stream(kept.device).wait_stream(kept.stream)
        tensor.record_stream(torch.cuda.current_stream(kept.device))
    if before is not None:
        before.fetch()  # while this layer is differentiated
    return tensor
