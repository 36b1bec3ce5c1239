"""What fits, held against what the allocator counts."""

from __future__ import annotations

import functools
import io
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from transformers import BertConfig, LlamaConfig

from qlora_tool.config import Config, load_config, with_values
from qlora_tool.errors import UserError
from qlora_tool.memory.allocator.calibrate import Calibration
from qlora_tool.memory.allocator.cards import find_card
from qlora_tool.memory.allocator.target import CudaTarget
from qlora_tool.memory.breakdown import Breakdown
from qlora_tool.memory.plan.length import longest_length, round_down, step_of
from qlora_tool.memory.plan.options import passes_of, relative_speed
from qlora_tool.memory.plan.planner import plan
from qlora_tool.memory.plan.result import Change, Option, Plan
from qlora_tool.memory.plan.search import change_that_fits
from qlora_tool.memory.profile import Prediction
from qlora_tool.memory.show.plan_table import render_plan
from qlora_tool.memory.trace.classify import timeline
from qlora_tool.memory.trace.measure import measure_peak
from qlora_tool.memory.trace.predict import BatchShape, predict

MIB = 2**20
FEW = {
    "adapter.r": [{"adapter.r": 8}, {"adapter.r": 16}],
    "model.quantization": [{"model.quantization": "none"}],  # not what is asked for, which has a row all the same
    "training.optim": [{"training.optim": "adamw"}],
}


def tiny(**changes) -> LlamaConfig:
    sizes = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
    }  # fmt: skip
    return LlamaConfig(**{**sizes, **changes})


def asked(**values) -> Config:
    few = {"training.per_device_train_batch_size": 2, "data.max_length": 256, "adapter.r": 8}
    return with_values(Config(), {**few, "training.gradient_checkpointing": True, **values})


def measured(config: Config, length: int, layers: int = 1) -> int:
    return _measured(config.model_dump_json(), length, layers)


@functools.cache
def _measured(settings: str, length: int, layers: int) -> int:
    config = with_values(Config.model_validate_json(settings), {"data.max_length": length})
    sizes = tiny(num_hidden_layers=layers)
    return measure_peak(config, sizes, BatchShape.assumed(config, sizes), torch.float32)


