"""The trainings that `tools/benchmark` compares, and how the memory of a step is counted, for all in the same way."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import results  # noqa: F401 -- makes qlora_tool importable from the checkout

from qlora_tool.config import Config

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qlora_tool.data.batches import Batch


class Side(Protocol):
    """A training that can take one step at a time."""

    def step(self, batch: Batch) -> float:
        """An optimizer step on a batch; the loss before it, the mean over its trained tokens."""
        ...

    def trained(self) -> list[Tensor]:
        """The parameters that are trained."""
        ...

    def save(self, folder: str) -> None:
        """Write the adapter as it is now, in PEFT's form."""
        ...


class OurSide:
    """qlora-tool, by the functions that `qlora-tool train` runs.

    Args:
        config: of the run; `auto` settings are decided for `largest`.
        largest: the largest batch that will come.
    """

    def __init__(self, config: Config, largest: Batch):
        from qlora_tool.memory.plan.budget import choose_for_run
        from qlora_tool.training.optimizers import Optimizer
        from qlora_tool.training.prepare import prepare_model, resolve_config
        from qlora_tool.training.step import StepSettings

        self.config = resolve_config(config)
        choice = choose_for_run(self.config, largest)
        self.predicted_bytes = choice.predicted.peak_bytes if choice else None
        self.model, self.adapters = prepare_model(self.config, choice and choice.recomputation)
        self.packs = self.model.keeps_packed_apart()  # also finds out how
        self.model.module.train()
        training = self.config.training
        self.optimizer = Optimizer(training.optim, self.adapters.parameters(), training.weight_decay)
        self.settings = StepSettings(training.max_grad_norm, training.label_smoothing_factor)
        self.device = self.model.device

    def facts(self) -> dict[str, Any]:
        """What was decided for the run: the whole configuration, and what is recomputed in backward."""
        return {
            "config": self.config.model_dump(mode="json"),
            "recomputation": str(self.model.recomputation),
            "recomputed_share": recomputed_share(self.model),
            "predicted_bytes": self.predicted_bytes,
        }

    def step(self, batch: Batch) -> float:
        from qlora_tool.training.step import no_phases

        return self._step(batch, no_phases)

    def _step(self, batch: Batch, during) -> float:
        from qlora_tool.training.step import train_step

        rate = self.config.training.learning_rate
        return float(train_step(self.model, self.optimizer, [batch], self.settings, rate, during).loss)

    def trained(self) -> list[Tensor]:
        return self.adapters.parameters()

    def save(self, folder: str) -> None:
        from qlora_tool.adapters.peft_files import save_adapter

        name = self.config.model.name_or_path
        save_adapter(Path(folder), self.adapters, self.config.adapter, self.model.module, name, None)

    def categories(self, batch: Batch) -> dict[str, Any] | None:
        """The memory of one step by category, as `qlora-tool train` writes it into `memory.json`; None on CUDA."""
        from qlora_tool.memory.run_report import RunMemory

        with tempfile.TemporaryDirectory() as folder:
            run = SimpleNamespace(model=self.model, adapters=self.adapters, optimizer=self.optimizer,
                                  progress=SimpleNamespace(step=1), config=self.config,
                                  folder=SimpleNamespace(path=Path(folder)))  # fmt: skip
            with RunMemory().watch(run) as during:
                self._step(batch, during)
            return json.loads((Path(folder) / "memory.json").read_text(encoding="utf-8"))["measured"]


class PlainSide(OurSide):
    """The same without the fused LoRA operations."""

    def __init__(self, config: Config, largest: Batch):
        from qlora_tool.adapters.lora import LoraAdapter

        LoraAdapter.fused = False  # for all of this process
        super().__init__(config, largest)


def recomputed_share(model) -> float:
    """Of the products with frozen weights inside the decoder layers, the share that is computed again in backward."""
    from qlora_tool.model.checkpointing import decoder_layers
    from qlora_tool.weights.modules import FrozenLinear

    total = recomputed = 0
    for layer, parts in zip(decoder_layers(model.module).values(), model.recomputation.layers, strict=True):
        for name, module in layer.named_modules():
            if isinstance(module, FrozenLinear):
                work = module.in_features * module.out_features
                total += work
                recomputed += work * any(part == "" or f"{name}.".startswith(f"{part}.") for part in parts)
    return recomputed / total if total else 0.0


