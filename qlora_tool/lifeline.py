"""How the processes of a run notice that one of them is gone: a connection of each with the first, on which nothing is
sent until it ends. The system closes it when a process dies, however it dies; a machine that falls silent is noticed by
TCP's own keepalive. So nobody waits for ever in a sum for what will not come, and a slow process is not taken for dead.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

GRACE_SECONDS = 10.0  # that a process has to end by itself once another one is gone
_HELLO = 4  # bytes: the rank
_BYE = b"bye"


class Lifeline:
    """Of this process; see the module.

    Args:
        rank, size: of this process, and how many there are.
        ends: the other ends of its connections by the ranks of their processes: all others for the first process, the
            first one for all others.
    """

    def __init__(self, rank: int, size: int, ends: dict[int, socket.socket]):
        self.rank, self.size, self._ends = rank, size, ends
        self.advice = "start the run again with the same launcher"
        self._lost: int | None = None
        self._found, self._done = threading.Event(), threading.Event()
        self._waking, self._wake = socket.socketpair()
        threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    @classmethod
    def tie(cls, rank: int, size: int, from_first: Callable[[Any], Any]) -> Lifeline:
        """Connect all processes with the first.

        Args:
            from_first: gives what the first process gives, in all of them.
        """
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        if rank == 0:
            with _server(size) as server:
                from_first(server.getsockname()[1])
                ends = {}
                for _ in range(size - 1):
                    end, _ = server.accept()
                    ends[int.from_bytes(_exactly(end, _HELLO), "little")] = end
        else:
            ends = {0: socket.create_connection((host, from_first(None)))}
            ends[0].sendall(rank.to_bytes(_HELLO, "little"))
        for end in ends.values():
            _keep_alive(end)
        return cls(rank, size, ends)

    def lost_line(self, seconds: float) -> str | None:
        """What to say of a process that ended before the run did, and how to go on; None where none does within
        `seconds`."""
        self._found.wait(seconds)
        if self._lost is None:
            return None
        return (f"process {self._lost} of {self.size} ended before the run did (killed, or by an error of its own, "
                f"which it tells); {self.advice}")  # fmt: skip

    def let_go(self, well: bool) -> None:
        """This process is done with what it shares with the others.

        Args:
            well: whether they know; else it is gone for them.
        """
        if self._done.is_set():
            return
        self._done.set()
        self._say(_BYE if well else b"")
        with contextlib.suppress(OSError):
            self._wake.send(b"x")

    def _watch(self) -> None:
        ends, heard = dict(self._ends), dict.fromkeys(self._ends, b"")
        while ends:
            ready, _, _ = select.select([*ends.values(), self._waking], [], [])
            if self._waking in ready:
                return
            for rank in [rank for rank, end in ends.items() if end in ready]:
                try:
                    found = ends[rank].recv(64)
                except OSError:
                    found = b""
                heard[rank] += found
                if found:
                    continue
                del ends[rank]
                if heard[rank] != _BYE:
                    self._is_lost(int(heard[rank]) if heard[rank].isdigit() else rank)
                    return

    def _say(self, last: bytes) -> None:
        for end in self._ends.values():
            with contextlib.suppress(OSError):
                end.sendall(last)
                end.shutdown(socket.SHUT_WR)

    def _is_lost(self, rank: int) -> None:
        """Tell the others which it was, and end where nothing else ends this process."""
        self._lost = rank
        self._say(str(rank).encode())
        self._found.set()
        if not self._done.wait(GRACE_SECONDS):
            print(f"error: {self.lost_line(0)}", file=sys.stderr, flush=True)
            os._exit(1)


def _server(size: int) -> socket.socket:
    """One that takes connections by IPv4 and IPv6, where there is the latter."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # switched off in the system
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=size, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=size)


def _exactly(end: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        if not (more := end.recv(count - len(found))):
            raise OSError("a process ended while it was being connected")
        found += more
    return found


def _keep_alive(end: socket.socket) -> None:
    """Let the system ask every few seconds whether the other machine is there."""
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            end.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
