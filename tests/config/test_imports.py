"""Configurations of other tools: every key of the tables is tried, and what comes out is read by our own reader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from qlora_tool.cli import main
from qlora_tool.config import SECTIONS, load_config
from qlora_tool.config.imports.converting import as_yaml, converted, import_config
from qlora_tool.config.imports.formats import Left, Taken
from qlora_tool.config.imports.reading import FORMATS, read_foreign, recognized
from qlora_tool.errors import UserError

AXOLOTL = """
base_model: NousResearch/Meta-Llama-3-8B
load_in_8bit: false
load_in_4bit: true
datasets:
  - {path: data/train.jsonl, type: alpaca}
val_set_size: 0.05
output_dir: ./outputs/out
adapter: qlora
sequence_len: 4096
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
lora_target_modules:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: paged_adamw_32bit
lr_scheduler: cosine
learning_rate: 2e-4
train_on_inputs: false
bf16: auto
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
weight_decay: 0.0
special_tokens: {pad_token: "<|end_of_text|>"}
"""
LLAMA_FACTORY = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
quantization_bit: 4
stage: sft
do_train: true
finetuning_type: lora
lora_target: q_proj,v_proj
dataset: data/mine.json
template: llama3
cutoff_len: 1024
output_dir: saves/llama3
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
val_size: 0.1
eval_strategy: steps
eval_steps: 500
"""
STUDIO = """
model: unsloth/Qwen2.5-0.5B
data: {dataset: tatsu-lab/alpaca, format_type: auto}
training:
  max_seq_length: 2048
  load_in_4bit: true
  num_epochs: 1
  learning_rate: 0.0002
  batch_size: 2
  warmup_steps: 5
  max_steps: 0
  random_seed: 3407
  train_on_completions: true
lora: {lora_r: 64, lora_alpha: 16, target_modules: "q_proj,v_proj", use_rslora: true, finetune_mlp_modules: true}
logging: {enable_wandb: false, enable_tensorboard: true}
"""
NOTEBOOK = """
from unsloth import FastLanguageModel
length = 2048
model, tokenizer = FastLanguageModel.from_pretrained("unsloth/Llama-3.2-3B", max_seq_length=length, dtype=None)
model = FastLanguageModel.get_peft_model(model, r=16, target_modules=["q_proj", "v_proj"], lora_alpha=8,
                                         use_gradient_checkpointing="unsloth", random_state=3407)
trainer = SFTTrainer(model=model, packing=True, args=TrainingArguments(per_device_train_batch_size=2, max_steps=60,
                     learning_rate=2e-4, bf16=is_bfloat16_supported(), optim="adamw_8bit", seed=3407))
open("touched", "w")
"""
PEFT = {
    "peft_type": "LORA", "base_model_name_or_path": "base", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16,
    "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"], "bias": "none", "use_dora": True,
    "init_lora_weights": True, "inference_mode": True, "modules_to_save": None, "layers_pattern": None,
    "loftq_config": {}, "rank_pattern": {"down_proj": 4}, "corda_config": None, "megatron_core": "megatron.core",
}  # fmt: skip


def imported(tmp_path: Path, name: str, text: str):
    """What a file becomes, and its configuration read from the YAML that is written."""
    (tmp_path / name).write_text(text)
    made = import_config(tmp_path / name)
    (tmp_path / "ours.yaml").write_text(as_yaml(made, name, "ours.yaml"))
    return made, load_config(tmp_path / "ours.yaml")


