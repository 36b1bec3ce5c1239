"""A model's folder: its config.json and its tokenizer's files."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

from attack import REFUSED, RIGHT, WARNED, Attack, Place

ANY = frozenset({REFUSED, RIGHT, WARNED})
ONLY = frozenset({REFUSED})
DRY = ("train", "good.yaml", "--dry-run")
MEMORY = ("profile-memory", "good.yaml")
EXPORT = ("export-merged", "adapter", "--model", "model", "--output-dir", "../out", "--no-verify", "--quantization",
          "nf4")
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads",
         "head_dim", "max_position_embeddings")  # fmt: skip
NUMBERS = ("rms_norm_eps", "initializer_range", "attention_dropout")
OTHERS = ("hidden_act", "tie_word_embeddings", "torch_dtype", "dtype", "rope_parameters", "eos_token_id",
          "bos_token_id",
          "pad_token_id", "architectures", "model_type", "quantization_config", "attention_bias", "mlp_bias",
          "layer_types",
          "transformers_version", "auto_map", "use_cache", "sliding_window")  # fmt: skip
NEVER_A_SIZE: tuple[Any, ...] = (0, -1, -(10**20), 10**20, 1.5, float("nan"), float("inf"), "64", "x", [64],
                                 {"a": 1}, True, 1e300)
NEVER_A_NUMBER: tuple[Any, ...] = (float("nan"), float("inf"), -float("inf"), "x", [1], {"a": 1}, 10**400, None)
NEVER_A_FACTOR: tuple[Any, ...] = (0, -1, float("nan"), float("inf"), "x", {"a": 1}, 1e300, True)
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0}, "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 64},
    "llama3": {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 64},
}
ANYTHING: tuple[Any, ...] = (0, -1, 10**20, 1.5, float("nan"), float("inf"), "x", "\ud800", "\x1b[2J", [], [[1]],
                             {"a": {"b": 1}},
                             {}, True, None, ["a"], "a" * 10_000)  # fmt: skip


def on_model_configs(chosen: random.Random) -> Iterator[Attack]:
    """Fields of config.json, and the file as a whole."""
    for field in SIZES:
        for value in chosen.sample(NEVER_A_SIZE, 6):
            none = field == "max_position_embeddings" and value == -1  # no limit, as xlnet says it
            yield _with(field, value, chosen.choice((DRY, MEMORY)), ANY if none else ONLY)
        if field != "num_hidden_layers":  # below
                yield _with(field, 10**8, chosen.choice((DRY, MEMORY)),
                            ANY if field == "max_position_embeddings" else ONLY)
        yield _with(field, None, DRY, ANY)
    for field in NUMBERS:
        for value in chosen.sample(NEVER_A_NUMBER, 4):
            yield _with(field, value, chosen.choice((DRY, MEMORY)), ANY if value is None else ONLY)
    for field in OTHERS:
        for value in chosen.sample(ANYTHING, 4):
            yield _with(field, value, DRY, ANY)
    for kind, fields in ROPES.items():
        for field in fields:
            for value in chosen.sample(NEVER_A_FACTOR, 3):
                rope = {field: value, "rope_type": kind} | fields | {field: value, "rope_theta": 1e4}
                yield _with("rope_parameters", rope, chosen.choice((DRY, MEMORY)), ONLY)
    yield _with("max_position_embeddings", 0, DRY, ONLY)
    for name, text in {"empty": "", "a list": "[]", "null": "null", "a word": '"x"',
                       "cut": '{"model_type": "llama",', "deep": '{"a":' * 5000,
                       "deep and whole": "[" * 5000 + "]" * 5000, "no model_type": "{}",
                       "a type as a list": '{"model_type": ["llama"]}',
                       "only a type": '{"model_type": "llama"}',
                       "a huge int": '{"model_type": "llama", "vocab_size": ' + "9" * 5000 + "}",
                       "surrogates": '{"model_type": "\\ud800"}',
                       "control": '{"model_type": "\\u001b[2J"}'}.items():  # fmt: skip
        for args in (DRY, EXPORT):
            if name != "only a type" or args is EXPORT:  # a model of 7B, whose memory takes a while to predict
                yield Attack(f"config.json: {name}, {args[0]}", "model", _file("config.json", text), args)
    for name, raw in {"bytes": chosen.randbytes(1000), "utf-16": '{"model_type": "llama"}'.encode("utf-16"),
                      "bom": b"\xef\xbb\xbf{}"}.items():
        yield Attack(f"config.json: {name}", "model", _file("config.json", raw), DRY)
    for command in (DRY, MEMORY, EXPORT, ("generate", "model", "--prompt", "a"), ("evaluate", "model", "--data",
                                                                                  "data.jsonl")):
        for what in ("folder", "fifo", "endless", "missing", "unreadable link"):
            yield Attack(f"config.json: {what}, {command[0]}", "model", _thing("config.json", what), command)
        for layers in (10**6, 10**8, 10**15):
            yield _with("num_hidden_layers", layers, command, ONLY)


def _with(field: str, value: Any, args: tuple[str, ...], allowed: frozenset[str]) -> Attack:
    def prepare(place: Place) -> None:
        place.json("model/config.json", lambda config: config | {field: value})

    return Attack(f"config.json {field}: {value!r:.40}, {args[0]}", "model", prepare, args, allowed)


def _file(name: str, content: str | bytes):
    def prepare(place: Place) -> None:
        place.own("model")
        place.write(f"model/{name}", content)

    return prepare


def _thing(name: str, what: str):
    """Something else in a file's place."""

    def prepare(place: Place) -> None:
        file = place.own("model") / name
        if file.exists():
            file.unlink()
        if what == "folder":
            file.mkdir()
        elif what == "fifo":
            os.mkfifo(file)
        elif what == "endless":
            file.symlink_to("/dev/zero")
        elif what == "unreadable link":
            file.symlink_to(file.name)

    return prepare


