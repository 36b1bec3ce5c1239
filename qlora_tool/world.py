"""The processes of a run. One process is a world of one; accelerate starts and describes several."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# As accelerate reads them: torchrun's and its own, Intel MPI's, Open MPI's, MVAPICH2's.
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


@dataclass(frozen=True)
class World:
    """The processes that work on one run, as one of them sees it.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def launched(cls) -> World:
        """What the launcher says in the environment. Nothing is connected, and torch is not imported."""
        return cls(_first_number(_RANKS, 0), _first_number(_SIZES, 1))

    @classmethod
    def join(cls, cpu: bool = False) -> World:
        """Connect this process with the others that the launcher started, on gloo where `cpu` asks for it."""
        from accelerate import PartialState

        state = PartialState(cpu=cpu)
        return cls(state.process_index, state.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes files and talks."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the tensors that all processes give, the same in each; of one process, its own tensor."""
        if self.size == 1:
            return tensor
        from accelerate.utils import reduce

        summed: Tensor = reduce(tensor, "sum")
        return summed

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()


def _first_number(names: tuple[str, ...], default: int) -> int:
    for name in names:
        if (value := os.environ.get(name, "")).isdecimal():
            return int(value)
    return default