def test_axolotl(tmp_path: Path):
    made, config = imported(tmp_path, "a.yml", AXOLOTL)
    assert made.tool == "Axolotl"
    assert config.model.name_or_path == "NousResearch/Meta-Llama-3-8B"
    assert (config.model.quantization, config.adapter.r, config.adapter.lora_alpha) == ("nf4", 32, 16)
    assert (config.adapter.lora_dropout, config.adapter.target_modules) == (0.05, "all-linear")
    assert config.data.train == [{"path": "data/train.jsonl", "format": "alpaca"}]
    assert (config.data.eval, config.data.max_length, config.data.packing) == (0.05, 4096, True)
    assert (config.data.train_on, config.training.learning_rate, config.training.num_train_epochs) == (
        "completion", 2e-4, 4)  # fmt: skip
    assert (config.training.optim, config.training.warmup_steps) == ("adamw", 10)
    assert config.training.per_device_train_batch_size * config.training.gradient_accumulation_steps == 8
    assert [key for key, _, _ in made.left] == ["flash_attention", "evals_per_epoch", "special_tokens"]


def test_llama_factory_with_what_its_files_leave_out(tmp_path: Path):
    made, config = imported(tmp_path, "l.yaml", LLAMA_FACTORY)
    assert made.tool == "LLaMA-Factory"
    assert (config.model.quantization, config.model.compute_dtype) == ("nf4", "bfloat16")
    assert (config.adapter.r, config.adapter.lora_alpha, config.adapter.target_modules) == (8, 16, ["q_proj", "v_proj"])
    assert (config.data.train, config.data.eval, config.data.packing) == ("data/mine.json", 0.1, False)
    assert (config.training.warmup_steps, config.training.num_train_epochs, config.training.eval_steps) == (0.1, 3, 500)
    assert {"lora_rank", "lora_alpha", "num_train_epochs", "packing"} <= made.assumed
    assert [key for key, _, _ in made.left] == ["template"]


def test_unsloths_studio_and_notebooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    made, config = imported(tmp_path, "s.yaml", STUDIO)
    assert (made.tool, made.left) == ("Unsloth", [])
    assert (config.adapter.r, config.adapter.target_modules, config.adapter.use_rslora) == (
        64, ["q_proj", "v_proj"], True)  # fmt: skip
    assert (config.data.train, config.data.train_on) == ("tatsu-lab/alpaca", "completion")
    assert config.training.max_steps == -1
    assert config.training.report_to == ["tensorboard"]

    made, config = imported(tmp_path, "n.py", NOTEBOOK)
    assert (config.model.name_or_path, config.model.quantization) == ("unsloth/Llama-3.2-3B", "nf4")
    assert (config.adapter.r, config.adapter.lora_alpha, config.data.max_length) == (16, 8, 2048)
    assert (config.training.optim, config.training.seed, config.training.max_steps) == ("adamw_8bit", 3407, 60)
    assert (config.data.train_on, config.data.packing, config.training.lr_scheduler_type) == ("all", True, "linear")
    assert [(key, str(value)) for key, value, _ in made.left] == [("bf16", "is_bfloat16_supported()")]
    assert not (tmp_path / "touched").exists()  # read, not run

    cells = [{"cell_type": "code", "source": ["%%capture\n", "!pip install unsloth"]},
             {"cell_type": "markdown", "source": ["# text"]},
             {"cell_type": "code", "source": ["!nvidia-smi\n", NOTEBOOK]},
             {"cell_type": "code", "source": ["trainer = train_on_responses_only(trainer)"]}]  # fmt: skip
    made, same = imported(tmp_path, "n.ipynb", json.dumps({"cells": cells}))
    assert same.data.train_on == "completion"
    assert same.training == config.training


def test_pefts_file_and_folder(tmp_path: Path):
    made, config = imported(tmp_path, "adapter_config.json", json.dumps(PEFT))
    assert (made.tool, made.left) == ("PEFT", [])
    assert (config.adapter.method, config.adapter.r, config.adapter.rank_pattern) == ("dora", 8, {"down_proj": 4})
    assert import_config(tmp_path).values == made.values

    program = ("config = LoraConfig(r=4, target_modules='all-linear', task_type=TaskType.CAUSAL_LM)\n"
               "bnb = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='fp4', "
               "bnb_4bit_compute_dtype=torch.bfloat16)\n")  # fmt: skip
    _, config = imported(tmp_path, "p.py", program)
    assert (config.model.quantization, config.model.compute_dtype) == ("fp4", "bfloat16")
    assert (config.adapter.r, config.adapter.lora_alpha, config.training.learning_rate) == (4, 8, 5e-5)


