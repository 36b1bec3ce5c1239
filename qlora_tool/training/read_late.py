"""The loss and the gradients' norm of steps, read when a device has long had them: nobody waits for a step to end."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepNumbers:
    """What is read of a step.

    Attributes:
        step: its number, from 1 on.
        loss, grad_norm: as in `StepResult`.
        trained_tokens: that the loss is the mean of.
        loss_scale: the optimizer's after the step.
        rows: where its examples come from.
    """

    step: int
    loss: float
    grad_norm: float
    trained_tokens: int
    loss_scale: float
    rows: Sequence[str]


class OnTheWay:
    """Numbers that are copied to the host without waiting for them.

    Args:
        tensors: of one element each.
    """

    def __init__(self, *tensors: Tensor):
        self._host, self._copied = [tensor.detach() for tensor in tensors], None
        devices = {tensor.device for tensor in tensors if tensor.is_cuda}
        if devices:
            # A read of the tensor itself would wait for all that was launched since, too.
            self._host = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
            for host, tensor in zip(self._host, tensors, strict=True):
                host.copy_(tensor.detach(), non_blocking=True)
            self._copied = torch.cuda.current_stream(devices.pop()).record_event()

    def read(self) -> list[float]:
        """The numbers, which may be waited for."""
        if self._copied is not None:
            self._copied.synchronize()
        return [float(tensor) for tensor in self._host]


class LateNumbers:
    """Steps whose numbers were not read yet."""

    def __init__(self) -> None:
        self._steps: deque[tuple[int, OnTheWay, int, float, Sequence[str]]] = deque()

    def add(
        self, step: int, loss: Tensor, grad_norm: Tensor, trained_tokens: int, loss_scale: float, rows: Sequence[str]
    ) -> None:
        """A step was launched; see `StepNumbers`."""
        self._steps.append((step, OnTheWay(loss, grad_norm), trained_tokens, loss_scale, rows))

    def read(self, leave: int = 0) -> Iterator[StepNumbers]:
        """Those of all steps but the last `leave`, in order."""
        while len(self._steps) > leave:
            step, numbers, trained_tokens, loss_scale, rows = self._steps.popleft()
            loss, grad_norm = numbers.read()
            yield StepNumbers(step, loss, grad_norm, trained_tokens, loss_scale, rows)
