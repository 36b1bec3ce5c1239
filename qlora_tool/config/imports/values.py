"""From another tool's values to ours: what several of the tables share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_tool.config.imports.formats import OMIT, Convert, Given, Left, NotDone, NotTaken, Taken
from qlora_tool.methods.keys import to_number

_OPTIMIZERS = {
    "adamw": "adamw", "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw",
    "adamw_apex_fused": "adamw", "paged_adamw": "adamw", "paged_adamw_32bit": "adamw", "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit",
}  # fmt: skip
_SCHEDULES = {"constant": "constant", "constant_with_warmup": "constant", "linear": "linear", "cosine": "cosine"}
_FORMATS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "completion": "text", "pretrain": "text"}
_DATA_ENDINGS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt", ".arrow", ".xlsx")
_STARTS = {True: "default", "gaussian": "gaussian", "pissa": "pissa", "loftq": "loftq"}


def one_of(names: Mapping[str, str], what: str, fault: type[NotTaken] = NotTaken) -> Convert:
    """By name; what is not among them is not taken."""

    def convert(value: Any, given: Given) -> Any:
        if value not in names:
            raise fault(f"{what} here: {', '.join(dict.fromkeys(names.values()))}")
        return names[value]

    return convert


def method(names: Mapping[str, str]) -> Convert:
    """A method by its name; with another one the file asks for something else."""
    return one_of(names, "of its methods", NotDone)


optimizer = one_of(_OPTIMIZERS, "the optimizers")
schedule = one_of(_SCHEDULES, "the schedules")


def warmup(value: Any, given: Given) -> Any:
    """Steps, or a share of all steps below 1. With the schedule `constant` transformers warms nothing up."""
    scheduler = given.get("lr_scheduler_type") or given.get("lr_scheduler")
    if scheduler == "constant":
        return 0
    return to_number(value)


def ratio(value: Any, given: Given) -> Any:
    """A share of all steps, which counts where no steps are named."""
    return OMIT if given.get("warmup_steps") else warmup(value, given)


def whole(value: Any, given: Given) -> Any:
    """A number of steps: zero and below ask for nothing."""
    value = to_number(value)
    if isinstance(value, float) and 0 < value < 1:
        raise NotTaken("a share of all steps; name a number of steps")
    return value if isinstance(value, int | float) and value >= 1 else OMIT


def listed(value: Any, given: Given) -> Any:
    """A list, which may stand as text with commas."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else list(value)


def targets(value: Any, given: Given) -> Any:
    """The modules that are adapted; `all` is `all-linear`."""
    if value in ("all", "all-linear", ["all"], ["all-linear"]):
        return "all-linear"
    if isinstance(value, str) and not any(sign in value for sign in "*()[]\\^$|"):
        return listed(value, given)
    return value if isinstance(value, str) else list(value)


def layers(value: Any, given: Given) -> Any:
    """Numbers of layers, as they are."""
    return value if isinstance(value, int) else list(value)


def half(name: str) -> Convert:
    """A switch for a dtype of products."""

    def convert(value: Any, given: Given) -> Any:
        return name if value is True or value == "true" else OMIT

    return convert


def dtype(value: Any, given: Given) -> Any:
    """A dtype by its name, with or without `torch.`."""
    name = str(value).removeprefix("torch.")
    known = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}
    name = known.get(name, name)
    if name not in ("auto", "bfloat16", "float16", "float32"):
        raise NotTaken("expected bfloat16, float16 or float32")
    return name


def yes_as(chosen: str, otherwise: Any = OMIT) -> Convert:
    """What a switch stands for."""
    return lambda value, given: chosen if value else otherwise


def quantization(value: Any, given: Given) -> Any:
    """By `load_in_4bit` and `load_in_8bit`, whichever of them is set."""
    if given.get("load_in_8bit"):
        return "int8"
    if not given.get("load_in_4bit"):
        return "none"
    bnb = given.get("bnb_config_kwargs") or {}
    kind = given.get("bnb_4bit_quant_type") or (bnb.get("bnb_4bit_quant_type") if isinstance(bnb, dict) else None)
    return kind or "nf4"


