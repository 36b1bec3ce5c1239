"""The second moments of what a model's linear modules are given on some rows, gathered with one layer in memory.

The rows go through the model in a few batches that take turns: each runs up to the next decoder layer and waits there
until all have come, so that a layer's weights are made once, as training had them (dequantized base + Δ), and let go of
when the last batch has left it. The model's own forward runs, whatever it hands from layer to layer. What is held is
one layer in fp32, the moments of its modules, and every batch's hidden states.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qlora_tool.data.batches import Batch
from qlora_tool.errors import MachineError, ToolError, UserError
from qlora_tool.export.grids.descent import damped
from qlora_tool.export.merge import MergedModel
from qlora_tool.files.tensors import give_back_freed_memory
from qlora_tool.model.checkpointing import decoder_layers
from qlora_tool.model.load import build_skeleton
from qlora_tool.model.parameter_source import tied_names
from qlora_tool.model.slots import is_linear
from qlora_tool.ops.products import matmul

_CHUNK = 2048  # tokens that are brought to fp32 at a time
_COPIED = 512  # tokens of which those that are no padding are copied at a time
_STRIP = 512  # rows of moments, whose products begin at the diagonal: little more than half of all


class Moments:
    """Of one layer's linear modules: Σ x·xᵀ over all tokens, (in, in) fp32. Modules that are given the same tensor
    share it."""

    def __init__(self) -> None:
        self._of: dict[str, str] = {}  # module → the first one that was given the same
        self._sums: dict[str, Tensor] = {}
        self._untold: set[str] = set()  # that were given tokens which padding cannot be told from

    def shared(self, modules: Sequence[str]) -> Tensor | None:
        """The moments of modules that all have the same ones, else None."""
        first = {self._of.get(module) for module in modules}
        one = next(iter(first)) if len(first) == 1 else None
        return None if one is None else self._sums.get(one)

    def add(self, module: str, x: Tensor, seen: dict[str, weakref.ref[Tensor]], real: Tensor | None = None) -> None:
        """Count an input (…, in).

        Args:
            seen: those of this batch so far, by module; they are not kept alive by it.
            real: (rows, length) bool, false where padding is, which does not count; None without any. What is not
                given all of a batch, in that order, has no moments.
        """
        known = self._of.get(module) or next((name for name, other in seen.items() if other() is x), module)
        self._of[module] = known
        seen[module] = weakref.ref(x)
        if real is not None and tuple(x.shape[:-1]) not in (tuple(real.shape), (real.numel(),)):
            self._untold.add(module)
            self._sums.pop(module, None)
        if known != module or module in self._untold:
            return
        flat = x.reshape(-1, x.shape[-1])
        if module not in self._sums:
            self._sums[module] = flat.new_zeros(flat.shape[1], flat.shape[1], dtype=torch.float32)
        total = self._sums[module]
        chunk = _CHUNK if real is None else _COPIED
        for begin in range(0, len(flat), chunk):
            part = flat[begin : begin + chunk]
            if real is not None:
                part = part[real.flatten()[begin : begin + chunk]]
            part = part.float()
            for first in range(0, len(total), _STRIP):  # the rest is the same: see `complete`
                strip = slice(first, first + _STRIP)
                total[strip, first:].addmm_(part[:, strip].T, part[:, first:])

    def complete(self) -> None:
        """Fill what `add` leaves out, after the last input."""
        for total in self._sums.values():
            for first in range(0, len(total), _STRIP):
                last = first + _STRIP
                total[last:, first:last] = total[first:last, last:].T

    def damp(self) -> None:
        """Make them ready for `grids.descent`.

        Raises:
            UserError: they are no numbers.
        """
        for module, total in self._sums.items():
            if not total.diagonal().isfinite().all():
                raise UserError(f"--calibration: what {module} is given is no number (NaN or infinity); the base or "
                                "the adapter is broken: copy or train it again")  # fmt: skip
            damped(total)


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    """What it computes, its product by the faster library."""
    y = matmul(x.reshape(-1, x.shape[-1]), module.weight.T)
    return (y if module.bias is None else y.add_(module.bias)).view(*x.shape[:-1], -1)


class _Done(Exception):
    """The last layer has run: nothing after it is asked for."""


class _Stopped(Exception):
    """Nobody waits for the rows any more."""


class LayerPass:
    """A forward pass of rows, layer by layer.

    Args:
        merged: the model; its values are those of `base="dequantized"`, in fp32, whatever it writes.
        batches: of input ids; padding is at the ends of rows, where no token before it sees it.
        trust_remote_code: whether code from the model's folder may run.

    Raises:
        UserError: the family has no layers that are known; and, while it is gone through, the model fails on the rows.
        MachineError: there is no memory for them.
    """

    def __init__(self, merged: MergedModel, batches: Sequence[Batch], trust_remote_code: bool = False):
        self._values = replace(merged, dtype=torch.float32, base="dequantized", keeps_wider=False, refuse_coarse=False)
        self._model = build_skeleton(merged.skeleton.config, trust_remote_code, torch.float32).eval()
        self._tied = {one: other for pair in tied_names(self._model).items() for one, other in (pair, pair[::-1])}
        self.layers = list(decoder_layers(self._model))
        if not self.layers:
            raise UserError(f"--calibration: no decoder layers are found in a {self._model.config.model_type} model; "
                            "choose --calibration none")  # fmt: skip
        self._batches, self._turn, self._loaded = batches, threading.Condition(), []
        self._at: dict[int, str | None] = {}  # the batch → the layer that it waits at, None once it is through
        self._running: int | None = None
        self._failed: BaseException | None = None
        self._stopped = False
        self._moments, self._seen = Moments(), {}  # type: Moments, dict[str, weakref.ref[Tensor]]
        self._add_hooks()

    def _add_hooks(self) -> None:
        inside = set()
        for name in self.layers:
            layer = self._model.get_submodule(name)
            layer.register_forward_pre_hook(lambda *_, name=name: self._wait_at(name), prepend=True)
            for inner, module in layer.named_modules():
                inside.add(module)
                if is_linear(module):
                    module.register_forward_pre_hook(self._noting(f"{name}.{inner}"))
                if type(module) is nn.Linear:
                    module.forward = partial(_linear, module)
        self._model.get_submodule(self.layers[-1]).register_forward_hook(self._finish)
        for name, module in self._model.named_modules():
            if module not in inside and any(True for _ in module.parameters(recurse=False)):
                module.register_forward_pre_hook(lambda *_, name=name: self._load(name, recurse=False))

    def _noting(self, name: str) -> Any:
        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert self._running is not None  # a batch whose turn it is
            mask = self._batches[self._running].attention_mask
            self._moments.add(name, inputs[0], self._seen, None if mask is None else mask.bool())

        return note

    def _finish(self, *_: object) -> None:
        raise _Done

    def __iter__(self) -> Iterator[tuple[str, Moments]]:
        """Each layer's name and its moments; the layer itself is gone by then."""
        threads = [threading.Thread(target=self._run, args=(index, batch), daemon=True)
                   for index, batch in enumerate(self._batches)]  # fmt: skip
        try:
            for index, thread in enumerate(threads):
                self._running = index
                thread.start()
                self._await()
            self._unload()
            for name in self.layers:
                self._load(name)
                for index in range(len(threads)):
                    if self._at[index] == name:
                        self._seen = {}
                        self._let(index)
                        give_back_freed_memory()  # each batch's thread has an arena of its own to keep it in
                self._unload()
                found, self._moments, self._seen = self._moments, Moments(), {}
                found.complete()
                yield name, found
                del found
        finally:
            with self._turn:
                self._stopped = True
                self._turn.notify_all()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()

    def _let(self, index: int) -> None:
        with self._turn:
            self._running = index
            self._turn.notify_all()
        self._await()

    def _await(self) -> None:
        """Until the batch whose turn it is waits again, or is through."""
        with self._turn:
            while self._running is not None:
                self._turn.wait()
        if self._failed is None:
            return
        if isinstance(self._failed, (MemoryError, torch.OutOfMemoryError)):
            raise MachineError("--calibration: out of memory; choose --calibration none") from self._failed
        if isinstance(self._failed, Exception) and not isinstance(self._failed, ToolError):
            raise UserError(
                f"--calibration: the model failed on the rows ({self._failed!r}); choose --calibration none"
            ) from self._failed
        raise self._failed

    def _run(self, index: int, batch: Batch) -> None:
        threading.current_thread().name = str(index)
        try:
            with torch.no_grad():
                self._model(input_ids=batch.input_ids, use_cache=False)
        except (_Done, _Stopped):
            pass
        except BaseException as error:  # told where the layers are asked for
            self._failed = error
        with self._turn:
            self._at[index], self._running = None, None
            self._turn.notify_all()

    def _wait_at(self, name: str) -> None:
        index = int(threading.current_thread().name)
        with self._turn:
            self._at[index], self._running = name, None
            self._turn.notify_all()
            while self._running != index and not self._stopped:
                self._turn.wait()
        if self._stopped:
            raise _Stopped

    def _load(self, owner: str, recurse: bool = True) -> None:
        """Give a module its weights, those inside of it too."""
        module = self._model.get_submodule(owner)
        for name, parameter in list(module.named_parameters(owner, recurse=recurse, remove_duplicate=False)):
            if parameter.device.type == "meta":
                place, _, attribute = name.rpartition(".")
                value = self._values.value(name if name in self._values.names else self._tied.get(name, name))
                self._model.get_submodule(place)._parameters[attribute] = nn.Parameter(value, requires_grad=False)
                self._loaded.append((place, attribute, parameter))

    def _unload(self) -> None:
        for place, attribute, empty in self._loaded:
            self._model.get_submodule(place)._parameters[attribute] = empty
        self._loaded = []
        give_back_freed_memory()
