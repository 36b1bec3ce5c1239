"""What a plan says that streamed weights cost, from bytes and operations that it counts, and from rates."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from tiny_models import tiny_config
from tiny_runs import run_config, write_model, write_rows
from transformers import AutoConfig

from qlora_tool.build.setup import Setup
from qlora_tool.config import Config, with_values
from qlora_tool.data.batches import collate
from qlora_tool.memory.allocator.target import CudaTarget
from qlora_tool.memory.plan import streaming
from qlora_tool.memory.plan.result import Option, Plan
from qlora_tool.memory.plan.search import Search
from qlora_tool.memory.plan.streaming import Rates, Streaming
from qlora_tool.memory.show.plan_table import render_plan
from qlora_tool.memory.trace.extrapolate import estimate_peak, timeline_on
from qlora_tool.memory.trace.flops import flops_of_step
from qlora_tool.memory.trace.predict import STEPS, BatchShape, predict
from qlora_tool.model.streamed_base import disk_of
from qlora_tool.ops.bandwidths import Bandwidths
from qlora_tool.training.optimizers import make_optimizer, parameter_groups
from qlora_tool.training.prepare import prepare_data
from qlora_tool.training.step import StepSettings, train_step
from qlora_tool.weights.schedule import Schedule, brought_in_a_step

SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 32768, "num_hidden_layers": 6,
}  # fmt: skip
CARD = CudaTarget((8, 9), None, False, tensor_tflops=100.0)


def model(**changes):
    return AutoConfig.for_model("llama", **(SIZES | changes))


def settings(**values) -> Config:
    return with_values(Config(), {"training.gradient_checkpointing": True, "model.weights": "disk", **values})


@pytest.mark.parametrize("values", [
    {}, {"model.resident_layers": 2}, {"training.gradient_checkpointing": False},
    {"training.gradient_accumulation_steps": 4}, {"model.quantization": "int8"},
], ids=lambda values: ",".join(f"{key}={value}" for key, value in values.items()) or "plain")  # fmt: skip
def test_bytes_and_operations_are_those_of_the_whole_model(values):
    config, shape = settings(**values), BatchShape.full(2, 96)
    found = estimate_peak(config, model(), shape, torch.float32, None)
    trace = predict(config, model(), shape, torch.float32)
    assert found.layer_bytes == trace.layer_bytes and len(found.layer_bytes) == 6 - config.model.resident_layers
    assert found.flops == flops_of_step(trace, STEPS) // min(2, config.training.gradient_accumulation_steps)


@pytest.mark.parametrize("resident", [0, 1, 2, 4])
@pytest.mark.parametrize("where", ["host", "disk"])
def test_layers_of_two_sizes_keep_their_sizes(where, resident):
    """Dense layers first, which stay, then experts, of which each weighs twice as much."""
    model_config = tiny_config("deepseek_v3", num_hidden_layers=9, first_k_dense_replace=2)
    config = settings(**{"model.weights": where, "model.resident_layers": resident})
    shape, target = BatchShape.full(1, 48), CARD
    found = estimate_peak(config, model_config, shape, torch.bfloat16, target)
    trace = predict(config, model_config, shape, torch.bfloat16, target=target.device)
    assert found.layer_bytes == trace.layer_bytes and len(set(found.layer_bytes)) == 1 + (resident < 2)
    whole = timeline_on(trace, target).breakdown().peak_bytes
    assert found.peak_bytes == pytest.approx(whole, rel=0.01)


@pytest.mark.parametrize("sizes", [(), (5,), (5, 7), (5, 7, 11), (5, 7, 11, 13), tuple(range(1, 33))])
def test_what_a_step_brings_is_what_the_schedule_copies(sizes):
    """In a step after the first, which fills the buffers."""
    copied = []

    class Copier:
        used = ready = staticmethod(lambda _: None)
        copy = staticmethod(lambda part, _: copied.append(sizes[part]))

    schedule = Schedule(len(sizes), Copier())
    for _ in range(3):
        copied.clear()
        for backward in (False, True):
            for part in range(len(sizes))[:: -1 if backward else 1]:
                schedule.ask(part, backward)
    assert sum(copied) == brought_in_a_step(sizes)


def test_what_a_run_reads_is_what_the_plan_says(tmp_path):
    """Steps of a whole run, but for what a weight has beside codes and scales in the file, 1.4 kB, and whole pages."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 5}
    base, rows = write_model(tmp_path / "model", **sizes), write_rows(tmp_path / "rows.jsonl")
    config = run_config(base, rows, tmp_path / "run", {"model.weights": "disk"})
    setup = Setup.of(config)
    data, setup = prepare_data(setup)
    built = setup.build()
    batch = collate([[data.train.examples[0]]], pad_token_id=data.pad_token_id, packing=False)
    optimizer = make_optimizer(config.training, parameter_groups(built.adapters))
    disk, read = disk_of(built.model.module), []
    for _ in range(3):
        train_step(built.model, optimizer, [batch], StepSettings.of(config.training), 1e-3)
        read.append(disk.read_bytes)
    search = Search.of_run(config, setup.model_config, 10**9, torch.float32, None, BatchShape.of(batch))
    said = search.streaming({}).step_bytes
    assert said <= read[2] - read[1] <= 1.05 * said


