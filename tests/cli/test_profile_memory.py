"""`qlora-tool profile-memory` on folders with a `config.json` and nothing else: what it shows, writes and refuses."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import pytest
import torch
import yaml
from cached_traces import once
from click.testing import CliRunner
from tiny_models import tiny_config

from qlora_tool import profile_memory
from qlora_tool.cli import main
from qlora_tool.config import Config
from qlora_tool.memory import profile
from qlora_tool.memory.allocator.cards import parse_device_memory
from qlora_tool.memory.breakdown import CATEGORIES, PHASES, MemoryReport
from qlora_tool.memory.plan.limit import limit_on, without_limit
from qlora_tool.ops.products import PYTORCH, use_products

_predict = once(profile.predict_deep)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a model's configuration in `m` and a run's in `run.yaml`, which commands run in. What they
    predict is traced once for each run."""
    monkeypatch.setattr(profile, "predict_deep", _predict)
    monkeypatch.setattr("qlora_tool.workers.count_for", lambda each: 1)  # others would have the table's whole contents
    use_products(PYTORCH)  # as in tests/memory/conftest.py
    tiny_config("llama", dtype="float32").save_pretrained(tmp_path / "m")
    values = {
        "model": {"name_or_path": "m", "compute_dtype": "float32"},
        "adapter": {"r": 4},
        "data": {"train": "there-is-no-such-file.jsonl", "max_length": 32},
        "training": {"per_device_train_batch_size": 2},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    use_products(None)


def run(*args: object):
    return CliRunner().invoke(main, ["profile-memory", "run.yaml", *(str(arg) for arg in args)])


def shown(*args: object) -> str:
    """What a command that succeeds prints, its widths of space made one."""
    result = run(*args)
    assert result.exit_code == 0, result.output
    assert "Traceback" not in result.output
    return re.sub(r" +", " ", result.stdout)


def refused(*args: object, code: int = 2) -> str:
    """The one line that a command fails with; nothing is on stdout."""
    result = run(*args)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def change_config(**values) -> None:
    """Change keys of the model's config.json; None takes one out."""
    file = Path("m/config.json")
    changed = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))


# ----------------------------------------------------------------------------------------------- what it shows


def test_a_cpu_from_the_configuration_alone(here: Path):
    (here / "out").mkdir()
    output = shown("--device", "cpu", "--json", "out/memory.json")
    assert sorted(path.name for path in (here / "m").iterdir()) == ["config.json"]
    written = json.loads((here / "out" / "memory.json").read_text())
    said = ["fits", "needed_bytes", "usable_bytes", "left_bytes", "change"]
    assert list(written) == ["schema", "device", "config", "predicted", "measured", *said]
    assert [written[key] for key in said] == [None, written["predicted"]["peak_bytes"], None, None, None]
    assert (written["schema"], written["device"], written["measured"]) == (1, "cpu", None)
    assert written["config"]["data"]["max_length"] == 32
    assert written["config"]["training"]["gradient_checkpointing"] is True
    predicted = written["predicted"]
    assert list(predicted["at_peak"]) == list(CATEGORIES)
    assert sum(predicted["at_peak"].values()) == predicted["peak_bytes"]
    assert sum(predicted["activations"].values()) == predicted["at_peak"]["activations"] > 0
    assert list(predicted["phase_peak_bytes"]) == list(PHASES)
    assert max(predicted["phase_peak_bytes"].values()) == predicted["peak_bytes"]
    assert predicted["reserved_bytes"] is predicted["context_bytes"] is None
    assert f"predicted: {predicted['peak_bytes'] / 2**20:.1f} MiB" in output
    assert "on cpu; 1 GiB is 2^30 bytes" in output
    assert "CUDA context" not in output
    assert "left unquantized" in output and "lm_head.weight" in output


def test_what_can_be_worked_out_by_hand(here: Path):
    """Two layers of 36864 weights, half a byte each; A and B of rank 4 on seven modules of each, in fp32."""
    shown("--device", "cpu", "--json", "memory.json")
    at_peak = json.loads((here / "memory.json").read_text())["predicted"]["at_peak"]
    assert at_peak["base_weights"] == 2 * 36864 // 2
    sides = 2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128)
    assert at_peak["adapter_weights"] == 2 * 4 * sides * 4