@pytest.mark.parametrize("known", FORMATS, ids=lambda known: known.name)
def test_every_key_of_a_table_leads_somewhere(known):
    """A key of ours that there is; and each is either taken over or listed, whatever its value."""
    for key, entry in known.keys.items():
        if isinstance(entry, Taken):
            section, _, name = entry.ours.partition(".")
            assert name in SECTIONS[section].model_fields, key
        for value in (True, 3, 0.5, "odd-value", ["a"], {"a": 1}):
            made = converted(known, {key: value}, {})
            ours = [key for key, _, _ in made.taken]
            named = [left for left, _, _ in made.left]
            asks_for_nothing = isinstance(entry, Left) and value in entry.neutral
            if not (ours or named or asks_for_nothing):  # a switch that was left off, or a number of no steps
                assert isinstance(entry, Taken) and entry.convert is not None, (key, value)


# Each key of the tables with a value that its tool's users write, and what it is here; what stands in no list is taken
# as it is.
SAME_EVERYWHERE = {
    "output_dir": "out", "num_train_epochs": 2, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 5,
    "learning_rate": 3e-4, "weight_decay": 0.1, "max_grad_norm": 0.3, "label_smoothing_factor": 0.1, "seed": 7,
    "logging_steps": 9, "save_steps": 11, "save_total_limit": 4, "max_steps": 13, "r": 12, "lora_r": 12,
    "lora_rank": 12, "lora_alpha": 24, "lora_dropout": 0.2, "use_rslora": True, "max_seq_length": 99, "cutoff_len": 99,
    "sequence_len": 99, "packing": True, "sample_packing": True, "trust_remote_code": True, "bias": "all",
    "micro_batch_size": 3, "batch_size": 3, "num_epochs": 2, "random_seed": 7, "random_state": 7,
    "loraplus_lr_ratio": 16, "double_quantization": False, "bnb_4bit_use_double_quant": False, "group_by_length": False,
}  # fmt: skip


@pytest.mark.parametrize("known", FORMATS, ids=lambda known: known.name)
@pytest.mark.parametrize(("key", "value"), SAME_EVERYWHERE.items())
def test_values_that_mean_the_same(known, key, value):
    entry = known.keys.get(key)
    if not isinstance(entry, Taken):
        assert entry is None  # a key that this tool does not have
        return
    made = converted(known, {key: value}, {})
    section, _, name = entry.ours.partition(".")
    assert made.values[section] == {name: value}


