"""Whether a run learned anything: its losses before the first step and after the last, on the same rows.

The training rows are those of the first steps, as many passes as have `SAMPLED_TOKENS` tokens, so that they fit where a
step does. Dropout is off and nothing random is drawn: the steps stay those of a run that nobody looks at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_tool.adapters.attach import AdapterSet
from qlora_tool.data.batches import Batch
from qlora_tool.model.causal_lm import CausalLM

SAMPLED_TOKENS = 2048
DIVERGED = 1.05  # times the loss before the first step; a rate that is too low, or few steps, raise it less


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        learned: whether the adapter changes anything and the loss on training rows fell.
        warnings: what to say where not, and where an evaluation loss did not fall, in sentences.
    """

    learned: bool
    warnings: tuple[str, ...]


@torch.no_grad()
def sampled_loss(model: CausalLM, batches: Iterable[Batch]) -> float:
    """The mean loss over the trained tokens of the first batches, of as many as have `SAMPLED_TOKENS` tokens."""
    training = model.module.training
    model.module.eval()
    total, trained, seen = 0.0, 0, 0
    for batch in batches:
        total += float(model.loss_sum(batch.to(model.device)))
        trained += batch.trained_tokens
        seen += batch.tokens
        if seen >= SAMPLED_TOKENS:
            break
    model.module.train(training)
    return total / trained


def judge(
    adapters: AdapterSet, before: Mapping[str, float] | None, after: Mapping[str, float], again: Callable[[], float]
) -> Outcome:
    """What came of a run.

    Args:
        adapters: as they were saved.
        before: losses before the first step: `loss` on training rows, and those of evaluations by their names in
            `metrics.jsonl`; None where that is not known, in a run that an earlier version began.
        after: those of evaluations, of the adapter that is saved.
        again: `loss` on the same training rows with that adapter.
    """
    zero, others = _zero_updates(adapters)
    so = "as it started" if any(name.endswith(".start_B") for name in adapters.tensors()) else "0"
    if zero and not others:
        all_of = f"all {len(zero)} adapters" if len(zero) > 1 else "the one adapter"
        return Outcome(False, (
            f"nothing was learned: B is {so} in {all_of}, so that the model is the untuned one; raise "
            "training.learning_rate or the number of steps",
        ))  # fmt: skip
    warnings = []
    if zero:
        warnings.append(
            f"{zero[0]}{f' and {len(zero) - 1} more' if len(zero) > 1 else ''}: no step reached these adapters, and "
            f"their B is {so}: the model's code takes the weight without calling the module, or no token came by; "
            "leave them out with adapter.target_modules"
        )
    if before is None:
        return Outcome(True, tuple(warnings))
    loss = again()
    if not loss < before["loss"]:
        rose = not loss <= DIVERGED * before["loss"]
        warnings.append(
            f"nothing was learned: the loss on training rows is {loss:.4f}, not below the {before['loss']:.4f} before "
            "the first step" + (": training.learning_rate is too high; divide it by five" if rose else
                                "; change training.learning_rate, or train for longer")
        )  # fmt: skip
        return Outcome(False, tuple(warnings))  # nothing was learned that could carry over
    names = [name for name in after if name in before]
    for name in names if len(names) == 1 else [name for name in names if name != "eval_loss"]:  # the first set's again
        if not after[name] < before[name]:
            warnings.append(
                f"{name} is {after[name]:.4f}, not below the {before[name]:.4f} before the first step: what was "
                "learned does not carry over to the evaluation rows; train for less long, on more rows, or keep the "
                "best step with training.eval_steps and training.load_best_model_at_end"
            )
    return Outcome(True, tuple(warnings))


def _zero_updates(adapters: AdapterSet) -> tuple[list[str], bool]:
    """The modules whose LoRA's B is as it started, mostly zero, and whether anything else is trained."""
    tensors = adapters.tensors()
    found = {name.partition(".lora_B.")[0]: tensor for name, tensor in tensors.items() if ".lora_B." in f".{name}."}
    zero = [module for module, lora_B in found.items() if _is_as_it_started(module, lora_B, tensors)]
    others = adapters.saved or adapters.biases or any("magnitude" in name for name in tensors)
    return zero, bool(others) or len(zero) < len(found)


def _is_as_it_started(module: str, lora_B: Tensor, tensors: Mapping[str, Tensor]) -> bool:
    start_B = tensors.get(f"{module}.start_B")
    return not bool(lora_B.any()) if start_B is None else torch.equal(lora_B, start_B)