def evaluation(value: Any, given: Given) -> Any:
    """The share of the rows that is held out; a number of rows is none."""
    share = to_number(value)
    if not share:
        return OMIT
    if not isinstance(share, int | float) or not 0 < share < 1:
        raise NotTaken("a number of rows; data.eval takes a share such as 0.02, or a file")
    return share


def start(value: Any, given: Given) -> Any:
    """PEFT's `init_lora_weights`."""
    if isinstance(value, bool | str) and value in _STARTS:
        return _STARTS[value]
    if isinstance(value, str) and value.startswith("pissa_niter_"):
        return value
    raise NotTaken("not among the starts here: default, gaussian, symmetric, pissa, loftq, calibrated")


def reporters(value: Any, given: Given) -> Any:
    """Of `report_to` what there is here."""
    names = [value] if isinstance(value, str) else list(value)
    known = [name for name in names if name in ("tensorboard", "wandb")]
    if unknown := [name for name in names if name not in (*known, "none", "all")]:
        given.leave("report_to", unknown, "tensorboard and wandb are there; metrics.jsonl is written anyway")
    return known or OMIT


def named_data(value: Any, given: Given) -> Any:
    """Files or hub ids; plain names are another tool's own list of data sets."""
    names = listed(value, given)
    paths = [name for name in names if "/" in name or name.lower().endswith(_DATA_ENDINGS)]
    if not paths:
        raise NotTaken("the name of a data set in that tool's own list; set data.train to the file or hub id itself")
    for name in names:
        if name not in paths:
            given.leave("dataset", name, "a name in that tool's own list; add the file or hub id itself to data.train")
    return paths[0] if len(paths) == 1 else paths


def data_sets(key: str) -> Convert:
    """Axolotl's list of data sets: each with a path and the type of its rows."""

    def convert(value: Any, given: Given) -> Any:
        entries = [_data_set(f"{key}.{number}", entry, given) for number, entry in enumerate(value)]
        plain = [entry["path"] if list(entry) == ["path"] else entry for entry in entries]
        return plain[0] if len(plain) == 1 and isinstance(plain[0], str) else plain

    return convert


def _data_set(where: str, entry: Any, given: Given) -> dict[str, Any]:
    if isinstance(entry, str):
        return {"path": entry}
    if not isinstance(entry, Mapping) or not entry.get("path"):
        raise NotTaken("expected a list of data sets with a path each")
    files = entry.get("data_files")
    made: dict[str, Any] = {"path": files[0] if isinstance(files, list) and len(files) == 1 else files or entry["path"]}
    if isinstance(made["path"], list):
        raise NotTaken("several data_files in one data set; name each of them in data.train")
    kind = entry.get("type")
    name = kind.partition(".")[0].partition(":")[0] if isinstance(kind, str) else kind
    if isinstance(name, str) and name in _FORMATS:
        made["format"] = _FORMATS[name]
    elif name not in (None, "chat_template"):
        given.leave(f"{where}.type", kind, "rows are told by their columns; data.columns names unusual ones")
    if field := entry.get("field_messages"):
        made["columns"] = {"messages": field}
    read = ("path", "type", "data_files", "field_messages", "ds_type")
    for name, found in entry.items():
        if name not in read and found not in (None, False, "train"):
            given.leave(f"{where}.{name}", found, "no counterpart; columns are set by data.columns")
    return made


CHECKPOINTING = Left("left to gradient_checkpointing: auto, which recomputes what memory asks for; the numbers are the "
                     "same", (False, "", 0))  # fmt: skip
ATTENTION = Left("attention is chosen by itself")

