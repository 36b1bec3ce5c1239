"""The second step of a trace, made of the first: the same once more, but for the optimizer's state, which is there by
then. Whether that is all is seen where both steps of a shallow model are traced (`repeats`)."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from qlora_tool.memory.trace.deepen import same
from qlora_tool.memory.trace.tracer import Storage, Trace


class NotRepeated(Exception):
    """A second step would not be the first one again."""


def repeats(trace: Trace) -> bool:
    """Whether the second step of a trace of two is what `with_second_step` makes of the first."""
    try:
        made = with_second_step(_without_second_step(trace))
    except NotRepeated:
        return False
    return same(made, trace, "")


def with_second_step(trace: Trace) -> Trace:
    """A trace of one step with a second one added; it is changed itself.

    Raises:
        NotRepeated: the step leaves something behind that is no state of the optimizer.
    """
    begin, end = next(event for event, _, step in trace.marks if step == 1), len(trace.events)
    marks = deque(mark for mark in trace.marks if mark[2] == 1)
    calls = deque(call for call in trace.calls if call.event > begin or (call.event == begin and call.phase != "load"))
    for storage in trace.storages:
        if storage.death is not None and storage.death >= end:  # of the process, with all that it has
            storage.death = None
    stays = {id(storage) for storage in trace.storages if storage.step == 1 and storage.death is None}
    if any(storage.category != "optimizer_state" for storage in trace.storages if id(storage) in stays):
        raise NotRepeated
    now: dict[int, Storage] = {}  # by id of a storage of the first step, the one that it is in the second
    for made, sign in trace.events[:begin]:  # for the step, before it begins
        if sign > 0 and made.died_in_step == 1 and made.death is not None:
            again = now[id(made)] = made.again(birth=len(trace.events), phase="optimizer", step=1, death=None)
            _add(trace, again)
    for index in range(begin, end + 1):
        while marks and marks[0][0] == index:
            trace.marks.append((len(trace.events), marks.popleft()[1], 2))
        while calls and calls[0].event == index:
            call = calls.popleft()
            results = tuple(now.get(id(result), result) for result in call.results)
            trace.calls.append(replace(call, event=len(trace.events), results=results))
        if index == end:
            break
        storage, sign = trace.events[index]
        if sign > 0 and id(storage) not in stays:
            again = now[id(storage)] = storage.again(birth=len(trace.events), step=2, death=None)
            _add(trace, again)
        elif sign < 0:
            again = now[id(storage)]
            again.death, again.died_in_step = len(trace.events), 2
            trace.events.append((again, -1))
    return trace


def _add(trace: Trace, storage: Storage) -> None:
    trace.storages.append(storage)
    trace.events.append((storage, +1))


def _without_second_step(trace: Trace) -> Trace:
    """A trace of two steps as it was after the first; nothing of it is shared."""
    end = next(event for event, _, step in trace.marks if step == 2)
    while end and trace.events[end - 1][1] > 0 and trace.events[end - 1][0].category != "optimizer_state":
        end -= 1  # made for the second, before it begins
    copies = {id(storage): storage.again() for storage in trace.storages if storage.birth < end}
    for copy in copies.values():
        if copy.death is not None and copy.death >= end:
            copy.death = None
    calls = [call for call in trace.calls if call.event < end or (call.event == end and call.phase == "optimizer")]
    return replace(
        trace,
        storages=list(copies.values()),
        events=[(copies[id(storage)], sign) for storage, sign in trace.events[:end]],
        marks=[mark for mark in trace.marks if mark[2] < 2],
        calls=[replace(call, results=tuple(copies[id(one)] for one in call.results)) for call in calls],
    )
