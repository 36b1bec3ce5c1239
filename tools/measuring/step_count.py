"""What a step on a CUDA device launches and moves, counted without one (a 7B: 20 seconds).

    tools/measure step-count llama-7b-4x1024 --json count.json

The second training step of a configuration of `memory-cuda` runs on fake tensors, meant for a card. Counted are:
launches, one for each operator that reads or writes numbers (views and empty tensors are none; the sums of products
that a library splits are not seen: of 4,683 that a profiler counted on an H200 for 4 x 1024 they were 720); bytes, of
each operator all that it is given and all that it makes, once each; how often each quantized weight is dequantized;
and operators that wait for the device.
"""

from __future__ import annotations

import argparse
from collections import Counter
from contextlib import contextmanager
from typing import Any

from measuring.command import add_outputs
from measuring.memory_cuda import CONFIGURATIONS
from measuring.ours import StepMemory
from measuring.results import show_table

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "matmul_add", "linear")
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")
LAUNCHES_NOTHING = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "device")


def class_of(operator: str, phase: str) -> str:
    """products, dequantization, attention, optimizer or elementwise."""
    name = operator.rpartition("::")[2].rstrip("_")
    if phase == "optimizer":
        return "optimizer"
    if name in PRODUCTS:
        return "products"
    if name.startswith("dequantize"):
        return "dequantization"
    return "attention" if "attention" in name or "attn" in name else "elementwise"


def counted(step: StepMemory, keeps_weights: bool = False) -> dict[str, Any]:
    """Count the second step; with `keeps_weights`, as `--keep-weights` says.

    Returns:
        `launches`, `bytes` and `operators` ({operator: launches}) by class; `dequantizations`, `weights` (quantized
        ones); `waits` ({operator: times}).
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from qlora_tool.memory.trace.predict import Watch

    class Count(TorchDispatchMode, Watch):
        def __init__(self) -> None:
            super().__init__()
            self.now, self.launches, self.moved, self.waits = ("load", 0), Counter(), Counter(), Counter()
            self.operators: dict[str, Counter[str]] = {}
            self.weights = 0

        @contextmanager
        def phase(self, name: str, step: int):
            before, self.now = self.now, (name, step)
            yield
            self.now = before if name == "load" else self.now

        def loaded(self, model: Any, adapters: Any) -> tuple[()]:
            from qlora_tool.weights.handles import model_tensors

            self.weights = sum(role == "codes" for _, _, role in model_tensors(model.module))
            return ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            phase, number = self.now
            if number == 2:
                self._count(func, phase, tree_leaves((args, kwargs)), tree_leaves(result))
            return result

        def _count(self, func: Any, phase: str, given: list[Any], made: list[Any]) -> None:
            operator = func._schema.name
            name = operator.rpartition("::")[2]
            if name in WAITS:
                self.waits[operator] += 1
            given, made = ([one for one in leaves if isinstance(one, torch.Tensor)] for leaves in (given, made))
            writes = [argument.name for argument in func._schema.arguments
                      if argument.alias_info and argument.alias_info.is_write]  # fmt: skip
            before = {one.untyped_storage()._cdata for one in given}
            made = [one for one in made if one.untyped_storage()._cdata not in before]
            if name in LAUNCHES_NOTHING or not (made or writes):  # a view
                return
            kind = class_of(operator, phase)
            self.launches[kind] += 1
            self.moved[kind] += sum(one.numel() * one.element_size() for one in (*given, *made))
            self.operators.setdefault(kind, Counter())[operator] += 1

    count = Count()
    step.watched_without_data(count, (9, 0), keeps_weights)
    return {
        "launches": dict(count.launches), "bytes": dict(count.moved),
        "operators": {kind: dict(found.most_common()) for kind, found in count.operators.items()},
        "dequantizations": count.launches["dequantization"], "weights": count.weights, "waits": dict(count.waits),
    }  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("configuration", choices=CONFIGURATIONS, metavar="NAME", help=", ".join(CONFIGURATIONS))
    parser.add_argument("--keep-weights", action="store_true",
                        help="from the recomputation of a layer until its gradients' products")  # fmt: skip
    add_outputs(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    one = CONFIGURATIONS[options.configuration]
    layers = one.model["num_hidden_layers"]
    return {"configuration": options.configuration, "layers": layers, **counted(one.step(), options.keep_weights)}


def show(results: dict[str, Any]) -> None:
    layers, launches = results["layers"], results["launches"]
    rows = [(kind, count, f"{count / layers:.1f}", f"{results['bytes'][kind] / 1e9:.1f}",
             f"{results['bytes'][kind] / 1e9 / layers:.2f}") for kind, count in launches.items()]  # fmt: skip
    show_table([("class", "launches", "a layer", "GB", "GB a layer"), *rows])
    print(f"\n{sum(launches.values()):,} launches; {results['dequantizations'] / max(1, results['weights']):.2f} "
          f"dequantizations of each of {results['weights']} weights; waits: {results['waits'] or 'none'}")
