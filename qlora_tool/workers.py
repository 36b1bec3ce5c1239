"""Work shared out over several processes.

They are plain ones that take their work through pipes: forking a process that has threads (torch's, the tokenizer's)
may hang, and `multiprocessing`'s other ways run the main program once more, which a script that calls `train` need not
bear.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from qlora_tool.collection import without_collection
from qlora_tool.errors import MachineError, ToolError, UserError

MOST = 8  # processes


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_for(each: int) -> int:
    """How many processes this machine has cores and free memory for, of `each` bytes; this one is counted."""
    import psutil

    fitting: int = psutil.virtual_memory().available // each
    return max(1, min(cores(), MOST, fitting))


class Workers:
    """Processes that call one function, each served by a thread that waits for it; they end with the `with` block.

    Args:
        function: `module:name`; they import the module at once.
        count: of processes; none: `map` works alone.
        doing: what they do, for a message.
        environment: variables that are theirs alone.
    """

    def __init__(
        self, function: str, count: int, doing: str, environment: Mapping[str, str] | None = None
    ):
        self.function, self.count, self.doing = function, count, doing
        self._environment = environment or {}
        self._threads = ThreadPoolExecutor(max(1, count))
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Workers:
        path = os.pathsep.join(path for path in sys.path if path)
        for _ in range(self.count):
            process = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import serve; serve({self.function!r})"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": path, **self._environment},
            )  # fmt: skip
            self._processes.append(process)
            self._idle.put(process)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()  # they hold nothing that could be lost
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            for stream in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    stream.close()  # type: ignore[union-attr]  # both are pipes
            process.wait()

    def tell(self, message: Any) -> None:
        """Give each process, before its first work, what it hands to the function before all else.

        Raises:
            pickle.PicklingError, TypeError, AttributeError: it cannot be sent.
            MachineError: a process died.
        """
        packed = pickle.dumps(("told", message))
        for process in self._processes:
            with self._alive(process):
                _send(process.stdin, packed)

    def submit(self, *work: Any) -> Future[Any]:
        """What the function makes of `work`; a `UserError` is raised again by whoever asks for it.

        Its future raises `MachineError` where a process died.
        """
        return self._threads.submit(self._run, pickle.dumps(("work", work), pickle.HIGHEST_PROTOCOL))

    def map(self, works: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        """What the function makes of each, in their order; this process takes its share of them, and whatever another
        one could not read or died of."""
        futures: dict[int, Future[Any]] = {}
        with contextlib.suppress(pickle.PicklingError, TypeError, AttributeError):  # a model's own code, as it may be
            futures = {index: self.submit(*work) for index, work in enumerate(works)} if self.count else {}
        made = {}
        for index in reversed(range(len(works))):  # from the end, which is not begun yet
            if index not in futures or futures[index].cancel():
                made[index] = _function(self.function)(*works[index])
        for index in range(len(works)):
            try:
                yield made[index] if index in made else futures[index].result()
            except MachineError:  # that process ended: this one has what it lacked
                yield _function(self.function)(*works[index])

    @contextlib.contextmanager
    def _alive(self, process: subprocess.Popen[bytes]) -> Iterator[None]:
        try:
            yield
        except (OSError, EOFError) as error:
            raise MachineError(
                f"a process that {self.doing} ended early (exit code {process.poll()}); if memory ran out, free some"
            ) from error

    def _run(self, work: bytes) -> Any:
        process = self._idle.get()
        try:
            with self._alive(process):
                _send(process.stdin, work)
                refused, found = pickle.loads(_receive(process.stdout))
        finally:
            self._idle.put(process)
        if refused:
            raise UserError(found)
        return found


def _send(stream: Any, message: bytes) -> None:
    stream.write(len(message).to_bytes(8, "little"))
    stream.write(message)
    stream.flush()


def _receive(stream: Any) -> bytes:
    length = stream.read(8)
    message: bytes = stream.read(int.from_bytes(length, "little"))
    if len(length) < 8 or len(message) < int.from_bytes(length, "little"):
        raise EOFError
    return message


def _function(place: str) -> Callable[..., Any]:
    module, _, name = place.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def serve(place: str) -> None:
    """Be one of the processes: do what comes until nothing comes any more. What libraries print goes to stderr, for
    stdout has the results."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one decides
    receive, send = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with without_collection():
        function, told = _function(place), ()
    while True:
        try:
            kind, message = pickle.loads(_receive(receive))
        except (EOFError, ImportError, AttributeError):  # nothing comes any more, or of a module that is not here
            return
        if kind == "told":
            told = message
            continue
        try:
            answer: tuple[bool, Any] = False, function(*told, *message)
        except ToolError as error:
            answer = True, error.lines
        _send(send, pickle.dumps(answer, pickle.HIGHEST_PROTOCOL))
