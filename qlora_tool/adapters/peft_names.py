"""PEFT's files as they are found: checked values, names of other programs and versions brought to today's."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from qlora_tool.adapters.targets import layer_of, matches
from qlora_tool.choices import Quantization
from qlora_tool.config.patterns import check_pattern
from qlora_tool.errors import UserError, printable

PREFIX = "base_model.model."
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
HIGHEST_RANK = 1 << 20
_TENSOR = r"lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|(?:hada|lokr|vera)_\w+"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(one, str) for one in value))


def _names_or_expression(value: Any) -> bool:
    return _names(value) or (isinstance(value, str) and _compiles([value]))


def _layer_names(value: Any) -> bool:
    return _names_or_expression(value) and (not isinstance(value, list) or _compiles(value))


def _tokens(value: Any) -> bool:
    lists = value.values() if isinstance(value, dict) else [] if value is None else [value]
    return all(isinstance(ids, list) and all(_whole(one) and one >= 0 for one in ids) and len(set(ids)) == len(ids)
               for ids in lists)  # fmt: skip


def _compiles(expressions: Iterable[str]) -> bool:
    try:
        return all(one == "" or check_pattern(one) for one in expressions)
    except ValueError:
        return False


def _pattern(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, dict) and all(_number(one) and one > 0 for one in value.values()) and _compiles(value)


_Rule = tuple[Callable[[Any], bool], str]
_FLAG: _Rule = (lambda value: value is None or isinstance(value, bool), "true or false")
_MODULES: _Rule = (_names_or_expression, "a list of names or one regular expression")
_NAMES: _Rule = (_names, "a list of names")
_BIASES = ("none", "all", "lora_only", "vera_only")
_RULES: dict[str, _Rule] = {
    "r": (lambda value: _whole(value) and 1 <= value <= HIGHEST_RANK, f"a whole number from 1 to {HIGHEST_RANK:,}"),
    "lora_alpha": (_number, "a number"),
    "alpha": (_number, "a number"),
    "lora_dropout": (lambda value: value is None or (_number(value) and 0 <= value < 1), "a number from 0 to below 1"),
    "rank_pattern": (_pattern, "a mapping from regular expressions to ranks"),
    "alpha_pattern": (_pattern, "a mapping from regular expressions to numbers"),
    "target_modules": _MODULES,
    "exclude_modules": _MODULES,
    "target_parameters": _NAMES,
    "modules_to_save": _NAMES,
    "layers_pattern": (_layer_names, "a name or a list of names"),
    "layers_to_transform": (
        lambda value: value is None or _whole(value) or (isinstance(value, list) and all(map(_whole, value))),
        "a whole number or a list of whole numbers",
    ),
    "trainable_token_indices": (_tokens, "a list of tokens' ids, no two alike, or a mapping from names to such lists"),
    "bias": (lambda value: value in _BIASES and isinstance(value, str), f"one of {', '.join(_BIASES)}"),
    "projection_prng_key": (_whole, "a whole number"),
    "revision": (lambda value: value is None or isinstance(value, str), "a branch, tag or commit"),
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"), _FLAG),
}


def check_config(file: Path, config: Mapping[str, Any]) -> None:
    """Refuse an adapter_config.json with values of the wrong kind, or of another program.

    Raises:
        UserError: a line for each.
    """
    if "lora_parameters" in config or "fine_tune_type" in config:
        raise UserError(f"{file}: an adapter of mlx-lm, which cannot be read here; fuse it there (mlx_lm.fuse), or "
                        "save it in PEFT's form")  # fmt: skip
    if config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "SEQ_2_SEQ_LM"):
        raise UserError(f"{file}: task_type {config['task_type']}: it is for a model with another head; expected an "
                        "adapter of a causal language model (CAUSAL_LM)")  # fmt: skip
    faults = [
        f"{file}: {key} is {printable(repr(value), 80)}, expected {expected}; correct it, or save the adapter again"
        for key, (fits, expected) in _RULES.items() if key in config and not fits(value := config[key])
    ]  # fmt: skip
    if faults:
        raise UserError(faults)


def _is_base(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name_or_path"), str) \
        and isinstance(value.get("revision"), str | None) and isinstance(value.get("files"), dict | None)  # fmt: skip


_OBJECT: _Rule = (lambda value: isinstance(value, dict | None), "an object")
_PROVENANCE: dict[str, _Rule] = {
    "base": (_is_base, "an object with name_or_path, revision and files"),
    "quantization": (lambda value: value in get_args(Quantization), f"one of {', '.join(get_args(Quantization))}"),
    "double_quant": (lambda value: isinstance(value, bool), "true or false"),
    "embeddings": (lambda value: isinstance(value, str), "as_stored or int8"),
    "skip_modules": (lambda value: _names(value) or isinstance(value, str), "a list of names"),
    **dict.fromkeys(("start", "chat_template_kwargs"), _OBJECT),
}


def check_provenance(file: Path, provenance: Mapping[str, Any]) -> None:
    """Refuse a qlora_tool.json with values of the wrong kind.

    Raises:
        UserError: a line for each.
    """
    faults = [
        f"{file}: {key} is {printable(repr(provenance[key]), 80)}, expected {expected}; copy it again, or remove it "
        "and give --model and --quantization"
        for key, (fits, expected) in _PROVENANCE.items() if key in provenance and not fits(provenance[key])
    ]  # fmt: skip
    if faults:
        raise UserError(faults)


def plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by today's names, without the prefix: what torch.compile and raw checkpoints put into names is taken out,
    and copies that PEFT keeps of what it trains are left out."""
    found = {}
    for name, tensor in tensors.items():
        name = name.replace("_orig_mod.", "").removeprefix(PREFIX)
        name = re.sub(rf"\.({_TENSOR})\.default(?=\.|$)", r".\1", name)
        name = re.sub(r"\.modules_to_save(\.default)?\.", ".", name)
        name = name.replace(".token_adapter.base_layer.", ".")  # embeddings that PEFT saved along, under trained rows
        if ".original_module." not in name:
            found[name] = tensor
    return found


