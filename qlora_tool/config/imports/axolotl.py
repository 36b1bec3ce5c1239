"""Axolotl's keys."""

from __future__ import annotations

from typing import Any

from qlora_tool.config.imports.formats import OMIT, Format, Given, Left, NotDone, NotTaken, Taken
from qlora_tool.config.imports.values import (
    ATTENTION,
    CHECKPOINTING,
    TRAINER,
    data_sets,
    evaluation,
    half,
    layers,
    listed,
    optimizer,
    quantization,
    schedule,
    start,
    targets,
    whole,
    yes_as,
)


def _method(value: Any, given: Given) -> Any:
    known = {"lora": "lora", "qlora": "lora", "llama-adapter": "llama_adapter", "": "full"}
    if value not in known:
        raise NotDone("the methods here are those of docs/methods.md")
    return known[value]


def _linear(value: Any, given: Given) -> Any:
    return "all-linear" if value else OMIT


def _modules(value: Any, given: Given) -> Any:
    return OMIT if given.get("lora_target_linear") else targets(value, given)


def _bf16(value: Any, given: Given) -> Any:
    return "auto" if value == "auto" else half("bfloat16")(value, given)


_DISTRIBUTED = Left("several processes run under torchrun; training.sharding: fsdp shares the base out")
_TOKENIZER = Left("the model's own tokenizer is read")
_KERNELS = Left("fused operations run by themselves")
_OTHER_TRAINING = Left("preferences and rewards are not trained here", refused=True)
_RUNS = Left("metrics go to metrics.jsonl; wandb takes its own settings from the environment")

