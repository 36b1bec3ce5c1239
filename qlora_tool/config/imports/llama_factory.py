"""LLaMA-Factory's keys."""

from __future__ import annotations

from typing import Any

from qlora_tool.config.imports.formats import OMIT, Format, Given, Left, NotDone, NotTaken, Taken
from qlora_tool.config.imports.values import (
    ATTENTION,
    TRAINER,
    TRAINER_DEFAULTS,
    dtype,
    evaluation,
    listed,
    method,
    named_data,
    targets,
    yes_as,
)


def _bits(value: Any, given: Given) -> Any:
    kinds = {4: given.get("quantization_type") or "nf4", 8: "int8", 0: "none"}
    if value not in kinds:
        raise NotTaken("4 bits (nf4, fp4) and 8 (int8) are there")
    if given.get("quantization_method") not in (None, "bnb", "bitsandbytes", "BNB"):
        raise NotTaken("bitsandbytes' quantizations are there: nf4, fp4, int8")
    return kinds[value]


def _stage(value: Any, given: Given) -> Any:
    stages = {"sft": OMIT, "pt": "text"}
    if value not in stages:
        raise NotDone("supervised fine-tuning (sft) and training on plain text (pt) are done here")
    return stages[value]


def _first(value: Any, given: Given) -> Any:
    names = listed(value, given)
    for name in names[1:]:
        given.leave("adapter_name_or_path", name, "one adapter is started from")
    return names[0] if names else OMIT


_DATA = Left("data are read, tokenized and cached by themselves")
_OTHER_TRAINING = Left("preferences and rewards are not trained here")

LLAMA_FACTORY = Format(
    name="LLaMA-Factory",
    marks=frozenset({"finetuning_type", "stage", "cutoff_len", "lora_target", "template", "lora_rank", "dataset",
                     "quantization_bit", "do_train", "preprocessing_num_workers", "dataset_dir"}),
    keys={
        **TRAINER,
        "model_name_or_path": Taken("model.name_or_path"),
        "model_revision": Taken("model.revision"),
        "trust_remote_code": Taken("model.trust_remote_code"),
        "quantization_bit": Taken("model.quantization", _bits, "4: nf4 (quantization_type: fp4); 8: int8; none: none"),
        "quantization_type": Left("read with quantization_bit", ("nf4", "fp4")),
        "quantization_method": Left("bitsandbytes' quantizations are there", ("bnb", "bitsandbytes", "BNB")),
        "double_quantization": Taken("model.double_quant"),
        "infer_dtype": Taken("model.compute_dtype", dtype),
        "pure_bf16": Taken("model.compute_dtype", yes_as("bfloat16"), "true: bfloat16"),
        "adapter_name_or_path": Taken("adapter.init_from", _first),
        "finetuning_type": Taken("adapter.method", method({"lora": "lora", "full": "full"}), "lora, full"),
        "lora_rank": Taken("adapter.r"),
        "lora_alpha": Taken("adapter.lora_alpha"),
        "lora_dropout": Taken("adapter.lora_dropout"),
        "lora_target": Taken("adapter.target_modules", targets, "all: all-linear"),
        "additional_target": Taken("adapter.modules_to_save", listed),
        "loraplus_lr_ratio": Taken("adapter.loraplus_lr_ratio"),
        "loraplus_lr_embedding": Left("LoRA+ has one ratio", (1e-6, "1e-6")),
        "use_rslora": Taken("adapter.use_rslora"),
        "use_dora": Taken("adapter.method", yes_as("dora"), "true: dora"),
        "pissa_init": Taken("adapter.init_lora_weights", yes_as("pissa"), "true: pissa"),
        "pissa_iter": Left("PiSSA by a full decomposition; init_lora_weights: pissa_niter_N takes N steps"),
        "pissa_convert": Left("adapters are saved as plain LoRA", (True, False)),
        "create_new_adapter": Left("adapter.init_from starts from an existing adapter, and goes on with it"),
        "stage": Taken("data.format", _stage, "pt: text; sft: left out"),
        "dataset": Taken("data.train", named_data, "paths and hub ids; names of its own list are listed"),
        "eval_dataset": Taken("data.eval", named_data, "as dataset"),
        "val_size": Taken("data.eval", evaluation, "a share; 0: left out"),
        "dataset_dir": Left("data.train takes the files themselves"),
        "template": Left("the model's own chat template is used; data.chat_template takes a Jinja file"),
        "cutoff_len": Taken("data.max_length"),
        "train_on_prompt": Taken("data.train_on", yes_as("all", "completion"), "true: all; false: completion"),
        "mask_history": Left("every answer of a conversation is trained; data.multi_turn: one_per_answer makes rows"),
        "packing": Taken("data.packing"),
        "neat_packing": Taken("data.packing", lambda value, given: True if value else OMIT, "true: true"),
        "max_samples": Left("data.train takes {path, rows}"),
        "mix_strategy": Left("data.train takes {path, weight or rows or repeat}", ("concat",)),
        "interleave_probs": Left("data.train takes {path, weight}"),
        "tool_format": Left("the chat template writes tools", ("default",)),
        "enable_thinking": Taken("data.chat_template_kwargs", lambda value, given: {"enable_thinking": bool(value)},
                                 "{enable_thinking: …}"),
        "default_system": Left("rows have their own system prompts"),
        "plot_loss": Left("metrics.jsonl has the losses", (True, False)),
        "flash_attn": ATTENTION,
        "shift_attn": Left("shifted sparse attention is not done here"),
        "rope_scaling": Left("set it in the model's config.json"),
        "resize_vocab": Left("no tokens are added"),
        "disable_gradient_checkpointing": Left("left to gradient_checkpointing: auto; the numbers are the same"),
        "enable_liger_kernel": Left("fused operations run by themselves"),
        "use_unsloth": Left("fused operations run by themselves"),
        "upcast_layernorm": Left("norms compute in fp32 by themselves"),
        "save_only_model": Left("checkpoints hold all that going on needs"),
        "include_num_input_tokens_seen": Left("metrics.jsonl has tokens_per_second", (True, False)),
        "freeze_trainable_layers": Left("adapter.layers_to_transform names layers"),
        "predict_with_generate": Left("evaluate has --generate, after the run"),
        "do_predict": Left("qlora-tool evaluate", (True, False)),
        "use_swanlab": Left("metrics.jsonl, tensorboard and wandb are there"),
        **dict.fromkeys(("overwrite_cache", "preprocessing_num_workers", "preprocessing_batch_size", "streaming",
                         "buffer_size", "tokenized_path", "media_dir", "cache_dir"), _DATA),
        **dict.fromkeys(("pref_loss", "pref_beta", "pref_ftx", "reward_model", "ref_model"), _OTHER_TRAINING),
        **dict.fromkeys(("use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon", "use_llama_pro"),
                        Left("not among the methods and optimizers here")),
    },
    defaults={**TRAINER_DEFAULTS, "finetuning_type": "lora", "quantization_bit": 0, "lora_rank": 8,
              "lora_alpha": lambda found: 2 * (found.get("lora_rank") or 8), "cutoff_len": 2048, "packing": False},
)  # fmt: skip
