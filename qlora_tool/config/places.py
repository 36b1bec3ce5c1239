"""A wrong thing in a place: a line that says what it is, and what to type. Nothing heavy is imported for it."""

from __future__ import annotations

import json
from pathlib import Path

from qlora_tool.config.recipes import recipe_names
from qlora_tool.errors import UserError, did_you_mean, did_you_mean_path, looked_for
from qlora_tool.files.kinds import hub_id, kind_of

_START = "smollm2-cpu"  # the recipe that cures name: any other will do
_OF_RUN = "expected a run's folder or an adapter's"
_OF_RUN_ALONE = "expected a run's folder"
_OF_MODEL = "expected a run's folder, an adapter's, or a model's, a hub id (owner/name), or demo"


def refuse_as_config(source: str) -> None:
    """Refuse what stands in the place of a configuration and is plainly something else.

    Raises:
        UserError: in one line.
    """
    set_model = f"{_START} --set model.name_or_path"
    page = hub_id(source)
    said = {
        "web": f"a web address; a model is named by its hub id: {set_model}={page or 'OWNER/NAME'}",
        "data": f"a data file; name a recipe, and the data by a key: {_START} --set data.train={source}",
        "gguf": "a model for llama.cpp, which is not trained; name a recipe, and the model it was made from by a key: "
                f"{set_model}=OWNER/NAME",
        "weights": f"weights; name a recipe, and their folder by a key: {set_model}={Path(source).parent}",
        "pickle": f"pickled weights; name a recipe, and a folder of safetensors by a key: {set_model}=FOLDER",
        "run": f"a run's folder; its configuration is {Path(source) / 'config.yaml'}",
        "adapter": f"an adapter's folder; `qlora-tool recipes import {source} my-run.yaml` makes a configuration of it",
        "model's json": f"the configuration of a model, not of a run; name a recipe, and the model's folder by a key: "
                        f"{set_model}={Path(source).parent}",
        "model": f"a model's folder; name a recipe, and the model by a key: {set_model}={source}",
        "ggufs": "a folder of models for llama.cpp, which are not trained; name a recipe, and the model they were made "
                 f"from by a key: {set_model}=OWNER/NAME",
    }.get(kind_of(source))  # fmt: skip
    if said:
        raise UserError(f"{source}: expected a configuration file or the name of a recipe, found {said}")


