"""Predicted memory of 43 steps against the steps themselves: within 1 % (minutes; --few: seconds).

Each configuration is run three times, with random weights: on fake tensors (the prediction), on real ones with nothing
but the profiler's count of the allocator (the peak that was measured), and on real ones under the tracer (what each
category took). Required: the peak within 1 % in the worst case and 0.1 % in the median, each category within 2 % or 1
MB.

    tools/measure prediction --json memory.json
    tools/measure prediction --few

Experts are predicted for even routing, and measured with it; what random routing takes, and the most that any routing
can, stand beside it. For the llama models `accelerate estimate-memory`'s answer does.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from making.random_model import SHAPES

from measuring.command import add_outputs
from measuring.ours import StepMemory, tokens_per_expert
from measuring.results import passed_or_missed, say, show_table
from measuring.sides import quiet_transformers
from qlora_tool.config import Config, with_values
from qlora_tool.errors import UserError

if TYPE_CHECKING:
    from qlora_tool.memory.breakdown import Breakdown

WORST, MEDIAN = 0.01, 0.001  # of the peak
CATEGORY_SHARE, CATEGORY_BYTES = 0.02, 1_000_000  # of a category: either is enough

_SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8,
          "num_key_value_heads": 4, "vocab_size": 8192, "max_position_embeddings": 512}  # fmt: skip
_GPT2 = {"n_embd": 512, "n_layer": 4, "n_head": 8, "vocab_size": 8192, "n_positions": 512}
_PADDED = {"pad_token_id": 0}  # where the family's own lies beyond this vocabulary
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _SIZES,
    "mistral": _SIZES | {"sliding_window": 128},
    "qwen2": _SIZES,
    "qwen3": _SIZES | {"head_dim": 64},
    "gemma2": _SIZES | {"head_dim": 64, "sliding_window": 128},
    "gemma3_text": _SIZES | {"head_dim": 64, "sliding_window": 128},
    "phi": _SIZES,
    "phi3": _SIZES | _PADDED,
    "gpt2": _GPT2,
    "gpt_neox": _SIZES,
    "falcon": _SIZES | {"new_decoder_architecture": False, "multi_query": True},
    "opt": _SIZES | {"ffn_dim": 1408, "word_embed_proj_dim": 512},
    "bloom": {"hidden_size": 512, "n_layer": 4, "n_head": 8, "vocab_size": 8192},
    "starcoder2": _SIZES,
    "olmo2": _SIZES,
    "cohere2": _SIZES | {"sliding_window": 128},
    "granite": _SIZES,
    "stablelm": _SIZES,
    "glm4": _SIZES | {"head_dim": 64} | _PADDED,
    "smollm3": _SIZES | _PADDED,
    "mixtral": _SIZES | {"num_local_experts": 4},
    "qwen3_moe": _SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "head_dim": 64},
    "gpt_oss": _SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 64, "sliding_window": 128},
    "smollm2-135m": SHAPES["smollm2-135m"],
}  # fmt: skip
"""A small model of every family: its sizes under the names of its configuration."""

EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss")
LLAMAS = ("llama", "smollm2-135m")


@dataclass(frozen=True)
class Case:
    """One configuration: a family, the keys that are not at their defaults, and the size of the batch.

    Attributes:
        examples: of one row, by their lengths, where the row is packed.
        trained: tokens that have a label, where it is not all of them.
    """

    family: str
    rows: int = 2
    length: int = 256
    values: dict[str, Any] = field(default_factory=dict)
    padded: bool = False
    examples: tuple[int, ...] | None = None
    trained: int | None = None
    dtype: str = "float32"

    @property
    def name(self) -> str:
        words = [f"{key.rpartition('.')[2]}={value}" for key, value in self.values.items()
                 if key not in ("model.quantization", "training.gradient_checkpointing")]  # fmt: skip
        words += ["padded"] if self.padded else []
        words += [f"packed {'+'.join(map(str, self.examples))}"] if self.examples else []
        words += [f"{self.trained} trained"] if self.trained else []
        words += [self.dtype] if self.dtype != "float32" else []
        kept = "recomputed" if self.values.get("training.gradient_checkpointing") else "kept"
        quantization = self.values.get("model.quantization", "nf4")
        return f"{self.family} {quantization} {self.rows}x{self.length} {kept}" + "".join(f", {word}" for word in words)

    def model_config(self) -> Any:
        """A fresh one each time, as what runs may change it."""
        from transformers import AutoConfig

        return AutoConfig.for_model(**({"model_type": self.family} | FAMILIES[self.family]))

    def step(self) -> StepMemory:
        import torch

        config = with_values(Config(), {"training.gradient_checkpointing": False} | self.values)
        return StepMemory(config, self.model_config(), self.rows, self.length, getattr(torch, self.dtype), self.trained,
                          self.padded, self.examples)  # fmt: skip


def cases() -> list[Case]:
    """Every family in turn with other settings, then what only some of them have."""
    checkpointing, kind, optimizer = "training.gradient_checkpointing", "model.quantization", "training.optim"
    rotation = [
        (2, 256, {checkpointing: True}),
        (1, 512, {checkpointing: False, kind: "int8"}),
        (4, 128, {checkpointing: True, kind: "fp4", optimizer: "adamw_8bit"}),
        (3, 64, {checkpointing: False, "model.double_quant": False}),
        (2, 384, {checkpointing: True, kind: "none"}),
    ]
    families = [family for family in FAMILIES if family != "smollm2-135m"]
    found = [Case(family, *rotation[number % len(rotation)]) for number, family in enumerate(families)]
    on, off = {checkpointing: True}, {checkpointing: False}
    found += [
        Case("llama", values=off),
        Case("llama", values=on | {"model.double_quant": False, "adapter.r": 64}),
        Case("llama", values=on | {"adapter.method": "dora"}),
        Case("qwen2", values=off | {"adapter.method": "dora", "adapter.lora_dropout": 0.1}),
        Case("gpt2", values=off | {kind: "int8", "adapter.lora_dropout": 0.1}),
        Case("llama", values=on | {"adapter.lora_dropout": 0.05, optimizer: "adamw_8bit"}),
        Case("llama", values=on | {"adapter.modules_to_save": ["lm_head", "embed_tokens"]}),
        Case("phi", values=off | {"adapter.modules_to_save": ["final_layernorm"], "adapter.bias": "lora_only"}),
        Case("qwen3", values=on | {"training.gradient_accumulation_steps": 2}),
        Case("llama", values=off | {"training.gradient_accumulation_steps": 2, kind: "fp4"}),
        Case("llama", rows=4, length=128, values=on, padded=True),
        Case("gemma2", values=off, padded=True),
        Case("mistral", rows=1, length=512, values=on, examples=(200, 200, 112)),
        Case("llama", rows=2, length=256, values=off | {kind: "none"}, examples=(100, 156)),
        Case("gemma3_text", rows=1, length=64, values=on | {optimizer: "adamw_8bit"}),
        Case("opt", rows=1, length=512, values=off | {"training.label_smoothing_factor": 0.1}),
        Case("llama", rows=1, length=512, values=on, trained=100),
        Case("llama", values=on | {"training.max_grad_norm": 0.0, "adapter.target_modules": ["q_proj", "v_proj"]}),
        Case("mixtral", rows=1, length=512, values=off | {kind: "int8"}),
        Case("smollm2-135m", rows=1, length=256, values=on),
    ]
    return found


def few_cases() -> list[Case]:
    """One of each kind, in a few seconds."""
    on = {"training.gradient_checkpointing": True}
    return [
        Case("llama", values=on),
        Case("gpt2", rows=1, length=128, values={"model.quantization": "int8", "adapter.lora_dropout": 0.1}),
        Case("mixtral", rows=1, length=128, values=on | {"training.optim": "adamw_8bit"}),
    ]


@dataclass(frozen=True)
class Outcome:
    """What was predicted and measured of one case. Bytes; `traced` holds the categories of the real run."""

    case: Case
    predicted: Breakdown
    measured: int
    traced: Breakdown

    @property
    def error(self) -> float:
        """Of the peak, as a share of what was measured; negative where too little was predicted."""
        return self.predicted.peak_bytes / self.measured - 1

    @property
    def off_categories(self) -> dict[str, int]:
        """Bytes predicted too much, by category, where there is any difference."""
        pairs = zip(self.predicted.at_peak.items(), self.traced.at_peak.values(), strict=True)
        return {name: found - real for (name, found), real in pairs if found != real}

    @property
    def categories_pass(self) -> bool:
        return all(
            abs(off) <= max(CATEGORY_BYTES, CATEGORY_SHARE * self.traced.at_peak[name])
            for name, off in self.off_categories.items()
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "case": self.case.name,
            "error": self.error,
            "measured_peak_bytes": self.measured,
            "predicted": self.predicted.to_json(),
            "traced": self.traced.to_json(),
            "categories_passed": self.categories_pass,
            "off_categories": self.off_categories,
        }


def measure(case: Case, routing: Callable[[], AbstractContextManager] = nullcontext) -> Outcome:
    """Predict and measure one case.

    Args:
        routing: a context for all three runs, in which experts are given their tokens.
    """
    with routing():
        return Outcome(case, case.step().predicted(), case.step().measured_peak(), case.step().traced())


def even_routing() -> AbstractContextManager:
    """Every expert gets as many tokens as every other, as in a prediction."""
    from qlora_tool.model.experts import even_shares

    return tokens_per_expert(even_shares)


def worst_routing(k: int) -> AbstractContextManager:
    """All tokens go to the same k experts: no routing gives one expert more."""
    return tokens_per_expert(lambda total, experts: [total // k] * k + [0] * (experts - k))


def expert_rows() -> list[dict[str, Any]]:
    """Random and worst-case routing beside the prediction, which is for an even one."""
    rows = []
    for family in EXPERTS:
        for checkpointing in (True, False):
            case = Case(family, values={"training.gradient_checkpointing": checkpointing})
            k = case.model_config().num_experts_per_tok
            worst = measure(case, lambda k=k: worst_routing(k))
            free = measure(case)
            rows.append({
                "case": case.name,
                "predicted_even_bytes": free.predicted.peak_bytes,
                "measured_random_bytes": free.measured,
                "predicted_worst_bytes": worst.predicted.peak_bytes,
                "measured_worst_bytes": worst.measured,
            })  # fmt: skip
    return rows


def estimate_memory(family: str) -> dict[str, int]:
    """What `accelerate estimate-memory` says of a model: bytes to load it in 4 bits, and to train it with Adam in fp32
    and bf16 (of 4 bits it says nothing). The body alone counts there, without the output projection."""
    import torch
    from accelerate import init_empty_weights
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes
    from transformers import AutoModel

    with init_empty_weights():
        model = AutoModel.from_config(Case(family).model_config(), dtype=torch.float32)
    total, _ = calculate_maximum_sizes(model)
    return {
        "load_int4_bytes": int(total / 8),
        "train_float32_bytes": max(estimate_training_usage(total, "float32").values()),
        "train_bfloat16_bytes": max(estimate_training_usage(total, "bfloat16").values()),
    }


def judge(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The worst and the median error of the peak, and whether all limits were met."""
    errors = [abs(outcome.error) for outcome in outcomes]
    worst, median = max(errors), statistics.median(errors)
    categories = [outcome.case.name for outcome in outcomes if not outcome.categories_pass]
    return {
        "configurations": len(outcomes),
        "worst_error": worst,
        "median_error": median,
        "categories_missed": categories,
        "passed": worst <= WORST and median <= MEDIAN and not categories,
    }