@pytest.mark.parametrize("stored", ["bfloat16", None])
def test_measured_beside_predicted(here: Path, stored: str | None):
    change_config(dtype=stored)
    output = shown("--device", "cpu", "--measure", "--json", "memory.json")
    report = MemoryReport.from_json(json.loads((here / "memory.json").read_text()))
    assert report.predicted.peak_bytes == pytest.approx(report.measured.peak_bytes, rel=0.01)
    for phase in ("forward", "backward", "optimizer"):  # while loading, quantizing takes what no prediction has
        found = report.predicted.phase_peak_bytes[phase]
        assert found == pytest.approx(report.measured.phase_peak_bytes[phase], rel=0.01)
    said = re.search(
        r"the allocator itself, without a tracer: ([\d.]+) MiB at the peak; predicted ([+-][\d.]+)%", output
    )
    assert float(said[1]) == pytest.approx(report.measured.peak_bytes / 2**20, abs=0.06)  # shown to a tenth
    assert abs(float(said[2])) <= 1
    assert "difference: predicted less measured" in output


@pytest.mark.parametrize(("file", "start"), [("out/step.png", b"\x89PNG"), ("out/step.html", b"<!doctype html>")])
def test_a_plot(here: Path, file: str, start: bytes):
    (here / "out").mkdir()
    shown("--device", "cpu", "--plot", file)
    content = (here / file).read_bytes()
    assert content[: len(start)].lower() == start.lower()
    assert len(content) > 10_000


def test_cuda_without_a_card(here: Path):
    output = shown("--json", "memory.json")
    written = json.loads((here / "memory.json").read_text())
    predicted = written["predicted"]
    assert written["device"] == "cuda"
    assert predicted["reserved_bytes"] >= predicted["peak_bytes"]
    assert predicted["reserved_bytes"] % 2**21 == 0  # segments are of 2 MiB and its multiples
    assert predicted["context_bytes"] > 100_000_000
    assert predicted["at_peak"]["framework"] > 8_000_000  # cuBLAS keeps a workspace
    assert "estimated, not measured: the CUDA context" in output


def test_the_configuration_may_ask_for_a_cpu(here: Path):
    assert "on cpu;" in shown("--set", "model.device=cpu")


def test_a_card_by_name(here: Path):
    output = shown("--device-memory", "RTX 4090")
    # 5 % of 23.52 GiB stay free
    assert re.search(r"predicted: yes, it fits: .* needed, 22\.34 GiB usable \(95% of rtx-4090's 23\.52 GiB\), "
                     r"2\d\.\d\d GiB left", " ".join(output.split()))  # fmt: skip
    assert "what the driver keeps" not in output


def test_a_card_by_the_size_it_is_sold_with(here: Path):
    output = shown("--device-memory", "24GB")
    assert "21.89 GiB usable (95% of the 23.04 GiB of a card of 24 GB)" in " ".join(output.split())
    assert "what the driver keeps of the card" in " ".join(output.split())  # wherever the line breaks
    assert "no card is named or here: compute capability 8.9 is assumed" in " ".join(output.split())
    assert output.count("--calibrate") == 1


@pytest.mark.parametrize("needed", [5 * 2**30, 7 * 2**30, 70 * 2**30, 74 * 2**30])
def test_without_a_size_the_smallest_usual_card_is_named(here: Path, needed: int):
    """The answer to what is to be typed is a yes, and that of the next smaller card a no."""
    said = without_limit(needed, "cuda")
    begins = f"{needed / 2**30:.2f} GiB needed, and no size was given to hold it against: "
    if needed == 74 * 2**30:
        assert said == f"{begins}a card of 80 GB, the largest that is usual, has less"
        return
    size = {5: 6, 7: 8, 70: 80}[needed >> 30]
    assert said == f"{begins}for a yes or no add --device-memory {size}GB (the smallest usual card that it fits)"
    smaller = {6: 4, 8: 6, 80: 48}[size]
    limits = [limit_on(Config(), "cuda", parse_device_memory(f"{gb}GB")).bytes for gb in (smaller, size)]
    assert limits[0] < needed <= limits[1]


def test_without_a_size_the_headline_says_how_to_get_an_answer(here: Path):
    output = shown("--device", "cpu")
    assert re.match(r"predicted: \S+ MiB needed, and no size was given to hold it against: for a yes or no add "
                    r"--device-memory 16GiB\n \S+ MiB at the peak", output)  # fmt: skip
    output = shown()
    assert re.match(r"predicted: \S+ GiB needed, and no size was given .*: for a yes or no add --device-memory 6GB "
                    r"\(the smallest usual card that it fits\)\n", output)  # fmt: skip
    assert "no size was given" not in shown("--device-memory", "6GB")


def test_a_size_to_the_byte_that_does_not_suffice(here: Path):
    shown("--device", "cpu", "--json", "memory.json")
    report = json.loads((here / "memory.json").read_text())
    peak = report["predicted"]["peak_bytes"]
    output = shown("--device", "cpu", "--device-memory", f"{peak}B")
    assert "yes, it fits: " in output and ", 0 MiB left" in " ".join(output.split())
    output = shown("--device", "cpu", "--device-memory", f"{peak - 1000}B", "--json", "memory.json")
    written = json.loads((here / "memory.json").read_text())
    assert (written["fits"], written["needed_bytes"], written["usable_bytes"]) == (False, peak, peak - 1000)
    assert written["left_bytes"] == -1000
    assert f"\nwhat to change: {written['change']} makes it fit, " in output
    assert "no, it does not fit: " in output and ", 0.0 MiB too much" in " ".join(output.split())
    assert re.search(r"\nwhat to change: --set \S.* makes it fit, in 0\.\d MiB \(estimated\)\n", output)


