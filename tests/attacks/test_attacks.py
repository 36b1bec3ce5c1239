"""Bad input of every kind, through the real command line: a clear line with code 2, a warning, or the right result,
within ten seconds, and nothing written but where it was asked for."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from attack import Attack, Server, judge, save_faults, try_attack
from attacks_on_data import restore
from corpus import corpus, part
from tiny_adapters import write_adapter, write_chat_base

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the attacks are tried in forks of one warm process")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    write_chat_base("llama", folder / "model")
    write_adapter(folder / "adapter", folder / "model")
    provenance = json.loads((folder / "adapter/qlora_tool.json").read_text())
    provenance["base"]["name_or_path"] = "model"
    (folder / "adapter/qlora_tool.json").write_text(json.dumps(provenance))
    rows = [{"prompt": f"What is {n} and {n}?", "completion": f"It is {2 * n}."} for n in range(12)]
    (folder / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = {
        "model": {"name_or_path": "model", "device": "cpu", "compute_dtype": "float32"}, "adapter": {"r": 4},
        "data": {"train": "data.jsonl", "max_length": 128}, "training": {"output_dir": "../out", "max_steps": 3},
    }  # fmt: skip
    (folder / "good.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def server(good: Path) -> Iterator[Server]:
    found = Server(good)
    yield found
    found.close()


def try_all(attacks: list[Attack], folder: Path, good: Path, server: Server) -> dict[str, list[str]]:
    faults = {}
    for number, attack in enumerate(attacks):
        root = folder / str(number)
        if found := try_attack(attack, root, good, server):
            faults[attack.name] = found
        restore(root)
        shutil.rmtree(root)
    return faults


def test_some_of_each_kind(tmp_path, good, server):
    attacks = part(corpus(), every=16)
    faults = try_all(attacks, tmp_path, good, server)
    assert not faults, "\n".join(f"{name}: {found}" for name, found in faults.items())


@pytest.mark.slow
def test_all(tmp_path, good, server):
    attacks = corpus()
    assert len(attacks) >= 600
    faults = try_all(attacks, tmp_path, good, server)
    told = "\n".join(f"{name}: {found}" for name, found in faults.items())
    assert not faults, f"{save_faults(faults, attacks)}\n{told}"


def test_the_judge_sees_faults():
    attack = Attack("x", "x", lambda place: None, ())
    assert judge(attack, 2, "error: a\n", "error: a\n") == []
    assert judge(attack, None, "", "") and judge(attack, 0, "", "") and judge(attack, 1, "error: a\n", "")
    assert judge(attack, 2, "", "") and judge(attack, 2, "error: a (run again with --debug)", "run again with --debug")
    assert judge(attack, 2, "error: \x1b[2J\n", "error: \x1b[2J\n")
