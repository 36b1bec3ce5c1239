"""What one of several processes takes: by hand, and held against two that really run."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from child_process import child_environment
from click.testing import CliRunner
from test_world import free_port
from tiny_models import tiny_config, write_tiny

from qlora_tool import UserError, profile_memory
from qlora_tool import world as world_module
from qlora_tool.build.build import build
from qlora_tool.build.tensors import Random
from qlora_tool.cli import main
from qlora_tool.config import Config, with_values
from qlora_tool.memory.trace import measure
from qlora_tool.memory.trace import predict as predicting
from qlora_tool.memory.trace.classify import timeline
from qlora_tool.memory.trace.extrapolate import estimate_peak, resized
from qlora_tool.memory.trace.predict import BatchShape, predict
from qlora_tool.model.sharding import shard
from qlora_tool.weights.handles import model_tensors
from qlora_tool.world import World

FSDP = {"training.sharding": "fsdp"}
# Odd widths, that neither two nor three processes halve; little vocabulary, so that layers count.
SIZES = {"num_hidden_layers": 3, "hidden_size": 72, "intermediate_size": 132, "vocab_size": 301}
shares_codes = pytest.mark.skipif(
    torch.__version__ < "2.12", reason="fully_shard of torch 2.11 takes parameters of floating point alone"
)


def settings(**values) -> Config:
    return with_values(Config(), {"model.compute_dtype": "float32", "adapter.r": 4,
                                  "training.gradient_checkpointing": True} | values)  # fmt: skip


def trace_of(processes: int, rows: int = 1, **values):
    return predict(settings(**values), tiny_config("llama", **SIZES),
                   replace(BatchShape.full(rows, 32), processes=processes), torch.float32)  # fmt: skip


def frozen_tensors():
    """Those of the whole base, by parameter name, and whether they are buffers."""
    meant = settings()
    made = build(meant, tiny_config("llama", **SIZES), Random(), device=torch.device("cpu"),
                 compute_dtype=torch.float32).model.module  # fmt: skip
    buffers = {id(tensor) for tensor in made.buffers()}
    return [(found.name, found.tensor, id(found.tensor) in buffers)
            for found in model_tensors(made) if not found.tensor.requires_grad]  # fmt: skip


def share_of(tensor: torch.Tensor, processes: int) -> int:
    """An equal number of rows each, the last ones filled up."""
    return math.ceil(tensor.shape[0] / processes) * math.prod(tensor.shape[1:]) * tensor.element_size()


def most_at_once(trace, chosen) -> int:
    alive = most = 0
    for storage, sign in trace.events:
        alive += sign * chosen(storage)
        most = max(most, alive)
    return most


def test_one_process_shares_nothing_out():
    alone = timeline(trace_of(1)).breakdown()
    assert timeline(trace_of(1, **FSDP)).breakdown() == alone
    assert timeline(predict(settings(), tiny_config("llama", **SIZES), BatchShape.full(1, 32), torch.float32)
                    ).breakdown() == alone  # fmt: skip


@pytest.mark.parametrize("bucket", [2**23, 1000])
def test_the_sums_of_gradients_are_counted(monkeypatch, bucket):
    """In fp32, beside the gradients they are the sums of: all at once, or some at a time."""
    monkeypatch.setattr(world_module, "_BUCKET", bucket)
    trace = trace_of(2)
    trained = [storage.nbytes for storage in trace.storages if storage.category == "adapter_weights"]
    sums = [storage for storage in trace.storages if storage.category == "gradients" and storage.phase == "optimizer"]
    assert sum(storage.nbytes for storage in sums) == predicting.STEPS * sum(trained)
    assert all(storage.nbytes <= max(4 * bucket, *trained) for storage in sums)
    added = most_at_once(trace, lambda storage: storage.nbytes * (storage.category == "gradients")) - sum(trained)
    most = max(storage.nbytes for storage in sums)
    own = max(storage.nbytes for storage in trace.storages
              if storage.category == "gradients" and storage.phase == "backward")  # fmt: skip
    assert most <= added <= most + own  # one gradient is held until the next sum begins
    assert not [storage for storage in trace_of(1).storages
                if storage.category == "gradients" and storage.phase == "optimizer"]  # fmt: skip


@shares_codes
@pytest.mark.parametrize("processes", [2, 3])
def test_what_a_process_holds_and_gathers(processes):
    """By hand: of every tensor the rows that are its share; of a layer that computes all rows, once in what was
    gathered and once as weights, and what was gathered of the layer before or after it."""
    whole = frozen_tensors()
    held = sum(tensor.nbytes if buffer else share_of(tensor, processes) for _, tensor, buffer in whole)
    trace = trace_of(processes, **FSDP)
    frozen = [storage for storage in trace.storages if (storage.death or len(trace.events)) >= len(trace.events)
              and storage.category in ("base_weights", "quantization_state", "other_weights")]  # fmt: skip
    assert sum(storage.nbytes for storage in frozen) == held
    layer = [tensor for name, tensor, buffer in whole if name.startswith("model.layers.0.") and not buffer]
    gathered = processes * sum(share_of(tensor, processes) for tensor in layer)
    assert most_at_once(trace, lambda storage: storage.nbytes == gathered) == 2
    sizes = {processes * share_of(tensor, processes) for tensor in layer}
    rest = {processes * share_of(tensor, processes) for name, tensor, buffer in whole if ".layers." not in name}
    as_weights = most_at_once(trace, lambda storage: (
        storage.nbytes * (storage.nbytes in sizes - rest and storage.category == "temporaries"
                          and storage.operator == "aten::empty")))  # fmt: skip
    assert as_weights <= gathered


@shares_codes
def test_loading_takes_the_whole_base_and_steps_a_share():
    alone, one_of_four = (timeline(trace_of(processes, **FSDP)) for processes in (1, 4))
    peaks = [line.breakdown().phase_peak_bytes for line in (alone, one_of_four)]
    assert peaks[1]["load"] >= peaks[0]["load"] and peaks[1]["optimizer"] < peaks[0]["optimizer"]
    loaded = one_of_four.breakdown()
    if loaded.peak_phase == "load":
        assert loaded.at_peak["temporaries"] < 0.05 * loaded.peak_bytes  # the base has its name there


@shares_codes
def test_what_plans_estimate_of_a_share():
    config, shape = settings(**FSDP), replace(BatchShape.full(1, 48), processes=2)
    deep = tiny_config("llama", **SIZES | {"num_hidden_layers": 6})
    found = estimate_peak(config, deep, shape, torch.float32, None)
    whole = timeline(predict(config, deep, shape, torch.float32)).breakdown()
    assert max(found.traced_layers) < 6
    for phase in ("load", "forward", "backward"):
        assert found.phase_peak_bytes[phase] == pytest.approx(whole.phase_peak_bytes[phase], rel=1e-3), phase
    assert found.peak_bytes == pytest.approx(whole.peak_bytes, rel=1e-3)
    assert resized(shape, 1, 10) == replace(BatchShape.full(1, 10), processes=2)


# ------------------------------------------------------------------------------------------------------- as asked for


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    write_tiny("llama", folder / "model", **SIZES)
    (folder / "run.yaml").write_text(
        f"model: {{name_or_path: {folder / 'model'}, compute_dtype: float32, device: cpu}}\n"
        "data: {train: rows.jsonl, max_length: 32}\ntraining: {per_device_train_batch_size: 2}\n", encoding="utf-8")
    return folder / "run.yaml"


@pytest.mark.parametrize("processes", [0, -2, 1.5, True, "2"])
def test_a_number_of_processes_that_is_none(file, processes):
    with pytest.raises(UserError, match=r"^--processes: expected a whole number of at least 1, found ") as raised:
        profile_memory(file, processes=processes)
    assert len(raised.value.lines) == 1


def test_one_process_is_measured_and_not_several(file):
    with pytest.raises(UserError, match="--measure runs one process"):
        profile_memory(file, processes=2, measure=True)


@shares_codes
def test_the_command_says_whose_bytes_they_are(file, tmp_path):
    def shown(*words: str) -> str:
        told = CliRunner().invoke(main, ["profile-memory", str(file), "--json", str(tmp_path / "found.json"), *words])
        assert told.exit_code == 0, told.output
        return " ".join(told.output.split())

    text, found = shown(), json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert "per process" not in text and "processes" not in found
    text = shown("--processes", "3", "--set", "training.sharding=fsdp")
    several = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert ", per process, of 3" in text and "3 processes on one machine take " in text
    assert several["processes"] == 3
    assert several["predicted"]["at_peak"]["base_weights"] < found["predicted"]["at_peak"]["base_weights"] / 2
    assert "one process shares nothing out; give --processes" in shown("--set", "training.sharding=fsdp")
    wrong = CliRunner().invoke(main, ["profile-memory", str(file), "--processes", "0"])
    assert wrong.exit_code == 2


@shares_codes
@pytest.mark.slow  # several full predictions: 15 s
def test_several_processes_share_a_cpu(file):
    """What auto recomputes fits into one's share of the machine."""
    found = profile_memory(file, processes=2, device_memory=200_000_000)
    assert found.limit.bytes == 100_000_000 and "for each of 2 processes" in found.budget_name
    sharded = [*(f"{key}={value}" for key, value in FSDP.items()), "data.max_length=64"]
    plain, least = (profile_memory(file, set=[*sharded, f"training.gradient_checkpointing={value}"], processes=2)
                    .predicted.peak_bytes for value in ("false", "true"))  # fmt: skip
    between = (plain + least) // 2
    chosen = profile_memory(file, set=[*sharded, f"training.max_memory={between}"], processes=2)
    assert chosen.predicted.peak_bytes <= between < plain


