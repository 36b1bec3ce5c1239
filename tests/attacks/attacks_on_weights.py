"""safetensors files of models and adapters: headers, values, the index of shards, adapter_config.json."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from attack import REFUSED, RIGHT, WARNED, Attack, Place

ANY = frozenset({REFUSED, RIGHT, WARNED})
ONLY = frozenset({REFUSED})
DRY = ("train", "good.yaml", "--dry-run")
PLAIN = ("train", "good.yaml", "--dry-run", "--set", "model.quantization=none")
EXPORT = ("export-merged", "adapter", "--model", "model", "--output-dir", "../out", "--no-verify", "--quantization",
          "nf4")
INSPECT = ("inspect", "adapter")
NORM, WEIGHT = "model.layers.0.input_layernorm.weight", "model.layers.0.mlp.up_proj.weight"
EMBED = "model.embed_tokens.weight"


def parts(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: Any, data: bytes, length: int | None = None) -> bytes:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def _entry(change: Callable[[dict[str, Any]], Any], name: str = WEIGHT) -> Callable[[dict, bytes], bytes]:
    def made(header: dict[str, Any], data: bytes) -> bytes:
        change(header[name])
        return join(header, data)

    return made


HEADERS: dict[str, Callable[[dict[str, Any], bytes], bytes]] = {
    "empty": lambda h, d: b"", "seven bytes": lambda h, d: bytes(7), "a huge length": lambda h, d: join(h, d, 2**63),
    "a length of all": lambda h, d: join(h, d, 2**64 - 1), "length 0": lambda h, d: join(h, d, 0),
    "no data": lambda h, d: join(h, b""),
    "cut": lambda h, d: join(h, d[:-1]), "more data": lambda h, d: join(h, d + bytes(64)), "a list": lambda h,
    d: join([], d),
    "null": lambda h, d: join(None, d), "no tensors": lambda h, d: join({}, b""), "not JSON": lambda h,
    d: join(b"x" * 64, d),
    "deep": lambda h, d: join(b"[" * 100_000, d), "not UTF-8": lambda h, d: join(b'{"\xff": 1}', d),
    "zeros": lambda h, d: bytes(10_000),
    "overlap": lambda h, d: _entry(lambda e: e.update(data_offsets=[0, 32768]))(h, d),
    "out of file": _entry(lambda e: e.update(data_offsets=[10**9, 10**9 + 4])),
    "beyond 64 bits": _entry(lambda e: e.update(data_offsets=[2**70, 2**70 + 4])),
    "negative": _entry(lambda e: e.update(data_offsets=[-8, -4])),
    "turned": _entry(lambda e: e["data_offsets"].reverse()),
    "text offsets": _entry(lambda e: e.update(data_offsets=["0", "4"])),
    "no offsets": _entry(lambda e: e.pop("data_offsets")),
    "float offsets": _entry(lambda e: e.update(data_offsets=[0.5, 4.5])),
    "one offset": _entry(lambda e: e.update(data_offsets=[0])),
    "a huge shape": _entry(lambda e: e.update(shape=[2**40, 2**40])),
    "a negative shape": _entry(lambda e: e.update(shape=[-1, 4])),
    "another shape": _entry(lambda e: e.update(shape=[7, 3])), "a text shape": _entry(lambda e: e.update(shape="64")),
    "a float shape": _entry(lambda e: e.update(shape=[64.0, 128.0])),
    "nan shape": _entry(lambda e: e.update(shape=[float("nan")])),
    "no shape": _entry(lambda e: e.pop("shape")), "a dtype that is none": _entry(lambda e: e.update(dtype="F33")),
    "a number as dtype": _entry(lambda e: e.update(dtype=3)), "no dtype": _entry(lambda e: e.pop("dtype")),
    "other dtype": _entry(lambda e: e.update(dtype="F16")), "ints": _entry(lambda e: e.update(dtype="I32")),
    "uints": _entry(lambda e: e.update(dtype="U32")), "transposed": _entry(lambda e: e["shape"].reverse()),
    "flat": _entry(lambda e: e.update(shape=[e["shape"][0] * e["shape"][1]])),
    "four axes": _entry(lambda e: e.update(shape=[1, 1, *e["shape"]])),
    "int norm": _entry(lambda e: e.update(dtype="I32"), NORM),
    "int embeddings": _entry(lambda e: e.update(dtype="I32"), EMBED),
    "bool norm": lambda h, d: join(h | {NORM: h[NORM] | {"dtype": "BOOL", "shape": [256]}}, d),
    "entry is a list": lambda h, d: join(h | {WEIGHT: []}, d), "entry is null": lambda h,
    d: join(h | {WEIGHT: None}, d),
    "metadata is a list": lambda h, d: join(h | {"__metadata__": []}, d), "metadata of numbers": lambda h,
    d: join(h | {"__metadata__": {"a": 1}}, d),
    "a name with control": lambda h, d: join({("\x1b[2J" + k if k == WEIGHT else k): v for k, v in h.items()}, d),
    "a surrogate name": lambda h, d: join(json.dumps({("S" if k == WEIGHT else k): v for k,
                                                      v in h.items()}).replace('"S"', '"\\ud800"').encode(), d),
    "a tensor missing": lambda h, d: join({k: v for k, v in h.items() if k != WEIGHT}, d),
    "twice": lambda h,
    d: join(b'{"' + WEIGHT.encode() + b'": ' + json.dumps(h[WEIGHT]).encode() + b", " + json.dumps(h).encode()[1:], d),
}  # fmt: skip
HARMLESS = {"turned": ANY, "flat": ONLY, "twice": ANY, "metadata of numbers": ANY}


def on_headers(chosen: random.Random) -> Iterator[Attack]:
    """Headers of a model's weights."""
    for name, make in HEADERS.items():
        def prepare(place: Place, make=make) -> None:
            file = place.own("model") / "model.safetensors"
            file.write_bytes(make(*parts(file)))

        yield Attack(f"header: {name}", "header", prepare, DRY, HARMLESS.get(name, ONLY))
        if chosen.random() < 0.4:
            yield Attack(f"header: {name}, exported", "header", prepare, EXPORT, HARMLESS.get(name, ONLY))
    for what in ("folder", "fifo", "endless", "loop"):
        yield Attack(f"header: {what}", "header", _thing("model.safetensors", what), DRY)