AXOLOTL = Format(
    name="Axolotl",
    marks=frozenset({"base_model", "datasets", "micro_batch_size", "sequence_len", "sample_packing", "val_set_size",
                     "lora_target_linear", "dataset_prepared_path", "train_on_inputs", "lora_r"}),
    keys={
        **{key: TRAINER[key] for key in (
            "output_dir", "max_steps", "gradient_accumulation_steps", "learning_rate", "warmup_steps", "warmup_ratio",
            "weight_decay", "max_grad_norm", "group_by_length", "logging_steps", "save_steps", "save_total_limit",
            "eval_steps", "load_best_model_at_end", "metric_for_best_model", "seed", "fp16", "eval_strategy",
            "save_strategy", "gradient_checkpointing_kwargs", "torch_compile", "tf32", "neftune_noise_alpha",
            "adam_beta1", "adam_beta2", "adam_epsilon", "dataloader_num_workers", "resume_from_checkpoint",
            "ddp_timeout")},
        "base_model": Taken("model.name_or_path"),
        "revision_of_model": Taken("model.revision"),
        "trust_remote_code": Taken("model.trust_remote_code"),
        "load_in_4bit": Taken("model.quantization", quantization, "true: nf4 (bnb_config_kwargs: fp4)"),
        "load_in_8bit": Taken("model.quantization", quantization, "true: int8; neither of the two: none"),
        "bnb_config_kwargs": Left("bnb_4bit_quant_type is read; double quantization is model.double_quant"),
        "bf16": Taken("model.compute_dtype", _bf16, "true: bfloat16"),
        "bfloat16": Taken("model.compute_dtype", half("bfloat16"), "true: bfloat16"),
        "float16": Taken("model.compute_dtype", half("float16"), "true: float16"),
        "float32": Taken("model.compute_dtype", half("float32"), "true: float32"),
        "adapter": Taken("adapter.method", _method, "lora, qlora: lora; none: full"),
        "lora_r": Taken("adapter.r"),
        "lora_alpha": Taken("adapter.lora_alpha"),
        "lora_dropout": Taken("adapter.lora_dropout"),
        "lora_target_linear": Taken("adapter.target_modules", _linear, "true: all-linear"),
        "lora_target_modules": Taken("adapter.target_modules", _modules),
        "lora_target_parameters": Taken("adapter.target_parameters", listed),
        "lora_modules_to_save": Taken("adapter.modules_to_save", listed),
        "lora_model_dir": Taken("adapter.init_from"),
        "loraplus_lr_ratio": Taken("adapter.loraplus_lr_ratio"),
        "loraplus_lr_embedding": Left("LoRA+ has one ratio", (1e-6, "1e-6")),
        "peft_layers_to_transform": Taken("adapter.layers_to_transform", layers),
        "peft_layers_pattern": Taken("adapter.layers_pattern", listed),
        "peft_use_dora": Taken("adapter.method", yes_as("dora"), "true: dora"),
        "peft_use_rslora": Taken("adapter.use_rslora"),
        "peft_init_lora_weights": Taken("adapter.init_lora_weights", start, "true: default"),
        "peft_trainable_token_indices": Taken("adapter.trainable_token_indices"),
        "peft": Left("init_lora_weights: loftq, with loftq_iter; see docs/methods.md"),
        "lora_fan_in_fan_out": Left("found out by itself"),
        "relora": Left("ReLoRA's restarts are not done here"),
        "datasets": Taken("data.train", data_sets("datasets"), "paths, with format: alpaca, sharegpt, text"),
        "test_datasets": Taken("data.eval", data_sets("test_datasets"), "as datasets"),
        "val_set_size": Taken("data.eval", evaluation, "a share; 0: left out"),
        "sequence_len": Taken("data.max_length"),
        "sample_packing": Taken("data.packing"),
        "train_on_inputs": Taken("data.train_on", yes_as("all", "completion"), "true: all; false: completion"),
        "shuffle_merged_datasets": Taken("data.shuffle"),
        "chat_template_jinja": Taken("data.chat_template", lambda value, given: _template(value), "a file"),
        "chat_template": Left("the model's own chat template is used; data.chat_template takes a Jinja file",
                              ("tokenizer_default",)),
        "eval_sample_packing": Left("evaluation rows are packed as training rows are", (True, False)),
        "pad_to_sequence_len": Left("nothing is padded to full length", (True, False)),
        "dataset_prepared_path": Left("what is tokenized is cached by itself"),
        "dataset_processes": Left("data are read and tokenized by themselves"),
        "micro_batch_size": Taken("training.per_device_train_batch_size"),
        "eval_batch_size": Left("rows are scored in batches of the training's size"),
        "num_epochs": Taken("training.num_train_epochs"),
        "lr_scheduler": Taken("training.lr_scheduler_type", schedule),
        "optimizer": Taken("training.optim", optimizer, "adamw_torch, adamw_torch_fused, paged_adamw_32bit: adamw; "
                           "adamw_bnb_8bit: adamw_8bit"),
        "early_stopping_patience": Taken("training.early_stopping_patience", whole),
        "use_tensorboard": Taken("training.report_to", lambda value, given: ["tensorboard"] if value else OMIT,
                                 "true: tensorboard"),
        "wandb_project": Taken("training.report_to", lambda value, given: ["wandb"] if value else OMIT, "wandb"),
        "gradient_checkpointing": CHECKPOINTING,
        "evals_per_epoch": Left("training.eval_steps counts steps"),
        "saves_per_epoch": Left("training.save_steps counts steps"),
        "eval_table_size": Left("evaluate has --generate, after the run"),
        "special_tokens": Left("the tokenizer's own are used"),
        "tokens": Left("no tokens are added; add them to the tokenizer, and train them by trainable_token_indices"),
        "cosine_min_lr_ratio": Left("cosine ends at 0"),
        "strict": Left("unknown keys are errors", (True, False)),
        "local_rank": Left("torchrun sets it"),
        "debug": Left("--debug shows tracebacks"),
        "model_type": Left("told by the model's config.json", ("AutoModelForCausalLM",)),
        **dict.fromkeys(("is_llama_derived_model", "is_mistral_derived_model", "is_qwen_derived_model",
                         "is_falcon_derived_model"), Left("told by the model's config.json", (True, False))),
        **dict.fromkeys(("tokenizer_type", "tokenizer_config", "tokenizer_use_fast"), _TOKENIZER),
        **dict.fromkeys(("flash_attention", "sdp_attention", "xformers_attention", "flex_attention", "eager_attention",
                         "attn_implementation"), ATTENTION),
        "s2_attention": Left("shifted sparse attention is not done here"),
        **dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "plugins", "liger_rope",
                         "liger_rms_norm", "liger_glu_activation", "liger_layer_norm",
                         "liger_fused_linear_cross_entropy", "cut_cross_entropy"), _KERNELS),
        **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "fsdp_version", "ddp"), _DISTRIBUTED),
        **dict.fromkeys(("rl", "trl", "reward_model", "process_reward_model"), _OTHER_TRAINING),
        **dict.fromkeys(("wandb_entity", "wandb_watch", "wandb_name", "wandb_run_id", "wandb_log_model"), _RUNS),
        "hub_model_id": Left("export-merged --push-to-hub OWNER/NAME"),
    },
    defaults={"adapter": "", "load_in_4bit": False, "sequence_len": 512, "sample_packing": False,
              "micro_batch_size": 1, "num_epochs": 1, "seed": 42},
)  # fmt: skip


def _template(value: Any) -> Any:
    if not isinstance(value, str) or "{" in value or "\n" in value:
        raise NotTaken("a template's text; put it into a file, and set data.chat_template to that")
    return value
