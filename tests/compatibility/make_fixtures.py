"""Make what `test_earlier_files.py` reads: runs, checkpoints, adapters, cached bases and an export of one version.

    PYTHONPATH=CHECKOUT_OF_THAT_VERSION python tests/compatibility/make_fixtures.py

Run it with the code of the version whose files are wanted, in an environment that has its dependencies; it writes
`tests/compatibility/files/VERSION/`, all of it made by that version. Everything is tiny (a llama of two layers, width
64) and computed on the CPU. Paths inside are relative to that folder, which the tests copy and change into.

base/           the model: bf16, biases on the attention's projections, output layer not tied; a tokenizer with a chat
                template
data/           train.jsonl, eval.jsonl
runs/NAME/      a run for each entry of `FINISHED` and `STOPPED`. Those of `STOPPED` are as a kill after `STOP` steps
                leaves them: no adapter/, no later checkpoint, no later line in metrics.jsonl. Of `FINISHED` the run
                called `finished` alone keeps its last checkpoint and memory.json
ends/NAME/      adapter/ (PEFT's two files) and metrics.jsonl that the run of `STOPPED` had when nothing stopped it
bases/KIND/     cached quantized bases (`model.keep_quantized`), each under what follows the digest in its name, with
                the configuration that made it
merged/         `export-merged runs/finished`
recipes/        every shipped recipe with its defaults resolved
expected.json   what that version's `evaluate` said of runs/, ends/, base and merged, what its `generate` said, and the
                first records of training on `bases/`
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

FILES = Path(__file__).resolve().parent / "files"

TOTAL, STOP = 6, 3
PROMPTS = ("How many are 3 and 4?", "What is there?", "6")
RUN: dict[str, dict[str, Any]] = {
    "model": {"name_or_path": "base", "compute_dtype": "float32", "device": "cpu"},
    "adapter": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]},
    "data": {"train": "data/train.jsonl", "max_length": 96, "packing": False},
    "training": {
        "max_steps": TOTAL, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 0,
        "lr_scheduler_type": "constant", "save_steps": STOP, "gradient_checkpointing": False,
    },
}  # fmt: skip
# A has 4096 elements, the fewest that bitsandbytes keeps moments of in 8 bits; B has fewer: its moments are fp32.
LARGE: dict[str, Any] = {
    "adapter.r": 64, "adapter.lora_alpha": 64, "adapter.target_modules": r"model\.layers\.1\.self_attn\.k_proj",
    "training.optim": "adamw_8bit",
}  # fmt: skip
# Steps of half the distance between two bf16 weights: what is left of the masters decides how many are rounded.
SMALL_STEPS: dict[str, Any] = {"adapter.target_modules": ["q_proj"], "training.learning_rate": 2e-4}

FINISHED: dict[str, dict[str, Any]] = {
    "finished": {
        "adapter.target_modules": r"model\.layers\.0\..*_proj", "adapter.lora_dropout": 0.1, "data.packing": True,
        "data.eval": "data/eval.jsonl", "training.eval_steps": 3, "training.save_total_limit": 1,
        "training.lr_scheduler_type": "cosine", "training.warmup_steps": 2,
    },
    "dora": {"adapter.method": "dora", "model.quantization": "int8"},
    "patterns": {
        "adapter.rank_pattern": {"down_proj": 3}, "adapter.alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 7.0},
        "adapter.use_rslora": True, "adapter.init_lora_weights": "gaussian",
        "adapter.exclude_modules": ["1.mlp.down_proj"], "model.quantization": "fp4", "model.double_quant": False,
    },
    "saved": {
        "adapter.modules_to_save": ["lm_head", "norm"], "adapter.bias": "all", "model.quantization": "none",
        "training.label_smoothing_factor": 0.1,
    },
    "bias": {"adapter.target_modules": "all-linear", "adapter.bias": "lora_only", "data.padding_free": False},
    "embeddings": {"model.embeddings": "int8"},
    "from-adapter": {"adapter": {"init_from": "runs/finished/adapter"}, "training.weight_decay": 0.1},
}  # fmt: skip
STOPPED: dict[str, dict[str, Any]] = {
    "stopped": {
        "adapter.lora_dropout": 0.1, "training.gradient_accumulation_steps": 2, "training.lr_scheduler_type": "linear",
    },
    "stopped-bf16": {"model.compute_dtype": "bfloat16"} | SMALL_STEPS,
    "stopped-fp16": {"model.compute_dtype": "float16"} | SMALL_STEPS,
    "stopped-dora-bf16": {"model.compute_dtype": "bfloat16", "adapter.method": "dora"} | SMALL_STEPS,
    "stopped-saved": {
        "adapter.modules_to_save": ["norm"], "adapter.bias": "lora_only", "data.train_on": "all",
    } | SMALL_STEPS,
    "stopped-8bit": LARGE,
    "stopped-8bit-bf16": {"model.compute_dtype": "bfloat16"} | LARGE,
    "stopped-in-backward": {
        "training.optimizer_in_backward": True, "training.max_grad_norm": 0, "model.compute_dtype": "bfloat16",
    } | SMALL_STEPS,
}  # fmt: skip
BASES: dict[str, dict[str, Any]] = {
    "nf4-double-float32-1": {},
    "int8-int8_embeddings-float32-1": {"model.quantization": "int8", "model.embeddings": "int8"},
}


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from qlora_tool import __version__

    target = FILES / __version__
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    os.chdir(target)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["QLORA_TOOL_CACHE"] = cache
        make_all(Path(cache))
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    print(f"{target}: {size / 1e6:.2f} MB")


def make_all(cache: Path) -> None:
    expected: dict[str, Any] = {"evaluate": {}, "generate": {}, "bases": {}}
    write_base(Path("base"))
    write_data()
    for name, values in FINISHED.items():
        train(name, values)
        if name != "finished":
            shutil.rmtree(f"runs/{name}/checkpoints")
            Path(f"runs/{name}/memory.json").unlink()
        expected["evaluate"][name] = evaluate(f"runs/{name}")
    for name, values in STOPPED.items():
        train(name, values)
        expected["evaluate"][f"ends/{name}"] = evaluate(f"runs/{name}")
        stop(Path("runs") / name, Path("ends") / name)
    command("export-merged", "runs/finished", "--output-dir", "merged", "--verify-data", "data/eval.jsonl")
    expected["evaluate"] |= {"base": evaluate("base"), "merged": evaluate("merged")}
    for name in ("runs/finished", "merged"):
        options = ("--device", "cpu", "--compute-dtype", "float32", "--max-new-tokens", "12")
        asked = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
        expected["generate"][Path(name).name] = command("generate", name, *asked, *options)
    for kind, values in BASES.items():
        train("kept", {"model.keep_quantized": True} | values)
        (folder,) = (path for path in (cache / "bases").iterdir() if path.name.partition("-")[2] == kind)
        shutil.copytree(folder, Path("bases") / kind)
        shutil.copy("runs/kept/config.yaml", Path("bases") / kind)
        expected["bases"][kind] = records(Path("runs/kept"))[:2]
        shutil.rmtree("runs/kept")
    write_recipes(Path("recipes"))
    Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")


def write_base(folder: Path) -> None:
    """A random llama and a byte-level tokenizer of ASCII's printable characters and a few words."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = [*map(chr, range(33, 127)), "Ġ", "Ċ"]
    trainer = trainers.BpeTrainer(vocab_size=104, special_tokens=["<|im_start|>", "<|im_end|>"],
                                  initial_alphabet=alphabet, show_progress=False)  # fmt: skip
    tokenizer.train_from_iterator(["How many are there? system user assistant and "] * 4, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
        chat_template="{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + "
        "'<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    ).save_pretrained(folder)  # fmt: skip
    config = AutoConfig.for_model(
        "llama", vocab_size=104, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, max_position_embeddings=128, attention_bias=True, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_matrix = parameter.dim() == 2
            parameter.copy_(noise / parameter.shape[-1] ** 0.5 if is_matrix else parameter + 0.1 * noise)
    model.to(torch.bfloat16).save_pretrained(folder)


def write_data() -> None:
    Path("data").mkdir()
    for name, numbers in {"train": range(16), "eval": range(20, 26)}.items():
        rows = [{"prompt": f"How many are {n} and {n * 7 % 11}?", "completion": f"{n + n * 7 % 11} " * (1 + n % 3)}
                for n in numbers]  # fmt: skip
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        Path(f"data/{name}.jsonl").write_text(text, encoding="utf-8")


def train(name: str, values: dict[str, Any]) -> None:
    """Train `runs/NAME`: `RUN` with other values, by dotted key or for a whole section."""
    import yaml

    content: dict[str, Any] = {section: dict(keys) for section, keys in RUN.items()}
    for place, value in values.items():
        section, dot, key = place.partition(".")
        content[section] = content[section] | {key: value} if dot else value
    content["training"]["output_dir"] = f"runs/{name}"
    file = Path(f"{name}.yaml")
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    if values.get("training.optimizer_in_backward"):  # version 0.1.0 cannot train it from its command line
        from qlora_tool.config import load_config
        from qlora_tool.training.loop import train as train_loop

        train_loop(load_config(str(file)))
    else:
        command("train", str(file))
    file.unlink()


def command(*arguments: str) -> str:
    """What a command of the tool prints."""
    from click.testing import CliRunner

    from qlora_tool.cli import main as tool

    result = CliRunner().invoke(tool, list(arguments))
    if result.exit_code:
        raise RuntimeError(f"{' '.join(arguments)}: {result.stderr}") from result.exception
    return result.stdout


def evaluate(name: str) -> dict[str, Any]:
    file = Path("scores.json")
    command("evaluate", name, "--data", "data/eval.jsonl", "--device", "cpu", "--compute-dtype", "float32",
            "--json", str(file))  # fmt: skip
    scores = json.loads(file.read_text(encoding="utf-8"))
    file.unlink()
    return {key: scores[key] for key in ("loss", "tokens")}


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def stop(run: Path, end: Path) -> None:
    """Take from a finished run what it would not have after a kill just after step `STOP`, and keep it in `end`."""
    end.mkdir(parents=True)
    shutil.move(run / "adapter", end / "adapter")
    for extra in (path for path in (end / "adapter").iterdir() if not path.name.startswith("adapter_")):
        extra.unlink()
    shutil.rmtree(run / "checkpoints" / f"step-{TOTAL:06d}")
    metrics = run / "metrics.jsonl"
    shutil.copy(metrics, end)
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    metrics.write_text("".join(lines[:STOP]), encoding="utf-8")


def write_recipes(folder: Path) -> None:
    from qlora_tool.config import config_to_yaml, load_config

    folder.mkdir()
    listed = [line.split()[0] for line in command("recipes", "list").splitlines() if line and not line[0].isspace()]
    for name in listed:
        (folder / f"{name}.yaml").write_text(config_to_yaml(load_config(name)), encoding="utf-8")


if __name__ == "__main__":
    main()