def show(results: dict[str, Any]) -> None:
    rows = [("configuration", "predicted MB", "measured MB", "error", "largest difference of a category")]
    for case in results["cases"]:
        sizes = (f"{size / 1e6:,.2f}" for size in (case["predicted"]["peak_bytes"], case["measured_peak_bytes"]))
        name, off = max(case["off_categories"].items(), key=lambda item: abs(item[1]), default=("none", 0))
        rows.append((case["case"], *sizes, f"{case['error']:+.3%}", f"{name} {off:+,} B" if off else "none"))
    show_table(rows)
    experts, estimates = results["experts"], results["estimate_memory"]
    if experts:
        print("\nExperts: predicted for even routing")
        keys = [key for key in experts[0] if key != "case"]
        head = ("configuration", *(key.removesuffix("_bytes").replace("_", ", ") + " MB" for key in keys))
        show_table([head, *((row["case"], *(f"{row[key] / 1e6:,.2f}" for key in keys)) for row in experts)])
    if estimates:
        print("\naccelerate estimate-memory for the same models (MB)")
        head = ("configuration", "predicted", "measured", "load, int4", "train, float32", "train, bfloat16")
        show_table([head, *((row["case"], *(f"{size / 1e6:,.1f}" for key, size in row.items() if key != "case"))
                            for row in estimates)])  # fmt: skip
    print(
        f"\n{passed_or_missed(results['passed'])}: {results['configurations']} configurations, worst error "
        f"{results['worst_error']:.3%} (limit {WORST:.0%}), median {results['median_error']:.4%} (limit {MEDIAN:.1%}), "
        f"categories off in {len(results['categories_missed'])} (limit 2 % or 1 MB)"
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--few", action="store_true", help="a few configurations, in seconds")
    parser.add_argument("--bf16", action="store_true", help="add products in bf16, slow on a processor without them")
    parser.add_argument("--match", metavar="TEXT", help="only configurations whose line holds TEXT")
    add_outputs(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    chosen = few_cases() if options.few else cases()
    if options.bf16:
        chosen.append(Case("llama", values={"training.gradient_checkpointing": True}, dtype="bfloat16"))
    chosen = [case for case in chosen if (options.match or "") in case.name]
    if not chosen:
        raise UserError(f"--match: no configuration has {options.match!r} in its line")

    import torch

    quiet_transformers()
    start, outcomes = time.perf_counter(), []
    for number, case in enumerate(chosen, 1):
        outcomes.append(measure(case, even_routing))
        say(f"{number}/{len(chosen)} {case.name}: {outcomes[-1].error:+.3%}")
    experts = expert_rows() if not (options.few or options.match) else []
    firsts = [next((one for one in outcomes if one.case.family == family), None) for family in LLAMAS]
    estimates = [
        {"case": outcome.case.name, "predicted_bytes": outcome.predicted.peak_bytes,
         "measured_bytes": outcome.measured, **estimate_memory(outcome.case.family)}
        for outcome in firsts if outcome is not None
    ]  # fmt: skip
    return {"threads": torch.get_num_threads(), "seconds": round(time.perf_counter() - start, 1), **judge(outcomes),
            "cases": [outcome.to_json() for outcome in outcomes], "experts": experts,
            "estimate_memory": estimates}  # fmt: skip
