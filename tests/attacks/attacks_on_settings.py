"""Configurations: each key with values that it does not take, and what YAML makes of words."""

from __future__ import annotations

import random
from collections.abc import Iterator

import yaml
from attack import REFUSED, RIGHT, WARNED, Attack, Place

from qlora_tool.config.keys import SECTIONS

ANY = frozenset({REFUSED, RIGHT, WARNED})
ONLY = frozenset({REFUSED})
DRY = ("train", "bad.yaml", "--dry-run")
# As YAML writes them, and whether some key takes such a value.
NEVER = (
    ".nan", ".inf", "-.inf", "!!binary aGk=", "!!set {a, b}", "{1: {2: {3: 4}}}", "[[[1]]]", "2026-11-27",
    "2026-11-27T10:00:00Z", '"\\uD800"', '"a\\u0000b"', "!!python/object:os.system {}", "[.nan]", "{a: .inf}",
)  # fmt: skip
SOME = (
    "1e400", "-1", "0", "99999999999999999999999999", "-99999999999999999999999999", "1e308", "1:30", "12:30:45", "yes",
    "no", "on", "null", "[]", "{}", '""', '" "', "0x7fffffffffffffff", "0o17", "1_000", "'../../../etc/passwd'",
    "/dev/zero", "/dev/null", "true", "3.7", "1e-400", "[1, 2]", "{a: b}", '"\\u202Eabc"', '"\\e[31mred"', '"("',
)  # fmt: skip


def on_configurations(chosen: random.Random) -> Iterator[Attack]:
    """Each key of each section."""
    for section, keys in SECTIONS.items():
        for key in keys.model_fields:
            for value in [*chosen.sample(NEVER, 2), *chosen.sample(SOME, 2)]:
                if key in ("output_dir", "report_to", "trust_remote_code") and value in SOME:
                    continue
                name = f"{section}.{key}: {value}"
                never = value in NEVER and (section, key) != ("data", "chat_template_kwargs")
                yield Attack(name, "configuration", _with(section, key, value), DRY, ONLY if never else ANY)


def _with(section: str, key: str, value: str):
    def prepare(place: Place) -> None:
        good = yaml.safe_load((place.inside / "good.yaml").read_text())
        good[section].pop(key, None)
        text = "".join(
            f"{name}:\n" + "".join(f"  {one}: {yaml.safe_dump(it, default_flow_style=True).splitlines()[0]}\n"
                                   for one, it in keys.items()) + (f"  {key}: {value}\n" if name == section else "")
            for name, keys in good.items()
        )  # fmt: skip
        place.write("bad.yaml", text)

    return prepare


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(12)
)
GOOD = "model: {name_or_path: model, device: cpu, compute_dtype: float32}\nadapter: {r: 4}\ndata: {train: data.jsonl}\n"
TEXTS = {
    "empty": "", "a word": "word", "a list": "- a\n- b\n", "a number": "3", "null": "null",
    "two documents": "a: 1\n---\nb: 2\n",
    "tabs": "model:\n\tname: x\n", "a bomb": BOMB, "a bomb in a key": f"{BOMB}model: {{name_or_path: *m}}\n",
    "a bomb in kwargs": BOMB.replace("a: &a", GOOD + "x:\n  a: &a", 1).replace("\nb:", "\n  b:"),
    "an endless list": GOOD + "training: &t {report_to: *t}\n",
    "a list in itself": GOOD + "training: {eval_prompts: &t [*t]}\n",
    "a section in itself": "model: &m\n  name_or_path: model\n  skip_modules: [*m]\n",
    "kwargs in itself": GOOD.replace("data: {", "data: {chat_template_kwargs: &k {a: *k}, "),
    "a key twice": GOOD + "training: {seed: 1, seed: 2}\n", "a section twice": GOOD + "model: {}\n",
    "an unknown alias": "model: *x\n", "a list as a key": "? [a, b]\n: 1\n", "a mapping as a key": "? {a: b}\n: 1\n",
    "numbers as keys": "1: 2\n3.5: 4\nnull: 5\ntrue: 6\n", "numbers as keys inside": "model: {1: 2, null: 3, [a]: 4}\n",
    "deep": "[" * 5000 + "]" * 5000, "deep mappings": "{a: " * 3000 + "1" + "}" * 3000,
    "deep in a key": GOOD + "training: {report_to: " + "[" * 2000 + "]" * 2000 + "}\n",
    "surrogate key": 'model: {"\\uD800": 1}\n', "surrogate section": '"\\uDFFF": 1\n', "null bytes": "model:\0 1\n",
    "escape in a key": '"\\e[2Jmodel": 1\n', "a tag": "!!python/object/apply:os.system [ls]\n",
    "own tag": "model: !x {a: 1}\n",
    "a merge": "a: &a {r: 4}\nadapter:\n  <<: *a\n", "a merge of a word": "model:\n  <<: word\n",
    "sixty million": GOOD + "training: {max_steps: 60000000:00}\n",
    "not a date": GOOD + "training: {seed: 2026-13-45}\n",
    "not a time": GOOD + "training: {seed: 2026-02-31T25:61:61Z}\n",
    "bad binary": GOOD + "training: {seed: !!binary ~}\n",
    "a huge int": GOOD + "training: {seed: " + "9" * 5000 + "}\n",
    "a huge hex": GOOD + "training: {seed: 0x" + "f" * 5000 + "}\n",
    "a long word": GOOD + "training: {output_dir: " + "x" * 100_000 + "}\n",
    "a long key": "x" * 100_000 + ": 1\n", "a long path": GOOD.replace("model,", "m" * 5000 + ",", 1),
    "ten thousand keys": "".join(f"k{n}: 1\n" for n in range(10_000)),
    "an int of !!int": GOOD + "training: {seed: !!int x}\n",
    "a float of !!float": GOOD + "training: {learning_rate: !!float x}\n", "omap": "!!omap [a: 1]\n",
    "pairs": "model: !!pairs [a: 1]\n",
    "backtracking": GOOD.replace("{r: 4}", "{r: 4, target_modules: '(.*)*(a|a)*$#'}"),
    "a regular expression of evil": GOOD.replace("{r: 4}", "{r: 4, target_modules: '(([a-z_.0-9]+)+)+!'}"),
    "an excluding one of evil": GOOD.replace("{r: 4}", "{r: 4, exclude_modules: '(([a-z_.0-9]+)+)+!'}"),
}  # fmt: skip
RUNS_WELL = ("a merge",)  # refused for its section `a` alone