@shares_codes
@pytest.mark.slow  # a plan: 90 s
def test_a_plan_for_several_processes(file):
    found = profile_memory(file, set=["training.sharding=fsdp", "training.gradient_checkpointing=true"], plan=True,
                           processes=2, device_memory=20_000_000)  # fmt: skip
    assert found.limit.bytes == 10_000_000
    assert found.plan.asked.peak_bytes == pytest.approx(found.predicted.needed_bytes, rel=1e-3)
    assert found.plan.longest.peak_bytes <= 10_000_000


# -------------------------------------------------------------------------------------------------- two that really run


def one_of_two(values: str) -> None:
    """A process: its predicted peak, and what its allocator counts of the same steps."""
    world, sharded = World.join("cpu"), json.loads(values)
    config, sizes = settings(**sharded), SIZES | {"num_hidden_layers": 6, "hidden_size": 256}
    run = config, tiny_config("llama", **sizes), replace(BatchShape.full(2, 64), processes=2), torch.float32
    expected = timeline(predict(*run)).breakdown()
    predicting.AssumedWorld = lambda size: world
    predicting.shard_over = lambda processes, model, adapters: shard(model, adapters.parameters())
    # A thread of gloo's may hold what it has sent for a moment longer: the least of three.
    counted = min(measure.measure_peak(*run) for _ in range(3))
    print(json.dumps({"predicted": expected.peak_bytes, "counted": counted}), flush=True)
    world.barrier()
    os._exit(0)


@shares_codes
@pytest.mark.slow  # two processes: 15 s
@pytest.mark.parametrize("values", [
    {}, FSDP, FSDP | {"training.gradient_checkpointing": False, "model.quantization": "int8"},
    FSDP | {"adapter.r": 64, "model.embeddings": "int8"},
])  # fmt: skip
def test_the_allocators_of_two_processes(values):
    launched = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(),
                "OMP_NUM_THREADS": 1}  # fmt: skip
    paths = os.pathsep.join(sys.path)
    started = [subprocess.Popen(
        [sys.executable, "-c", f"import test_several_processes as t; t.one_of_two({json.dumps(values)!r})"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=child_environment(**launched, RANK=rank, LOCAL_RANK=rank) | {"PYTHONPATH": paths},
    ) for rank in range(2)]  # fmt: skip
    for process in started:
        out, err = process.communicate(timeout=180)
        assert process.returncode == 0, err
        found = json.loads(out.splitlines()[-1])
        assert found["predicted"] == pytest.approx(found["counted"], rel=0.03)
