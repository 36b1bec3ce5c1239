"""A model's config.json, checked before transformers makes modules by it: numbers of the right kind, within what
models have. Its names are those of many families; a rule is for all names of its form.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qlora_tool.errors import UserError, printable
from qlora_tool.files.reading import read_object

NAME = "config.json"
MOST_LAYERS = 4096
_CURE = "correct it, or download the model again"


class _Rule(NamedTuple):
    """What fields have whose names fit `names`; `least` is for the model that is read, its other parts may have 0,
    except `everywhere`."""

    names: re.Pattern[str]
    least: float
    most: int
    whole: bool = True
    lists: bool = True  # a number a layer
    everywhere: bool = False
    minus_one: bool = False  # which says that there is no limit


_RULES = (
    _Rule(re.compile(r"(num_hidden_layers|num_layers|n_layers?|num_decoder_layers)"), 1, MOST_LAYERS, lists=False),
    _Rule(re.compile(r"\w*(num_layers|hidden_layers|encoder_layers|decoder_layers|_predict_layers)"), 0,
          MOST_LAYERS, lists=False),
    _Rule(re.compile(r"(vocab_size|hidden_size|intermediate_size|n_embd|d_model|num_attention_heads|n_heads?"
                     r"|num_key_value_heads|num_heads)"), 1, 2**31 - 1),
    _Rule(re.compile(r"head_dim"), 1, 2**31 - 1),
    _Rule(re.compile(r"n_inner|ffn_dim"), 0, 2**31 - 1),
    _Rule(re.compile(r"(\w+_)?token_id"), -1, 2**31 - 1),
    _Rule(re.compile(r"(\w+_)?rope_theta|rotary_emb_base|rope_local_base_freq"), 1, 2**63, whole=False,
          everywhere=True),
    _Rule(re.compile(r"(max_position_embeddings|n_positions|n_ctx|max_seq_len)"), 1, 2**31 - 1, whole=False,
          minus_one=True),
    _Rule(re.compile(r"(short|long)_factor"), 0.001, 10**6, whole=False, everywhere=True),
    _Rule(re.compile(r"((low_freq_|high_freq_|attention_)?factor|beta_fast|beta_slow)"), 0.001, 10**6, whole=False,
          lists=False, everywhere=True),
    _Rule(re.compile(r"original_max_position_embeddings"), 1, 2**31 - 1, whole=False, everywhere=True),
    _Rule(re.compile(r"partial_rotary_factor"), 0, 1, whole=False, everywhere=True),
    _Rule(re.compile(r"\w*(_eps|_epsilon)"), 0, 1, whole=False),
    _Rule(re.compile(r"(\w+_dropout|\w+_pdrop|dropout)"), 0, 1, whole=False),
)  # fmt: skip
_DTYPES = re.compile(r"(torch\.)?(bfloat16|float16|float32|float64|half|float|double|float8_\w+|auto)")
_MAY_BE_FLAGS = re.compile(r"\w*(dropout|pdrop)")
_LARGEST = 2**64


def read_config_file(folder: Path) -> dict[str, Any]:
    """What a model folder's config.json says.

    Raises:
        UserError: there is none, it is no JSON object, or numbers in it are none or out of all bounds: a line for each.
    """
    file = folder / NAME
    if not file.exists() and not file.is_symlink():
        raise UserError(f"{folder}: no {NAME} in it, so it is not a model folder; name a folder that has one")
    raw = read_object(file, "download the model again")
    if faults := list(dict.fromkeys(_faults(str(file), raw))):
        more = [f"{file}: and {len(faults) - 5} more such fields"] if len(faults) > 5 else []
        raise UserError([*faults[:5], *more])
    return raw


def _faults(where: str, values: Mapping[str, Any], prefix: str = "", main: bool = True) -> Iterator[str]:
    for name, value in values.items():
        shown = f"{where}: {printable(prefix + str(name), 80)} is {printable(repr(value), 80)}"
        rule = next((rule for rule in _RULES if rule.names.fullmatch(str(name))), None)
        if main and name in ("dtype", "torch_dtype") and not _is_dtype(value):
            yield f"{shown}, expected the name of a dtype of weights, such as 'bfloat16'; {_CURE}"
        elif isinstance(value, dict) and rule is None:
            yield from _faults(where, value, f"{prefix}{name}.", main and name in ("text_config", "llm_config"))
        elif lacking := _no_number(value):
            yield f"{shown}, {lacking}; {_CURE}"
        elif main and str(name).endswith("_config") and not isinstance(value, dict | type(None)):
            yield f"{shown}, expected an object; {_CURE}"
        elif rule is not None:
            least = rule.least if main or rule.everywhere else min(rule.least, 0)
            several = isinstance(value, list) and value and rule.lists
            if not all(_fits(str(name), one, rule, least) for one in (value if several else [value])):
                kind = "a whole number" if rule.whole else "a number"
                yield f"{shown}, expected {kind} from {least} to {rule.most:,}; {_CURE}"


def _is_dtype(value: Any) -> bool:
    return value is None or (isinstance(value, str) and bool(_DTYPES.fullmatch(value)))


def keys_holding(values: Mapping[str, Any], value: Any, prefix: str = "") -> list[str]:
    """The dotted names of the fields that have a value: a family's code tells the value alone."""
    found = []
    for name, one in values.items():
        if isinstance(one, dict):
            found += keys_holding(one, value, f"{prefix}{name}.")
        elif type(one) is type(value) and one == value:
            found.append(f"{prefix}{name}")
    return found


def _no_number(value: Any) -> str:
    """What is wrong with a number, or with those of a list; a list may have infinite ones, as bounds."""
    if isinstance(value, list):
        return next((said for one in value if not _infinite(one) and (said := _no_number(one))), "")
    if isinstance(value, float) and not math.isfinite(value):
        return "which is no finite number"
    return f"which is beyond {_LARGEST:,}" if isinstance(value, int) and abs(value) > _LARGEST else ""


def _infinite(value: Any) -> bool:
    return isinstance(value, float) and math.isinf(value)


def _fits(name: str, value: Any, rule: _Rule, least: float) -> bool:
    if value is None or (rule.minus_one and value == -1):
        return True
    if isinstance(value, bool):
        return bool(_MAY_BE_FLAGS.fullmatch(name))
    if isinstance(value, int | float):
        whole = isinstance(value, int) or value.is_integer()
        return (whole or not rule.whole) and least <= value <= rule.most and not (
            rule.whole and isinstance(value, float))
    return False
