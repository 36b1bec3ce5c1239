"""The processes of a run: what the launcher says, and two of them that sum and wait for one another."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from child_process import child_environment

from qlora_tool.errors import UserError
from qlora_tool.lifeline import Lifeline
from qlora_tool.world import World, _buckets

LAUNCHERS = [
    ("RANK", "WORLD_SIZE"),  # torchrun, accelerate launch
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*(name for names in LAUNCHERS for name in names), "LOCAL_RANK", "LOCAL_WORLD_SIZE"]:
        monkeypatch.delenv(name, raising=False)


def test_one_process_is_a_world_of_one():
    world, tensor = World.launched(), torch.arange(3.0)
    assert world == World.join() == World(0, 1)
    assert world.is_main
    assert world.sum(tensor) is tensor
    world.barrier()
    assert world.sums([1, 2]) == [1, 2] and world.highest(3) == 3 and world.gather(1) == [1]
    assert world.on_main(lambda: 5) == world.each(lambda: 5) == world.locally_first(lambda: 5) == 5


@pytest.mark.parametrize(("rank", "size"), LAUNCHERS)
def test_what_each_launcher_says(monkeypatch: pytest.MonkeyPatch, rank: str, size: str):
    monkeypatch.setenv(rank, "3")
    monkeypatch.setenv(size, "4")
    assert World.launched() == World(3, 4, 3, 4)
    assert not World.launched().is_main


def test_asking_the_launcher_imports_no_torch():
    code = "import sys; from qlora_tool.world import World; World.launched(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=child_environment(), capture_output=True)
    assert done.stdout == b"False\n"


@pytest.mark.parametrize(("rank", "size", "said"), [
    (None, 2, "WORLD_SIZE is 2, but RANK is not set"), (2, 2, "RANK is 2, but WORLD_SIZE is 2; ranks go from 0 to 1"),
])  # fmt: skip
def test_a_launcher_that_makes_no_sense(monkeypatch: pytest.MonkeyPatch, rank: int | None, size: int, said: str):
    monkeypatch.setenv("WORLD_SIZE", str(size))
    if rank is not None:
        monkeypatch.setenv("RANK", str(rank))
    with pytest.raises(UserError, match=said):
        World.launched()


@pytest.mark.parametrize("value", ["x", "-1", "1.5", "²", "9" * 5000])
@pytest.mark.parametrize("name", [*(name for names in LAUNCHERS for name in names), "LOCAL_RANK", "LOCAL_WORLD_SIZE",
                                  "MASTER_PORT"])  # fmt: skip
def test_what_is_no_number_is_one_line(monkeypatch: pytest.MonkeyPatch, name: str, value: str):
    for other, number in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        if name.rpartition("_")[2] != other.rpartition("_")[2] or name.startswith("LOCAL"):
            monkeypatch.setenv(other, number)
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^{name} is '{value[:40]}' in the environment, expected a whole number"):
        World.launched()


@pytest.mark.parametrize("port", ["0", "65536"])
def test_a_port_that_there_is_not(monkeypatch: pytest.MonkeyPatch, port: str):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"MASTER_PORT is {port} in the environment, expected 1 to 65535"):
        World.launched()


def test_others_that_never_come_are_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("qlora_tool.world.JOINING_SECONDS", 1)
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(UserError, match=r"process 0 of 2: the others were not found at 127\.0\.0\.1:"):
        World.join()


def test_sums_go_in_buckets_and_leave_none_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("qlora_tool.world._BUCKET", 10)
    assert list(_buckets([0, 2, 3, 5, 6], [4, 99, 6, 1, 99, 40, 3])) == [[0, 2], [3], [5], [6]]


def lifelines(size: int) -> list[Lifeline]:
    """Of processes that are threads here, each tied to the first."""
    pairs = {rank: socket.socketpair() for rank in range(1, size)}
    first = Lifeline(0, size, {rank: pair[0] for rank, pair in pairs.items()})
    return [first, *(Lifeline(rank, size, {0: pair[1]}) for rank, pair in pairs.items())]


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_all_hear_which_process_is_gone(gone: int):
    ties = lifelines(3)
    ties[gone].let_go(well=False)  # closed by the system where it is killed
    for rank, tie in enumerate(ties):
        tie.advice = "go on"
        if rank != gone:
            assert tie.lost_line(5) == f"process {gone} of 3 ended before the run did (killed, or by an error of its " \
                                       "own, which it tells); go on"  # fmt: skip
    for tie in ties:
        tie.let_go(well=True)


def test_who_leaves_when_all_is_done_is_not_missed():
    ties = lifelines(3)
    for tie in ties:
        tie.let_go(well=True)
    assert [tie.lost_line(0.2) for tie in ties] == [None] * 3


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


PROCESS = """
import sys, time, torch
from qlora_tool.errors import UserError
from qlora_tool.world import World
before, world = World.launched(), World.join()
assert (before.rank, before.size) == (world.rank, world.size), (before, world)
with world.until_done():
    total = world.sum(torch.tensor([1.0, 10.0]) * (world.rank + 1))
    if world.is_main:
        open(sys.argv[1], "w").write("written by the main process")
    world.barrier()
    like = [torch.zeros(2), torch.zeros(3, 1), torch.zeros(1)]
    own = [torch.ones(2) * (world.rank + 1), None if world.rank else torch.full((3, 1), 7.0), None]
    sums = {number: one.flatten().tolist() for number, one in world.sum_each(own, like)}
    assert sums == {0: [3.0, 3.0], 1: [7.0, 7.0, 7.0]}, sums
    assert world.highest(world.rank) == 1 and world.gather(world.rank) == [0, 1]
    assert world.on_main(lambda: world.rank) == 0 and world.locally_first(lambda: world.rank) == world.rank
    try:
        world.each(lambda: (_ for _ in ()).throw(UserError("of the second")) if world.rank else None)
    except UserError as error:
        told = error.lines, error.told_elsewhere
print(world.rank, world.size, total.tolist(), open(sys.argv[1]).read(), told)
"""


@pytest.mark.slow  # two processes that import torch: 10 s
def test_two_processes_sum_and_wait(tmp_path: Path):
    processes = []
    port = free_port()
    for rank in range(2):
        launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "OMP_NUM_THREADS": 1,
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
        processes.append(subprocess.Popen(
            [sys.executable, "-c", PROCESS, tmp_path / "file"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=child_environment(**launched),
        ))  # fmt: skip
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert [out for out, _ in outputs] == [
        f"{rank} 2 [3.0, 30.0] written by the main process (['of the second'], {rank == 0})\n" for rank in range(2)
    ]
