"""The trace of a deep model from those of three shallow ones, event by event.

Identical layers allocate and free the same, each in its turn, so that a deeper model's events are those of a shallower
one with a stretch repeated in each phase: once for each layer more. Where the stretches lie is found by holding the
traces of two depths against each other; that they may be repeated is shown by the third, which must be what the first
two make of its depth, event by event and storage by storage. Where it is not, nothing is made.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import NamedTuple

import numpy as np

from qlora_tool.memory.trace.tracer import Call, Storage, Trace

BIRTH, DEATH, CALL = 1, -1, 0
MOST_WORK = 100_000_000  # pairs that an alignment may compare, of things at most so far apart as there are more


class Item(NamedTuple):
    """Something that happened: `what` is BIRTH or DEATH of a storage, or a CALL."""

    what: int
    of: Storage | Call


@dataclass
class _Sequence:
    """What happened in a trace, phase by phase.

    Attributes:
        spans: (phase, step) of each.
        items: of each span.
        tokens: what each item is, whatever layer it is of.
    """

    spans: list[tuple[str, int]] = field(default_factory=list)
    items: list[list[Item]] = field(default_factory=list)
    tokens: list[list[Hashable]] = field(default_factory=list)

    @classmethod
    def of(cls, trace: Trace, path: str) -> _Sequence:
        found, calls = cls(), iter([*trace.calls, None])
        call = next(calls)
        begins = [begin for begin, _, _ in trace.marks]
        for (begin, phase, step), end in zip(trace.marks, [*begins[1:], len(trace.events)], strict=True):
            items = []
            for index in range(begin, end + 1):
                while call is not None and call.event == index and call.phase == phase:
                    items.append(Item(CALL, call))
                    call = next(calls)
                if index < end:
                    storage, sign = trace.events[index]
                    items.append(Item(sign, storage))
            found.spans.append((phase, step))
            found.items.append(items)
            found.tokens.append([_token(item, path, len(trace.events)) for item in items])
        if call is not None:
            raise _Unlike("a call of no phase")
        return found


class _Unlike(Exception):
    """The traces are not of models that repeat."""


def _kind(storage: Storage, path: str, end: int) -> Hashable:
    died = ("", 0) if storage.death is None or storage.death >= end else (storage.died_in, storage.died_in_step)
    return (storage.phase, storage.step, _within(storage.module, path), storage.operator, storage.recomputed,
            storage.category, storage.paged, died)  # fmt: skip


def _within(module: str, path: str) -> str:
    return re.sub(rf"^{re.escape(path)}\.\d+", f"{path}.*", module)


def _token(item: Item, path: str, end: int) -> Hashable:
    """`end`: how many events there are; who dies with the process, after the last of them, may be known or not."""
    if isinstance(item.of, Storage):
        return item.what, _kind(item.of, path, end), item.of.nbytes
    call = item.of
    return (CALL, call.operator, _within(call.module, path), call.in_backward, call.shapes, call.itemsize,
            call.recomputed)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- aligning


def _aligned(first: Sequence[Hashable], second: Sequence[Hashable]) -> list[int | None]:
    """For each of `second` the one of `first` that it is, None where it comes in addition: what is added lies in as few
    stretches as can be, and as few things as can be have another size than they had.

    Raises:
        _Unlike: `second` is not `first` with more in it.
    """
    more = len(second) - len(first)
    if more < 0:
        raise _Unlike("a shallower model has more in it")
    begin = _in_common(zip(first, second, strict=False))
    if begin == len(first):
        return [*range(begin), *[None] * more]
    end = _in_common(zip(reversed(first), reversed(second), strict=False))
    if begin + end >= len(first):  # one stretch, as late as can be
        return [*range(begin), *[None] * more, *range(begin, len(first))]
    return _least_costly(first, second)


def _in_common(pairs: Iterable[tuple[Hashable, Hashable]]) -> int:
    """How many pairs from the first on are equal."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _least_costly(first: Sequence[Hashable], second: Sequence[Hashable]) -> list[int | None]:
    """The same where more than one stretch is added, or something has another size."""
    more = len(second) - len(first)
    if len(first) * (more + 1) > MOST_WORK:
        raise _Unlike("too much to compare")
    exact, sizeless = (_numbered(first, second, of) for of in (lambda token: token, _sizeless))
    (a, b), (c, d) = exact, sizeless
    # cost[n]: of the things so far, n of `second` having been added before the last of them; far: more than any cost.
    far, added = np.int64(1) << 40, np.arange(more + 1)
    came_from = np.empty((len(first), more + 1), np.int32)
    cost = (added > 0).astype(np.int64)
    for number in range(len(first)):
        there = slice(number, number + more + 1)
        if number:
            # From right before, or with a stretch between: from the cheapest with less added, of equals the last one.
            best = np.minimum.accumulate(cost)
            where = np.maximum.accumulate(np.where(cost == best, added, 0))
            after_gap, before_gap = np.full_like(cost, far), np.zeros_like(where)
            after_gap[1:], before_gap[1:] = best[:-1] + 1, where[:-1]
            came_from[number] = np.where(after_gap < cost, before_gap, added)
            cost = np.minimum(cost, after_gap)
        cost = cost + np.where(b[there] == a[number], 0, np.where(d[there] == c[number], _OTHER_SIZE, far))
    matched: list[int | None] = [None] * len(second)
    if not len(first):
        return matched
    cost = cost + (added < more)
    shift = int(cost.argmin())
    if cost[shift] >= far:
        raise _Unlike("a shallower model has more in it")
    for number in range(len(first) - 1, -1, -1):
        matched[number + shift] = number
        shift = int(came_from[number][shift])
    return matched


