"""The two-buffer schedule on clocks, against times worked out by hand."""

from __future__ import annotations

import pytest

from qlora_tool.weights.schedule import Schedule, Seconds, simulate


class Written:
    """A `Copier` that writes down what it is told."""

    def __init__(self):
        self.told = []

    def used(self, buffer):
        self.told.append(("used", buffer))

    def copy(self, part, buffer):
        self.told.append(("copy", part, buffer))

    def ready(self, buffer):
        self.told.append(("ready", buffer))


def test_what_is_said_in_a_pass_of_three_parts():
    copier = Written()
    schedule = Schedule(3, copier)
    forward = [schedule.ask(part, backward=False) for part in (0, 0, 1, 2)]
    assert copier.told == [
        ("copy", 0, 1), ("ready", 1), ("copy", 1, 0),  # 0, and 1 behind it
        ("used", 1), ("ready", 0), ("copy", 2, 1),  # 1, and 2 over 0
        ("used", 0), ("ready", 1),  # 2
    ]  # fmt: skip
    assert forward == [1, 1, 0, 1]
    copier.told.clear()
    backward = [schedule.ask(part, backward=True) for part in (2, 1, 0)]
    assert copier.told == [("used", 1), ("ready", 0), ("copy", 0, 1), ("used", 0), ("ready", 1)]
    assert backward == [1, 0, 1]


@pytest.mark.parametrize(("copy", "seconds"), [
    (1.0, 4 * (2 + 4)),  # always hidden: computing alone
    # Forward 2 a layer, backward 4 a layer. Of a pass, 0 and 1 are held; 2 is asked for once 1 is begun, at 2, and is
    # there at 2 + c; 3 once 2 is begun. With c = 2 it is there just in time, in forward and (with 4) in backward.
    (2.0, 4 * (2 + 4)),
    # c = 3: 2 comes from 2 to 5, computes to 7; 3 from 5 to 8, to 10. Backward: 3 to 14; 2 is held, to 18, while 1
    # comes from 14 to 17; 0 from 18 to 21, 1 to 22, 0 to 26.
    (3.0, 26.0),
    # c = 10: 2 from 2 to 12, to 14; 3 from 12 to 22, to 24. 3 backward to 28; 2 to 32; 1 from 28 to 38, to 42; 0 from
    # 38 to 48, to 52: four copies, 40 s, of which 2 at the beginning, and of 24 to 28, nothing is copied, and 4 are
    # computed after the last one.
    (10.0, 52.0),
])  # fmt: skip
def test_a_step_of_four_layers(copy, seconds):
    found = simulate([Seconds(copy, 2.0, 4.0)] * 4)
    assert found.seconds == pytest.approx(seconds)
    assert found.waited == pytest.approx(seconds - 24)
    assert found.copies == 4  # two in forward, two in backward


@pytest.mark.parametrize("copy", [0.5, 1.0, 2.0, 3.0, 8.0])
def test_many_layers_take_the_longer_of_both(copy):
    """Of 80 layers 78 are copied in each pass: forward takes 80 s or the copies, backward 240 s or the copies; at the
    turns of the passes two copies and two layers at most overlap with nothing."""
    found = simulate([Seconds(copy, 1.0, 3.0)] * 80)
    bound = max(80.0, 78 * copy) + max(240.0, 78 * copy)
    assert bound <= found.seconds <= bound + 2 * (copy + 4) and found.copies == 2 * 78


def test_layers_that_stay_hide_copies():
    """What computes before the first layer and at the loss gives copies time; two passes are twice one."""
    layers = [Seconds(3.0, 2.0, 4.0)] * 4
    assert simulate(layers, between=1.0).seconds == pytest.approx(27.0)
    assert simulate(layers, passes=2, before=5.0).seconds == pytest.approx(2 * (26.0 + 5.0))
    assert simulate([Seconds(100.0, 1.0, 2.0)] * 2).waited == 0  # two parts are never moved again


@pytest.mark.parametrize(("gigabytes_a_second", "tokens_a_second"), [(26.0, 240.9), (6.0, 238.0), (4.15, 207.2)])
def test_llama_2_70b_on_a_card_like_the_rtx_4090(gigabytes_a_second, tokens_a_second):
    """2 x 2048 tokens, 17 s of computing, a third of it in the forward pass, and 78 of 80 layers, of 35.3 GB in all,
    copied in each pass: 4096 / 17 = 240.9 tokens/s where copies are hidden. A pass has its own bound: at 4.15 GB/s
    copies of 8.3 s decide forward (5.7 s computed), and computing decides backward, so that a step takes longer than
    either of its sums."""
    copy, computed = 35.3 / gigabytes_a_second / 80, 17.0 / 80
    found = simulate([Seconds(copy, computed / 3, computed * 2 / 3)] * 80)
    passes = max(17.0 / 3, 78 * copy) + max(17.0 * 2 / 3, 78 * copy)
    assert passes * (1 - 1e-12) <= found.seconds <= 1.03 * passes
    assert 4096 / found.seconds == pytest.approx(tokens_a_second, abs=0.1)