TRAINER: dict[str, Taken | Left] = {
    "output_dir": Taken("training.output_dir"),
    "num_train_epochs": Taken("training.num_train_epochs"),
    "max_steps": Taken("training.max_steps", whole, "-1 and 0: left out"),
    "per_device_train_batch_size": Taken("training.per_device_train_batch_size"),
    "gradient_accumulation_steps": Taken("training.gradient_accumulation_steps"),
    "learning_rate": Taken("training.learning_rate"),
    "lr_scheduler_type": Taken("training.lr_scheduler_type", schedule, "constant_with_warmup: constant"),
    "warmup_steps": Taken("training.warmup_steps", warmup, "0 with the schedule constant"),
    "warmup_ratio": Taken("training.warmup_steps", ratio, "a share below 1"),
    "weight_decay": Taken("training.weight_decay"),
    "max_grad_norm": Taken("training.max_grad_norm"),
    "label_smoothing_factor": Taken("training.label_smoothing_factor"),
    "optim": Taken("training.optim", optimizer, "adamw_torch, adamw_torch_fused, paged_adamw_32bit: adamw; "
                   "adamw_bnb_8bit: adamw_8bit"),
    "group_by_length": Taken("training.group_by_length"),
    "logging_steps": Taken("training.logging_steps", whole),
    "save_steps": Taken("training.save_steps", whole, "0: left out"),
    "save_total_limit": Taken("training.save_total_limit"),
    "eval_steps": Taken("training.eval_steps", whole),
    "load_best_model_at_end": Taken("training.load_best_model_at_end"),
    "metric_for_best_model": Taken("training.metric_for_best_model"),
    "seed": Taken("training.seed"),
    "report_to": Taken("training.report_to", reporters, "tensorboard and wandb"),
    "bf16": Taken("model.compute_dtype", half("bfloat16"), "true: bfloat16"),
    "fp16": Taken("model.compute_dtype", half("float16"), "true: float16"),
    "gradient_checkpointing": CHECKPOINTING,
    "gradient_checkpointing_kwargs": CHECKPOINTING,
    "torch_compile": Left("nothing is compiled; fused operations run by themselves"),
    "tf32": Left("products run in compute_dtype"),
    "per_device_eval_batch_size": Left("rows are scored in batches of the training's size"),
    "eval_strategy": Left("evaluated every training.eval_steps, and at the end", ("no", "steps")),
    "evaluation_strategy": Left("evaluated every training.eval_steps, and at the end", ("no", "steps")),
    "save_strategy": Left("saved every training.save_steps", ("steps",)),
    "logging_strategy": Left("logged every training.logging_steps", ("steps",)),
    "neftune_noise_alpha": Left("no noise is added to embeddings"),
    "lr_scheduler_kwargs": Left("the schedules have no settings beside the warm-up"),
    "adam_beta1": Left("AdamW's betas are 0.9 and 0.999", (0.9,)),
    "adam_beta2": Left("AdamW's betas are 0.9 and 0.999", (0.999,)),
    "adam_epsilon": Left("AdamW's epsilon is 1e-8", (1e-8, "1e-8")),
    "dataloader_num_workers": Left("data are read and tokenized by themselves"),
    "dataset_num_proc": Left("data are read and tokenized by themselves"),
    "ddp_timeout": Left("torchrun's own matter"),
    "ddp_find_unused_parameters": Left("found out by itself"),
    "resume_from_checkpoint": Left("train goes on by itself; --resume names another checkpoint"),
    "overwrite_output_dir": Left("train --overwrite replaces a run"),
    "remove_unused_columns": Left("columns that are not read are left alone", (True, False)),
    "push_to_hub": Left("export-merged --push-to-hub"),
    "deepspeed": Left("several processes run under torchrun; training.sharding: fsdp shares the base out"),
    "fsdp": Left("training.sharding: fsdp, under torchrun"),
    "fsdp_config": Left("training.sharding: fsdp, under torchrun"),
    "run_name": Left("the run is called by its folder"),
    "do_train": Left("qlora-tool train", (True, False)),
    "do_eval": Left("evaluated where data.eval is set", (True, False)),
}  # fmt: skip
"""The keys of transformers' TrainingArguments, which several tools share."""
TRAINER_DEFAULTS = {"per_device_train_batch_size": 8, "learning_rate": 5.0e-5, "num_train_epochs": 3,
                    "lr_scheduler_type": "linear", "warmup_steps": 0, "seed": 42}  # fmt: skip
