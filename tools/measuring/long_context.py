"""How memory and time grow with the row: a line, and attention's n^2 (15 minutes).

Every layer is recomputed, products are in fp32, the base is NF4. Asked for: the peak of a step is a straight line (the
bytes a token, over what is there at no length, within 5 % of the fit at every length), and a step's time is
a + b n + c n^2, the quadratic part being attention's: the fits of the step and of attention alone, timed at the same
lengths in the same run, differ in it by at most 10 % of the longest step.

    tools/measure long-context demo --json long.json --plot long.png

The time is for SmolLM2-135M on two idle cores with 5 GB of memory; `--lengths 256 512 1024 --repeats 1` takes a minute.
Times are the fastest of the repeats; what else the machine does shows in them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from measuring.command import add_model, add_outputs, at_least
from measuring.ours import OurSide, largest_of_a_step, predicted_phases, random_row, vocabulary_size
from measuring.results import mb, new_figure, passed_or_missed, say, show_table
from measuring.sides import peak_tensor_bytes, quiet_transformers
from qlora_tool.config import Config, with_values
from qlora_tool.errors import UserError

LENGTHS = (256, 512, 1024, 1536, 2048, 3072, 4096)
MEMORY_WITHIN, QUADRATIC_LEFT = 0.05, 0.10


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Attention:
    """The model's attention alone: the function that its layers call, on random queries, keys and values."""

    def __init__(self, module):
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        self.layers = [part for part in module.modules() if hasattr(part, "num_key_value_groups")]
        self.layer, config = self.layers[0], module.config.get_text_config()
        self.function = ALL_ATTENTION_FUNCTIONS[config._attn_implementation]
        self.heads, self.groups = config.num_attention_heads, self.layer.num_key_value_groups
        self.width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def seconds(self, length: int) -> float:
        """What all layers take in one step: forward, forward again where the layer is recomputed, backward."""
        import torch

        query, key, value = (
            torch.randn(1, heads, length, self.width, requires_grad=True)
            for heads in (self.heads, self.heads // self.groups, self.heads // self.groups)
        )

        def forward():
            return self.function(self.layer, query, key, value, None, dropout=0.0, scaling=self.layer.scaling)[0]

        def recomputed() -> None:
            with torch.no_grad():
                forward()
            output = forward()
            output.backward(torch.ones_like(output))

        recomputed()
        return len(self.layers) * min(seconds_of(recomputed) for _ in range(2))


def measure(config: Config, lengths: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """A row of figures for each length: `seconds` and `attention_seconds` (the fastest), `peak_bytes`,
    `predicted_bytes`."""
    vocabulary = vocabulary_size(config)
    batches = {length: random_row(length, vocabulary) for length in lengths}
    side = OurSide(config, batches[max(lengths)])
    attention = Attention(side.model.module)
    side.step(batches[min(lengths)])  # warms up, and makes the optimizer's state
    times: dict[int, list[tuple[float, float]]] = {length: [] for length in lengths}
    for repeat in range(repeats):
        for length, batch in batches.items():
            taken = seconds_of(lambda batch=batch: side.step(batch)), attention.seconds(length)
            times[length].append(taken)
            say(f"{repeat + 1}/{repeats} {length} tokens: {taken[0]:.2f} s, attention alone {taken[1]:.2f} s")
    rows = []
    for length, batch in batches.items():
        seconds, alone = (min(taken) for taken in zip(*times[length], strict=True))
        peak = peak_tensor_bytes(lambda batch=batch: side.step(batch), side.device)["peak_bytes"]
        say(f"{length} tokens: {mb(peak)} MB at the peak")
        rows.append({"length": length, "seconds": seconds, "attention_seconds": alone, "peak_bytes": peak,
                     "predicted_bytes": largest_of_a_step(predicted_phases(side.config, 1, length))})  # fmt: skip
    return rows


def judge(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Both fits, and whether they are what is asked for."""
    import numpy

    lengths = numpy.array([row["length"] for row in rows], dtype=float)
    peaks = numpy.array([row["peak_bytes"] for row in rows], dtype=float)
    per_token, at_rest = numpy.polyfit(lengths, peaks, 1)
    off = abs((peaks - at_rest) / lengths / per_token - 1)
    seconds, attention = (numpy.array([row[key] for row in rows]) for key in ("seconds", "attention_seconds"))
    # Weighted so that a short step's own seconds count as much as a long one's.
    step = numpy.polyfit(lengths, seconds, 2, w=1 / seconds)
    alone = numpy.polyfit(lengths, attention, 2, w=1 / attention)
    longest = lengths.argmax()
    left = (step[0] - alone[0]) * lengths[longest] ** 2 / seconds[longest]
    return {
        "memory": {"bytes_at_rest": at_rest, "bytes_a_token": per_token, "worst_off": float(off.max()),
                   "between_neighbours": (numpy.diff(peaks) / numpy.diff(lengths)).tolist(),
                   "limit": MEMORY_WITHIN, "passed": bool(off.max() <= MEMORY_WITHIN)},
        "time": {"step": step[::-1].tolist(), "attention": alone[::-1].tolist(),
                 "worst_off": float(abs(numpy.polyval(step, lengths) / seconds - 1).max()),
                 "quadratic_left": float(left), "limit": QUADRATIC_LEFT, "passed": bool(abs(left) <= QUADRATIC_LEFT)},
    }  # fmt: skip


def show(results: Mapping[str, Any]) -> None:
    rows, memory, taken = results["lengths"], results["memory"], results["time"]
    head = ("tokens", "peak MB", "predicted MB", "off", "s/step", "attention s", "tokens/s")
    show_table([head, *(
        (str(row["length"]), mb(row["peak_bytes"]), mb(row["predicted_bytes"]),
         f"{row['predicted_bytes'] / row['peak_bytes'] - 1:+.2%}", f"{row['seconds']:.3f}",
         f"{row['attention_seconds']:.3f}", f"{row['length'] / row['seconds']:,.1f}")
        for row in rows
    )])  # fmt: skip
    print(f"\npeak = {mb(memory['bytes_at_rest'])} MB + {memory['bytes_a_token']:,.0f} B a token")
    for name in ("step", "attention"):
        a, b, c = taken[name]
        print(f"{name} = {a:.3f} s + {b * 1e3:.4f} ms n + {c * 1e6:.5f} us n^2")
    print(f"a step's fit is off by {taken['worst_off']:.2%} at most")
    for figures, told in (
        (memory, f"bytes a token off by {memory['worst_off']:.2%}"),
        (taken, f"quadratic beyond attention alone {taken['quadratic_left']:.2%} of the longest step"),
    ):
        print(f"{passed_or_missed(figures['passed'])}: {told}; at most {figures['limit']:.0%} is asked for")


def plot(results: Mapping[str, Any]) -> Any:
    """Memory and seconds by length, with the fits."""
    import numpy

    rows = results["lengths"]
    figure, (memory, seconds) = new_figure(2, figsize=(11, 4.5))
    lengths = [row["length"] for row in rows]
    line = numpy.linspace(0, max(lengths), 100)
    fit = results["memory"]
    memory.plot(line, (fit["bytes_at_rest"] + fit["bytes_a_token"] * line) / 1e6, color="0.6", label="straight line")
    memory.plot(lengths, [row["peak_bytes"] / 1e6 for row in rows], "o", label="measured")
    memory.plot(lengths, [row["predicted_bytes"] / 1e6 for row in rows], "x", label="predicted")
    memory.set(xlabel="tokens of the row", ylabel="MB of tensors at the peak", ylim=(0, None))
    for name, key in (("step", "seconds"), ("attention", "attention_seconds")):
        a, b, c = results["time"][name]
        points = seconds.plot(lengths, [row[key] for row in rows], "o", label=name + (" alone" * (name != "step")))
        seconds.plot(line, a + b * line + c * line**2, color=points[0].get_color(), linewidth=1)
    seconds.set(xlabel="tokens of the row", ylabel="seconds a step", ylim=(0, None))
    for axes in (memory, seconds):
        axes.legend()
        axes.grid(alpha=0.3)
    return figure


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--lengths", type=at_least(2), nargs="+", default=list(LENGTHS), metavar="N",
                        help="at least three")  # fmt: skip
    parser.add_argument("--repeats", type=at_least(1), default=2, help="steps timed at each length (default: 2)")
    add_outputs(parser, plot="memory and time")


def run(options: argparse.Namespace) -> dict[str, Any]:
    lengths = sorted(set(options.lengths))
    if len(lengths) < 3:
        raise UserError(f"--lengths: {len(lengths)} found, at least three different ones expected")
    quiet_transformers()
    config = with_values(Config(), {
        "model.name_or_path": options.model, "model.device": "cpu", "model.compute_dtype": "float32",
        "training.gradient_checkpointing": True, "training.per_device_train_batch_size": 1,
        "data.max_length": max(lengths),
    })  # fmt: skip
    rows = measure(config, lengths, options.repeats)
    verdict = judge(rows)
    passed = verdict["memory"]["passed"] and verdict["time"]["passed"]
    return {"config": config.model_dump(mode="json"), "lengths": rows, **verdict, "passed": passed}
