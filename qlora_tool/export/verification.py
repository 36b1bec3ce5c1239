"""What verification finds: figures, how they are told, and what is bad about them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from qlora_tool.export.types import BITSANDBYTES, GGUF_TYPES
from qlora_tool.export.verify import Agreement
from qlora_tool.sizes import counted, noun_of
from qlora_tool.weights.quantized import KINDS

MEAN_KL = 1e-3  # from here on a mean KL is a warning: seven times what bf16's rounding gives (docs/measurements/cpu.md)
ARGMAX_AGREEMENT = 0.95  # below it
UPDATE_ERROR = 0.5  # from here on: the rounding is half as large as the update
GAIN_KEPT = 0.9  # of what training gained; below it


@dataclass(frozen=True)
class Update:
    """What the files hold of the update Δ of the adapted weights W₀, all of them together.

    Attributes:
        kept: ⟨W − W₀, Δ⟩ / ‖Δ‖², W being the files'.
        error: ‖W − (W₀ + Δ)‖ / ‖Δ‖. Near 1 means that the update drowns in it.
    """

    kept: float
    error: float

    def __str__(self) -> str:
        size = f"{self.error:.2g} times" if self.error >= 1 else f"{self.error * 100:.2g}% of"
        return f"{self.kept:.2%}, with a rounding error of {size} its size"


@dataclass(frozen=True)
class Proof:
    """How the files compare with the live quantized base with its adapter; or why that was not measured.

    Attributes:
        base, dtype: of the files.
        rows: what both models were shown.
        agreement, update: the figures; None where there are none.
        left_out: why verification was left out, else None. `update` may be known all the same.
        failed: whether it was left out because the files could not be run.
        live: what it was held against, in words.
        unquantized: which weights a file of few bits holds as they are, and why, in words.
        finer_base: whether `--base original` would merge onto finer weights than the 4-bit values trained against.
    """

    base: str
    dtype: str
    rows: str | None = None
    agreement: Agreement | None = None
    update: Update | None = None
    left_out: str | None = None
    failed: bool = False
    finer_base: bool = False
    unquantized: str | None = None
    live: str = "the trained model (quantized base with its adapter)"

    def as_dict(self) -> dict[str, Any]:
        """For JSON; figures in four digits, which do not change from one run to the next."""
        figures: dict[str, Any] = {"left_out": self.left_out}
        if self.agreement:
            found = asdict(self.agreement) | {"gain_kept": self.agreement.gain_kept}
            figures |= {"rows": self.rows, **{key: _rounded(value) for key, value in found.items()}}
        if self.agreement or self.update:
            update = {key: _rounded(value) for key, value in asdict(self.update).items()} if self.update else None
            figures |= {"update": update, "warnings": self.warnings()}
        return figures

    def lines(self) -> list[str]:
        """For the terminal."""
        kept = [f"  update kept {self.update}"] if self.update else []
        kept += [f"  not quantized: {self.unquantized}"] if self.unquantized else []
        if self.left_out is not None:
            return [f"not verified: {self.left_out}", *kept]
        found = self.agreement
        lines = [
            f"{'compared with' if self.warnings() else 'verified against'} {self.live} on {found.tokens:,} "
            f"{noun_of(found.tokens, 'token')} of {self.rows}",
            f"  KL divergence {found.mean_kl:.2g} nats on average, {found.worst_kl:.2g} at worst (0: the same); the "
            f"same likeliest token at {found.argmax_agreement:.2%}",
        ]
        losses = [f"{live:.4f} trained, {exported:.4f} exported ({of})" for live, exported, of in self._losses()]
        if losses:
            lines.append(f"  loss {'; '.join(losses)}")
        if found.gain_kept is not None:
            lines.append(f"  of what training gained (loss {found.untuned_loss:.2f} → {found.live_loss:.2f}) the files "
                         f"keep {found.gain_kept:.1%}")  # fmt: skip
        return lines + kept

    def table(self) -> list[tuple[str, str]]:
        """For the model card."""
        facts = []
        if found := self.agreement:
            facts += [
                ("rows", f"{found.tokens:,} {noun_of(found.tokens, 'token')} of {self.rows}"),
                ("KL divergence", f"{found.mean_kl:.2g} nats on average, {found.worst_kl:.2g} at worst"),
                ("same likeliest token", f"{found.argmax_agreement:.2%}"),
                *((f"loss, {of}", f"{live:.4f} trained, {exported:.4f} exported")
                  for live, exported, of in self._losses()),
            ]  # fmt: skip
            if found.gain_kept is not None:
                gained = f"loss {found.untuned_loss:.2f} → {found.live_loss:.2f}"
                facts.append(("kept of what training gained", f"{found.gain_kept:.1%} ({gained})"))
        if self.update:
            facts.append(("update kept", str(self.update)))
        if self.unquantized:
            facts.append(("not quantized", self.unquantized))
        return facts

    def _losses(self) -> list[tuple[float, float, str]]:
        found = self.agreement
        pairs = [(found.live_loss, found.exported_loss, counted(found.trained_tokens, "trained token")),
                 (found.live_loss_all, found.exported_loss_all, "every token")]  # fmt: skip
        return [pair for pair in pairs if pair[0] is not None]

    def warnings(self) -> list[str]:
        """What is bad about the figures, each with the better choice."""
        found, faults = self.agreement, []
        coarse = self.dtype in GGUF_TYPES[:-2] or self.dtype in BITSANDBYTES
        gain = found.gain_kept if coarse and found else None  # what counts first of a coarse rounding
        if gain is not None and not gain >= GAIN_KEPT:
            faults.append(f"of what training gained it keeps {gain:.1%} (below {GAIN_KEPT:.0%})")
        if found and not found.mean_kl <= MEAN_KL:  # no number at all is bad too
            faults.append(f"mean KL {found.mean_kl:.2g} (above {MEAN_KL:g})")
        if found and not found.argmax_agreement >= ARGMAX_AGREEMENT:
            faults.append(f"the same likeliest token at {found.argmax_agreement:.1%} (below {ARGMAX_AGREEMENT:.0%})")
        if self.update and gain is None and not self.update.error <= UPDATE_ERROR:
            faults.append(f"a rounding error of {self.update.error:.2g} times the update's size (above "
                          f"{UPDATE_ERROR:g})")  # fmt: skip
        failed = [self.left_out] if self.failed else []
        if not faults:
            return failed
        found = "the exported model is not quite the one that was trained"
        if gain is not None and gain >= GAIN_KEPT:
            found = f"the exported model keeps {gain:.1%} of what training gained, but is not quite the trained one"
        elif self.update and self.dtype in KINDS:
            found = f"update kept {self.update.kept:.1%} through rounding to {self.dtype} again"
        return [*failed, f"{found}: {', '.join(faults)}; {self._better()}"]

    def _better(self) -> str:
        if self.dtype in GGUF_TYPES[:-1]:
            return f"--gguf-type {GGUF_TYPES[GGUF_TYPES.index(self.dtype) + 1]} is the next finer type"
        if self.dtype in KINDS:
            original = "--base original keeps more of it, " if self.finer_base and self.base == "dequantized" else ""
            return f"{original}--format safetensors keeps all of it"
        if self.base == "original":
            return "--base dequantized merges onto the weights that were trained against"
        if self.dtype == "bfloat16":
            return "--dtype float16 rounds eight times finer, where the values fit; --dtype float32 does not round"
        if self.dtype == "float16":
            return "--dtype float32 does not round"
        return "no other choice would be closer: please report this with the model's family"


def _rounded(value: Any) -> Any:
    """A figure in four digits; None for one that is not a number, which JSON does not have."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.4g}") if math.isfinite(value) else None
