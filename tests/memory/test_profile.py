"""What `profile` asks of a model's folder and of a device, and what it tells of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from tiny_models import tiny_config, write_tiny

from qlora_tool.build.open import open_model
from qlora_tool.config import Config, with_values
from qlora_tool.errors import UserError
from qlora_tool.memory.allocator import target as target_module
from qlora_tool.memory.allocator.available import budget_here
from qlora_tool.memory.allocator.calibrate import Calibration
from qlora_tool.memory.allocator.cards import Budget, find_card
from qlora_tool.memory.allocator.target import CudaTarget
from qlora_tool.memory.breakdown import Breakdown
from qlora_tool.memory.profile import (
    Prediction,
    compute_dtype_on,
    model_config_of,
    profile,
    refuse_small_budget,
    unquantized_bytes,
)
from qlora_tool.memory.show.legend import report_rows
from qlora_tool.memory.trace import measure_cuda
from qlora_tool.memory.trace.extrapolate import estimate_peak
from qlora_tool.memory.trace.predict import BatchShape, predict


def write_config(folder: Path, family: str = "llama", without: tuple[str, ...] = (), **changes) -> Path:
    """A folder with nothing in it but the `config.json` of a tiny model."""
    tiny_config(family, **changes).save_pretrained(folder)
    file = folder / "config.json"
    values = {key: value for key, value in json.loads(file.read_text()).items() if key not in without}
    file.write_text(json.dumps(values))
    return folder


def run_config(folder: Path, **values) -> Config:
    """A run in fp32 over 2 rows of 16 tokens."""
    return with_values(Config(), {
        "model.name_or_path": str(folder), "model.compute_dtype": "float32", "adapter.r": 4, "data.max_length": 16,
        "training.per_device_train_batch_size": 2, "training.gradient_checkpointing": True,
    } | values)  # fmt: skip


@pytest.mark.parametrize(
    ("family", "without", "named"),
    [
        ("llama", ("hidden_size",), "no hidden_size in it"),
        ("llama", ("num_hidden_layers", "vocab_size"), "no num_hidden_layers, vocab_size in it"),
        ("gpt2", ("n_layer",), "no num_hidden_layers in it"),
        ("bloom", ("n_head", "hidden_size"), "no hidden_size, num_attention_heads in it"),
    ],
)
def test_sizes_that_transformers_would_make_up(tmp_path: Path, family: str, without: tuple[str, ...], named: str):
    folder = write_config(tmp_path / "m", family, without)
    with pytest.raises(UserError) as failure:
        model_config_of(run_config(folder))
    assert len(failure.value.lines) == 1
    assert f"{folder / 'config.json'}: {named}" in failure.value.lines[0]


@pytest.mark.parametrize("family", ["gpt2", "bloom", "falcon", "opt", "gpt_neo", "mpt", "mamba", "mixtral"])
def test_sizes_under_a_familys_own_names(tmp_path: Path, family: str):
    folder = write_config(tmp_path / "m", family)
    found = model_config_of(run_config(folder))
    assert (found.hidden_size, found.num_hidden_layers, found.vocab_size) == (64, 2, 131)


def test_sizes_that_were_named_otherwise_once(tmp_path: Path):
    """bigscience/bloom-560m has its width as `n_embed`."""
    (tmp_path / "config.json").write_text(json.dumps(
        {"model_type": "bloom", "n_embed": 64, "n_layer": 2, "num_attention_heads": 4, "vocab_size": 131}
    ))  # fmt: skip
    assert model_config_of(run_config(tmp_path)).hidden_size == 64


def test_a_text_model_within_another_may_leave_sizes_out(tmp_path: Path):
    """google/gemma-3-4b-it says neither its vocabulary nor its heads."""
    text = {"model_type": "gemma3_text", "hidden_size": 64, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    assert model_config_of(run_config(tmp_path)).get_text_config().hidden_size == 64


@pytest.mark.parametrize(
    ("family", "dtype", "compute"),
    [
        ("llama", torch.bfloat16, "float32"),
        ("llama", torch.float32, "float32"),
        ("llama-tied", torch.float32, "bfloat16"),
        ("gpt2", torch.bfloat16, "float32"),
        ("mixtral", torch.bfloat16, "bfloat16"),
    ],
)
def test_what_is_unquantized_is_what_the_loader_leaves_so(
    tmp_path: Path, family: str, dtype: torch.dtype, compute: str
):
    folder = write_tiny(family, tmp_path / "m", dtype=dtype)
    config = run_config(folder, **{"model.compute_dtype": compute, "model.device": "cpu"})
    found = unquantized_bytes(config, model_config_of(config), getattr(torch, compute))
    assert found == open_model(config.model).unquantized_bytes()
    int8 = with_values(config, {"model.embeddings": "int8"})
    assert unquantized_bytes(int8, model_config_of(int8), getattr(torch, compute)) == {
        name: size for name, size in found.items()
        if name not in ("model.embed_tokens.weight", "transformer.wte.weight", "lm_head.weight")
    }  # fmt: skip


def test_nothing_is_named_where_nothing_is_to_be_quantized(tmp_path: Path):
    config = run_config(write_config(tmp_path), **{"model.quantization": "none"})
    assert unquantized_bytes(config, model_config_of(config), torch.float32) == {}


def test_a_budget_below_the_frozen_weights(tmp_path: Path):
    """By hand: 2 layers of 36864 weights in 4 bits with a scale of 4 bytes for 64, and the rest in fp32.

    A layer: q and o of 64 × 64, k and v of 32 × 64, three of 64 × 128. Embeddings and head are 131 × 64 each, five
    norms have 64, the rotary frequencies (and a copy of them) 8.
    """
    folder = write_config(tmp_path, dtype="float32")
    profiled = profile(run_config(folder, **{"model.double_quant": False}), "cpu")
    assert 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128 == 36864
    quantized = 2 * 36864
    expected = quantized // 2 + 4 * quantized // 64 + 4 * (2 * 131 * 64 + 5 * 64 + 2 * 8)
    tables = 2 * 1024  # at most: the quantization's own table of 16 values, for each weight
    refuse_small_budget(profiled, expected + tables)
    with pytest.raises(UserError) as failure:
        refuse_small_budget(profiled, expected - 1, "toy")
    assert len(failure.value.lines) == 1
    assert "MiB usable (toy), but the base's weights" in failure.value.lines[0]
    assert "weights (nf4) alone take" in failure.value.lines[0]
    assert "model.quantization" not in failure.value.lines[0]


def test_weights_that_could_be_smaller(tmp_path: Path):
    profiled = profile(run_config(write_config(tmp_path), **{"model.quantization": "none"}), "cuda")
    with pytest.raises(UserError, match=r"weights \(none\).* and the CUDA context 0.58 GiB.*model.quantization: nf4"):
        refuse_small_budget(profiled, 450_000_000)


def test_a_card_without_bf16_computes_in_fp16():
    config = Config()
    assert compute_dtype_on(config, "cuda", find_card("t4")) is torch.float16
    assert compute_dtype_on(config, "cuda", find_card("rtx-4090")) is torch.bfloat16
    assert compute_dtype_on(config, "cuda") is torch.bfloat16
    asked = with_values(config, {"model.compute_dtype": "float32"})
    assert compute_dtype_on(asked, "cuda", find_card("t4")) is torch.float32


HERE = Calibration("NVIDIA H100 80GB HBM3", 512_000_000, 1_000_000, 2_000_000)


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch):
    """As if this machine had a calibrated H100."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: HERE.device_name)
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    monkeypatch.setattr(target_module, "cached_calibration", lambda name: HERE if name == HERE.device_name else None)


