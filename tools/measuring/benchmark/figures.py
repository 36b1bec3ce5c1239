"""From what the benchmark timed and counted to figures, verdicts, a table and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from measuring.results import mb, new_figure, passed_or_missed, show_table

# What a processor of matrices reaches, TFLOP/s in bf16, dense, and a 7B's GFLOP for a token with everything recomputed
# and with nothing, head and attention at 2048 tokens included.
REACHED_TFLOPS = {"H100": 800.0, "H200": 800.0, "A100": 250.0, "4090": 165.0}
GFLOP_RECOMPUTED, GFLOP_STORED = 41.8, 28.3


def figures_of(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Speeds, ratios and verdicts.

    Args:
        raw: `lanes` ({name: {side, seconds, tokens, losses, memory, ...}}, one entry a timed round), `ratios`,
            `sides` (what each said of itself), `facts` and `demands`.

            Sides that share a `device` known to REACHED_TFLOPS get a share of its bound.

    Returns:
        `lanes`: {name: {tokens_per_second, ...}}; `ratios`: {name: {speed: {median, min, max}, memory, curve}};
        `verdicts` and `passed`. What was not measured is None, and no verdict is passed by it.
    """
    lanes = {name: _lane_figures(lane, raw["sides"].get(lane["side"]) or {}) for name, lane in raw["lanes"].items()}
    ratios = {}
    for name, (lane, reference) in raw["ratios"].items():
        one, other = raw["lanes"][lane], raw["lanes"][reference]
        peaks = [lanes[which]["peak_bytes"] for which in (lane, reference)]
        ratios[name] = {
            "speed": speed_ratio(one, other),
            "memory": peaks[0] / peaks[1] if all(peaks) else None,
            "curve": _curve_difference(one["losses"], other["losses"]),
        }
    verdicts = [_verdict(demand, lanes, ratios, raw["facts"]) for demand in raw["demands"]]
    return {
        "lanes": lanes,
        "ratios": ratios,
        "verdicts": verdicts,
        "passed": all(verdict["passed"] for verdict in verdicts),
    }


def speed_ratio(one: Mapping[str, list], other: Mapping[str, list]) -> dict[str, float] | None:
    """Tokens a second of one lane over another's, round by round: what the machine did meanwhile hit both."""
    pairs = [
        (tokens / seconds) / (other_tokens / other_seconds)
        for tokens, seconds, other_tokens, other_seconds in zip(
            one["tokens"], one["seconds"], other["tokens"], other["seconds"], strict=False
        )
    ]
    if not pairs:
        return None
    return {"median": statistics.median(pairs), "min": min(pairs), "max": max(pairs)}


def _lane_figures(lane: Mapping[str, Any], side: Mapping[str, Any]) -> dict[str, Any]:
    seconds, memory = lane["seconds"], lane.get("memory") or {}
    speed = sum(lane["tokens"]) / sum(seconds) if seconds else None
    return {
        "tokens_per_second": speed,
        "seconds_a_step": statistics.median(seconds) if seconds else None,
        "peak_bytes": memory.get("peak_bytes"),
        "reserved_bytes": memory.get("reserved_bytes"),
        "share_of_bound": _share_of_bound(speed, side),
    }


def _share_of_bound(speed: float | None, side: Mapping[str, Any]) -> float | None:
    """Of the tokens a second that a 7B could reach for what was recomputed; None where the device is not known."""
    tflops = next((value for name, value in REACHED_TFLOPS.items() if name in side.get("device", "")), None)
    if speed is None or tflops is None:
        return None
    share = side.get("recomputed_share", 1.0)
    return speed * (GFLOP_STORED + share * (GFLOP_RECOMPUTED - GFLOP_STORED)) / (tflops * 1000)


def _curve_difference(one: list[float], other: list[float]) -> float | None:
    return max((abs(loss / reference - 1) for loss, reference in zip(one, other, strict=False)), default=None)


def _verdict(demand: Mapping[str, Any], lanes, ratios, facts) -> dict[str, Any]:
    figure, of = demand["figure"], demand["of"]
    if figure == "speed":
        found = (ratios[of]["speed"] or {}).get("median")
    elif figure in ("memory", "curve"):
        found = ratios[of][figure]
    else:
        found = facts.get(of) if figure == "fact" else lanes[of][figure]
    met = found is not None and (found >= demand["limit"] if demand["at_least"] else found <= demand["limit"])
    return {**demand, "found": found, "passed": met}


# ------------------------------------------------------------------------------------------------------ table and plot