@pytest.fixture(scope="module", autouse=True)
def few_options() -> Iterator[None]:
    """A table of few rows, so that the tests take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qlora_tool.memory.plan.options.BATCH_SIZES", (4,))
        patch.setattr("qlora_tool.memory.plan.options.ALTERNATIVES", FEW)
        yield


@pytest.fixture(scope="module")
def roomy() -> Plan:
    return plan(asked(), tiny(), 8 * MIB, torch.float32, None)


KEPT = {"training.gradient_checkpointing": False}
LAYERS = 2  # so that checkpointing saves something


@pytest.fixture(scope="module")
def with_and_without() -> tuple[int, int]:
    """What a step takes with checkpointing, and without."""
    return measured(asked(), 256, LAYERS), measured(asked(**KEPT), 256, LAYERS)


@pytest.fixture(scope="module")
def tight(with_and_without: tuple[int, int]) -> Plan:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qlora_tool.memory.plan.options.BATCH_SIZES", ())
        patch.setattr("qlora_tool.memory.plan.options.ALTERNATIVES", dict.fromkeys(FEW, ()))
        patch.setattr("qlora_tool.memory.plan.search.SHORTEST", 256)  # no other length is tried
        patch.setattr("qlora_tool.memory.plan.options.SHORTEST", 256)
        model_config = tiny(num_hidden_layers=LAYERS, max_position_embeddings=256)
        return plan(asked(**KEPT), model_config, sum(with_and_without) // 2, torch.float32, None)


def test_the_longest_rows_measure_under_the_limit_and_a_tenth_more_over(roomy):
    assert roomy.fits
    ((key, length),) = roomy.longest.settings.items()
    assert key == "data.max_length"
    assert roomy.longest.confirmed
    assert 256 < length < 2048
    assert measured(asked(), length) <= 8 * MIB
    assert measured(asked(), round(1.1 * length)) > 8 * MIB
    assert roomy.longest.peak_bytes == pytest.approx(measured(asked(), length), rel=0.01)


def test_each_row_of_the_table_is_as_long_as_fits(roomy):
    rows = [option for option in roomy.options if option.group == "length" and 0 < option.length < 2048]
    assert len(rows) == 4
    checked = [option for option in rows if option.rows == 4]
    assert {option.settings["training.gradient_checkpointing"] for option in checked} == {True, False}
    for option in checked:
        config = with_values(asked(), option.settings)
        assert measured(config, option.length) <= 8 * MIB
        assert measured(config, round(1.1 * option.length) + 1) > 8 * MIB


def test_what_does_not_fit_gets_one_line_that_makes_it_fit(tight, with_and_without):
    assert not tight.fits
    assert tight.line == "--set training.gradient_checkpointing=true"
    assert tight.change.confirmed
    assert (tight.change.peak_bytes, tight.asked.peak_bytes) == pytest.approx(with_and_without, rel=0.01)
    assert tight.change.peak_bytes < tight.usable_bytes < tight.asked.peak_bytes


def predicted(config: Config, shape: BatchShape) -> Breakdown:
    return timeline(predict(config, tiny(), shape, torch.float32)).breakdown()


def change(config: Config, limit: int, rows: int = 2, length: int = 256, **more) -> Change | None:
    sized = with_values(config, {"training.per_device_train_batch_size": rows, "data.max_length": length})
    shape = BatchShape.assumed(sized, tiny())
    return change_that_fits(config, tiny(), limit, torch.float32, None, shape, predicted(config, shape), **more)


def test_the_next_in_line_where_checkpointing_is_on():
    """The 8-bit optimizer, should that do, else fewer rows."""
    needed = {rows: measured(asked(**{"training.per_device_train_batch_size": rows}), 256) for rows in (1, 2)}
    found = change(asked(), limit := (needed[1] + needed[2]) // 2)
    assert found.settings in (
        {"training.optim": "adamw_8bit"},
        {"training.per_device_train_batch_size": 1, "training.gradient_accumulation_steps": 2},
    )
    assert measured(with_values(asked(), found.settings), 256) <= limit < needed[2]
    assert not found.confirmed
    assert found.peak_bytes == pytest.approx(measured(with_values(asked(), found.settings), 256), rel=0.01)
    # The line is one that the command line reads.
    overrides = found.line.removeprefix("--set ").split(" --set ")
    changed = load_config("llama-2-7b-24gb", overrides)
    for key, value in found.settings.items():
        section, name = key.split(".")
        assert getattr(getattr(changed, section), name) == value


def test_an_odd_number_of_rows_is_taken_one_at_a_time():
    config = asked(**{"training.per_device_train_batch_size": 3, "training.gradient_accumulation_steps": 5})
    found = change(config, measured(asked(**{"training.per_device_train_batch_size": 1}), 256) * 5 // 4, rows=3)
    assert found.settings == {"training.per_device_train_batch_size": 1, "training.gradient_accumulation_steps": 15}


def test_rows_are_not_cut_to_less_than_half_where_two_other_changes_do():
    """Fewer rows alone are not enough, nor is a smaller optimizer; shorter rows alone would be."""
    config = asked(**{"adapter.r": 128, "training.optim": "adamw"})
    fewer = {"training.per_device_train_batch_size": 1, "training.gradient_accumulation_steps": 2}
    small = fewer | {"training.optim": "adamw_8bit"}
    limit = measured(with_values(config, small), 256) * 102 // 100
    for alone in (fewer, {"training.optim": "adamw_8bit"}):
        assert measured(with_values(config, alone), 256) > limit
    assert measured(config, 64) < limit
    found = change(config, limit, margin=0.0)
    assert found.settings == small


def test_rows_are_cut_a_little_before_several_other_things_are_changed():
    config = asked(**{"training.per_device_train_batch_size": 1, "training.optim": "adamw_8bit"})
    found = change(config, measured(config, 200), rows=1)
    assert found is not None and set(found.settings) == {"data.max_length"} and found.settings["data.max_length"] >= 128


def test_a_search_stops_in_time():
    with pytest.raises(TimeoutError):
        change(asked(), MIB, seconds=-1)


def test_no_change_where_nothing_fits():
    assert change(asked(), MIB // 8, length=72) is None


def test_a_budget_below_the_weights(monkeypatch):
    monkeypatch.setattr("qlora_tool.memory.plan.options.BATCH_SIZES", ())
    monkeypatch.setattr("qlora_tool.memory.plan.options.ALTERNATIVES", {})
    found = plan(asked(**{"data.max_length": 72}), tiny(), MIB // 16, torch.float32, None)
    assert (found.fits, found.line) == (False, "")
    assert found.weights_bytes > found.usable_bytes
    assert found.misses_by == found.smallest_bytes - MIB // 16
    assert [option.length for option in found.options if option.group == "length"] == [0, 0]
    assert "the weights alone take" in printed(found)


def test_the_margin_is_kept_free(roomy):
    kept = plan(asked(), tiny(), 10 * MIB, torch.float32, None, margin=0.2, confirm=False)
    assert kept.usable_bytes == 8 * MIB
    assert kept.longest.settings == roomy.longest.settings


def test_a_model_that_cannot_be_traced():
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(UserError, match="not a causal language model"):
        plan(asked(), BertConfig(**sizes), MIB, torch.float32, None)


def test_checkpointing_costs_a_pass():
    with_it, without = asked(), asked(**{"training.gradient_checkpointing": False})
    assert relative_speed(without, passes_of(with_it)) == 1.5  # 3 passes for 2
    assert relative_speed(with_it, passes_of(without)) == pytest.approx(2 / 3)
    assert relative_speed(asked(**{"adapter.r": 64}), passes_of(with_it)) == 1


def printed(found: Plan) -> str:
    stream = io.StringIO()
    render_plan(found, Console(file=stream, width=80, no_color=True))
    return stream.getvalue()


def test_where_the_model_bounds_the_rows_its_limit_is_named(roomy):
    bound = replace(roomy, positions=roomy.longest.settings["data.max_length"])
    named = "the model's own limit, its max_position_embeddings of"
    assert f"nothing has to change; the longest rows as long as {named} {bound.positions}, allows: " in printed(bound)
    most = replace(bound, longest=None, asked=replace(roomy.asked, length=256), positions=256)
    assert f"nothing has to change; rows of 256 tokens reach {named} 256: memory bounds no row" in printed(most)
    assert "nothing has to change, and no longer row fits" in printed(replace(most, positions=2048))
    assert roomy.positions == 2048 and named not in printed(roomy)  # there memory does


def tables_of(lines: list[str]) -> list[str]:
    """But for the sentences before and after, which are not wrapped where there is no terminal."""
    return lines[lines.index("") : next(at for at, line in enumerate(lines) if line.startswith("peak: expected"))]


def test_sentences_wrap_on_a_terminal_alone(tight):
    """A pipe and a file get each in a line, whatever their width; so does a terminal the line to copy."""
    for width in (30, 80):
        stream = io.StringIO()
        render_plan(tight, Console(file=stream, width=width, no_color=True))
        lines = stream.getvalue().splitlines()
        for begins, ends in (("asked for: ", "too much"), ("peak: expected;", "not measured"),
                             ("this makes it fit: ", ":")):  # fmt: skip
            (line,) = (line for line in lines if line.startswith(begins))
            assert line.endswith(ends)
    stream = io.StringIO()
    render_plan(tight, Console(file=stream, width=70, no_color=True, force_terminal=True, color_system=None))
    lines = stream.getvalue().rstrip().splitlines()
    assert max(map(len, lines)) <= 70 and lines[-1] == tight.line
    assert not any(line.startswith("peak: expected") and line.endswith("not measured") for line in lines)


def test_a_table_for_80_columns_that_ends_with_the_line_to_copy(roomy, tight):
    for found in (roomy, tight):
        lines = printed(found).rstrip().splitlines()
        assert lines[-1] == found.line
        assert max(map(len, tables_of(lines))) <= 80
        marked = [line.split()[0] for line in lines if line.endswith("asked for")]
        assert marked == ["r=8", "quantization=nf4", "optim=adamw"]
    assert "it fits" in printed(roomy)
    assert "it does not fit, " in printed(tight)


def test_nothing_is_cut_off_where_there_is_no_terminal(roomy):
    """Every setting and every cost in full, on lines of 80 columns, or of 60."""
    settings = [
        {"model.quantization": "nf4", "model.double_quant": False}, {"training.offload_boundaries": True},
        {"training.tiled_mlp": True}, {"model.embeddings": "int8"}, {"training.optim": "adamw_8bit"},
    ]  # fmt: skip
    options = tuple(Option("savings", keys, 8, 2048, 23 * 2**30, False, 0.67) for keys in settings)
    for width in (80, 60):
        stream = io.StringIO()
        render_plan(replace(roomy, options=options), Console(file=stream, width=width, no_color=True))
        assert "…" not in stream.getvalue()
        lines, words = stream.getvalue().splitlines(), stream.getvalue().split()
        assert max(map(len, tables_of(lines))) <= width
        for said in (
            "copies to and from the host", "half of each MLP once more", "rounded to 8 bits", "optim=adamw_8bit",
            "quantization=nf4, double_quant=false", "offload_boundaries=true",
        ):  # fmt: skip
            assert width < 80 or all(word in words for word in said.split())  # below, in the midst of a word
        assert sum("23.00 GiB  too much   0.67" in line for line in lines) == len(settings)


@pytest.mark.parametrize("slope", [0.0, 900.0, 40_000.0])
@pytest.mark.parametrize("start", [64, 700, 4096])
@pytest.mark.parametrize("limit", [600_000, 2_000_000, 3_333_333, 50_000_000])
def test_the_search_finds_the_longest_length(limit, start, slope):
    def needed(length: int) -> int:
        return max(500_000 + 1000 * length, 200_000 + 1500 * length, 3 * length**2 // 10)

    looks = []
    found, _ = longest_length(
        lambda length: looks.append(length) or needed(length), limit, 64, 4096, start=start, slope=slope
    )
    best = max((length for length in range(64, 4097) if needed(length) <= limit), default=0)
    assert needed(found) <= limit
    assert found <= best <= max(found + 63 if found >= 640 else found + 7, found * 1.1)
    assert len(looks) <= 12


def test_the_search_looks_few_times_at_what_only_gets_steeper():
    """Several moments, each linear or quadratic in the length, rounded as an allocator does."""
    draw, looks, missed = random.Random(1), 0, 0
    for _ in range(300):
        lines = [(draw.uniform(0, 5e9), draw.uniform(1e4, 3e6)) for _ in range(draw.randint(1, 4))]
        bend, limit = draw.choice([0, 0, draw.uniform(0, 200)]), draw.uniform(4e9, 40e9)
        top = draw.choice([4096, 131072])
        seen: dict[int, int] = {}

        def needed(length: int, lines=lines, bend=bend, seen=seen) -> int:
            size = max(start + slope * length for start, slope in lines) + bend * length**2
            return seen.setdefault(length, int(size) // 2**21 * 2**21)

        found, _ = longest_length(needed, int(limit), 64, top, start=draw.choice([512, 2048, 8192]),
                                  slope=draw.choice([0.0, draw.uniform(1e4, 3e6)]))  # fmt: skip
        looks += len(seen)
        assert len(seen) <= 12 and (found == 0 or needed(found) <= limit)
        longer = round_down(found + step_of(found), 64, top) if found else 64
        missed += longer > found and needed(longer) <= limit
    assert looks < 4 * 300 and missed <= 3


def test_the_search_knows_when_nothing_fits():
    assert longest_length(lambda length: 1000 + length, 1000, 64, 4096, start=2048)[0] == 0


# ------------------------------------------------------------------------------------------------- for one card

H100, RTX_3060 = (CudaTarget.of(find_card(name)) for name in ("h100", "rtx-3060"))
ON_CARD = {"training.gradient_checkpointing": True, "training.per_device_train_batch_size": 1}


@pytest.fixture
def asked_alone(monkeypatch):
    """A plan of what was asked for alone, without a table."""
    monkeypatch.setattr("qlora_tool.memory.plan.options.BATCH_SIZES", ())
    monkeypatch.setattr("qlora_tool.memory.plan.options.ALTERNATIVES", {})
    monkeypatch.setattr("qlora_tool.memory.plan.search.SHORTEST", 256)
    monkeypatch.setattr("qlora_tool.memory.plan.options.SHORTEST", 256)


def whole(config: Config, model_config, target: CudaTarget) -> Breakdown:
    shape = BatchShape.assumed(config, model_config)
    trace = predict(config, model_config, shape, torch.bfloat16, target=target.device)
    return Prediction.of(trace, target).breakdown


def test_a_plan_is_for_the_card_that_is_asked_for(asked_alone):
    """Hopper's cuBLAS keeps 32 MiB for each of two threads where others keep 8.1, and its context takes more."""
    config, sizes = asked(), tiny(max_position_embeddings=256)
    found = {card: plan(config, sizes, 10**10, torch.bfloat16, card) for card in (H100, RTX_3060)}
    for card, answer in found.items():
        assert answer.device == "cuda"
        assert answer.asked.peak_bytes == whole(config, sizes, card).needed_bytes
        assert f"on cuda ({card})" in printed(answer)
    contexts = H100.context_bytes - RTX_3060.context_bytes
    more = found[H100].asked.peak_bytes - found[RTX_3060].asked.peak_bytes
    assert more - contexts == pytest.approx(2 * (32 * MIB - 8519680), abs=4 * MIB)  # segments have whole 2 MiB
    between = found[H100].asked.peak_bytes - 1  # fits one and not the other
    assert plan(config, sizes, between, torch.bfloat16, RTX_3060, margin=0.0, confirm=False).fits
    assert not plan(config, sizes, between, torch.bfloat16, H100, margin=0.0, confirm=False).fits


