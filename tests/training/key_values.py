"""Values of every key of a configuration, and files that they name.

Values come from the keys' own schema: choices, booleans, typical numbers and those at the bounds. Those of texts, lists
and mappings are given here; a key that has none fails the tests that ask for them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import yaml
from tiny_adapters import write_peft_adapter
from tiny_runs import write_model
from tokenizers_for_tests import CHATML

from qlora_tool.config import SECTIONS
from qlora_tool.config.schema import choices_of, options_of, schemas_of
from qlora_tool.methods import method_keys
from qlora_tool.methods.keys import MOST, MOST_RANK, MOST_RATE

METHODS_KEYS = method_keys()
KEYS = [f"{section}.{key}" for section, keys in SECTIONS.items() for key in keys.model_fields]

FORMATS = ("messages", "sharegpt", "alpaca", "dolly", "prompt_completion", "text")

# Files have their names in the folder that runs are started in; EVAL is one of the format of the training data.
EVAL = "eval.jsonl"
MIXTURE = [{"path": "alpaca.jsonl", "weight": 3}, {"path": "alpaca.csv", "weight": 1, "format": "alpaca"}]
TEXTS: dict[str, list[Any]] = {
    "model.name_or_path": ["base"],
    "model.revision": [None, "main"],
    "model.skip_modules": [[], ["down_proj", "model.layers.0.self_attn"], "as-peft"],
    "adapter.target_modules": ["all-linear", ["q_proj", "down_proj"], r".*\.(q|v|up)_proj"],
    "adapter.exclude_modules": [[], ["k_proj"], r".*layers\.1\.mlp.*"],
    "adapter.modules_to_save": [[], ["lm_head"], ["norm", "layers.0.self_attn.o_proj"]],
    "adapter.layers_to_transform": [None, 1, [0, 1]],
    "adapter.layers_pattern": [[], ["layers"], "layers"],
    "adapter.trainable_token_indices": [[], [5, 9], {"lm_head": [7]}],
    "adapter.target_parameters": [[]],  # a model with experts has a test of its own
    "adapter.rank_pattern": [{}, {"q_proj": 2, r"layers\.0\..*": 8}],
    "adapter.alpha_pattern": [{}, {"down_proj": 4.5}],
    "adapter.init_from": [None, "start"],
    "adapter.init_lora_weights": ["default", "gaussian", True, "symmetric", "pissa", "pissa_niter_4", "loftq",
                                  "calibrated"],
    "data.train": [f"{name}.jsonl" for name in FORMATS] + [f"alpaca.{end}" for end in ("json", "csv", "parquet")]
    + ["text.txt", "prompt_completion", MIXTURE],
    "data.eval": [0.2, None, EVAL, {"one": EVAL, "other": EVAL}, [EVAL, EVAL]],
    "data.columns": [{}, {"instruction": "instruction", "output": "output"}],
    "data.chat_template_kwargs": [{}, {"brief": True}],
    "data.chat_template": [None, "chat.jinja"],
    "training.output_dir": ["run"],
    "training.metric_for_best_model": ["loss", "eval_loss"],
    "training.eval_prompts": [[], 2, ["What is 1 and 2?", "Paris"], "Who?"],
    "training.max_memory": [None, "2GB", 1_500_000_000],
    "training.report_to": [[], "none"],  # what is installed, or not, has a test of its own
}  # fmt: skip
TYPICAL: dict[str, list[float]] = {
    "model.resident_layers": [0, 1],
    "adapter.r": [64],  # large enough for moments in 8 bits
    "adapter.lora_alpha": [32], "adapter.lora_dropout": [0.1], "adapter.loraplus_lr_ratio": [16],
    "adapter.decompose_factor": [4], "adapter.projection_prng_key": [7], "adapter.d_initial": [0.1],
    "adapter.adapter_len": [10], "adapter.adapter_layers": [2],
    "adapter.loftq_iter": [3], "adapter.calibration_rows": [20],
    "data.max_length": [96], "training.num_train_epochs": [1], "training.max_steps": [2],
    "training.per_device_train_batch_size": [3], "training.gradient_accumulation_steps": [2],
    "training.learning_rate": [2e-4], "training.warmup_steps": [0.03, 1], "training.weight_decay": [0.1],
    "training.max_grad_norm": [1.0], "training.label_smoothing_factor": [0.1], "training.seed": [7],
    "training.logging_steps": [2], "training.eval_steps": [2], "training.save_steps": [100],
    "training.save_total_limit": [2], "training.early_stopping_patience": [3],
}  # fmt: skip
# What no run on this machine can go through: a test of its own says how each is refused.
REFUSED = [("model.device", "cuda"), ("data.max_length", 1)]
OF_WEIGHTS = ("pissa", "pissa_niter_4", "loftq", "calibrated")  # starts that take no rank above a weight's own
OMITTED = object()  # the key is left out


def values_of(key: str) -> list[Any]:
    """The values that a key goes through: of numbers typical ones first, then bounds."""
    if key in TEXTS:
        return TEXTS[key]
    section, _, name = key.partition(".")
    schema = schemas_of(SECTIONS[section])[name]
    if (choices := choices_of(schema)) is not None:
        return [value for value in choices if (key, value) not in REFUSED]
    found: list[Any] = []
    for option in options_of(schema):
        if "const" in option or option["type"] == "null":
            found.append(option.get("const"))
        else:
            assert option["type"] in ("integer", "number") and key in TYPICAL, f"{key} needs values here for {option}"
            found += TYPICAL[key]
            found.append(option.get("minimum", TYPICAL[key][0] / 1000))
            too_many = (MOST, MOST_RANK, MOST_RATE)  # of steps or columns for a test, or a rate that no loss survives
            found += [option["maximum"]] if option.get("maximum", MOST) not in too_many else []
            found += [option["exclusiveMaximum"] - 0.001] if "exclusiveMaximum" in option else []
    return [value for value in found if (key, value) not in REFUSED]


VALUES = {key: values_of(key) for key in KEYS}


def with_company(key: str, value: Any) -> dict[str, Any]:
    """A value, with those of other keys that it cannot go without."""
    section, _, name = key.partition(".")
    readers = [method for method, keys in METHODS_KEYS.items() if name in keys.model_fields]
    if section == "adapter" and readers and "lora" not in readers:
        return {key: value} | with_company("adapter.method", readers[0])
    if key == "adapter.method" and not METHODS_KEYS[value].reads("r"):
        unquantized = {"model.quantization": "none"} if METHODS_KEYS[value].trains_base else {}
        return {key: value, "adapter.r": SECTIONS["adapter"].model_fields["r"].default, **unquantized}
    if key == "data.train":
        return {key: value} | ({"data.train_on": "all"} if str(value).startswith("text") else {})
    if key == "data.columns" and value:
        return {key: value, "data.train": "alpaca.jsonl", "data.format": "alpaca"}
    if key == "data.chat_template_kwargs" and value:
        return {key: value, "data.chat_template": "chat.jinja"}
    if key == "data.format" and value != "auto":
        return {key: value} | with_company("data.train", f"{value}.jsonl")
    if key == "model.resident_layers" and value:
        return {key: value, "model.weights": "disk"}
    if key == "adapter.loftq_iter" and value != 1:
        return {key: value} | with_company("adapter.init_lora_weights", "loftq")
    if key == "adapter.init_lora_weights" and value in OF_WEIGHTS:
        return {key: value, "adapter.r": 1}
    if (key, value) == ("training.group_by_length", True):
        return {key: value, "data.packing": False}
    if (key, value) == ("training.optimizer_in_backward", True):
        return {key: value, "training.max_grad_norm": 0}
    if (key, value) == ("training.num_train_epochs", "auto"):
        return {key: value, "training.max_steps": 2}  # how many it stands for has a test of its own
    if key in ("training.load_best_model_at_end", "training.early_stopping_patience") and value:
        return {key: value, "data.eval": 0.2, "training.eval_steps": 1}
    if key == "training.eval_prompts" and value == 2:
        return {key: value, "data.eval": 0.2, "data.train_on": "completion"}
    if key == "training.eval_steps" and value is not None:
        return {key: value, "data.eval": 0.2}
    return {key: value}


def rows(name: str, first: int, count: int) -> list[dict[str, Any]]:
    """Rows of a format with as many tokens each, no two alike: numbers of one digit are one token."""
    made = []
    for index in range(first, first + count):
        ask, answer = f"{index // 10 % 10} {index % 10} {index // 100}", f"Paris {index % 10} {index // 10 % 10}"
        made.append({
            "messages": {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]},
            "sharegpt": {"conversations": [{"from": "human", "value": ask}, {"from": "gpt", "value": answer}]},
            "alpaca": {"instruction": ask, "output": answer},
            "dolly": {"instruction": ask, "response": answer},
            "prompt_completion": {"prompt": ask, "completion": answer},
            "text": {"text": f"{ask} {answer}"},
        }[name])  # fmt: skip
    return made


def write_jsonl(file: Path, content: list[dict[str, Any]]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(f"{json.dumps(row)}\n" for row in content))


def write_inputs(folder: Path) -> Path:
    """A model with biases, an adapter on it, data in every format and kind of file."""
    write_model(folder / "base", attention_bias=True, mlp_bias=True)
    write_peft_adapter(folder / "start", folder / "base", target_modules=["q_proj", "down_proj"])
    for name in FORMATS:
        write_jsonl(folder / f"{name}.jsonl", rows(name, 0, 48))
        write_jsonl(folder / f"eval-{name}.jsonl", rows(name, 100, 6))
    write_jsonl(folder / "prompt_completion" / "first.jsonl", rows("prompt_completion", 0, 24))
    write_jsonl(folder / "prompt_completion" / "second.jsonl", rows("prompt_completion", 24, 24))
    table = pa.Table.from_pylist(rows("alpaca", 0, 48))
    (folder / "alpaca.json").write_text(json.dumps(table.to_pylist()))
    pyarrow.csv.write_csv(table, folder / "alpaca.csv")
    pyarrow.parquet.write_table(table, folder / "alpaca.parquet")
    (folder / "text.txt").write_text(" ".join(row["text"] for row in rows("text", 0, 400)))
    (folder / "chat.jinja").write_text("{% if brief %}{{ 'Brief. ' }}{% endif %}" + CHATML)
    return folder


def written(folder: Path, run: dict[str, Any]) -> Path:
    """The run's configuration as a file."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in run.items():
        section, _, name = key.partition(".")
        if value is not OMITTED:
            sections.setdefault(section, {})[name] = value
    train = run["data.train"] if isinstance(run["data.train"], str) else run["data.train"][0]["path"]
    form = train.partition(".")[0]
    text = yaml.safe_dump(sections).replace(EVAL, f"eval-{form}.jsonl")
    (folder / "run.yaml").write_text(text)
    return folder / "run.yaml"