@pytest.mark.parametrize(
    ("tool", "keys", "expected"),
    [
        ("Axolotl", {"load_in_8bit": True}, "model.quantization: int8"),
        ("Axolotl", {"load_in_4bit": False}, "model.quantization: none"),
        ("Axolotl", {"adapter": "llama-adapter"}, "adapter.method: llama_adapter"),
        ("Axolotl", {"adapter": ""}, "adapter.method: full"),
        ("Axolotl", {"adapter": "lora", "peft_use_dora": True}, "adapter.method: dora"),
        ("Axolotl", {"train_on_inputs": True}, "data.train_on: all"),
        ("Axolotl", {"warmup_ratio": 0.1}, "training.warmup_steps: 0.1"),
        ("Axolotl", {"warmup_ratio": 0.1, "lr_scheduler": "constant"}, "training.warmup_steps: 0"),
        ("Axolotl", {"lr_scheduler": "constant_with_warmup"}, "training.lr_scheduler_type: constant"),
        ("Axolotl", {"optimizer": "adamw_bnb_8bit"}, "training.optim: adamw_8bit"),
        ("Axolotl", {"datasets": [{"path": "json", "data_files": "a.jsonl"}]}, "data.train: a.jsonl"),
        ("Axolotl", {"datasets": [{"path": "a", "type": "completion"}]}, "data.train: [{path: a, format: text}]"),
        ("Axolotl", {"datasets": [{"path": "a"}, {"path": "b"}]}, "data.train: [a, b]"),
        ("Axolotl", {"datasets": [{"path": "a", "field_messages": "chat"}]},
         "data.train: [{path: a, columns: {messages: chat}}]"),
        ("Axolotl", {"chat_template_jinja": "chat.jinja"}, "data.chat_template: chat.jinja"),
        ("LLaMA-Factory", {"quantization_bit": 8}, "model.quantization: int8"),
        ("LLaMA-Factory", {"quantization_bit": 4, "quantization_type": "fp4"}, "model.quantization: fp4"),
        ("LLaMA-Factory", {"lora_target": "all"}, "adapter.target_modules: all-linear"),
        ("LLaMA-Factory", {"additional_target": "embed_tokens,lm_head"},
         "adapter.modules_to_save: [embed_tokens, lm_head]"),
        ("LLaMA-Factory", {"pissa_init": True}, "adapter.init_lora_weights: pissa"),
        ("LLaMA-Factory", {"neat_packing": True}, "data.packing: true"),
        ("LLaMA-Factory", {"enable_thinking": False}, "data.chat_template_kwargs: {enable_thinking: false}"),
        ("LLaMA-Factory", {"fp16": True}, "model.compute_dtype: float16"),
        ("Unsloth", {"load_in_4bit": True}, "model.quantization: nf4"),
        ("Unsloth", {"full_finetuning": True}, "adapter.method: full"),
        ("Unsloth", {"use_loftq": True}, "adapter.init_lora_weights: loftq"),
        ("Unsloth", {"dtype": "torch.float16"}, "model.compute_dtype: float16"),
        ("Unsloth", {"dataset_text_field": "story"}, "data.columns: {text: story}"),
        ("PEFT", {"peft_type": "ADAPTION_PROMPT"}, "adapter.method: llama_adapter"),
        ("PEFT", {"init_lora_weights": "pissa_niter_4"}, "adapter.init_lora_weights: pissa_niter_4"),
        ("PEFT", {"loftq_config": {"loftq_bits": 4, "loftq_iter": 2}}, "adapter.loftq_iter: 2"),
        ("PEFT", {"target_modules": r".*\.q_proj$"}, r"adapter.target_modules: .*\.q_proj$"),
    ],
)  # fmt: skip
def test_values_that_turn(tool, keys, expected):
    known = next(known for known in FORMATS if known.name == tool)
    made = converted(known, keys, {})
    key, _, value = expected.partition(": ")
    section, _, name = key.partition(".")
    assert made.values[section][name] == yaml.safe_load(value)