def test_what_was_measured_on_a_card_changes_its_plan(asked_alone):
    measured = Calibration("here", 700_000_000, 0, 4 * MIB)
    config, sizes = asked(), tiny(max_position_embeddings=256)
    target = replace(H100, calibration=measured)
    found = plan(config, sizes, 10**10, torch.bfloat16, target)
    assert found.asked.peak_bytes == whole(config, sizes, target).needed_bytes
    estimated = plan(config, sizes, 10**10, torch.bfloat16, H100, confirm=False)
    less = estimated.asked.peak_bytes - found.asked.peak_bytes
    assert less - (H100.context_bytes - 700_000_000) == pytest.approx(60 * MIB, abs=22 * MIB)  # a segment more or less


def test_the_refusal_looks_on_the_same_card(asked_alone):
    """What makes a run fit on a card is estimated with the card's own workspaces."""
    config, sizes = asked(**{"training.per_device_train_batch_size": 8}), tiny(max_position_embeddings=256)
    shape = BatchShape.assumed(config, sizes)
    for card in (H100, RTX_3060):
        now = whole(config, sizes, card)
        found = change_that_fits(config, sizes, round((now.needed_bytes - 1) / 0.95), torch.bfloat16, card, shape, now)
        assert found is not None
        after = whole(with_values(config, found.settings), sizes, card)
        assert found.peak_bytes == pytest.approx(after.needed_bytes, abs=20 * MIB)  # one segment