def missing_config(source: str) -> str:
    """The line on a configuration that is not there."""
    path, names = Path(source), recipe_names()
    siblings = [file.name for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    if close := did_you_mean_path(path, siblings) or did_you_mean(path.stem, names):
        return f"{source}: neither a file nor a recipe{close}"
    if path.suffix in (".yaml", ".yml"):
        return f"{source}: no such file; `qlora-tool recipes copy {_START} {source}` writes one to start from"
    if path.suffix or source.count("/") != 1 or path.parent.is_dir():
        return f"{source}: neither a file nor a recipe; `qlora-tool recipes` lists those that there are"
    return (f"{source}: neither a file nor a recipe; `qlora-tool recipes` lists those that there are, and a model is "
            f"named by a key: {_START} --set model.name_or_path={source}")  # fmt: skip


def refuse_as_model(name: str, *, adapter: bool = False, rows: str = "") -> None:
    """Refuse what stands in the place of a run, an adapter or a model and is plainly something else.

    Args:
        adapter: whether a model alone will not do.
        rows: the option that takes a data file, where there is one.

    Raises:
        UserError: in one line.
    """
    kind, expected = kind_of(name), _OF_RUN if adapter else "expected a run's folder, an adapter's, or a model's"
    path = Path(name)
    if kind == "missing":
        _refuse_missing(name, adapter)
    refuse_unopenable(path.expanduser())
    if adapter and kind in ("model", "model's json"):
        raise UserError(f"{name}: a model without an adapter; {_OF_RUN}")
    if adapter and kind in ("folder", "empty"):
        raise UserError(f"{name}: neither a run nor an adapter in it; {_OF_RUN}{_runs()}")
    said = {
        "web": f"a web address; {'download the adapter, and name its folder' if adapter else 'give the hub id alone'}"
               f"{f': {hub_id(name)}' if hub_id(name) else ''}",
        "data": f"a data file; {f'that goes to {rows} {name}' if rows else 'the run knows its data'}{_runs()}",
        "gguf": f"a model for llama.cpp; run it by `llama-cli -m {name}`, or name the run it was exported from",
        "ggufs": "a folder of models for llama.cpp; run one by `llama-cli -m FILE`, or name the run that it was "
                 "exported from",
        "weights": f"weights alone; name the folder that they lie in: {path.parent}",
        "pickle": f"pickled weights; name a folder with safetensors{_runs()}",
        "model's json": f"a file of a model; name the folder that it lies in: {path.parent}",
        "adapter's json": f"a file of an adapter; name the folder that it lies in: {path.parent}",
        "yaml": f"a configuration; train it, and name its run's folder (training.output_dir){_runs()}",
        "empty": f"an empty folder; name the run's own{_runs()}",
        "folder": f"a folder with none of these in it{_runs()}",
        "file": f"a file; name a folder{_runs()}",
    }.get(kind)  # fmt: skip
    if said:
        raise UserError(f"{name}: {expected}, found {said}")


def refuse_unopenable(path: Path) -> None:
    """Refuse a run that has no adapter yet, and a folder around an adapter's.

    Raises:
        UserError: with what to do, or to name.
    """
    config_file, inside = path / "config.yaml", sorted(path.glob("*/adapter_config.json"))
    if config_file.exists() and path / "adapter" / "adapter_config.json" not in inside:
        raise UserError(f"{path}: this run is not finished; finish it with `qlora-tool train {config_file}`, which "
                        "goes on from its last checkpoint")  # fmt: skip
    known = (config_file, path / "adapter_config.json", path / "config.json")
    if inside and not any(file.exists() for file in known):
        raise UserError(f"{path}: no adapter_config.json in it; the adapter lies in {inside[0].parent}")


def _refuse_missing(name: str, adapter: bool) -> None:
    """A name that is no path: a hub's id is left to those who ask the hub."""
    if name == "demo" and adapter:
        raise UserError(f"demo: a base, not an adapter; {_OF_RUN}; `qlora-tool train demo` makes a run{_runs()}")
    if not adapter and (name == "demo" or ("/" in name and not Path(name).expanduser().parent.is_dir())):
        return
    close = _close_to(name)
    if adapter:
        raise UserError(f"{name}: no such folder{close}; {_OF_RUN}{'' if close else _runs()}")
    raise UserError(f"model {name}: no such folder{close}; {_OF_MODEL}{'' if close else _runs()}{looked_for(name)}")


def _close_to(name: str) -> str:
    """What may be meant by the name of a folder that is not there, for a line; empty where nothing is like it."""
    if name in recipe_names():
        return f"; a recipe has this name: `qlora-tool train {name}` makes a run"
    path = Path(name).expanduser()
    try:
        siblings = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    except OSError:
        return ""
    return did_you_mean_path(Path(name), siblings)


def refuse_as_run(name: str) -> None:
    """Refuse what stands in the place of a run and is none, finished or not.

    Raises:
        UserError: in one line.
    """
    path, kind = Path(name).expanduser(), kind_of(name)
    if kind == "run":
        return
    if kind == "missing":
        close = _close_to(name)
        raise UserError(f"{name}: no such folder{close}; {_OF_RUN_ALONE}{'' if close else _runs()}")
    of_run = kind == "adapter" and (path.parent / "config.yaml").exists()
    merged = kind in ("model", "ggufs") and (path / "export.json").exists()
    source = _run_of_export(path) if merged else None
    by = f"; it was made from {source}: `qlora-tool report {source}`" if source else \
        f"; name the run that it was made from{_runs()}"  # fmt: skip
    said = {
        "web": f"a web address; name a folder that `qlora-tool train` wrote{_runs()}",
        "data": f"a data file; name the run that was trained on it{_runs()}",
        "gguf": f"a model for llama.cpp; name the run that it was exported from{_runs()}",
        "ggufs": f"a folder of models for llama.cpp{by}",
        "weights": f"weights alone; name the run's own folder{_runs()}",
        "pickle": f"pickled weights; name the run's own folder{_runs()}",
        "yaml": f"a configuration; train it, and name its run's folder (training.output_dir){_runs()}",
        "adapter": f"the adapter of one: `qlora-tool report {path.parent}`" if of_run else
                   f"an adapter alone; `qlora-tool inspect {name}` shows what it learned",
        "model": f"a merged model{by}" if merged else f"a model{_runs()}",
        "empty": f"an empty folder; name the run's own{_runs()}",
        "file": f"a file; name a folder{_runs()}",
    }.get(kind)  # fmt: skip
    if said is None:
        said = f"a folder without config.yaml, so that no run lies there{_runs()}"
    raise UserError(f"{name}: {_OF_RUN_ALONE}, found {said}")


def _run_of_export(path: Path) -> Path | None:
    """The run whose folder notes that an export went to `path`, among those that lie where runs go by default."""
    wanted = json.dumps(str(path.resolve()), ensure_ascii=False)
    try:
        notes = [file for file in Path("runs").glob("*/report/exports.json") if file.is_file()]
        return next((file.parents[1] for file in notes if f"{wanted}:" in file.read_text(encoding="utf-8")), None)
    except (OSError, ValueError):
        return None


def _runs() -> str:
    """The runs that lie where runs go by default, the newest first."""
    try:
        found = sorted((file for file in Path("runs").glob("*/config.yaml")), key=lambda file: -file.stat().st_mtime)
    except OSError:
        return ""
    return f"; runs here: {', '.join(str(file.parent) for file in found[:3])}" if found else ""
