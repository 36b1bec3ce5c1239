"""Where a model comes from, and what is said when it does not."""

from __future__ import annotations

import json

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tiny_models import write_tiny

from qlora_tool.errors import MachineError, ToolError, UserError
from qlora_tool.model import demo
from qlora_tool.model.source import read_model_config, resolve


def fault(kind: type[ToolError], function, *arguments) -> str:
    with pytest.raises(kind) as raised:
        function(*arguments)
    assert type(raised.value) is kind
    (line,) = raised.value.lines
    assert "\n" not in line
    return line


# ------------------------------------------------------------------------------------------------------------ resolve


def test_a_folder_is_taken_as_it_is(tmp_path, monkeypatch):
    folder = tmp_path / "models" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert resolve(str(folder)) == folder
    monkeypatch.chdir(tmp_path)
    assert resolve("models/mine").resolve() == folder  # though it looks like a hub id
    assert resolve("./models/mine").resolve() == folder
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/models/mine") == folder


def test_demo_is_the_demo_model(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "demo_model_folder", lambda: tmp_path)
    assert resolve("demo") == tmp_path


def test_a_folder_without_a_configuration_is_no_model(tmp_path):
    line = fault(UserError, resolve, str(tmp_path))
    assert line.startswith(f"{tmp_path}: no config.json in it")


def test_a_misspelt_folder_names_the_closest(tmp_path):
    (tmp_path / "smollm").mkdir()
    line = fault(UserError, resolve, str(tmp_path / "smolm"))
    assert line.startswith(f"model {tmp_path / 'smolm'}: no such folder; did you mean '{tmp_path / 'smollm'}'?")
    assert "looked for" not in line  # which the name says


@pytest.mark.parametrize(("name", "meant"), [
    ("./smolm", "smollm"), ("smolm", "smollm"), ("models/mien", "models/mine"), ("./models/mien", "models/mine"),
    ("~/models/mien", "~/models/mine"), ("models/of us/mien", None), ("models/nothing like it", None),
])  # fmt: skip
def test_a_misspelt_folder_says_where_it_was_looked_for(tmp_path, monkeypatch, name, meant):
    """What looks like a hub id too, where there is a folder of its owner's name."""
    for folder in ("smollm", "models/mine"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ToolError) as raised:
        resolve(name)
    (line,) = raised.value.lines
    assert line.startswith(f"model {name}: no such folder")
    assert line.endswith(f"; looked for {tmp_path / name.removeprefix('./').removeprefix('~/')}")
    assert "did you mean" not in line if meant is None else f"; did you mean '{meant}'?" in line


def test_a_hubs_id_is_not_looked_for_in_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "looked for" not in fault(MachineError, resolve, "owner/name")


@pytest.mark.parametrize("name", ["nope", "./no/pe", "a/b/c", "~/no-such-folder-at-all", "/no/such/folder"])
def test_what_can_only_be_a_folder_is_not_looked_for_on_the_hub(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert f"model {name}: no such folder" in fault(UserError, resolve, name)


@pytest.mark.parametrize("name", ["my models/small one", "a--b/c", "owner/name.git", "x/.."])
def test_what_can_be_neither_is_told_so(name):
    line = fault(UserError, resolve, name)
    assert f"model {name}: no such folder, and not a hub id (owner/name) either" in line


def test_offline_the_hub_is_out_of_reach_which_is_the_machines_fault(tmp_path, monkeypatch):
    """HF_HUB_OFFLINE is set for all tests; the error is the library's own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    line = fault(MachineError, resolve, "owner/name")
    assert "model owner/name" in line
    assert "out of reach" in line
    assert MachineError.exit_code == 1


def answer(kind: type[Exception]) -> Exception:
    """An error of the library, made without the response that its constructor takes."""
    return kind.__new__(kind, "the hub's answer")


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (answer(RepositoryNotFoundError), UserError, "no such model"),
        (answer(RevisionNotFoundError), UserError, "no revision 'old'"),
        (answer(HfHubHTTPError), MachineError, "out of reach"),
        (answer(LocalEntryNotFoundError), MachineError, "out of reach"),
        (ConnectionError("no route"), MachineError, "out of reach"),
    ],
)
def test_what_the_hub_answers_becomes_one_line(error, kind, words, monkeypatch):
    def refuse(*arguments, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    assert words in fault(kind, resolve, "owner/name", "old")


@pytest.mark.parametrize("weights", [True, False])
def test_from_the_hub_weights_come_only_where_asked_for_and_never_pickles(weights, tmp_path, monkeypatch):
    asked = {}

    def fetch(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert resolve("owner/name", "main", weights=weights) == tmp_path
    assert (asked["name"], asked["revision"]) == ("owner/name", "main")
    needed = ["config.json", "tokenizer.model", "model.safetensors.index.json"]
    present = [*needed, "model-1.safetensors", "pytorch_model.bin", "model.gguf"]
    chosen = list(huggingface_hub.utils.filter_repo_objects(present, allow_patterns=asked["allow_patterns"]))
    assert chosen == [*needed, *(["model-1.safetensors"] if weights else [])]


# ------------------------------------------------------------------------------------------------------ configuration


def test_a_configuration_is_transformers_own(tmp_path):
    config = read_model_config(write_tiny("qwen2", tmp_path))
    assert (config.model_type, config.hidden_size) == ("qwen2", 64)


LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        ("[]", "a JSON object is expected"),
        ("{}", "no model_type"),
        ("3", "a JSON object is expected"),
        (json.dumps({"model_type": "lama"}), "model_type 'lama' is not one that transformers"),
        (json.dumps({"model_type": "lama"}), "did you mean 'llama'?"),
        (json.dumps({"model_type": "zzzzzzzz"}), "a newer transformers may know it"),
        (json.dumps(LLAMA | {"hidden_size": "big"}), "hidden_size is 'big', expected a whole number"),
        (json.dumps(LLAMA | {"num_attention_heads": 7}), "not a multiple of the number of attention heads"),
        (json.dumps(LLAMA | {"dtype": "float99"}), "float99"),
        (json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}), "model.trust_remote_code: true"),
    ],
)
def test_a_broken_configuration_is_named_in_one_line(tmp_path, content, words):
    (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    line = fault(UserError, read_model_config, tmp_path)
    assert line.startswith(f"{tmp_path / 'config.json'}: ")
    assert words in line


def test_no_configuration_at_all_is_told(tmp_path):
    assert fault(UserError, read_model_config, tmp_path).startswith(f"{tmp_path}: no config.json")


def test_code_of_its_own_beside_a_known_architecture_is_not_run(tmp_path):
    write_tiny("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "configuration_own.Own"}}))
    (tmp_path / "configuration_own.py").write_text("raise SystemExit('it was run')")
    assert read_model_config(tmp_path).model_type == "llama"
