"""The trainings that are compared, each a step at a time, and how the memory of a step is counted, for all alike."""

from __future__ import annotations

import contextlib
import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from measuring.ours import OurSide, PlainSide, allocations, device_and_dtype, model_folder
from qlora_tool.config import Config

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from qlora_tool.data.batches import Batch


class Side(Protocol):
    """A training that can take one step at a time."""

    device: torch.device

    def step(self, batch: Batch) -> float:
        """An optimizer step on a batch; the loss before it, the mean over its trained tokens."""
        ...

    def loss_sum(self, batch: Batch) -> Tensor:
        """The loss summed over the batch's trained tokens."""
        ...

    def trained(self) -> list[Tensor]:
        """The parameters that are trained."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write the adapter as it is now, in PEFT's form."""
        ...


class PeftSide:
    """transformers, bitsandbytes and PEFT, as their documentation puts them together.

    `prepare_model_for_kbit_training`, with non-reentrant checkpointing (transformers 5's default) where
    `gradient_checkpointing` is on; 16-bit products under autocast, as the Trainer's `bf16` has them. In training mode
    throughout, evaluation included: in evaluation mode on a CPU with bf16 instructions, bitsandbytes 0.50's Linear4bit
    repacks its weight for good and computes in bf16 whatever was asked for (0.3 % off).
    """

    def __init__(self, config: Config, _largest: Batch | None = None):
        import torch
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

        self._common(config)
        base = quantized_by_transformers(config)
        checkpointing = config.training.gradient_checkpointing
        base = prepare_model_for_kbit_training(
            base,
            use_gradient_checkpointing=bool(checkpointing),
            gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        )
        torch.manual_seed(config.training.seed)
        adapter = config.adapter
        lora = LoraConfig(
            r=adapter.r, lora_alpha=adapter.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM",
            use_rslora=adapter.use_rslora, use_dora=adapter.method == "dora", rank_pattern=dict(adapter.rank_pattern),
            alpha_pattern=dict(adapter.alpha_pattern),
        )  # fmt: skip
        self.model = get_peft_model(base, lora)
        self.model.train()
        self.optimizer = _plain_optimizer(config, self.trained())

    def _common(self, config: Config) -> None:
        self.device, self.dtype = device_and_dtype(config)
        self.max_grad_norm = config.training.max_grad_norm

    def trained(self) -> list[Tensor]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _loss(self, batch: Batch) -> Tensor:
        """As transformers computes it: the mean over the labels that are not -100, once shifted."""
        import torch

        half = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype) if half else contextlib.nullcontext():
            return self.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels, use_cache=False
            ).loss

    def step(self, batch: Batch) -> float:
        import torch

        loss = self._loss(batch)
        loss.backward()
        if self.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.trained(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def loss_sum(self, batch: Batch) -> Tensor:
        return self._loss(batch) * batch.trained_tokens

    def save(self, folder: str | Path) -> None:
        self.model.save_pretrained(folder)


class UnslothSide(PeftSide):
    """Unsloth, as its documentation puts it together, with its own checkpointing. CUDA only; never run by us so far."""

    def __init__(self, config: Config, largest: Batch):
        from unsloth import FastLanguageModel  # first of all: it patches transformers

        self._common(config)
        base, _tokenizer = FastLanguageModel.from_pretrained(
            str(model_folder(config)),
            max_seq_length=largest.input_ids.shape[1],
            dtype=self.dtype,
            load_in_4bit=config.model.quantization == "nf4",
            load_in_8bit=config.model.quantization == "int8",
        )
        self.model = FastLanguageModel.get_peft_model(
            base, r=config.adapter.r, lora_alpha=config.adapter.lora_alpha, lora_dropout=0,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            use_gradient_checkpointing="unsloth" if config.training.gradient_checkpointing else False,
            random_state=config.training.seed,
        )  # fmt: skip
        self.optimizer = _plain_optimizer(config, self.trained())


SIDES: dict[str, type] = {"ours": OurSide, "plain": PlainSide, "peft": PeftSide, "unsloth": UnslothSide}


def quiet_transformers() -> None:
    """No warnings and no progress bars of its own between our lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def quantized_by_transformers(config: Config) -> nn.Module:
    """The base as transformers and bitsandbytes read and quantize it."""
    from transformers import AutoModelForCausalLM

    device, dtype = device_and_dtype(config)
    return AutoModelForCausalLM.from_pretrained(
        model_folder(config),
        dtype=dtype,
        device_map={"": 0 if device.type == "cuda" else "cpu"},
        **_quantization(config, dtype),
    )


def _quantization(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """What tells transformers how to quantize; nothing where the folder says how it was (None would overrule it)."""
    from transformers import BitsAndBytesConfig

    settings = config.model
    if settings.quantization == "none" or "quantization_config" in json.loads(
        (model_folder(config) / "config.json").read_text(encoding="utf-8")
    ):
        return {}
    if settings.quantization == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=settings.quantization,
            bnb_4bit_use_double_quant=settings.double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    }


def _plain_optimizer(config: Config, parameters: list[Tensor]) -> Any:
    """torch's AdamW, or bitsandbytes' in 8 bits, at the configuration's constant rate."""
    import torch

    training = config.training
    settings = {"lr": training.learning_rate, "weight_decay": training.weight_decay}
    if training.optim == "adamw":
        return torch.optim.AdamW(parameters, **settings)
    import bitsandbytes as bnb

    kind = bnb.optim.PagedAdamW8bit if training.optim == "paged_adamw_8bit" else bnb.optim.AdamW8bit
    return kind(parameters, **settings)


# ------------------------------------------------------------------------------------------------- measuring a step


def peak_tensor_bytes(step: Callable[[], Any], device: torch.device) -> dict[str, int]:
    """The most bytes of tensors during one call of `step`, and those there before it.

    CUDA: the allocator's own figures. CPU: what the tensors that are there hold, and on top of it every allocation and
    free of the allocator meanwhile, as the profiler records them. No operator is watched, and nothing asks which
    library a tensor belongs to: the same count for every side.
    """
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return {"peak_bytes": peak, "before_bytes": before, "reserved_bytes": reserved}
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's own lines about when it starts and stops
    from torch.profiler import ProfilerActivity, profile

    before = live_tensor_bytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    total = peak = 0
    for _, size in allocations(profiler):
        total += size
        peak = max(peak, total)
    return {"peak_bytes": before + peak, "before_bytes": before}


def live_tensor_bytes() -> int:
    """Bytes of all storages on the CPU that a tensor of Python's holds; each once."""
    import torch

    storages: dict[int, int] = {}
    for tensor in [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]:
        held = [tensor]
        if tensor.is_leaf and tensor.requires_grad and tensor.grad is not None:
            held.append(tensor.grad)
        for one in held:
            if one.device.type == "cpu" and one.layout == torch.strided:
                storage = one.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
