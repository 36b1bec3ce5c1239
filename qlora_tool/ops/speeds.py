"""How fast this CPU's matrix products are, measured once in a while and cached.

Two things are decided by it: which library takes fp32 products, and whether bf16 products are the faster ones
(`ops/precision.py`). The libraries take turns, product by product, so that whatever else the machine does meanwhile
slows all of them; the choice follows the median of the ratios of neighbours. A machine that was busy is noticed by the
processor time that the threads got, or by ratios that lie far apart: it is then measured again at once, and where that
does not help soon after, and the earlier choice stays.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_tool.files.cache import cache_folder
from qlora_tool.ops.measured import check_date, expired, read_measured, today, write_measured

PYTORCH, ONEDNN = "PyTorch", "oneDNN"
FLOAT32, FLOAT32_ONEDNN, BFLOAT16 = "float32", "float32 oneDNN", "bfloat16"  # fp16 is never faster on a CPU
SHAPES = ((256, 576, 1536), (1024, 576, 576), (512, 2048, 2048), (256, 1024, 4096))  # (tokens, in, out)

FASTER_BY, SLOWER_BELOW = 1.15, 1.05  # between the two the earlier choice stays, or else PyTorch's products
SECONDS, ROUNDS = 0.4, 5  # of products by each library, at least
LONGEST = 2.5  # seconds after which a measurement ends before that
ATTEMPTS = 2
BUSY_BELOW = 0.75  # of the processor time that all threads could have had
SPREAD_ABOVE = 0.3  # of the middle half of the ratios, relative to their median
TRAINING_BELOW = 0.6  # of the slowest shape's speed: training then disagrees


@dataclass(frozen=True)
class Speeds:
    """What was measured.

    Attributes:
        date: when, ISO 8601 in UTC.
        threads: that products ran on.
        gflops: over all of SHAPES, by FLOAT32, FLOAT32_ONEDNN (0 where there is none) and BFLOAT16.
        slowest: the same of the shape with the lowest speed.
        ratio: of fp32 products' time by PyTorch to that by oneDNN, the median of neighbours; 0 without oneDNN.
        spread: what the middle half of the ratios spans, relative to `ratio`.
        processor_share: of the processor time that the threads could have had.
        choice: the library of fp32 products.
        in_training: GFLOP/s that a run later saw, where they were far less; 0 where not.
    """

    date: str
    threads: int
    gflops: dict[str, float]
    slowest: dict[str, float]
    ratio: float
    spread: float
    processor_share: float
    choice: str = PYTORCH
    in_training: float = 0.0

    @property
    def doubtful(self) -> bool:
        """Whether the machine had other things to do."""
        return self.processor_share < BUSY_BELOW or self.spread > SPREAD_ABOVE

    @property
    def expired(self) -> bool:
        return self.in_training > 0 or expired(self.date, self.doubtful)

    def choose(self, earlier: Speeds | None) -> Speeds:
        """The same with its choice made."""
        if earlier is not None and self.doubtful:
            choice = earlier.choice
        elif self.ratio >= FASTER_BY or (self.ratio >= SLOWER_BELOW and earlier and earlier.choice == ONEDNN):
            choice = ONEDNN
        else:
            choice = PYTORCH
        return replace(self, choice=choice)

    @classmethod
    def from_json(cls, data: Any) -> Speeds:
        """
        Raises:
            ValueError, KeyError, TypeError: it is none.
        """
        found = cls(**data)
        check_date(found.date)
        names = (FLOAT32, FLOAT32_ONEDNN, BFLOAT16)
        figures = [*(found.gflops[name] for name in names), *(found.slowest[name] for name in names),
                   found.ratio, found.spread, found.processor_share, found.in_training]  # fmt: skip
        if found.choice not in (PYTORCH, ONEDNN) or not all(isinstance(figure, (int, float)) for figure in figures):
            raise ValueError("no measurement of products")
        return found


def known_speeds() -> Speeds:
    """What was measured on this processor with this PyTorch and as many threads; measured now where that is too old,
    doubtful, at odds with what training saw, or not there."""
    found = read_measured(_file(), Speeds.from_json).get(_machine())
    return found if found is not None and not found.expired else measure_anew()


def measure_anew() -> Speeds:
    """Measure now, and cache it in the place of what was measured earlier."""
    attempts: list[Speeds] = []
    while len(attempts) < ATTEMPTS and not (attempts and not attempts[-1].doubtful):
        attempts.append(measure())
    least_disturbed = max(attempts, key=lambda found: (not found.doubtful, found.processor_share - found.spread))
    cached = read_measured(_file(), Speeds.from_json)
    found = least_disturbed.choose(cached.get(_machine()))
    write_measured(_file(), cached | {_machine(): found})
    return found


def compare_with_training(choice: str, gflops: float) -> None:
    """Note the speed that a run's own fp32 products had by a library: where it is far below what was measured, the
    next process measures again."""
    cached = read_measured(_file(), Speeds.from_json)
    found = cached.get(_machine())
    if found is not None and gflops < TRAINING_BELOW * found.slowest[FLOAT32_ONEDNN if choice == ONEDNN else FLOAT32]:
        write_measured(_file(), cached | {_machine(): replace(found, in_training=gflops)})


def _file() -> Path:
    return cache_folder() / "products.json"


def _machine() -> str:
    """What a measurement holds for: a home folder may be shared by several machines."""
    return f"{processor_kind()}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def processor_kind() -> str:
    """The processor's kind, by what products depend on."""
    return " ".join([platform.machine(), torch.backends.cpu.get_cpu_capability(), *bf16_instructions()])