def on_yaml(chosen: random.Random) -> Iterator[Attack]:
    """Files as a whole, words on the command line, and things in a file's place."""
    for name, text in TEXTS.items():
        yield Attack(f"yaml: {name}", "yaml", lambda place, text=text: place.write("bad.yaml", text), DRY)
    for name, raw in {"latin": b"model: {name_or_path: \xe9}\n", "utf-16": GOOD.encode("utf-16"), "zeros": bytes(4096),
                      "random": chosen.randbytes(4096),
                      "surrogate bytes": b'model: {revision: "\xed\xa0\x80"}\n'}.items():  # fmt: skip
        allowed = ANY if name == "utf-16" else ONLY
        yield Attack(f"yaml bytes: {name}", "yaml", lambda place, raw=raw: place.write("bad.yaml", raw), DRY, allowed)
    yield Attack("yaml: a folder", "yaml", lambda place: (place.inside / "bad.yaml").mkdir(), DRY)
    yield Attack("yaml: nothing there", "yaml", lambda place: None, DRY)
    yield Attack("yaml: a FIFO", "yaml", _fifo, DRY)
    yield Attack("yaml: endless", "yaml", lambda place: (place.inside / "bad.yaml").symlink_to("/dev/zero"), DRY)
    yield Attack("yaml: a link to itself", "yaml", lambda place: (place.inside / "bad.yaml").symlink_to("bad.yaml"),
                 DRY)
    for word in ("training.seed=.nan", "training.seed=[", "training.seed=*a", "=1", "training=1", "training.seed",
                 "model.=1",
                 "training.seed=!!python/name:os.x", "training.seed=" + "[" * 3000, "training.seed=2026-13-45",
                 'training.seed="\\uD800"', "data.chat_template_kwargs.a.b=.nan", "adapter.rank_pattern.(=3",
                 "data.columns.\udc80=x", "training.output_dir=\udcff", "model.name_or_path=\udcff/x",
                 "data.train=\udcff.jsonl",
                 "training.seed=" + "9" * 5000, "\udcff=1", "training.seed\x1b[31m=1",
                 "data.train=a\nb\x07.jsonl"):  # fmt: skip
        yield Attack(f"--set {word!r:.60}", "yaml", lambda place: None, ("train", "good.yaml", "--dry-run", "--set",
                                                                         word))
    for path in ("\udcff.yaml", "a\x1b[2J.yaml", "x" * 5000, "a" * 300 + ".yaml", ".", "..", "/dev/zero",
                 "/dev/null", ""):
        yield Attack(f"CONFIG {path!r:.60}", "yaml", lambda place: None, ("train", path, "--dry-run"))


def _fifo(place: Place) -> None:
    import os

    os.mkfifo(place.inside / "bad.yaml")