_OTHER_SIZE = 1000  # against 1 for a stretch


def _numbered(
    first: Sequence[Hashable], second: Sequence[Hashable], of: Callable[[Hashable], Hashable]
) -> tuple[np.ndarray, np.ndarray]:
    numbers: dict[Hashable, int] = {}
    found = (np.array([numbers.setdefault(of(token), len(numbers)) for token in tokens], np.int64)
             for tokens in (first, second))  # fmt: skip
    return next(found), next(found)


def _sizeless(token: Hashable) -> Hashable:
    assert isinstance(token, tuple)
    return token[:2] if token[0] != CALL else token


# ----------------------------------------------------------------------------------------------------------- repeating


class _Alive:
    """Storages that are alive, those that are alike in order of birth."""

    def __init__(self) -> None:
        self._of: dict[Hashable, list[Storage]] = defaultdict(list)
        self._key: dict[int, Hashable] = {}

    def born(self, storage: Storage, key: Hashable) -> None:
        self._of[key].append(storage)
        self._key[id(storage)] = key

    def place(self, storage: Storage) -> tuple[Hashable, int, int]:
        """Its key, and its place from the first born and from the last."""
        key = self._key[id(storage)]
        index = next(index for index, one in enumerate(self._of[key]) if one is storage)
        return key, index, index - len(self._of[key])

    def at(self, key: Hashable, place: int) -> Storage:
        try:
            return self._of[key][place]
        except IndexError:
            raise _Unlike("a storage that is not there") from None

    def died(self, storage: Storage) -> None:
        self._of[self._key[id(storage)]].remove(storage)


Places = list[list[list[tuple[Hashable, int, int]]]]  # of each item of each span: of each storage that it is about


def _places(sequence: _Sequence, keys: dict[int, Hashable]) -> Places:
    alive, found = _Alive(), []
    for items in sequence.items:
        span = []
        for what, of in items:
            if isinstance(of, Call):
                span.append([alive.place(result) for result in of.results if id(result) in alive._key])
            elif what == BIRTH:
                alive.born(of, keys[id(of)])
                span.append([])
            else:
                span.append([alive.place(of)])
                alive.died(of)
        found.append(span)
    return found


