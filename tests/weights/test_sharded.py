"""Two processes that hold one model's handles sharded by `fully_shard` compute what one process does."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 120  # seconds, of a machine that is busy; it takes about ten


def adapted_model(folder: Path, kind: str):
    """The model with double-quantized linears, or with int8 ones and embeddings, and an fp32 adapter that changes its
    output."""
    from qlora_tool.adapters.attach import attach
    from qlora_tool.config import AdapterConfig
    from qlora_tool.model.load import load_base
    from qlora_tool.model.slots import Quantization
    from qlora_tool.model.source import read_model_config

    quantization = Quantization(kind, True, "int8" if kind == "int8" else "as_stored")
    model = load_base(folder, read_model_config(folder), quantization, torch.device("cpu"), torch.float32)
    adapters = attach(model, AdapterConfig(r=4, target_modules="all-linear"), torch.float32, seed=0)
    with torch.no_grad():
        for index, parameter in enumerate(adapters.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            parameter.add_(0.1 * noise)
    return model, adapters


def loss_of(model) -> torch.Tensor:
    from tiny_models import tokens

    ids = tokens()
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def gradients(adapters) -> dict[str, torch.Tensor]:
    return {name: tensor.grad for name, tensor in adapters.tensors().items()}


def one_of_two(rank: int, folder: Path, kinds: list[str]) -> None:
    """A process: shards, takes a loss and its gradients, and leaves what it found in `folder`."""
    from torch.distributed.fsdp import fully_shard

    from qlora_tool.weights.handles import WeightHandle

    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # a machine's name need not lead back to it
    os.environ["QLORA_TOOL_CACHE"] = str(folder / f"cache {rank}")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=2,
                            timeout=timedelta(seconds=TIMEOUT))  # fmt: skip
    mesh = dist.init_device_mesh("cpu", (2,))
    for kind in kinds:
        model, adapters = adapted_model(folder / "model", kind)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        handles = {name: part for name, part in model.named_modules() if isinstance(part, WeightHandle)}
        # Before any forward pass has gathered something.
        held = {name: {field: tensor.to_local().numel() for field, tensor in handle.tensors().items()}
                for name, handle in handles.items()}  # fmt: skip
        dense = {name: handle.dense(torch.float32) for name, handle in handles.items()}
        loss = loss_of(model)
        loss.backward()
        found = {name: gradient.full_tensor() for name, gradient in gradients(adapters).items()}
        torch.save({"held": held, "dense": dense, "loss": loss.detach(), "gradients": found},
                   folder / f"{kind} {rank}.pt")  # fmt: skip
    dist.destroy_process_group()


def run_two(*arguments) -> None:
    context = mp.spawn(one_of_two, arguments, nprocs=2, join=False)
    end = time.monotonic() + TIMEOUT
    try:
        while not context.join(timeout=1):  # raises what a process raised
            assert time.monotonic() < end, "the processes did not end"
    finally:
        for process in context.processes:
            process.kill()


@pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="needs gloo on Linux or macOS")
@pytest.mark.skipif(
    torch.__version__ < "2.12", reason="fully_shard of torch 2.11 takes parameters of floating point alone"
)
def test_sharded_handles_give_the_product_of_one_process(tmp_path):
    from tiny_models import relative_error, write_tiny

    from qlora_tool.weights.handles import WeightHandle

    kinds = ["nf4", "int8"]
    write_tiny("llama-odd", tmp_path / "model")  # 36 × 45: codes and scales that two processes cannot halve
    run_two(tmp_path, kinds)
    for kind in kinds:
        model, adapters = adapted_model(tmp_path / "model", kind)
        loss = loss_of(model)
        loss.backward()
        handles = {name: part for name, part in model.named_modules() if isinstance(part, WeightHandle)}
        ranks = [torch.load(tmp_path / f"{kind} {rank}.pt") for rank in range(2)]
        for rank in ranks:
            # The same operations on the same numbers, but threads and libraries may add a product up in another order.
            torch.testing.assert_close(rank["loss"], loss.detach(), rtol=2e-6, atol=0)
            for name, gradient in gradients(adapters).items():
                assert gradient.abs().max() > 0
                assert relative_error(rank["gradients"][name], gradient) <= 1e-5, name
            for name, handle in handles.items():
                assert torch.equal(rank["dense"][name], handle.dense(torch.float32))
        for name, handle in handles.items():
            for field, tensor in handle.tensors().items():
                first, second = (rank["held"][name][field] for rank in ranks)
                row = tensor.numel() // tensor.shape[0]  # what is split are rows
                assert first + second == tensor.numel() and 0 <= first - second <= row, (name, field)
        assert len(handles) == 2 * 7 + (1 if kind == "nf4" else 2)