def _thing(name: str, what: str, folder: str = "model"):
    def prepare(place: Place) -> None:
        file = place.own(folder) / name
        file.unlink(missing_ok=True)
        if what == "folder":
            file.mkdir()
        elif what == "fifo":
            os.mkfifo(file)
        else:
            file.symlink_to("/dev/zero" if what == "endless" else file.name)

    return prepare


def on_weights(chosen: random.Random) -> Iterator[Attack]:
    """Values that are no numbers, and integers, in each kind of tensor."""
    import torch

    for name in (NORM, WEIGHT, EMBED, "lm_head.weight"):
        for what in ("nan", "inf", "-inf", "int"):
            for args in (DRY, PLAIN, EXPORT):
                def prepare(place: Place, name=name, what=what) -> None:
                    from safetensors.torch import load_file, save_file

                    file = place.own("model") / "model.safetensors"
                    tensors = load_file(file)
                    if what == "int":
                        tensors[name] = tensors[name].to(torch.int32)
                    else:
                        tensors[name].view(-1)[-3] = float(what)
                    save_file(tensors, file, {"format": "pt"})

                which = args[0] if args is not PLAIN else "unquantized"
                yield Attack(f"weights: {what} in {name}, {which}", "weights", prepare, args, ONLY,
                             says=name.replace(".", r"\."))


