"""What goes on is shown: on a terminal by a line that leaves nothing behind, elsewhere in plain lines, or not."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_runs import run_config, write_model, write_rows

from qlora_tool import terminal
from qlora_tool.cli import main
from qlora_tool.config import config_to_yaml
from qlora_tool.terminal import clock, drawn, progress, waiting
from qlora_tool.training.progress import LiveLine


@pytest.fixture(autouse=True)
def quiet_no_more():
    yield
    drawn.quiet = False


def screen(text: str) -> list[str]:
    """What a terminal shows in the end: a return goes back to the line's begin, and what is written stands over."""
    lines: list[list[str]] = [[]]
    column = 0
    for letter in text:
        assert letter.isprintable() or letter in "\r\n", repr(letter)
        if letter == "\r":
            column = 0
        elif letter == "\n":
            lines.append([])
            column = 0
        else:
            lines[-1] += [" "] * (column + 1 - len(lines[-1]))
            lines[-1][column] = letter
            column += 1
    return ["".join(line).rstrip() for line in lines]


def on_terminal(work: Callable[[], None], columns: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """What work writes to stderr where that is a terminal."""
    pty = pytest.importorskip("pty", reason="pseudo terminals are Unix's")
    import fcntl
    import struct
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    found: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):
            while block := os.read(master, 4096):
                found.append(block)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(slave, "w", encoding="utf-8") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        patch.setenv("TERM", "xterm")
        work()
    reader.join(10)
    os.close(master)
    return b"".join(found).decode().replace("\r\n", "\n")


RECORD = {"loss": 1.5, "learning_rate": 1e-3, "tokens_per_second": 99.6}


def train_four_steps() -> None:
    with LiveLine(4, 0) as line:
        line.step(1, RECORD, "process 1.00 GB")
        line.say("step 1: eval loss 2.0")
        line.step(2, None, "")
        line.step(4, RECORD | {"loss": 0.25}, "process 1.00 GB")


@pytest.mark.parametrize("columns", [40, 100, 160])
def test_the_live_line_leaves_nothing_behind(columns: int, monkeypatch: pytest.MonkeyPatch):
    text = on_terminal(train_four_steps, columns, monkeypatch)
    assert "step 2/4  loss 1.5000"[: columns - 1] in text and "step 4/4" in text
    assert screen(text) == ["step 1: eval loss 2.0", ""]
    drawings = [part for line in text.split("\n") for part in line.split("\r")]
    assert all(len(part) < columns for part in drawings)  # none that a terminal would break


def test_without_a_terminal_a_plain_line_every_logged_step(capsys):
    train_four_steps()
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("  0:")[0] for line in lines] == [
        "step 1/4  loss 1.5000  lr 1.00e-03  100 tokens/s  process 1.00 GB",
        "step 1: eval loss 2.0",
        "step 4/4  loss 0.2500  lr 1.00e-03  100 tokens/s  process 1.00 GB",
    ]


