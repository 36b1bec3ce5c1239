"""Births and deaths of every storage of a training step, seen by the operators that make them.

The same tracer watches fake tensors (a prediction) and real ones (a measurement on a CPU). It notes when each storage
was born, in which phase and by which operator, and when it died; what it was is decided afterwards (`classify`). What
an operation of our own takes inside and gives back is what its declaration says.

Three things that a dispatch mode itself changes are undone here: autograd then copies a leaf's gradient instead of
taking it, and adds gradients that meet at a tensor, and puts those of chosen rows, out of place instead of in place.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from qlora_tool.memory.trace.cpu_operators import ATTENTION, ATTENTION_BACKWARD, DECOMPOSITIONS, taken_inside
from qlora_tool.memory.trace.on_meta import result_on_meta
from qlora_tool.model.sharding import local
from qlora_tool.ops.declare import OPERATIONS, target_of

_HELD_ALONE = 2  # of a storage that one tensor has: that tensor, and the Python object that asks
_COPIES = ("aten::clone", "aten::new_empty_strided", "aten::empty_strided")

PRODUCTS = frozenset({
    "qlora_tool::matmul", "qlora_tool::matmul_add", "qlora_tool::grouped_matmul", "qlora_tool::grouped_gradient",
    "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmm_",
})  # fmt: skip
"""Operators of which the last two tensors are multiplied, (…, n, k) · (…, k, m), or each row with one of several."""
NOTED = PRODUCTS | {
    ATTENTION,
    ATTENTION_BACKWARD,
    "torch_attn::_varlen_attn",
    "torch_attn::_varlen_attn_backward",
    "aten::bernoulli_",
    "aten::embedding_dense_backward",
    "aten::index_put",
    "aten::index_put_",
    "aten::sort",
    *DECOMPOSITIONS,
}
"""Operators of PyTorch's whose calls are kept: what a CUDA device takes inside them is told by their shapes
(`allocator/operators.py`)."""


@dataclass(eq=False)
class Storage:
    """One storage's life; none is equal to another, alike as they may be.

    Attributes:
        nbytes: its size.
        birth, death: places in the order of all events; death is None while it lives.
        phase, died_in: load, forward, backward or optimizer.
        step: the training step it was born in, 0 for what was there before the first.
        module: whose forward pass it was born in, recomputed ones included.
        operator: that made it.
        recomputed: born while a checkpointed region was computed again.
        category: one of the breakdown's parts, where something named it.
        paged: state of a paged optimizer, which on a CUDA device lies in managed memory.
        holders: tensors' storages that stand for it; it dies with the last.
    """

    nbytes: int
    birth: int
    phase: str
    step: int
    module: str
    operator: str
    recomputed: bool
    death: int | None = None
    died_in: str = ""
    died_in_step: int = 0
    category: str = ""
    paged: bool = False
    holders: int = 1

    def again(self, **changes: Any) -> Storage:
        """Another one like it; `dataclasses.replace` takes six times as long, of tens of thousands."""
        other = object.__new__(Storage)
        other.__dict__ |= self.__dict__ | changes
        return other


@dataclass(frozen=True)
class Call:
    """One call of an operator in NOTED.

    Attributes:
        event: how many events there were when its results were there.
        operator, phase, module: as in `Storage`.
        in_backward: whether autograd called it: on a CUDA device another thread does.
        shapes: of its tensor arguments, in order, None and numbers left out.
        itemsize: bytes of an element of the first of them.
        results: the storages that its results lie in, new or written in place.
        recomputed: called while a checkpointed region was computed again.
    """

    event: int
    operator: str
    phase: str
    module: str
    in_backward: bool
    shapes: tuple[tuple[int, ...], ...]
    itemsize: int
    results: tuple[Storage, ...]
    recomputed: bool = False


@dataclass
class Trace:
    """Everything that was seen.

    Attributes:
        storages: in order of birth.
        events: (storage, +1 or -1) in order of time.
        marks: (event, phase, step) where a phase began.
        calls: of the operators in NOTED, in order of time.
        elsewhere: bytes of weights that are streamed to the device, by where they lie (`breakdown.ELSEWHERE`).
        layer_bytes: of each layer that is streamed, in the order of a forward pass.
        deterministic: whether the step is to run on deterministic kernels (`training.full_determinism`).
    """

    storages: list[Storage] = field(default_factory=list)
    events: list[tuple[Storage, int]] = field(default_factory=list)
    marks: list[tuple[int, str, int]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    elsewhere: dict[str, int] = field(default_factory=dict)
    layer_bytes: tuple[int, ...] = ()
    deterministic: bool = False

    def phases(self) -> Iterator[str]:
        """The phase of each event."""
        marks = iter([*self.marks, (len(self.events) + 1, "", 0)])
        _, phase, _ = next(marks)
        upcoming = next(marks)
        for index in range(len(self.events)):
            while index >= upcoming[0]:
                phase, upcoming = upcoming[1], next(marks)
            yield phase


class Tracer(TorchDispatchMode):
    """Watches while it is open. `phase` says what is going on; `step` which training step it is.

    Args:
        has_data: False for tensors without: the optimizer's question whether gradients are finite is then answered yes.
        on_meta: whether the tensors that are watched are meta ones. Those that no operator was seen to make, which are
            a skeleton's, are none of the run's; where others are watched, no meta tensor is.
    """

    def __init__(self, has_data: bool = True, on_meta: bool = False):
        super().__init__()
        self.trace = Trace()
        self._has_data, self._on_meta = has_data, on_meta
        self._live: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self._phase, self._step, self._module, self._recomputing = "load", 0, "", 0
        self._around: tuple[str, int] | None = None
        self._finished = False
        self._host_state, self._fork = torch.get_rng_state, torch.random.fork_rng
        self._resize = torch.UntypedStorage.resize_

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether PyTorch is to keep its compiler away from each call: nothing is compiled meanwhile."""
        return False

    def __enter__(self) -> Tracer:
        torch.get_rng_state = self._random_state
        if self._on_meta:  # for which nothing is forked
            torch.random.fork_rng = lambda **options: self._fork(**options | {"device_type": "cuda"})
        tracer, resize = self, self._resize

        def resized(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            tracer._has_size(storage)

        torch.UntypedStorage.resize_ = resized
        return super().__enter__()

    def __exit__(self, *raised: object) -> None:
        torch.get_rng_state, torch.random.fork_rng = self._host_state, self._fork
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*raised)

    def _has_size(self, storage: torch.UntypedStorage) -> None:
        """A storage was given another size, as that of weights is which are gathered while they are used: what it was
        is given back, and what it is now is new."""
        life = self._live.pop(storage, None)
        if life is not None:
            life.category = life.category or "temporaries"
            self._died(life)
        if storage.nbytes():
            again = self._life(storage.nbytes(), "resize_" if life is None else life.operator)
            again.category = "temporaries" if life is None else life.category
            self._watch(storage, again)

    def _random_state(self) -> torch.Tensor:
        """The state of random numbers that checkpointing keeps for what draws some, which no operator makes: 5 KB each
        time, in the host's memory. What is tried meanwhile, without modes, is none of the run's."""
        state = self._host_state()
        if _get_current_dispatch_mode() is not None and target_of(state).type == "cpu":
            self.adopt(state, "get_rng_state")
        return state

    @contextmanager
    def phase(self, name: str, step: int | None = None) -> Iterator[None]:
        """Name what is going on, meanwhile and on until the next phase begins: what follows a phase is its aftermath.
        One within another gives back to it."""
        around, module = self._around, self._module
        self._module = ""
        self._begin(name, self._step if step is None else step)
        self._around = self._phase, self._step
        try:
            yield
        finally:
            self._around = around
            if around is not None:
                self._begin(*around)
                self._module = module

    def finish(self) -> None:
        """The run is over: that all of it is given back now is not an event of its own."""
        self._finished = True

    def _begin(self, phase: str, step: int) -> None:
        self._phase, self._step = phase, step
        self.trace.marks.append((len(self.trace.events), phase, step))

    def recomputation(self) -> AbstractContextManager[None]:
        """A checkpointed region, the module that is running now, is computed again meanwhile."""
        return self._recomputation(self._module)

    @contextmanager
    def _recomputation(self, module: str) -> Iterator[None]:
        self._module = module
        self._recomputing += 1
        try:
            yield
        finally:
            self._recomputing -= 1

    def follow_modules(self, model: nn.Module, boundaries: Iterable[nn.Module]) -> list[RemovableHandle]:
        """Note whose forward pass is running.

        Args:
            boundaries: checkpointed modules: what goes into one is a checkpoint boundary.

        Returns:
            The hooks, to be removed where the model lives on.
        """
        kept, hooks = set(boundaries), []
        for name, module in model.named_modules():
            hooks.append(module.register_forward_pre_hook(partial(self._enter, name, module in kept)))
            hooks.append(module.register_forward_hook(partial(self._leave, name.rpartition(".")[0]), always_call=True))
        return hooks

    def _enter(self, name: str, is_boundary: bool, _module: nn.Module, args: tuple) -> None:
        self._module = name
        if is_boundary and self._phase == "forward" and args and isinstance(args[0], torch.Tensor):
            storage = self.storage_of(args[0])
            if storage is not None:
                storage.category = storage.category or "boundaries"

    def _leave(self, parent: str, _module: nn.Module, _args: tuple, _output: object) -> None:
        self._module = parent

    def storage_of(self, tensor: torch.Tensor) -> Storage | None:
        """What is known of a tensor's storage; None for one that was there before."""
        return self._live.get(tensor.untyped_storage())

    def adopt(self, tensor: torch.Tensor, operator: str = "existing") -> Storage:
        """Note a tensor that no operator was seen to make (a parameter wrapped before the tracer opened)."""
        return self._live.get(tensor.untyped_storage()) or self._born(tensor, operator)

    @property
    def current_phase(self) -> str:
        """What is going on, or went on last."""
        return self._phase

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        operator = func._schema.name
        if operator == "aten::_local_scalar_dense" and self._phase == "optimizer" and not self._has_data:
            return True  # so that a step with fp16 gradients is taken
        if self._on_meta and operator == "aten::native_layer_norm":
            _check_statistics(args[0])
        operation = OPERATIONS.get(operator)
        workspace = self._take(_inside(operator, args), operator)
        kwargs = kwargs or {}
        result = result_on_meta(func, args, kwargs) if self._on_meta else func(*args, **kwargs)
        if operation and operation.results_on_host:
            return result
        for leaf in (result,) if isinstance(result, torch.Tensor) else tree_leaves(result):
            if not isinstance(leaf, torch.Tensor) or (leaf.device.type == "meta") is not self._on_meta:
                continue
            leaf = local(leaf)  # the wrapper of a tensor that is shared out has no memory of its own
            storage = leaf.untyped_storage()
            if storage in self._live or storage.nbytes() == 0 or (self._on_meta and _shared(storage, operator, args)):
                continue
            if (source := self._taken_over(operator, args)) is not None:
                self._hand_over(source, storage)
            else:
                self._born(leaf, operator)
        if workspace:
            self._died(workspace)
        if operator in NOTED:
            self._note(operator, (args, kwargs), result)
        return result

    def _take(self, size: int, operator: str) -> Storage | None:
        """Note what an operator takes inside, from before its results are there until after."""
        return self._life(size, operator) if size else None

    def _note(self, operator: str, arguments: tuple, result: object) -> None:
        tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
        lives = [self.storage_of(leaf) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        call = Call(
            len(self.trace.events), operator, self._phase, self._module,
            self._phase == "backward" or torch._C._current_autograd_node() is not None,
            tuple(tuple(tensor.shape) for tensor in tensors), tensors[0].element_size(),
            tuple(life for life in lives if life is not None), self._recomputing > 0,
        )  # fmt: skip
        self.trace.calls.append(call)

    def _taken_over(self, operator: str, args: tuple) -> torch.UntypedStorage | None:
        """The storage that, without a dispatch mode, this result would have been written into."""
        if self._phase != "backward" or self._recomputing:
            return None
        node = torch._C._current_autograd_node()
        name = "" if node is None else node.name()
        if operator == "aten::add" and _can_meet(args):
            return args[0].untyped_storage()  # gradients that meet at a tensor: the second is added to the first
        if operator == "aten::index_put" and name.startswith("IndexBackward"):
            return args[0].untyped_storage()  # the gradient of chosen rows: put into the zeros that were made for it
        if name.endswith("AccumulateGrad") and operator in _COPIES:
            return args[0].untyped_storage()  # a leaf's gradient: taken as it is
        return None

    def _hand_over(self, source: torch.UntypedStorage, storage: torch.UntypedStorage) -> None:
        """`storage` is `source` as far as memory goes: it lives on when the other dies."""
        life = self._live.get(source)
        if life is None:
            return
        life.holders += 1
        self._watch(storage, life)

    def _born(self, tensor: torch.Tensor, operator: str) -> Storage:
        storage = tensor.untyped_storage()
        life = self._life(storage.nbytes(), operator)
        self._watch(storage, life)
        return life

    def _life(self, size: int, operator: str) -> Storage:
        life = Storage(
            size, len(self.trace.events), self._phase, self._step, self._module, operator, self._recomputing > 0
        )
        self.trace.storages.append(life)
        self.trace.events.append((life, +1))
        return life

    def _watch(self, storage: torch.UntypedStorage, life: Storage) -> None:
        self._live[storage] = life
        weakref.finalize(storage, self._died, life)

    def _died(self, life: Storage) -> None:
        life.holders -= 1
        if life.holders == 0:
            life.death, life.died_in, life.died_in_step = len(self.trace.events), self._phase, self._step
            if not self._finished:
                self.trace.events.append((life, -1))


def _shared(storage: torch.UntypedStorage, operator: str, args: tuple) -> bool:
    """Whether a meta result is nothing new: its storage that of an argument, or a copy of something real. What
    `lift_fresh` is given nobody saw made."""
    given = [arg for arg in args if isinstance(arg, torch.Tensor)]
    if operator == "aten::_to_copy":
        return not given[0].is_meta
    return operator != "aten::lift_fresh" and any(arg.untyped_storage()._cdata == storage._cdata for arg in given)


def _check_statistics(tensor: torch.Tensor) -> None:
    """A layer norm's means and deviations are fp32 on meta as on CUDA; a CPU has them in the tensor's dtype."""
    if tensor.itemsize == 2 and target_of(tensor).type == "cpu":
        raise NotImplementedError


def _inside(operator: str, args: tuple) -> int:
    """Bytes that an operator takes beside its results and gives back, as far as it is known to say so."""
    if (operation := OPERATIONS.get(operator)) is not None:
        return operation.workspace(target_of(_first_tensor(args)), *args)
    size = taken_inside(operator, args)
    return size if size and (operator in DECOMPOSITIONS or target_of(args[0]).type == "cpu") else 0


def _first_tensor(args: tuple) -> torch.Tensor:
    return args[0] if isinstance(args[0], torch.Tensor) else args[0][0]


def _can_meet(args: tuple) -> bool:
    """Whether an addition is one of two gradients of the same tensor, the first of them held by nothing else.

    The engine's own condition for adding in place (torch/csrc/autograd/input_buffer.cpp): a gradient that is a view, or
    expanded, or has views, shares its storage.
    """
    if len(args) < 2 or not isinstance(args[1], torch.Tensor) or args[0].shape != args[1].shape:
        return False
    return torch._C._storage_Use_Count(args[0].untyped_storage()._cdata) == _HELD_ALONE
