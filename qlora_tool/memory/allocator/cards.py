"""Known graphics cards: how much memory CUDA sees on each, and how fast it is. For `--device-memory rtx-4090`.

What CUDA sees (`torch.cuda.get_device_properties(0).total_memory`) is less than a card is sold with: the driver keeps
some, and where ECC is on, it takes a sixteenth of GDDR memory. The readings below are the lowest that was found in
public logs from Linux, with drivers of 2024 or later where there were such; earlier drivers leave 100 to 200 MiB more,
Windows leaves nearly all. Data-centre cards with GDDR memory (T4, L4, L40S, A10, A10G, A40) were read with ECC on.
RTX cards for workstations were read with ECC off; on, it takes 3 GiB of 48.

Speeds are those of the data sheets: dense tensor operations on fp16 or bf16 with fp32 sums (of the P100, which has no
tensor cores, plain fp16); where SXM and PCIe share a row, the lower bandwidth. A laptop's speeds depend on the power
that its maker gives the card, and are not in the table.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from qlora_tool.config import parse_size
from qlora_tool.errors import OptionError, UserError, meant_size

GB = 10**9
MIB = 2**20
GIB = 2**30


@dataclass(frozen=True)
class Card:
    """One model of card.

    Attributes:
        name: as it is given to `--device-memory`.
        nominal_gib: GiB of memory that it is sold with.
        total_bytes: bytes that CUDA sees.
        estimated: whether `total_bytes` comes from `estimate_total`, for want of a reading.
        compute_capability: e.g. (8, 9).
        tensor_tflops: dense TFLOP/s on fp16 (and bf16, where it has that); None if it depends on the maker.
        bandwidth: GB/s (10^9 bytes) between the chip and its memory; None as above.
        multiprocessors: how many; None below compute capability 8.0.
    """

    name: str
    nominal_gib: int
    total_bytes: int
    estimated: bool
    compute_capability: tuple[int, int]
    tensor_tflops: float | None
    bandwidth: float | None
    multiprocessors: int | None

    @property
    def bf16(self) -> bool:
        """Whether the card computes in bfloat16."""
        return self.compute_capability >= (8, 0)


@dataclass(frozen=True)
class Budget:
    """How much memory a plan may count on.

    Attributes:
        bytes: all that CUDA sees of the device, its own context (430 to 905 MB) included.
        name: what was asked for, in words.
        estimated: whether what the driver keeps was estimated.
    """

    bytes: int
    name: str
    estimated: bool


def estimate_total(nominal_gib: int) -> int:
    """The bytes that CUDA may be counted on to see of a card with `nominal_gib` GiB, without ECC.

    4 % are taken off, and at least 448 MiB: more than any card without ECC in the table has lost (at most 5.4 % of
    8 GiB, 3.9 % of 11 GiB, 3.7 % of 12 GiB, 3.5 % of 16 GiB and 2.0 % of 24 and 32 GiB).
    """
    kept = max(nominal_gib * GIB * 4 // 100, 448 * MIB)
    return nominal_gib * GIB - kept


# Name, GiB, MiB that CUDA sees (None: no reading), compute capability, TFLOP/s, GB/s, multiprocessors (of those that
# flash attention runs on). Where one name was sold with several sizes, each is found as NAME-SIZEgb.
_TABLE: tuple[tuple[str, int, int | None, tuple[int, int], float | None, float | None, int | None], ...] = (
    # GeForce 20 (Turing)
    ("rtx-2060", 6, 5918, (7, 5), 25.8, 336, None),
    ("rtx-2060", 12, 11833, (7, 5), 28.7, 336, None),
    ("rtx-2060-super", 8, None, (7, 5), 28.7, 448, None),
    ("rtx-2070", 8, None, (7, 5), 29.9, 448, None),
    ("rtx-2070-super", 8, None, (7, 5), 36.3, 448, None),
    ("rtx-2080", 8, None, (7, 5), 40.3, 448, None),
    ("rtx-2080-super", 8, None, (7, 5), 44.6, 496, None),
    ("rtx-2080-ti", 11, 10825, (7, 5), 53.8, 616, None),
    # GeForce 30 (Ampere)
    ("rtx-3050", 6, 5803, (8, 6), 13.5, 168, 18),
    ("rtx-3050", 8, None, (8, 6), 18.2, 224, 20),
    ("rtx-3060", 12, 11910, (8, 6), 25.5, 360, 28),
    ("rtx-3060-ti", 8, None, (8, 6), 32.4, 448, 38),
    ("rtx-3070", 8, 7753, (8, 6), 40.6, 448, 46),
    ("rtx-3070-ti", 8, 7840, (8, 6), 43.5, 608, 48),
    ("rtx-3080", 10, 10002, (8, 6), 59.5, 760, 68),
    ("rtx-3080", 12, None, (8, 6), 61.3, 912, 70),
    ("rtx-3080-ti", 12, 11910, (8, 6), 68.2, 912, 80),
    ("rtx-3090", 24, 24123, (8, 6), 71.2, 936, 82),
    ("rtx-3090-ti", 24, 24110, (8, 6), 80.0, 1008, 84),
    # GeForce 40 (Ada)
    ("rtx-4060", 8, 7807, (8, 9), 30.2, 272, 24),
    ("rtx-4060-ti", 8, 7806, (8, 9), 44.1, 288, 34),
    ("rtx-4060-ti", 16, None, (8, 9), 44.1, 288, 34),
    ("rtx-4070", 12, 11866, (8, 9), 58.3, 504, 46),
    ("rtx-4070-super", 12, None, (8, 9), 71.0, 504, 56),
    ("rtx-4070-ti", 12, None, (8, 9), 80.2, 504, 60),
    ("rtx-4070-ti-super", 16, 15934, (8, 9), 88.2, 672, 66),
    ("rtx-4080", 16, None, (8, 9), 97.5, 717, 76),
    ("rtx-4080-super", 16, 15944, (8, 9), 104.4, 736, 80),
    ("rtx-4090", 24, 24081, (8, 9), 165.2, 1008, 128),
    # GeForce 50 (Blackwell)
    ("rtx-5060", 8, None, (12, 0), 38.4, 448, 30),
    ("rtx-5060-ti", 8, None, (12, 0), 47.4, 448, 36),
    ("rtx-5060-ti", 16, 15825, (12, 0), 47.4, 448, 36),
    ("rtx-5070", 12, None, (12, 0), 61.7, 672, 48),
    ("rtx-5070-ti", 16, 15808, (12, 0), 87.9, 896, 70),
    ("rtx-5080", 16, 15840, (12, 0), 112.6, 960, 84),
    ("rtx-5090", 32, 32102, (12, 0), 209.5, 1792, 170),
    # GeForce for laptops
    ("rtx-2060-laptop", 6, None, (7, 5), None, None, None),
    ("rtx-2070-laptop", 8, None, (7, 5), None, None, None),
    ("rtx-2080-laptop", 8, None, (7, 5), None, None, None),
    ("rtx-3050-laptop", 4, None, (8, 6), None, None, 16),
    ("rtx-3050-laptop", 6, 5806, (8, 6), None, None, 20),
    ("rtx-3060-laptop", 6, None, (8, 6), None, None, 30),
    ("rtx-3070-laptop", 8, None, (8, 6), None, None, 40),
    ("rtx-3070-ti-laptop", 8, 7850, (8, 6), None, None, 46),
    ("rtx-3080-laptop", 8, None, (8, 6), None, None, 48),
    ("rtx-3080-laptop", 16, None, (8, 6), None, None, 48),
    ("rtx-3080-ti-laptop", 16, None, (8, 6), None, None, 58),
    ("rtx-4050-laptop", 6, None, (8, 9), None, None, 20),
    ("rtx-4060-laptop", 8, 7815, (8, 9), None, None, 24),
    ("rtx-4070-laptop", 8, None, (8, 9), None, None, 36),
    ("rtx-4080-laptop", 12, None, (8, 9), None, None, 58),
    ("rtx-4090-laptop", 16, None, (8, 9), None, None, 76),
    ("rtx-5060-laptop", 8, None, (12, 0), None, None, 26),
    ("rtx-5070-laptop", 8, None, (12, 0), None, None, 36),
    ("rtx-5070-ti-laptop", 12, None, (12, 0), None, None, 46),
    ("rtx-5080-laptop", 16, None, (12, 0), None, None, 60),
    ("rtx-5090-laptop", 24, None, (12, 0), None, None, 82),
    # Workstations
    ("rtx-a4000", 16, None, (8, 6), 76.7, 448, 48),
    ("rtx-a5000", 24, 24114, (8, 6), 111.1, 768, 64),
    ("rtx-a6000", 48, 48537, (8, 6), 154.8, 768, 84),
    ("rtx-6000-ada", 48, 48520, (8, 9), 364.2, 960, 142),
    ("rtx-pro-6000", 96, 97247, (12, 0), 503.8, 1792, 188),
    # Data centres
    ("p100", 16, 16269, (6, 0), 18.7, 732, None),
    ("v100", 16, 16130, (7, 0), 125, 900, None),
    ("v100", 32, 32494, (7, 0), 125, 900, None),
    ("t4", 16, 14912, (7, 5), 65, 320, None),
    ("a10", 24, 22731, (8, 6), 125, 600, 72),
    ("a10g", 24, 22587, (8, 6), 70, 600, 80),
    ("a40", 48, 45416, (8, 6), 149.7, 696, 84),
    ("a100", 40, 40326, (8, 0), 312, 1555, 108),
    ("a100", 80, 81038, (8, 0), 312, 1935, 108),
    ("l4", 24, 22563, (8, 9), 121, 300, 58),
    ("l40s", 48, 45467, (8, 9), 362, 864, 142),
    ("h100", 80, 81081, (9, 0), 989.4, 3350, 132),
    ("h100-pcie", 80, 81008, (9, 0), 756, 2000, 114),
    ("h100-nvl", 94, 95320, (9, 0), 835, 3938, 132),
    ("h200", 141, 143156, (9, 0), 989.4, 4800, 132),
)

# What NVIDIA's and PyTorch's names have besides: "NVIDIA GeForce RTX 4090", "NVIDIA A100-SXM4-80GB".
_NOISE = {"nvidia", "geforce", "tesla", "generation", "gpu", "edition", "workstation", "server", "blackwell", "hbm3"}
_NOISE |= {"max", "q", "hbm2", "hbm2e", "hbm3e", "sxm", "sxm2", "sxm3", "sxm4", "sxm5", "pcie"}


def _cards() -> tuple[Card, ...]:
    names = [row[0] for row in _TABLE]
    cards = []
    for name, gib, mib, capability, tflops, bandwidth, multiprocessors in _TABLE:
        full_name = f"{name}-{gib}gb" if names.count(name) > 1 else name
        total = estimate_total(gib) if mib is None else mib * MIB
        cards.append(Card(full_name, gib, total, mib is None, capability, tflops, bandwidth,
                          multiprocessors))  # fmt: skip
    return tuple(cards)


CARDS = _cards()


def most_multiprocessors(capability: tuple[int, int]) -> int:
    """Of the cards of a compute capability (or, if none is known, of any), the most multiprocessors."""
    known = [(card.compute_capability == capability, card.multiprocessors or 0) for card in CARDS]
    return max(count for of_it, count in known if of_it or not any(it for it, _ in known))


def find_card(name: str) -> Card:
    """The card of a name, in any spelling: `rtx-4090`, `RTX 4090`, `4090`, `NVIDIA GeForce RTX 4090`.

    Raises:
        UserError: there is none in the table (the closest names are given), or several with different memory.
    """
    found = next((_BY_KEY[key] for key in _keys(name) if key in _BY_KEY), [])
    if len(found) == 1:
        return found[0]
    if found:
        sizes = " and ".join(f"{card.nominal_gib} GB" for card in found)
        raise UserError(f"the card '{name}' exists with {sizes}: write {' or '.join(card.name for card in found)}")
    close = dict.fromkeys(
        card.name
        for key in difflib.get_close_matches(_keys(name)[-1], _BY_KEY, n=8, cutoff=0.5)
        for card in _BY_KEY[key]
    )
    hint = f"write one that is, such as {', '.join(list(close)[:4])}, or " if close else ""
    raise UserError(f"the card '{name}' is not in the table of cards; {hint}give its memory, such as 24GB or 22GiB")


_OTHER_MAKERS = re.compile(
    r"(amd|radeon|instinct|rx[ -]?\d|mi\d{2,3}|apple|m\d([ -]?(pro|max|ultra))?$|intel|arc\b)", re.IGNORECASE
)


def parse_device_memory(text: str, device: str = "cuda") -> Budget:
    """What `--device-memory` means: a card by name, or a size.

    A whole number of GB is what a card is sold with: `24GB` is 24 GiB less what a driver keeps (`estimate_total`). All
    other sizes, and all for a CPU, are exact: `22GiB` is 22 * 2^30 bytes, `23.5GB` is 23.5 * 10^9, `24081MiB`, or a
    number of bytes.

    Args:
        device: cuda or cpu.

    Raises:
        UserError: it is neither.
    """
    text = text.strip()
    if re.fullmatch(r"-.*|0+(\.0+)?\s*([KMGT]?i?B)?", text, re.IGNORECASE):
        raise UserError(f"expected a size above 0, such as 24GB, or a card such as rtx-4090, found '{text}'")
    if device != "cpu" and (sold := re.fullmatch(r"(\d+)\s*GB", text, re.IGNORECASE)):
        gib = int(sold[1])
        return Budget(estimate_total(gib), f"a card of {gib} GB", True)
    # Digits alone are bytes, but for short ones: 4090 is a card.
    if re.fullmatch(r"\d+(\.\d+)?\s*([KMGT]i?B|B)|\d{6,}", text, re.IGNORECASE):
        return Budget(parse_size(text), text, False)
    if _OTHER_MAKERS.match(text):
        raise UserError(
            f"'{text}' is not one of NVIDIA's cards, and only those are supported; elsewhere runs are on the CPU: give "
            "--device cpu"
        )
    try:
        card = find_card(text)
    except UserError:
        if meant := meant_size(text):
            raise UserError(f"'{text}' is neither a size nor a card such as rtx-4090{meant}") from None
        raise
    return Budget(card.total_bytes, card.name, card.estimated)


def named_budget(given: str | int | None, device: str) -> Budget | None:
    """What `--device-memory` was given, for a prediction for `device` (cuda or cpu); None where it was not given.

    Raises:
        UserError: see `parse_device_memory`; or a card is named, and the prediction is for a CPU.
    """
    named = f"{given}B" if isinstance(given, int) else given
    budget = parse_device_memory(named, device) if named else None
    if device == "cpu" and budget is not None and budget.name in {card.name for card in CARDS}:
        raise OptionError(
            f"--device-memory {budget.name}: a card, but the prediction is for a CPU; give --device cuda, or a size "
            "such as 16GiB"
        )
    return budget


def _keys(name: str) -> list[str]:
    """The ways in which a name may stand in the table, the fullest first: without signs, without noise."""
    words = re.findall(r"[a-z0-9]+", name.lower().replace("mobile", "laptop"))
    plain = [word for word in words if word not in _NOISE]
    return list(dict.fromkeys(["".join(words), "".join(word for word in words if word != "nvidia"), "".join(plain)]))


def _by_key() -> dict[str, list[Card]]:
    """The cards under every key: with and without `rtx`, with and without the memory that they are sold with."""
    keys: dict[str, list[Card]] = {}
    for card, row in zip(CARDS, _TABLE, strict=True):
        name = row[0].replace("-", "")
        for start in {name, name.removeprefix("rtx")}:
            for key in (start, f"{start}{card.nominal_gib}gb"):
                keys.setdefault(key, []).append(card)
    return keys


_BY_KEY = _by_key()