def on_indexes(chosen: random.Random) -> Iterator[Attack]:
    """model.safetensors.index.json."""
    names = ("../model.safetensors", "/etc/passwd", "../../secret.safetensors", "sub/../../x.safetensors", "", ".",
             "..", "a\\..\\b",
             "C:\\x", "\ud800", "x" * 500, "\x1b[2J.safetensors", "nul\0l", "link.safetensors",
             "no.safetensors")  # fmt: skip
    for name in names:
        for args in (DRY, EXPORT):
            def prepare(place: Place, name=name) -> None:
                folder = place.own("model")
                place.write("model.safetensors", (folder / "model.safetensors").read_bytes())
                (folder / "model.safetensors").rename(folder / "shard.safetensors")
                (folder / "link.safetensors").symlink_to(place.inside / "model.safetensors")
                header, _ = parts(folder / "shard.safetensors")
                weights = {key: "shard.safetensors" for key in header if key != "__metadata__"} | {WEIGHT: name}
                place.write("model/model.safetensors.index.json", json.dumps({"weight_map": weights}))

            # A link inside is a file of the folder: the hub's cache consists of such.
            yield Attack(f"index: {name!r:.40}, {args[0]}", "index", prepare, args,
                         ANY if name == "link.safetensors" else ONLY)
    for text in ("", "[]", "null", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}',
                 '{"weight_map": {"a": null}}',
                 '{"weight_map": {"a": ["b"]}}', '{"weight_map": "x"}', "[" * 5000,
                 '{"weight_map": {"a": {"b": 1}}}'):  # fmt: skip
        def prepare(place: Place, text=text) -> None:
            folder = place.own("model")
            (folder / "model.safetensors").rename(folder / "shard.safetensors")
            place.write("model/model.safetensors.index.json", text)

        yield Attack(f"index: {text:.40}", "index", prepare, DRY)


VALUES: tuple[Any, ...] = (0, -1, 10**20, 1.5, float("nan"), float("inf"), "x", "\ud800", "\x1b[2J", [], [[1]], {},
                           {"a": {"b": 1}}, True, None,
                           ["a"], "(", "x" * 10_000, {"(": 4}, {"a": -1}, {"a": float("nan")}, [1, None])  # fmt: skip


def on_adapter_configs(chosen: random.Random) -> Iterator[Attack]:
    """adapter_config.json."""
    keys = ("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern",
            "bias", "peft_type",
            "task_type", "modules_to_save", "layers_to_transform", "layers_pattern", "use_dora", "use_rslora",
            "init_lora_weights",
            "fan_in_fan_out", "base_model_name_or_path", "revision", "target_parameters", "trainable_token_indices",
            "lora_bias",
            "inference_mode", "megatron_config", "peft_version", "unknown_key")  # fmt: skip
    never = {"r": ("x", float("nan"), 0, -1, 10**20, 1.5, [], {}, True), "lora_alpha": ("x", float("nan"),
        float("inf"), [], {}),
             "lora_dropout": ("x", float("nan"), -1, [], 1.5)}  # fmt: skip
    for key in keys:
        tried = [(value, ONLY) for value in never.get(key, ())] or [(value, ANY) for value in chosen.sample(VALUES, 4)]
        for value, allowed in tried:
            def prepare(place: Place, key=key, value=value) -> None:
                place.json("adapter/adapter_config.json", lambda config: config | {key: value})

            args = chosen.choice((EXPORT, INSPECT)) if allowed is ANY else EXPORT
            yield Attack(f"adapter_config.json {key}: {value!r:.40}", "adapter config", prepare, args, allowed)
    for text in ("", "[]", "null", "{}", "x", "[" * 5000, '{"peft_type": ["LORA"]}', '{"peft_type": "LORA"}',
                 '{"peft_type": {"a": 1}}'):
        def prepare(place: Place, text=text) -> None:
            place.own("adapter")
            place.write("adapter/adapter_config.json", text)

        yield Attack(f"adapter_config.json: {text:.40}", "adapter config", prepare, EXPORT)
    for what in ("folder", "fifo", "endless", "loop"):
        yield Attack(f"adapter_config.json: {what}", "adapter config", _thing("adapter_config.json", what,
                                                                              "adapter"), EXPORT)
    for text in ("", "[]", "null", "{}", "x", "[" * 5000, '{"base": 3}',
                 '{"base": {"name_or_path": 3, "revision": 4}, "quantization": 5, "double_quant": 6}',
                 '{"base": {"name_or_path": "model", "revision": null}, "quantization": "nf5", "double_quant": true}',
                 '{"base": {"name_or_path": "model", "revision": null, "files": 3}, "quantization": "nf4", '
                 '"double_quant": true}',
                 '{"base": {"name_or_path": "model", "revision": null}, "quantization": "nf4", "double_quant": true, '
                 '"start": 3}',
                 '{"base": {"name_or_path": "model", "revision": null}, "quantization": "nf4", "double_quant": true, '
                 '"chat_template_kwargs": [1]}'):  # fmt: skip
        def prepare(place: Place, text=text) -> None:
            place.own("adapter")
            place.write("adapter/qlora_tool.json", text)

        yield Attack(f"qlora_tool.json: {text:.130}", "adapter config", prepare, EXPORT, ANY)