class PeftSide:
    """transformers, bitsandbytes and PEFT, as their documentation puts them together.

    `prepare_model_for_kbit_training`, with non-reentrant checkpointing (transformers 5's default) where
    `gradient_checkpointing` is on; 16-bit products under autocast, as the Trainer's `bf16` has them. In training mode
    throughout: in evaluation mode on a CPU, bitsandbytes 0.50's Linear4bit repacks its weight for good and computes in
    bf16 whatever was asked for.
    """

    def __init__(self, config: Config, _largest: Batch):
        import torch
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
        from transformers import AutoModelForCausalLM

        from qlora_tool.model.open import choose_device, choose_dtype
        from qlora_tool.model.source import resolve

        self.device = choose_device(config.model.device)
        self.dtype = choose_dtype(config.model.compute_dtype, self.device)
        self.rate, self.max_grad_norm = config.training.learning_rate, config.training.max_grad_norm
        base = AutoModelForCausalLM.from_pretrained(
            resolve(config.model.name_or_path, config.model.revision),
            dtype=self.dtype,
            device_map={"": 0 if self.device.type == "cuda" else "cpu"},
            **_quantization(config, self.dtype),
        )
        checkpointing = config.training.gradient_checkpointing
        base = prepare_model_for_kbit_training(
            base,
            use_gradient_checkpointing=bool(checkpointing),
            gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        )
        torch.manual_seed(config.training.seed)
        adapter = config.adapter
        lora = LoraConfig(
            r=adapter.r, lora_alpha=adapter.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        self.model = get_peft_model(base, lora)
        self.model.train()
        self.optimizer = _plain_optimizer(config, self.trained())

    def trained(self) -> list[Tensor]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def step(self, batch: Batch) -> float:
        import torch

        half = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype) if half else contextlib.nullcontext():
            loss = self.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels, use_cache=False
            ).loss
        loss.backward()
        if self.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.trained(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def save(self, folder: str) -> None:
        self.model.save_pretrained(folder)


class UnslothSide(PeftSide):
    """Unsloth, as its documentation puts it together, with its own checkpointing. CUDA only; never run by us so far."""

    def __init__(self, config: Config, largest: Batch):
        from unsloth import FastLanguageModel  # first of all: it patches transformers

        from qlora_tool.model.open import choose_device, choose_dtype
        from qlora_tool.model.source import resolve

        self.device = choose_device(config.model.device)
        self.dtype = choose_dtype(config.model.compute_dtype, self.device)
        self.rate, self.max_grad_norm = config.training.learning_rate, config.training.max_grad_norm
        base, _tokenizer = FastLanguageModel.from_pretrained(
            str(resolve(config.model.name_or_path, config.model.revision)),
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


def _quantization(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """What tells transformers how to quantize; nothing where the folder says how it was (None would overrule it)."""
    from transformers import BitsAndBytesConfig

    from qlora_tool.model.source import resolve

    settings = config.model
    folder = resolve(settings.name_or_path, settings.revision)
    if settings.quantization == "none" or "quantization_config" in json.loads(
        (Path(folder) / "config.json").read_text(encoding="utf-8")
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


def _plain_optimizer(config: Config, parameters: list[Tensor]):
    """torch's AdamW, or bitsandbytes' in 8 bits, at the configuration's constant rate."""
    import torch

    training = config.training
    settings = {"lr": training.learning_rate, "weight_decay": training.weight_decay}
    if training.optim == "adamw":
        return torch.optim.AdamW(parameters, **settings)
    import bitsandbytes as bnb

    kind = bnb.optim.PagedAdamW8bit if training.optim == "paged_adamw_8bit" else bnb.optim.AdamW8bit
    return kind(parameters, **settings)


SIDES: dict[str, type] = {"ours": OurSide, "plain": PlainSide, "peft": PeftSide, "unsloth": UnslothSide}


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

    from qlora_tool.memory.trace.measure import allocations

    before = live_tensor_bytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    total = peak = 0
    for _, size in sorted(allocations(profiler)):
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
