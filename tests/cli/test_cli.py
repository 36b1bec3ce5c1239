"""The command line: help, the form of errors, exit codes, and what is not imported on the way."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import click
import pytest
from child_process import child_environment
from click.testing import CliRunner

from qlora_tool.cli import COMMANDS, ToolCommand, main
from qlora_tool.config import load_config
from qlora_tool.config.recipes import find_recipe, recipe_names
from qlora_tool.errors import MachineError, UserError

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, "-c", "from qlora_tool.cli import main; main()"]


def invoke(*args: str):
    return CliRunner().invoke(main, args)


def python(code: str, **settings) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=child_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **settings,
    )


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch):
    """Register `qlora-tool try`, which runs the function given."""
    commands = dict(main.commands)
    monkeypatch.setattr(main, "commands", commands)

    def register(function):
        commands["try"] = click.command("try", cls=ToolCommand, examples="qlora-tool try")(function)

    return register


def raising(error: BaseException):
    def function() -> None:
        raise error

    return function


def test_help_lists_the_commands_by_section():
    result = invoke("--help")
    assert result.exit_code == 0
    places = [result.stdout.index(title) for title in ("Main commands:", "Use a model:", "Around them:", "Examples:")]
    assert places == sorted(places)
    for name, entry in COMMANDS.items():
        assert f"{name} " in result.stdout
        assert entry.help in result.stdout


def test_help_and_light_commands_import_nothing_heavy():
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from qlora_tool.cli import COMMANDS, main\n"
        "for args in [['--help'], *([name, '--help'] for name in COMMANDS), ['recipes']]:\n"
        "    result = CliRunner().invoke(main, args)\n"
        "    assert result.exit_code == 0, (args, result.output)\n"
        "    assert args[0] == 'recipes' or 'Examples:\\n  qlora-tool' in result.output, args\n"
        "    heavy = {'torch', 'transformers', 'datasets', 'bitsandbytes', 'accelerate', 'numpy'}\n"
        "    heavy |= {'pydantic'} if '--help' in args else set()\n"
        "    print(args, sorted(heavy & set(sys.modules)))\n"
        "    assert not heavy & set(sys.modules), args\n"
    )
    process = python(code)
    out, err = process.communicate()
    assert process.returncode == 0, out + err


def test_the_configuration_imports_no_torch():
    process = python("import sys, qlora_tool.config as c; c.load_config('demo'); sys.exit('torch' in sys.modules)")
    assert process.communicate()[1] == ""
    assert process.returncode == 0


def test_no_command_shows_how_to_start_and_fails():
    result = invoke()
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert len(lines) < 16 and "qlora-tool --help" in result.stderr
    commands = [line.split("  ")[1].split() for line in lines if line.startswith("  qlora-tool ")]
    assert [words[1] for words in commands] == ["recipes", "preview", "train"]
    for _, name, *arguments in commands:
        main.get_command(click.Context(main), name).make_context(name, arguments)
    assert result.stdout == ""


def test_version():
    import qlora_tool

    assert invoke("--version").stdout == f"qlora-tool, version {qlora_tool.__version__}\n"


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["trian"], "error: no command 'trian'; did you mean 'train'? (in 'qlora-tool'; see 'qlora-tool --help')"),
        (["xyz"], "error: no command 'xyz'; commands are train, preview, profile-memory, export-merged, "),
        (["--vresion"], "error: no option '--vresion'; did you mean '--version'? (in 'qlora-tool'; see"),
        (["recipes", "shwo"], "error: no command 'shwo'; did you mean 'show'? (in 'qlora-tool recipes'; see"),
        (["try", "--dtpye", "x"], "error: no option '--dtpye'; did you mean '--dtype'? (in 'qlora-tool try'; see"),
        (["try", "F", "--dtype", "bf16"], "error: '--dtype': 'bf16' is not one of 'auto', 'bfloat16'; did you mean 'b"),
        (["try"], "error: missing argument 'FILE' (in 'qlora-tool try'; see 'qlora-tool try --help')"),
        (["try", "a", "b"], "error: got unexpected extra argument (b) (in 'qlora-tool try'; see"),
    ],
)
def test_usage_errors_take_the_form_of_all_errors(command, args, line):
    @click.argument("file")
    @click.option("--dtype", type=click.Choice(["auto", "bfloat16"]))
    def function(file: str, dtype: str) -> None: ...

    command(function)
    result = invoke(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(line)
    assert result.stderr.count("\n") == 1


def test_three_mistakes_in_a_configuration_are_three_error_lines(command, tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text("training: {lerning_rate: 1, max_steps: many}\nadapter: {r: 0}\n")

    @click.argument("config")
    def function(config: str) -> None:
        load_config(config)

    command(function)
    result = invoke("try", str(path))
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"error: {path}: ") for line in lines)


def test_a_standard_output_that_is_full_is_not_called_a_disk():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "qlora_tool", "recipes"], stdout=full, stderr=subprocess.PIPE,
                              text=True, check=False)  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "error: standard output cannot be written: No space left on device; what was written to " \
        "files is there\n"  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
@pytest.mark.parametrize("words", [["recipes"], ["recipes", "show", "demo"], ["--version"], ["train", "--help"],
                                   ["try"]])  # fmt: skip
def test_a_standard_output_that_takes_nothing_is_a_line_and_exit_code_1(words, tmp_path: Path):
    program = (
        "import resource, sys, click\n"
        "from rich.console import Console\n"
        "from qlora_tool.cli import ToolCommand, main\n"
        "@main.command('try', cls=ToolCommand)\n"
        "def shown():\n"
        "    Console().print('what a table is')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        f"main({words})\n"
    )
    with (tmp_path / "out").open("w") as out:
        done = subprocess.run([sys.executable, "-c", program], stdout=out, stderr=subprocess.PIPE, text=True,
                              check=False)  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "error: standard output cannot be written: File too large; what was written to files is " \
        "there\n"  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="a shell of POSIX")
@pytest.mark.parametrize("stream", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_an_empty_one(stream):
    program = (
        "import sys, click\n"
        "from qlora_tool.cli import ToolCommand, main\n"
        "@main.command('try', cls=ToolCommand)\n"
        "def read():\n"
        "    click.echo(sys.stdin.read() or 'nothing')\n"
        "    click.echo('told', err=True)\n"
        "    sys.stdout.flush(), sys.stdout.isatty(), sys.stderr.isatty()\n"
        "main(['try'])\n"
    )
    command = ["sh", "-c", f'exec "$0" -c "$1" {stream}', sys.executable, program]
    done = subprocess.run(command, input="typed", text=True, capture_output=True, check=False)
    assert done.returncode == 0
    shown = "nothing\n" if "<" in stream else "typed\n"
    assert (done.stdout, done.stderr) == ("" if " >" in f" {stream}" else shown, "" if "2>" in stream else "told\n")


@pytest.mark.skipif(sys.platform != "linux", reason="bytes of any kind in a command line")
@pytest.mark.parametrize("words", [[b"report", b"a\xff"], [b"train", b"demo", b"--output-dir", b"a/\xff"],
                                   [b"generate", b"demo", b"--prompt", b"\xff"]])  # fmt: skip
def test_a_command_line_that_is_not_utf_8_is_refused(words):
    done = subprocess.run([sys.executable, "-m", "qlora_tool", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == \
        [f"error: {words[-1].decode(errors='surrogateescape').encode(errors='backslashreplace').decode()}: not UTF-8; "
         "write it in UTF-8, or rename what it names"]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (UserError(["a.jsonl, line 3: b", "c"]), 2, ["error: a.jsonl, line 3: b", "error: c"]),
        (MachineError("no network"), 1, ["error: no network"]),
        (KeyError("x"), 1, ["error: KeyError: 'x' (run again with --debug for the traceback)"]),
        (RuntimeError("a\n  b"), 1, ["error: RuntimeError: a b (run again with --debug for the traceback)"]),
        (EOFError("cut short"), 1, ["error: EOFError: cut short (run again with --debug for the traceback)"]),
        (
            OSError(errno.ENOSPC, "No space left on device", "/x/y"),
            1,
            ["error: no space left on the disk for /x/y; free some, or choose another folder"],
        ),
        (MemoryError(), 1, ["error: out of memory; take smaller batches or a smaller data.max_length"]),
        (KeyboardInterrupt(), 130, ["interrupted"]),
    ],
)
def test_failures_become_lines_and_exit_codes(command, error, code, lines):
    command(raising(error))
    result = invoke("try")
    assert result.exit_code == code
    assert [line for line in result.stderr.splitlines() if line] == lines


@pytest.mark.parametrize("args", [["--debug", "try"], ["try", "--debug"]])
def test_debug_shows_the_traceback_and_keeps_the_exit_code(command, args):
    command(raising(UserError("bad")))
    result = invoke(*args)
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.endswith("error: bad\n")


def test_what_a_command_returns_is_no_exit_code(command):
    command(lambda: 3)
    assert invoke("try").exit_code == 0


def test_a_command_can_exit_with_a_code_of_its_own(command):
    command(lambda: click.get_current_context().exit(2))
    assert invoke("try").exit_code == 2


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_clean_up_and_have_their_exit_codes(number, code):
    process = python(
        "import signal, time, click\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a process in the background starts deaf to it
        "from qlora_tool.cli import ToolCommand, main\n"
        "@main.command('wait', cls=ToolCommand)\n"
        "def wait():\n"
        "    try:\n"
        "        print('ready', flush=True)\n"
        "        while True: time.sleep(0.01)\n"  # a signal before the call is seen after it; pause() would miss it
        "    finally:\n"
        "        print('cleaned up', flush=True)\n"
        "main(['wait'])\n"
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert out == "cleaned up\n"
    assert "Traceback" not in err


def test_a_reader_that_goes_away_is_no_error():
    process = python("from qlora_tool.cli import main; main(['recipes', 'show', 'demo'])")
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 1


def test_option_groups_and_examples_stand_in_the_help(command):
    @click.option("--prompt", help="What to say.")
    @click.option("--top-p", help="Nucleus.")
    def function(prompt: str, top_p: float) -> None:
        """Try it."""

    main.commands["try"] = click.command(cls=ToolCommand, groups={"Sampling": ["top_p"]}, examples="a  b\nc")(function)
    lines = [line.rstrip() for line in invoke("try", "--help").stdout.splitlines()]
    sampling, options = lines.index("Sampling:"), lines.index("Options:")
    assert lines[sampling + 1].split() == ["--top-p", "TEXT", "Nucleus."]
    assert lines[options + 1].split() == ["--prompt", "TEXT", "What", "to", "say."]
    assert lines[-3:] == ["Examples:", "  a  b", "  c"]


def test_a_recipe_without_its_data_says_what_to_type(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [name for name in recipe_names() if Path(load_config(name).data.train).suffix]  # else it is on the hub
    assert len(names) > 15
    for name in names:
        for command in ("train", "preview"):
            result = invoke(command, name)
            assert result.exit_code == 2 and "--set data.train=YOUR_FILE" in result.stderr.splitlines()[-1]


def test_recipes_are_listed_shown_and_copied(tmp_path: Path):
    listing = invoke("recipes").stdout
    assert listing == invoke("recipes", "list").stdout
    assert [line.split()[0] for line in listing.splitlines()][:3] == ["A", "demo", "smollm2-cpu"]
    sizes = [int(line.split()[3]) for line in listing.splitlines() if line.startswith("A card of ")]
    assert sizes == sorted(set(sizes)) and len(sizes) > 1
    text = find_recipe("demo").read_text(encoding="utf-8")
    assert invoke("recipes", "show", "demo").stdout == text

    target = tmp_path / "my.yaml"
    assert invoke("recipes", "copy", "demo", str(target)).exit_code == 0
    assert invoke("recipes", "copy", "demo", str(tmp_path)).exit_code == 0
    assert load_config(target).training.output_dir == "runs/my"
    copied = text.replace("train demo\n", f"train {target}\n").replace("runs/demo", "runs/my")
    assert target.read_text(encoding="utf-8") == copied.replace("merged/demo", "merged/my")
    assert load_config(tmp_path / "demo.yaml") == load_config("demo")

    target.write_text("mine")
    result = invoke("recipes", "copy", "demo", str(target))
    assert (result.exit_code, target.read_text()) == (2, "mine")
    assert result.stderr.startswith(f"error: {target}: exists already")
    result = invoke("recipes", "show", "dmeo")
    assert result.exit_code == 2
    assert result.stderr.endswith("did you mean 'demo'?\n")


def test_doctor_reports_this_machine(monkeypatch: pytest.MonkeyPatch):
    import torch

    from qlora_tool.cli import doctor
    from qlora_tool.ops.precision import choose_compute_dtype

    result = invoke("doctor")
    assert result.exit_code == 0, result.stderr
    rows = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert torch.__version__.partition("+")[0] in rows["torch"]  # the build is not part of PyPI's version
    assert os.environ["QLORA_TOOL_CACHE"] in rows["cache"]
    dtype = str(choose_compute_dtype(torch.device("cpu"))).removeprefix("torch.")
    assert f"Compute dtype that auto chooses\n  cpu           {dtype}\n" in result.stdout
    assert torch.backends.cpu.get_cpu_capability() in result.stdout

    dated = next(line for line in result.stdout.splitlines() if line.startswith("  measured"))
    assert re.fullmatch(r"  measured      \d{4}-\d\d-\d\dT\d\d:\d\d UTC, \d+ threads?(; the machine was .*)?", dated)

    monkeypatch.setattr(doctor, "ABILITIES", (("wings", "no-such-package", "flight"), ("products", "torch", "torch")))
    lines = invoke("doctor").stdout.splitlines()
    assert f"  {'wings':<30}no: pip install 'qlora-tool[flight]'" in lines
    assert f"  {'products':<30}yes (torch {torch.__version__.partition('+')[0]}" in "".join(lines)

    monkeypatch.setattr(doctor, "REQUIRED", ("torch", "no-such-package"))
    result = invoke("doctor")
    assert result.exit_code == 1
    assert result.stderr == "error: no-such-package is not installed; every run needs it: pip install no-such-package\n"


def test_doctor_measures_products_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import torch

    from qlora_tool.ops import bandwidths, speeds

    def found(date: str, ratio: float) -> speeds.Speeds:
        gflops = {"float32": 100.0, "float32 oneDNN": 100 * ratio, "bfloat16": 50.0}
        return speeds.Speeds(date, torch.get_num_threads(), gflops, gflops, ratio, 0.1, share)

    monkeypatch.setenv("QLORA_TOOL_CACHE", str(tmp_path))
    now, share = datetime.now(timezone.utc).isoformat(), 0.95
    monkeypatch.setattr(bandwidths, "_measure", lambda: bandwidths.Bandwidths(now, 1e9, 9e9))
    monkeypatch.setattr(speeds, "measure", lambda: found(now, 0.9))
    first = invoke("doctor").stdout
    assert "  float32 by    PyTorch (oneDNN takes 1/0.90 of PyTorch's time, ± 5%)\n" in first
    threads = torch.get_num_threads()
    assert f"  measured      {now[:16]} UTC, {threads} thread{'' if threads == 1 else 's'}\n" in first
    share = 0.4
    monkeypatch.setattr(speeds, "measure", lambda: found(now, 2.0))
    assert invoke("doctor").stdout == first
    again = invoke("doctor", "--measure").stdout
    assert "float32 100.0, float32 oneDNN 200.0, bfloat16 50.0 GFLOP/s" in again
    assert "; the machine was busy (40% of the processors' time was free): doctor --measure measures again" in again
    assert "  float32 by    PyTorch (" in again  # a busy machine's figures change no choice


def test_doctor_shows_bandwidths_and_measures_them_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from qlora_tool.ops import bandwidths, speeds

    monkeypatch.setenv("QLORA_TOOL_CACHE", str(tmp_path))
    monkeypatch.setattr(bandwidths, "_has_cards", lambda: False)
    now, measured = datetime.now(timezone.utc).isoformat(), []

    def found() -> bandwidths.Bandwidths:
        measured.append(1)
        cards, faults = {"cuda:0": 24.1e9, "cuda:1": 0.0}, {"cuda:1": "out of memory"}
        if len(measured) == 1:
            return bandwidths.Bandwidths(now, 2.5e9, 9.8e9, cards, True, 2, faults)
        return bandwidths.Bandwidths(now, 0.0, 8e9, {}, False, 1, {"disk": "no space left"})

    monkeypatch.setattr(bandwidths, "_measure", found)
    shown = invoke("doctor").stdout
    assert shown.partition("Bandwidths\n")[2].startswith(
        f"  disk          2.50 GB/s (direct reads in {tmp_path})\n"
        "  host          9.80 GB/s (copies in memory by 2 threads)\n"
        "  cuda:0        24.10 GB/s (from pinned memory)\n"
        "  cuda:1        not measured (out of memory)\n"
        f"  measured      {now[:16]} UTC\n"
    )
    assert invoke("doctor").stdout == shown and len(measured) == 1
    monkeypatch.setattr(speeds, "measure_anew", lambda: None)
    again = invoke("doctor", "--measure").stdout
    assert "  disk          not measured (no space left)\n" in again
    assert "  host          8.00 GB/s (copies in memory by 1 thread)\n" in again
    assert len(measured) == 2


def test_doctor_deletes_what_was_cached_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from qlora_tool.files.hashes import file_hashes

    monkeypatch.setenv("QLORA_TOOL_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    file_hashes(model)
    assert invoke("doctor").exit_code == 0  # measures
    base, digest = f"bases/{'0' * 24}-nf4-double-float32-2", "0123456789ab"
    ours = (
        f"predictions/choice-{2 * digest}.json", "demo/SmolLM2-135M-Instruct/model.safetensors",
        f"{base}/model.safetensors", ".hashes.json.host-1-2.tmp",
        f"bases/.calibrated-{'a' * 32}.h-1-2.tmp/model.safetensors",
        f"datasets/{'b' * 32}/examples.arrow", "torchinductor/x/y.py",
    )  # fmt: skip
    others = (
        "notes.txt", "bases/mine.txt", "bases/mine/model.safetensors", f"{base}/mine.txt", "datasets/mine/meta.json",
        f"datasets/{'b' * 32}/more/meta.json", "predictions/mine.json", "demo/mine/config.json",
    )  # fmt: skip
    for name in (*ours, *others):
        file = tmp_path / "cache" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x" * 1_000_000)
    result = invoke("doctor", "--clear-cache")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.startswith("cache: 7.0 MB deleted; left what qlora-tool did not write: ")
    assert result.stderr.endswith(" and 4 more\n") and result.stderr.count("\n") == 1
    assert (model / "config.json").exists()
    left = {str(file.relative_to(tmp_path / "cache")) for file in (tmp_path / "cache").rglob("*") if file.is_file()}
    assert left == {*others, "products.json", "bandwidths.json"}  # measured again, as it is shown


def test_doctor_deletes_through_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(tmp_path / "cache"))
    kept = tmp_path / "elsewhere" / f"calibrated-{'0' * 32}" / "model.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    (tmp_path / "cache" / "datasets").mkdir(parents=True)
    for link in (tmp_path / "cache" / "bases", tmp_path / "cache" / "datasets" / ("0" * 32)):
        link.symlink_to(tmp_path / "elsewhere")
    result = invoke("doctor", "--clear-cache")
    assert kept.exists() and "cache/bases, " in result.stderr and f"datasets/{'0' * 32}" in result.stderr
