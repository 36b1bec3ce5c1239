"""The processes of a run. One process is a world of one; `torchrun` or `accelerate launch` starts several.

Every call on a world of several is made by all of its processes, in the same order. Numbers and objects go between
hosts by gloo, tensors of a card by NCCL. A process that ends before the others is noticed by them (`lifeline`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from qlora_tool.errors import MachineError, ToolError, UserError
from qlora_tool.sizes import counted

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

    from qlora_tool.lifeline import Lifeline

Found = TypeVar("Found")

# torchrun's and accelerate's names, Intel MPI's, Open MPI's, MVAPICH2's.
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
_LOCAL_RANKS = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
_PORTS = ("MASTER_PORT",)
_BUCKET = 2**23  # numbers that are summed at a time, 32 MiB
JOINING_SECONDS = 120  # that processes have to find one another
_NEVER = timedelta(days=30)  # of an operation: an end of a process is noticed otherwise, and a pause is no fault


@dataclass(frozen=True)
class World:
    """The processes that work on one run, as one of them sees it.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
        local_rank, local_size: the same of those on this machine.
        lifeline: tells when another one ends; None in a world of one, and where nothing is connected.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    lifeline: Lifeline | None = None
    _hosts: ProcessGroup | None = None

    @classmethod
    def launched(cls) -> World:
        """What the launcher says in the environment. Nothing is connected, and torch is not imported.

        Raises:
            UserError: it makes no sense.
        """
        size, rank = _first_number(_SIZES, 1) or 1, _first_number(_RANKS, None)
        local_rank, local_size = _first_number(_LOCAL_RANKS, None), _first_number(_LOCAL_SIZES, None)
        if rank is None and size > 1:
            raise UserError(f"WORLD_SIZE is {size}, but RANK is not set; start {size} processes with `torchrun "
                            f"--nproc_per_node {size} -m qlora_tool train CONFIG`, or unset WORLD_SIZE")  # fmt: skip
        rank = rank or 0
        if rank >= size:
            raise UserError(f"RANK is {rank}, but WORLD_SIZE is {size}; ranks go from 0 to {size - 1}: see "
                            "that every launcher is given the same numbers")  # fmt: skip
        if size > 1 and not 1 <= (port := _first_number(_PORTS, 29500) or 0) < 2**16:
            raise UserError(f"MASTER_PORT is {port} in the environment, expected 1 to 65535; give torchrun another "
                            "--master_port")  # fmt: skip
        return cls(rank, size, rank if local_rank is None else local_rank, local_size or size)

    @classmethod
    def join(cls, device: str = "cpu") -> World:
        """Connect this process with the others that the launcher started.

        Args:
            device: cpu, or cuda: each process of a machine then takes a card of its own.

        Raises:
            UserError: there are fewer cards than processes, or not all processes came.
        """
        world = cls.launched()
        if world.size == 1:
            return world
        if device == "cuda":
            world._take_card()
        from torch import distributed

        from qlora_tool.lifeline import Lifeline

        hosts = None
        if not distributed.is_initialized():
            store = world._store()
            backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
            distributed.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=_NEVER)
        if device == "cuda":
            hosts = distributed.new_group(backend="gloo", timeout=_NEVER)
        world = cls(world.rank, world.size, world.local_rank, world.local_size, _hosts=hosts)
        lifeline = Lifeline.tie(world.rank, world.size, world.from_first)
        return cls(world.rank, world.size, world.local_rank, world.local_size, lifeline, hosts)

    def _take_card(self) -> None:
        import torch

        cards = torch.cuda.device_count()
        if self.local_size > cards:
            started = counted(self.local_size, "process", "processes")
            raise UserError(f"started as {started} on this machine, which has {counted(cards, 'card')}; start one "
                            f"process a card: --nproc_per_node {cards}")  # fmt: skip
        torch.cuda.set_device(self.local_rank)

    def _store(self) -> Any:
        from torch.distributed.rendezvous import rendezvous

        os.environ.update(RANK=str(self.rank), WORLD_SIZE=str(self.size))  # where MPI has names of its own
        where = f"{os.environ.get('MASTER_ADDR', 'MASTER_ADDR is not set')}:{os.environ.get('MASTER_PORT', '29500')}"
        if "MASTER_ADDR" not in os.environ and self.local_size == self.size:
            os.environ["MASTER_ADDR"] = "127.0.0.1"
        os.environ.setdefault("MASTER_PORT", "29500")
        try:
            store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=JOINING_SECONDS)))
            store.set_timeout(timedelta(seconds=JOINING_SECONDS))
            store.set(f"qlora-tool/{self.rank}", "here")
            store.wait([f"qlora-tool/{rank}" for rank in range(self.size)])
        except (RuntimeError, ValueError, OSError) as error:  # torch's DistError is a RuntimeError
            raise UserError(
                f"process {self.rank} of {self.size}: the others were not found at {where} within {JOINING_SECONDS} s; "
                f"see that the launchers start {self.size} processes in all, with one --master_addr that every machine "
                "reaches, and that no other run uses the port"
            ) from error
        return store

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes files and talks."""
        return self.rank == 0

    def __str__(self) -> str:
        return f"process {self.rank} of {self.size}"

    # ------------------------------------------------------------------------------------------------ between hosts

    def gather(self, found: Found) -> list[Found]:
        """What each process gives, by rank, in all of them."""
        if self.size == 1:
            return [found]
        from torch import distributed

        everyone: list[Any] = [None] * self.size
        distributed.all_gather_object(everyone, found, group=self._hosts)
        return everyone

    def from_first(self, found: Found) -> Found:
        """What the first process gives, in all of them."""
        if self.size == 1:
            return found
        from torch import distributed

        box = [found]
        distributed.broadcast_object_list(box, src=0, group=self._hosts)
        return box[0]

    def sums(self, numbers: Sequence[float]) -> list[float]:
        """The sum of each number over all processes."""
        return self._reduced(numbers, "SUM")

    def highest(self, number: float) -> float:
        """The highest of the numbers that all processes give."""
        return self._reduced([number], "MAX")[0]

    def _reduced(self, numbers: Sequence[float], operation: str) -> list[float]:
        if self.size == 1:
            return list(numbers)
        import torch
        from torch import distributed

        tensor = torch.tensor(numbers, dtype=torch.float64)
        distributed.all_reduce(tensor, getattr(distributed.ReduceOp, operation), group=self._hosts)
        reduced: list[float] = tensor.tolist()
        return reduced

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.sums([0.0])

    def on_main(self, work: Callable[[], Found]) -> Found:
        """What the first process makes of some work, in all of them.

        Raises:
            ToolError: it failed; told by the first process.
        """
        return self._together(work, lambda rank: rank == 0, self.from_first)

    def each(self, work: Callable[[], Found]) -> Found:
        """What each process makes of some work.

        Raises:
            ToolError: one of them failed; told by that process.
        """
        return self._together(work, lambda _: True, lambda found: found)

    def locally_first(self, work: Callable[[], Found]) -> Found:
        """What each process makes of some work, on every machine one before the others: they find what it has kept.

        Raises:
            ToolError: one of them failed; told by that process.
        """
        if self.size == 1:
            return work()
        first = self._together(work, lambda _: self.local_rank == 0, lambda found: found)
        return self.each(work if self.local_rank else lambda: first)

    def _together(
        self, work: Callable[[], Found], mine: Callable[[int], bool], share: Callable[[Any], Any]
    ) -> Found:
        """Do some work where it is this process's to do, and see how it went with all."""
        if self.size == 1:
            return work()
        found, failure = None, None
        if mine(self.rank):
            try:
                found = work()
            except ToolError as error:
                failure = error
        self.refuse_failures(failure)
        shared: Found = share(found)
        return shared

    def refuse_failures(self, failure: ToolError | None) -> None:
        """Fail in all processes where one failed, and tell it once.

        Raises:
            ToolError: of the first process that has one; `told_elsewhere` in all others.
        """
        failures = self.gather(None if failure is None else (failure.exit_code, failure.lines))
        first = next((rank for rank, found in enumerate(failures) if found), None)
        if first is None:
            return
        if first == self.rank and failure is not None:
            failure.known_to_all = True
            raise failure
        code, lines = failures[first] or (1, [])
        copy = (UserError if code == UserError.exit_code else MachineError)(lines)
        copy.known_to_all = copy.told_elsewhere = True
        raise copy

    # ------------------------------------------------------------------------------------------------ between devices

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the tensors that all processes give, in the place of this one."""
        if self.size > 1:
            from torch import distributed

            distributed.all_reduce(tensor)
        return tensor

    def copy_from_first(self, tensor: Tensor) -> None:
        """Overwrite the tensor that each process gives by the first one's."""
        if self.size > 1:
            from torch import distributed

            distributed.broadcast(tensor, src=0)

    def sum_each(self, tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """The sums, in fp32, of tensors of which a process may lack some, by their number; of those that any has.

        Args:
            tensors: of this process.
            like: of the same shapes, for those that it lacks.
        """
        import torch

        there = [number for number, count in enumerate(self.sums([found is not None for found in tensors])) if count]
        for bucket in _buckets(there, [one.numel() for one in like]):
            flat = torch.empty(sum(like[number].numel() for number in bucket), device=like[0].device)
            places = flat.split([like[number].numel() for number in bucket])
            for number, place in zip(bucket, places, strict=True):
                tensor = tensors[number]
                place.zero_() if tensor is None else place.copy_(tensor.reshape(-1))
            self.sum(flat)
            for number, place in zip(bucket, places, strict=True):
                yield number, place.view(like[number].shape)

    # ------------------------------------------------------------------------------------------------ to the end

    def advise(self, how: str) -> None:
        """Say how to go on where another process ends before the run does."""
        if self.lifeline is not None:
            self.lifeline.advice = how

    @contextlib.contextmanager
    def until_done(self) -> Iterator[None]:
        """Work of all processes is going on.

        Raises:
            MachineError: another process has ended meanwhile.
        """
        well = False
        try:
            yield
            well = True
        except ToolError as error:
            well = error.known_to_all
            raise
        except RuntimeError as error:  # what a collective raises whose other end is gone
            line = self.lifeline.lost_line(seconds=5.0) if self.lifeline else None
            if line is None:
                raise
            raise MachineError(line) from error
        except Exception as error:
            well = getattr(error, "known_to_all", False)
            raise
        finally:
            if self.lifeline is not None:
                self.lifeline.let_go(well)
                if well:
                    from torch import distributed

                    distributed.destroy_process_group()


def _buckets(numbers: Sequence[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    """The numbers, as many at a time as have `_BUCKET` elements together, one at least."""
    bucket: list[int] = []
    for number in numbers:
        if bucket and sum(sizes[one] for one in bucket) + sizes[number] > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(number)
    if bucket:
        yield bucket


def _first_number(names: tuple[str, ...], default: int | None) -> int | None:
    """The first of some variables that is set.

    Raises:
        UserError: it is no whole number, or one of more digits than there are processes.
    """
    for name in names:
        if value := os.environ.get(name, "").strip():
            if not (value.isascii() and value.isdecimal() and len(value) <= 9):
                raise UserError(f"{name} is {value[:40]!r} in the environment, expected a whole number of at least 0; "
                                f"unset {name}, or start with torchrun")  # fmt: skip
            return int(value)
    return default


ALONE = World()
"""One process."""