def test_the_operations_of_a_step():
    """By hand: each weight takes 2 operations a token forward, again in backward for the gradient of its input (not of
    the first layer's q, k and v, below which nothing wants one), and once more where it is recomputed; LoRA's, each of
    A and B, 2 more of them for its own gradient; the output layer 4; attention 2·T²·heads·size forward and again."""
    tokens, layers, rank = 96, SIZES["num_hidden_layers"], 16
    config = settings(**{"adapter.r": rank, "model.weights": "resident"})
    found = flops_of_step(predict(config, model(), BatchShape.full(1, tokens), torch.float32), STEPS)
    shapes = {"q": (64, 64), "k": (32, 64), "v": (32, 64), "o": (64, 64), "gate": (128, 64), "up": (128, 64),
              "down": (64, 128)}  # fmt: skip
    frozen = sum(out * width for out, width in shapes.values())
    lora = sum(rank * (out + width) for out, width in shapes.values())
    attention = 2 * tokens * tokens * 64
    most = layers * (2 * tokens * (3 * frozen + 4 * lora) + 2 * attention) + 2 * 2 * (tokens - 1) * 512 * 64
    assert 0.9 * most < found <= most


def test_a_long_batch_is_estimated_from_shorter_ones():
    """Its bytes are the same, its operations at least in proportion."""
    config = settings()
    short, long = (estimate_peak(config, model(), BatchShape.full(1, length), torch.float32, None)
                   for length in (8192, 32768))  # fmt: skip
    assert long.layer_bytes == short.layer_bytes and long.flops >= 4 * short.flops


def test_seconds_are_of_a_step(monkeypatch):
    monkeypatch.setattr(Rates, "of", classmethod(lambda *_: cls_rates))
    cls_rates = Rates(host=1e9, disk=1e8, products=1e12)
    shape, found = BatchShape.full(2, 96), {}
    for accumulated in (1, 3):
        config = settings(**{"model.weights": "resident", "training.gradient_accumulation_steps": accumulated})
        search = Search.of_run(config, model(), 10**9, torch.bfloat16, CARD, shape)
        assert search.streaming({}) is None
        host, disk = (search.streaming({"model.weights": where}) for where in ("host", "disk"))
        assert (host.source, disk.source) == ("host", "disk")
        layer = host.step_bytes / (8 * accumulated)  # six layers, of which each pass brings four
        assert layer == search._estimate({"model.weights": "host"}).layer_bytes[0]
        assert host.seconds == pytest.approx(host.step_bytes / 1e9) and disk.seconds == disk.step_bytes / 1e8
        found[accumulated] = host.product_seconds
    assert found[3] == pytest.approx(3 * found[1]) and found[1] > 0


def test_rates_are_those_of_what_is_here(monkeypatch):
    """Of a card that is elsewhere the maker's speed alone is known: neither this disk nor this bus is its."""
    measured = Bandwidths("2026-01-01T00:00+00:00", disk=2e9, host=9e9, cards={"cuda:0": 25e9})
    monkeypatch.setattr(streaming, "known_bandwidths", lambda measure: measured)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert Rates.of(CARD, torch.bfloat16) == Rates(0.0, 0.0, 1e14)
    assert Rates.of(replace(CARD, here=True), torch.bfloat16) == Rates(25e9, 2e9, 1e14)
    measured.cards["cuda:0"] = 1e9  # a disk is no faster than the bus behind it
    assert Rates.of(replace(CARD, here=True, tensor_tflops=None), torch.bfloat16) == Rates(1e9, 1e9, 0.0)
    cpu = Rates.of(None, torch.float32)
    assert (cpu.host, cpu.disk) == (0.0, 2e9) and cpu.products > 0


def test_what_is_not_known_is_not_said():
    cost = Streaming("host", 68_900_000_000, 55.2e9, 2.1)
    assert str(cost) == "68.9 GB from the host in each step, 1.2 s at 55.2 GB/s; products take 2.1 s or more"
    unmeasured = replace(cost, rate=0.0)
    assert str(unmeasured) == "68.9 GB from the host in each step; products take 2.1 s or more"
    assert str(replace(cost, product_seconds=0.0, rate=1e9)).endswith("in each step, 69 s at 1.0 GB/s")
    assert str(Streaming("disk", 20_400_000, 0.0, 0.0)) == "20.4 MB from the disk in each step"


def test_the_plan_says_it_in_its_table_and_its_answer():
    cost = Streaming("disk", 6_300_000_000, 1.3e9, 20.4)
    option = Option("savings", {"model.weights": "disk"}, 1, 512, 10**9, True, 1.0, streaming=cost)
    asked = Option("asked", {}, 1, 512, 10**10, False, 1.0, True)
    plan, stream = Plan(CARD, 2 * 10**9, 0.0, asked, (option,)), io.StringIO()
    render_plan(plan, Console(file=stream, width=200))
    assert str(cost) in stream.getvalue()
    assert plan.to_json()["options"][0]["streaming"]["step_bytes"] == 6_300_000_000
    # What is streamed anyway is told once, in the headline.
    asked, stream = replace(asked, streaming=cost), io.StringIO()
    option = replace(option, settings={"adapter.r": 8})
    render_plan(replace(plan, asked=asked, options=(option,)), Console(file=stream, width=200))
    assert stream.getvalue().count("6.3 GB from the disk") == 1