@pytest.mark.parametrize(
    ("tool", "keys", "why"),
    [
        ("Axolotl", {"optimizer": "lion_8bit"}, "the optimizers here: adamw, adamw_8bit, paged_adamw_8bit"),
        ("Axolotl", {"val_set_size": 500}, "a number of rows; data.eval takes a share such as 0.02, or a file"),
        ("Axolotl", {"rl": "dpo"}, "preferences and rewards are not trained here"),
        ("Axolotl", {"sample_packin": True}, "no key of Axolotl's that is known here; did you mean 'sample_packing'?"),
        ("Axolotl", {"datasets": [{"path": "a", "split": "train[:10%]"}]}, "no counterpart; columns are set by "
         "data.columns"),
        ("LLaMA-Factory", {"dataset": "identity,alpaca_en_demo"}, "the name of a data set in that tool's own list; set "
         "data.train to the file or hub id itself"),
        ("LLaMA-Factory", {"finetuning_type": "freeze"}, "of its methods here: lora, full"),
        ("LLaMA-Factory", {"quantization_bit": 3}, "4 bits (nf4, fp4) and 8 (int8) are there"),
        ("PEFT", {"init_lora_weights": "eva"}, "not among the starts here: default, gaussian, symmetric, pissa, loftq, "
         "calibrated"),
        ("PEFT", {"layer_replication": [[0, 4]]}, "not done here; see docs/methods.md"),
    ],
)  # fmt: skip
def test_what_has_no_counterpart_is_listed_with_the_reason(tool, keys, why):
    known = next(known for known in FORMATS if known.name == tool)
    made = converted(known, keys, {})
    assert why in [reason for _, _, reason in made.left]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (AXOLOTL + "rl: dpo\n", "rl = dpo: not done here: preferences and rewards are not trained here"),
        (AXOLOTL.replace("qlora", "ia3"),
         "adapter = ia3: not done here: the methods here are those of docs/methods.md"),
        (LLAMA_FACTORY.replace("sft", "dpo"),
         "stage = dpo: not done here: supervised fine-tuning (sft) and training on plain text (pt) are done here"),
        (LLAMA_FACTORY.replace("finetuning_type: lora", "finetuning_type: freeze"),
         "finetuning_type = freeze: not done here: of its methods here: lora, full"),
        (STUDIO + "training_type: cpt\n", "training_type = cpt: not done here: of its methods here: lora, full"),
        (json.dumps({**PEFT, "peft_type": "IA3"}), "peft_type = IA3: not done here: of its methods here: lora, loha, "
         "lokr, vera, llama_adapter"),
        (NOTEBOOK + "DPOTrainer(model)\n", "DPOTrainer: not done here: supervised fine-tuning by the methods of "
         "docs/methods.md is"),
    ],
)  # fmt: skip
def test_another_kind_of_training_is_refused(tmp_path: Path, text: str, line: str):
    """Not turned into one of ours with a line among others that says so."""
    file, ours = tmp_path / ("a.py" if "import" in text else "a.yaml"), tmp_path / "ours.yaml"
    file.write_text(text)
    result = CliRunner().invoke(main, ["recipes", "import", str(file), str(ours)])
    assert (result.exit_code, result.stdout, ours.exists()) == (2, "", False)
    place = ", line 10" if "import" in text else ""
    assert result.stderr == f"error: {file}{place}: {line}\n"


def test_what_stands_in_the_place_of_a_value_that_is_none_here(tmp_path: Path):
    text = LLAMA_FACTORY.replace("quantization_bit: 4", "quantization_bit: 3").replace("cosine", "rex")
    made, config = imported(tmp_path, "l.yaml", text + "optim: lion_8bit\n")
    assert (config.model.quantization, config.training.optim, config.training.lr_scheduler_type) == (
        "nf4", "adamw", "cosine")  # fmt: skip
    assert [line for line in made.left_lines() if "template" not in line] == [
        "not taken over: quantization_bit = 3: 4 bits (nf4, fp4) and 8 (int8) are there; model.quantization: nf4 (the "
        "default) is in its place",
        "not taken over: lr_scheduler_type = rex: the schedules here: constant, linear, cosine; "
        "training.lr_scheduler_type: cosine (the default) is in its place",
        "not taken over: optim = lion_8bit: the optimizers here: adamw, adamw_8bit, paged_adamw_8bit; training.optim: "
        "adamw (the default) is in its place",
    ]
    _, config = imported(tmp_path, "pt.yaml", LLAMA_FACTORY.replace("sft", "pt"))
    assert config.data.format == "text"


def test_two_keys_that_say_otherwise_are_told():
    known = next(known for known in FORMATS if known.name == "Unsloth")
    made = converted(known, {"random_state": 1, "seed": 2}, {})
    assert made.values["training"] == {"seed": 1}
    assert made.left_lines() == ["not taken over: seed = 2: training.seed is 1 already, by another key of the file"]


def test_what_our_own_checks_refuse_is_listed(tmp_path: Path):
    made, config = imported(tmp_path, "a.yml", AXOLOTL + "early_stopping_patience: 3\nlora_alpha: -1\n"
                            .replace("lora_alpha", "max_grad_norm"))  # fmt: skip
    assert config.training.early_stopping_patience is None
    assert config.training.max_grad_norm == 1.0
    lines = [line for line in made.left_lines() if "early_stopping" in line or "max_grad_norm" in line]
    assert lines == [
        "not taken over: max_grad_norm = -1: expected a number of at least 0, found -1; training.max_grad_norm: 1.0 "
        "(the default) is in its place",
        "not taken over: early_stopping_patience = 3: 3, but the only evaluation is at the end; set "
        "training.eval_steps, or leave it out",
    ]