def on_adapter_tensors(chosen: random.Random) -> Iterator[Attack]:
    """adapter_model.safetensors."""
    import torch

    def first(tensors: dict[str, Any], letter: str) -> str:
        return next(name for name in tensors if f"lora_{letter}" in name)

    def put(letter: str, change: Callable[[Any], Any]):
        def made(tensors: dict[str, Any]) -> None:
            tensors[first(tensors, letter)] = change(tensors[first(tensors, letter)]).contiguous()

        return made

    changes: dict[str, Callable[[dict[str, Any]], Any]] = {}
    for letter in "AB":
        changes |= {
            f"nan in {letter}": put(letter, lambda t: torch.full_like(t, float("nan"))),
            f"inf in {letter}": put(letter, lambda t: t / 0),
            f"ints in {letter}": put(letter, lambda t: t.to(torch.int32)), f"bools in {letter}": put(letter,
                lambda t: t > 0),
            f"{letter} transposed": put(letter, lambda t: t.T), f"{letter} flat": put(letter, lambda t: t.reshape(-1)),
            f"{letter} cut": put(letter, lambda t: t[:, :-1]), f"{letter} short": put(letter, lambda t: t[:-1]),
            f"{letter} a number": put(letter, lambda t: t.sum()), f"{letter} empty": put(letter, lambda t: t[:0]),
            f"{letter} complex": put(letter, lambda t: t.to(torch.complex64)), f"{letter} missing": lambda t,
            x=letter: t.pop(first(t, x)),
            f"{letter} of three axes": put(letter, lambda t: t[None]), f"{letter} in fp8": put(letter,
                lambda t: t.to(torch.float8_e4m3fn)),
        }  # fmt: skip
    changes |= {
        "nothing": lambda t: t.clear(),
        "another module": lambda t: t.update({"base_model.model.x.lora_A.weight": torch.ones(4, 4)}),
        "an own name": lambda t: t.update({"x": torch.ones(3)}),
        "a control name": lambda t: t.update({"\x1b[2J": torch.ones(3)}),
        "of another width": lambda t: [t.update({k: torch.ones(4, 7) if "lora_A" in k else torch.ones(9,
            4)}) for k in list(t)],
    }  # fmt: skip
    for name, change in changes.items():
        def prepare(place: Place, change=change) -> None:
            from safetensors.torch import load_file, save_file

            file = place.own("adapter") / "adapter_model.safetensors"
            tensors = load_file(file)
            change(tensors)
            save_file(tensors, file)

        args = EXPORT if chosen.random() < 0.6 else INSPECT
        yield Attack(f"adapter: {name}", "adapter tensors", prepare, args, ANY if name == "another module" else ONLY)
    for name in chosen.sample(sorted(HEADERS), 14):
        def prepare(place: Place, make=HEADERS[name]) -> None:
            file = place.own("adapter") / "adapter_model.safetensors"
            header, data = parts(file)
            keys = [key for key in header if key != "__metadata__"]
            renamed = {WEIGHT: header[keys[0]], NORM: header[keys[1]], EMBED: header[keys[2]],
                       **{key: header[key] for key in keys[3:]}}
            made = make(renamed, data)
            for old, new in ((WEIGHT, keys[0]), (NORM, keys[1]), (EMBED, keys[2])):
                made = made if len(made) < 9 else _renamed(made, old, new)
            file.write_bytes(made)

        yield Attack(f"adapter header: {name}", "adapter tensors", prepare, EXPORT, HARMLESS.get(name, ONLY))


def _renamed(made: bytes, old: str, new: str) -> bytes:
    length = int.from_bytes(made[:8], "little")
    text, data = made[8 : 8 + length], made[8 + length :]
    changed = text.replace(f'"{old}"'.encode(), f'"{new}"'.encode())
    return (len(changed) if length == len(text) else length).to_bytes(8, "little") + changed + data
