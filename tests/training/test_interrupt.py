"""Signals: a run ends after the step at hand, saved, and the same command goes on from there."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import yaml
from child_process import child_environment
from tiny_runs import adapter_bytes, comparable, read_metrics, run_config, write_model, write_rows

from qlora_tool.config import config_to_yaml, load_config
from qlora_tool.training.interrupt import Interrupted, StopRequest
from qlora_tool.training.loop import train

STEPS = 40


def test_the_first_signal_is_noted_and_the_handlers_come_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for number in (signal.SIGINT, signal.SIGTERM):
        with StopRequest() as stop:
            assert stop.signal_number is None
            signal.raise_signal(number)
            assert stop.signal_number == number
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert Interrupted(signal.SIGINT, []).exit_code == 130
    assert Interrupted(signal.SIGTERM, []).exit_code == 143


@pytest.fixture
def heard():
    """SIGINT as a process in the foreground has it: one started in the background ignores it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def test_a_second_signal_has_its_usual_effect(heard):
    with pytest.raises(KeyboardInterrupt), StopRequest():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    def terminate(number, frame):
        raise SystemExit(number)

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        with pytest.raises(SystemExit), StopRequest():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, previous)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.slow  # two processes that import torch and transformers: 10 s each
def test_a_run_that_is_interrupted_goes_on_as_if_it_had_not_been(tmp_path, number, code):
    inputs = write_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")
    values = {"training.max_steps": STEPS, "training.save_steps": 1000, "training.optim": "adamw_8bit"}
    config = run_config(*inputs, tmp_path / "run", values)
    file = tmp_path / "config.yaml"
    file.write_text(config_to_yaml(config))

    lines = []
    command = [sys.executable, "-m", "qlora_tool", "train", str(file)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=child_environment()) as process:
        for line in process.stderr:
            lines.append(line.rstrip())
            if line.startswith("step 3/"):
                process.send_signal(number)
    assert process.returncode == code, lines
    stopped = read_metrics(tmp_path / "run")[-1]["step"]
    assert 3 <= stopped < STEPS
    saved = tmp_path / "run" / "checkpoints" / f"step-{stopped:06d}"
    assert lines[-2:] == [f"stopped after step {stopped} of {STEPS}; saved {saved}",
                          f"`qlora-tool train {tmp_path / 'run' / 'config.yaml'}` goes on from there"]  # fmt: skip
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [saved.name]
    assert not (tmp_path / "run" / "adapter").exists()

    done = subprocess.run(command, capture_output=True, text=True, env=child_environment(), check=False)
    assert done.returncode == 0, done.stderr
    assert f"resumed: step {stopped}, from {saved}" in done.stderr
    assert done.stdout.splitlines()[0] == f"adapter: {tmp_path / 'run' / 'adapter'}"

    train(run_config(*inputs, tmp_path / "whole", values))
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    found, expected = (read_metrics(tmp_path / name) for name in ("run", "whole"))
    assert [comparable(record) for record in found] == [comparable(record) for record in expected]
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert kept["training"]["max_steps"] == STEPS
    assert load_config(str(tmp_path / "run" / "config.yaml")).adapter.lora_dropout == 0.1


def test_a_hangup_stops_a_run_saved_and_one_that_is_ignored_stays_so():
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever the tests were started with
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.signal_number == signal.SIGHUP
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.signal_number is None
    finally:
        signal.signal(signal.SIGHUP, previous)