def test_the_card_that_is_here_is_predicted_for_with_what_was_measured_on_it(h100):
    here = CudaTarget((9, 0), HERE, False, tensor_tflops=find_card("h100").tensor_tflops, here=True,
                      multiprocessors=132)  # fmt: skip
    assert CudaTarget.of(None) == CudaTarget.of(find_card("h100")) == here and here.tensor_tflops > 500
    assert CudaTarget.of(find_card("rtx-3090")) == CudaTarget(
        (8, 6), None, False, tensor_tflops=71.2, multiprocessors=82)  # fmt: skip


def test_a_plan_without_a_size_is_for_what_is_here(h100, monkeypatch: pytest.MonkeyPatch):
    """The card's free memory and this process's own context; others' memory is theirs. On a CPU what is available."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (60 * 10**9, 85 * 10**9))
    assert budget_here("cuda") == Budget(60 * 10**9 + HERE.context_bytes, f"what {HERE.device_name} has free", False)
    assert 10**8 < budget_here("cpu").bytes < psutil.virtual_memory().total
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert budget_here("cuda") is None


def test_a_card_that_is_not_here(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert CudaTarget.of(find_card("t4")) == CudaTarget((7, 5), None, False, tensor_tflops=65)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64,expandable_segments:True")
    assert CudaTarget.of(None) == CudaTarget((8, 9), None, True, assumed=True)


def test_calibration_and_optimizer_reach_the_prediction(tmp_path: Path):
    folder = write_config(tmp_path, hidden_size=512, intermediate_size=1024)
    config = run_config(folder, **{"training.optim": "paged_adamw_8bit", "adapter.r": 256})
    sizes = model_config_of(config)
    shape = BatchShape.assumed(config, sizes)
    trace = predict(config, sizes, shape, torch.bfloat16)
    plain = Prediction.of(trace, CudaTarget((9, 0), None, False))
    weights = plain.breakdown.at_peak["adapter_weights"] // 2
    # 16 bits beside each weight and a table of signed and of unsigned 8-bit values; paged moments are elsewhere, but
    # not those of tensors below 100,000 weights.
    state = plain.breakdown.at_peak["optimizer_state"]
    assert 2 * weights < state < 3 * weights
    resident = with_values(config, {"training.optim": "adamw_8bit"})
    whole = Prediction.of(predict(resident, sizes, shape, torch.bfloat16), None)
    assert 4 * weights < whole.breakdown.at_peak["optimizer_state"] < 4.1 * weights
    assert any(line.startswith("the CUDA context, 0.84 GiB") for line in plain.estimated)
    measured = Prediction.of(trace, CudaTarget((9, 0), HERE, False))
    assert measured.breakdown.context_bytes == HERE.context_bytes
    assert "the CUDA context" not in str(measured.estimated)
    assert measured.breakdown.at_peak["framework"] < plain.breakdown.at_peak["framework"]  # 3 MB for 64 MiB


def test_measuring_on_a_card_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--measure --device cuda: PyTorch sees no CUDA device"):
        profile(run_config(write_config(tmp_path)), "cuda", measure=True)


def test_a_measurement_on_a_card_stands_beside_the_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, h100):
    config = run_config(write_config(tmp_path))
    seen = profile(config, "cuda").report.predicted
    answer = measure_cuda.CudaMeasurement("toy", copy.deepcopy(seen), {})
    monkeypatch.setattr(measure_cuda, "measure_on_cuda", lambda *_: answer)
    profiled = profile(config, "cuda", measure=True)
    assert profiled.report.measured == seen
    assert profiled.allocator_peak == seen.peak_bytes
    assert profiled.report.to_json()["measured"]["reserved_bytes"] == seen.reserved_bytes > 0


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("where", ["host", "disk"])
def test_streamed_weights_are_two_buffers_and_what_lies_elsewhere(tmp_path: Path, device: str, where: str):
    """Of six equal layers two are on the device; the others' bytes are counted beside the sum, in JSON and table."""
    folder = write_config(tmp_path / "m", num_hidden_layers=6, hidden_size=128, intermediate_size=256)
    config = run_config(folder)
    resident, found = (profile(with_values(config, {"model.weights": weights}), device).report
                       for weights in ("resident", where))  # fmt: skip
    assert "elsewhere" not in resident.to_json()["predicted"]
    if (device, where) == ("cpu", "host"):  # where it is resident
        assert found.predicted == resident.predicted
        return
    parts = resident.predicted.at_peak
    layers = parts["base_weights"] + parts["quantization_state"]
    elsewhere = found.to_json()["predicted"]["elsewhere"]
    lies, other = elsewhere[f"{where}_bytes"], elsewhere["disk_bytes" if where == "host" else "host_bytes"]
    buffers = found.predicted.at_peak["base_weights"]
    tables = 7 * 6 * (4 * 272 + 256 + 3 * 64)  # at most, of a weight in a file
    offsets = found.predicted.at_peak["quantization_state"]  # a number a weight, in blocks of 512 bytes on a card
    assert layers - 7 * 6 * 512 * 4 <= lies <= layers + tables and offsets <= 7 * 6 * 512
    assert 2 * lies / 6 <= buffers <= 2 * (lies / 6 + 3 * 4096)
    # From the disk by way of two buffers as large, in host memory.
    assert other == pytest.approx(buffers, abs=1024) if (device, where) == ("cuda", "disk") else other == 0
    assert Breakdown.from_json(found.predicted.to_json()) == found.predicted
    said = "in host memory" if where == "host" else "on the disk"
    rows = {row.name: row.sizes["predicted"] for section in report_rows(found) for row in section}
    assert rows[f"streamed, {said}"] == lies


