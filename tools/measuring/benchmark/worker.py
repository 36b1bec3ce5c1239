"""A side of the benchmark alive in a process of its own, told through a pipe when to step.

`serve` is that process: it reads JSON lines, the first of which says what to build, and answers each with one. `Worker`
is the other end. Memory, threads and caches of the sides never mix, and only one of them runs at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from measuring.processes import environment
from measuring.sides import SIDES, OurSide, peak_tensor_bytes, quiet_transformers
from qlora_tool.config import Config, with_values
from qlora_tool.errors import MachineError, ToolError

OUT_OF_MEMORY = "out of memory"


class _Served:
    """One side and the batches it may be told to step on."""

    def __init__(self, kind: str, config: dict[str, Any], batches: str):
        import torch

        quiet_transformers()
        sets = torch.load(batches, weights_only=False)  # written by our own parent
        every = [batch for batch_set in sets.values() for batch in batch_set]
        largest = max(every, key=lambda batch: batch.input_ids.numel())
        start = time.perf_counter()
        self.side = SIDES[kind](with_values(Config(), flat(config)), largest)
        self.device = self.side.device
        self.sets = {name: [batch.to(self.device) for batch in batch_set] for name, batch_set in sets.items()}
        self.facts = {
            "seconds_to_load": round(time.perf_counter() - start, 1),
            "threads": torch.get_num_threads(),
            "trained_weights": sum(parameter.numel() for parameter in self.side.trained()),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
        }
        if isinstance(self.side, OurSide):
            self.facts |= self.side.facts()
            if not self.side.packs and any(batch.position_ids is not None for batch in every):
                raise MachineError("this family cannot keep packed examples apart")

    def answer(self, do: str, batch: tuple[str, int] | None = None, folder: str = "") -> dict[str, Any]:
        chosen = None
        if batch is not None:
            batch_set = self.sets[batch[0]]
            chosen = batch_set[batch[1] % len(batch_set)]
        if do == "step":
            self._wait()
            start = time.perf_counter()
            loss = self.side.step(chosen)  # reads the loss, so a CUDA device is done
            self._wait()
            return {"seconds": time.perf_counter() - start, "loss": loss, "tokens": chosen.tokens}
        if do == "memory":
            return peak_tensor_bytes(lambda: self.side.step(chosen), self.device)
        if do == "categories":
            found = self.side.categories(chosen) if isinstance(self.side, OurSide) else None
            return {"categories": found}
        if do == "save":
            self.side.save(folder)
            return {}
        raise ValueError(do)

    def _wait(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def flat(config: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """`{"model": {"device": …}}` → `{"model.device": …}`."""
    return {f"{section}.{key}": value for section, values in config.items() for key, value in values.items()}


def serve() -> None:
    """Build what the first line asks for, then answer line by line until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to the log

    def tell(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    served = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if served is None:
                served = _Served(**command)
                tell(served.facts)
            else:
                tell(served.answer(**command))
        except Exception as error:  # whatever a side raises is its answer
            import torch

            if isinstance(error, torch.OutOfMemoryError):
                text = OUT_OF_MEMORY
            else:
                text = "; ".join(error.lines) if isinstance(error, ToolError) else f"{type(error).__name__}: {error}"
            error.__traceback__ = None
            tell({"error": text})


class Worker:
    """A side in its own process.

    Args:
        name: what errors call it.
        kind: one of SIDES.
        config: the run's.
        batches: file with `{set: [batch, ...]}`, written by `torch.save`.

    Attributes:
        facts: what it said of itself when it was ready.
    """

    def __init__(self, name: str, kind: str, config: Config, batches: Path):
        self.name = name
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 -- `close` does
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from measuring.benchmark.worker import serve; serve()"], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self._log, text=True, encoding="utf-8", env=environment(),
        )  # fmt: skip
        try:
            set_by_hand = config.model_dump(mode="json", exclude_unset=True)
            self.facts = self.ask(kind=kind, config=set_by_hand, batches=str(batches))
        except BaseException:
            self.close()
            raise

    def ask(self, **command: Any) -> dict[str, Any]:
        """Its answer to one command.

        Raises:
            MachineError: it failed, or is gone.
        """
        answer = self.try_to(**command)
        if "error" in answer:
            raise MachineError(f"{self.name}: {answer['error']}")
        return answer

    def try_to(self, **command: Any) -> dict[str, Any]:
        """Its answer, or `{"error": why}`."""
        try:
            print(json.dumps(command), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._log.seek(0)
            said = [text for text in self._log.read().splitlines() if text.strip()]
            code = self._process.wait()
            return {"error": f"ended with exit code {code} (-9: no memory was left): {said[-1] if said else ''}"}
        return json.loads(line)

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