def show(results: Mapping[str, Any]) -> None:
    """The tables on stdout, and under them what each side decided and the verdicts."""
    rows = [("lane", "tokens/s", "s/step", "peak MB", "first loss", "last loss")]
    for name, lane in results["lanes"].items():
        first_and_last = (lane["losses"][at] if lane["losses"] else None for at in (0, -1))
        rows.append((
            name, _shown(lane["tokens_per_second"], ",.1f"), _shown(lane["seconds_a_step"], ".3f"),
            _shown(lane["peak_bytes"], ",.1f", 1e-6), *(_shown(loss, ".4f") for loss in first_and_last),
        ))  # fmt: skip
    show_table(rows)
    print()
    rows = [("ratio", "speed", "min", "max", "memory", "losses apart")]
    for name, ratio in results["ratios"].items():
        speed = ratio["speed"] or {}
        rows.append((name, *(_shown(speed.get(key), ".3f") for key in ("median", "min", "max")),
                     _shown(ratio["memory"], ".3f"),
                     _shown(ratio["curve"] if losses_compare(results["lanes"]) else None, ".3%")))  # fmt: skip
    show_table(rows)
    for name, lane in results["lanes"].items():
        if "error" in lane:
            print(f"\n{name}: {lane['error']}")
        if lane.get("categories"):
            parts = _parts_at_peak(lane)
            told = ", ".join(f"{part.replace('_', ' ')} {mb(size)}" for part, size in parts.items() if size)
            print(f"\n{name}, MB at the peak: {told}")
    for name, side in results["sides"].items():
        if side and side.get("recomputation"):
            predicted = side.get("predicted_bytes")
            print(f"{name}: {side['recomputation']}"
                  + (f"; {mb(predicted)} MB predicted at the peak" if predicted else ""))  # fmt: skip
    for name, fact in results["facts"].items():
        print(f"{name.replace('_', ' ')}: {round(fact, 4) if isinstance(fact, float) else fact}")
    for verdict in results["verdicts"]:
        bound = "at least" if verdict["at_least"] else "at most"
        found = "not measured" if verdict["found"] is None else f"{verdict['found']:,.4g}"
        word = passed_or_missed(verdict["passed"])
        print(f"{word}: {verdict['figure']} of {verdict['of']}: {found}; {bound} {verdict['limit']:,.4g} is asked for")


def losses_compare(lanes: Mapping[str, Any]) -> bool:
    """Whether each lane trains a model of its own: where one goes through several lanes, its losses tell nothing."""
    return len({lane["side"] for lane in lanes.values()}) == len(lanes)


def _shown(value: float | None, form: str, scale: float = 1.0) -> str:
    return "-" if value is None else f"{value * scale:{form}}"


def plot(results: Mapping[str, Any]) -> Any:
    """Tokens a second with the slowest and fastest step, memory at the peak by category, and the loss curves."""
    lanes = results["lanes"]
    figure, (speeds, memory, curves) = new_figure(3, figsize=(16, 4.5), layout="constrained")
    colors = {name: f"C{place % 10}" for place, name in enumerate(lanes)}
    for place, (name, lane) in enumerate(lanes.items()):
        each = [tokens / seconds for tokens, seconds in zip(lane["tokens"], lane["seconds"], strict=True)]
        if each:
            middle = statistics.median(each)
            speeds.bar(place, middle, color=colors[name],
                       yerr=[[middle - min(each)], [max(each) - middle]], capsize=4)  # fmt: skip
            if losses_compare(lanes):
                curves.plot(range(1, len(lane["losses"]) + 1), lane["losses"], color=colors[name], label=name,
                            linestyle="--" if place else "-")  # fmt: skip
        _bar_by_category(memory, place, lane, colors[name])
    for axes in (speeds, memory):
        axes.set_xticks(range(len(lanes)), list(lanes), rotation=20, ha="right")
        axes.grid(alpha=0.3, axis="y")
    speeds.set(ylabel="tokens/s (padding left out)", title="Speed: median, slowest, fastest step")
    memory.set(ylabel="MB of tensors", title="Memory at the peak of a step")
    curves.set(xlabel="step", ylabel="loss before the step", title="Loss")
    if losses_compare(lanes):
        curves.legend(fontsize=8)
        curves.grid(alpha=0.3)
    else:
        curves.set_axis_off()
    handles, labels = memory.get_legend_handles_labels()
    if handles:
        unique = dict(zip(labels, handles, strict=True))
        memory.legend(unique.values(), unique.keys(), fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(f"{results['scenario']}: {results['about']}", fontsize=11)
    return figure


def _bar_by_category(axes, place: int, lane: Mapping[str, Any], color: str) -> None:
    """The peak of a lane; stacked by category, in grey where it is not told apart."""
    if not lane["peak_bytes"]:
        return
    if not lane.get("categories"):
        axes.bar(place, lane["peak_bytes"] / 1e6, color="0.6", edgecolor=color)
        return
    bottom = 0.0
    for number, (part, size) in enumerate(_parts_at_peak(lane).items()):
        if size:
            axes.bar(place, size / 1e6, bottom=bottom, color=f"C{number % 10}", label=part.replace("_", " "),
                     alpha=0.6 if number > 9 else 1.0)  # fmt: skip
            bottom += size / 1e6


def _parts_at_peak(lane: Mapping[str, Any]) -> dict[str, int]:
    """Bytes by category, the activations split."""
    parts = {**lane["categories"]["at_peak"], **lane["categories"]["activations"]}
    parts.pop("activations", None)
    return parts