def deep(layers: int = 5) -> LlamaConfig:
    """A model whose boundaries, 4 MiB each of 2048 tokens in 16 bits, are most of what a step takes."""
    return tiny(hidden_size=1024, intermediate_size=512, num_hidden_layers=layers, vocab_size=128)


def test_boundaries_go_to_the_host_before_rows_are_shortened(monkeypatch, asked_alone):
    """Also where `train` refuses; and with them there it fits."""
    monkeypatch.setattr("qlora_tool.memory.plan.search.SHORTEST", 2048)  # no other length is tried
    monkeypatch.setattr("qlora_tool.memory.plan.options.SHORTEST", 2048)
    config = asked(**ON_CARD | {"data.max_length": 2048, "training.optim": "adamw_8bit", "training.tiled_mlp": True})
    now = whole(config, deep(), H100)
    then = whole(with_values(config, {"training.offload_boundaries": True}), deep(), H100)
    assert now.needed_bytes - then.needed_bytes > 2 * 4 * MIB
    limit = (now.needed_bytes + then.needed_bytes) // 2
    found = plan(config, deep(), limit, torch.bfloat16, H100, margin=0.0)
    assert found.change.settings == {"training.offload_boundaries": True} and found.change.confirmed
    assert found.change.peak_bytes == then.needed_bytes < limit < found.asked.peak_bytes
    assert printed(found).rstrip().endswith("--set training.offload_boundaries=true")
    assert "; copies to and from the host:" in " ".join(printed(found).split())
    shape = BatchShape.assumed(config, deep())
    refusal = change_that_fits(config, deep(), round(limit / 0.95), torch.bfloat16, H100, shape, now)
    assert refusal.settings == found.change.settings


