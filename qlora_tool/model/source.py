"""Where a model comes from: `demo`, a local folder, or the model hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_tool.errors import MachineError, UserError, did_you_mean, did_you_mean_path, looked_for, printable
from qlora_tool.files.kinds import kind_of
from qlora_tool.files.reading import read_object, refuse_odd_files
from qlora_tool.model.config_file import NAME, read_config_file

_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.py", "tokenizer*", "LICENSE*", "README.md"]
_SET = "--set model.name_or_path="


def resolve(
    name_or_path: str, revision: str | None = None, *, weights: bool = True, fetch: bool = True, by_key: bool = False
) -> Path:
    """The local folder of a model, fetched first where it has to be.

    Args:
        name_or_path: `demo`, a folder, or a hub id such as `HuggingFaceTB/SmolLM2-135M-Instruct`.
        revision: a hub branch, tag or commit.
        weights: fetch the weights too, not just the configuration and the tokenizer.
        fetch: whether the hub may be asked; else what its local cache has is all there is.
        by_key: whether a configuration names the model, so that a line may say how its key is set.

    Raises:
        UserError: no such folder, no such model on the hub, or a folder that holds no model.
        MachineError: the hub is out of reach and the model is not in its cache.
    """
    if name_or_path == "demo":
        from qlora_tool.model.demo import demo_model_folder

        return demo_model_folder()
    if (path := local_folder(name_or_path)) is not None:
        return path
    return _from_hub(name_or_path, revision, [*_FILES, "*.safetensors"] if weights else _FILES, fetch, by_key)


def local_folder(name_or_path: str) -> Path | None:
    """The folder that a name is of; None for `demo` and for hub ids. Nothing heavy is imported for it.

    Raises:
        UserError: no such folder, or one that holds no model.
    """
    path = Path(name_or_path).expanduser()
    if name_or_path == "demo":
        return None
    if path.is_dir():
        if not (path / NAME).exists() and not (path / NAME).is_symlink():
            raise UserError(f"{path}: no config.json in it, so it is not a model folder; {_instead(path)}")
        refuse_odd_files(path, "download the model again")
        return path
    if path.exists():
        found = "a model for llama.cpp, which is not trained" if kind_of(name_or_path) == "gguf" else "not a folder"
        raise UserError(f"model {name_or_path}: {found}; expected a model folder, a hub id (owner/name), or demo")
    if path.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") != 1:
        raise UserError(
            f"model {name_or_path}: no such folder{_like_it(name_or_path)}; expected a model folder, a hub id "
            f"(owner/name), or demo{looked_for(name_or_path)}"
        )
    return None


def _like_it(name: str) -> str:
    """What may be meant by the name of a folder that is not there, for a line; empty where nothing is like it."""
    parent = Path(name).expanduser().parent
    try:
        siblings = [entry.name for entry in parent.iterdir() if entry.is_dir()]
    except OSError:
        return ""
    return did_you_mean_path(Path(name), siblings)


def _instead(path: Path) -> str:
    """What to do about a folder without a configuration, for the end of a line."""
    kind = kind_of(str(path))
    if kind == "ggufs":
        made_from = _said(path / "qlora_tool.json", "base", "name_or_path")
        return "it holds models for llama.cpp, which are not trained; name the model that they were made from: " \
               f"{_SET}{made_from or 'OWNER/NAME'}"  # fmt: skip
    if kind in ("run", "adapter") or (path / "adapter").is_dir():
        folder = path if kind == "adapter" else path / "adapter"
        if not (folder / "adapter_config.json").exists():
            return f"it is a run, and not finished: `qlora-tool train {path / 'config.yaml'}` goes on with it"
        base = _said(folder / "adapter_config.json", "base_model_name_or_path")
        return f"it is {'an adapter' if folder == path else 'a run'}: name its base, and start from its adapter: " \
               f"{_SET}{base or 'BASE'} --set adapter.init_from={folder}"  # fmt: skip
    return "name one that has it, or download it again"


def _said(file: Path, *keys: str) -> str:
    """A text in a JSON file; empty where it has none."""
    try:
        found: Any = read_object(file, "")
    except UserError:
        return ""
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, str) else ""


def _from_hub(name: str, revision: str | None, patterns: list[str], fetch: bool, by_key: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # What looks like a hub id may be a folder that is misspelt.
    near = f"{_like_it(name)}{looked_for(name)}" if Path(name).parent.is_dir() else ""
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=not fetch))
    except RepositoryNotFoundError as error:
        raise UserError(
            f"model {name}: the hub has no such model, or it is private (log in with `hf auth login`); "
            f"a folder would have to be written with its path, such as ./NAME{near}"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"model {name}: the hub has no revision {revision!r} of it; set model.revision to a branch, tag or commit"
        ) from error
    except HFValidationError as error:
        raise UserError(
            f"model {name}: no such folder, and not a hub id (owner/name) either: {str(error).splitlines()[0]}{near}"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        if not fetch:
            raise UserError(f"model {name}: no such folder, and not in the hub's local cache{near}") from error
        others = f"name a local folder ({_SET}FOLDER), or the demo model: {_SET}demo" if by_key else \
            "name a local folder (or demo)"  # fmt: skip
        raise MachineError(
            f"model {name}: no such folder, not in the hub's local cache, and the model hub is out of reach; connect, "
            f"or {others}{near}"
        ) from error


def read_model_config(folder: Path, trust_remote_code: bool = False):
    """The model's transformers configuration.

    Raises:
        UserError: it is broken, of an architecture that transformers does not know, or asks for code of its own.
    """
    from transformers import AutoConfig, __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    file, raw = folder / NAME, read_config_file(folder)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        found = "no model_type in it" if model_type is None else f"model_type is {model_type!r}, which is no text"
        raise UserError(f"{file}: {found}, so it is not a model's configuration; download the model again")
    if model_type not in CONFIG_MAPPING and not trust_remote_code:
        if "auto_map" in raw:
            raise UserError(
                f"{file}: the model brings its own code; read it, then set model.trust_remote_code: true to run it"
            )
        raise UserError(
            f"{file}: model_type {model_type!r} is not one that transformers {__version__} knows"
            f"{did_you_mean(str(model_type), CONFIG_MAPPING) or '; a newer transformers may know it'}"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        if isinstance(text, dict):
            raise ValueError("its text_config, or another part of it, is one that such a model does not have")
        return config
    except Exception as error:  # what a family's own checks and code raise, whatever it is
        reason = printable(" ".join(str(error).split()), 300) or type(error).__name__
        raise UserError(
            f"{file}: not a valid configuration of a {model_type} model ({reason}); correct it, or download the "
            "model again"
        ) from error