def is_target(name: str, config: Mapping[str, Any]) -> bool:
    """Whether PEFT would adapt the module `name` by a configuration, and so would read tensors for it."""
    excluded, wanted = config.get("exclude_modules"), config.get("target_modules")
    if matches(f"{name}.weight", config.get("target_parameters") or ()):  # which PEFT excludes nothing of
        return True
    if excluded and matches(name, excluded):
        return False
    if is_saved(name, config):
        return False
    if wanted is None or wanted == "all-linear":
        return True
    if isinstance(wanted, str) or name in wanted:
        return matches(name, wanted)
    layers = config.get("layers_to_transform")
    if not matches(name, wanted) or layers is None or layers == []:
        return matches(name, wanted)
    return layer_of(name, config.get("layers_pattern") or ()) in ([layers] if isinstance(layers, int) else layers)


def is_saved(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a module, or a tensor of it, is trained whole for `modules_to_save`, as PEFT reads that."""
    return any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in config.get("modules_to_save") or ())


# Names that changed between versions of transformers, tried where a module is not there under its own.
_MOVED = [
    (r"^language_model\.model\.", "model.language_model."), (r"^language_model\.lm_head", "lm_head"),
    (r"^model\.(?=layers\.|embed_tokens|norm)", "model.language_model."),
    (r"^(vision_tower|multi_modal_projector|visual|vision_model|connector)\.", r"model.\1."),
    (r"\.block_sparse_moe\.", ".mlp."),
]  # fmt: skip
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.lora_(A|B)\.weight")
_FUSED = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}


def moved(name: str, exists: Callable[[str], bool]) -> str:
    """What a tensor is called by the model, where its own name is an earlier version's.

    Args:
        exists: whether the model has a module of a name.
    """
    module = _module_of(name)
    if exists(module):
        return name
    for pattern, today in _MOVED:
        candidate = re.sub(pattern, today, module)
        of_experts = ".experts." in candidate and exists(_container(candidate))
        if candidate != module and (of_experts or exists(candidate)):
            return candidate + name[len(module) :]
    return name


def _module_of(name: str) -> str:
    module = re.split(rf"\.(?:{_TENSOR}|base_layer|token_adapter)\b", name)[0]
    return module.removesuffix(".weight").removesuffix(".bias")


def _container(name: str) -> str:
    return name.partition(".experts.")[0] + ".experts"


def join_experts(tensors: Mapping[str, Tensor], r: int, exists: Callable[[str], bool], file: Path) -> dict[str, Tensor]:
    """LoRA on the linear modules that experts were in transformers 4, as LoRA on the weights that they are now.

    Gate and up of an expert become one of rank 2r: their A's one below the other, their B's along the diagonal. Names
    and layout are those of PEFT's files for `target_parameters`.

    Args:
        r: of every one of them.
        exists: whether the model has a module of a name; experts that are modules of their own stay.

    Raises:
        UserError: gate without up, an expert that lacks one, or another rank.
    """
    found: dict[str, Tensor] = {}
    layers: dict[str, dict[str, dict[int, dict[str, Tensor]]]] = {}
    for name, tensor in tensors.items():
        match = _EXPERT.fullmatch(name)
        if match is None or exists(name.partition(".lora_")[0]):
            found[name] = tensor
        else:
            of_kind = layers.setdefault(match[1], {}).setdefault(_FUSED[match[3]], {})
            of_kind.setdefault(int(match[2]), {})[match[4]] = tensor
    for module, kinds in layers.items():
        wanted = ("gate", "up", "down") if "down" in kinds else ("gate", "up")
        count = 1 + max(expert for experts in kinds.values() for expert in experts)
        complete = {"gate", "up"} & kinds.keys() != {"gate"} and {"gate", "up"} & kinds.keys() != {"up"}
        pairs = [kinds[kind].get(expert, {}) for kind in kinds for expert in range(count)]
        if not complete or not all(pair.keys() == {"A", "B"} and pair["A"].shape[0] == r for pair in pairs):
            raise UserError(f"{file}: {module}: LoRA on single experts can be read where all of them have it, gate and "
                            f"up alike, at rank {r}; merge this adapter with PEFT instead")  # fmt: skip
        both = ["gate_up"] * ({"gate", "up"} <= kinds.keys()) + ["down"] * ("down" in wanted)
        for depth, kind in enumerate(reversed(both)):
            experts = [_gate_and_up(kinds, expert) if kind == "gate_up" else kinds["down"][expert]
                       for expert in range(count)]  # fmt: skip
            prefix = f"{module}{'.base_layer' * depth}"
            found[f"{prefix}.lora_A.weight"] = torch.cat([expert["A"] for expert in experts])
            found[f"{prefix}.lora_B.weight"] = torch.stack([expert["B"] for expert in experts], -1).flatten(1)
    return found


def _gate_and_up(kinds: Mapping[str, Mapping[int, Mapping[str, Tensor]]], expert: int) -> dict[str, Tensor]:
    gate, up = kinds["gate"][expert], kinds["up"][expert]
    return {"A": torch.cat([gate["A"], up["A"]]), "B": torch.block_diag(gate["B"], up["B"])}


# PEFT 0.21 takes linear modules by these names for experts of transformers 4, and adapts today's experts instead.
_TAKEN = {"qwen2_moe": ("gate_proj", "up_proj", "down_proj", "gate"), "mixtral": ("w1", "w2", "w3", "gate")}


def taken_for_experts(names: Iterable[str], model_type: str) -> str | None:
    """Why PEFT would not adapt what was adapted, in families whose experts were linear modules once, or None.

    Args:
        names: of the linear modules that have LoRA.
    """
    try:  # PEFT asks the same table, which has no public name
        from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN
    except ImportError:
        return None
    taken = _TAKEN.get(_MODEL_TO_CONVERSION_PATTERN.get(model_type, ""), ())
    found = [name for name in names if name.rpartition(".")[2] in taken]
    return None if not found else (
        f"PEFT 0.21 takes {found[0].rpartition('.')[2]} for weights of experts in this family and drops LoRA on "
        f"{len(found)} dense and shared modules ({found[0]} …); export it merged"
    )  # fmt: skip