def test_a_cpu_is_never_told_to_copy_to_its_own_memory(monkeypatch):
    monkeypatch.setattr("qlora_tool.memory.plan.options.BATCH_SIZES", ())
    monkeypatch.setattr("qlora_tool.memory.plan.search.SHORTEST", 256)
    monkeypatch.setattr("qlora_tool.memory.plan.options.SHORTEST", 256)
    found = plan(asked(), tiny(max_position_embeddings=256), MIB, torch.float32, None)
    shown = {key for option in found.options for key in option.settings}
    assert "training.offload_boundaries" not in shown | set(found.change.settings if found.change else {})


def test_what_takes_less_is_shown_with_what_it_costs(monkeypatch, asked_alone):
    """Not what does nothing for this run: 1024 tokens are one tile."""
    savings = [{"training.tiled_mlp": True}, {"training.offload_boundaries": True}, {"model.embeddings": "int8"}]
    monkeypatch.setattr("qlora_tool.memory.plan.options.ALTERNATIVES", {"savings": savings})
    config, sizes = asked(**ON_CARD | {"training.per_device_train_batch_size": 4}), deep(6)
    sizes.max_position_embeddings, sizes.vocab_size = 256, 512
    found = plan(config, sizes, 10**10, torch.bfloat16, H100, confirm=False)
    assert [option.settings for option in found.options if option.group == "savings"] == savings[1:]
    lines = [line.rstrip().split("  ") for line in printed(found).splitlines()]
    costs = {cells[0]: cells[-1].strip() for cells in lines if cells[0].startswith(("off", "emb", "til"))}
    assert costs == {"offload_boundaries=true": "copies to and from the host", "embeddings=int8": "rounded to 8 bits"}
