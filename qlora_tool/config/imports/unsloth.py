"""Unsloth's keys: of its Studio's and command line's files, and of the calls in its notebooks."""

from __future__ import annotations

from typing import Any

from qlora_tool.config.imports.formats import OMIT, Format, Given, Left, Taken
from qlora_tool.config.imports.values import (
    TRAINER,
    TRAINER_DEFAULTS,
    dtype,
    listed,
    named_data,
    quantization,
    schedule,
    targets,
    whole,
    yes_as,
)


def _method(value: Any, given: Given) -> Any:
    return {"lora": "lora", "qlora": "lora", "full": "full", "full_finetune": "full"}.get(value, OMIT)


_VISION = Left("the text part alone is trained", (True, False))
_GROUPS = Left("adapter.target_modules and exclude_modules name the modules", (True,))

UNSLOTH = Format(
    name="Unsloth",
    marks=frozenset({"max_seq_length", "load_in_4bit", "random_state", "use_gradient_checkpointing", "model_name",
                     "training_type", "format_type", "train_on_completions", "random_seed", "finetune_mlp_modules"}),
    keys={
        **TRAINER,
        "model": Taken("model.name_or_path"),
        "model_name": Taken("model.name_or_path"),
        "revision": Taken("model.revision"),
        "trust_remote_code": Taken("model.trust_remote_code"),
        "load_in_4bit": Taken("model.quantization", quantization, "true: nf4"),
        "load_in_8bit": Taken("model.quantization", quantization, "true: int8; neither of the two: none"),
        "load_in_16bit": Left("model.quantization: none"),
        "dtype": Taken("model.compute_dtype", dtype, "torch.bfloat16: bfloat16"),
        "training_type": Taken("adapter.method", _method, "lora, full"),
        "full_finetuning": Taken("adapter.method", yes_as("full"), "true: full"),
        "r": Taken("adapter.r"),
        "lora_r": Taken("adapter.r"),
        "lora_alpha": Taken("adapter.lora_alpha"),
        "lora_dropout": Taken("adapter.lora_dropout"),
        "target_modules": Taken("adapter.target_modules", targets),
        "modules_to_save": Taken("adapter.modules_to_save", listed),
        "layers_to_transform": Taken("adapter.layers_to_transform"),
        "bias": Taken("adapter.bias"),
        "use_rslora": Taken("adapter.use_rslora"),
        "use_dora": Taken("adapter.method", yes_as("dora"), "true: dora"),
        "use_loftq": Taken("adapter.init_lora_weights", yes_as("loftq"), "true: loftq"),
        "init_lora_weights": Taken("adapter.init_lora_weights", lambda value, given: "default" if value is True
                                   else value, "true: default"),
        "loftq_config": Left("init_lora_weights: loftq, with loftq_iter", ({}, "")),
        "max_seq_length": Taken("data.max_length"),
        "max_length": Taken("data.max_length"),
        "dataset": Taken("data.train", named_data, "paths and hub ids"),
        "format_type": Left("rows are told by their columns; data.format names the kind", ("auto",)),
        "dataset_text_field": Taken("data.columns", lambda value, given: OMIT if value == "text" else {"text": value},
                                    "{text: …}"),
        "packing": Taken("data.packing"),
        "train_on_completions": Taken("data.train_on", yes_as("completion", "all"), "true: completion; false: all"),
        "batch_size": Taken("training.per_device_train_batch_size"),
        "num_epochs": Taken("training.num_train_epochs", lambda value, given: value or OMIT, "0: left out"),
        "lr_scheduler": Taken("training.lr_scheduler_type", schedule),
        "random_seed": Taken("training.seed"),
        "random_state": Taken("training.seed"),
        "log_frequency": Taken("training.logging_steps", whole),
        "enable_wandb": Taken("training.report_to", lambda value, given: ["wandb"] if value else OMIT, "true: wandb"),
        "enable_tensorboard": Taken("training.report_to", lambda value, given: ["tensorboard"] if value else OMIT,
                                    "true: tensorboard"),
        "embedding_learning_rate": Left("all weights have one rate, but for LoRA+'s B"),
        "use_gradient_checkpointing": Left("left to gradient_checkpointing: auto; the numbers are the same",
                                           (True, False, "unsloth")),
        "gradient_checkpointing": Left("left to gradient_checkpointing: auto; the numbers are the same",
                                       (True, False, "unsloth")),
        "fast_inference": Left("training only"),
        "token": Left("`hf auth login` keeps the hub's token"),
        "wandb_project": Left("wandb takes its own settings from the environment"),
        "tensorboard_dir": Left("the run's folder holds them", ("runs",)),
        **dict.fromkeys(("finetune_vision_layers", "vision_all_linear"), _VISION),
        **dict.fromkeys(("finetune_language_layers", "finetune_attention_modules", "finetune_mlp_modules"), _GROUPS),
    },
    defaults={**TRAINER_DEFAULTS, "load_in_4bit": True, "lora_alpha": 16, "packing": False,
              "train_on_completions": False},
    sections=("training", "lora", "logging", "data"),
    calls=("from_pretrained", "get_peft_model", "SFTTrainer", "TrainingArguments", "SFTConfig",
           "UnslothTrainingArguments"),
)  # fmt: skip