def test_the_command_that_looks_for_longer_has_what_was_typed(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("qlora_tool.memory.plan.cure.SECONDS_FOR_A_CHANGE", -1)
    typed = ("--set", "data.max_length=48", "--set", "adapter.target_modules=[q_proj, v_proj]")
    typed += ("--device-memory", "0.5MiB", "--device", "cpu")
    output = shown(*typed)
    command = f"qlora-tool profile-memory run.yaml {shlex.join(typed)}"
    assert f"\nwhat to change: `{command} --plan` shows what fits\n" in output
    as_mapping = {"data.max_length": 48, "adapter.target_modules": ["q_proj", "v_proj"]}
    found = profile_memory("run.yaml", set=as_mapping, device="cpu", device_memory="0.5MiB")
    assert found.change == f"`{command} --plan` shows what fits"
    unnamed = profile_memory(found.config, device="cpu", device_memory="0.5MiB")  # nothing that could be typed
    assert unnamed.change == "profile-memory with --plan for 0.5 MiB shows what fits"


def test_a_plan(here: Path, monkeypatch: pytest.MonkeyPatch):
    change_config(num_hidden_layers=1)
    monkeypatch.setattr("qlora_tool.memory.plan.options.BATCH_SIZES", (4,))
    int8 = {"model.quantization": "int8"}
    monkeypatch.setattr("qlora_tool.memory.plan.options.ALTERNATIVES", {"model.quantization": [int8]})
    output = shown("--device", "cpu", "--device-memory", "64MiB", "--plan", "--json", "plan.json", "--plot", "p.html")
    plan = output[output.index("plan for 64.0 MiB on cpu") :]
    assert "asked for: 2 x 32 tokens take" in plan and "it fits" in plan
    assert re.search(r"quantization=nf4 \S+ MiB fits 1.00 asked for", plan)
    assert re.search(r"quantization=int8 \S+ MiB fits 1.00", plan)
    assert plan.rstrip().endswith("--set data.max_length=64")  # all that the model allows
    written = json.loads((here / "plan.json").read_text())
    assert MemoryReport.from_json(written).predicted.peak_bytes == written["plan"]["asked"]["peak_bytes"]
    found = written["plan"]
    assert (written["fits"], written["usable_bytes"], written["change"]) == (True, 64 * 2**20, None)
    assert (found["usable_bytes"], found["fits"], found["line"]) == (64 * 2**20, True, "--set data.max_length=64")
    assert found["longest"]["settings"] == {"data.max_length": 64} and found["longest"]["confirmed"]
    quantized = [option for option in found["options"] if option["group"] == "model.quantization"]
    assert [option["settings"]["model.quantization"] for option in quantized] == ["nf4", "int8"]
    page = unescape(re.sub(r"<[^>]*>", " ", (here / "p.html").read_text())).partition(" Plan ")[2]
    words = " ".join(page.split())
    for line in filter(None, plan.splitlines()):  # all that the terminal says; a note stands below its setting there
        setting, _, note = line.rpartition(" asked for")
        assert (f"{setting.split()[0]} {'asked for'} {' '.join(setting.split()[1:])}" if setting and not note
                else " ".join(line.split())) in words  # fmt: skip


def test_one_limit_by_one_name(here: Path, monkeypatch: pytest.MonkeyPatch):
    """In the table, in the warning of `auto`, in the plan and in its JSON: 5 % of the card stay free everywhere."""
    change_config(num_hidden_layers=1)
    monkeypatch.setattr("qlora_tool.memory.plan.options.BATCH_SIZES", ())
    monkeypatch.setattr("qlora_tool.memory.plan.options.ALTERNATIVES", {})
    auto = ("--set", "training.gradient_checkpointing=auto")
    result = run("--device-memory", "600MB", "--plan", "--json", "plan.json", *auto)
    screen = " ".join(result.stdout.split())
    named = "0.53 GiB usable (95% of 0.56 GiB)"  # 570 of 600 MB
    assert f"needed, {named}" in screen
    assert "plan for 0.53 GiB on cuda (compute capability 8.9), 95% of 0.56 GiB" in screen
    warning = next(line for line in result.stderr.splitlines() if "takes at least" in line)
    assert named in warning and "lower" not in warning
    assert json.loads((here / "plan.json").read_text())["plan"]["usable_bytes"] == 570_000_000


def test_max_memory_is_the_limit_of_auto(here: Path, monkeypatch: pytest.MonkeyPatch):
    change_config(num_hidden_layers=1)
    monkeypatch.setattr("qlora_tool.memory.plan.options.BATCH_SIZES", ())
    monkeypatch.setattr("qlora_tool.memory.plan.options.ALTERNATIVES", {})
    limited = ("--set", "training.gradient_checkpointing=auto", "--set", "training.max_memory=64MiB")
    output = " ".join(shown("--device", "cpu", "--plan", *limited).split())
    assert "64.0 MiB usable (training.max_memory)" in output
    assert "plan for 64.0 MiB on cpu, training.max_memory" in output


# --------------------------------------------------------------------------------------------- what it refuses


def test_a_card_that_is_not_in_the_table(here: Path):
    line = refused("--device-memory", "rtx-4900")
    assert "'rtx-4900' is not in the table of cards; write one that is, such as rtx-4090, " in line


def test_a_plan_for_nothing_in_particular(here: Path):
    assert "give --device-memory, such as 24GB or rtx-4090" in refused("--plan")


def test_a_budget_below_the_weights(here: Path):
    line = refused("--device", "cpu", "--device-memory", "50KiB")
    assert "--device-memory: the limit is " in line
    assert "but the base's weights (nf4) alone take 0.1 MiB" in line


def test_a_plan_that_cannot_fit(here: Path, monkeypatch: pytest.MonkeyPatch):
    change_config(num_hidden_layers=1)
    monkeypatch.setattr("qlora_tool.memory.plan.options.BATCH_SIZES", ())
    monkeypatch.setattr("qlora_tool.memory.plan.options.ALTERNATIVES", {})
    result = run("--device", "cpu", "--device-memory", "50KiB", "--plan", "--json", "plan.json", "--plot", "p.html")
    assert result.exit_code == 2
    assert "nothing makes it fit" in (here / "p.html").read_text()
    assert "nothing makes it fit" in result.stdout and "the weights alone take 0.1 MiB" in result.stdout
    assert "error: --device-memory: the smallest configuration that was tried takes" in result.stderr
    found = json.loads((here / "plan.json").read_text())["plan"]
    assert (found["fits"], found["change"], found["line"]) == (False, None, "")
    assert found["smallest_bytes"] > found["usable_bytes"] == 50 * 1024


def test_an_unknown_architecture(here: Path):
    change_config(model_type="lama")
    line = refused()
    assert "m/config.json: model_type 'lama'" in line and "did you mean 'llama'?" in line


def test_a_model_that_is_no_causal_language_model(here: Path):
    Path("m/config.json").write_text(json.dumps(
        {"model_type": "vit", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ))  # fmt: skip
    assert "no causal language model" in refused()


def test_a_configuration_without_sizes(here: Path):
    change_config(hidden_size=None, num_hidden_layers=None)
    assert "m/config.json: no hidden_size, num_hidden_layers in it" in refused()


@pytest.mark.parametrize("sizes", [{"num_attention_heads": 5}, {"num_hidden_layers": 0}, {"vocab_size": -1}])
def test_sizes_of_no_model(here: Path, sizes: dict[str, int]):
    change_config(**sizes)
    line = refused()
    assert "m/config.json" in line and next(iter(sizes)).replace("num_", "").replace("_", " ")[:5] in line


def test_a_model_with_code_of_its_own(here: Path):
    change_config(model_type="mine", auto_map={"AutoConfig": "mine.MineConfig"})
    assert "set model.trust_remote_code: true" in refused()


def test_a_length_beyond_the_models(here: Path):
    line = refused("--set", "data.max_length=65")
    assert "data.max_length: 65" in line and "max_position_embeddings is 64" in line


def test_a_negative_length(here: Path):
    assert "data.max_length: expected a whole number of at least 1, found -5" in refused("--set", "data.max_length=-5")


def test_a_model_that_is_not_there(here: Path):
    assert "no such folder; did you mean 'm'?" in refused("--set", "model.name_or_path=./mm")
    assert "hub is out of reach" in refused("--set", "model.name_or_path=owner/name", code=1)


@pytest.mark.parametrize("option", ["--measure", "--calibrate"])
def test_a_card_that_is_not_here(here: Path, option: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "CUDA device" in refused("--device", "cuda", option)


def test_a_plot_of_another_kind(here: Path):
    assert "step.pdf: expected a name that ends in .png or .html" in refused("--plot", "step.pdf")


def test_a_card_is_no_memory_of_a_cpu(here: Path):
    result = run("--device", "cpu", "--device-memory", "rtx-4090")
    assert result.exit_code == 2
    assert "--device-memory rtx-4090: a card, but the prediction is for a CPU; give --device cuda" in result.stderr
