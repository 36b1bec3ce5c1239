"""The processes of a run: what the launcher says, and two of them that sum and wait for one another."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from child_process import child_environment

from qlora_tool.world import World

ROOT = Path(__file__).parents[1]
LAUNCHERS = [
    ("RANK", "WORLD_SIZE"),  # torchrun, accelerate launch
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*(name for names in LAUNCHERS for name in names), "LOCAL_RANK"]:
        monkeypatch.delenv(name, raising=False)


def test_one_process_is_a_world_of_one():
    world, tensor = World.launched(), torch.arange(3.0)
    assert world == World.join(cpu=True) == World(0, 1)
    assert world.is_main
    assert world.sum(tensor) is tensor
    world.barrier()


@pytest.mark.parametrize(("rank", "size"), LAUNCHERS)
def test_what_each_launcher_says(monkeypatch: pytest.MonkeyPatch, rank: str, size: str):
    monkeypatch.setenv(rank, "3")
    monkeypatch.setenv(size, "4")
    assert World.launched() == World(3, 4)
    assert not World.launched().is_main


def test_asking_the_launcher_imports_no_torch():
    code = "import sys; from qlora_tool.world import World; World.launched(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=child_environment(), capture_output=True)
    assert done.stdout == b"False\n"


PROCESS = """
import sys, time, torch
from qlora_tool.world import World
before, world = World.launched(), World.join(cpu=True)
assert before == world, (before, world)
total = world.sum(torch.tensor([1.0, 10.0]) * (world.rank + 1))
if world.is_main:
    open(sys.argv[1], "w").write("written by the main process")
world.barrier()
print(world.rank, world.size, total.tolist(), open(sys.argv[1]).read())
"""


@pytest.mark.slow  # two processes that import torch and accelerate: 10 s
def test_two_processes_sum_and_wait(tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
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
        f"{rank} 2 [3.0, 30.0] written by the main process\n" for rank in range(2)
    ]
