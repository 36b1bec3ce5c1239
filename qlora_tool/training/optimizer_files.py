"""An optimizer's state and that of the random generators as a safetensors file and a few numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_tool.files.tensors import read_all, write_all


def write_optimizer(file: Path, state: Mapping[str, Any], random: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """Write the tensors: `parameters.NUMBER.NAME`, and `random.PROCESS.DEVICE`.

    Args:
        file: a temporary path, whose folder is renamed afterwards.
        state: see `Optimizer.state_dict`.
        random: the states of the generators by device, of each process.

    Returns:
        What is no tensor, as JSON: the steps of each parameter, null where it has taken none, and the loss scale.

    Raises:
        OSError: the disk refuses.
    """
    tensors, steps = {}, []
    for number, saved in enumerate(state["parameters"]):
        steps.append(None if saved is None else saved["steps"])
        tensors |= {f"parameters.{number}.{name}": value for name, value in (saved or {}).items() if name != "steps"}
    tensors |= {f"random.{rank}.{name}": value for rank, own in enumerate(random) for name, value in own.items()}
    write_all(file, tensors, {"format": "pt"})
    return {"name": state["name"], "steps": steps, "loss_scale": state["loss_scale"], "good_steps": state["good_steps"]}


def read_optimizer(file: Path, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """What was written: `optimizer`, the state; `random`, that of the first process's generators; `others`, the rest.

    Raises:
        UserError: the file is none of safetensors.
        ValueError: values that no optimizer has.
        KeyError: something is missing.
    """
    _refuse_numbers(numbers)
    steps = numbers["steps"]
    parameters: list[dict[str, Any] | None] = [None if count is None else {"steps": count} for count in steps]
    random: dict[int, dict[str, Tensor]] = {}
    for name, tensor in read_all(file).items():
        kind, number, rest = name.split(".", 2)
        if kind == "random":
            random.setdefault(int(number), {})[rest] = tensor
            continue
        if kind != "parameters" or (found := parameters[int(number)]) is None:
            raise ValueError(f"{file.name}: {name} belongs to nothing")
        _refuse_values(name, rest, tensor)
        found[rest] = tensor
    state = {"name": numbers["name"], "parameters": parameters, "loss_scale": numbers["loss_scale"],
             "good_steps": numbers["good_steps"]}  # fmt: skip
    return {"optimizer": state, "random": random[0], "others": [random[rank] for rank in range(1, len(random))]}


def _refuse_numbers(numbers: Mapping[str, Any]) -> None:
    for value in (*numbers["steps"], numbers["good_steps"]):
        if value is not None and (type(value) is not int or value < 0):
            raise ValueError(f"the optimizer's steps are {value!r}; expected a count")
    scale = numbers["loss_scale"]
    if type(scale) not in (int, float) or not math.isfinite(scale) or scale <= 0:
        raise ValueError(f"the loss scale is {scale!r}; expected a number above 0")


def _refuse_values(name: str, field: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"the optimizer's {name} has values that are not finite")
    if field in ("exp_avg_sq", "absmax1", "absmax2") and bool((tensor < 0).any()):
        raise ValueError(f"the optimizer's {name} has values below 0")