@pytest.mark.parametrize("where", ["host", "disk"])
def test_layers_that_stay_are_predicted(tmp_path: Path, where: str):
    """Each of the first layers that stay adds its bytes to the device and takes them from elsewhere; the estimate from
    shallow models says the same."""
    folder = write_config(tmp_path / "m", num_hidden_layers=8, hidden_size=128, intermediate_size=256)
    config = run_config(folder, **{"model.weights": where})
    found = {}
    for stay in (0, 4):
        staying = with_values(config, {"model.resident_layers": stay})
        found[stay] = profile(staying, "cuda").report.predicted
        model_config = model_config_of(staying)
        shape, target = BatchShape.assumed(staying, model_config), CudaTarget.of(None)
        estimated = estimate_peak(staying, model_config, shape, torch.float32, target)
        assert estimated.peak_bytes == pytest.approx(found[stay].peak_bytes, rel=0.01)
    left = sum(found[4].elsewhere.values()) - (where == "disk") * found[4].elsewhere["host_bytes"]
    all_of_them = sum(found[0].elsewhere.values()) - (where == "disk") * found[0].elsewhere["host_bytes"]
    assert left == pytest.approx(all_of_them / 2, rel=0.01)
    assert found[4].peak_bytes - found[0].peak_bytes == pytest.approx(left, rel=0.1)