def bf16_instructions() -> list[str]:
    """Those that Linux lists; PyTorch's own name, such as AVX512, is the same with and without them."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return []
    return sorted(words & {"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16", "svebf16"})


# ------------------------------------------------------------------------------------------------------ measuring


def has_onednn() -> bool:
    """Whether this PyTorch can be asked for oneDNN's products."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_matmul(left: Tensor, right: Tensor) -> Tensor:
    """(n, k) · (k, m) → (n, m) by oneDNN, fp32 on a CPU."""
    return torch.ops.mkldnn._linear_pointwise(left, right.T, None, "none", [], "")


@dataclass
class _Contestant:
    """One way to multiply, and the seconds that it took: by shape, round after round."""

    product: Callable[[Tensor, Tensor], Tensor]
    dtype: torch.dtype
    seconds: dict[tuple[int, int, int], list[float]] = field(default_factory=lambda: {shape: [] for shape in SHAPES})
    _matrices: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def run(self, shape: tuple[int, int, int]) -> float:
        """Seconds of one product."""
        if shape not in self._matrices:
            tokens, inner, outer = shape
            weight = torch.ones(outer, inner, dtype=self.dtype)
            self._matrices[shape] = torch.ones(tokens, inner, dtype=self.dtype), weight.T
        start = time.perf_counter()
        self.product(*self._matrices[shape])
        return time.perf_counter() - start

    @property
    def total(self) -> float:
        return sum(map(sum, self.seconds.values()))

    def gflops(self) -> list[float]:
        """By shape, of the median; and over all shapes."""
        medians = {shape: statistics.median(seconds) for shape, seconds in self.seconds.items()}
        work = {shape: 2e-9 * shape[0] * shape[1] * shape[2] for shape in SHAPES}
        return [*(work[shape] / medians[shape] for shape in SHAPES), sum(work.values()) / sum(medians.values())]


def measure() -> Speeds:
    """Products of SHAPES by each library in turn, one or two seconds in all."""
    contestants = {FLOAT32: _Contestant(torch.mm, torch.float32)}
    if has_onednn():
        contestants[FLOAT32_ONEDNN] = _Contestant(onednn_matmul, torch.float32)
    emulated = _emulated_bf16()
    if not emulated:
        contestants[BFLOAT16] = _Contestant(torch.mm, torch.bfloat16)
    for shape in SHAPES:  # the first product of a kind prepares
        for contestant in contestants.values():
            contestant.run(shape)
    begin, processor, rounds = time.perf_counter(), time.process_time(), 0
    while rounds < 3 or (
        (rounds < ROUNDS or min(one.total for one in contestants.values()) < SECONDS)
        and time.perf_counter() - begin < LONGEST
    ):
        for shape in SHAPES:
            for contestant in contestants.values():
                contestant.seconds[shape].append(contestant.run(shape))
        rounds += 1
    share = (time.process_time() - processor) / (time.perf_counter() - begin) / torch.get_num_threads()
    figures = {name: contestant.gflops() for name, contestant in contestants.items()}
    figures.setdefault(FLOAT32_ONEDNN, [0.0])
    figures.setdefault(BFLOAT16, [emulated])
    ratio, spread = _ratio(contestants[FLOAT32], contestants.get(FLOAT32_ONEDNN))
    return Speeds(
        today(), torch.get_num_threads(),
        {name: found[-1] for name, found in figures.items()}, {name: min(found) for name, found in figures.items()},
        ratio, spread, share,
    )  # fmt: skip


def _emulated_bf16() -> float:
    """GFLOP/s of a small bf16 product where the processor emulates them, hundreds of times slower; 0 where not."""
    shape = (128, 512, 512)
    both = [_Contestant(torch.mm, dtype) for dtype in (torch.float32, torch.bfloat16)]
    fast, slow = (min(one.run(shape) for _ in range(3)) for one in both)
    return 2e-9 * shape[0] * shape[1] * shape[2] / slow if slow > 10 * fast else 0.0


def _ratio(pytorch: _Contestant, onednn: _Contestant | None) -> tuple[float, float]:
    """The median of the ratios of neighbouring products' times, and the span of their middle half relative to it."""
    if onednn is None:
        return 0.0, 0.0
    medians, spans = [], []
    for shape in SHAPES:
        ratios = [one / other for one, other in zip(pytorch.seconds[shape], onednn.seconds[shape], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        medians.append(middle)
        spans.append((high - low) / middle)
    return statistics.median(medians), statistics.median(spans)
