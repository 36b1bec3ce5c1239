"""`gradient_checkpointing: auto`: the most that a budget allows is kept, and no more than that."""

from __future__ import annotations

import functools
import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cached_traces import once
from click.testing import CliRunner
from tiny_models import tiny_config, write_tiny
from tiny_runs import adapter_bytes, run_config, write_model, write_rows

from qlora_tool.build.setup import Setup
from qlora_tool.cli import main
from qlora_tool.config import Config, config_to_yaml, load_config, with_values
from qlora_tool.files.cache import cache_folder
from qlora_tool.memory import profile as profiling
from qlora_tool.memory.allocator.cards import Budget, parse_device_memory
from qlora_tool.memory.allocator.target import CudaTarget
from qlora_tool.memory.plan import budget
from qlora_tool.memory.plan import cure as curing
from qlora_tool.memory.plan.budget import BudgetTooSmall, Choice, choose, choose_for_run
from qlora_tool.memory.plan.limit import limit_on
from qlora_tool.memory.profile import model_config_of
from qlora_tool.memory.profile_run import profile_run
from qlora_tool.memory.trace import recomputation_cost
from qlora_tool.memory.trace.classify import timeline
from qlora_tool.memory.trace.flops import flops_of
from qlora_tool.memory.trace.measure import measure_peak
from qlora_tool.memory.trace.predict import BatchShape, predict
from qlora_tool.memory.trace.recomputation_cost import Cost, Costs, Shallow, upgrades
from qlora_tool.memory.trace.tracer import Call
from qlora_tool.model.checkpointing import ALL_RECOMPUTED as ALL
from qlora_tool.model.checkpointing import NOTHING_RECOMPUTED as NONE
from qlora_tool.model.checkpointing import Recomputation
from qlora_tool.sizes import memory_size

MB = 1_000_000
LAYERS = 3  # a first, a last, and one between them
SHAPE = BatchShape.full(4, 256)
BOTH, ATTENTION, MLP = ("self_attn", "mlp"), ("self_attn",), ("mlp",)