SETTINGS: tuple[tuple[str, Any], ...] = tuple(
    (key, value)
    for key in ("eos_token", "bos_token", "pad_token", "tokenizer_class", "model_max_length", "chat_template",
                "added_tokens_decoder",
                "extra_special_tokens", "additional_special_tokens", "clean_up_tokenization_spaces", "padding_side",
                "auto_map")
    for value in (0, -1, float("nan"), 1e400, "\ud800", "x" * 100_000, [], [1], {"a": 1}, {"0": "x"}, True, None,
                  "../../x", "\x1b[2J")
)  # fmt: skip


def on_tokenizers(chosen: random.Random) -> Iterator[Attack]:
    """Files of the tokenizer."""
    preview = ("preview", "good.yaml")
    for key, value in chosen.sample(SETTINGS, 48):
        def prepare(place: Place, key: str = key, value: Any = value) -> None:
            place.json("model/tokenizer_config.json", lambda settings: settings | {key: value})

        yield Attack(f"tokenizer_config.json {key}: {value!r:.40}", "tokenizer", prepare, preview, ANY)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        for name, text in {"empty": "", "a list": "[1]", "null": "null", "cut": '{"version": "1.0",',
                           "deep": "[" * 5000, "a word": '"x"',
                           "garbage": "garbage", "an object": '{"model": 3}'}.items():  # fmt: skip
            harmless = file == "tokenizer_config.json" and name == "an object"
            for args in (preview, EXPORT):
                yield Attack(f"{file}: {name}, {args[0]}", "tokenizer", _file(file, text), args,
                             ANY if harmless else ONLY)
        for what in ("folder", "fifo", "endless", "unreadable link"):
            yield Attack(f"{file}: {what}", "tokenizer", _thing(file, what), preview)
    for name, change in _OF_TOKENIZERS.items():
        def prepare(place: Place, change=change) -> None:
            place.json("model/tokenizer.json", change)

        yield Attack(f"tokenizer.json: {name}", "tokenizer", prepare, preview, ANY)


_OF_TOKENIZERS = {
    "negative ids": lambda t: t["model"]["vocab"].update({"a": -5}),
    "huge ids": lambda t: t["model"]["vocab"].update({"a": 2**32 - 1}),
    "huge added ids": lambda t: t["added_tokens"].append(dict(t["added_tokens"][0], id=2**31,
                                                              content="<z>")) if t["added_tokens"] else None,
    "no vocabulary": lambda t: t["model"].update(vocab={}),
    "vocabulary is a list": lambda t: t["model"].update(vocab=[1]),
    "merges of nothing": lambda t: t["model"].update(merges=[["zzz", "qqq"]]),
    "no model": lambda t: t.pop("model") and None,
    "unknown model": lambda t: t["model"].update(type="Foo"),
    "an evil pre-tokenizer": lambda t: t.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "((a+)+)+$"},
                                                               "behavior": "Isolated", "invert": False}),
    "ids shared": lambda t: t["model"]["vocab"].update({"a": 1, "b": 1}),
}  # fmt: skip
