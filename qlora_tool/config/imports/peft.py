"""PEFT's keys: of an adapter_config.json, and of the calls in a program that uses it."""

from __future__ import annotations

from typing import Any

from qlora_tool.config.imports.formats import OMIT, Format, Given, Left, NotTaken, Taken
from qlora_tool.config.imports.values import (
    TRAINER,
    TRAINER_DEFAULTS,
    dtype,
    layers,
    listed,
    method,
    quantization,
    start,
    targets,
    yes_as,
)

_METHODS = {"LORA": "lora", "LOHA": "loha", "LOKR": "lokr", "VERA": "vera", "ADAPTION_PROMPT": "llama_adapter"}


def _of_base(value: Any, given: Given) -> Any:
    if not value:
        raise NotTaken("the file names no base; set model.name_or_path")
    return value


def _loftq(value: Any, given: Given) -> Any:
    return value.get("loftq_iter", OMIT) if isinstance(value, dict) else OMIT


def _patterns(value: Any, given: Given) -> Any:
    return dict(value) if value else OMIT


def _not_empty(value: Any, given: Given) -> Any:
    return listed(value, given) or OMIT


_SETTINGS = Left("not done here; see docs/methods.md", (False, "", 0, {}))

PEFT = Format(
    name="PEFT",
    marks=frozenset({"peft_type", "base_model_name_or_path", "inference_mode", "task_type", "peft_version",
                     "fan_in_fan_out", "layers_pattern", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"}),
    keys={
        **TRAINER,
        "peft_type": Taken("adapter.method", method(_METHODS),
                           "LORA, LOHA, LOKR, VERA; ADAPTION_PROMPT: llama_adapter"),
        "base_model_name_or_path": Taken("model.name_or_path", _of_base),
        "revision": Taken("model.revision"),
        "load_in_4bit": Taken("model.quantization", quantization, "true: nf4"),
        "load_in_8bit": Taken("model.quantization", quantization, "true: int8"),
        "bnb_4bit_quant_type": Taken("model.quantization", quantization, "nf4, fp4"),
        "bnb_4bit_use_double_quant": Taken("model.double_quant"),
        "bnb_4bit_compute_dtype": Taken("model.compute_dtype", dtype, "torch.bfloat16: bfloat16"),
        "llm_int8_skip_modules": Taken("model.skip_modules", listed),
        "r": Taken("adapter.r"),
        "lora_alpha": Taken("adapter.lora_alpha"),
        "alpha": Taken("adapter.lora_alpha"),
        "lora_dropout": Taken("adapter.lora_dropout"),
        "vera_dropout": Taken("adapter.lora_dropout"),
        "target_modules": Taken("adapter.target_modules", targets),
        "exclude_modules": Taken("adapter.exclude_modules", targets),
        "modules_to_save": Taken("adapter.modules_to_save", _not_empty),
        "bias": Taken("adapter.bias"),
        "use_rslora": Taken("adapter.use_rslora"),
        "use_dora": Taken("adapter.method", yes_as("dora"), "true: dora"),
        "init_lora_weights": Taken("adapter.init_lora_weights", start, "true: default"),
        "loftq_config": Taken("adapter.loftq_iter", _loftq, "its loftq_iter"),
        "layers_to_transform": Taken("adapter.layers_to_transform", layers),
        "layers_pattern": Taken("adapter.layers_pattern", _not_empty),
        "rank_pattern": Taken("adapter.rank_pattern", _patterns),
        "alpha_pattern": Taken("adapter.alpha_pattern", _patterns),
        "target_parameters": Taken("adapter.target_parameters", _not_empty),
        "trainable_token_indices": Taken("adapter.trainable_token_indices"),
        "decompose_both": Taken("adapter.decompose_both"),
        "decompose_factor": Taken("adapter.decompose_factor"),
        "projection_prng_key": Taken("adapter.projection_prng_key"),
        "save_projection": Taken("adapter.save_projection"),
        "d_initial": Taken("adapter.d_initial"),
        "adapter_len": Taken("adapter.adapter_len"),
        "adapter_layers": Taken("adapter.adapter_layers"),
        "max_length": Taken("data.max_length"),
        "max_seq_length": Taken("data.max_length"),
        "packing": Taken("data.packing"),
        "completion_only_loss": Taken("data.train_on", yes_as("completion", "all"), "true: completion; false: all"),
        "task_type": Left("causal language models are trained here", ("CAUSAL_LM", "TaskType.CAUSAL_LM")),
        "fan_in_fan_out": Left("found out by itself", (True, False)),
        "inference_mode": Left("of the files, not of training", (True, False)),
        "auto_mapping": Left("of the files, not of training", ({},)),
        "peft_version": Left("of the files, not of training", ()),
        **dict.fromkeys(("megatron_config", "megatron_core"), Left("of Megatron's layers", ("megatron.core",))),
        **dict.fromkeys(("rank_dropout", "module_dropout", "rank_dropout_scale", "use_effective_conv2d", "lora_bias",
                         "eva_config", "corda_config", "layer_replication", "use_qalora", "arrow_config",
                         "alora_invocation_tokens", "ensure_weight_tying", "lora_ga_config"), _SETTINGS),
        "qalora_group_size": Left("read with use_qalora", (16,)),
        "runtime_config": Left("of the process, not of training", ({},)),
    },
    calls=("LoraConfig", "LoHaConfig", "LoKrConfig", "VeraConfig", "AdaptionPromptConfig", "BitsAndBytesConfig",
           "TrainingArguments", "SFTConfig"),
    defaults={},
)  # fmt: skip

PROGRAM_DEFAULTS = {**TRAINER_DEFAULTS, "r": 8, "lora_alpha": 8, "load_in_4bit": False, "packing": False}
"""What a program that uses PEFT and transformers leaves out."""
