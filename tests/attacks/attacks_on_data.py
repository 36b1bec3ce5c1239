"""Data, chat templates, and caches that cannot be used."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import yaml
from attack import MACHINE, REFUSED, RIGHT, SECONDS, WARNED, Attack, Place

ANY = frozenset({REFUSED, RIGHT, WARNED})
ONLY = frozenset({REFUSED})
ROW = '{"prompt": "What is 2?", "completion": "It is 2."}\n'
PREVIEW, TRAIN = ("preview",), ("train", "--dry-run")


def _config(place: Place, **data) -> None:
    good = yaml.safe_load((place.inside / "good.yaml").read_text())
    good["data"] |= data
    place.write("bad.yaml", yaml.safe_dump(good))


def _data(name: str, content: str | bytes | None, command: str = "preview", allowed=ONLY, thing: str = "") -> Attack:
    file = name.rpartition(": ")[2] if ": " in name else name

    def prepare(place: Place) -> None:
        path = place.inside / file
        if thing == "fifo":
            os.mkfifo(path)
        elif thing == "folder":
            path.mkdir()
        elif thing:
            path.symlink_to(thing)
        else:
            place.write(file, content)
        _config(place, train=file)

    args = ("preview", "bad.yaml") if command == "preview" else ("train", "bad.yaml", "--dry-run")
    return Attack(f"data: {name} {thing}{'' if command == 'preview' else ', ' + command}".strip(), "data", prepare,
                  args, allowed)


def _jsonl(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def on_data(chosen: random.Random) -> Iterator[Attack]:
    """Files of data."""
    wide = ",".join(f"c{n}" for n in range(100_000))
    turn, reply = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    yield _data("wide: a.csv", f"{wide}\n{wide}\n")
    yield _data("wide with names: b.csv", f"prompt,completion,{wide}\na,b,{wide}\n", allowed=ANY)
    yield _data("wide of one name: c.csv", ",".join(["a"] * 100_000) + "\n")
    yield _data("wide of no names: d.csv", "," * 100_000 + "\n" + "," * 100_000 + "\n")
    yield _data("wide row: e.csv", "prompt,completion\n" + "," * 1_000_000 + "\n")
    yield _data("wide and ragged: f.csv", f"{wide}\n" + "a,b\n" * 1000)
    yield _data("wide tsv: a.tsv", wide.replace(",", "\t") + "\n")
    yield _data("an open quote: g.csv", 'prompt,completion\n"a,b\n' + "x,y\n" * 200_000)
    yield _data("quotes: h.csv", '"' * 1_000_001 + "\n")
    yield _data("one long line: i.jsonl", "a" * 20_000_000)
    yield _data("keys in a row: j.jsonl", json.dumps({f"k{n}": n for n in range(100_000)}) + "\n")
    yield _data("deep: k.jsonl", "[" * 100_000 + "\n")
    yield _data("deep and whole: l.jsonl", "[" * 50_000 + "]" * 50_000 + "\n")
    yield _data("deep objects: m.jsonl", '{"a":' * 50_000 + "1" + "}" * 50_000 + "\n")
    yield _data("deep: n.json", "[" * 100_000)
    yield _data("deep and whole: o.json", "[" * 50_000 + "]" * 50_000)
    yield _data("deep content: p.jsonl", '{"messages": [{"role": "user", "content": ' + "[" * 900 + "]" * 900 + "}]}\n")
    yield _data("deep tools: q.jsonl",
                '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": '
                + "[" * 900 + "]" * 900 + "}\n", allowed=ANY)  # fmt: skip
    yield _data("huge int: r.jsonl", '{"prompt": ' + "9" * 10_000 + ', "completion": "a"}\n')
    yield _data("huge float: s.jsonl", '{"prompt": 1e400, "completion": "a"}\n', allowed=ANY)
    yield _data("nan: t.jsonl", '{"prompt": NaN, "completion": "a"}\n', allowed=ANY)
    for number, kind in enumerate(("/dev/zero", "/dev/full", "/dev/tty", "self.jsonl", "/proc/self/mem",
                                   "/dev/stdin", "/dev/urandom")):
        for ending in ("jsonl", "csv", "txt", "parquet"):
            yield _data(f"link{number}: self.{ending}" if kind == "self.jsonl" else f"link{number}: z.{ending}", None,
                        thing=f"self.{ending}" if kind == "self.jsonl" else kind)  # fmt: skip
    for ending in ("jsonl", "json", "csv", "txt", "parquet", "arrow", "xlsx", "jsonl.gz", "jsonl.zst"):
        yield _data(f"fifo: f.{ending}", None, thing="fifo")
        yield _data(f"random: r.{ending}", chosen.randbytes(5000))
        yield _data(f"nothing: n.{ending}", b"")
        yield _data(f"zeros: o.{ending}", bytes(5000))
    yield _data("folder: d.jsonl", None, thing="folder")
    for name, value in {"half": "\ud800", "control": "a\x00\x1b[2J\x07b", "right to left": "\u202eabc",
                        "long": "a" * 3_000_000, "number": 3, "null": None,
                        "list": ["a"], "object": {"a": 1}, "empty": "", "special": "<|im_end|>" * 10,
                        "bool": True}.items():  # fmt: skip
        for where in ("prompt", "completion"):
            row = {"prompt": "a", "completion": "b"} | {where: value}
            yield _data(f"{where} {name}: v.jsonl", _jsonl(row), allowed=ANY)
    for name, messages in {"no turns": [], "a word": "x", "null": None, "numbers": [1, 2],
                           "no role": [{"content": "a"}], "role of 1": [{"role": 1, "content": "a"}],
                           "half role": [{"role": "\ud800", "content": "a"}, turn],
                           "control role": [{"role": "\x1b[2J", "content": "a"}, turn],
                           "deep turn": [[[turn]]], "ten thousand": [turn, reply] * 5000}.items():  # fmt: skip
        yield _data(f"messages {name}: m.jsonl", _jsonl({"messages": messages}), allowed=ANY)
    yield _data("a broken line: x\x1b[2J\x07y.jsonl", "{\n")
    yield _data("control in keys: y.jsonl", _jsonl({"\x1b[2Jprompt": "a", "x\x07": "b"}))
    yield _data("control in a csv head: z.csv", "\x1b[2Ja,b\x07\n1,2\n")
    yield _data("half keys: h.jsonl", '{"\\ud800": 1}\n')
    yield _data("unused half keys: h2.jsonl", '{"\\ud800": 1, "prompt": "a", "completion": "b"}\n', allowed=ANY)
    yield _data("a bomb: b.jsonl.gz", gzip.compress(b"a" * 300_000_000, 1))
    yield _data("cut: c.jsonl.gz", gzip.compress(ROW.encode() * 1000)[:-20])
    for name in ("../data.jsonl", "/etc/passwd", "/proc/self/environ", "~/x.jsonl", "file:///etc/passwd",
                 "http://x/y.jsonl", "a" * 5000, "\x00.jsonl", ".", "/"):
        yield Attack(f"data.train {name!r:.40}", "data", lambda place, name=name: _config(place, train=name),
                     ("preview", "bad.yaml"),
                     ANY if name == "." else ONLY)  # fmt: skip
    for name in ("/dev/zero", "missing.jsonl", "\x1b[2J.jsonl"):
        yield Attack(f"evaluate {name!r}", "data", lambda place: None, ("evaluate", "model", "--data", name,
                                                                        "--device", "cpu"))
        yield Attack(f"prompts {name!r}", "data", lambda place: None, ("generate", "model", "--prompts", name,
                                                                       "--device", "cpu"))


LOOP = "".join(f"{{% for {name} in range(100000) %}}" for name in "abc") + "{% endfor %}" * 3
TEMPLATES = {
    "10^15 turns": LOOP, "10^15 turns that write": LOOP.replace("{% endfor %}", "x{% endfor %}", 1),
    "10^10 characters": "{{ 'a' * 10**10 }}", "10^10 of a variable": "{% set n = 10**10 %}{{ messages[0].role * n }}",
    "a tower": "{{ 10 ** 10 ** 10 }}", "a tower of variables": "{% set n = 10 %}{{ n ** n ** n }}",
    "doubling": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "doubling a list": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor "
                       "%}{{ n.x|length }}",
    "width": "{{ '%10000000000d' % 1 }}", "format width": "{{ '{:10000000000}'.format(1) }}",
    "center": "{{ 'a'|center(10000000000) }}",
    "ljust": "{{ 'a'.ljust(10000000000) }}", "zfill": "{{ '1'.zfill(10000000000) }}",
    "indent": "{{ 'a\nb'|indent(10000000000) }}",
    "replacing": "{% set n = namespace(x='aaaaaaaaaa') %}{% for i in range(30) %}{% set n.x = n.x.replace('a', "
                 "'aaaaaaaaaa') %}{% endfor %}{{ n.x }}",
    "lipsum": "{{ lipsum(n=1000000000) }}", "a range": "{{ range(10**15)|list }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "two of itself": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "escape": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch pwned') }}",
    "include": "{% include '/etc/passwd' %}", "import": "{% import 'x' as y %}",
    "syntax": "{% for %}", "unclosed": "{{", "unknown filter": "{{ 1|nope }}", "unknown name": "{{ nope.x }}",
    "divide": "{{ 1 / 0 }}", "nothing": "", "spaces": "  ",
    "control": "\x1b[2J{{ messages[0].content }}",
    "raises control": "{{ raise_exception('\\x1b[2J' ~ '\\n' ~ 'x') }}", "a long text": "a" * 30_000_000,
    "deep": "{% if 1 %}" * 500 + "{% endif %}" * 500, "deep lists": "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "many filters": "{{ 'a'" + "|upper" * 3000 + " }}",
    "a constant list": "{{ [0] * 10**10 }}", "join": "{{ ('a' * 100000)|list|join('b' * 100000) }}",
    "tojson": "{{ ([1] * 10**9)|tojson }}", "a slice": "{{ 'a'|batch(10**10, 'x')|list }}",
    "pprint": "{{ ([[1]] * 10**8)|pprint }}",
}  # fmt: skip
MAY = ("control", "recursion", "nothing", "spaces", "unknown name", "a long text", "deep", "many filters",
       "globals", "escape")


def on_templates(chosen: random.Random) -> Iterator[Attack]:
    """Chat templates: programs that came with a model."""
    for name, text in TEMPLATES.items():
        def prepare(place: Place, text=text) -> None:
            place.write("t.jinja", text)
            _config(place, chat_template="t.jinja")

        allowed = ANY if name in MAY else ONLY
        yield Attack(f"template: {name}", "template", prepare, ("preview", "bad.yaml"), allowed)
        if chosen.random() < 0.3:
            def own(place: Place, text=text) -> None:
                place.own("model")
                place.write("model/chat_template.jinja", text)

            yield Attack(f"template of the model: {name}", "template", own, ("train", "good.yaml", "--dry-run"),
                         allowed)
    for what in ("folder", "fifo", "/dev/zero", "self"):
        def thing(place: Place, what=what, file: str = "model/chat_template.jinja") -> None:
            place.own("model")
            path = place.inside / file
            path.unlink(missing_ok=True)
            if what == "fifo":
                os.mkfifo(path)
            elif what == "folder":
                path.mkdir()
            else:
                path.symlink_to(path.name if what == "self" else what)
            _config(place, **({"chat_template": file} if not file.startswith("model") else {}))

        yield Attack(f"template of the model: {what}", "template", thing, ("preview", "bad.yaml"))
        yield Attack(f"template: {what}", "template", lambda place, thing=thing: thing(place, file="t.jinja"),
                     ("preview", "bad.yaml"))


def on_caches(chosen: random.Random) -> Iterator[Attack]:
    """A cache that is a file, full, or holds something else: a warning and the work done, never an error."""
    commands = {
        "train": ("train", "good.yaml", "--dry-run"), "preview": ("preview", "good.yaml"),
        "profile-memory": ("profile-memory", "good.yaml"),
        "generate": ("generate", "adapter", "--prompt", "a", "--device", "cpu", "--max-new-tokens", "2"),
        "doctor": ("doctor",),
        "evaluate": ("evaluate", "adapter", "--data", "data.jsonl", "--device", "cpu"),
        "export-merged": ("export-merged", "adapter", "--output-dir", "../out", "--no-verify"),
        "kept": ("train", "good.yaml", "--dry-run", "--set", "model.keep_quantized=true"),
        "on the disk": ("train", "good.yaml", "--dry-run", "--set", "model.weights=disk"),
    }  # fmt: skip
    well = frozenset({RIGHT, WARNED})
    for name, args in commands.items():
        for what in ("a file", "below a file", "no right to write", "garbage", "folders for files", "full",
                     "unwritable"):
            env = {"a file": "blocked", "below a file": "blocked/cache", "unwritable": "/proc/qlora",
                   "full": "/sys"}.get(what)
            # Where layers lie on the disk, there has to be one.
            allowed = frozenset({*well, MACHINE}) if name == "on the disk" else well
            says = "QLORA_TOOL_CACHE" if what in ("below a file", "unwritable") and name == "train" else ""
            yield Attack(f"cache: {what}, {name}", "cache", _spoilt(what), args, allowed, says,
                         {"QLORA_TOOL_CACHE": env} if env else {}, 40.0 if name == "doctor" else SECONDS)  # fmt: skip


def _spoilt(what: str):
    def prepare(place: Place) -> None:
        place.write("blocked", "")
        cache = place.root / "cache"
        for path in sorted(cache.rglob("*"), reverse=True):
            if what == "garbage" and path.is_file():
                path.write_bytes(b"\xff{garbage")
            elif what == "folders for files" and path.is_file() and path.suffix == ".json":
                path.unlink()
                path.mkdir()
        if what == "no right to write":
            for path in [*cache.rglob("*"), cache]:
                path.chmod(path.stat().st_mode & 0o555)

    return prepare


def restore(root: Path) -> None:
    """So that the folder can be deleted."""
    for path in [root / "cache", *(root / "cache").rglob("*")]:
        path.chmod(path.stat().st_mode | 0o700)