def long_work(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Four units of a second and a half each, by a clock that is moved."""
    now = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(terminal, "SHOWN_FROM", 2.0)

    def work() -> None:
        with progress("quantizing", 4, "tensors") as bar:
            for _ in range(4):
                now[0] += 1.5
                bar.advance()

    return work


def test_a_bar_shows_after_two_seconds_and_is_gone(monkeypatch: pytest.MonkeyPatch):
    text = on_terminal(long_work(monkeypatch), 100, monkeypatch)
    assert "1 of 4" not in text and "quantizing ██████████░░░░░░░░░░ 2 of 4 tensors (50%), 0:03 left" in text
    assert screen(text) == [""]


def test_a_bar_is_plain_lines_without_a_terminal(monkeypatch: pytest.MonkeyPatch, caplog):
    with caplog.at_level(logging.INFO, "qlora_tool"):
        long_work(monkeypatch)()
    assert caplog.messages == ["quantizing: 2 of 4 tensors (50%), 0:03 left", "quantizing: done in 0:06"]
    caplog.clear()
    drawn.quiet = True
    long_work(monkeypatch)()
    with progress("short", 1) as bar:
        bar.advance()
    assert caplog.messages == []


def test_a_wait_shows_how_long_it_takes_though_nothing_says_that_it_goes_on(monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.setattr(terminal, "WAIT_SHOWN_FROM", 0.05)
    monkeypatch.setattr(terminal, "SAID_EVERY", 0.05)
    caplog.set_level(logging.INFO, "qlora_tool")

    def work() -> None:
        with waiting("predicting memory"):
            terminal.time.sleep(0.5)  # as a long import does, and whatever else calls nothing of ours

    text = on_terminal(work, 100, monkeypatch)
    assert "\rpredicting memory 0:0" in text and screen(text) == [""] and not caplog.messages
    work()
    first, *others, last = caplog.messages
    assert first == "predicting memory" and last.startswith("predicting memory: done in 0:0")
    assert others and all(line.startswith("predicting memory: 0:0") for line in others)


def test_a_wait_that_is_short_hushed_quiet_or_fails_is_not_said_to_be_done(monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.setattr(terminal, "WAIT_SHOWN_FROM", 0.05)
    caplog.set_level(logging.INFO, "qlora_tool")
    with pytest.raises(KeyError), waiting("predicting memory"):
        terminal.time.sleep(0.3)
        raise KeyError
    assert caplog.messages == ["predicting memory"]
    caplog.clear()
    with waiting("short"):
        pass
    with drawn.hushed(), waiting("within"), progress("of it", 1):
        terminal.time.sleep(0.3)
    drawn.quiet = True
    with waiting("silent"):
        terminal.time.sleep(0.3)
    assert caplog.messages == []


def test_what_is_hushed_leaves_the_line_around_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(terminal, "WAIT_SHOWN_FROM", 0.05)

    def work() -> None:
        with waiting("predicting memory"), drawn.hushed():
            terminal.time.sleep(0.3)

    assert "predicting memory 0:0" in on_terminal(work, 100, monkeypatch)


def test_a_closed_stderr_ends_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    stream = (tmp_path / "closed").open("w")
    stream.close()
    for broken in (stream, None):
        monkeypatch.setattr(sys, "stderr", broken)
        train_four_steps()


def test_clock():
    assert [clock(seconds) for seconds in (0, 59.6, 3600, 36_061)] == ["0:00", "1:00", "1:00:00", "10:01:01"]


# ----------------------------------------------------------------------------------------------- on the command line


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("said")
    model, rows = write_model(folder / "model"), write_rows(folder / "rows.jsonl")
    file = folder / "run.yaml"
    file.write_text(config_to_yaml(run_config(model, rows, folder / "run", {"model.compute_dtype": "auto"})))
    return file


@pytest.fixture
def shown(configuration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The command's stdout and stderr."""
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(tmp_path / "cache"))
    logger = logging.getLogger("qlora_tool")
    before = logger.handlers[:], logger.propagate, logger.level

    def call(*words: str) -> tuple[str, str]:
        done = CliRunner().invoke(main, [*words, "--output-dir", str(tmp_path / "run")])
        assert done.exit_code == 0, done.output
        return done.stdout, done.stderr

    yield lambda *words: call(*(str(configuration) if word == "CONFIG" else word for word in words))
    logger.handlers, logger.propagate = before[:2]
    logger.setLevel(before[2])


def test_header_speed_quiet_and_verbose(shown):
    """The first run measures what the second one's header tells."""
    out, said = shown("-q", "train", "CONFIG")
    assert [line.partition(":")[0] for line in out.splitlines()] == ["adapter", "report", "next"]
    assert said and all(line.startswith("warning: ") for line in said.splitlines())
    _, said = shown("train", "CONFIG", "--overwrite", "--dry-run", "--verbose")
    assert all(line.startswith("[ ") for line in said.splitlines())
    assert "chosen: model.compute_dtype: auto is " in said
    assert "tokens/s, from 4 steps measured here on 20" in said
    assert "adapter: lora, r 4, lora_alpha 32, on 14 linear modules, " in said and " M weights trained (" in said
    _, said = shown("train", "CONFIG", "--overwrite", "--dry-run", "--set", "adapter.r=2")
    assert "hours not measured, as no such run was made here" in said and "chosen: " not in said


def test_quiet_and_verbose_contradict():
    for words in (["-q", "doctor", "-v"], ["doctor", "--quiet", "--verbose"]):
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 2 and "--quiet and --verbose contradict one another" in done.stderr