class Pattern:
    """What two traces of a model with more and fewer layers have in common, and what a layer adds.

    Args:
        first, second: traces; the second one's model has more layers.
        path: of the list of layers.
        depths: how many layers each has.
    """

    def __init__(self, first: Trace, second: Trace, path: str, depths: tuple[int, int]):
        self.path, self.depths, self.templates = path, depths, (first, second)
        one, two = _Sequence.of(first, path), _Sequence.of(second, path)
        if one.spans != two.spans:
            raise _Unlike("other phases")
        self.one, self.two = one, two
        self.matched = [_aligned(*pair) for pair in zip(one.tokens, two.tokens, strict=True)]
        self.sizes: dict[int, tuple[int, int]] = {}  # of storages of the second trace whose size differs: both
        keys_one: dict[int, Hashable] = {}
        keys_two: dict[int, Hashable] = {}
        for span, matched in enumerate(self.matched):
            for index, item in enumerate(two.items[span]):
                if item.what != BIRTH:
                    continue
                key: Hashable = two.tokens[span][index]
                if (other := matched[index]) is not None:
                    like = one.items[span][other].of
                    if like.nbytes != item.of.nbytes:
                        key = ("of two sizes", span, index)
                        self.sizes[id(item.of)] = like.nbytes, item.of.nbytes
                    keys_one[id(like)] = key
                keys_two[id(item.of)] = key
        self.keys = keys_two
        self.rules = self._rules(_places(one, keys_one), _places(two, keys_two))

    def _rules(self, first: Places, second: Places) -> list[list[list[tuple[Hashable, int]]]]:
        """For each item of the second trace the storages that it is about: (key, place among those alive, below 0 from
        the last born)."""
        settled: dict[Hashable, bool] = {}
        found: list[list[list]] = []
        for span, matched in enumerate(self.matched):
            for index, other in enumerate(matched):
                if other is None:
                    continue
                for (key, start, end), (_, start_there, end_there) in zip(
                    second[span][index], first[span][other], strict=True
                ):
                    if start == start_there and end != end_there:
                        settled[self.two.tokens[span][index], key] = False
                    elif end != end_there:
                        raise _Unlike("a storage that is another one")
        for span, tokens in enumerate(self.two.tokens):
            found.append([
                [(key, end if settled.get((tokens[index], key), True) else start) for key, start, end in places]
                for index, places in enumerate(second[span])
            ])  # fmt: skip
        return found

    def at_depth(self, layers: int) -> Trace:
        """The trace of a model with so many layers.

        Raises:
            _Unlike: it cannot be told.
        """
        (less, more), made = self.depths, Trace(deterministic=self.templates[1].deterministic)
        period = more - less
        times, left = divmod(layers - more, period)
        if left or times < 0:
            raise _Unlike("no whole number of repetitions")
        made.elsewhere, made.layer_bytes = self._streamed(times)
        alive = _Alive()
        for span, (phase, step) in enumerate(self.two.spans):
            made.marks.append((len(made.events), phase, step))
            for index, turn in _turns(self.matched[span], times):
                self._happen(span, index, turn, times, made, alive)
        return made

    def _streamed(self, times: int) -> tuple[dict[str, int], tuple[int, ...]]:
        """What lies elsewhere, and of each layer what is brought from there."""
        (one, two), period = self.templates, self.depths[1] - self.depths[0]
        elsewhere = {place: size + (size - one.elsewhere[place]) * times for place, size in two.elsewhere.items()}
        return elsewhere, two.layer_bytes + two.layer_bytes[-period:] * times

    def _happen(self, span: int, index: int, turn: int, times: int, made: Trace, alive: _Alive) -> None:
        what, of = self.two.items[span][index]
        about = self.rules[span][index]
        if isinstance(of, Call):
            results = tuple(alive.at(key, place) for key, place in about)
            made.calls.append(replace(of, event=len(made.events), results=results))
        elif what == BIRTH:
            size = of.nbytes
            if id(of) in self.sizes:
                before, after = self.sizes[id(of)]
                size += (after - before) * times
            born = of.again(nbytes=size, birth=len(made.events), module=self._named(span, index, turn, times),
                            death=None, holders=1)  # fmt: skip
            made.storages.append(born)
            made.events.append((born, BIRTH))
            alive.born(born, self.keys[id(of)])
        else:
            ((key, place),) = about
            dead = alive.at(key, place)
            alive.died(dead)
            dead.death = len(made.events)
            made.events.append((dead, DEATH))

    def _named(self, span: int, index: int, turn: int, times: int) -> str:
        """The module's name, with the number that its layer has at that depth."""
        module, prefix = self.two.items[span][index].of.module, f"{self.path}."
        if not module.startswith(prefix):
            return module
        number, dot, rest = module[len(prefix) :].partition(".")
        period, other = self.depths[1] - self.depths[0], self.matched[span][index]
        if other is None:
            more = (times - turn if self.two.spans[span][0] == "backward" else turn) * period
        else:
            more = times * period if self.one.items[span][other].of.module != module else 0
        return f"{prefix}{int(number) + more}{dot}{rest}"


def _turns(matched: Sequence[int | None], times: int) -> Iterator[tuple[int, int]]:
    """The items in order, each stretch that one layer adds so many times more: (item, the how manieth time)."""
    index = 0
    while index < len(matched):
        if matched[index] is not None:
            yield index, 0
            index += 1
            continue
        end = next((later for later in range(index, len(matched)) if matched[later] is not None), len(matched))
        for turn in range(times + 1):
            for item in range(index, end):
                yield item, turn
        index = end


def deepened(traces: Sequence[Trace], path: str, depths: Sequence[int], layers: int) -> Trace | None:
    """The trace of a model with so many layers, from those of three with fewer; None where they do not tell.

    Args:
        traces: of the same run with `depths` layers, each more than the one before by the same number.
        path: of the list of layers in the model, e.g. `model.layers`.
    """
    try:
        pattern = Pattern(traces[0], traces[1], path, (depths[0], depths[1]))
        third = pattern.at_depth(depths[2])
        streamed = (third.elsewhere, third.layer_bytes) == (traces[2].elsewhere, traces[2].layer_bytes)
        if not streamed or not same(third, traces[2], path):
            return None
        return pattern.at_depth(layers)
    except _Unlike:
        return None


def same(one: Trace, other: Trace, path: str) -> bool:
    """Whether two traces are equal, event by event, storage by storage, call by call."""
    first, second = _Sequence.of(one, path), _Sequence.of(other, path)
    if (first.spans, first.tokens) != (second.spans, second.tokens):
        return False
    return _about(one) == _about(other)


def _about(trace: Trace) -> tuple[list, list, list]:
    """Which storage each event and each call is about, and where it was made."""
    return ([storage.birth for storage, _ in trace.events],
            [[result.birth for result in call.results] for call in trace.calls],
            [storage.module for storage in trace.storages])  # fmt: skip
