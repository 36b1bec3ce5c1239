"""How the tokens of an answer are chosen."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_tool.errors import OptionError, UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedily unless a temperature is given.

    Attributes:
        max_new_tokens: of an answer at most.
        temperature: 0 is greedy.
        top_p, top_k: what sampling is restricted to; 1.0 and 0 restrict nothing.
        seed: of the sampling.
        batch_size: prompts at a time.

    Raises:
        UserError: a value that is out of range, or a restriction or a seed of sampling where nothing is sampled.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        faults = [
            f"--{name.replace('_', '-')}: expected at least {least}, found {getattr(self, name)}"
            for name, least in {"max_new_tokens": 1, "temperature": 0, "top_k": 0, "batch_size": 1}.items()
            if getattr(self, name) < least
        ]
        if not 0 <= self.top_p <= 1:
            faults.append(f"--top-p: expected a number from 0 to 1, found {self.top_p}")
        if faults:
            raise UserError(faults)
        if not self.temperature and (self.top_p < 1 or self.top_k):
            raise OptionError("--top-p and --top-k restrict sampling, and --temperature 0 takes no samples; raise it")
        if not self.temperature and self.seed:
            raise OptionError("--seed is of sampling, and --temperature 0 takes no samples; raise that")

    def arguments(self) -> dict[str, object]:
        """As `generate` of transformers takes them."""
        if not self.temperature:
            # Spelled out, so that a model's own sampling defaults do not linger and warn.
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