def test_formats_are_told_apart():
    for text, name in ((AXOLOTL, "Axolotl"), (LLAMA_FACTORY, "LLaMA-Factory"), (STUDIO, "Unsloth")):
        assert recognized(yaml.safe_load(text)).name == name
    assert recognized(PEFT).name == "PEFT"
    assert recognized({"model": {"name_or_path": "x"}, "training": {"seed": 1}}) is None


def test_a_file_of_no_tool_that_is_known(tmp_path: Path):
    for name, text, said in (
        ("o.yaml", "model: {name_or_path: demo}\n", "a configuration of qlora-tool already"),
        ("x.yaml", "a: 1\n", "expected a configuration of PEFT"),
        ("l.json", "[1]", "expected a configuration of PEFT"),
        ("p.py", "print(1)\n", "no call of LoraConfig"),
        ("p.py", "print(\n", "not a Python program"),
        ("p.ipynb", "{}", "not a notebook"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=said):
            read_foreign(tmp_path / name)
    with pytest.raises(UserError, match="a folder without an adapter_config"):
        read_foreign(tmp_path)


def test_the_command_writes_a_file_and_shows_every_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("a.yml").write_text(AXOLOTL.replace("output_dir: ./outputs/out\n", ""))
    result = CliRunner().invoke(main, ["recipes", "import", "a.yml", "mine.yaml"])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("mine.yaml: made from a.yml (Axolotl), ")
    assert "not taken over: flash_attention = true: attention is chosen by itself\n" in result.stdout
    assert "seed                         training.seed: 42  (Axolotl's default)\n" in result.stdout
    assert result.stdout.endswith("next: qlora-tool preview mine.yaml\n")
    assert load_config("mine.yaml").training.output_dir == "runs/mine"
    head = Path("mine.yaml").read_text().splitlines()
    assert head[:3] == ["# Made from a.yml (Axolotl).", "#", "#   qlora-tool preview mine.yaml"]

    again = CliRunner().invoke(main, ["recipes", "import", "a.yml", "mine.yaml"])
    assert (again.exit_code, again.stderr.count("\n")) == (2, 1)
    assert "mine.yaml: exists already" in again.stderr
    shown = CliRunner().invoke(main, ["recipes", "import", "a.yml"])
    assert yaml.safe_load(shown.stdout)["model"]["quantization"] == "nf4"
    assert "not taken over: flash_attention = true" in shown.stderr


def test_a_foreign_configuration_in_the_place_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("a.yml").write_text(AXOLOTL)
    with pytest.raises(UserError) as caught:
        load_config("a.yml")
    assert caught.value.lines == [
        "a.yml: a configuration of Axolotl; turn it into one of qlora-tool with `qlora-tool recipes import a.yml "
        "my-run.yaml`"
    ]


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("model.load_in_4bit", "; here it is model.quantization (true: nf4)"),
        ("load_in_4bit", "; here it is model.quantization (true: nf4)"),
        ("model.load_in_8bit", "; here it is model.quantization (true: int8)"),
        ("adapter.lora_r", "; here it is adapter.r"),
        ("data.sequence_len", "; here it is data.max_length"),
        ("training.warmup_ratio", "; here it is training.warmup_steps (a share below 1)"),
        ("training.epochs", "; here it is training.num_train_epochs"),
        ("model.flash_attention", ", one of Axolotl's: attention is chosen by itself; leave it out"),
    ],
)
def test_keys_of_other_tools_in_a_configuration_of_ours(key, hint):
    with pytest.raises(UserError) as caught:
        load_config("demo", [f"{key}=true"])
    assert caught.value.lines == [f"--set {key}: unknown key{hint}"]