_costs: dict[tuple, Costs] = {}
_predict = once(predict)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices are kept in a place of their own; what they are made from is found out once for all tests."""
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(tmp_path / "cache"))
    find_out = Costs.of

    def costs_of(config, model_config, shape, dtype, target=None, **made):
        key = config.adapter.model_dump_json(), model_config.to_json_string(), shape, target
        if key not in _costs:
            _costs[key] = find_out(config, model_config, shape, dtype, target)
        return _costs[key]

    monkeypatch.setattr(Costs, "of", costs_of)
    monkeypatch.setattr(budget, "predict_deep", _predict)


def llama(layers: int = LAYERS):
    return tiny_config("llama", num_hidden_layers=layers, max_position_embeddings=512)


def auto(**values) -> Config:
    return with_values(Config(), {"adapter.r": 8, "training.gradient_checkpointing": "auto", **values})


def chosen(size: int, **values) -> Choice:
    return choose(auto(**values), llama(), SHAPE, torch.float32, size)


def measured(layers) -> int:
    return _measured(Recomputation(tuple(layers)))


@functools.cache
def _measured(recomputation: Recomputation) -> int:
    return measure_peak(auto(), llama(), SHAPE, torch.float32, recomputation)


@pytest.fixture(scope="module")
def extremes() -> tuple[int, int]:
    """Measured with everything recomputed, and with nothing."""
    return measured([ALL] * LAYERS), measured([NONE] * LAYERS)


def between(extremes: tuple[int, int], share: float) -> int:
    least, most = extremes
    return int(least + share * (most - least))


@pytest.fixture
def costs() -> Costs:
    return Costs.of(auto(), llama(), SHAPE, torch.float32)


# ------------------------------------------------------------------------------------------------- what layers cost


def test_what_is_kept_falls_as_more_is_recomputed():
    policies = [[NONE] * 3, [MLP, NONE, NONE], [MLP] * 3, [ALL, MLP, MLP], [ALL, ALL, MLP], [ALL] * 3]
    peaks = [measured(policy) for policy in policies]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks[:-1])) == len(peaks) - 1
    # The last layer's attention costs nothing: it is gone before another layer is computed again.
    assert peaks[-2] == pytest.approx(peaks[-1], rel=1e-3)


def test_kept_bytes_are_what_each_layer_adds_to_the_measured_peak(costs: Costs):
    """A layer more that keeps this or that, somewhere in the middle."""
    kept_bytes = {cost.recomputed: cost.kept_bytes for cost in costs.layers[1]}
    assert kept_bytes.keys() == {NONE, ATTENTION, MLP, BOTH, ALL}
    for choice in (ATTENTION, MLP, BOTH, ALL):
        less = measured([NONE] * 3) - measured([NONE, choice, NONE])
        assert less == pytest.approx(kept_bytes[NONE] - kept_bytes[choice], rel=0.01)


def test_flops_of_what_is_recomputed(costs: Costs):
    """llama of 64 × 128 with 4 heads and 2 key heads of 16: products and attention, by hand."""
    tokens, r = SHAPE.rows * SHAPE.length, 8

    def linear(inner: int, outer: int, base: int = 1) -> int:
        return 2 * tokens * (base * inner * outer + r * inner)  # the base product, x·Aᵀ

    def branch(outer: int) -> int:
        return 2 * tokens * r * outer  # (x·Aᵀ)·Bᵀ

    attention = 2 * 2 * SHAPE.rows * 4 * SHAPE.length * SHAPE.length * 16 // 2
    qkv = linear(64, 64) + 2 * linear(64, 32) + branch(64 + 2 * 32)
    gate_up = 2 * (linear(64, 128) + branch(128))
    found = {cost.recomputed: cost.flops for cost in costs.layers[2]}
    # What a child ends in is not recomputed, but for its x·Aᵀ where that is kept for backward.
    rest = {"o": linear(64, 64, base=0), "down": linear(128, 64, base=0)}
    assert found[NONE] == 0
    assert found[ATTENTION] in (qkv + attention, qkv + attention + rest["o"], qkv + attention + rest["o"] + branch(64))
    assert found[MLP] in (gate_up, gate_up + rest["down"], gate_up + rest["down"] + branch(64))
    assert found[BOTH] == found[ATTENTION] + found[MLP]
    assert found[ALL] - found[BOTH] in (2 * tokens * 64 * 64, 2 * tokens * 64 * 64 + branch(64))  # o_proj


@pytest.mark.parametrize(
    ("operator", "shapes", "expected"),
    [
        ("aten::mm", ((3, 5), (5, 7)), 2 * 3 * 5 * 7),
        ("aten::addmm", ((7,), (3, 5), (5, 7)), 2 * 3 * 5 * 7),
        ("aten::bmm", ((2, 3, 5), (2, 5, 7)), 2 * 2 * 3 * 5 * 7),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", ((2, 4, 6, 8), (2, 4, 6, 8), (2, 4, 6, 8)),
         2 * 2 * (2 * 4 * 6 * 6 * 8) // 2),
        ("qlora_tool::matmul", ((3, 5), (5, 7)), 2 * 3 * 5 * 7),
        ("qlora_tool::matmul_add", ((3, 7), (3, 5), (5, 7)), 2 * 3 * 5 * 7),
        ("torch_attn::_varlen_attn", ((12, 4, 8), (12, 2, 8), (12, 2, 8), (3,), (3,)),  # two segments of 6 tokens
         2 * 2 * (2 * 4 * 6 * 6 * 8) // 2),
        ("aten::sort", ((3, 5),), 0),
    ],
)  # fmt: skip
def test_flops_of_one_call(operator, shapes, expected):
    assert flops_of(Call(0, operator, "backward", "", True, shapes, 4, ())) == expected


def test_the_dearest_recomputation_per_byte_is_kept_first():
    """By hand. From A to D saves 8 a byte, which B (4 a byte, then 12) lies below; C is worse than B at more bytes."""
    a, b, c, d = Cost(ALL, 10, 100), Cost(MLP, 15, 80), Cost(ATTENTION, 18, 90), Cost(NONE, 20, 20)
    free = Cost(BOTH, 10, 70)
    start, steps = upgrades([[a, b, c, d], [a, b, c, d], [Cost(ALL, 10, 100), free, Cost(NONE, 60, 0)]])
    assert start == [a, a, free]  # as few bytes as all of it, and less to do
    assert steps == [(1, d), (0, d), (2, Cost(NONE, 60, 0))]
    _, steps = upgrades([[a, Cost(MLP, 12, 60), d]])
    assert steps == [(0, Cost(MLP, 12, 60)), (0, d)]  # 20 a byte, then 5


# ------------------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_the_choice_stays_within_the_budget_and_nothing_more_would(share, extremes, costs: Costs):
    size = between(extremes, share)
    choice = chosen(size)
    layers = list(choice.recomputation.layers)
    found = _measured(choice.recomputation)
    assert found <= size
    assert choice.predicted.peak_bytes == pytest.approx(found, rel=0.01)
    by_choice = {cost.recomputed: cost.kept_bytes for cost in costs.layers[1]}
    assert size - found < by_choice[NONE] - by_choice[ALL]  # no layer more fits
    for number, recomputed in enumerate(layers):
        if share == 0.8 and recomputed != NONE:
            assert measured([*layers[:number], NONE, *layers[number + 1 :]]) > size


def test_a_budget_for_everything_recomputes_nothing(extremes):
    choice = chosen(2 * extremes[1])
    assert choice.recomputation == Recomputation((NONE,) * LAYERS)
    assert str(choice).startswith("gradient checkpointing: nothing recomputed; predicted peak ")


def test_weights_are_kept_for_backward_where_there_is_room_for_them(extremes):
    """What room the activations leave is taken for the weights of a layer, and only then."""

    def peak(recomputation: Recomputation) -> int:
        return timeline(_predict(auto(), llama(), SHAPE, torch.float32, recomputation)).peak_bytes

    kept = {}
    for share in (0.01, 0.3, 0.45, 0.8):
        choice = chosen(size := between(extremes, share))
        kept[share] = choice.recomputation.keeps_weights
        assert kept[share] == (peak(replace(choice.recomputation, keeps_weights=True)) <= size)
        assert choice.predicted.peak_bytes == peak(choice.recomputation)
        assert Choice.from_json(json.loads(json.dumps(choice.to_json()))) == choice
    assert set(kept.values()) == {True, False}, kept
    assert not chosen(between(extremes, 0.3), **{"model.quantization": "none"}).recomputation.keeps_weights


def test_a_budget_for_nothing_is_refused_with_what_it_takes_at_least(extremes):
    least = extremes[0]
    assert chosen(int(1.01 * least)).predicted.peak_bytes <= 1.01 * least
    said = r"takes at least .*, with everything recomputed \(batches of up to 4 × 256 tokens\): the limit is "
    with pytest.raises(BudgetTooSmall, match=said) as caught:
        chosen(int(0.2 * least))
    assert caught.value.least.needed_bytes == pytest.approx(least, rel=0.01)
    assert memory_size(caught.value.least.needed_bytes) in str(caught.value)
    assert caught.value.exit_code == 2


def test_layers_of_several_kinds():
    """A dense layer before the experts; then windows in every other layer."""
    arguments = auto(), tiny_config("deepseek_v3"), BatchShape.full(2, 64), torch.float32
    size = Costs.of(*arguments).whole.peak_bytes * 5 // 4
    choice = choose(*arguments, size)
    assert set(choice.recomputation.layers) not in ({NONE}, {ALL})
    assert choice.predicted.peak_bytes <= size
    assert measure_peak(*arguments, choice.recomputation) == pytest.approx(choice.predicted.peak_bytes, rel=0.02)
    for family, alike in (("deepseek_v3", [0, 1, 2, 2, 2, 2, 2]), ("gemma2", [0, 1, 2, 3, 2, 3, 2])):
        made = Shallow.of(auto(), tiny_config(family, num_hidden_layers=7), torch.float32)
        shallow, names, choices, found = made.model_config, made.names, made.choices, made.alike
        assert found == alike
        assert shallow.num_hidden_layers == len(names) == len(choices) == max(alike) + 1


def test_on_a_card_reserved_memory_and_context_count():
    target = CudaTarget((8, 9), None, False)
    arguments = auto(), llama(), SHAPE, torch.float32
    roomy = choose(*arguments, 10**10, target)
    assert set(roomy.recomputation.layers) == {NONE}
    size = roomy.predicted.needed_bytes - 1
    choice = choose(*arguments, size, target)
    assert choice.predicted.reserved_bytes + choice.predicted.context_bytes == choice.predicted.needed_bytes <= size
    assert set(choice.recomputation.layers) != {NONE}


def test_the_choice_is_made_once(monkeypatch, extremes):
    size = between(extremes, 0.3)
    first = chosen(size)

    def refuse(*_, **__):
        raise AssertionError("chosen again")

    monkeypatch.setattr(Costs, "of", refuse)
    assert chosen(size, **{"training.learning_rate": 1e-5}) == first
    for changed in ({"adapter.r": 4}, {"training.optim": "adamw_8bit"}, {"model.quantization": "int8"}):
        with pytest.raises(AssertionError, match="chosen again"):
            chosen(size, **changed)
    with pytest.raises(AssertionError, match="chosen again"):
        chosen(size + 1)
    [file] = (cache_folder() / "predictions").iterdir()
    file.write_text("{}")
    with pytest.raises(AssertionError, match="chosen again"):
        chosen(size)


def test_what_the_choice_was_confirmed_by_is_what_a_profile_shows(tmp_path, monkeypatch):
    """Predicted once; a second time the choice is known, and the prediction made again is the same to the byte."""
    write_tiny("llama", tmp_path / "model", num_hidden_layers=4)
    config = with_values(Config(), {"model.name_or_path": str(tmp_path / "model"), "data.max_length": 64})
    device = Budget(10**10, "enough", False)
    made = []
    monkeypatch.setattr(profiling, "predict_deep", lambda *run: made.append(run) or predict(*run))
    first = profile_run(config, "cuda", device)
    assert not made
    second = profile_run(config, "cuda", device)
    assert len(made) == 1
    assert first.report == second.report
    assert first.timelines["predicted"].totals.tolist() == second.timelines["predicted"].totals.tolist()


def test_limits():
    """The least of what there is, under one name; 5 % of a card stay free, and what is free is taken in steps."""
    asked, given = auto(**{"training.max_memory": "2GB"}), Budget(24 * 10**9, "24000000000B", False)
    assert limit_on(auto(), "cuda") is None
    for limit in (limit_on(asked, "cpu"), limit_on(asked, "cuda", free=10**12), limit_on(asked, "cuda", given)):
        assert (limit.bytes, limit.name) == (2 * 10**9, "training.max_memory")
    streams = with_values(asked, {"training.gradient_checkpointing": True})  # where the limit decides on the weights
    assert limit_on(streams, "cuda", given).name == "training.max_memory"
    fixed = with_values(streams, {"model.weights": "resident"})  # which no limit can change
    assert str(limit_on(fixed, "cuda", given)) == "21.23 GiB usable (95% of 22.35 GiB)"
    assert str(limit_on(fixed, "cpu", given)) == "the limit is 22.35 GiB"
    assert limit_on(auto(), "cuda", parse_device_memory("rtx-4090")).name == "95% of rtx-4090's 23.52 GiB"
    assert limit_on(auto(), "cuda", parse_device_memory("24GB")).name == "95% of the 23.04 GiB of a card of 24 GB"
    found = [limit_on(auto(), "cuda", free=free, steady=True) for free in (10**9, 10**9 + 10**7)]
    assert [limit.bytes for limit in found] == [9 * 10**8] * 2
    assert limit_on(auto(), "cuda", free=10**9).bytes == 95 * 10**7


# ------------------------------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Config:
    return run_config(model, write_rows(tmp_path / "rows.jsonl"), tmp_path / "run", {
        "training.max_steps": 2, "training.gradient_checkpointing": True, "data.packing": False,
    })  # fmt: skip


def cli(command: str, config: Config, *options: object):
    file = Path(config.training.output_dir).with_suffix(".yaml")
    file.write_text(config_to_yaml(config))
    return CliRunner().invoke(main, [command, str(file), *map(str, options)])


def test_a_run_within_its_budget(run: Config, tmp_path: Path):
    """It keeps what fits, says so, and trains the same adapter as one that recomputes everything."""
    assert cli("train", run).exit_code == 0
    report = json.loads((tmp_path / "run" / "memory.json").read_text())
    size = int(1.15 * report["predicted"]["peak_bytes"])
    asked = {"training.gradient_checkpointing": "auto", "training.max_memory": size}
    within = with_values(run, {**asked, "training.output_dir": str(tmp_path / "within")})
    result = cli("train", within)
    assert result.exit_code == 0, result.stderr
    assert "gradient checkpointing: " in result.stderr and "of 2 layers" in result.stderr
    assert adapter_bytes(tmp_path / "within") == adapter_bytes(tmp_path / "run")
    again = load_config(str(tmp_path / "within" / "config.yaml"))
    assert (again.training.gradient_checkpointing, again.training.max_memory) == ("auto", size)
    found = json.loads((tmp_path / "within" / "memory.json").read_text())
    assert report["predicted"]["peak_bytes"] < found["predicted"]["peak_bytes"] <= size
    assert found["measured"]["peak_bytes"] <= size


def test_a_run_that_its_budget_is_too_small_for(run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(curing, "SECONDS_FOR_A_CHANGE", -1)
    result = cli("train", with_values(run, {"training.gradient_checkpointing": "auto", "training.max_memory": "1kB"}))
    assert result.exit_code == 2
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "auto: this run takes at least " in line and "0.0 MiB usable (training.max_memory); `qlora" in line
    assert line.endswith(f"`qlora-tool profile-memory {tmp_path / 'run.yaml'} --device cpu --plan` shows what fits")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("shape", [
    pytest.param(SHAPE, marks=pytest.mark.slow, id="rows"), pytest.param(BatchShape.full(1, 256), id="one row"),
])  # fmt: skip
def test_a_refusal_names_the_change_that_makes_it_fit(run: Config, shape: BatchShape, monkeypatch: pytest.MonkeyPatch):
    """Whatever the batch is: at one row nobody is told to take fewer."""
    monkeypatch.setattr(curing, "SECONDS_FOR_A_CHANGE", 600)
    asked = {"training.gradient_checkpointing": "auto", "training.optim": "adamw_8bit"}
    with pytest.raises(BudgetTooSmall) as caught:
        choose_for_run(Setup.of(with_values(run, asked | {"training.max_memory": "1kB"})), shape)
    size = caught.value.least.needed_bytes - 50_000
    with pytest.raises(BudgetTooSmall) as caught:
        choose_for_run(Setup.of(with_values(run, asked | {"training.max_memory": size})), shape)
    line = str(caught.value)
    assert "usable (training.max_memory); --set " in line and " makes it fit, in " in line and "lower" not in line
    assert "model.embeddings=int8" in line or shape is SHAPE
    changed = load_config(run, re.findall(r"--set (\S+)", line) + [f"{k}={v}" for k, v in asked.items()])
    rows = changed.training.per_device_train_batch_size if shape is SHAPE else 1
    setup = Setup.of(with_values(changed, {"training.max_memory": size}))
    assert choose_for_run(setup, BatchShape.full(rows, changed.data.max_length)).predicted.needed_bytes <= size


def test_what_the_configuration_says_itself_is_not_chosen(run: Config):
    setup = Setup.of(run)
    for values in ({"training.max_memory": "1kB"}, {"training.gradient_checkpointing": "auto"}):  # no budget is known
        assert choose_for_run(replace(setup, config=with_values(run, values)), SHAPE) is None


def test_profile_memory_predicts_the_choice(run: Config, tmp_path: Path, monkeypatch):
    """Of full batches, within what the run may take."""
    monkeypatch.setattr(logging.getLogger("qlora_tool"), "propagate", True)
    asked = with_values(run, {"training.gradient_checkpointing": "auto", "training.max_memory": "50MB"})
    shape, policy = BatchShape.assumed(asked, model_config_of(asked)), Recomputation((NONE, ALL))

    def expected(recomputation: Recomputation):
        return timeline(_predict(asked, model_config_of(asked), shape, torch.float32, recomputation)).breakdown()

    assert expected(policy).peak_bytes > expected(Recomputation((ALL, ALL))).peak_bytes
    calls = []

    def choose(_config, _model_config, *arguments):
        calls.append(arguments)
        return Choice(policy, expected(policy), 50 * MB)

    monkeypatch.setattr(budget, "choose", choose)
    result = cli("profile-memory", asked, "--device", "cpu", "--json", file := tmp_path / "profile.json")
    assert result.exit_code == 0, result.stderr
    assert calls == [(shape, torch.float32, 50 * MB, None)]
    assert "gradient checkpointing: 1 of 2 layers" in result.stderr
    assert json.loads(file.read_text())["predicted"] == expected(policy).to_json()


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe", "opt"])
@pytest.mark.parametrize("values", [{}, {"adapter.method": "dora", "training.tiled_mlp": True},
                                    {"training.optimizer_in_backward": True, "training.max_grad_norm": 0.0}], ids=str)
def test_one_step_tells_what_the_second_would(family, values, monkeypatch):
    model, config = tiny_config(family), with_values(Config(), {"training.gradient_checkpointing": True} | values)
    run = config, model, BatchShape.full(2, 48), torch.float32
    found = Costs.of(*run)
    monkeypatch.setattr(recomputation_cost, "predict", lambda *case: predict(*case[:6]))
    both = Costs.of(*run)
    assert (found.layers, found.least, found.steps, found.turns) == (both.layers, both.least, both.steps, both.turns)
