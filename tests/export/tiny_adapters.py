"""Adapters and runs on the tiny models: adapters with nothing left at its start, by the project and by PEFT."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from tiny_models import read_by_transformers, write_tiny
from tokenizers_for_tests import CHATML, byte_level
from torch import nn

from qlora_tool.adapters.attach import attach
from qlora_tool.adapters.peft_files import save_adapter
from qlora_tool.artifacts import Artifact, BaseOptions, find_artifact
from qlora_tool.build.open import open_model
from qlora_tool.config import AdapterConfig, Config, ModelConfig
from qlora_tool.files.atomic import write_json
from qlora_tool.files.hashes import file_hashes
from qlora_tool.training.loop import train

# What runs in fp32 on the CPU is compared; the options only say how.
FP32 = {"device": "cpu", "compute_dtype": "float32"}
IDS = torch.tensor([[5, 17, 99, 3, 42, 64, 120, 8, 77, 5]])


def disturb(parameters: Iterable[nn.Parameter], seed: int = 1) -> None:
    """Move each parameter by noise of a fifth of its size, and to that size where it is zero (B, biases)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            deviation = float(parameter.std()) if parameter.numel() > 1 else 0.0
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.add_(noise * (0.2 * deviation or 0.2))


def write_adapter(folder: Path, base: Path, *, quantization: str = "nf4", double_quant: bool = True, **adapter) -> Path:
    """An adapter as a run leaves it, `qlora_tool.json` included, with random values.

    Args:
        folder: where it goes.
        base: the model's folder.
        adapter: keys of `AdapterConfig`.
    """
    model = open_model(
        ModelConfig(name_or_path=str(base), quantization=quantization, double_quant=double_quant, **FP32)
    )
    config = AdapterConfig(**({"r": 4, "lora_alpha": 8} | adapter))
    adapters = attach(model.module, config, torch.float32, seed=0)
    disturb(adapters.parameters())
    folder.mkdir(parents=True)
    save_adapter(folder, adapters, config, model.module, str(base), None)
    origin = {"name_or_path": str(base), "revision": None, "files": file_hashes(base)}
    values = {"base": origin, "quantization": quantization, "double_quant": double_quant, "method": config.method}
    write_json(folder / "qlora_tool.json", values)
    return folder


def write_peft_adapter(folder: Path, base: Path, **settings) -> Path:
    """An adapter as PEFT saves it, all that it trains at random values.

    Args:
        settings: of `LoraConfig`.
    """
    from peft import LoraConfig, get_peft_model

    model = read_by_transformers(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied tensors that come apart, and of one-dimensional ones
        model = get_peft_model(model, LoraConfig(**({"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | settings)))
        disturb(parameter for parameter in model.parameters() if parameter.requires_grad)
        model.save_pretrained(folder)
    return folder


def artifact_of(folder: Path, **options) -> Artifact:
    """What the command line makes of a folder, to run in fp32 on the CPU."""
    return find_artifact(str(folder), BaseOptions(**FP32, **options))


@torch.no_grad()
def live_logits(artifact: Artifact, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Of the quantized model with its adapter, (rows, length, vocabulary)."""
    model = open_model(artifact.model, artifact.adapter)
    return model.module(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def peft_logits(base: Path, adapter: Path, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Of PEFT's model on the unquantized base."""
    from peft import PeftModel

    return PeftModel.from_pretrained(read_by_transformers(base), adapter).eval()(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def plain_logits(folder: Path, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Of a model folder in plain transformers, its products in fp32."""
    return read_by_transformers(folder)(input_ids=ids, use_cache=False).logits


def write_chat_base(family: str, folder: Path, **changes) -> Path:
    """A tiny model with a tokenizer that fits it, its chat template and generation settings."""
    tokenizer = byte_level(CHATML)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 128, "n_positions": 128}
    write_tiny(family, folder, **(sizes | changes))
    tokenizer.save_pretrained(folder)
    settings = {"eos_token_id": tokenizer.eos_token_id, "do_sample": False}
    write_json(folder / "generation_config.json", settings)
    return folder


def write_run(
    folder: Path, base: Path, *, adapter: dict | None = None, model: dict | None = None, data: dict | None = None,
    **training,
) -> Path:
    """A run that really trained, three steps on a dozen sums, and its folder."""
    file = folder.with_name(f"{folder.name}.jsonl")
    rows = [{"prompt": f"What is {n} and {n}?", "completion": f"It is {n + n}."} for n in range(12)]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    config = {
        "model": {"name_or_path": str(base), **FP32, **(model or {})},
        "adapter": {"r": 4, **(adapter or {})},
        "data": {"train": str(file), "max_length": 128, **(data or {})},
        "training": {"output_dir": str(folder), "max_steps": 3, "learning_rate": 0.01, "warmup_steps": 0} | training,
    }
    train(Config.model_validate(config))
    return folder


def write_two_runs(folder: Path) -> Path:
    """A chat base, `model`, and two runs on it, `sums` and `other`."""
    base = write_chat_base("llama", folder / "model")
    write_run(folder / "sums", base)
    write_run(folder / "other", base, adapter={"r": 2, "target_modules": ["q_proj", "v_proj"]}, seed=5)
    return folder
