"""What is shown and written while training: the live line, and one JSON object a logged step."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qlora_tool.errors import MachineError
from qlora_tool.files.atomic import disk_errors
from qlora_tool.sizes import memory_size
from qlora_tool.terminal import clock, drawn, progress_bar

if TYPE_CHECKING:
    from qlora_tool.weights.streamed import DiskStream


logger = logging.getLogger(__name__)


def peak_memory_bytes(device: torch.device) -> int:
    """CUDA: the most that was allocated at once; CPU: the most memory that the process has had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if os.name == "nt":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_in_words(device: torch.device, tensor_bytes: int | None) -> str:
    """The peak of the tensors, and that of all that the process holds for them and besides, for the live line.

    Args:
        tensor_bytes: at the peak of a step, where that was seen; on CUDA the allocator knows.
    """
    peak = peak_memory_bytes(device)
    if device.type == "cuda":
        tensor_bytes, held, holder = peak, torch.cuda.max_memory_reserved(device), "reserved"
    else:
        held, holder = peak, "process"
    tensors = "" if tensor_bytes is None else f"tensors {memory_size(tensor_bytes)}, "
    return f"{tensors}{holder} {memory_size(held)}"


class Metrics:
    """Appends to `metrics.jsonl`, a whole line at a time, flushed; what is not a number (NaN, infinity) is null."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, record: dict[str, Any]) -> None:
        finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                  for key, value in record.items()}  # fmt: skip
        try:
            with disk_errors(self.path), self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(finite) + "\n")
        except FileNotFoundError as error:
            raise folder_gone(self.path.parent) from error


def folder_gone(folder: Path) -> MachineError:
    """What to say of a run's folder that is no longer there."""
    return MachineError(f"{folder}: was removed or moved while the run trained into it; put it back, and the same "
                        "command goes on from its last checkpoint, or begins anew where there is none")  # fmt: skip


class Speed:
    """Tokens per second between two logged steps. The run's first step, which warms everything up, is left out, and so
    are steps that are watched.

    Attributes:
        steps, tokens, seconds: of all steps that count.
    """

    def __init__(self):
        self._tokens, self._since, self._steps = 0, time.perf_counter(), 0
        self._last = self._since
        self.steps, self.tokens, self.seconds = 0, 0, 0.0

    def step_done(self, tokens: int, counted: bool = True) -> None:
        now = time.perf_counter()
        self._steps += 1
        if self._steps == 1:
            self._since = now
        elif counted:
            self._tokens += tokens
            self.steps += 1
            self.tokens += tokens
            self.seconds += now - self._last
        else:
            self._since += now - self._last
        self._last = now

    def pause(self) -> float:
        """Something that is not a step begins (an evaluation, a save); give its start to `resume`."""
        return time.perf_counter()

    def resume(self, paused_at: float) -> None:
        pause = time.perf_counter() - paused_at
        self._since += pause
        self._last += pause

    def take(self) -> float | None:
        """The speed since the last call; None when only the first step lies behind."""
        now = time.perf_counter()
        speed = self._tokens / (now - self._since) if self._tokens else None
        self._tokens, self._since = 0, now
        return speed


class DiskWaits:
    """Sees whether steps wait for the disk that weights are read from while they are taken (`model.weights: disk`).

    What a card waits for is not seen on the host. There the reading itself counts, which goes on beside the computing:
    where it fills almost all of a step, the disk is what sets the pace.

    Args:
        disk: that they are read from; None: none are.
    """

    LOOKED_AT, TOLD_FROM, CARD_TOLD_FROM = 4, 0.25, 0.9  # steps, and the shares of one

    def __init__(self, disk: DiskStream | None):
        self._disk, self._left = disk, self.LOOKED_AT
        self._before: tuple[float, float, int, float] | None = None

    def step_done(self) -> str | None:
        """One more step is done; gives what is to be said of it, once."""
        if self._disk is None or not self._left:
            return None
        seen = self._disk.waited_seconds is not None
        now = time.perf_counter(), self._disk.waited_seconds or 0.0, self._disk.read_bytes, self._disk.read_seconds
        before, self._before, self._left = self._before, now, self._left - 1
        if before is None:
            return None
        seconds, waited, read, reading = (after - earlier for after, earlier in zip(now, before, strict=True))
        lost, told_from = (waited, self.TOLD_FROM) if seen else (reading, self.CARD_TOLD_FROM)
        if not reading or lost < told_from * seconds:
            return None
        self._left = 0
        how = "waited for the disk" if seen else "went by while the disk was read"
        return (
            f"model.weights: disk: {lost / seconds:.0%} of a step's {seconds:.1f} s {how} ({read / 1e6:,.1f} MB at "
            f"{read / reading / 1e6:,.0f} MB/s); a larger training.per_device_train_batch_size "
            "trains more rows for as much reading, a larger model.resident_layers reads less, and QLORA_TOOL_CACHE may "
            "be a folder on a faster disk"
        )


class LiveLine:
    """One line on stderr with loss, speed, memory and time left: drawn over on a terminal, else printed a logged step.

    Args:
        total_steps, first_step: of the run, and how many of them lie behind.
        shown: by one of several processes.
    """

    def __init__(self, total_steps: int, first_step: int, shown: bool = True):
        self.shown = shown
        self.total, self.first, self.now = total_steps, first_step, first_step
        self.started = time.perf_counter()
        self._numbers = ""
        self._line = contextlib.ExitStack()

    def __enter__(self) -> LiveLine:
        if self.shown:
            self._line.enter_context(drawn.line(self._text))
            drawn.draw()
        return self

    def __exit__(self, *_: object) -> None:
        self._line.close()

    def step(self, step: int, record: dict[str, Any] | None, memory: str) -> None:
        """Show step `step`; `record` is what was logged, None between logged steps; `memory` is in words."""
        self.now = step
        if record is not None:
            self._numbers = _in_words(record, memory)
        if drawn.is_terminal:
            if self.shown:
                drawn.draw()
        elif record is not None:
            self.say(self._text(0))

    def say(self, text: str) -> None:
        """A line of its own that stays."""
        if self.shown and not drawn.quiet:
            drawn.stay(text)

    def _text(self, columns: int) -> str:
        """The line; with a bar where there are so many columns that it leaves room."""
        bar = f"{progress_bar((self.now - self.first) / max(1, self.total - self.first))} " if columns >= WIDE else ""
        done = self.now - self.first
        each = (time.perf_counter() - self.started) / max(1, done)
        left = f"  {clock(each * (self.total - self.now))} left" if done else ""
        return f"{bar}step {self.now}/{self.total}{self._numbers}{left}"


WIDE = 110  # columns


def _in_words(record: dict[str, Any], memory: str) -> str:
    parts = [f"loss {record['loss']:.4f}", f"lr {record['learning_rate']:.2e}"]
    if record.get("tokens_per_second"):
        parts.append(f"{record['tokens_per_second']:.0f} tokens/s")
    return "".join(f"  {part}" for part in [*parts, memory])
